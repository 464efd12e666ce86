"""What a library is worth in closed loop: hit rate, return, errors against bounds, time per step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import WorkloadError
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.policy import Policy

from .workloads import Rollouts, Workload, episode_seed, rollouts


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


def policy_rollouts(policy: Policy, workload: Workload, episodes: int, seed: int, lanes: int = 128) -> Rollouts:
    """Episodes driven by the full policy."""
    return rollouts(workload, lambda x: policy.decide(policy.batch(x)), episodes, seed, lanes)


def visited(policy: Policy, workload: Workload, steps: int, seed: int) -> Rollouts:
    """At least `steps` observations' worth of whole episodes, more of them where episodes end early."""
    episodes = math.ceil(steps / workload.spec.episode_steps)
    while True:
        found = policy_rollouts(policy, workload, episodes, seed)
        total = sum(len(x) for x in found.observations)
        if total >= steps:
            return found
        episodes = math.ceil(1.1 * episodes * steps / total)


@dataclass(frozen=True)
class Evaluation:
    """Closed-loop figures; times in microseconds; `worst_error_over_bound` must not exceed 1."""

    steps: int
    hit_rate: float
    return_cached: float
    return_policy: float
    worst_error_over_bound: float
    violations: int
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
    timed call by call on observations of the cached run, interleaved with it, so both meet the same machine.
    """
    policy, discrete = cached.policy, workload.spec.discrete
    observations, answers, regions, bounds, returns = [], [], [], [], []
    hit_ns: list[int] = []
    miss_ns: list[int] = []
    policy_ns: list[int] = []
    simulation = workload.simulation()
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
    with np.errstate(all="ignore"):
        ratio = np.where(error == 0.0, 0.0, error / bound)
    progress(f"{episodes} episodes of the policy alone")
    alone = policy_rollouts(policy, workload, episodes, seed)
    step_ns = np.array(hit_ns + miss_ns, float)
    return Evaluation(
        steps=len(regions),
        hit_rate=float(hit.mean()),
        return_cached=float(np.mean(returns)),
        return_policy=float(alone.returns.mean()),
        worst_error_over_bound=float(ratio.max(initial=0.0)),
        violations=int((error > bound).any(axis=1).sum()) if len(error) else 0,
        hit_us=_percentiles(hit_ns),
        policy_us=_percentiles(policy_ns),
        mean_step_us=float(step_ns.mean() / 1e3),
        mean_step_speedup=float(np.mean(policy_ns) / step_ns.mean()),
    )


def _percentiles(samples_ns: list[int]) -> dict[str, float]:
    values: NDArray[np.float64] = np.array(samples_ns, float) / 1e3
    return {f"p{q}": float(np.percentile(values, q)) if len(values) else float("nan") for q in (50, 99)}
