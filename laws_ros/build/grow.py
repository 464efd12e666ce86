"""Growing a library over the observations that a workload visits.

Most-visited node first: a box in the principal axes of the node's observations is certified; where its bound, at the
observations themselves, is within tolerance, it becomes an expert and is widened until its bound uses the tolerance up.
Otherwise the node is split at the sensor along which the policy bends most (its largest second difference) and both
halves try again.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import Certificates, decision_pairs, decision_rows
from laws_ros.core.certify import certify
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.core.region import Regions
from laws_ros.core.trie import Splitter, Trie
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

Floats = NDArray[np.float64]

BATCH = 64  # nodes certified together
MARGIN = 1.05  # boxes are a little larger than the observations that made them
WIDEN = (2.0, 1.5, 1.25)  # factors tried in turn on an accepted region, on all its axes together
STRETCH = (2.0, 1.5)  # and then on one axis after the other
FEWEST = 3


@dataclass
class _Node:
    index: int  # in the trie
    points: NDArray[np.intp]  # observations that no region answers yet


@dataclass
class Growth:
    """A grown library and what it took."""

    library: Library
    certificates_tried: int
    train_coverage: float


def answered(
    certificates: Certificates, index: NDArray[np.intp], x: Floats, tolerance: Floats, decision: str
) -> NDArray[np.bool_]:
    """[N]: would certificate index[k] answer observation x[k]? The router's rule, for checking many at once."""
    inside, value, bound = certificates.at(index, x)
    if decision == "none":
        return np.asarray(inside & (bound <= tolerance).all(axis=1))
    count = wins(value, bound)
    return np.asarray(inside & (count.max(axis=1) == count.shape[1] - 1))


def wins(value: Floats, bound: Floats) -> NDArray[np.int64]:
    """[N, m]: pairs that each alternative provably wins, from pairwise values and bounds [N, r]."""
    outputs = round((1 + math.sqrt(1 + 8 * value.shape[1])) / 2)
    count = np.zeros((len(value), outputs), np.int64)
    for row, (i, j) in enumerate(decision_pairs(outputs)):
        count[:, i] += value[:, row] - bound[:, row] > 0
        count[:, j] += value[:, row] + bound[:, row] < 0
    return count


def grow(
    policy: Policy,
    network: Network,
    observations: NDArray[np.float32],
    actions: NDArray[np.float32],
    tolerance: Floats,
    max_regions: int = 20_000,
    max_certificates: int = 60_000,
    progress: Callable[[str], None] = lambda text: None,
) -> Growth:
    """Build a library for the distribution of the given observations.

    Args:
        policy, network: the same model, for execution and for bounds.
        observations: [N, n] visited ones; duplicates count as visits.
        actions: [N, *] the policy's actions there; they only guide the choice of axes.
        tolerance: [m] largest certified action error, action units; ignored for decisions.
        max_regions, max_certificates: the budget.
        progress: called with a line of text now and then.

    Returns:
        Growth; train_coverage is the share of `observations` that the library answers.
    """
    grower = _Grower(policy, network, observations, actions, tolerance, max_regions, max_certificates, progress)
    return grower.run()


