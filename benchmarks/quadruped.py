"""How well the quadruped walks: `python benchmarks/quadruped.py [--policy models/quadruped_walk.onnx]`.

For the teacher, or a policy: on flat ground without pushes, how far the velocity is from the command, as the mean over
a gait cycle (a trot sways within one) and at every instant, while the command has stood for a second; then, for pushes
of several impulses and on rough ground, how many were survived. Every fall counts against a push, whatever caused it.

`--tune GENERATIONS` goes on from the teacher's present numbers: CMA-ES (Hansen 2016, arXiv:1604.00772) on the return,
pushes included, half of the episodes on rough ground. It prints the numbers that it found.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.build.quadruped_walk import CYCLE, PERIOD_S, Gait, QuadrupedLanes, teacher
from laws_ros.build.workloads import episode_seed

Policy = Callable[[NDArray[np.float32]], NDArray[Any]]
SETTLE_S = 1.0
# What one step of the search's size means for each number.
SCALE = dict.fromkeys([f.name for f in fields(Gait)], 0.02) | {"duty": 0.05, "stroke": 0.1, "swing": 0.1, "turn": 0.04}
SCALE |= {"level_roll": 0.1, "level_pitch": 0.1, "lean_x": 0.1, "lean_y": 0.1}
SCALE |= {"damp_roll": 0.01, "damp_pitch": 0.01, "catch_x": 0.01, "catch_y": 0.01}


def walk(policy: Policy, ground: str, push: float, episodes: int, seed: int, steps: int = 1000) -> dict[str, Any]:
    """Figures of `episodes` episodes of at most `steps` periods."""
    robots = QuadrupedLanes(episodes, ground=ground, push=push)
    x = robots.reset(range(episodes), [episode_seed(seed, k) for k in range(episodes)])
    running, total = np.ones(episodes, bool), np.zeros(episodes)
    still, last, pushes = np.zeros(episodes), robots.command.copy(), np.zeros(episodes, int)
    cycle: deque[NDArray[np.float64]] = deque(maxlen=CYCLE)
    of_mean, at_once, torque, saturated = [], [], np.zeros(12), 0.0
    for _ in range(steps):
        actions = np.array(policy(x))
        saturated += (np.abs(actions[running]) >= 1.0).mean() / steps
        step = robots.step(np.nan_to_num(actions), running)
        x, pushes = step.observations, np.where(running, robots.pushes, pushes)
        total += np.where(running, step.rewards, 0.0)
        running = running & ~step.terminated
        if not running.any():
            break
        torque = np.maximum(torque, np.abs(robots.sensors[running]).max(axis=0))
        still = np.where((robots.command == last).all(axis=1), still + PERIOD_S, 0.0)
        last = robots.command.copy()
        cycle.append(np.stack([*robots.velocity(), robots.qvel[:, 5]], axis=1))
        steady = running & (still > SETTLE_S)
        at_once.append(np.abs(cycle[-1] - last)[steady])
        of_mean.append(np.abs(np.mean(cycle, axis=0) - last)[steady])
    falls, shoves = int((~running).sum()), int(pushes.sum()) if push else 0
    names = ("forward_m_s", "left_m_s", "turn_rad_s")
    return {
        "return": round(float(total.mean()), 1),
        "falls": falls,
        "pushes": shoves,
        "survived": round(1.0 - falls / shoves, 4) if shoves else None,
        "mean_error": dict(zip(names, np.concatenate(of_mean).mean(axis=0).round(3).tolist(), strict=True)),
        "instant_error": dict(zip(names, np.concatenate(at_once).mean(axis=0).round(3).tolist(), strict=True)),
        "peak_torque_N_m": dict(zip(("hip", "thigh", "calf"), torque.reshape(4, 3).max(axis=0).round(1), strict=True)),
        "saturated": round(float(saturated), 5),
    }


def tune(generations: int, episodes: int, steps: int, seed: int) -> Gait:
    """CMA-ES from the present numbers; every generation meets new episodes, the same for all its candidates."""
    names, scale = [f.name for f in fields(Gait)], np.array([SCALE[f.name] for f in fields(Gait)])
    start = np.array([getattr(Gait(), name) for name in names])
    n, population = len(names), 14
    weights = np.log(population / 2 + 0.5) - np.log(np.arange(1, population // 2 + 1))
    weights /= weights.sum()
    mass = 1.0 / (weights**2).sum()
    path_rate, step_rate = (4 + mass / n) / (n + 4 + 2 * mass / n), (mass + 2) / (n + mass + 5)
    one = 2 / ((n + 1.3) ** 2 + mass)
    many = min(1 - one, 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass))
    usual = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
    mean, size, shape = np.zeros(n), 0.3, np.eye(n)
    path, step_path = np.zeros(n), np.zeros(n)
    rng = np.random.default_rng(seed)
    for generation in range(generations):
        variances, axes = np.linalg.eigh(shape)
        moves = rng.normal(size=(population, n)) * np.sqrt(variances) @ axes.T
        returns = []
        for move in moves:
            gait = Gait(**dict(zip(names, start + scale * (mean + size * move), strict=True)))
            returns.append(walk(teacher(gait), "mixed", 6.0, episodes, seed * 1000 + generation, steps)["return"])
        best = moves[np.argsort(-np.array(returns))[: len(weights)]]
        shift = weights @ best
        mean = mean + size * shift
        whitened = axes @ ((axes.T @ shift) / np.sqrt(variances))
        step_path = (1 - step_rate) * step_path + np.sqrt(step_rate * (2 - step_rate) * mass) * whitened
        path = (1 - path_rate) * path + np.sqrt(path_rate * (2 - path_rate) * mass) * shift
        shape = (1 - one - many) * shape + one * np.outer(path, path) + many * (best.T * weights) @ best
        size *= np.exp(step_rate / (1 + step_rate) * (np.linalg.norm(step_path) / usual - 1))
        print(f"{generation}: best {max(returns)}, mean {np.mean(returns):.1f}, size {size:.3f}", file=sys.stderr)
    return Gait(**dict(zip(names, (start + scale * mean).tolist(), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--policy", help="an ONNX policy instead of the teacher")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tune", type=int, metavar="GENERATIONS")
    options = parser.parse_args()
    if options.tune:
        found = tune(options.tune, episodes=24, steps=400, seed=options.seed)
        print(json.dumps({name: float(f"{value:.3g}") for name, value in asdict(found).items()}, indent=2))
        return
    policy: Policy = teacher()
    if options.policy:
        from laws_ros.runtime.policy import Policy as Onnx

        policy = Onnx(options.policy).batch
    for ground, push in (("flat", 0.0), *(("flat", p) for p in (6.0, 8.0, 10.0)), ("rough", 0.0), ("rough", 6.0)):
        found = walk(policy, ground, push, options.episodes, options.seed)
        print(json.dumps({"ground": ground, "push_N_s": push, **found}), flush=True)


if __name__ == "__main__":
    main()
