"""How much of MuJoCo's own speed the batched simulation keeps: `python benchmarks/rollout.py [WORKLOAD ...]`.

For each workload and number of threads, in one process, alternately, the best of several rounds:
    raw: one call of mujoco.rollout over all lanes and periods, with the very inputs of the run that is compared;
    lanes: the workload's own steps (delay, noise, pushes, task, rewards), with actions of its teacher made before;
    rollouts: the same collected as `laws_ros.build.workloads.rollouts` does, resets and sorting into episodes included.
In substeps per second of wall time; ratios to raw at the same number of threads. On one thread CPU time is compared as
well, which other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mujoco
import numpy as np
from mujoco import rollout

from laws_ros.build import workloads

WAYS = ("raw", "lanes", "rollouts")


def rates(name: str, lanes: int | None, threads: int, periods: int, rounds: int) -> dict[str, Any]:
    """Substeps per second of the three ways, of wall time and of CPU time."""
    workload = workloads.get(name)
    lanes = lanes or workload.lanes
    # Collected, an episode ends after the benchmark's periods, so that every lane has one and ends with it.
    workload = replace(workload, spec=replace(workload.spec, episode_steps=periods))
    teacher = workloads.module(name.partition("?")[0]).teacher()
    simulation = workload.batch(lanes, threads)
    seeds = [workloads.episode_seed(0, k) for k in range(lanes)]
    seen = simulation.reset(range(lanes), seeds)
    state = simulation._state.copy()
    actions, inputs = [], []
    for _ in range(periods):
        actions.append(np.asarray(teacher(seen), np.float32))
        seen = simulation.step(actions[-1]).observations
        inputs.append(simulation._inputs.copy())
    controls = np.repeat(np.stack(inputs, axis=1), simulation.substeps, axis=1)
    data = [mujoco.MjData(simulation.models[0]) for _ in range(max(1, threads))]
    running = np.ones(lanes, bool)
    wall, cpu = dict.fromkeys(WAYS, np.inf), dict.fromkeys(WAYS, np.inf)

    def timed(way: str, work: Callable[[], None]) -> None:
        before, start = time.process_time(), time.perf_counter()
        work()
        wall[way] = min(wall[way], time.perf_counter() - start)
        cpu[way] = min(cpu[way], time.process_time() - before)

    def stepped() -> None:
        for action in actions:
            simulation.step(action, running)

    def collected() -> None:
        step = iter(actions)
        workloads.rollouts(workload, lambda x: next(step)[: len(x)], lanes, 0, lanes, threads=threads)

    with rollout.Rollout(nthread=threads) as pool:
        for _ in range(rounds):
            simulation.reset(range(lanes), seeds)
            timed(
                "raw",
                lambda: pool.rollout(
                    list(simulation.models), data, state, controls, control_spec=simulation._input_bits
                ),
            )
            timed("lanes", stepped)
            timed("rollouts", collected)
    simulation.close()
    substeps = simulation.substeps * periods * lanes
    return {
        "lanes": lanes,
        "wall": {way: substeps / seconds for way, seconds in wall.items()},
        "cpu": {way: substeps / seconds for way, seconds in cpu.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["cartpole", "arm_sort", "quadruped_walk"])
    parser.add_argument("--lanes", type=int, help="side by side (default: the workload's)")
    parser.add_argument("--periods", type=int, default=250, help="of an episode (theirs have 1,000 or more)")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    rows: list[dict[str, Any]] = []
    for name in options.workloads:
        for threads in sorted({0, *(2**k for k in range(1, 8) if 2**k < cores), cores} - {1}):
            found = rates(name, options.lanes, threads, options.periods, options.rounds)
            rows.append({"workload": name, "threads": max(1, threads), **found})
            if options.json:
                continue
            wall, cpu = found["wall"], found["cpu"]
            one = next(r["wall"]["raw"] for r in rows if r["workload"] == name)
            text = (
                f"{name:16} {max(1, threads):2} threads: raw {wall['raw'] / 1e3:6.0f} k/s ({wall['raw'] / one:.2f} x)"
            )
            for way in WAYS[1:]:
                text += f", {way} {wall[way] / wall['raw']:.0%}"
                text += f" ({cpu[way] / cpu['raw']:.0%} by CPU time)" if not threads else ""
            print(text, flush=True)
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
