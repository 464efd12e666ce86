"""Certifying collapsed networks: which neurons can be folded away over a region, and what that costs at most.

`exact` folds away the neurons that provably stay on one linear piece of their function; what is left differs from the
policy by rounding only. `mixed` also replaces neurons that hardly bend by a line, those first that free most
multiplications for the error they add, until the tolerance is used up.

The bound compares two programs, both executed in float32 in any order of summation: the policy P and the collapsed
network C. Let V be what C computes for the folded neurons, were it to compute them exactly from its kept ones, and
D = P - V node by node. An affine node gives D' = W D + e, |e| <= delta (the policy's execution error). A folded neuron
with line s z + t gives D' = s D + g, |g| <= gap + its execution error. A kept neuron, whose argument in C is off by r
(composed weights rounded to float32, and their execution), gives D' = lambda (D - r) + execution errors, where lambda
lies between the least and the greatest slope of its function over both arguments (mean value theorem). D is carried to
the output with its signs, backwards as linear bounds are: a kept neuron passes on the middle of lambda's interval, and
adds the rest times a bound on |D| that was found the same way before. docs/soundness.md has the same chain.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .bounds import ranges
from .certificate import Certificates, Ragged, kind_code
from .collapsed import KEPT, LINE, Indices, States, check_network, multiply_out, pieces
from .network import Affine, Elementwise, Network
from .propagate import EXECUTION_TERMS, HUGE32, TINY32, gamma, sum_error
from .region import UNIT, Regions
from .relax import INFLATE

Array = NDArray[np.float64]

STEPS = 32  # of the grid on which smooth functions are compared with lines
# Room for another prover, whose ranges and sums differ a little, to agree.
STABLE = 1e-3  # of its range by which a neuron must miss a kink
COURTESY = 0.05


class _Found(NamedTuple):
    """A collapsed network: its states, bound [m] on |P - C| anywhere in the region, and multiplications."""

    states: States
    bound: Array
    cost: int


def collapse(network: Network, regions: Regions, kind: str, tolerance: Array, batch: int = 64) -> Certificates:
    """Collapse the policy over each region, and certify what that changes.

    Args:
        network: the policy. regions: B of them. batch: regions whose ranges are found together.
        kind: "exact" or "mixed".
        tolerance: [m] largest error that `mixed` may spend, action units.

    Returns:
        One certificate per region; its bound is the same all over the region, and infinite where nothing could be
        shown. `cost` is the number of multiplications.

    Raises:
        ModelError: the network has nodes that cannot be folded.
    """
    check_network(network)
    found = []
    with np.errstate(all="ignore"):
        for start in range(0, len(regions), batch):
            ends = ranges(network, regions[start : start + batch])
            for k in range(len(ends[0][0])):
                problem = _Problem(network, [low[k] for low, _ in ends], [high[k] for _, high in ends])
                exact = problem.found(problem.exact())
                found.append(problem.mixed(exact, tolerance) if kind == "mixed" else exact)
    count, n, m, single = len(regions), network.inputs, network.outputs, np.float32
    return Certificates(
        regions.center,
        regions.transform,
        np.zeros((count, m, n), single),
        np.zeros((count, m), single),
        np.zeros((count, m, n)),
        np.array([f.bound for f in found]).reshape(count, m),
        kind=np.full(count, kind_code(kind), np.uint8),
        cost=np.array([f.cost for f in found], np.int64),
        floats=Ragged.of([f.states.lines.reshape(-1) for f in found], single),
        octets=Ragged.of([f.states.code for f in found], np.uint8),
        round=regions.round,
    )


class _Problem:
    """One region: the ranges of every node in it, and what follows for collapsed networks.

    Attributes:
        low, high: per node, of the policy as executed.
    """

    def __init__(self, network: Network, low: list[Array], high: list[Array]) -> None:
        self.network, self.low, self.high = network, low, high
        self.peak = [np.maximum(np.abs(a), np.abs(b)) for a, b in zip(low, high, strict=True)]

    def exact(self) -> States:
        """Fold every neuron whose range misses all kinks, onto the piece it is on."""
        codes = []
        for node in self.network.nodes:
            if isinstance(node, Elementwise):
                low, high = self.low[node.source], self.high[node.source]
                margin = STABLE * (high - low)
                piece = np.zeros(node.size, int)
                straight = np.isfinite(high - low)
                for kink in node.facts.kinks(node.parameters):
                    piece += low - margin >= kink
                    straight &= (low - margin >= kink) | (high + margin <= kink)
                slope = np.array(pieces(node))[:, 0]
                straight &= np.isfinite(slope[piece])
                codes.append(np.where(straight, piece, KEPT))
        return States(np.concatenate([np.zeros(0), *codes]).astype(np.uint8))

    def found(self, states: States) -> _Found:
        difference = _Difference(self, states)
        return _Found(states, difference.total, difference.rounded.multiplications)

    def mixed(self, exact: _Found, tolerance: Array) -> _Found:
        """The same with lines in place of as many kept neurons as the tolerance allows."""
        states = exact.states
        if not (exact.bound <= tolerance).all():
            return exact
        difference = _Difference(self, states)
        weight = difference.sensitivity() / tolerance[:, None]
        line = np.zeros((len(states.code), 2), np.float32)
        price = np.full(len(states.code), np.inf)  # share of the tolerance per multiplication
        spent, first = np.zeros(len(states.code)), 0
        for position, (_, node, *_) in enumerate(states.split(self.network)):
            kept = difference.rounded.stages[position].kept
            low, high = self.low[node.source][kept], self.high[node.source][kept]
            here = first + kept
            line[here], gap = best_line(node, low, high)
            spent[here] = weight[:, here].max(axis=0) * gap
            price[here] = spent[here] / difference.saved(position)
            first += node.size
        order = np.argsort(price, kind="stable")[: int(np.isfinite(price).sum())]
        used = np.cumsum(spent[order])
        for share in (1.0, 0.8, 0.6, 0.4, 0.2):
            chosen = np.sort(order[: int(np.searchsorted(used, share, side="right"))])
            code = states.code.copy()
            code[chosen] = LINE
            found = self.found(States(code, line[chosen]))
            if (found.bound <= tolerance).all():
                return found
        return exact


class _Difference:
    """The policy against one collapsed network.

    Attributes:
        rounded: the collapsed network as it is executed.
        total [m]: bound on their distance.
    """

    def __init__(self, problem: _Problem, states: States) -> None:
        self.network, self.problem = problem.network, problem
        exact, sizes = multiply_out(self.network, states), multiply_out(self.network, states, magnitudes=True)
        self.rounded = exact.rounded()
        affine = [n for n in self.network.nodes if isinstance(n, Affine)]
        # at least as many roundings as any entry of a collapsed matrix takes part in
        self.depth = sum(8 + sum(1 if w.ndim == 1 else w.shape[1] for w in node.weights) for node in affine) + 64
        self._rounding = [
            np.abs(r - e) + 2 * gamma(self.depth, UNIT) * s
            for r, e, s in zip(self.rounded.matrices, exact.matrices, sizes.matrices, strict=True)
        ]
        # Per node: what it adds to D at most, and, elementwise, the slope that passes D on; a bound on D without signs,
        # which the rounding of this very arithmetic is proportional to.
        self.error: list[Array] = [np.zeros(self.network.inputs)]
        self.slope: dict[int, Array] = {}
        self.whole: list[Array] = [np.zeros(self.network.inputs)]
        self.basis = np.array([[1.0, *problem.low[0]], [1.0, *problem.high[0]]])  # ranges of 1, x, h_1, h_2, ... in C
        folded = iter(states.split(self.network))
        for node in self.network.nodes:
            if isinstance(node, Affine):
                self._affine(node)
            else:
                self._elementwise(*next(folded))
        last = len(self.network.nodes)
        total = self._carried(last, np.arange(self.network.outputs)) + self._executed(len(self.rounded.stages))
        self.total = np.where(np.isfinite(total), total * (1.0 + COURTESY) + 1e-30, np.inf)

    def _affine(self, node: Affine) -> None:
        volume, lean, flushed, terms = np.abs(node.bias), node.bias, np.zeros(node.size), 0
        spread, whole = volume, np.zeros(node.size)
        for source, weight, size in zip(node.sources, node.weights, node.magnitudes, strict=True):
            peak, up, down = self.problem.peak[source], *_sides(self.problem.low[source], self.problem.high[source])
            columns = np.stack([peak, up + down, self.whole[source]], axis=1)
            sums = size[:, None] * columns if weight.ndim == 1 else size @ columns
            volume, spread, whole = volume + sums[:, 0], spread + sums[:, 1], whole + sums[:, 2]
            lean = lean + (weight * (up - down) if weight.ndim == 1 else weight @ (up - down))
            flushed = flushed + (size if weight.ndim == 1 else size.sum(axis=1)) + peak.sum()
            terms += 1 if weight.ndim == 1 else np.count_nonzero(peak)
        self.error.append(self._sum_error(terms, spread, lean, volume, flushed))
        self.whole.append((whole + self.error[-1]) * INFLATE)

    def _sum_error(self, terms: int, spread: Array, lean: Array, volume: Array, flushed: Array) -> Array:
        """What float32 may do to a sum of products: spread and lean are the sums over positive and negative parts."""
        largest = 0.5 * (spread + np.abs(lean)) + 2 * gamma(self.depth, UNIT) * spread
        error = sum_error(terms, largest, volume) + TINY32 * (2 * (terms + EXECUTION_TERMS) + flushed)
        return np.where(volume < HUGE32, error * INFLATE, np.inf)

    def _elementwise(
        self, index: int, node: Elementwise, state: NDArray[np.uint8], slope: Array, offset: Array
    ) -> None:
        low, high = self.problem.low[node.source], self.problem.high[node.source]
        absolute, relative = node.facts.execution(node.parameters)
        slope = np.where(state == KEPT, 0.0, slope)
        error = absolute + relative * self.problem.peak[node.source]
        line = np.flatnonzero(state == LINE)
        error[line] += deviation(node, low[line], high[line], slope[line], offset[line])
        position = len(self.slope)
        kept = self.rounded.stages[position].kept
        seen = state != KEPT  # what is kept but has no influence is not in the collapsed network
        seen[kept] = True
        if len(kept):
            off = self._executed(position)
            carried = self._carried(node.source, kept)
            away = carried + off
            least, greatest = slopes(node, low[kept] - away, high[kept] + away)
            steepest = np.maximum(np.abs(least), np.abs(greatest))
            execution = 2 * (absolute + relative * (self.problem.peak[node.source][kept] + away))
            slope[kept] = 0.5 * (least + greatest)
            error[kept] = 0.5 * (greatest - least) * carried + steepest * off + execution
            wider = (steepest * away + execution) * INFLATE
            ends = [self.problem.low[index][kept] - wider, self.problem.high[index][kept] + wider]
            self.basis = np.concatenate([self.basis, ends], axis=1)
        self.slope[index] = slope
        self.error.append(np.where(seen, error * INFLATE, 0.0))
        whole = np.where(seen & (slope != 0.0), np.abs(slope) * self.whole[node.source], 0.0)
        self.whole.append((whole + self.error[-1]) * INFLATE)

    def _executed(self, position: int) -> Array:
        """How far each row of one of the collapsed network's matrices, as executed, is from V's value."""
        matrix, rounding = self.rounded.matrices[position], self._rounding[position]
        size, (low, high) = np.abs(matrix), self.basis[:, : matrix.shape[1]]
        peak, (up, down) = np.maximum(np.abs(low), np.abs(high)), _sides(low, high)
        spread, lean, flushed = size @ (up + down), matrix @ (up - down), size.sum(axis=1) + peak.sum()
        return self._sum_error(matrix.shape[1], spread, lean, size @ peak, flushed) + rounding @ peak * INFLATE

    def _carried(self, start: int, rows: Indices) -> Array:
        """Bound on |D| in some rows of a node."""
        total = 2 * gamma(self.depth, UNIT) * self.whole[start][rows] + self.error[start][rows]
        for index, coefficient in self._backward(start, rows):
            total = total + np.abs(coefficient) @ self.error[index]
        return total * INFLATE

    def _backward(self, start: int, rows: Indices) -> list[tuple[int, Array]]:
        """Coefficients of D in some rows of a node on what every node before it adds to D."""
        pending: dict[int, Array] = {}
        found: list[tuple[int, Array]] = []
        for index in range(start, 0, -1):
            node, first = self.network.nodes[index - 1], index == start
            if not first:
                if index not in pending:
                    continue
                coefficient = pending.pop(index)
                found.append((index, coefficient))
            if isinstance(node, Affine):
                weights = list(zip(node.sources, node.weights, strict=True))
            else:
                weights = [(node.source, self.slope[index])]
            for source, weight in weights:
                if not first:
                    term = coefficient * weight if weight.ndim == 1 else coefficient @ weight
                else:
                    term = _picked(weight, rows) if weight.ndim == 1 else weight[rows]
                pending[source] = pending[source] + term if source in pending else term
        return found

    def sensitivity(self) -> Array:
        """[m, neurons] how strongly each neuron's error shows in the action, by magnitude."""
        last, every = len(self.network.nodes), np.arange(self.network.outputs)
        found = dict(self._backward(last, every)) | {last: np.eye(self.network.outputs)}
        nodes = [(i, node) for i, node in enumerate(self.network.nodes, start=1) if isinstance(node, Elementwise)]
        none = np.zeros((self.network.outputs, 0))
        return np.concatenate(
            [none, *(np.abs(found.get(i, np.zeros((self.network.outputs, node.size)))) for i, node in nodes)], axis=1
        )

    def saved(self, position: int) -> int:
        """Multiplications that one kept neuron of a stage takes: its row, and its column in all later matrices."""
        used, matrices = self.rounded.used(), self.rounded.matrices
        blocks = [block.stop - block.start for block in self.rounded.blocks]
        row = sum(width for width, use in zip(blocks, used[position], strict=False) if use)
        later = zip(used[position + 1 :], matrices[position + 1 :], strict=True)
        return row + sum(len(matrix) for use, matrix in later if use[position + 1])


