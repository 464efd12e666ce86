"""What a library is worth in closed loop: hit rate, return, errors against bounds, time per step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import WorkloadError
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.policy import Policy

from .parts import PART, Deciding, rollouts_in_parts
from .workers import HERE, Workers
from .workloads import Rollouts, Simulation, Step, Workload, episode_seed, rollouts

BLOCKS = 50  # of time, about, into which a recording is cut; a fifth of them is held out


def check_fit(policy: Policy, workload: Workload) -> None:
    """Raise WorkloadError unless the policy's vectors and decision fit the workload."""
    spec = workload.spec
    if policy.observations != len(spec.observations):
        raise WorkloadError(
            f"{policy.path}: takes {policy.observations} observations, {spec.name} gives {len(spec.observations)}"
        )
    if spec.discrete and policy.card.decision == "none":
        raise WorkloadError(
            f"{policy.path}: {spec.name} takes the index of an action; say how the policy decides with "
            "--decision argmax or argmin"
        )
    if not spec.discrete and policy.card.decision != "none":
        raise WorkloadError(
            f"{policy.path}: decides by {policy.card.decision}, but {spec.name} takes a vector of actions"
        )
    if policy.actions != len(spec.actions):
        raise WorkloadError(f"{policy.path}: gives {policy.actions} actions, {spec.name} takes {len(spec.actions)}")
    if policy.has_card:
        for theirs, ours in zip(policy.card.observations, spec.observations, strict=True):
            if theirs.name != ours.name:
                raise WorkloadError(
                    f"{policy.path.with_suffix('.yaml')}: observation {theirs.name!r} where {spec.name} gives "
                    f"{ours.name!r}; the order must be {[c.name for c in spec.observations]}"
                )


