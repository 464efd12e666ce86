"""How much action error a task stands: the tolerance that a library may be built with.

Errors of an amplitude, a share of each action's range, are added to the policy's actions:
    uniform      independent in every step and action;
    bias         one sign for each action and episode;
    switching    full amplitude, the sign of every action switches at random times; of several mean times between two
                 switches the one that harms most;
    adversary    full amplitude, its sign chosen from the observation and the action to harm most: against the gradient
                 of a learned value. From episodes with random signs, and again around the worst adversary so far, three
                 things are fitted: where the closed loop is some time later, how far an error now moves it from there,
                 and the return from there on, a quadratic function of the observation. Of all candidates (several such
                 times; pushing with and against the policy) the most harmful on episodes of their own is taken.
                 (Estimating the gradient of the return itself, without the middle step, was much too noisy.)
The tolerance is the largest amplitude at which the return under each of them, less one standard error, is the wanted
share of the return without errors, in the same episodes (common random numbers). It is found by bisection. What is said
to be stood was seen in all of the episodes; only what is clearly not ends after a quarter or half of them, which can
make the tolerance smaller, never larger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import ConfigError, WorkloadError
from laws_ros.runtime.policy import Policy

from .evaluate import check_fit
from .workloads import BatchSimulation, BatchStep, Rollouts, Workload, batched, rollouts

Floats = NDArray[np.float64]

GRID = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)  # amplitudes between which the bisection begins
CLEARLY = 3.0  # standard errors under the wanted share at which no more episodes are run
FEWEST = 8  # episodes before that is looked at
REFINE = 3  # halvings, in the logarithm, of the interval in which the tolerance lies
SWITCH_S = (0.03, 0.1, 0.3, 1.0)  # mean times between two switches of a sign, compared at the amplitude SWITCH_AT
SWITCH_AT = 0.08
EFFECT_S = (0.1, 0.3, 1.0)  # how long after an error the adversary looks at its effect
VALUE_S = 1.0  # of the coming return
QUADRATIC = 40  # more sensors than this: a value without mixed terms
ROUNDS = 2  # of fitting
EXPLORE = 0.5  # share of random signs around the worst adversary so far
SEARCH, CHOICE = 2_000_003, 3_000_017  # added to the seed: what is measured was never searched on


@dataclass(frozen=True)
class Point:
    """One measured amplitude: the share of the return that is kept, its standard error, and in how many episodes."""

    error: str
    amplitude: float
    kept: float
    standard_error: float
    episodes: int


@dataclass(frozen=True)
class Calibration:
    """What a task stands.

    Attributes:
        tolerance: the smallest of `tolerance_by_error`, a share of each action's range.
        tolerance_in_units: the same for each action in its unit.
        beyond: the largest amplitude tried was stood by every error; the tolerance is at least this.
    """

    tolerance: float
    tolerance_in_units: list[float]
    tolerance_by_error: dict[str, float]
    beyond: bool
    keep: float
    return_policy: float
    episodes: int
    seed: int
    switching_s: float
    adversary: str
    curve: list[Point]
    seconds: float


# An error: (observations [N, n], actions [N, m], draws [N, m]) -> [N, m] in [-1, 1]
Error = Callable[[Floats, Floats, Floats], Floats]


def calibrate(
    policy: Policy,
    workload: Workload,
    episodes: int = 32,
    seed: int = 0,
    keep: float = 0.99,
    progress: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Find the largest action error that keeps the return.

    Args:
        policy: continuous actions; their ranges are the workload's limits.
        keep: share of the return that must remain.

    Raises:
        ConfigError: a policy that decides: certified answers are the very same decisions.
        WorkloadError: it does not fit the workload, has no limits, or its return is zero.
    """
    start = time.monotonic()
    if policy.card.decision != "none":
        raise ConfigError(
            f"{policy.path}: decides by {policy.card.decision}; a library answers with the very same decision, so "
            "there is no error to calibrate"
        )
    check_fit(policy, workload)
    task = _Task(policy, workload, episodes, seed, keep, progress)
    switching = {s: task.drawn(max(1.0, s / workload.spec.period_s)) for s in SWITCH_S}
    worst_s = min(SWITCH_S, key=lambda s: task.compared("switching", SWITCH_AT, *switching[s]))
    curves = {
        "uniform": task.curve("uniform", *task.drawn(None)),
        "bias": task.curve("bias", *task.drawn(math.inf)),
        "switching": task.curve("switching", *switching[worst_s]),
    }
    reference = max(GRID[0], min(tolerance for tolerance, _ in curves.values()))
    about, adversary = _search(task, reference)
    curves["adversary"] = task.curve("adversary", adversary, None)
    by_error = {name: tolerance for name, (tolerance, _) in curves.items()}
    tolerance = min(by_error.values())
    return Calibration(
        tolerance=tolerance,
        tolerance_in_units=(tolerance * task.width).tolist(),
        tolerance_by_error=by_error,
        beyond=tolerance == GRID[-1],
        keep=keep,
        return_policy=float(task.undisturbed(0, episodes).mean()),
        episodes=episodes,
        seed=seed,
        switching_s=worst_s,
        adversary=about,
        curve=sorted((p for _, points in curves.values() for p in points), key=lambda p: (p.error, p.amplitude)),
        seconds=round(time.monotonic() - start, 1),
    )