def _picked(diagonal: Array, rows: Indices) -> Array:
    """Some rows of a diagonal matrix."""
    matrix = np.zeros((len(rows), len(diagonal)))
    matrix[np.arange(len(rows)), rows] = diagonal[rows]
    return matrix


def _sides(low: Array, high: Array) -> tuple[Array, Array]:
    """How far ranges reach above and below 0."""
    return np.maximum(high, 0.0), np.maximum(-low, 0.0)


def deviation(node: Elementwise, low: Array, high: Array, slope: Array, offset: Array) -> Array:
    """max |f(z) - (slope z + offset)| for low <= z <= high, rounded upward.

    At ends and kinks where f is piecewise linear; else on a grid, between whose points, h apart, a function with
    |f''| <= c lies at most c h^2 / 8 beyond its values there.
    """
    curvature = node.facts.curvature(node.parameters)
    points = _points(node, low, high, STEPS if curvature else 1)
    values = node(points)
    width = np.diff(points, axis=0).max(axis=0)
    largest = np.abs(values - slope * points - offset).max(axis=0)
    rounding = 8 * UNIT * (np.abs(values).max(axis=0) + np.abs(slope) * np.abs(points).max(axis=0) + np.abs(offset))
    return (largest + 0.125 * curvature * width**2 + rounding) * INFLATE + (1e-15 if curvature else 0.0)