def policy_rollouts(
    policy: Policy,
    workload: Workload,
    episodes: int,
    seed: int,
    *,
    parts: Path | None = None,
    workers: Workers = HERE,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Rollouts:
    """Episodes driven by the full policy; with a folder for `parts`, they can be interrupted and shared."""
    decide = Deciding(policy)
    if parts is None and workers is HERE:
        return rollouts(workload, decide, episodes, seed, progress=progress)
    identity = f"{policy.sha256} {policy.card.digest}"
    part = min(PART, -(-episodes // workers.count)) if workers is not HERE else PART
    return rollouts_in_parts(
        workload, decide, episodes, seed, parts, identity, part=part, workers=workers, progress=progress
    )


def observed(
    policy: Policy,
    workload: Workload,
    steps: int,
    seeds: tuple[int, int],
    *,
    parts: Path | None = None,
    workers: Workers = HERE,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> tuple[Rollouts, Rollouts]:
    """What to learn from, and what to test on: whole episodes with at least `steps` observations, and a fifth as many.

    Of a recorded bag everything is taken, whatever `steps`: a fifth of its blocks of time is held out, its actions are
    what the policy would have done, and it has no rewards.

    Args:
        seeds: of the episodes to learn from and of those held out.
    """
    if workload.recorded is None:
        learnt, held = (
            _visited(policy, workload, wanted, seed, parts, workers, progress)
            for wanted, seed in zip((steps, math.ceil(steps / 5)), seeds, strict=True)
        )
        return learnt, held
    size = sum(len(stretch) for stretch in workload.recorded) / BLOCKS
    blocks = [b for stretch in workload.recorded for b in np.array_split(stretch, math.ceil(len(stretch) / size))]
    held_out = np.random.default_rng(0).permutation(len(blocks))[: len(blocks) // 5]
    answers = [policy.decide(policy.batch(block)) for block in blocks]
    every = Rollouts(blocks, answers, [np.full(len(block), np.nan) for block in blocks])
    return every.chosen([k for k in range(len(blocks)) if k not in held_out]), every.chosen(held_out.tolist())


def _visited(
    policy: Policy,
    workload: Workload,
    steps: int,
    seed: int,
    parts: Path | None,
    workers: Workers,
    progress: Callable[[int, int], None],
) -> Rollouts:
    """At least `steps` observations' worth of whole episodes, more of them where episodes end early."""
    episodes = math.ceil(steps / workload.spec.episode_steps)
    while True:
        found = policy_rollouts(policy, workload, episodes, seed, parts=parts, workers=workers, progress=progress)
        total = sum(len(x) for x in found.observations)
        if total >= steps:
            return found
        episodes = math.ceil(1.1 * episodes * steps / total)


class _Replay:
    """A recorded bag as a simulation that nobody drives: one stretch after the other, whatever the action."""

    time = math.nan

    def __init__(self, stretches: tuple[NDArray[np.float32], ...]) -> None:
        self._stretches = iter(stretches)

    def reset(self, seed: int) -> NDArray[np.float32]:
        self._rest = iter(next(self._stretches))
        return self.step(None).observation

    def step(self, action: object) -> Step:
        following = next(self._rest, None)
        return Step(np.zeros(0, np.float32) if following is None else following, math.nan, following is None)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Evaluation:
    """Closed-loop figures; times in microseconds; `worst_error_over_bound` (formal answers) must not exceed 1.

    `violations` are formal answers beyond their bound; `exceedances` statistical ones, which may be, now and then.
    Of a recorded bag the returns are NaN.
    """

    steps: int
    hit_rate: float
    return_cached: float
    return_policy: float
    worst_error_over_bound: float
    violations: int
    statistical_hits: int
    exceedances: int
    hit_us: dict[str, float]
    policy_us: dict[str, float]
    mean_step_us: float
    mean_step_speedup: float


def evaluate(
    cached: CachedPolicy,
    workload: Workload,
    episodes: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Evaluation:
    """Run the cached policy and the policy alone on the same seeded episodes.

    Every answer of the library is compared afterwards with the policy at the same observation. The policy alone is
    timed call by call on observations of the cached run, interleaved with it, so both meet the same machine. A recorded
    bag is replayed instead, as many stretches of it as episodes are asked for; nobody drives it and nothing is earned.
    """
    policy, discrete = cached.policy, workload.spec.discrete
    observations, answers, regions, bounds, tested, returns = [], [], [], [], [], []
    hit_ns: list[int] = []
    miss_ns: list[int] = []
    policy_ns: list[int] = []
    recorded = workload.recorded
    simulation: Simulation = workload.simulation() if recorded is None else _Replay(recorded)
    episodes = episodes if recorded is None else min(episodes, len(recorded))
    for episode in range(episodes):
        x = simulation.reset(episode_seed(seed, episode))
        total = 0.0
        for step in range(workload.spec.episode_steps):
            start = time.perf_counter_ns()
            answer = cached.answer(x)
            elapsed = time.perf_counter_ns() - start
            (hit_ns if answer.region >= 0 else miss_ns).append(elapsed)
            if step % 16 == 0:
                start = time.perf_counter_ns()
                cached.fallback(x)
                policy_ns.append(time.perf_counter_ns() - start)
            observations.append(x)
            answers.append(answer.action)
            regions.append(answer.region)
            bounds.append(answer.bound)
            tested.append(answer.kind == "statistical")
            x, reward, terminated = simulation.step(int(answer.action[0]) if discrete else answer.action)
            total += reward
            if terminated:
                break
        returns.append(total)
        progress(f"episode {episode + 1} of {episodes}, return {total:.1f}")
    simulation.close()
    hit = np.array(regions) >= 0
    error = np.abs(
        policy.decide(policy.batch(np.array(observations))).astype(float) - np.array(answers, dtype=np.float64)
    )[hit]
    bound = np.array(bounds)[hit]
    beyond, statistical = ~(error <= bound).all(axis=1), np.array(tested)[hit]
    with np.errstate(all="ignore"):
        ratio = np.where(error == 0.0, 0.0, error / bound)[~statistical]
    alone = math.nan
    if recorded is None:
        progress(f"{episodes} episodes of the policy alone")
        alone = float(policy_rollouts(policy, workload, episodes, seed).returns.mean())
    step_ns = np.array(hit_ns + miss_ns, float)
    return Evaluation(
        steps=len(regions),
        hit_rate=float(hit.mean()),
        return_cached=float(np.mean(returns)),
        return_policy=alone,
        worst_error_over_bound=float(ratio.max(initial=0.0)),
        violations=int((beyond & ~statistical).sum()),
        statistical_hits=int(statistical.sum()),
        exceedances=int((beyond & statistical).sum()),
        hit_us=_percentiles(hit_ns),
        policy_us=_percentiles(policy_ns),
        mean_step_us=float(step_ns.mean() / 1e3),
        mean_step_speedup=float(np.mean(policy_ns) / step_ns.mean()),
    )


def _percentiles(samples_ns: list[int]) -> dict[str, float]:
    values: NDArray[np.float64] = np.array(samples_ns, float) / 1e3
    return {f"p{q}": float(np.percentile(values, q)) if len(values) else float("nan") for q in (50, 99)}
