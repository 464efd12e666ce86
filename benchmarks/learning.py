"""How fast a library grows from deployment: the learner alone, from nothing, against the offline build.

A policy drives its workload; what the library of the moment cannot answer goes to the learner, as on a robot; the hit
rate is measured on other episodes. The offline build is made here, for the same policy and tolerance, unless a library
is named.

    python benchmarks/learning.py --workload arm_sort --minutes 20
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.grow import grow
from laws_ros.build.learn import Learner
from laws_ros.build.workloads import Workload, get
from laws_ros.cli import parse_tolerance
from laws_ros.core.library import Library
from laws_ros.runtime.files import resolve
from laws_ros.runtime.history import History
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

Floats = NDArray[np.float32]

HELD_OUT = 16_000  # steps, of episodes of their own


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def operation(policy: Policy, workload: Workload, minutes: float, per_round: int, seed: int) -> Iterator[Floats]:
    """Round by round the observations of the policy at work, simulated as they are asked for."""
    waiting, left = np.zeros((0, policy.observations), np.float32), round(60.0 * minutes / workload.spec.period_s)
    while left >= per_round:
        if len(waiting) < per_round:
            seed += 1
            run = policy_rollouts(policy, workload, 1 + 10_000 // workload.spec.episode_steps, seed)
            waiting = np.concatenate([waiting, *run.observations])
            continue
        yield waiting[:per_round]
        waiting, left = waiting[per_round:], left - per_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="cartpole")
    parser.add_argument("--policy", help="default models/WORKLOAD.onnx")
    parser.add_argument("--library", help="an offline build to compare with")
    parser.add_argument("--steps", type=int, default=100_000, help="that one is made from otherwise (default 100000)")
    parser.add_argument("--tolerance")
    parser.add_argument("--minutes", type=float, default=20.0, help="of simulated operation (default 20)")
    parser.add_argument("--round", type=float, default=30.0, help="seconds of operation per lesson (default 30)")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--stop", action="store_true", help="as soon as 80%% of the offline build's rate is reached")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    workload = get(options.workload)
    policy = Policy(resolve(options.policy or f"models/{options.workload}.onnx"), threads=2)
    tolerance = parse_tolerance(options.tolerance, policy, workload)
    spec = workload.spec
    fresh = policy_rollouts(policy, workload, -(-HELD_OUT // spec.episode_steps), options.seed + 1)
    held_out = np.concatenate(fresh.observations)
    network = load_network(policy.path)
    if options.library:
        offline = Library.load(resolve(options.library))
        offline.check_policy(policy.sha256, policy.card, options.library, str(policy.path))
    else:
        seen = policy_rollouts(policy, workload, -(-options.steps // spec.episode_steps), options.seed + 2)
        x, y = np.concatenate(seen.observations), np.concatenate(seen.actions)
        offline = grow(policy, network, x, y, tolerance).library
    goal = float((Router(offline, tolerance).many(held_out) >= 0).mean())
    say(f"offline build: {len(offline)} regions, {100 * goal:.2f}% of held-out steps")

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder) / "h.db", policy.sha256, policy.card, tolerance)
        with history:
            learner = Learner(history, policy, network)
            per_round, spent = round(options.round / spec.period_s), 0.0
            for k, part in enumerate(operation(policy, workload, options.minutes, per_round, options.seed + 3)):
                missed = part[Router(learner.library, tolerance).many(part) < 0]
                history.add_misses(missed, policy.batch(missed))
                began = time.process_time()
                lesson = learner.learn()
                spent += time.process_time() - began
                row = {
                    "minutes": round((k + 1) * options.round / 60.0, 2),
                    "misses": lesson.misses,
                    "regions": len(learner.library),
                    "heldout_hit_rate": float((Router(learner.library, tolerance).many(held_out) >= 0).mean()),
                    "cpu_seconds": round(spent, 1),
                }
                rows.append(row)
                say(
                    f"{row['minutes']:7.2f} min  {row['misses']:6d} misses  {row['regions']:6d} regions  "
                    f"held out {100 * row['heldout_hit_rate']:6.2f}%  learner {row['cpu_seconds']:7.1f} s"
                )
                if options.stop and row["heldout_hit_rate"] >= 0.8 * goal:
                    break
    reached = [row["minutes"] for row in rows if row["heldout_hit_rate"] >= 0.8 * goal]
    result = {
        "workload": options.workload,
        "offline_regions": len(offline),
        "offline_hit_rate": goal,
        "minutes_to_80_percent": reached[0] if reached else None,
        "rounds": rows,
    }
    if options.json:
        print(json.dumps(result))
        return
    when = f"after {reached[0]} simulated minutes" if reached else "not reached"
    last = rows[-1]["heldout_hit_rate"]
    print(f"offline build: {100 * goal:.2f}%; 80% of that: {when}; at the end {100 * last:.2f}%")


if __name__ == "__main__":
    main()
