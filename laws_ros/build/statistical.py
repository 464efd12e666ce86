"""Libraries of kind `statistical`, for policies that nothing can be proved about: any size, any operators.

Training observations choose regions, experts and bounds; fresh episodes, used for nothing else, then say how often each
bound is exceeded (core.statistical). What is tested was fixed before, so the test is exact for draws that are
independent of each other: that they are when one observation is drawn per episode. Several per episode cost fewer
episodes and are alike among themselves; the evidence keeps both numbers, and `laws verify --workload` measures anew.

One observation is a uniformly drawn control step of an episode, dropped if the episode was over by then. So long
episodes count for more, as they do in the traffic.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import Certificates, Ragged, decision_rows, kind_code
from laws_ros.core.region import Regions
from laws_ros.core.statistical import Evidence, samples_needed
from laws_ros.core.trie import Splitter
from laws_ros.runtime.policy import Policy

from .grow import Growth, answered
from .kinds import finished
from .verify import Executed
from .workloads import Workload, rollouts

Floats = NDArray[np.float64]

MARGIN = 1.02  # boxes over the observations that made them
SHRINK = (0.8, 0.6, 0.45)  # of a box, where the whole of it does not fit
DECIDED = 0.9  # of a box's observations, for which its expert must decide
SPARE = 0.1  # of delta: what training observations may exceed, so that fresh ones stay below delta
ROOM = 1.25  # bound over the training error at that quantile
SAFETY = 1.6  # fresh observations expected in a region over the fewest that could show delta
QUANTILES = (0.2, 0.35, 0.5, 0.65, 0.8)  # of a sensor, where it may be split
PROBES = 1000  # observations on either side that a split is judged by


@dataclass(frozen=True)
class Draws:
    """Observations drawn from episodes of the policy.

    Attributes:
        x [N, n]: float32. episode [N]: where each comes from.
        source: sha256 of the workload, policy and numbers that they follow from.
    """

    x: NDArray[np.float32]
    episode: NDArray[np.int64]
    source: bytes


def draw(
    policy: Policy,
    workload: Workload,
    episodes: int,
    per_episode: int,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
) -> Draws:
    """Draw `per_episode` control steps of every one of a number of episodes."""
    name, steps, block = workload.spec.name, workload.spec.episode_steps, 256
    parts, owners = [], []
    for first in range(0, episodes, block):
        count = min(block, episodes - first)
        found = rollouts(workload, lambda x: policy.decide(policy.batch(x)), count, seed, first=first)
        for k, x in enumerate(found.observations, start=first):
            chosen = np.random.default_rng([seed, k]).choice(steps, min(per_episode, steps), replace=False)
            parts.append(x[np.sort(chosen[chosen < len(x)])])
            owners.append(np.full(len(parts[-1]), k))
        progress(f"{first + count} of {episodes} fresh episodes")
    source = hashlib.sha256(f"{name} {policy.sha256} {seed} {episodes} {per_episode}".encode()).digest()
    return Draws(np.concatenate(parts), np.concatenate(owners), source)


def grow_statistical(
    policy: Policy,
    observations: NDArray[np.float32],
    fresh: Draws,
    tolerance: Floats,
    delta: float,
    beta: float,
    max_regions: int = 1000,
    progress: Callable[[str], None] = lambda text: None,
) -> Growth:
    """Choose regions, experts and bounds by training observations [N, n]; keep those that fresh draws confirm.

    Args:
        tolerance: [m] largest bound, action units; ignored for decisions.
        delta: fraction of a region's traffic that may exceed its bound.
        beta: probability that any of the kept regions' statements is false; M tested regions get beta / M each.
        max_regions: at most so many are tested; the number of fresh draws limits them too.
    """
    chooser = _Chooser(policy, observations, tolerance, delta, beta, len(fresh.x), max_regions)
    certificates = chooser.run(progress)
    tested = len(certificates)
    if tested:
        evidence = examine(policy, certificates, fresh, delta, beta / tested)
        kept = np.array([e is not None and e.holds for e in evidence])
        records = Ragged.of([e.record() for e in evidence if e is not None and e.holds], np.uint8)
        certificates = replace(certificates[kept], octets=records)
    return finished(policy, certificates, chooser.splitter.trie(), observations, tolerance, tested)


def examine(
    policy: Policy, certificates: Certificates, fresh: Draws, delta: float, beta: float
) -> list[Evidence | None]:
    """What fresh draws say about each certificate; None where no draw fell into its region."""
    executed, result = Executed(policy, certificates), []
    for k in range(len(certificates)):
        inside, error, bound = executed.compare(np.full(len(fresh.x), k), fresh.x, delivered=True)
        exceeded = ~(error <= bound).all(axis=1)
        episodes = len(np.unique(fresh.episode[inside]))
        seen = int(inside.sum()), int((inside & exceeded).sum())
        result.append(Evidence(delta, beta, *seen, episodes, fresh.source) if episodes else None)
    return result


class _Chooser:
    """Splits the training observations until an affine map answers for a box of them well enough."""

    def __init__(
        self,
        policy: Policy,
        x: NDArray[np.float32],
        tolerance: Floats,
        delta: float,
        beta: float,
        fresh: int,
        max_regions: int,
    ) -> None:
        self.policy, self.tolerance, self.delta = policy, tolerance, delta
        self.decision = policy.card.decision
        self.rows = decision_rows(policy.actions, self.decision)
        self.x = x.astype(float)
        outputs = policy.batch(x)
        self.y = (policy.decide(outputs) if self.decision == "none" else outputs).astype(float) @ self.rows.T
        spread = self.x.std(axis=0)
        self.scale = np.where(spread > 1e-9, spread, 1.0)
        self.splitter = Splitter()
        self.open = np.ones(len(x), bool)  # not yet in a kept region
        # the fewest training observations of a region whose share of the fresh ones is enough to test it
        regions = max(1, min(max_regions, fresh // samples_needed(delta, beta)))
        self.fewest = max(4 * (x.shape[1] + 1), SAFETY * samples_needed(delta, beta / regions) * len(x) / fresh)
        self.max_regions = max_regions

    def run(self, progress: Callable[[str], None]) -> Certificates:
        kept: list[Certificates] = []
        waiting = [(-len(points), node, points) for node, points in self._contexts()]
        heapq.heapify(waiting)
        while waiting and len(kept) < self.max_regions:
            _, node, points = heapq.heappop(waiting)
            points = points[self.open[points]]
            if len(points) < self.fewest:
                continue
            found = self._fit(points, 1.0)
            if found is None and (parts := self._parts(node, points)):
                for child, part in parts:
                    heapq.heappush(waiting, (-len(part), child, part))
                continue
            found = found or next((f for shrink in SHRINK if (f := self._fit(points, shrink))), None)
            if found is not None:
                kept.append(found)
                self.open &= ~found.regions.contains(self.x)[:, 0]
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

    def _fit(self, points: NDArray[np.intp], shrink: float) -> Certificates | None:
        """The expert of a box around observations, by least squares over all that lie in it; None if it is poor."""
        n, rows = self.x.shape[1], len(self.rows)
        scaled = self.x[points] / self.scale
        mean = scaled.mean(axis=0)
        vectors = np.linalg.eigh((scaled - mean).T @ (scaled - mean) / len(points) + 1e-9 * np.eye(n))[1]
        along = (scaled - mean) @ vectors
        low, high = along.min(axis=0), along.max(axis=0)
        center = (mean + vectors @ (0.5 * (low + high))) * self.scale
        widths = shrink * MARGIN * 0.5 * (high - low)
        regions = Regions.from_axes(center[None], (self.scale[:, None] * vectors)[None], widths[None])
        here = np.flatnonzero(regions.contains(self.x)[:, 0])
        if len(here) < self.fewest:
            return None
        weight, bias, error = self._line(here)
        quantile = np.quantile(error, 1.0 - SPARE * self.delta / rows, axis=0, method="higher")
        bound = ROOM * quantile + 1e-6 * (1.0 + np.abs(self.y[here]).max(axis=0))  # exact fits round, too
        if self.decision == "none":
            bound = np.minimum(bound, self.tolerance)
        kind = np.array([kind_code("statistical")], np.uint8)
        blank = np.zeros((1, rows, n))
        found = Certificates(regions.center, regions.transform, weight[None], bias[None], blank, bound[None], kind)
        if self.decision == "none":
            return found if (quantile <= self.tolerance).all() else None
        hit = answered(found, np.zeros(len(here), np.intp), self.x[here], self.tolerance, self.decision)
        return found if hit.mean() >= DECIDED else None

    def _line(self, points: NDArray[np.intp]) -> tuple[NDArray[np.float32], NDArray[np.float32], Floats]:
        """Affine least squares: weight [r, n], bias [r], and the errors at the points [N, r]."""
        x, y = self.x[points], self.y[points]
        mean = x.mean(axis=0)
        slope = np.linalg.lstsq((x - mean) / self.scale, y - y.mean(axis=0), rcond=1e-9)[0].T / self.scale
        weight = slope.astype(np.float32)
        bias = (y.mean(axis=0) - weight.astype(float) @ mean).astype(np.float32)
        value = x @ weight.astype(float).T + bias
        if self.decision == "none":
            value = self.policy.decide(value.astype(np.float32)).astype(float)
        return weight, bias, np.abs(y - value)

    def _parts(self, node: int, points: NDArray[np.intp]) -> list[tuple[int, NDArray[np.intp]]]:
        """Both sides of the split that leaves two affine maps the least error; none if a side would be too small."""
        best, choice = np.inf, None
        for axis in range(self.x.shape[1]):
            for threshold in np.unique(np.quantile(self.x[points, axis], QUANTILES)).tolist():
                below = self.x[points, axis] < threshold
                sides = points[below], points[~below]
                if min(map(len, sides)) >= self.fewest:
                    few = (side[:: -(-len(side) // PROBES)] for side in sides)
                    left = sum(
                        float((self._line(k)[2] ** 2).mean()) * len(side) for k, side in zip(few, sides, strict=True)
                    )
                    if left < best:
                        best, choice = left, (axis, threshold)
        return [] if choice is None else self._split(node, points, *choice)
