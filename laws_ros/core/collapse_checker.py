"""The independent checker for collapsed experts: proves the very matrices that are executed, with none of the issuer's
code.

Subject of the proof are the float32 matrices that the runtime multiplies out; what they ought to be is derived here
again, densely, from the policy's weights and the stored states. Every folded neuron counts as replaced by a line, a
linear piece too, and how far its function is from that line is measured over the range that `checker` proved, so a
wrong state shows as a large error and needs no rule of its own. Where the issuer carries rows of the difference
backwards, this carries symbols forwards: the difference D of policy and collapsed network at a node is G s with
unknown |s| <= 1, one column of G for every rounding, fold and slope. docs/soundness.md has the argument.

numpy only; runs on a robot.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .certificate import Certificates
from .checker import Checker, Proof
from .collapsed import KEPT, LINE, Collapsed, States, multiply_out, pieces
from .errors import LawsError
from .network import Affine, Elementwise, Network

Array = NDArray[np.float64]

_U32, _U64, _TINY, _HUGE = 2.0**-24, 2.0**-53, 2.0**-126, 2.0**126
_MORE = 1.0 + 1e-9
_STEPS = 64


def verdict(checker: Checker, certificates: Certificates, index: int, splits: int = 64) -> str:
    """ "holds" if a certificate of kind exact or mixed is proved over its whole region, else "unknown"."""
    network = checker.network
    if len(checker.rows) != network.outputs or (checker.rows != np.eye(network.outputs)).any():
        return "unknown"  # decisions are made from affine experts
    try:
        states = States.of(certificates, index, network)
        executed = multiply_out(network, states).rounded()
    except LawsError:
        return "unknown"
    claim = certificates.bound_offset[index] - 1.01 * np.abs(certificates.bound_weight[index]).sum(axis=1)
    intended = _Intended(network, states, executed)
    if not intended.fits or not np.isfinite(claim).all():
        return "unknown"

    def excess(proof: Proof) -> float:
        return float((intended.error(proof) - claim).max())

    return checker.proved(certificates, index, splits, excess)


@dataclass
class _Fold:
    """What a collapsed network makes of an elementwise node: lines slope z + offset (zero for kept neurons)."""

    slope: Array
    offset: Array
    kept: NDArray[np.intp]


class _Intended:
    """What a collapsed network ought to be, and how far the policy can be from it as executed.

    Attributes:
        fits: the executed matrices have the shapes that the states ask for.
    """

    def __init__(self, network: Network, states: States, executed: Collapsed) -> None:
        self.network, self.executed = network, executed
        width = 1 + network.inputs + sum(len(stage.kept) for stage in executed.stages)
        values = [np.eye(network.inputs, width, 1)]  # every node's value as a row over (1, x, h_1, h_2, ...)
        self.folds: list[_Fold] = []
        self.rows: list[Array] = []  # what the executed matrices should be
        column, neuron, line, self.fits = 1 + network.inputs, 0, 0, True
        for node in network.nodes:
            if isinstance(node, Affine):
                value = np.zeros((node.size, width))
                value[:, 0] = node.bias
                for source, weight in zip(node.sources, node.weights, strict=True):
                    value += weight[:, None] * values[source] if weight.ndim == 1 else weight @ values[source]
                values.append(value)
                continue
            assert isinstance(node, Elementwise)
            code = states.code[neuron : neuron + node.size]
            neuron += node.size
            count = int((code == LINE).sum())
            slope, offset = _lines(node, code, states.lines[line : line + count].astype(float))
            line += count
            stage = executed.stages[len(self.folds)]
            kept, columns = stage.kept, column + np.arange(len(stage.kept))
            column += len(kept)
            self.fits &= bool((code[kept] == KEPT).all()) and len(np.unique(kept)) == len(kept)
            source_value = values[node.source]
            self.rows.append(source_value[kept])
            value = slope[:, None] * source_value
            value[:, 0] += offset
            # what is kept but missing has no part in the executed network: as if it were 0, whatever that costs
            missing = np.setdiff1d(np.flatnonzero(code == KEPT), kept)
            slope[missing] = offset[missing] = 0.0
            value[code == KEPT] = 0.0
            value[kept, columns] = 1.0
            values.append(value)
            self.folds.append(_Fold(slope, offset, kept))
        self.rows.append(values[-1])
        self.values = values
        shapes = [(row.shape[0], m.shape[0]) for row, m in zip(self.rows, executed.matrices, strict=True)]
        self.fits &= all(a == b for a, b in shapes)

    def error(self, proof: Proof) -> Array:
        """Bound [m] on |policy - collapsed network|, both as executed, in the part of the region that `proof` is of."""
        part, stage = _Symbols(self.values, proof), 0
        for index, node in enumerate(self.network.nodes, start=1):
            if isinstance(node, Affine):
                part.affine(index, node)
            elif isinstance(node, Elementwise):
                fold = self.folds[stage]
                part.elementwise(index, node, fold, self._off(stage, part, fold.kept, node.source))
                stage += 1
        last = len(self.network.nodes)
        return part.radius(last) + self._off(stage, part, np.arange(self.network.outputs), last)

    def _off(self, stage: int, part: _Symbols, rows: NDArray[np.intp], node: int) -> Array:
        """How far rows of an executed matrix, as executed, are from the intended value of those rows of a node."""
        matrix = self.executed.matrices[stage]
        low, high = part.low[: matrix.shape[1]], part.high[: matrix.shape[1]]
        size, peak, terms = np.abs(matrix), np.maximum(np.abs(low), np.abs(high)), matrix.shape[1] + 1.0
        plus, minus = np.maximum(matrix, 0.0), np.maximum(-matrix, 0.0)
        # no partial sum is larger than the sum of all that may be positive, or of all that may be negative
        above = plus @ np.maximum(high, 0.0) + minus @ np.maximum(-low, 0.0)
        below = plus @ np.maximum(-low, 0.0) + minus @ np.maximum(high, 0.0)
        executed = (1.0 + _rounding(terms + 3, _U32)) * terms * _U32 * np.maximum(above, below)
        executed = np.minimum(executed + _rounding(4, _U32) * (size @ peak), _rounding(terms + 2, _U32) * (size @ peak))
        executed += _TINY * (2 * terms + 6 + size.sum(axis=1) + peak.sum())
        wrong = np.abs(matrix - self.rows[stage][:, : matrix.shape[1]]) @ peak + part.derived[node][rows]
        return np.where(size @ peak < _HUGE, (executed + wrong) * _MORE, np.inf)


class _Symbols:
    """D = G s at every node, over a part of a region.

    Attributes:
        low, high: ranges of 1, x, h_1, h_2, ... as executed in the collapsed network.
        derived: per node, how far its intended value, derived in float64, can be from the exact one.
    """

    def __init__(self, values: list[Array], proof: Proof) -> None:
        self.values, self.proof = values, proof
        self.peak = [np.maximum(np.abs(a), np.abs(b)) for a, b in zip(proof.low, proof.high, strict=True)]
        inputs = len(self.peak[0])
        self.g: list[Array] = [np.zeros((inputs, 0))]
        self.count = 0
        self.low, self.high = (np.concatenate([[1.0], end]) for end in (proof.low[0], proof.high[0]))
        self.derived = [np.zeros(inputs)]

    def radius(self, node: int) -> Array:
        g = self.g[node]
        total: Array = np.abs(g).sum(axis=1) * (1.0 + 8 * (g.shape[1] + 8) * _U64)
        return total

    def _reach(self, node: int) -> Array:
        """Sum of magnitudes of the terms of a node's intended value."""
        reach: Array = np.abs(self.values[node][:, : len(self.low)]) @ np.maximum(np.abs(self.low), np.abs(self.high))
        return reach

    def _add(self, g: Array, new: Array) -> None:
        """The next node's G: this, and a column of its own for every entry of `new` that is not zero."""
        here = np.flatnonzero(new != 0.0)
        grown = np.zeros((len(g), self.count + len(here)))
        grown[:, : g.shape[1]] = g
        grown[here, self.count + np.arange(len(here))] = new[here] * _MORE
        self.count += len(here)
        self.g.append(grown)

    def affine(self, index: int, node: Affine) -> None:
        g, size, derived = np.zeros((node.size, self.count)), np.zeros(node.size), np.zeros(node.size)
        reach, depth = np.abs(node.bias), 4.0
        for source, weight in zip(node.sources, node.weights, strict=True):
            before, columns = self.g[source], [self.radius(source), self.derived[source], self._reach(source)]
            live = np.flatnonzero(before.any(axis=1))
            term = weight[:, None] * before if weight.ndim == 1 else weight[:, live] @ before[live]
            g[:, : term.shape[1]] += term
            depth += 1 if weight.ndim == 1 else len(before)
            magnitude, stacked = np.abs(weight), np.stack(columns, axis=1)
            sums = magnitude[:, None] * stacked if weight.ndim == 1 else magnitude @ stacked
            size, derived, reach = size + sums[:, 0], derived + sums[:, 1], reach + sums[:, 2]
        own = 2 * _rounding(depth, _U64)  # of this arithmetic
        self._add(g, self.proof.error[index] + own * size)
        self.derived.append((derived + own * reach) * _MORE)

    def elementwise(self, index: int, node: Elementwise, fold: _Fold, off: Array) -> None:
        source, kept = node.source, fold.kept
        low, high, peak = self.proof.low[source], self.proof.high[source], self.peak[source]
        absolute, relative = node.facts.execution(node.parameters)
        slope, radius = fold.slope.copy(), self.radius(source)
        new = _deviation(node, low, high, slope, fold.offset) + absolute + relative * peak
        away = radius[kept] + off
        least, greatest = _slopes(node, low[kept] - away, high[kept] + away)
        steepest = np.maximum(np.abs(least), np.abs(greatest))
        execution = 2 * (absolute + relative * (peak[kept] + away))
        slope[kept] = 0.5 * (least + greatest)
        new[kept] = 0.5 * (greatest - least) * radius[kept] + steepest * off + execution
        wider = (steepest * away + execution) * _MORE
        self.low = np.concatenate([self.low, self.proof.low[index][kept] - wider])
        self.high = np.concatenate([self.high, self.proof.high[index][kept] + wider])
        folded = np.abs(fold.slope)
        derived = folded * (self.derived[source] + 8 * _U64 * self._reach(source)) + 8 * _U64 * np.abs(fold.offset)
        self._add(slope[:, None] * self.g[source], new + 8 * _U64 * np.abs(slope) * radius)
        self.derived.append(derived * _MORE)


