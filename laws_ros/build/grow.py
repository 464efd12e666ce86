"""Growing a library over the observations that a workload visits.

Most-visited node first. A ball in the principal axes of its observations, larger than it needs, is certified; where
its bound, at the observations themselves, is small enough, it becomes an expert and is widened as far as it still
answers them well. If it is not, a tight one is tried where it may do. What is left is split at the sensor along which
the policy bends most (its largest second difference), and both halves try again. docs/adr/0018-round-regions.md has
what this buys.

A policy that ends in the cut to its card's limits is certified before that cut (core.certify). Where the limits bend it
elsewhere, or it decides, a node's observations are first set apart by which actions are at their limits, as no region
should straddle such a bend (docs/adr/0007-arm-sort.md).

All of that is done with cheap bounds. In the end the regions that are left are certified once more, with a dearer
effort, where the checker proves that; unless it hardly shrinks the bounds of this policy
(docs/adr/0019-tight-and-checkable.md).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.bounds import parts_of
from laws_ros.core.certificate import Certificates, decision_pairs, decision_rows
from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.core.region import Regions, swing
from laws_ros.core.trie import Splitter, Trie
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

from .workers import HERE, Workers

Floats = NDArray[np.float64]

BATCH = 64  # nodes certified together,
LARGE_POLICY = 1_000_000  # of whose parameters there are more than this, in batches that workers can share
SEARCH = "backward"  # effort of bounds (core.bounds) while searching
TIGHT = "split:4"  # effort of the bounds that a library is best kept with
PAYS = 0.9  # bounds must typically shrink to this, or the dearer effort is given up after the first BATCH of regions
HALVINGS = 32  # of a region, after which the checker has not proved a dearer bound; `laws verify` tries more
MARGIN = 1.05  # boxes are a little larger than the observations that made them
LARGE = 64  # a node with fewer observations borrows a little of its last larger ancestor's covariance:
PRIOR = 0.1  # as if it had this many observations more, and they that covariance
# A ball of k principal axes holds so many standard deviations more than sqrt(k), which is how far observations
# typically are: a few of them do not show the tails (docs/adr/0018-round-regions.md).
BEYOND = 1.2
GENEROUS = 1.3  # the factor on this that is tried first
HOPELESS = 6.0  # where a generous ball's bound is typically this many tolerances, a tight one is not tried
# An accepted region is widened on some of its axes after the others: on all but those across bends by what its bound
# leaves room for (a share of it, at most MOST times); on the thinner half of these, along which the observations hardly
# spread; across bends; and on every second, every other second, ... axis.
ROOM, MOST = (1.0, 1.0, 0.5), 4.0
THIN = (4.0, 2.0)
ACROSS = (1.5, 1.25)
HALVES = 1.5
BESIDE, FEW = 2, 4  # regions are certified in so many parts side by side, of at least so many each
# Answers that use the tolerance up cost return, and lead the robot where nothing was learned: so a region that answers
# MANY of its observations, or is widened, must do so within this share of the tolerance. Elsewhere all of it is used.
CAREFUL, MANY = 0.5, 16
PIECES = 8  # boxes tried at once in a node
NEAR = 5.0  # a limit this many standard deviations of an action away gets an axis across it,
MOST_BENDS = 4  # the nearest ones
FEWEST = 3


@dataclass
class _Node:
    index: int  # in the trie
    points: NDArray[np.intp]  # observations that no region answers yet
    # of its own observations, or those of its last large ancestor, in units of their spread:
    around: Floats  # [d, d] covariance
    slopes: Floats  # [d + 1, m] every action between its limits as an affine function; zero where it never reaches one


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
    effort: str = SEARCH,
    keep_out: Callable[[Regions], NDArray[np.bool_]] | None = None,
    workers: Workers = HERE,
) -> Growth:
    """Build a library for the distribution of the given observations.

    Args:
        policy, network: the same model, for execution and for bounds.
        observations: [N, n] visited ones; duplicates count as visits.
        actions: [N, *] the policy's actions there; they only guide the choice of axes.
        tolerance: [m] largest certified action error, action units; ignored for decisions.
        max_regions, max_certificates: the budget.
        progress: called with a line of text now and then.
        effort: of the bounds of regions that are kept (core.bounds); "backward" is what all of them are found by.
        keep_out: [B] which regions may not be, whatever their bounds (a learner's quarantine).
        workers: who certifies.

    Returns:
        Growth; train_coverage is the share of `observations` that the library answers.

    Raises:
        ConfigError: an unknown effort.
    """
    parts_of(effort)
    grower = _Grower(policy, network, observations, actions, tolerance, max_regions, max_certificates, progress, effort)
    grower.keep_out, grower.workers = keep_out, workers
    return grower.run()


def tighten(
    library: Library,
    network: Network,
    effort: str = TIGHT,
    progress: Callable[[str], None] = lambda text: None,
    workers: Workers = HERE,
) -> tuple[Library, int]:
    """The same regions with certificates of a dearer effort where these are smaller at their largest, answer all that
    the old ones do (of a decision: are nowhere larger), and the checker proves them; and how many were tried.

    The kind `linear` only. Given up after the first BATCH of them whose bounds do not typically shrink to PAYS.

    Raises:
        ConfigError: an unknown effort.
    """
    parts_of(effort)
    decision = library.card.decision
    certifier = _Certifier(network, decision, library.card.limits if decision == "none" else None)
    prover = _Prover(network, decision)
    unit = np.maximum(library.tolerance, 1e-300) if decision == "none" else 1.0
    certificates, gains, tried = library.certificates, np.zeros(0), 0
    todo = np.flatnonzero(certificates.among(["linear"]))
    for start in range(0, len(todo), BATCH):
        some = todo[start : start + BATCH]
        old = certificates[some]
        items = [(old.regions[part], effort) for part in _parts(len(old), certifier)]
        new = Certificates.join(list(workers.map(certifier, items)))
        tried += len(some)
        before, after = (k.worst / unit for k in (old, new))
        gains = np.append(gains, after.max(axis=1) / before.max(axis=1))
        if not np.nanmedian(gains) < PAYS:
            break
        more = new.bound_offset - old.bound_offset + swing(new.bound_weight - old.bound_weight, old.regions.ball)
        as_good = (more <= 0.0).all(axis=1) | ((after <= 1.0).all(axis=1) & (decision == "none"))
        better = np.flatnonzero(as_good & (after.max(axis=1) < before.max(axis=1)))
        proofs = workers.map(prover, [new[better[part]] for part in _parts(len(better), certifier)])
        better = better[np.concatenate(list(proofs))]
        certificates = _replaced(certificates, some[better], new[better])
        progress(f"{start + len(some)} of {len(todo)} regions bounded by {effort}")
    return replace(library, certificates=certificates).indexed(library.trie), tried


def _parts(count: int, certifier: _Certifier, beside: int = 1) -> list[NDArray[np.intp]]:
    """What is certified at once of so many regions; in `beside` parts, if that leaves FEW in each."""
    parts = max(math.ceil(count / certifier.batch), min(beside, count // FEW), 1)
    return np.array_split(np.arange(count), parts)


def _scaled(regions: Regions, factors: Floats) -> Regions:
    """The same boxes with half-widths times factors [B, n]."""
    return Regions(regions.center, regions.transform / factors[:, :, None], regions.round)


def _replaced(certificates: Certificates, rows: NDArray[np.intp], others: Certificates) -> Certificates:
    """The same certificates with others in some rows."""
    order = np.arange(len(certificates))
    order[rows] = len(certificates) + np.arange(len(rows))
    return Certificates.join([certificates, others])[order]


class _Certifier:
    """Certificates of (regions, effort), for whoever works on them."""

    def __init__(self, network: Network, decision: str, limits: NDArray[np.float32] | None) -> None:
        self.network, self.decision, self.limits = network, decision, limits
        self.batch = 16 if network.parameters > LARGE_POLICY else BATCH

    def __call__(self, item: tuple[Regions, str]) -> Certificates:
        regions, effort = item
        limits = self.limits
        return certify(self.network, regions.brief(), self.decision, self.batch, effort, limits=limits).brief()


class _Prover:
    """Which certificates the checker proves, for whoever works on them."""

    def __init__(self, network: Network, decision: str) -> None:
        self.network, self.decision = network, decision

    def __call__(self, certificates: Certificates) -> NDArray[np.bool_]:
        checker = Checker(self.network, self.decision)
        found = (checker.verdict(certificates, k, HALVINGS) == "holds" for k in range(len(certificates)))
        return np.fromiter(found, bool, len(certificates))


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
        effort: str,
    ) -> None:
        self.effort = effort
        self.keep_out: Callable[[Regions], NDArray[np.bool_]] | None = None
        self.workers = HERE
        self.policy, self.network, self.tolerance = policy, network, tolerance
        self.decision = policy.card.decision
        self.rows = decision_rows(network.outputs, self.decision)
        self.x, self.y = observations.astype(float), actions.astype(float)
        self.max_regions, self.max_certificates, self.progress = max_regions, max_certificates, progress
        spread = self.x.std(axis=0)
        self.scale = np.where(spread > 1e-9, spread, 1.0)
        self.tried, self._counting = 0, Lock()
        self.splitter = Splitter()
        self.kept: list[Certificates] = []
        self.heap: list[tuple[int, int, _Node]] = []
        self.pushed = 0
        self.open = np.ones(len(self.x), dtype=bool)  # observations that no kept region answers
        self.discrete = np.array(policy.card.context_indices, int)
        self.free = np.setdiff1d(np.arange(self.x.shape[1]), self.discrete)
        self.contexts = Trie.root()
        self.limits = None if self.decision != "none" else policy.card.limits
        # what is cut to the limits in the end is not bent by them: the policy before that
        found = None if self.limits is None else network.unlimited(*self.limits.astype(float))
        self.straight = policy.without_last_clip() if found else None
        self.sides = self._limits_reached()
        self.certifier = _Certifier(network, self.decision, self.limits)

    def run(self) -> Growth:
        self._split_contexts()
        self.contexts = self.splitter.trie()
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
                nodes.append(replace(node, points=points))
        return nodes

    def _push(self, node: _Node) -> None:
        if len(node.points):
            heapq.heappush(self.heap, (-len(node.points), self.pushed, node))
            self.pushed += 1

    def _split_contexts(self) -> None:
        """One subtree per value of every discrete observation: the first symbols of every key."""
        nodes = [_Node(0, np.arange(len(self.x)), np.zeros((0, 0)), np.zeros((len(self.free) + 1, len(self.sides[0]))))]
        for axis in self.discrete:
            todo, nodes = nodes, []
            for node in todo:
                while len(values := np.unique(self.x[node.points, axis])) > 1:
                    low, node = self._halves(node, axis, 0.5 * (values[0] + values[1]))
                    nodes.append(low)
                nodes.append(node)
        for node in nodes:
            self._push(self._surveyed(node))

    def _surveyed(self, node: _Node) -> _Node:
        """The node with what is known about the observations around it, now its own."""
        return replace(node, around=self._covariance(node.points), slopes=self._slopes(node))

    def _covariance(self, points: NDArray[np.intp]) -> Floats:
        x = self._relative(points)
        return (x - x.mean(axis=0)).T @ (x - x.mean(axis=0)) / len(x)

    def _halves(self, node: _Node, axis: int, threshold: float) -> tuple[_Node, _Node]:
        low, high = self.splitter.split(node.index, axis, threshold)
        below = self.x[node.points, axis] < threshold
        return (
            replace(node, index=low, points=node.points[below]),
            replace(node, index=high, points=node.points[~below]),
        )

    def _work(self, nodes: list[_Node]) -> None:
        pieces = [replace(node, points=points) for node in nodes for points in self._pieces(node)]
        points = [piece.points for piece in pieces]
        certificates, hits, excess = self._attempt(self._boxes(pieces, generous=True), points)
        again = np.flatnonzero([not h.all() and e < HOPELESS for h, e in zip(hits, excess, strict=True)])
        if len(again):
            boxes = self._boxes([pieces[k] for k in again], False)
            fitted, more, _ = self._attempt(boxes, [points[k] for k in again])
            better = [j for j, k in enumerate(again) if more[j].sum() > hits[k].sum()]
            certificates = _replaced(certificates, again[better], fitted[better])
            for j in better:
                hits[again[j]] = more[j]
        full = [k for k, h in enumerate(hits) if h.all()]
        # Half of a node's observations make a box worth keeping; what it leaves over gets boxes of its own.
        some = [k for k, h in enumerate(hits) if 0.5 <= h.mean() < 1.0 or (len(h) < FEWEST and 0.0 < h.mean() < 1.0)]
        if full:
            self._keep(self._widened(certificates[full], [points[k] for k in full]))
        if some:
            self._keep(certificates[some])
        left = [replace(node, points=node.points[self.open[node.points]]) for node in nodes]
        self._split([node for node in left if len(node.points) >= FEWEST])

    def _limits_reached(self) -> NDArray[np.int8]:
        """[N, m]: -1, 0 or 1, as an action is at its lower limit, between, at its upper; of a decision, what it is."""
        if self.decision != "none":
            return self.y.astype(np.int8)
        if self.straight is not None:
            return np.zeros(self.y.shape, np.int8)
        card = self.policy.card
        low, high = (np.array([getattr(c, k) for c in card.actions], np.float32) for k in ("low", "high"))
        return (self.y >= high).astype(np.int8) - (self.y <= low)

    def _slopes(self, node: _Node) -> Floats:
        """`_Node.slopes`, renewed for the actions that are at a limit for some of the node's observations only."""
        slopes = node.slopes.copy()
        if self.decision == "none":
            x = np.column_stack([self._relative(node.points), np.ones(len(node.points))])
            between = self.sides[node.points] == 0
            for k in np.flatnonzero(~between.all(axis=0) & (between.sum(axis=0) > 2 * x.shape[1])):
                slopes[:, k] = np.linalg.lstsq(x[between[:, k]], self.y[node.points][between[:, k], k], rcond=1e-9)[0]
        return slopes

    def _bends(self, node: _Node) -> Floats:
        """[d, k] orthonormal directions across the planes near by at which actions reach their limits."""
        card, slopes = self.policy.card, node.slopes
        if self.decision != "none" or not slopes.any():
            return np.zeros((len(self.free), 0))
        limits = np.array([[c.low for c in card.actions], [c.high for c in card.actions]])
        free = self._relative(node.points) @ slopes[:-1] + slopes[-1]
        away = np.abs(free.mean(axis=0) - limits).min(axis=0) / np.maximum(free.std(axis=0), 1e-9)
        near = [k for k in np.argsort(away, kind="stable") if slopes[:, k].any() and away[k] < NEAR]
        return np.linalg.qr(slopes[:-1, near[:MOST_BENDS]])[0]

    def _relative(self, points: NDArray[np.intp]) -> Floats:
        """Observations [N, d] without what is discrete, in units of their spread."""
        return self.x[points][:, self.free] / self.scale[self.free]

    def _pieces(self, node: _Node) -> list[NDArray[np.intp]]:
        """A node's observations, apart where different actions are at their limits: between lies a bend of the policy,
        oblique to every sensor."""
        of, counts = np.unique(self.sides[node.points], axis=0, return_inverse=True, return_counts=True)[1:]
        return [node.points[of.reshape(-1) == k] for k in np.argsort(-counts, kind="stable")[:PIECES]]

    def _attempt(
        self, regions: Regions, points: list[NDArray[np.intp]], share: float | None = None
    ) -> tuple[Certificates, list[NDArray[np.bool_]], Floats]:
        """Certificates, which of its own observations each answers, and its worst bound, in tolerances, midway.

        Args:
            share: of the tolerance that may be used; by default less where many are answered.
        """
        with self._counting:
            self.tried += len(regions)
        parts = _parts(len(regions), self.certifier, 1 if share else BESIDE)
        batches = [(regions[part], SEARCH) for part in parts]
        certificates = Certificates.join(list(self.workers.map(self.certifier, batches)))
        which = np.repeat(np.arange(len(points)), [len(p) for p in points])
        shares = [share or (CAREFUL if len(p) >= MANY else 1.0) for p in points]
        usable = np.array(shares)[which, None] * self.tolerance
        hit = answered(certificates, which, self.x[np.concatenate(points)], usable, self.decision)
        if self.keep_out is not None:
            hit &= ~self.keep_out(certificates.regions)[which]
        excess = np.zeros(len(points))
        if self.decision == "none":
            excess = (certificates.bound_offset / np.maximum(self.tolerance, 1e-300)).max(axis=1)
        return certificates, np.split(hit, np.cumsum([len(p) for p in points])[:-1]), excess

    def _keep(self, certificates: Certificates) -> None:
        """Add experts, and close every observation that they answer, in whatever node it is."""
        self.kept.append(certificates)
        trie = self.contexts.with_regions(certificates.regions, np.arange(len(certificates)))
        waiting = np.flatnonzero(self.open)
        found = Router(self._library(certificates, trie), self.tolerance).many(self.x[waiting])
        self.open[waiting[found >= 0]] = False

    def _library(self, certificates: Certificates, trie: Trie) -> Library:
        visits = np.zeros(len(certificates), np.int64)
        return Library(self.policy.sha256, self.policy.card, self.tolerance, certificates, trie, visits)

    def _boxes(self, nodes: list[_Node], generous: bool) -> Regions:
        """Regions around the observations of nodes, without extent in what is discrete.

        Args:
            generous: larger than they need, except across bends, where another law begins. If not, they are as tight
                along the one axis along which the action changes most, where no bend is near.
        """
        n, free = self.x.shape[1], self.free
        d, fixed = len(free), len(self.discrete)
        center, axes, widths = np.zeros((len(nodes), n)), np.zeros((len(nodes), n, n)), np.zeros((len(nodes), n))
        axes[:, self.discrete, range(fixed)] = 1.0  # first, as the router tests them first
        round = np.zeros(len(nodes), np.int32)
        for k, node in enumerate(nodes):
            center[k] = self.x[node.points[0]]
            points = self._relative(node.points)
            mean = points.mean(axis=0)
            prior = PRIOR / (PRIOR + len(points))
            covariance = (1 - prior) * self._covariance(node.points) + prior * node.around + 1e-9 * np.eye(d)
            first = self._bends(node)
            if not first.shape[1] and not generous:
                slope = np.linalg.lstsq(
                    points - mean, self.y[node.points] - self.y[node.points].mean(axis=0), rcond=1e-6
                )
                first = np.linalg.svd(slope[0])[0][:, : int(np.abs(slope[0]).max() > 1e-9)]
            across, rest = first.shape[1], np.eye(d) - first @ first.T
            vectors = np.concatenate([first, np.linalg.eigh(rest @ covariance @ rest)[1][:, across:]], axis=1)
            along = (points - mean) @ vectors
            low, high = along.min(axis=0), along.max(axis=0)
            center[k, free] = (mean + vectors @ (0.5 * (low + high))) * self.scale[free]
            axes[k][np.ix_(free, np.arange(fixed, n))] = self.scale[free, None] * vectors
            deviation = np.maximum(np.sqrt(np.einsum("ij,ik,kj->j", vectors, covariance, vectors)), 1e-6)
            least = np.maximum(MARGIN * 0.5 * (high - low), 1e-6)
            round[k] = d - across
            away = np.linalg.norm(((along - 0.5 * (low + high)) / deviation)[:, across:], axis=1)
            width = max(MARGIN * away.max(), math.sqrt(d - across) + BEYOND) * deviation
            widths[k, fixed:] = (GENEROUS if generous else 1.0) * width
            widths[k, fixed : fixed + across] = least[:across]
        return Regions.from_axes(center, axes, widths, round)

    def _widened(self, certificates: Certificates, points: list[NDArray[np.intp]]) -> Certificates:
        """Scale every region up as long as all of its own observations stay answered.

        That is many steps of few regions each: so some regions go through all of them beside the others.
        """
        parts = _parts(len(points), self.certifier, BESIDE)
        jobs = [partial(self._widened_beside, certificates[part], [points[k] for k in part]) for part in parts]
        return Certificates.join(self.workers.together(jobs))

    def _widened_beside(self, certificates: Certificates, points: list[NDArray[np.intp]]) -> Certificates:
        axis, fixed = np.arange(self.x.shape[1]), len(self.discrete)
        others = certificates.regions.ball
        bends = ~others & (axis >= fixed)
        edges = np.linalg.inv(certificates.transform)[:, self.free] / self.scale[self.free, None]
        width = np.where(others, np.linalg.norm(edges, axis=1), np.inf)
        thin = others & (width.argsort(axis=1).argsort(axis=1) < len(self.free) // 2)
        steps = [(others, part, True) for part in ROOM]
        steps += [(thin, factor, False) for factor in THIN] + [(bends, factor, False) for factor in ACROSS]
        steps += [(others & (axis >> bit & 1 == side), HALVES, False) for bit in range(4) for side in (0, 1)]
        for mask, factor, room in steps:
            factors = np.where(mask, self._room(certificates, factor) if room else factor, 1.0)
            which = np.flatnonzero((factors > 1.02).any(axis=1))
            if len(which):
                wider = _scaled(certificates.regions[which], factors[which])
                tried, hits, _ = self._attempt(wider, [points[k] for k in which], CAREFUL)
                better = np.array([h.all() for h in hits])
                certificates = _replaced(certificates, which[better], tried[better])
        return certificates

    def _room(self, certificates: Certificates, part: float) -> Floats:
        """[B, 1]: the factor on a region's size that its bound leaves room for, or a part of it: bounds grow about as
        the square of the size."""
        if self.decision != "none":
            return np.full((len(certificates), 1), 1.0 + part)
        largest = (certificates.worst / np.maximum(self.tolerance, 1e-300)).max(axis=1)
        room = np.clip(0.95 * np.sqrt(1.0 / np.maximum(largest, 1e-300)), 1.0, MOST)
        return np.asarray(1.0 + part * (room[:, None] - 1.0))

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
        values = (self.straight or self.policy.batch)(np.concatenate(probes).astype(np.float32)) @ self.rows.T
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
                if len(node.points) >= LARGE:
                    node = self._surveyed(node)
                for half in self._halves(node, int(axis), 0.5 * (values_here[k - 1] + values_here[k])):
                    self._push(half)
                break

    def _finish(self) -> Growth:
        trie = self.splitter.trie()
        if self.kept:
            certificates = Certificates.join(self.kept)[: self.max_regions]
        else:
            certificates = Certificates.none(self.x.shape[1], len(self.rows))
        library = self._library(certificates, trie.counted(self.x))
        library, coverage = self._pruned(library.indexed(library.trie))
        if self.effort != SEARCH:
            library, tried = tighten(library, self.network, self.effort, self.progress, self.workers)
            library, coverage = self._pruned(library)
            self.tried += tried
        return Growth(library, self.tried, coverage)

    def _pruned(self, library: Library) -> tuple[Library, float]:
        """Without the regions that others answer for, which is settled by routing all observations; and the share of
        these that are answered."""
        found = Router(library, self.tolerance).many(self.x)
        kept = np.flatnonzero(np.bincount(found[found >= 0], minlength=len(library)))
        visits = np.zeros(len(kept), np.int64)
        library = replace(library, certificates=library.certificates[kept], visits=visits).indexed(library.trie)
        found = Router(library, self.tolerance).many(self.x)
        visits = np.bincount(found[found >= 0], minlength=len(kept)).astype(np.int64)
        return replace(library, visits=visits), float((found >= 0).mean())
