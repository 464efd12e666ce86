"""Libraries of kind `statistical`, for policies that nothing can be proved about: any size, any operators.

Training episodes choose regions, experts and bounds; fresh ones, used for nothing else, then say how often each bound
is exceeded (core.statistical). What is tested was fixed before, and a region has one draw of an episode at most, so
the test is exact. `laws verify --workload` repeats it with other episodes.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import Certificates, Ragged, decision_rows, kind_code
from laws_ros.core.region import Regions
from laws_ros.core.statistical import Evidence, drawn, samples_needed, visits
from laws_ros.core.trie import Splitter
from laws_ros.runtime.policy import Policy

from .evaluate import policy_rollouts
from .grow import Growth, answered
from .kinds import finished
from .verify import Executed
from .workers import HERE, Workers
from .workloads import Workload

Floats = NDArray[np.float64]
Episodes = Sequence[NDArray[np.float32]]  # observations [T, n] of each

MARGIN = 1.02  # regions over the observations that made them
WHOLE = (1.0, 0.98)  # share of a node's observations in its region, tried before the node is split
CORE = (0.9, 0.75, 0.6, 0.45)  # and where it cannot be split
DECIDED = 0.9  # of a box's observations, for which its expert must decide
SPARE = 0.04  # of delta: what training observations may exceed, so that at most one of a region's fresh draws does
ROOM = 1.25  # bound over the error at that quantile
SAFETY = 1.15  # fresh draws expected in a region over the fewest that could show delta: one exceedance is forgiven
TOGETHER = 32  # regions that share beta, about; more need a few draws more each
QUANTILES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of a sensor, where it may be split
PROBES = 500  # observations on either side that a split is judged by
REFITS = 3  # of an affine map to what lies between the limits
BLOCK = 256  # episodes run and tested together


@dataclass(frozen=True)
class Trial:
    """How regions are tested.

    Attributes:
        delta: fraction of a region's traffic that may exceed its bound.
        beta: probability that any of the kept regions' statements is false; M tested regions get beta / M each.
        episodes: how many fresh ones there will be.
        blocks: gives them, some at a time, each time anew.
        source: sha256 of the workload, policy and numbers that they follow from.
    """

    delta: float
    beta: float
    episodes: int
    blocks: Callable[[], Iterable[Episodes]]
    source: bytes

    @property
    def needed(self) -> float:
        """Draws that a region should have."""
        return SAFETY * samples_needed(self.delta, self.beta / TOGETHER)


def trial(
    policy: Policy,
    workload: Workload,
    delta: float,
    beta: float,
    seed: int,
    episodes: int | None = None,
    parts: Path | None = None,
    workers: Workers = HERE,
    progress: Callable[[str], None] = lambda text: None,
) -> Trial:
    """A trial on fresh episodes of a workload driven by the policy; by default as many as delta and beta need for
    regions that two episodes of three spend their time in. With a folder for `parts` it can be interrupted."""
    count = episodes or math.ceil(1.5 * SAFETY * samples_needed(delta, beta / TOGETHER))

    def blocks() -> Iterator[Episodes]:
        for block, first in enumerate(range(0, count, BLOCK)):
            size = min(BLOCK, count - first)
            yield policy_rollouts(policy, workload, size, seed + block, parts=parts, workers=workers).observations
            progress(f"{first + size} of {count} fresh episodes")

    source = hashlib.sha256(f"{workload.spec.name} {policy.sha256} {seed} {count}".encode()).digest()
    return Trial(delta, beta, count, blocks, source)


def grow_statistical(
    policy: Policy,
    episodes: Episodes,
    trial: Trial,
    tolerance: Floats,
    max_regions: int = 1000,
    progress: Callable[[str], None] = lambda text: None,
) -> Growth:
    """Choose regions, experts and bounds by training episodes; keep those that the trial's fresh ones confirm.

    Args:
        tolerance: [m] largest bound, action units; ignored for decisions.
        max_regions: at most so many are tested; the number of fresh episodes limits them too.
    """
    chooser = _Chooser(policy, episodes, tolerance, trial, max_regions)
    certificates = chooser.run(progress)
    tested = len(certificates)
    if tested:
        stays = [chooser.stay(visits(certificates.regions[[k]], chooser.x)) for k in range(tested)]
        evidence = examine(policy, certificates, stays, trial)
        kept = np.array([e.holds for e in evidence])
        records = Ragged.of([e.record() for e in evidence if e.holds], np.uint8)
        certificates = replace(certificates[kept], octets=records)
    return finished(policy, certificates, chooser.splitter.trie(), np.concatenate(episodes), tolerance, tested)


def examine(policy: Policy, certificates: Certificates, stays: Sequence[int], trial: Trial) -> list[Evidence]:
    """What fresh episodes say about certificates that were chosen without them, all of which share the trial's beta."""
    executed, count = Executed(policy, certificates), len(certificates)
    generators = [np.random.default_rng([*trial.source, k]) for k in range(count)]
    seen = np.zeros((count, 2), int)  # draws; how many of them exceeded their bound
    for block in trial.blocks():
        for k in range(count):
            x = drawn(certificates.regions[[k]], block, stays[k], generators[k])
            inside, error, bound = executed.compare(np.full(len(x), k), x, delivered=True)
            seen[k] += inside.sum(), (inside & ~(error <= bound).all(axis=1)).sum()
    return [
        Evidence(trial.delta, trial.beta / count, n, exceeded, n, trial.source, stay)
        for (n, exceeded), stay in zip(seen.tolist(), stays, strict=True)
    ]