def _rounding(terms: float, unit: float) -> float:
    return terms * unit / (1.0 - terms * unit) if terms * unit < 0.5 else np.inf


def _lines(node: Elementwise, code: NDArray[np.uint8], stored: Array) -> tuple[Array, Array]:
    """Slope and offset of what stands for each neuron: the stored line, or its linear piece, taken from the function
    at a point well inside that piece; zero where it is kept."""
    kinks = sorted(node.facts.kinks(node.parameters))
    ends = [kinks[0] - 2.0, *kinks, kinks[-1] + 2.0] if kinks else [-1.0, 1.0]
    inside = np.array([0.5 * (a + b) for a, b in pairwise(ends)])
    slope = node.derivative(inside)
    offset = node(inside) - slope * inside
    piece = np.minimum(code, len(inside) - 1)
    slope, offset = np.where(code >= LINE, 0.0, slope[piece]), np.where(code >= LINE, 0.0, offset[piece])
    slope[code == LINE], offset[code == LINE] = stored[:, 0], stored[:, 1]
    return slope, offset


def _deviation(node: Elementwise, low: Array, high: Array, slope: Array, offset: Array) -> Array:
    """max |f(z) - slope z - offset| between low and high: from ends and kinks, and what f bends between grid points."""
    kinks, bend = node.facts.kinks(node.parameters), node.facts.curvature(node.parameters)
    step = (high - low) / _STEPS
    grid = [low + step * k for k in range(_STEPS)] if bend else [low]
    points = np.stack([*grid, high, *(np.clip(kink, low, high) for kink in kinks)])
    values, line = node(points), slope * points
    beyond = np.where(low < high, 0.125 * bend * step**2 + (1e-15 if bend else 0.0), 0.0)
    for piece, (start, end) in zip(pieces(node), pairwise([-np.inf, *kinks, np.inf]), strict=True):
        if np.isfinite(piece).all():
            beyond = np.where((low >= start) & (high <= end), 0.0, beyond)
    pad = 8 * _U64 * (np.abs(values) + np.abs(line) + np.abs(offset)).max(axis=0)
    result: Array = (np.abs(values - line - offset).max(axis=0) + beyond + pad) * _MORE
    return result


def _slopes(node: Elementwise, low: Array, high: Array) -> tuple[Array, Array]:
    """Least and greatest derivative of f between low and high, on both sides of kinks."""
    facts, bend = node.facts, node.facts.curvature(node.parameters)
    if facts.shape(node.parameters) == "odd":  # steepest at 0, and ever flatter away from it
        far = np.maximum(np.abs(low), np.abs(high))
        near = np.where((low <= 0.0) & (high >= 0.0), 0.0, np.minimum(np.abs(low), np.abs(high)))
        return node.derivative(far) - 1e-12, node.derivative(near) + 1e-12
    step = (high - low) / _STEPS
    kinks = [k + side * 1e-9 * (1.0 + abs(k)) for k in facts.kinks(node.parameters) for side in (-1.0, 1.0)]
    points = np.stack([*(low + step * k for k in range(_STEPS)), high, *(np.clip(k, low, high) for k in kinks)])
    found, beyond = node.derivative(points), bend * (step + 1e-8 * (1.0 + np.abs(low) + np.abs(high)))
    return found.min(axis=0) - beyond, found.max(axis=0) + beyond
