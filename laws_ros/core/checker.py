"""A small independent checker: proves a library's certificates again, one by one, with none of the issuer's code.

It takes nothing from `bounds` or `certify` on trust and shares no function with them. Where the issuer propagates
affine enclosures forward over many regions at once, the checker substitutes backwards from every layer, one region at
a time; where the issuer derives lines case by case, the checker picks slopes and computes the least sound offset for
them from the function's critical points. Both rest on the same execution model (docs/soundness.md): float32, any order
of summation.

A verdict is "holds" (proved) or "unknown" (not proved, which never counts as holding). numpy only; runs on a robot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .certificate import Certificates, decision_rows
from .network import Affine, Elementwise, Network

Array = NDArray[np.float64]

_U32 = 2.0**-24
_U64 = 2.0**-53
_TINY = 2.0**-126
_STEPS = 48  # of the grid on which smooth functions are bounded
_MORE = 1.0 + 1e-9


_Term = tuple[Array, Array, float]
_Matrices = dict[int, list[tuple[Array, Array]]]


def _rounding(terms: float, unit: float) -> float:
    return terms * unit / (1.0 - terms * unit) if terms * unit < 0.5 else np.inf


@dataclass
class _Line:
    """slope_low z + offset_low <= f(z) <= slope_high z + offset_high, per neuron."""

    slope_low: Array
    offset_low: Array
    slope_high: Array
    offset_high: Array


class Checker:
    """Re-proves certificates of one policy.

    Args:
        network: the policy's layer graph. decision: core.card.DECISIONS.
    """

    def __init__(self, network: Network, decision: str = "none") -> None:
        self.network = network
        self.rows = decision_rows(network.outputs, decision)
        self.matrices: _Matrices = {}
        for index, node in enumerate(network.nodes, start=1):
            if isinstance(node, Affine):
                full = [np.diag(w) if w.ndim == 1 else w for w in node.weights]
                self.matrices[index] = [(w, np.abs(w)) for w in full]

    def verdict(self, certificates: Certificates, index: int, splits: int = 64) -> str:
        """ "holds" if certificate `index` is proved over its whole region, else "unknown".

        A region that is not proved as a whole is halved, up to `splits` times, and proved part by part.
        """
        box, blur = _enclose(certificates.transform[index])
        if not np.isfinite(blur):
            return "unknown"
        n = len(box)
        parts = [(np.zeros(n), np.ones(n))]  # middle and half-widths in zeta
        with np.errstate(all="ignore"):
            while parts:
                middle, half = parts.pop()
                excess, bend = self._excess(certificates, index, box, blur, middle, half)
                if excess <= 0.0:  # false for a NaN, which is unknown
                    continue
                if splits == 0:
                    return "unknown"
                splits -= 1
                k = int(np.argmax(bend))
                half = np.where(np.arange(n) == k, 0.5 * half, half)
                shift = np.where(np.arange(n) == k, half, 0.0)
                parts += [(middle - shift, half), (middle + shift, half)]
        return "holds"

    def _excess(
        self, certificates: Certificates, index: int, box: Array, blur: float, middle: Array, half: Array
    ) -> tuple[float, Array]:
        """By how much the error may exceed the claim in a part of the region, as far as can be shown.

        Returns:
            The largest excess (the claim holds if it is not positive; NaN where nothing is known), and per axis of
            the region how much it moves neurons that bend (where a split helps).
        """
        center = certificates.center[index]
        proof = _Proof(self.network, self.matrices, center, box, middle, half)
        reach = proof.reach
        high_weight, high = proof.above(len(self.network.nodes), self.rows)
        low_weight, low = proof.above(len(self.network.nodes), -self.rows)
        expert_weight = certificates.expert_weight[index].astype(float)
        expert = certificates.expert_bias[index].astype(float)
        claim_weight, claim = certificates.bound_weight[index], certificates.bound_offset[index]
        n = len(center)
        size = np.abs(expert_weight) @ reach + np.abs(expert)
        flushed = 2 * (n + 3) + np.abs(expert_weight).sum(axis=1) + np.abs(expert) + reach.sum()
        executed = _rounding(n + 3, _U32) * size + flushed * _TINY
        # the router evaluates the claim at its own xi, within blur of zeta, and rounds
        claimed = np.abs(claim_weight).sum(axis=1)
        routed = blur * claimed + 2 * (n + 4) * _U64 * (claimed + np.abs(claim))
        worst = -np.inf
        for weight, constant, sign in ((high_weight, high, 1.0), (low_weight, low, -1.0)):
            difference = weight - sign * expert_weight
            offset = difference @ center + constant - sign * expert - claim
            slope = difference @ box - claim_weight
            own = 16 * (n + 4) * _U64 * (np.abs(weight) @ reach + np.abs(constant) + size + claimed + np.abs(claim))
            excess = offset + slope @ middle + np.abs(slope) @ half + (executed + routed + own) * _MORE
            worst = max(worst, float(excess.max())) if np.isfinite(excess).all() else np.nan
        return worst, proof.bend


def _enclose(transform: Array) -> tuple[Array, float]:
    """A matrix B and a blur so that every x the router accepts is center + B zeta, |zeta| <= 1, |zeta - xi| <= blur.

    With N a computed inverse of T, any y = T d satisfies d = N y + N (I - T N)(I + ...) y; the relative defect of
    that, together with the rounding of T d, is at most `defect` in the maximum norm (docs/soundness.md, step 1).
    """
    n = len(transform)
    if not np.isfinite(transform).all():
        return transform, np.inf
    try:
        inverse = np.linalg.inv(transform)
    except np.linalg.LinAlgError:
        return transform, np.inf
    amplification = (np.abs(transform) @ np.abs(inverse)).sum(axis=1).max()
    defect = np.abs(transform @ inverse - np.eye(n)).sum(axis=1).max() + 2 * (n + 3) * _U64 * amplification
    if not defect < 1e-3:
        return transform, np.inf
    return inverse * (1.0 + 4.5 * defect), 9.0 * defect * _MORE


class _Proof:
    """Bounds over one region: ranges of every node, and affine functions of x above any combination of a node."""

    def __init__(
        self, network: Network, matrices: _Matrices, center: Array, box: Array, middle: Array, half: Array
    ) -> None:
        """The part {center + box @ (middle + half * eta) : |eta| <= 1} of a region."""
        self.matrices = matrices
        self.network, self.center, self.box, self.middle, self.half = network, center, box, middle, half
        self.reach = np.abs(center) + np.abs(box).sum(axis=1)
        self.bend = np.zeros(len(center))
        self.swing: dict[int, Array] = {0: np.abs(box) * half}
        observation = np.eye(len(center)), np.zeros(len(center))
        self.low: list[Array] = [-self._maximum(-observation[0], observation[1], 0)]
        self.high: list[Array] = [self._maximum(*observation, 0)]
        self.volume: dict[int, Array] = {}
        self.error: dict[int, Array] = {}
        self.line: dict[int, _Line] = {}
        for index, node in enumerate(network.nodes, start=1):
            if isinstance(node, Affine):
                self._affine(index, node)
            else:
                self._elementwise(index, node)

    def _size(self, index: int) -> int:
        return len(self.low[index])

    def _peak(self, index: int) -> Array:
        return np.maximum(np.abs(self.low[index]), np.abs(self.high[index]))

    def _affine(self, index: int, node: Affine) -> None:
        volume, flushed, terms, depth = np.abs(node.bias), np.zeros(node.size), 3.0, 4.0
        for source, weight, (_, size) in zip(node.sources, node.weights, self.matrices[index], strict=True):
            peak = self._peak(source)
            volume = volume + size @ peak
            flushed = flushed + size.sum(axis=1) + peak.sum()
            # what is surely zero adds nothing, in any order
            terms += 1 if weight.ndim == 1 else (peak > 0.0).sum()
            depth += len(peak)
        relative = _rounding(terms, _U32) + 4 * _rounding(depth, _U64)
        error = (relative * volume + (2 * terms + flushed) * _TINY) * _MORE
        self.volume[index], self.error[index] = volume, np.where(volume < 2.0**126, error, np.inf)
        constant = self.error[index] + 2 * _U64 * np.abs(node.bias)
        ends = []
        for sign in (-1.0, 1.0):
            pending = {s: (*m, sign) for s, m in zip(node.sources, self.matrices[index], strict=True)}
            ends.append(self._maximum(*self._substitute(pending, sign * node.bias + constant, index - 1), index))
        self.low.append(-ends[0])
        self.high.append(ends[1])

    def _maximum(self, weight: Array, constant: Array, index: int) -> Array:
        """The largest value of weight @ x + constant in the part; keeps per axis how far it swings."""
        slope = weight @ self.box
        self.swing[index] = np.abs(slope) * self.half
        pad = 8 * (len(self.center) + 4) * _U64 * (np.abs(weight) @ self.reach + np.abs(constant))
        return weight @ self.center + constant + slope @ self.middle + self.swing[index].sum(axis=1) + pad

    def above(self, index: int, rows: Array) -> tuple[Array, Array]:
        """weight [r, n], constant [r] with rows @ node `index` <= weight @ x + constant in the region, as executed."""
        return self._substitute({index: (rows, np.abs(rows), 1.0)}, np.zeros(len(rows)), index)

    def _substitute(self, pending: dict[int, _Term], constant: Array, start: int) -> tuple[Array, Array]:
        """Replace node after node, from `start` down, by what lies above it.

        Args:
            pending: per node (rows, |rows|, sign): the sum of sign * rows @ node over all of them is wanted.
        """

        def add(index: int, rows: Array) -> None:
            if index in pending:
                other, _, sign = pending[index]
                rows = rows + sign * other
            pending[index] = (rows, np.abs(rows), 1.0)

        for index in range(start, 0, -1):
            if index not in pending:
                continue
            rows, size, sign = pending.pop(index)
            node = self.network.nodes[index - 1]
            if isinstance(node, Affine):
                constant = constant + sign * (rows @ node.bias) + size @ self.error[index] * _MORE
                for source, (matrix, _) in zip(node.sources, self.matrices[index], strict=True):
                    add(source, sign * (rows @ matrix))
            else:
                constant = constant + self._bend_rows(index, node, rows, size, sign, add)
            constant = constant + 4 * _U64 * np.abs(constant)
        weight = pending[0][2] * pending[0][0] if 0 in pending else np.zeros((len(constant), len(self.center)))
        return weight, constant + 8 * _U64 * (np.abs(weight) @ self.reach)

    def _bend_rows(
        self, index: int, node: Elementwise, rows: Array, size: Array, sign: float, add: Callable[[int, Array], None]
    ) -> Array:
        """Replace sign * rows @ f(z) by lines in z, and z at once by the affine map that feeds it if there is one.

        A positive coefficient takes the upper line, a negative one the lower: coefficient * mean + |coefficient| * bend
        of the two. Multiplying the small matrix behind first keeps the large one untouched.
        """
        line, peak = self.line[index], self._peak(node.source)
        mean, bend = 0.5 * (line.slope_high + line.slope_low), 0.5 * (line.slope_high - line.slope_low)
        shift, gap = 0.5 * (line.offset_high + line.offset_low), 0.5 * (line.offset_high - line.offset_low)
        two = np.flatnonzero((bend != 0.0) | (gap != 0.0))
        cost = np.maximum(np.abs(line.offset_high), np.abs(line.offset_low))
        steep = np.maximum(np.abs(line.slope_high), np.abs(line.slope_low))
        live = (steep > 0) | (cost > 0)
        rounding = 4 * (len(peak) + 4) * _U64 * cost + 4 * _U64 * np.where(live, steep * peak, 0.0)
        below = self.network.nodes[node.source - 1] if node.source > 0 else None
        fuse = isinstance(below, Affine) and len(below.sources) == 1 and len(rows) > self._size(below.sources[0])
        if not fuse:
            moved = sign * rows * mean
            moved[:, two] += size[:, two] * bend[two]
            add(node.source, moved)
            plain: Array = sign * (rows @ shift) + size[:, two] @ gap[two] + size @ rounding * _MORE
            return plain
        assert isinstance(below, Affine)
        matrix, _ = self.matrices[node.source][0]
        # |coefficient| of what feeds it, split the same way: its rounding adds up by magnitude
        lean = 0.5 * (np.abs(line.slope_high) + np.abs(line.slope_low))
        tilt = 0.5 * (np.abs(line.slope_high) - np.abs(line.slope_low))
        volume, error = (np.where(live, of[node.source], 0.0) for of in (self.volume, self.error))
        rounding = rounding + 8 * _rounding(len(peak) + 8, _U64) * steep * volume
        straight = np.column_stack([mean[:, None] * matrix, mean * below.bias + shift, tilt * error])
        bent = np.column_stack([bend[two, None] * matrix[two], bend[two] * below.bias[two] + gap[two]])
        total = sign * (rows @ straight)
        total[:, :-1] += size[:, two] @ bent
        add(below.sources[0], total[:, :-2])
        result: Array = total[:, -2] + total[:, -1] + size @ (lean * error + rounding) * _MORE
        return result

    def _elementwise(self, index: int, node: Elementwise) -> None:
        low, high = self.low[node.source], self.high[node.source]
        slope_high, offset_high = _above(node, low, high, 1.0)
        slope_low, offset_low = _above(node, low, high, -1.0)
        slope_low, offset_low = -slope_low, -offset_low
        peak = np.maximum(np.abs(low), np.abs(high))
        absolute, relative = node.facts.execution(node.parameters)
        executed = (absolute + relative * peak) * _MORE
        steepest = np.maximum(np.abs(slope_low), np.abs(slope_high))
        pad = executed + 8 * _U64 * (peak * steepest + np.abs(offset_low) + np.abs(offset_high))
        self.bend = self.bend + self.swing[node.source][slope_low != slope_high].sum(axis=0)
        self.swing[index] = self.swing[node.source]
        offset_low, offset_high = offset_low - pad, offset_high + pad
        values = node(low), node(high)
        if not node.facts.increasing:  # its range is that of its lines
            ends_low = np.minimum(slope_low * low, slope_low * high) + offset_low
            ends_high = np.maximum(slope_high * low, slope_high * high) + offset_high
            values = ends_low, ends_high
        if node.function == "relu":  # nothing, or its argument: no bend and no rounding
            dead, whole = high <= 0.0, low >= 0.0
            slope_low, slope_high = (np.where(dead, 0.0, np.where(whole, 1.0, s)) for s in (slope_low, slope_high))
            offset_low, offset_high = (np.where(dead | whole, 0.0, o) for o in (offset_low, offset_high))
        self.line[index] = _Line(slope_low, offset_low, slope_high, offset_high)
        self.low.append(values[0] - executed * _MORE - 4 * _U64 * np.abs(values[0]))
        self.high.append(values[1] + executed * _MORE + 4 * _U64 * np.abs(values[1]))


def _above(node: Elementwise, low: Array, high: Array, sign: float) -> tuple[Array, Array]:
    """Slope and offset of a line above sign * f on [low, high], as low as can be at the middle.

    For any slope, the least sound offset is the maximum of sign * f(z) - slope * z: over the ends and kinks where f is
    piecewise linear; else over a fine grid, plus what a function of that curvature can rise between its points.
    """
    facts, middle = node.facts, 0.5 * (low + high)
    kinks = [np.clip(kink, low, high) for kink in facts.kinks(node.parameters)]
    curvature = facts.curvature(node.parameters)
    steps = _STEPS if curvature else 1
    points = np.stack([low + (high - low) * (k / steps) for k in range(steps)] + [high, *kinks])
    values = sign * node(points)
    rise = 0.125 * curvature * ((high - low) / steps) ** 2 * _MORE + (1e-15 if curvature else 0.0)

    def height(slope: Array) -> Array:
        """Of the line at the middle."""
        result: Array = (values - slope * (points - middle)).max(axis=0)
        return result

    if curvature:
        slopes = sign * node.derivative(points)
        left, right = slopes.min(axis=0), slopes.max(axis=0)
        for _ in range(40):  # height is convex in the slope
            a, b = left + (right - left) / 3, right - (right - left) / 3
            lower = height(a) < height(b)
            left, right = np.where(lower, left, a), np.where(lower, b, right)
        slope, tangent = 0.5 * (left + right), sign * node.derivative(middle)
        slope = np.where(height(tangent) <= height(slope), tangent, slope)
    else:
        slope, best = np.zeros_like(low), np.full_like(low, np.inf)
        for i, j in combinations(range(len(points)), 2):
            width = points[j] - points[i]
            chord = np.where(width != 0, (values[j] - values[i]) / np.where(width != 0, width, 1.0), 0.0)
            lower = height(chord) < best
            slope, best = np.where(lower, chord, slope), np.where(lower, height(chord), best)
    return slope, (values - slope * points).max(axis=0) + rise