def slopes(node: Elementwise, low: Array, high: Array) -> tuple[Array, Array]:
    """Least and greatest slope of f anywhere between low and high (of chords, too: the mean value theorem)."""
    curvature = node.facts.curvature(node.parameters)
    if node.facts.shape(node.parameters) == "odd":  # steepest at 0, and ever flatter away from it
        near = np.maximum(0.0, np.maximum(low, -high))
        return node.derivative(np.maximum(-low, high)) - 1e-12, node.derivative(near) + 1e-12
    pad = 1e-12 * (np.abs(low) + np.abs(high)) + 1e-30  # so that no piece is too narrow to have a middle
    points = _points(node, low - pad, high + pad, STEPS if curvature else 1)
    between = node.derivative(0.5 * (points[1:] + points[:-1]))
    beyond = 0.5 * curvature * np.diff(points, axis=0) * INFLATE + (1e-12 if curvature else 0.0)
    return (between - beyond).min(axis=0), (between + beyond).max(axis=0)


def _points(node: Elementwise, low: Array, high: Array, steps: int) -> Array:
    """Ends, kinks and a grid between them, in rising order; some may coincide."""
    grid = [low + (high - low) * (k / steps) for k in range(steps)]
    kinks = [np.clip(kink, low, high) for kink in node.facts.kinks(node.parameters)]
    return np.sort(np.stack([*grid, high, *kinks]), axis=0)


def best_line(node: Elementwise, low: Array, high: Array) -> tuple[NDArray[np.float32], Array]:
    """A line near f between low and high: [n, 2] slope and offset in float32, and its deviation [n]."""
    middle, width = 0.5 * (low + high), high - low
    curvature = node.facts.curvature(node.parameters)
    points = _points(node, low, high, STEPS if curvature else 1)
    chord = np.where(width > 0, (node(high) - node(low)) / np.where(width > 0, width, 1.0), node.derivative(middle))
    tangent = node.derivative(middle)
    best, least = np.zeros((len(low), 2), np.float32), np.full(len(low), np.inf)
    for slope in (chord, tangent, 0.5 * (chord + tangent)):
        slope = slope.astype(np.float32)
        rest = node(points) - slope * points
        line = np.stack([slope, (0.5 * (rest.max(axis=0) + rest.min(axis=0))).astype(np.float32)], axis=1)
        found = deviation(node, low, high, line[:, 0].astype(float), line[:, 1].astype(float))
        better = found < least
        best[better], least = line[better], np.where(better, found, least)
    return best, least
