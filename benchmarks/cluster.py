"""What a cluster's workers are worth: `laws build` by one process on one core, and by Ray's workers on all of them.

    python benchmarks/cluster.py --steps 30000
    OMP_NUM_THREADS=1 python benchmarks/cluster.py --steps 8000 --paper 2     # where no cores are free

Both build the same library (checked), alternately, --repeats times; the fastest of each count, without the seconds that
Ray takes to start. Everything is limited to one thread per process (OMP_NUM_THREADS=1), the local build to one core.

`--paper` is what so many workers would take by the processor time of each item, if each had a core, and Ray and the
network were free; what the one process does in between is taken for nobody's work beside it. It runs here, and may be
disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laws_ros.build import workloads
from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.grow import grow
from laws_ros.cli import parse_tolerance
from laws_ros.core.library import Library
from laws_ros.runtime.files import resolve
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy

Row = list[float]  # seconds of the items of one `map`


def build(options: argparse.Namespace, engine: str, out: Path) -> dict[str, Any]:
    """What `laws build --json` says, and the experts' names."""
    command = [sys.executable, "-m", "laws_ros.cli", "build", "--json", "--engine", engine, "--out", str(out)]
    command += ["--policy", f"models/{options.workload}.onnx", "--workload", options.workload]
    command += ["--steps", str(options.steps), "--seed", str(options.seed), "--tolerance", options.tolerance]
    core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        command,
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=(lambda: os.sched_setaffinity(0, core)) if engine == "local" else None,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    print(engine, found["rollout_seconds"], found["seconds"], os.getloadavg()[0], file=sys.stderr, flush=True)
    return {**found, "ids": Library.load(out).ids}


class Timed:
    """Does the work here, and notes the processor time of each item (build.workers.Workers)."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.rounds: list[list[list[Row]]] = []  # one after the other: jobs side by side, of `map` after `map`
        self._job: list[Row] | None = None

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        row: Row = []
        if self._job is None:
            self.rounds.append([[row]])
        else:
            self._job.append(row)
        for item in items:
            begun = time.process_time()
            answer = work(item)
            row.append(time.process_time() - begun)
            yield answer

    def together(self, jobs: Sequence[Callable[[], Any]]) -> list[Any]:
        answers, rounds = [], []
        for job in jobs:
            self._job = []
            rounds.append(self._job)
            answers.append(job())
        self._job = None
        self.rounds.append(rounds)
        return answers

    def seconds(self) -> tuple[float, float]:
        """Of all items, and what the workers need for them."""
        every = sum(s for jobs in self.rounds for job in jobs for row in job for s in row)
        return every, sum(self._needed(jobs) for jobs in self.rounds)

    def _needed(self, jobs: list[list[Row]]) -> float:
        free, ready, left = [0.0] * self.count, [0.0] * len(jobs), [list(job) for job in jobs]
        while any(left):
            job = min((k for k in range(len(jobs)) if left[k]), key=lambda k: ready[k])
            done = ready[job]
            for seconds in left[job].pop(0):
                worker = int(np.argmin(free))
                free[worker] = max(free[worker], ready[job]) + seconds
                done = max(done, free[worker])
            ready[job] = done
        return max(ready, default=0.0)


def on_paper(options: argparse.Namespace) -> dict[str, Any]:
    workload, policy = workloads.get(options.workload), Policy(resolve(f"models/{options.workload}.onnx"))
    episodes = -(-options.steps // workload.spec.episode_steps)

    def timed(act: Callable[[], Any]) -> tuple[Any, float]:
        begun = time.process_time()
        return act(), time.process_time() - begun

    seen, alone = timed(lambda: policy_rollouts(policy, workload, episodes, options.seed))
    drive, build_ = Timed(options.paper), Timed(options.paper)
    _, shared = timed(lambda: policy_rollouts(policy, workload, episodes, options.seed, workers=drive))
    x, y = np.concatenate(seen.observations), np.concatenate(seen.actions)
    arguments = policy, load_network(policy.path), x, y, parse_tolerance(options.tolerance, policy, workload)
    growth, built = timed(lambda: grow(*arguments, max_certificates=options.certificates, workers=build_))
    found = {"regions": len(growth.library), "certificates_tried": growth.certificates_tried}
    rows = {}
    for name, here, total, workers in (("rollouts", alone, shared, drive), ("growth", built, built, build_)):
        every, needed = workers.seconds()
        rows[name] = {"here": here, "items": every, "between": total - every, "workers": total - every + needed}
    rows["both"] = {key: sum(row[key] for row in rows.values()) for key in rows["growth"]}
    ratio = {name: round(row["here"] / row["workers"], 2) for name, row in rows.items()}
    seconds = {name: {key: round(value, 2) for key, value in row.items()} for name, row in rows.items()}
    return {**found, "workers": options.paper, "cpu_seconds": seconds, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="arm_sort")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--tolerance", default="2.5%")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--paper", type=int, metavar="WORKERS", help="for so many workers, without Ray")
    parser.add_argument("--certificates", type=int, default=60_000, help="paper: tried at most")
    options = parser.parse_args()
    if options.paper:
        print(json.dumps(on_paper(options), indent=2))
        return
    runs: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.repeats):
            for engine, done in runs.items():
                done.append(build(options, engine, Path(folder) / f"{engine}.laws"))
                loads.append(round(os.getloadavg()[0], 1))
    assert all(run["ids"] == runs["local"][0]["ids"] for done in runs.values() for run in done), "not the same library"
    best = {
        engine: {
            "rollouts": min(run["rollout_seconds"] for run in done),
            "rest": round(min(run["seconds"] - run["rollout_seconds"] for run in done), 2),
            "seconds": min(run["seconds"] for run in done),
        }
        for engine, done in runs.items()
    }
    ratio = {key: round(best["local"][key] / best["ray"][key], 2) for key in best["local"]}
    told = {"regions": runs["local"][0]["regions"], "certificates_tried": runs["local"][0]["certificates_tried"]}
    cores = len(os.sched_getaffinity(0))
    print(json.dumps({**told, "cores": cores, "best": best, "ray_over_local": ratio, "load_1_min": loads}, indent=2))


if __name__ == "__main__":
    main()