class _Chooser:
    """Splits the training observations until an affine map answers for a box of them well enough."""

    def __init__(self, policy: Policy, episodes: Episodes, tolerance: Floats, trial: Trial, max_regions: int) -> None:
        self.policy, self.tolerance, self.trial = policy, tolerance, trial
        self.decision = policy.card.decision
        self.rows = decision_rows(policy.actions, self.decision)
        x = np.concatenate(episodes)
        self.x, self.episodes = x.astype(float), len(episodes)
        self.owner = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])
        outputs = policy.batch(x)
        self.y = (policy.decide(outputs) if self.decision == "none" else outputs).astype(float) @ self.rows.T
        self.low, self.high = np.full(1, -np.inf), np.full(1, np.inf)
        if self.decision == "none":  # a black box that saturates ends near a limit, seldom at it
            low, high = (np.array([getattr(c, end) for c in policy.card.actions]) for end in ("low", "high"))
            self.low, self.high = low + tolerance, high - tolerance
        spread = self.x.std(axis=0)
        self.scale = np.where(spread > 1e-9, spread, 1.0)
        self.free = np.setdiff1d(np.arange(x.shape[1]), policy.card.context_indices)
        self.splitter = Splitter()
        self.open = np.ones(len(x), bool)  # not yet in a kept region
        self.max_regions = max_regions

    def stay(self, points: NDArray[np.intp]) -> int:
        """The typical number of observations of an episode among these, of those that have any."""
        count = np.bincount(self.owner[points])
        return max(1, math.ceil(np.median(count[count > 0]))) if len(points) else 1

    def enough(self, points: NDArray[np.intp]) -> bool:
        """Can a region with these training observations be fitted, and are enough fresh draws to be expected in it?"""
        if len(points) < 4 * (self.x.shape[1] + 1):
            return False
        stay = self.stay(points)
        share = np.minimum(np.bincount(self.owner[points]), stay).sum() / stay / self.episodes
        return bool(share * self.trial.episodes >= self.trial.needed)

    def run(self, progress: Callable[[str], None]) -> Certificates:
        kept: list[Certificates] = []
        waiting = [(-len(points), node, points) for node, points in self._contexts()]
        heapq.heapify(waiting)
        while waiting and len(kept) < self.max_regions:
            _, node, points = heapq.heappop(waiting)
            points = points[self.open[points]]
            if not self.enough(points):
                continue
            found = self._first(points, WHOLE)
            if found is None and (parts := self._parts(node, points)):
                for child, part in parts:
                    heapq.heappush(waiting, (-len(part), child, part))
                continue
            found = found or self._first(points, CORE)
            if found is not None:
                kept.append(found)
                self.open[visits(found.regions, self.x)] = False
                rest = points[self.open[points]]
                heapq.heappush(waiting, (-len(rest), node, rest))
                progress(f"{len(kept)} regions, {100 * (1 - self.open.mean()):.1f}% of the observations in them")
        return Certificates.join(kept) if kept else Certificates.none(self.x.shape[1], len(self.rows))

    def _contexts(self) -> list[tuple[int, NDArray[np.intp]]]:
        """One leaf per value of the discrete observations."""
        leaves = [(0, np.arange(len(self.x)))]
        for axis in self.policy.card.context_indices:
            done = []
            while leaves:
                node, points = leaves.pop()
                values = np.unique(self.x[points, axis])
                if len(values) > 1:
                    leaves += self._split(node, points, axis, 0.5 * (values[0] + values[1]))
                else:
                    done.append((node, points))
            leaves = done
        return leaves

    def _split(
        self, node: int, points: NDArray[np.intp], axis: int, threshold: float
    ) -> list[tuple[int, NDArray[np.intp]]]:
        low, high = self.splitter.split(node, axis, threshold)
        below = self.x[points, axis] < threshold
        return [(low, points[below]), (high, points[~below])]

    def _first(self, points: NDArray[np.intp], shares: Sequence[float]) -> Certificates | None:
        return next((found for share in shares if (found := self._fit(self._region(points, share)))), None)

    def _region(self, points: NDArray[np.intp], share: float) -> Regions:
        """A ball in whitened principal axes that holds a share of observations; without extent in what is discrete."""
        n, free, discrete = self.x.shape[1], self.free, list(self.policy.card.context_indices)
        scaled = self.x[points][:, free] / self.scale[free]
        mean = scaled.mean(axis=0)
        covariance = (scaled - mean).T @ (scaled - mean) / len(points)
        values, vectors = np.linalg.eigh(covariance + 1e-9 * np.eye(len(free)))
        far = np.linalg.norm((scaled - mean) @ vectors / np.sqrt(values), axis=1)
        center, axes, widths = self.x[points[0]].copy(), np.zeros((n, n)), np.zeros(n)
        center[free] = mean * self.scale[free]
        axes[discrete, np.arange(len(discrete))] = 1.0
        axes[np.ix_(free, np.arange(len(discrete), n))] = self.scale[free, None] * vectors
        widths[len(discrete) :] = MARGIN * np.quantile(far, share) * np.sqrt(values)
        return Regions.from_axes(center[None], axes[None], widths[None], len(free)).brief()

    def _fit(self, regions: Regions) -> Certificates | None:
        """The expert of a region, by least squares over all observations that lie in it; None if it is poor."""
        n, rows = self.x.shape[1], len(self.rows)
        here = visits(regions, self.x)
        if not self.enough(here):
            return None
        # errors where the map was not fitted, by episodes: those of its own observations would promise too much
        even = self.owner[here] % 2 == 0
        if min(even.sum(), (~even).sum()) <= n:
            return None
        weight, bias = self._line(here)
        sides = [(here[even], here[~even]), (here[~even], here[even])]
        error = np.concatenate([self._error(*self._line(fitted), left) for fitted, left in sides])
        quantile = np.quantile(error, 1.0 - SPARE * self.trial.delta / rows, axis=0, method="higher")
        bound = ROOM * quantile + 1e-6 * (1.0 + np.abs(self.y[here]).max(axis=0))  # exact fits round, too
        if self.decision == "none":
            bound = np.minimum(bound, self.tolerance)
        kind = np.array([kind_code("statistical")], np.uint8)
        blank = np.zeros((1, rows, n))
        found = Certificates(
            regions.center, regions.transform, weight[None], bias[None], blank, bound[None], kind, round=regions.round
        )
        if self.decision == "none":
            share = float((error > self.tolerance).any(axis=1).mean())
            return found if share <= SPARE * self.trial.delta else None
        hit = answered(found, np.zeros(len(here), np.intp), self.x[here], self.tolerance, self.decision)
        return found if hit.mean() >= DECIDED else None

    def _error(self, weight: NDArray[np.float32], bias: NDArray[np.float32], points: NDArray[np.intp]) -> Floats:
        """[N, r] of an affine map at some observations."""
        value = self.x[points] @ weight.astype(float).T + bias
        if self.decision == "none":
            value = self.policy.decide(value.astype(np.float32)).astype(float)
        return np.abs(self.y[points] - value)

    def _line(self, points: NDArray[np.intp]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Affine least squares: weight [r, n], bias [r].

        Actions are cut to their limits, the expert's as the policy's. So where the policy is at a limit, only what
        falls short of it is an error: such observations are left out unless the map as it stands falls short there.
        """
        x, y = self.x[points], self.y[points]
        mean = x.mean(axis=0)
        inputs = np.column_stack([(x - mean) / self.scale, np.ones(len(x))])
        between = (y > self.low) & (y < self.high)
        used = between
        weight, bias = np.zeros((y.shape[1], x.shape[1]), np.float32), np.zeros(y.shape[1], np.float32)
        for _ in range(1 if between.all() else REFITS):
            for row in range(y.shape[1]):
                some = used[:, row]
                if some.sum() < 2 * inputs.shape[1]:
                    some = np.ones(len(x), bool)
                slope = np.linalg.lstsq(inputs[some], y[some, row], rcond=1e-9)[0]
                weight[row] = slope[:-1] / self.scale
                bias[row] = slope[-1] - weight[row].astype(float) @ mean
            value = x @ weight.astype(float).T + bias
            used = between | ((value > self.low) & (value < self.high))
        return weight, bias

    def _parts(self, node: int, points: NDArray[np.intp]) -> list[tuple[int, NDArray[np.intp]]]:
        """Both sides of the split that leaves two affine maps the least error; none if a side would be too small."""
        best, choice = np.inf, None
        for axis in range(self.x.shape[1]):
            for threshold in np.unique(np.quantile(self.x[points, axis], QUANTILES)).tolist():
                below = self.x[points, axis] < threshold
                sides = points[below], points[~below]
                if all(map(self.enough, sides)):
                    few = (side[:: -(-len(side) // PROBES)] for side in sides)
                    left = sum(
                        float((self._error(*self._line(k), k) ** 2).mean()) * len(side)
                        for k, side in zip(few, sides, strict=True)
                    )
                    if left < best:
                        best, choice = left, (axis, threshold)
        return [] if choice is None else self._split(node, points, *choice)
