"""What a cluster's workers are worth: `laws build` by one process on one core, and by Ray's workers on all of them.

    python benchmarks/cluster.py --steps 30000

Both build the same library (checked), alternately, --repeats times; the fastest of each count, without the seconds that
Ray takes to start. Everything is limited to one thread per process (OMP_NUM_THREADS=1), the local build to one core.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from laws_ros.core.library import Library


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", default="arm_sort")
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--tolerance", default="2.5%")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
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