class _Grower:
    def __init__(
        self,
        policy: Policy,
        network: Network,
        observations: NDArray[np.float32],
        actions: NDArray[np.float32],
        tolerance: Floats,
        max_regions: int,
        max_certificates: int,
        progress: Callable[[str], None],
    ) -> None:
        self.policy, self.network, self.tolerance = policy, network, tolerance
        self.decision = policy.card.decision
        self.rows = decision_rows(network.outputs, self.decision)
        self.x, self.y = observations.astype(float), actions.astype(float)
        self.max_regions, self.max_certificates, self.progress = max_regions, max_certificates, progress
        spread = self.x.std(axis=0)
        self.scale = np.where(spread > 1e-9, spread, 1.0)
        self.tried = 0
        self.splitter = Splitter()
        self.kept: list[Certificates] = []
        self.heap: list[tuple[int, int, _Node]] = []
        self.pushed = 0
        self.open = np.ones(len(self.x), dtype=bool)  # observations that no kept region answers

    def run(self) -> Growth:
        self._push(_Node(0, np.arange(len(self.x))))
        self._split_contexts()
        while self.tried < self.max_certificates and self._count() < self.max_regions and (nodes := self._next()):
            self._work(nodes)
            self.progress(
                f"{self._count()} regions, {self.tried} certificates tried, "
                f"{100 * (1 - self.open.mean()):.1f}% of observations covered"
            )
        return self._finish()

    def _count(self) -> int:
        return sum(len(k) for k in self.kept)

    def _next(self) -> list[_Node]:
        """The nodes with most observations that wait for an answer."""
        nodes: list[_Node] = []
        while self.heap and len(nodes) < BATCH:
            node = heapq.heappop(self.heap)[2]
            points = node.points[self.open[node.points]]
            if len(points):
                nodes.append(_Node(node.index, points))
        return nodes

    def _push(self, node: _Node) -> None:
        if len(node.points):
            heapq.heappush(self.heap, (-len(node.points), self.pushed, node))
            self.pushed += 1

    def _split_contexts(self) -> None:
        """One subtree per value of every discrete observation: the first symbols of every key."""
        for axis in self.policy.card.context_indices:
            todo, self.heap = [entry[2] for entry in self.heap], []
            for node in todo:
                while len(values := np.unique(self.x[node.points, axis])) > 1:
                    node, rest = self._halves(node, axis, 0.5 * (values[0] + values[1]))
                    self._push(node)
                    node = rest
                self._push(node)

    def _halves(self, node: _Node, axis: int, threshold: float) -> tuple[_Node, _Node]:
        low, high = self.splitter.split(node.index, axis, threshold)
        below = self.x[node.points, axis] < threshold
        return _Node(low, node.points[below]), _Node(high, node.points[~below])

    def _work(self, nodes: list[_Node]) -> None:
        regions = self._boxes(nodes)
        certificates = self._certify(regions)
        which = np.concatenate([np.full(len(node.points), k) for k, node in enumerate(nodes)])
        hit = answered(
            certificates, which, self.x[np.concatenate([n.points for n in nodes])], self.tolerance, self.decision
        )
        hits = np.split(hit, np.cumsum([len(n.points) for n in nodes])[:-1])
        full = [k for k, h in enumerate(hits) if h.all()]
        # Half of a node's observations make a box worth keeping; what it leaves over gets boxes of its own.
        some = [k for k, h in enumerate(hits) if 0.5 <= h.mean() < 1.0 or (len(h) < FEWEST and 0.0 < h.mean() < 1.0)]
        if full:
            self._keep(self._widened(certificates[full], regions[full], [nodes[k].points for k in full]))
        if some:
            self._keep(certificates[some])
        left = [_Node(node.index, node.points[self.open[node.points]]) for node in nodes]
        self._split([node for node in left if len(node.points) >= FEWEST])

    def _keep(self, certificates: Certificates) -> None:
        """Add experts, and close every observation that they answer, in whatever node it is."""
        self.kept.append(certificates)
        trie = Trie.root().with_regions(certificates.regions, np.arange(len(certificates)))
        waiting = np.flatnonzero(self.open)
        found = Router(self._library(certificates, trie), self.tolerance).many(self.x[waiting])
        self.open[waiting[found >= 0]] = False

    def _library(self, certificates: Certificates, trie: Trie) -> Library:
        visits = np.zeros(len(certificates), np.int64)
        return Library(self.policy.sha256, self.policy.card, self.tolerance, certificates, trie, visits)

    def _certify(self, regions: Regions) -> Certificates:
        self.tried += len(regions)
        return certify(self.network, regions, self.decision, batch=BATCH)

    def _boxes(self, nodes: list[_Node]) -> Regions:
        n = self.x.shape[1]
        center, axes, widths = np.zeros((len(nodes), n)), np.zeros((len(nodes), n, n)), np.zeros((len(nodes), n))
        for k, node in enumerate(nodes):
            points = self.x[node.points] / self.scale
            mean = points.mean(axis=0)
            # a few points do not show all axes; a little of the identity keeps the rest apart
            covariance = (points - mean).T @ (points - mean) / len(points) + 1e-9 * np.eye(n)
            vectors = self._axes(points - mean, self.y[node.points], covariance)
            along = (points - mean) @ vectors
            low, high = along.min(axis=0), along.max(axis=0)
            center[k] = (mean + vectors @ (0.5 * (low + high))) * self.scale
            axes[k] = self.scale[:, None] * vectors
            # between sparse points lies more of the same: never thinner than their typical spacing
            spacing = 0.5 * (high - low).max() / max(2.0, len(points) ** (1.0 / n))
            widths[k] = np.maximum(MARGIN * 0.5 * (high - low), np.minimum(spacing, 0.5 * (high - low).max() * 0.2))
        return Regions.from_axes(center, axes, widths)

    def _axes(self, points: Floats, actions: Floats, covariance: Floats) -> Floats:
        """One axis along which the action changes most (a limit that clips it is a plane across that axis), and the
        principal axes of what is left."""
        slope = np.linalg.lstsq(points, actions - actions.mean(axis=0), rcond=1e-6)[0]
        direction = np.linalg.svd(slope)[0][:, :1] if np.abs(slope).max() > 1e-9 else np.zeros((len(covariance), 1))
        rest = np.eye(len(covariance)) - direction @ direction.T
        apart = 10.0 * (1.0 + np.trace(covariance)) * direction @ direction.T  # an eigenvalue of its own
        vectors: Floats = np.linalg.eigh(rest @ covariance @ rest + apart)[1]
        return vectors

    def _widened(self, certificates: Certificates, regions: Regions, points: list[NDArray[np.intp]]) -> Certificates:
        """Scale every region up as long as its bound is within tolerance everywhere in it.

        A decision has borders, where no bound is enough: there its own observations must stay answered.
        """
        n = self.x.shape[1]
        scale = np.ones((len(regions), n))
        together = [np.full(n, factor) for factor in WIDEN]
        single = [1.0 + axis * (factor - 1.0) for factor in STRETCH for axis in np.eye(n)]
        for factors in [*together, *single]:
            wider = Regions(regions.center, regions.transform / (scale * factors)[:, :, None])
            tried = self._certify(wider)
            if self.decision == "none":
                better = np.all(tried.worst <= self.tolerance, axis=1)
            else:
                which = np.repeat(np.arange(len(points)), [len(p) for p in points])
                hit = answered(tried, which, self.x[np.concatenate(points)], self.tolerance, self.decision)
                better = np.bincount(which, weights=~hit, minlength=len(points)) == 0
            certificates = Certificates.join([certificates[~better], tried[better]])
            order = np.argsort(np.concatenate([np.flatnonzero(~better), np.flatnonzero(better)]))
            certificates = certificates[order]
            scale = np.where(better[:, None], scale * factors, scale)
        return certificates

    def _split(self, nodes: list[_Node]) -> None:
        if not nodes:
            return
        n = self.x.shape[1]
        probes, extents = [], []
        for node in nodes:
            points = self.x[node.points]
            middle, extent = 0.5 * (points.min(axis=0) + points.max(axis=0)), 0.5 * np.ptp(points, axis=0)
            extents.append(extent)
            probes.append(middle + np.concatenate([np.zeros((1, n)), np.diag(extent), -np.diag(extent)]))
        values = self.policy.batch(np.concatenate(probes).astype(np.float32)).astype(float) @ self.rows.T
        values = values.reshape(len(nodes), 2 * n + 1, -1)
        bend = np.abs(values[:, 1 : n + 1] + values[:, n + 1 :] - 2 * values[:, :1]).max(axis=2)
        for node, extent, score in zip(nodes, extents, bend, strict=True):
            # where the policy looks straight everywhere, the longest axis; never one without extent
            score = np.where(extent > 0, score + 1e-3 * (score.max() + 1e-6) * extent / self.scale, -1.0)
            for axis in np.argsort(-score, kind="stable"):
                values_here = np.unique(self.x[node.points, axis])
                if len(values_here) < 2:
                    continue
                k = int(np.searchsorted(values_here, np.median(self.x[node.points, axis])))
                k = min(max(k, 1), len(values_here) - 1)
                for half in self._halves(node, int(axis), 0.5 * (values_here[k - 1] + values_here[k])):
                    self._push(half)
                break

    def _finish(self) -> Growth:
        trie = self.splitter.trie()
        n = self.x.shape[1]
        if self.kept:
            certificates = Certificates.join(self.kept)[: self.max_regions]
        else:
            r = len(self.rows)
            zero = np.zeros
            certificates = Certificates(
                zero((0, n)),
                zero((0, n, n)),
                zero((0, r, n), np.float32),
                zero((0, r), np.float32),
                zero((0, r, n)),
                zero((0, r)),
            )
        library = self._library(certificates, trie.counted(self.x))
        # A region that others answer for is not worth its place; who answers is settled by routing all observations.
        found = self._visits(library.indexed(library.trie))[1]
        kept = np.flatnonzero(found)
        library = replace(library, certificates=certificates[kept], visits=found[kept]).indexed(library.trie)
        covered, visits = self._visits(library)
        return Growth(replace(library, visits=visits), self.tried, covered)

    def _visits(self, library: Library) -> tuple[float, NDArray[np.int64]]:
        """The share of observations answered, and how many each region answers."""
        found = Router(library, self.tolerance).many(self.x)
        return float((found >= 0).mean()), np.bincount(found[found >= 0], minlength=len(library)).astype(np.int64)
