"""What collapsed experts are worth: held-out hits and multiplications on a policy that nobody trained for them.

    python benchmarks/collapsed.py --policy actor.onnx --workload gym:HalfCheetah-v5      # benchmarks/sac_actor.py
    python benchmarks/collapsed.py --wide 2048                                            # cost and bytes of one expert

With --policy: the workload is driven by the policy, a library of collapsed experts is grown on some episodes and
measured on fresh ones. With --wide: a random actor of that shape, 17-W-W-6; the time to certify, check, open and run
one expert, and its bytes as a fleet would send it (region, bound and states, zlib).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import timeit
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sac_actor import LAYERS, export

from laws_ros.build import workloads
from laws_ros.build.folded import grow_collapsed, multiplications
from laws_ros.core.checker import Checker
from laws_ros.core.collapse import collapse
from laws_ros.core.collapse_checker import verdict
from laws_ros.core.region import Regions
from laws_ros.runtime.experts import Experts
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def grown(options: argparse.Namespace) -> dict[str, Any]:
    """Coverage, cost and error of a library of collapsed experts."""
    policy, network = Policy(options.policy), load_network(options.policy)
    workload = workloads.get(options.workload, policy)
    tolerance = np.full(policy.actions, options.tolerance)
    seen, unseen = (
        workloads.rollouts(workload, lambda x: policy.decide(policy.batch(x)), episodes, seed)
        for episodes, seed in ((options.train, options.seed), (options.heldout, options.seed + 1))
    )
    x, fresh = np.concatenate(seen.observations), np.concatenate(unseen.observations)
    say(f"{len(x)} observations to grow on, {len(fresh)} held out")
    last, start = time.monotonic(), time.monotonic()

    def progress(text: str) -> None:
        nonlocal last
        if time.monotonic() - last > 20:
            last = time.monotonic()
            say(f"{last - start:.0f} s: {text}")

    growth = grow_collapsed(
        policy,
        network,
        x,
        tolerance,
        options.kind,
        options.share,
        max_certificates=options.certificates,
        progress=progress,
    )
    seconds = time.monotonic() - start
    library, certificates = growth.library, growth.library.certificates
    if options.out:
        library.save(options.out)
    found = Router(library, tolerance).many(fresh.astype(float))
    hit = found >= 0
    cost = certificates.cost[found[hit]] / multiplications(network)
    queries, index = fresh[hit], found[hit]
    error = np.abs(
        Experts(certificates, policy).many(index, queries).astype(float) - policy.batch(queries).astype(float)
    )
    bound = certificates.bound_offset[index]
    some = np.random.default_rng(0).permutation(len(library))[: options.check]
    checker = Checker(network)
    return {
        "kind": options.kind,
        "tolerance": options.tolerance,
        "policy_return": float(unseen.returns.mean()),
        "regions": len(library),
        "certificates_tried": growth.certificates_tried,
        "seconds": round(seconds, 1),
        "train_coverage": round(growth.train_coverage, 4),
        "heldout_hit_rate": round(float(hit.mean()), 4),
        "multiplications": multiplications(network),
        "share_of_multiplications": {"mean": round(float(cost.mean()), 4), "most": round(float(cost.max()), 4)},
        "bound": {"median": float(np.median(bound)), "most": float(bound.max())},
        "worst_error_seen": float(error.max()),
        "violations": int((error > bound).any(axis=1).sum()),
        "rechecked": f"{sum(verdict(checker, certificates, int(k)) == 'holds' for k in some)} of {len(some)}",
    }


def wide(width: int, radius: float, seed: int) -> dict[str, Any]:
    """One expert of a large policy."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path, sizes = Path(folder) / "wide.onnx", (17, width, width, 6)
        state = {}
        for (name, _), inputs, outputs in zip(LAYERS, sizes, sizes[1:], strict=False):
            state[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
            state[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)
        export(state, path)
        policy, network = Policy(path), load_network(path)
        axes = np.linalg.qr(rng.normal(size=(8, 17, 17)))[0]
        regions = Regions.from_axes(rng.normal(size=(8, 17)), axes, radius * rng.uniform(size=(8, 17)))
        tolerance = np.full(6, 0.05)
        collapse(network, regions[:1], "exact", tolerance)
        start = time.perf_counter()
        c = collapse(network, regions, "exact", tolerance)
        certified = (time.perf_counter() - start) / len(regions)
        start = time.perf_counter()
        checked = verdict(Checker(network), c, 0)
        checking = time.perf_counter() - start
        start = time.perf_counter()
        experts = Experts(c, policy)
        opening = (time.perf_counter() - start) / len(regions)
        x = regions.center.astype(np.float32)
        calls: tuple[Callable[[], Any], ...] = (lambda: experts(0, x[0]), lambda: policy(x[0]))
        us = [min(timeit.repeat(call, number=20, repeat=20)) / 20e-6 for call in calls]
        parts = [(c.center[k], c.transform[k], c.bound_offset[k], c.octets.row(k)) for k in range(len(c))]
        sent = [len(zlib.compress(b"".join(np.ascontiguousarray(a).tobytes() for a in part), 9)) for part in parts]
    return {
        "policy": f"17-{width}-{width}-6, {network.parameters} parameters",
        "share_of_multiplications": round(float(np.median(c.cost)) / multiplications(network), 5),
        "bound": float(np.median(c.bound_offset)),
        "certify_s": round(certified, 3),
        "check_s": round(checking, 2),
        "checked": checked,
        "open_s": round(opening, 3),
        "expert_us": round(us[0], 1),
        "policy_us": round(us[1], 1),
        "bytes": int(np.median(sent)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy")
    parser.add_argument("--workload", default="gym:HalfCheetah-v5")
    parser.add_argument("--kind", default="exact", choices=("exact", "mixed"))
    parser.add_argument("--share", type=float, default=0.25, help="most multiplications of an expert, of the policy's")
    parser.add_argument("--tolerance", type=float, default=0.05, help="action units")
    parser.add_argument("--train", type=int, default=150, help="episodes to grow on")
    parser.add_argument("--heldout", type=int, default=20, help="episodes to measure on")
    parser.add_argument("--certificates", type=int, default=8000, help="most of them to try")
    parser.add_argument("--check", type=int, default=50, help="certificates proved again by the checker")
    parser.add_argument("--out", help="write the library there")
    parser.add_argument("--wide", type=int, help="width of a random policy, instead of --policy")
    parser.add_argument("--radius", type=float, default=0.02, help="half-width of its regions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.policy and not options.wide:
        parser.error("one of --policy and --wide is needed")
    result = wide(options.wide, options.radius, options.seed) if options.wide else grown(options)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
