"""What cacheability costs: return against coverage, over the penalty's weight and box size, with small networks.

    python benchmarks/cacheability.py arm_sort

Every row is one training (build.train, everything else as in the workload's recipe, at --hidden and --steps), a library
grown for it (build.grow) and a held-out hit rate. Returns are paired: the same check episodes for all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from laws_ros.build import workloads
from laws_ros.build.cacheable import Recipe
from laws_ros.build.evaluate import observed
from laws_ros.build.grow import grow
from laws_ros.build.train import train
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

GRID = ((0.0, 0.0), (0.05, 1.0), (0.05, 2.0), (0.1, 4.0), (0.2, 4.0), (0.1, 8.0))  # weight, half-width
HELDOUT = 1_000_003


def row(name: str, recipe: Recipe, tolerance: float, steps: int, max_certificates: int) -> dict[str, Any]:
    """One training and one library.

    Args:
        tolerance: a share of each action's range. steps: observations to grow on; a fifth as many are held out.
    """
    workload = workloads.get(name)
    with tempfile.TemporaryDirectory() as folder:
        entry = train(name, folder, recipe=recipe, log=lambda line: print(line[:100], file=sys.stderr, flush=True))
        policy = Policy(Path(folder) / f"{name.partition('?')[0]}.onnx", 1)
        network = load_network(policy.path)
        seen, fresh = observed(policy, workload, steps, (0, HELDOUT))
        bound = tolerance * policy.card.action_range
        began = time.process_time()
        x, y = np.concatenate(seen.observations), np.concatenate(seen.actions)
        found = grow(policy, network, x, y, bound, max_certificates=max_certificates)
        seconds = time.process_time() - began
        hit = Router(found.library, bound).many(np.concatenate(fresh.observations)) >= 0
    return {
        "relaxation": recipe.relaxation,
        "half_width": recipe.half_width,
        "return_over_teacher": entry["policy_over_teacher"],
        "half_gap_1_std": entry["certified_half_gap"]["1 std"]["relaxation"],
        "regions": len(found.library),
        "certificates_tried": found.certificates_tried,
        "train_coverage": round(found.train_coverage, 4),
        "heldout_hit_rate": round(float(hit.mean()), 4),
        "grow_cpu_s": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--training-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60_000, help="observations to grow on")
    parser.add_argument("--max-certificates", type=int, default=20_000)
    parser.add_argument("--check-episodes", type=int, default=24)
    parser.add_argument("--tolerance", type=float, default=0.025, help="share of each action's range")
    options = parser.parse_args()
    base = replace(
        Recipe(**getattr(workloads.module(options.workload), "RECIPE", {})),
        hidden=options.hidden,
        steps=options.training_steps,
        learning_rate=2e-3,
        rounds=2,
        episodes=8,
        check_episodes=options.check_episodes,
    )
    rows = []
    for relaxation, half_width in GRID:
        recipe = replace(base, relaxation=relaxation, half_width=half_width, rounding=1.0 if relaxation else 0.0)
        limits = options.tolerance, options.steps, options.max_certificates
        rows.append(row(options.workload, recipe, *limits))
        print(json.dumps(rows[-1]), flush=True)
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for found in rows:
        print("| " + " | ".join(str(value) for value in found.values()) + " |")


if __name__ == "__main__":
    main()
