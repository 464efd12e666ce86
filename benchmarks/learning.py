"""How fast a library grows from deployment: the learner alone, from nothing, against the offline build.

A policy drives its workload; what the library of the moment cannot answer goes to the learner, as on a robot; the hit
rate is measured on other episodes.

    python benchmarks/learning.py --workload cartpole --minutes 20
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.learn import Learner
from laws_ros.build.workloads import get
from laws_ros.cli import parse_tolerance
from laws_ros.core.library import Library
from laws_ros.runtime.files import resolve
from laws_ros.runtime.history import History
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="cartpole")
    parser.add_argument("--policy", help="default models/WORKLOAD.onnx")
    parser.add_argument("--library", help="the offline build to compare with (default models/WORKLOAD.laws)")
    parser.add_argument("--tolerance")
    parser.add_argument("--minutes", type=float, default=20.0, help="of simulated operation (default 20)")
    parser.add_argument("--round", type=float, default=30.0, help="seconds of operation per lesson (default 30)")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    workload = get(options.workload)
    policy = Policy(resolve(options.policy or f"models/{options.workload}.onnx"), threads=2)
    tolerance = parse_tolerance(options.tolerance, policy, workload)
    spec = workload.spec
    steps = round(60.0 * options.minutes / spec.period_s)
    episodes = -(-steps // spec.episode_steps)
    stream = np.concatenate(policy_rollouts(policy, workload, episodes, options.seed).observations)[:steps]
    held_out = np.concatenate(policy_rollouts(policy, workload, 20, options.seed + 1).observations)
    offline = resolve(options.library or f"models/{options.workload}.laws")
    goal = None
    if offline.is_file():
        goal = float((Router(Library.load(offline), tolerance).many(held_out) >= 0).mean())

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        history = History(Path(folder) / "h.db", policy.sha256, policy.card, tolerance)
        with history:
            learner = Learner(history, policy, load_network(policy.path))
            chunk, started = round(options.round / spec.period_s), time.monotonic()
            for start in range(0, len(stream), chunk):
                part = stream[start : start + chunk]
                missed = part[Router(learner.library, tolerance).many(part) < 0]
                history.add_misses(missed, policy.batch(missed))
                lesson = learner.learn()
                row = {
                    "minutes": round((start + len(part)) * spec.period_s / 60.0, 2),
                    "misses": lesson.misses,
                    "regions": len(learner.library),
                    "heldout_hit_rate": float((Router(learner.library, tolerance).many(held_out) >= 0).mean()),
                    "seconds": round(time.monotonic() - started, 1),
                }
                rows.append(row)
                if not options.json:
                    print(
                        f"{row['minutes']:7.2f} min  {row['misses']:6d} misses  {row['regions']:6d} regions  "
                        f"held out {100 * row['heldout_hit_rate']:6.2f}%  learner {row['seconds']:7.1f} s",
                        flush=True,
                    )
    result = {"workload": options.workload, "offline_hit_rate": goal, "rounds": rows}
    if options.json:
        print(json.dumps(result))
    elif goal is not None:
        reached = [row["minutes"] for row in rows if row["heldout_hit_rate"] >= 0.8 * goal]
        when = f"after {reached[0]} simulated minutes" if reached else "not reached"
        print(f"offline build: {100 * goal:.2f}%; 80% of that: {when}")


if __name__ == "__main__":
    main()
