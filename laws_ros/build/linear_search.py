"""A teacher for an environment that has none: a linear policy, found by augmented random search.

Mania, Guy and Recht 2018 (arXiv:1803.07055), version V2-t: observations divided by what was seen of them so far, steps
along the best directions, scaled by the spread of their returns. On MuJoCo's locomotion tasks such policies earn what
deep reinforcement learning earns in the same minutes of one core, and what is affine up to its actions' limits needs
the fewest regions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import WorkloadError

from .workloads import Simulation, Workload, episode_seed

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        iterations: steps of the search; each costs `2 * directions` episodes.
        directions, best: drawn in an iteration, and those of them that are followed: all, since each has a start of
            its own, and the highest returns are those of the kindest starts. From bad ones the best never learned.
        noise: standard deviation of a direction's weights; actions in units of half their range.
        step: of the search, in units of the spread of the returns.
        length: control periods of an episode while searching, at most.
        every, episodes: so often the policy so far is run for so many whole episodes; the one is kept that is best by
            its mean return less a standard deviation, as one that now and then falls is no teacher.
    """

    iterations: int = 120
    directions: int = 32
    best: int = 32
    noise: float = 0.03
    step: float = 0.05
    length: int = 300
    every: int = 10
    episodes: int = 16


def linear_teacher(
    workload: Workload, search: Search, seed: int, log: Callable[[str], None] = lambda line: None
) -> Callable[[NDArray[Any]], Floats]:
    """The best linear policy found: observations [N, n] to actions [N, m], *before* they saturate.

    Args:
        log: takes lines of progress.

    Raises:
        WorkloadError: the workload's actions are no vector with limits.
    """
    spec = workload.spec
    limits = np.array([[c.low, c.high] for c in spec.actions])
    if spec.discrete or not np.isfinite(limits).all():
        raise WorkloadError(f"{spec.name}: has no teacher; one is searched for actions that are a vector with limits")
    half, middle = np.ptp(limits, axis=1)[:, None] / 2, limits.mean(axis=1)
    weights, seen = np.zeros((len(half), len(spec.observations))), Moments(len(spec.observations))
    rng, runs, length = np.random.default_rng(seed), 0, min(search.length, spec.episode_steps)
    kept, highest = (np.zeros_like(weights), middle), -np.inf
    simulation = workload.simulation()

    def law(weights: Floats) -> tuple[Floats, Floats]:
        matrix = half * weights * gain
        return matrix, middle - matrix @ offset

    try:
        for k in range(1, search.iterations + 1):
            gain, offset = seen.gain, seen.mean
            moves = rng.normal(size=(search.directions, *weights.shape))
            returns = np.zeros((search.directions, 2))
            for i, move in enumerate(moves):  # both ways from the same start, which leaves less to chance
                runs += 1
                start = episode_seed(seed, runs)
                for j, ahead in enumerate((search.noise, -search.noise)):
                    returns[i, j] = _episode(simulation, *law(weights + ahead * move), length, start, seen)
            best = np.argsort(-returns.max(axis=1))[: search.best]
            slope = np.einsum("i,ijk->jk", returns[best, 0] - returns[best, 1], moves[best])
            weights += search.step / (search.best * (returns[best].std() + 1e-9)) * slope
            if k % search.every == 0 or k == search.iterations:
                starts = (episode_seed(seed + 1, e) for e in range(search.episodes))
                found = np.array([_episode(simulation, *law(weights), spec.episode_steps, s) for s in starts])
                log(f"search {k}: return {found.mean():.1f}, from {found.min():.1f} to {found.max():.1f}")
                if found.mean() - found.std() > highest:
                    kept, highest = law(weights), float(found.mean() - found.std())
    finally:
        simulation.close()
    matrix, bias = kept
    return lambda observations: np.einsum("ni,mi->nm", observations.astype(float), matrix) + bias


class Moments:
    """Mean [n] and spread of what was observed so far (Chan et al. 1979)."""

    def __init__(self, size: int) -> None:
        self._count, self.mean, self._squares = 0, np.zeros(size), np.zeros(size)

    def add(self, x: Floats) -> None:
        """More observations [T, n]."""
        before, self._count = self._count, self._count + len(x)
        apart = x.mean(axis=0) - self.mean
        self._squares += ((x - x.mean(axis=0)) ** 2).sum(axis=0) + apart**2 * before * len(x) / self._count
        self.mean = self.mean + apart * len(x) / self._count

    @property
    def gain(self) -> Floats:
        """[n]: one over the standard deviation; one where nothing varies."""
        deviation = np.sqrt(self._squares / max(1, self._count))
        return 1.0 / np.where(deviation > 1e-7, deviation, 1.0)


def _episode(
    simulation: Simulation, law: Floats, bias: Floats, length: int, seed: int, seen: Moments | None = None
) -> float:
    """The return of one episode under observation -> law @ observation + bias; what it observed is added to `seen`."""
    observations = np.zeros((length, law.shape[1]))
    observation, earned, steps = simulation.reset(seed), 0.0, 0
    for _ in range(length):
        observations[steps] = observation
        step = simulation.step(law @ observations[steps] + bias)
        observation, steps = step.observation, steps + 1
        earned += step.reward
        if step.terminated:
            break
    if seen is not None:
        seen.add(observations[:steps])
    return earned
