"""Policies that nobody here trained: controller networks of VNN-COMP, by the names of their files.

For each, a library is grown on what the policy visits in its world, another over its whole input box; both are
measured on observations that they have not seen, every certificate is proved again by the checker, sampled and
attacked, and the first library is run in closed loop against the policy alone.

    python benchmarks/foreign.py ../shared/data/policies/*.onnx
    python benchmarks/foreign.py lunarlander.onnx --steps 50000
    python benchmarks/foreign.py other.onnx --workload gym:MyRobot-v0 --decision argmax

A file whose name says which world it is from (cartpole, lunarlander, acasxu) needs no more; any other needs --workload
and --decision, or gets the box alone (--box). Exit code 1 if anything does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from laws_ros.build import workloads
from laws_ros.build.evaluate import check_fit, evaluate, observed
from laws_ros.build.grow import grow
from laws_ros.build.verify import verify
from laws_ros.build.workloads import Workload
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "policies"  # absent outside the workplace
# part of a file's name -> workload, decision, input box where the workload does not state a finite one
WORLDS: dict[str, tuple[str, str, float]] = {
    "cartpole": ("gym:CartPole-v1", "argmax", 3.0),
    "lunarlander": ("gym:LunarLander-v3", "argmax", 1.0),
    "acas": ("encounter", "argmin", 1.0),
}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def checked(library: Library, policy: Policy, network: Network, options: argparse.Namespace) -> dict[str, Any]:
    """What the checker, samples and attacks say."""
    found = verify(library, policy, network, options.samples, True, options.seed)
    return {
        "proved_again": found.rechecked,
        "samples": found.samples,
        "attacks": found.attacks,
        "violations": found.violations,
        "good": found.good,
    }


def visited(policy: Policy, network: Network, workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """A library over what the policy visits, and the closed loop with it."""
    seen, held = observed(policy, workload, options.steps, (options.seed, options.seed + 1_000_003))
    x, actions = np.concatenate(seen.observations), np.concatenate(seen.actions)
    tolerance = np.zeros(0 if policy.card.decision != "none" else policy.actions) + options.tolerance
    start = time.monotonic()
    growth = grow(policy, network, x, actions, tolerance, options.max_regions, options.max_certificates, say)
    seconds = time.monotonic() - start
    fresh = np.concatenate(held.observations)
    closed = evaluate(
        CachedPolicy(growth.library, policy), workload, options.episodes, options.seed + 2 * 1_000_003
    )  # fmt: skip
    return {
        "where": workload.spec.name,
        "observations": len(x),
        "regions": len(growth.library),
        "certificates_tried": growth.certificates_tried,
        "seconds": round(seconds, 1),
        "heldout_hit_rate": float((Router(growth.library, tolerance).many(fresh) >= 0).mean()),
        "closed_loop_hit_rate": closed.hit_rate,
        "return_cached": closed.return_cached,
        "return_policy": closed.return_policy,
        "mean_step_speedup": closed.mean_step_speedup,
        "closed_loop_violations": closed.violations,
        **checked(growth.library, policy, network, options),
    }


def box(policy: Policy, network: Network, limits: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    """A library over the whole input box, where every observation is as likely as any other."""
    rng = np.random.default_rng(options.seed)
    x, fresh = (rng.uniform(*limits, (count, len(limits[0]))).astype(np.float32) for count in (options.steps, 20_000))
    tolerance = np.zeros(0 if policy.card.decision != "none" else policy.actions) + options.tolerance
    start = time.monotonic()
    actions = policy.decide(policy.batch(x))
    growth = grow(policy, network, x, actions, tolerance, options.max_regions, options.max_certificates, say)
    return {
        "where": "whole box",
        "observations": len(x),
        "regions": len(growth.library),
        "certificates_tried": growth.certificates_tried,
        "seconds": round(time.monotonic() - start, 1),
        "heldout_hit_rate": float((Router(growth.library, tolerance).many(fresh) >= 0).mean()),
        **checked(growth.library, policy, network, options),
    }


def limits_of(workload: Workload | None, policy: Policy, width: float) -> np.ndarray:
    """[2, n]: the workload's limits where they are finite and small, else +- width."""
    channels = policy.card.observations if workload is None else workload.spec.observations
    stated = np.array([[c.low for c in channels], [c.high for c in channels]])
    return np.where(np.abs(stated) <= 1e3, stated, np.array([[-width], [width]]))


def world(path: Path, options: argparse.Namespace) -> tuple[str | None, str, float]:
    """Workload, decision and box of a file, from the command line or its name."""
    for part, (name, decision, width) in WORLDS.items():
        if part in path.name.lower():
            return options.workload or name, options.decision or decision, options.box or width
    return options.workload, options.decision or "none", options.box or 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", help=f"ONNX files (default: those in {SHARED.name})")
    parser.add_argument("--workload", help="instead of what the file's name says")
    parser.add_argument("--decision", choices=("none", "argmax", "argmin"))
    parser.add_argument("--tolerance", type=float, default=0.05, help="without a decision: action error (0.05)")
    parser.add_argument("--box", type=float, help="half-width where the workload states no limits")
    parser.add_argument("--steps", type=int, default=100_000, help="observations to learn from (default 100000)")
    parser.add_argument("--max-regions", type=int, default=20_000)
    parser.add_argument("--max-certificates", type=int, default=60_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    rows = []
    for path in [Path(p) for p in options.policies] or sorted(SHARED.glob("*.onnx")):
        name, decision, width = world(path, options)
        policy, network = Policy(path, 1, decision), load_network(path)
        workload = None if name is None else workloads.get(name, policy)
        say(f"{path.name}: {decision}, {name or 'no workload'}")
        if workload is not None:
            check_fit(policy, workload)
            rows.append({"policy": path.name, **visited(policy, network, workload, options)})
        rows.append({"policy": path.name, **box(policy, network, limits_of(workload, policy, width), options)})
    if options.json:
        print(json.dumps(rows))
    else:
        print("| policy | where | held out answered | regions | tried | grown in | proved again | violations |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
        for r in rows:
            print(
                f"| {r['policy']} | {r['where']} | {100 * r['heldout_hit_rate']:.1f}% | {r['regions']} | "
                f"{r['certificates_tried']} | {r['seconds']:.0f} s | {r['proved_again']} of {r['regions']} | "
                f"{r['violations']} in {r['samples']} samples, {r['attacks']} attacks |"
            )
        for r in rows:
            if "return_policy" in r:
                print(
                    f"\n{r['policy']} in closed loop: {100 * r['closed_loop_hit_rate']:.1f}% answered, return "
                    f"{r['return_cached']:.2f} (policy alone {r['return_policy']:.2f}), mean step "
                    f"{r['mean_step_speedup']:.2f} times cheaper, {r['closed_loop_violations']} violations"
                )
    return 0 if all(r["good"] and not r.get("closed_loop_violations") for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
