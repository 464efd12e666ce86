"""What a fleet gains and what it costs.

    python benchmarks/fleet.py bytes --policy models/arm_sort.onnx      # bytes per expert and per update
    python benchmarks/fleet.py bytes --policy models/arm_sort.onnx --library LIB
    python benchmarks/fleet.py speed --workload arm_sort                # observations per robot until 80%
    python benchmarks/fleet.py day --hours 1 --round 15                 # what a robot tells and reads at work

`bytes` publishes experts with a real desk in batches of several sizes and counts what a robot reads: chunks, the signed
list of them, and the rest of the metadata. Without a library, experts are made around observations of the policy's
workload; bytes do not depend on how well they answer. Collapsed ones come from a random 17-2048-2048-6 policy.

`speed` hands the same episodes out to K simulated robots, each of which is met at a random moment of its work: robots
that all began with their first part would be seen doing little else. What the library of the moment does not answer
goes to the desk, which certifies around the misses of all and publishes (as `laws fleet publish --learn` does) whenever
they are a quarter as many again, and at least 500 more: after as many misses of the fleet for every K, so that the
steps are not mistaken for a gain or a loss. The hit rate is measured on other episodes; where it passes --rate is read
between two publications, on the line in the logarithm of observations. All of it once for each of --seeds, as one
library is a matter of luck; means are of logarithms, with their standard error. Robots take the experts in without the
proof on arrival, and the desk's lessons take no time of operation: both cost CPU, but no observations.

`day` lets one robot work with a finished library: it certifies around its misses and pushes, the desk publishes, and
another robot pulls. Beside it: reading the whole library, and the growth that arXiv:2605.04069 bounds, O(2^H log N),
from the observations that made the library to those of the day, with 1 for the constant that nobody states, and the
entropy H of which expert answers.
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
from learning import HELD_OUT, Floats
from sac_actor import LAYERS, export

from laws_ros.build import workloads
from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.learn import Learner
from laws_ros.build.workloads import Workload
from laws_ros.cli import parse_tolerance
from laws_ros.core.certificate import FORMAL, Certificates
from laws_ros.core.certify import certify
from laws_ros.core.collapse import collapse
from laws_ros.core.library import Library
from laws_ros.core.record import pack
from laws_ros.core.region import Regions
from laws_ros.fleet.desk import Desk
from laws_ros.fleet.items import MOST_CHUNK, Chunk, Identity, Items, encode
from laws_ros.fleet.place import FLEET
from laws_ros.fleet.robot import Robot, _Client
from laws_ros.runtime.files import resolve
from laws_ros.runtime.history import History
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

BATCHES = (1, 4, 16, 64)
CHUNK = 10  # observations of every robot at a time


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
    """What a robot reads for publications of several sizes."""
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
        found[f"{batch} new experts"] = reading(robot)
    client = _Client(robot.fleet, robot.store)
    return {"nothing new": client.read, **found}


def reading(robot: Robot) -> int:
    """Bytes that a robot reads to have the last publication, metadata included; nothing is proved here."""
    client = _Client(robot.fleet, robot.store)
    for name in client.manifest(robot.place)["deltas"][-1][1]:
        client.target(name, MOST_CHUNK)
    return client.read


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


def until(
    policy: Policy,
    workload: Workload,
    robots: int,
    options: argparse.Namespace,
    episodes: list[Floats],
    x: Floats,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Observations per robot until the fleet's library answers the wanted share of held-out ones."""
    network, tolerance = load_network(policy.path), parse_tolerance(options.tolerance, policy, workload)
    shifts = [np.concatenate(episodes[k::robots]) for k in range(robots)]  # what each robot sees
    shifts = [np.roll(shift, rng.integers(len(shift)), axis=0) for shift in shifts]
    seen = waiting = learnt = 0
    curve: list[tuple[int, float]] = []  # after every publication: observations per robot, share answered
    with (
        tempfile.TemporaryDirectory() as folder,
        History(Path(folder) / "h.db", policy.sha256, policy.card, tolerance) as history,
    ):
        learner, started = Learner(history, policy, network), time.process_time()
        router = Router(learner.library, tolerance)
        for start in range(0, min(map(len, shifts)), CHUNK):
            part = np.concatenate([shift[start : start + CHUNK] for shift in shifts])
            missed = part[router.many(part) < 0]
            history.add_misses(missed, policy.batch(missed))
            seen, waiting = start + CHUNK, waiting + len(missed)
            if waiting >= max(options.first, options.more * learnt):
                learner.learn()
                learnt, waiting, router = learnt + waiting, 0, Router(learner.library, tolerance)
                curve.append((seen, float((router.many(x) >= 0).mean())))
                say(f"K={robots}: {seen} observations each, {len(learner.library)} experts, {100 * curve[-1][1]:.1f}%")
                if curve[-1][1] >= options.rate:
                    break
    told = {"misses": learnt, "experts": len(learner.library), "cpu_seconds": round(time.process_time() - started, 1)}
    counts, rates = zip(*curve, strict=True)
    reached = len(rates) > 1 and rates[-1] >= options.rate
    observations = round(float(np.exp(np.interp(options.rate, rates[-2:], np.log(counts[-2:]))))) if reached else None
    return {"observations": observations, "curve": [(n, round(rate, 4)) for n, rate in curve], **told}


