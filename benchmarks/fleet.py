"""What a fleet gains and what it costs.

    python benchmarks/fleet.py bytes --policy models/arm_sort.onnx      # bytes per expert and per update
    python benchmarks/fleet.py bytes --policy models/arm_sort.onnx --library LIB
    python benchmarks/fleet.py speed --workload arm_sort                # observations per robot until 80%

`bytes` publishes experts with a real desk in batches of several sizes and counts what a robot reads: chunks, the signed
list of them, and the rest of the metadata. Without a library, experts are made around observations of the policy's
workload; bytes do not depend on how well they answer. Collapsed ones come from a random 17-2048-2048-6 policy.

`speed` lets K simulated robots drive their own episodes. What the library of the moment does not answer goes to the
desk, which certifies around the misses of all and publishes (as `laws fleet publish --learn` does), every --round
seconds of operation. The hit rate is measured on other episodes. Robots take the experts in without the proof on
arrival, which costs time, but no observations.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from sac_actor import LAYERS, export

from laws_ros.build import workloads
from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.learn import Learner
from laws_ros.cli import parse_tolerance
from laws_ros.core.certificate import FORMAL, Certificates
from laws_ros.core.certify import certify
from laws_ros.core.collapse import collapse
from laws_ros.core.library import Library
from laws_ros.core.record import pack
from laws_ros.core.region import Regions
from laws_ros.fleet.desk import Desk
from laws_ros.fleet.items import Chunk, Identity, Items, encode
from laws_ros.fleet.robot import Robot, _Client
from laws_ros.runtime.files import resolve
from laws_ros.runtime.history import History
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

BATCHES = (1, 4, 16, 64)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def around(policy: Policy, workload: str, count: int) -> Certificates:
    """Experts in the principal axes of neighbouring observations of a workload."""
    found = policy_rollouts(policy, workloads.get(workload, policy), 4, 0)
    x = np.concatenate(found.observations).astype(float)
    starts = np.linspace(0, len(x) - 9, count).astype(int)
    parts = np.stack([x[k : k + 8] for k in starts])
    center = parts.mean(axis=1)
    axes = np.linalg.svd(parts - center[:, None])[2].transpose(0, 2, 1)
    along = np.abs((parts - center[:, None]) @ axes).max(axis=1)
    regions = Regions.from_axes(center, axes, 1.2 * along + 1e-3).brief()
    return certify(load_network(policy.path), regions, policy.card.decision).brief()


def folded(count: int, folder: Path) -> tuple[Policy, Certificates]:
    """Collapsed experts of a random 17-2048-2048-6 policy, 4.2 million parameters."""
    path, rng, widths = folder / "wide.onnx", np.random.default_rng(0), (17, 2048, 2048, 6)
    state = {}
    for (name, _), inputs, outputs in zip(LAYERS, widths, widths[1:], strict=False):
        state[f"{name}.weight"] = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        state[f"{name}.bias"] = 0.3 * rng.normal(size=outputs)
    export(state, path)
    axes = np.linalg.qr(rng.normal(size=(count, 17, 17)))[0]
    regions = Regions.from_axes(rng.normal(size=(count, 17)), axes, 0.02 * rng.uniform(size=(count, 17))).brief()
    return Policy(path), collapse(load_network(path), regions, "exact", np.full(6, 0.05)).brief()


def sizes(policy: Policy, certificates: Certificates) -> dict[str, float]:
    """Compressed bytes per expert, sent in batches."""
    identity = Identity(policy.sha256, policy.card)
    records = [pack(certificates, k) for k in range(len(certificates))]
    none = np.zeros((0, identity.inputs), np.float32)
    found = {}
    for batch in (batch for batch in BATCHES if batch <= len(records)):
        parts = [records[k : k + batch] for k in range(0, len(records) - batch + 1, batch)]
        per = [len(encode(identity, Chunk(Items({identity.name(r): r for r in p}), none))) / batch for p in parts]
        found[f"in batches of {batch}"] = round(float(np.median(per)), 1)
    return {"as a record": float(np.median([len(r) for r in records])), **found}


def updates(policy: Policy, certificates: Certificates, folder: Path) -> dict[str, Any]:
    """What a robot reads for publications of several sizes, metadata included; nothing is proved here."""
    desk = Desk.create(folder / "desk", str(folder / "store"), policy.path, [1.0])
    desk.repository.send(desk.store)
    root = folder / "desk" / "fleet" / "metadata" / "1.root.json"
    robot = Robot.join(folder / "robot", "robot", desk.store.url, policy.path, root)
    found, start = {}, 0
    for batch in BATCHES:
        if start + batch > len(certificates):
            break
        with desk.place.history() as history:
            history.add(certificates[start : start + batch], "benchmark")
        start += batch
        desk.publish()
        client = _Client(robot.fleet, robot.store)
        manifest = client.manifest(robot.place)
        for name in manifest["deltas"][-1][1]:
            client.target(name, 1 << 20)
        found[f"{batch} new experts"] = client.read
    client = _Client(robot.fleet, robot.store)
    return {"nothing new": client.read, **found}


def measure_bytes(options: argparse.Namespace) -> dict[str, Any]:
    policy = Policy(resolve(options.policy))
    if options.library:
        certificates = Library.load(resolve(options.library)).certificates
        certificates = certificates[np.flatnonzero(certificates.among(FORMAL))][: options.experts]
    else:
        certificates = around(policy, options.workload or policy.path.stem, options.experts)
    with tempfile.TemporaryDirectory() as folder:
        told = {"affine": sizes(policy, certificates), "update": updates(policy, certificates, Path(folder))}
        other, collapsed = folded(options.collapsed, Path(folder))
    return {"policy": policy.path.stem, "experts": len(certificates), **told, "collapsed": sizes(other, collapsed)}


def until(policy: Policy, workload: Any, robots: int, options: argparse.Namespace, x: np.ndarray) -> dict[str, Any]:
    """Observations per robot until the fleet's library answers the wanted share of held-out ones."""
    spec, network = workload.spec, load_network(policy.path)
    tolerance = parse_tolerance(options.tolerance, policy, workload)
    steps, chunk = round(60.0 * options.minutes / spec.period_s), round(options.round / spec.period_s)
    episodes = -(-steps // spec.episode_steps)
    streams = [
        np.concatenate(policy_rollouts(policy, workload, episodes, options.seed + 1000 * k).observations)[:steps]
        for k in range(robots)
    ]
    rate = seen = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        History(Path(folder) / "h.db", policy.sha256, policy.card, tolerance) as history,
    ):
        learner, started = Learner(history, policy, network), time.monotonic()
        for start in range(0, steps, chunk):
            part = np.concatenate([stream[start : start + chunk] for stream in streams])
            missed = part[Router(learner.library, tolerance).many(part) < 0]
            history.add_misses(missed, policy.batch(missed))
            learner.learn()
            before, rate = rate, float((Router(learner.library, tolerance).many(x) >= 0).mean())
            say(f"K={robots}: {start + chunk} observations each, {len(learner.library)} experts, {100 * rate:.1f}%")
            if rate >= options.rate:  # between the two lessons, in proportion
                seen = start + chunk * (options.rate - before) / (rate - before)
                break
        seconds = time.monotonic() - started
    return {"observations": round(seen) or None, "experts": len(learner.library), "seconds": round(seconds, 1)}


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    workload = workloads.get(options.workload)
    policy = Policy(resolve(options.policy or f"models/{options.workload}.onnx"), threads=2)
    fresh = policy_rollouts(policy, workload, -(-16_000 // workload.spec.episode_steps), options.seed - 1)
    x = np.concatenate(fresh.observations)
    found = {k: until(policy, workload, k, options, x) for k in options.robots}
    reached = {k: row["observations"] for k, row in found.items() if row["observations"]}
    speed = {k: round(reached[min(reached)] / value, 2) for k, value in reached.items()} if reached else {}
    fit = float(np.polyfit(np.log(list(speed)), np.log(list(speed.values())), 1)[0]) if len(speed) > 1 else None
    exponent = None if fit is None else round(fit, 3)
    return {
        "workload": options.workload,
        "rate": options.rate,
        "robots": found,
        "speed_up": speed,
        "exponent": exponent,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    c = commands.add_parser("bytes")
    c.add_argument("--policy", default="models/arm_sort.onnx")
    c.add_argument("--library")
    c.add_argument("--workload", help="default: the policy's name")
    c.add_argument("--experts", type=int, default=128)
    c.add_argument("--collapsed", type=int, default=16)
    c.set_defaults(run=measure_bytes)
    c = commands.add_parser("speed")
    c.add_argument("--workload", default="arm_sort")
    c.add_argument("--policy", help="default models/WORKLOAD.onnx")
    c.add_argument("--tolerance")
    c.add_argument("--robots", type=int, nargs="+", default=[1, 2, 4, 8])
    c.add_argument("--rate", type=float, default=0.8)
    c.add_argument("--minutes", type=float, default=60.0, help="of operation, at most")
    c.add_argument("--round", type=float, default=30.0, help="seconds of operation per publication")
    c.add_argument("--seed", type=int, default=11)
    c.set_defaults(run=measure_speed)
    options = parser.parse_args()
    run: Callable[[argparse.Namespace], dict[str, Any]] = options.run
    print(json.dumps(run(options), indent=2))


if __name__ == "__main__":
    main()