class _Task:
    """A policy on a workload, with errors."""

    def __init__(
        self,
        policy: Policy,
        workload: Workload,
        episodes: int,
        seed: int,
        keep: float,
        progress: Callable[[str], None],
    ) -> None:
        self.policy, self.workload, self.episodes, self.seed = policy, workload, episodes, seed
        self.keep, self.progress = keep, progress
        limits = np.array([(c.low, c.high) for c in workload.spec.actions])
        if not np.isfinite(limits).all():
            raise WorkloadError(f"{workload.spec.name}: an action without limits has no range to take a share of")
        self.width, self.middle = limits[:, 1] - limits[:, 0], limits.mean(axis=1)
        self._undisturbed: dict[int, Floats] = {}
        self.seen = 0

    def drawn(self, switch_steps: float | None) -> tuple[Error, Callable[[], _Draws]]:
        """An error that is drawn, and its draws."""
        return (lambda x, actions, draws: draws), partial(_Draws, switch_steps)

    def run(
        self, amplitude: float, error: Error, draws: Callable[[], _Draws] | None, offset: int, episodes: range
    ) -> Rollouts:
        """Episodes under an error; their observations [T, n + m] have the draws after the sensors."""
        n = len(self.workload.spec.observations)

        def disturbed(augmented: NDArray[np.float32]) -> Floats:
            x = augmented[:, :n]
            actions = self.policy.decide(self.policy.batch(x)).astype(float)
            return actions + amplitude * self.width * error(x.astype(float), actions, augmented[:, n:].astype(float))

        factory = partial(_WithDraws, self.workload, draws or partial(_Draws, math.inf))
        workload = replace(self.workload, batch=factory)
        self.seen += len(episodes)
        return rollouts(workload, disturbed, len(episodes), self.seed + offset, first=episodes.start)

    def undisturbed(self, offset: int, episodes: int) -> Floats:
        """Returns [episodes] without errors."""
        known = self._undisturbed.get(offset, np.zeros(0))
        if len(known) < episodes:
            found = self.run(0.0, lambda x, a, d: d, None, offset, range(len(known), episodes)).returns
            known = self._undisturbed[offset] = np.concatenate([known, found])
            if not abs(known.mean()) > 0.0:
                raise WorkloadError(f"{self.workload.spec.name}: the policy's mean return is 0; no share of it to keep")
        return known[:episodes]

    def measure(self, name: str, amplitude: float, error: Error, draws: Callable[[], _Draws] | None) -> Point:
        """All episodes, or fewer where the return is clearly not kept."""
        found = np.zeros(0)
        for episodes in sorted({k for k in (self.episodes // 4, self.episodes // 2) if k >= FEWEST} | {self.episodes}):
            more = self.run(amplitude, error, draws, 0, range(len(found), episodes)).returns
            found = np.concatenate([found, more])
            point = self._point(name, amplitude, self.undisturbed(0, episodes), found)
            if point.kept + CLEARLY * point.standard_error < self.keep:
                break
        return point

    def compared(self, name: str, amplitude: float, error: Error, draws: Callable[[], _Draws] | None) -> float:
        """Share of the return kept in episodes that only serve to choose between errors: half as many."""
        alone = self.undisturbed(CHOICE, max(1, self.episodes // 2))
        found = self.run(amplitude, error, draws, CHOICE, range(len(alone))).returns
        return self._point(name, amplitude, alone, found).kept

    def _point(self, name: str, amplitude: float, alone: Floats, found: Floats) -> Point:
        lost = alone - found
        share = float(lost.mean() / abs(alone.mean()))
        # Of a ratio of paired means, to first order.
        spread = (lost - share * np.sign(alone.mean()) * alone).std(ddof=1) if len(lost) > 1 else math.inf
        error = float(spread / math.sqrt(len(lost)) / abs(alone.mean()))
        self.progress(
            f"{self.seen} episodes; {name} errors of {amplitude:.2%} of the range keep {1.0 - share:.2%} +- "
            f"{error:.2%} of the return"
        )
        return Point(name, amplitude, 1.0 - share, error, len(lost))

    def curve(self, name: str, error: Error, draws: Callable[[], _Draws] | None) -> tuple[float, list[Point]]:
        """The largest amplitude that is stood, by bisection, and everything measured on the way."""
        points: list[Point] = []

        def stood(amplitude: float) -> bool:
            points.append(self.measure(name, amplitude, error, draws))
            return points[-1].kept - points[-1].standard_error >= self.keep

        below, above = -1, len(GRID)
        while above - below > 1:
            k = (below + above) // 2
            below, above = (k, above) if stood(GRID[k]) else (below, k)
        good = GRID[below] if below >= 0 else 0.0
        if above == len(GRID):
            return good, points
        bad = GRID[above]
        for _ in range(REFINE):
            middle = math.sqrt(good * bad) if good else 0.5 * bad
            good, bad = (middle, bad) if stood(middle) else (good, middle)
        return good, points


def _search(task: _Task, amplitude: float) -> tuple[str, Error]:
    """The most harmful sign pattern that is found, and a word on where it comes from."""
    m = len(task.width)
    kept = task.run(0.0, lambda x, a, d: d, None, SEARCH, range(task.episodes))
    features = _Features(task, np.concatenate(kept.observations)[:, : len(task.workload.spec.observations)])
    by_policy = np.zeros((m, features.count))
    by_policy[:, -1 - m : -1] = np.eye(m)
    candidates = {"with the policy": by_policy, "against the policy": -by_policy}
    most, worst, best = -math.inf, "", by_policy
    for round_ in range(ROUNDS + 1):
        for about, weight in candidates.items():
            harm = 1.0 - task.compared(f"adversary ({about})", amplitude, features.signs(weight), None)
            if harm > most:
                most, worst, best = harm, about, weight
        if round_ == ROUNDS:
            break
        # Round 0 explores with random signs only, the others around the worst so far.
        share = EXPLORE if round_ else 1.0
        error = features.signs(best, share)
        found = task.run(amplitude, error, partial(_Draws, None), SEARCH + 1 + round_, range(task.episodes))
        candidates = {
            f"value {s:g} s later, round {round_ + 1}": features.against_value(found, error, best, share, s)
            for s in EFFECT_S
        }
    return worst, features.signs(best)


class _Features:
    """What an adversary sees: normalised observation, normalised action, 1."""

    def __init__(self, task: _Task, observations: NDArray[np.float32]) -> None:
        self._task = task
        self._mean = observations.mean(axis=0, dtype=float)
        spread = observations.std(axis=0, dtype=float)
        self._scale = np.where(spread > 1e-9, spread, 1.0)
        self.count = len(self._mean) + len(task.width) + 1

    def __call__(self, x: Floats, actions: Floats) -> Floats:
        z = (x - self._mean) / self._scale
        unit = (actions - self._task.middle) / (0.5 * self._task.width)
        return np.concatenate([z, unit, np.ones((len(z), 1))], axis=1)

    def signs(self, weight: Floats, explore: float = 0.0) -> Error:
        """The error sign(weight @ features); with probability `explore` (by uniform draws) a random sign instead."""

        def error(x: Floats, actions: Floats, draws: Floats) -> Floats:
            chosen = _sign(self(x, actions) @ weight.T)
            # A uniform draw in [-1, 1] has its sign and its size independent of each other.
            return np.where(np.abs(draws) < explore, _sign(draws), chosen)

        return error

    def against_value(self, found: Rollouts, error: Error, weight: Floats, explore: float, effect_s: float) -> Floats:
        """[m, features]: the signs of errors that lower the value of where the closed loop is `effect_s` later.

        With x the features now, e the error's sign, y the normalised observation later: y = M x + B (e - E[e | x]) and
        value(y) = y' S y + q' y + c are fitted; the gradient of the value over e is then B' (2 S M x + q).

        Args:
            error: what `found` was run under, random with probability `explore` and else as `weight` says.
        """
        spec, n = self._task.workload.spec, len(self._mean)
        later, horizon = (max(1, round(s / spec.period_s)) for s in (effect_s, VALUE_S))
        now, then, deviation, value = [], [], [], []
        for augmented, earned in zip(found.observations, found.rewards, strict=True):
            total = np.concatenate([[0.0], np.cumsum(earned)])
            # Cut off at the time limit, the last returns are unknown; an episode that ended earns nothing more.
            last = len(earned) - later - (horizon if len(earned) == spec.episode_steps else 0)
            k = np.arange(max(0, last))
            actions = self._task.policy.decide(self._task.policy.batch(augmented[k, :n])).astype(float)
            x, draws = augmented[k, :n].astype(float), augmented[k, n:].astype(float)
            seen = self(x, actions)
            now.append(seen)
            then.append((augmented[k + later, :n] - self._mean) / self._scale)
            deviation.append(error(x, actions, draws) - (1.0 - explore) * _sign(seen @ weight.T))
            value.append(total[np.minimum(k + later + horizon, len(earned))] - total[k + later])
        x, y, e, v = (np.concatenate(rows) for rows in (now, then, deviation, value))
        motion = _ridge(x, y)
        effect = _ridge(e, y - x @ motion)
        i, j = np.triu_indices(n) if n <= QUADRATIC else (np.arange(n), np.arange(n))
        fit = _ridge(np.concatenate([y[:, i] * y[:, j], y, np.ones((len(y), 1))], axis=1), v)
        curvature = np.zeros((n, n))
        curvature[i, j] = fit[: len(i)]
        harm = -effect @ (curvature + curvature.T) @ motion.T
        harm[:, -1] -= effect @ fit[len(i) : len(i) + n]
        return harm


def _ridge(features: Floats, targets: Floats) -> Floats:
    gram = features.T @ features
    shrink = 1e-6 * (np.trace(gram) / len(gram) + 1.0)
    weights: Floats = np.linalg.solve(gram + shrink * np.eye(len(gram)), features.T @ targets)
    return weights


def _sign(values: Floats) -> Floats:
    return np.where(values >= 0.0, 1.0, -1.0)


class _Draws:
    """Random numbers in [-1, 1] for every lane, action and step, a function of the episode's seed.

    Args:
        switch_steps: signs that switch with this mean number of steps between (infinite: never); None: uniform numbers.
    """

    def __init__(self, switch_steps: float | None) -> None:
        self._switch_steps = switch_steps

    def begin(self, lanes: int, actions: int) -> None:
        self._rng = [np.random.default_rng(0)] * lanes
        self._sign = np.ones((lanes, actions))

    def reset(self, lanes: Sequence[int], seeds: Sequence[int]) -> None:
        for lane, seed in zip(lanes, seeds, strict=True):
            self._rng[lane] = np.random.default_rng([seed, 1])
            self._sign[lane] = self._rng[lane].choice([-1.0, 1.0], self._sign.shape[1])

    def next(self, running: NDArray[np.bool_]) -> Floats:
        if self._switch_steps is not None and math.isinf(self._switch_steps):
            return self._sign
        drawn = np.zeros(self._sign.shape)
        for lane in np.flatnonzero(running):
            drawn[lane] = self._rng[lane].random(drawn.shape[1])
        if self._switch_steps is None:
            return 2.0 * drawn - 1.0
        self._sign = np.where(running[:, None] & (drawn < 1.0 / self._switch_steps), -self._sign, self._sign)
        return self._sign


class _WithDraws:
    """A batched simulation whose observations go on with draws [lanes, m], so that errors stay functions of a row."""

    def __init__(self, workload: Workload, draws: Callable[[], _Draws], lanes: int, threads: int) -> None:
        self._inner: BatchSimulation = batched(workload)(lanes, threads)
        self._draws = draws()
        self._draws.begin(lanes, len(workload.spec.actions))
        self._lanes = lanes

    def reset(self, lanes: Sequence[int], seeds: Sequence[int]) -> NDArray[np.float32]:
        self._draws.reset(lanes, seeds)
        fresh = np.zeros(self._lanes, bool)
        fresh[list(lanes)] = True
        return np.concatenate(
            [self._inner.reset(lanes, seeds), self._draws.next(fresh)[list(lanes)].astype(np.float32)], axis=1
        )

    def step(self, actions: NDArray[Any], running: NDArray[np.bool_]) -> BatchStep:
        step = self._inner.step(actions, running)
        draws = self._draws.next(running).astype(np.float32)
        return step._replace(observations=np.concatenate([step.observations, draws], axis=1))

    def close(self) -> None:
        self._inner.close()


def plot(found: Calibration, title: str, path: Path) -> None:
    """The curves as a picture: share of the return kept against the amplitude."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=110)
    for name, tolerance in found.tolerance_by_error.items():
        points = [p for p in found.curve if p.error == name]
        axes.errorbar(
            [100 * p.amplitude for p in points],
            [100 * p.kept for p in points],
            [100 * p.standard_error for p in points],
            marker=".",
            capsize=2,
            label=f"{name}: {tolerance:.2%}",
        )
    axes.axhline(100 * found.keep, color="grey", linewidth=0.8)
    axes.axvline(100 * found.tolerance, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="action error, % of each action's range", ylabel="return kept, %", title=title)
    axes.set_ylim(100 - 1500 * (1.0 - found.keep), 100 + 500 * (1.0 - found.keep))  # a crash is a line that leaves
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(title="largest error stood")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