def measure_speed(options: argparse.Namespace) -> dict[str, Any]:
    workload = workloads.get(options.workload)
    policy = Policy(resolve(options.policy or f"models/{options.workload}.onnx"))
    fresh = policy_rollouts(policy, workload, -(-HELD_OUT // workload.spec.episode_steps), options.held_out)
    x = np.concatenate(fresh.observations)
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for seed in options.seeds:
        episodes = policy_rollouts(policy, workload, options.episodes, seed).observations
        found[seed] = {
            k: until(policy, workload, k, options, episodes, x, np.random.default_rng([seed, k]))
            for k in options.robots
        }
    return {"workload": options.workload, "rate": options.rate, "seeds": found, **speed_up(found, options.robots)}


def speed_up(found: dict[int, dict[int, dict[str, Any]]], robots: list[int]) -> dict[str, Any]:
    """Against the fewest robots, over the seeds with which all reached the rate: geometric means and standard errors,
    and the exponent of K that fits them."""
    each = [[row[k]["observations"] for k in robots] for row in found.values()]
    counts = np.array([row for row in each if None not in row], float).reshape(-1, len(robots))
    if not len(counts):
        return {"reached": 0}
    k = np.array(robots) / min(robots)
    speed = np.log(counts[:, [int(np.argmin(robots))]] / counts)  # [seeds, robots]
    mean = speed.mean(axis=0)
    error = speed.std(axis=0, ddof=1) / np.sqrt(len(speed)) if len(speed) > 1 else np.full(len(robots), np.nan)
    exponent = (speed @ np.log(k)) / (np.log(k) @ np.log(k))  # of the line through the fewest robots
    return {
        "reached": len(counts),
        "observations": dict(zip(robots, np.exp(np.log(counts).mean(axis=0)).round().tolist(), strict=True)),
        "speed_up": dict(zip(robots, np.exp(mean).round(2).tolist(), strict=True)),
        "share_of_k": dict(zip(robots, (np.exp(mean) / k).round(3).tolist(), strict=True)),
        "its_standard_error": dict(zip(robots, (np.exp(mean) / k * error).round(3).tolist(), strict=True)),
        "share_of_k_by_seed": (np.exp(speed) / k).round(3).tolist(),
        "exponent": round(float(exponent.mean()), 3),
    }


def measure_day(options: argparse.Namespace) -> dict[str, Any]:
    """What a robot with a library tells, and another one reads, round by round."""
    workload, library = workloads.get(options.workload), Library.load(resolve(options.library))
    policy = Policy(resolve(options.policy or f"models/{options.workload}.onnx"))
    steps = round(60.0 * options.round / workload.spec.period_s)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        desk = Desk.create(folder / "desk", str(folder / "store"), policy.path, library.tolerance)
        desk.add(library)
        desk.publish()
        root = folder / "desk" / "fleet" / "metadata" / "1.root.json"
        teller, reader = (Robot.join(folder / k, k, desk.store.url, policy.path, root) for k in ("teller", "reader"))
        whole = reading(reader)
        with teller.place.history(library.tolerance) as history, desk.place.history() as at_desk:
            history.add(library.certificates, FLEET)
            learner, answers = Learner(history, policy, load_network(policy.path)), []
            for k in range(round(60.0 * options.hours / options.round)):
                episodes = -(-steps // workload.spec.episode_steps)
                x = np.concatenate(policy_rollouts(policy, workload, episodes, options.seed + k).observations)[:steps]
                found = Router(learner.library, library.tolerance).many(x)
                answers += [learner.library.ids[index] for index in found[found >= 0]]
                history.add_misses(x[found < 0], policy.batch(x[found < 0]))
                lesson, told = learner.learn(), teller.push()["bytes"]
                at_desk.add(history.library().certificates, "teller")  # collected, without the proof
                desk.publish()
                hours = round((k + 1) * options.round / 60.0, 2)
                rows.append({"hours": hours, "missed": int((found < 0).sum()), "new": lesson.added, "told": told})
                rows[-1]["read"] = reading(reader) if lesson.added else 0
                say(json.dumps(rows[-1]))
    uses = np.unique(answers, return_counts=True)[1] / len(answers)
    entropy = float(-(uses * np.log2(uses)).sum())  # of which expert answers
    before, new = library.notes["train_observations"], sum(row["new"] for row in rows)
    bound = 2**entropy * np.log(1 + len(rows) * steps / before)
    return {
        "library": {"experts": len(library), "file": resolve(options.library).stat().st_size, "read": whole},
        "rounds": rows,
        "new": new,
        "told": sum(row["told"] for row in rows),
        "read": sum(row["read"] for row in rows),
        "entropy_bits": round(entropy, 2),
        "observations": {"before": before, "during": len(rows) * steps},
        "growth_2^H_ln": round(bound, 1),
        "growth_2^H_ln_bytes": round(bound * whole / len(library)),
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
    c.add_argument("--episodes", type=int, default=8, help="of all robots together")
    c.add_argument("--first", type=int, default=500, help="misses of all robots before a publication, at least")
    c.add_argument("--more", type=float, default=0.25, help="and as a share of all before")
    c.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="of the episodes, one run for each")
    c.add_argument("--held-out", type=int, default=10, help="seed of the episodes that the rate is measured on")
    c.set_defaults(run=measure_speed)
    c = commands.add_parser("day")
    c.add_argument("--workload", default="arm_sort")
    c.add_argument("--policy", help="default models/WORKLOAD.onnx")
    c.add_argument("--library", default="models/arm_sort.laws", help="that the robot has in the morning")
    c.add_argument("--hours", type=float, default=8.0, help="of operation (default 8)")
    c.add_argument("--round", type=float, default=30.0, help="minutes between two pushes (default 30)")
    c.add_argument("--seed", type=int, default=71)
    c.set_defaults(run=measure_day)
    options = parser.parse_args()
    run: Callable[[argparse.Namespace], dict[str, Any]] = options.run
    print(json.dumps(run(options), indent=2))


if __name__ == "__main__":
    main()
