"""A small independent checker: proves a library's certificates again, one by one, with none of the issuer's code.

Where the issuer propagates affine enclosures forward over many regions at once, the checker substitutes backwards from
every layer, one region at a time; where the issuer has a table of lines, the checker searches for slopes and computes
the least sound offset for them from the function's critical points. Both rest on the same execution model
(docs/soundness.md): float32, any order of summation.

A verdict is "holds" (proved) or "unknown" (not proved, which never counts as holding). numpy only; runs on a robot.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .certificate import KINDS, Certificates, decision_rows
from .network import Affine, Elementwise, Network, Normalize

Array = NDArray[np.float64]

_U32, _U64, _TINY = 2.0**-24, 2.0**-53, 2.0**-126
_STEPS = 48  # of the grid on which smooth functions are bounded
_LEAN = 0.015  # of an interval: how far beyond its middle, towards where it is used, a line is best to touch
_MORE = 1.0 + 1e-9
_AFFINE = [KINDS.index(kind) for kind in ("linear", "point", "lipschitz")]  # an affine expert and an affine bound
_Matrices = dict[int, list[tuple[Array, Array]]]


def _rounding(terms: float | Array, unit: float) -> Array:
    return np.where(terms * unit < 0.5, terms * unit / (1.0 - np.minimum(terms * unit, 0.5)), np.inf)


class Checker:
    """Re-proves certificates of one policy: its layer graph, and what its actions mean (core.card.DECISIONS)."""

    def __init__(self, network: Network, decision: str = "none") -> None:
        self.network = network
        self.rows = decision_rows(network.outputs, decision)
        self.limited: dict[bytes, Any] = {}
        self.matrices: _Matrices = {}
        for index, node in enumerate(network.nodes, start=1):
            if isinstance(node, Affine):
                full = [np.diag(w) if w.ndim == 1 else w for w in node.weights]
                self.matrices[index] = [(w, np.abs(w)) for w in full]

    def verdict(self, certificates: Certificates, index: int, splits: int = 64) -> str:
        """ "holds" if certificate `index` is proved over its whole region, else "unknown"."""
        inner, short = self._before(certificates.floats.row(index))
        if certificates.kind[index] not in _AFFINE or inner is None:
            return "unknown"
        return inner.proved(certificates, index, splits, lambda p: inner._excess(certificates, index, p, short))

    def _before(self, limits: Array) -> tuple[Checker | None, Array]:
        """Whose certificates these are: of the policy before it is cut to the limits, and what that leaves out."""
        if limits.size == 0:
            return self, np.zeros(1)
        if limits.tobytes() not in self.limited:
            fits = limits.size == 2 * self.network.outputs == 2 * len(self.rows)
            found = self.network.unlimited(*limits.reshape(2, -1).astype(float)) if fits else None
            self.limited[limits.tobytes()] = (Checker(found[0]), found[1]) if found else (None, limits)
        return self.limited[limits.tobytes()]

    def proved(self, certificates: Certificates, index: int, splits: int, excess: Callable[[Proof], float]) -> str:
        """The same; a region that is not proved as a whole is halved, up to `splits` times, and proved part by part.
        `excess`: how far the error can exceed the claim in a part, as far as can be shown; NaN where none is known."""
        with np.errstate(all="ignore"):
            box, blur = _enclose(certificates.transform[index], int(certificates.round[index]))
            n = len(box)
            ball = np.arange(n) >= n - certificates.round[index]
            parts = [(np.zeros(n), np.ones(n))]  # middle and half-widths in zeta
            while parts and splits >= 0 and np.isfinite(blur):
                middle, half = parts.pop()
                cut = ball & (half < 1.0)  # of these axes only what the others leave of the ball
                least = np.maximum(np.abs(middle) - half, 0.0) * cut
                most = np.where(cut, np.sqrt(np.maximum(_MORE - least @ least + least**2, 0.0)), 1.0)
                low, high = np.maximum(middle - half, -most), np.minimum(middle + half, most)
                part = 0.5 * (low + high), np.where(cut, 0.5 * (high - low) + 1e-12, half), ball
                proof = Proof(self.network, self.matrices, certificates.center[index], box, blur, *part)
                if (low > high).any() or excess(proof) <= 0.0:  # outside; or proved, which a NaN is not
                    continue
                splits -= 1
                k = int(np.argmax(proof.bend))
                half = np.where(np.arange(n) == k, 0.5 * half, half)
                shift = np.where(np.arange(n) == k, half, 0.0)
                parts += [(middle - shift, half), (middle + shift, half)]
        return "unknown" if parts else "holds"

    def _excess(self, certificates: Certificates, index: int, proof: Proof, short: Array) -> float:
        """By how much the error of an affine expert may exceed its claim in a part of the region."""
        center, reach, box, n = proof.center, proof.reach, proof.box, len(proof.center)
        proof.bend = np.zeros(n)  # of what counts at the output only
        expert_weight, expert = (k[index].astype(float) for k in (certificates.expert_weight, certificates.expert_bias))
        claim_weight, claim = certificates.bound_weight[index], certificates.bound_offset[index] - short
        size = np.abs(expert_weight) @ reach + np.abs(expert)
        flushed = 2 * (n + 3) + np.abs(expert_weight).sum(axis=1) + np.abs(expert) + reach.sum()
        executed = _rounding(n + 3, _U32) * size + flushed * _TINY
        claimed = np.abs(claim_weight).sum(axis=1)  # by the router, at its own xi, within blur of zeta, and rounded
        routed = proof.blur * claimed + 2 * (n + 4) * _U64 * (claimed + np.abs(claim))
        worst = -np.inf
        for sign in (1.0, -1.0):
            weight, constant = proof.above(len(self.network.nodes), sign * self.rows)
            offset = (difference := weight - sign * expert_weight) @ center + constant - sign * expert - claim
            slope = difference @ box - claim_weight
            own = 16 * (n + 4) * _U64 * (np.abs(weight) @ reach + np.abs(constant) + size + claimed + np.abs(claim))
            excess = offset + slope @ proof.middle + proof.moved(slope) + (executed + routed + own) * _MORE
            worst = max(worst, float(excess.max())) if np.isfinite(excess).all() else np.nan
        return worst


def _enclose(transform: Array, round: int = 0) -> tuple[Array, float]:
    """A matrix B and a blur so that every x the router accepts is center + B zeta, |zeta| <= 1, |zeta - xi| <= blur,
    and the last `round` entries of zeta lie in the unit ball.

    With N a computed inverse of T, any y = T d satisfies d = N y + N (I - T N)(I + ...) y; the relative defect of
    that, with the rounding of T d, is at most `defect` (docs/soundness.md, step 1), sqrt(round) times that in the ball.
    """
    n = len(transform)
    try:
        inverse = np.linalg.inv(transform)
    except np.linalg.LinAlgError:
        return transform, np.inf
    amplification = (np.abs(transform) @ np.abs(inverse)).sum(axis=1).max()
    defect = np.abs(transform @ inverse - np.eye(n)).sum(axis=1).max() + 2 * (n + 3) * _U64 * amplification
    defect *= max(round, 1) ** 0.5
    if not defect < 1e-3:  # or it is not a number
        return transform, np.inf
    return inverse * (1.0 + 4.5 * defect), 9.0 * defect * _MORE


class Proof:
    """Bounds over a part of a region: ranges `low`, `high` of every node (0 the observation) as executed, and affine
    functions of x above any combination of a node. `reach`: the largest magnitude of each observation; `error`: of
    affine nodes, executed; `bend`: per axis how much it moves neurons that bend (where a split helps)."""

    def __init__(
        self, network: Network, matrices: _Matrices, center: Array, box: Array, blur: float, *part: NDArray[Any]
    ) -> None:
        """The part {center + box @ (middle + half * eta) : |eta| <= 1} of a region, known up to blur; `part`: middle,
        half, and which axes form the ball. Those that were not halved still do, with what the others leave of it."""
        middle, half, self.ball = part
        taken = np.maximum(np.abs(middle) - half, 0.0)[self.ball]
        self.whole, self.rest = self.ball & (half == 1.0), np.sqrt(max(_MORE - taken @ taken, 0.0))
        self.matrices, self.blur = matrices, blur
        self.network, self.center, self.box, self.middle, self.half = network, center, box, middle, half
        self.reach = np.abs(center) + np.abs(box).sum(axis=1)
        self.bend = np.zeros(len(center))
        self.swing: dict[int, Array] = {0: np.abs(box) * half}
        observation = np.eye(len(center)), np.zeros(len(center))
        self.low: list[Array] = [-self._maximum(-observation[0], observation[1], 0)]
        self.high: list[Array] = [self._maximum(*observation, 0)]
        self.error: dict[int, Array] = {}
        self.line: dict[int, tuple[Any, ...]] = {}  # mean and half-difference of slopes, where that is not 0, offsets
        self.plane: dict[int, tuple[Array, ...]] = {}  # y is in scale u - pull (middle . u) + shift +- gap
        for index, node in enumerate(network.nodes, start=1):
            if isinstance(node, Affine):
                self._affine(index, node)
            elif isinstance(node, Normalize):
                self._normalize(index, node)
            else:
                self._elementwise(index, node)

    def _peak(self, index: int) -> Array:
        return np.maximum(np.abs(self.low[index]), np.abs(self.high[index]))

    def _affine(self, index: int, node: Affine) -> None:
        volume, spread, lean = np.abs(node.bias), np.abs(node.bias), node.bias
        flushed, terms, depth = np.zeros(node.size), np.ones(node.size), 4.0 + node.size
        for source, weight, (matrix, size) in zip(node.sources, node.weights, self.matrices[index], strict=True):
            peak, up, down = self._peak(source), np.maximum(self.high[source], 0.0), np.maximum(-self.low[source], 0.0)
            volume, spread = volume + size @ peak, spread + size @ (up + down)
            lean = lean + matrix @ (up - down)
            flushed = flushed + size.sum(axis=1) + peak.sum()
            # what is surely zero adds nothing, in any order
            terms = terms + (peak > 0.0 if weight.ndim == 1 else (peak > 0.0).sum())
            depth += len(peak)
        # In any order a partial sum is that of a subset of the terms: between the sums of all negative and all positive
        # ones, of which the larger is half of `spread` + |lean|. Every addition rounds one; every product rounds too.
        own = 4 * _rounding(depth, _U64) * spread
        partial = 0.5 * (spread + np.abs(lean)) + own
        error = (1.0 + _rounding(terms + 3, _U32)) * terms * _U32 * partial + _rounding(4, _U32) * volume
        error = np.minimum(error, _rounding(terms + 2, _U32) * volume) + own  # less for very few terms
        error = (error + (2 * terms + 6 + flushed) * _TINY) * _MORE
        self.error[index] = np.where(volume < 2.0**126, error, np.inf)
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
        return weight @ self.center + constant + slope @ self.middle + self.moved(slope) + pad

    def moved(self, slope: Array) -> Array:
        """By how much slope @ zeta can exceed what it is at the part's middle: beside the halved axes, in the ball."""
        part = self.rest * np.linalg.norm(slope * self.whole, axis=1) + np.abs(slope) @ (self.half * ~self.whole)
        around = np.linalg.norm(slope * self.ball, axis=1) * _MORE - slope @ (self.middle * self.ball)
        return np.minimum(part, around + np.abs(slope) @ (self.half * ~self.ball))

    def above(self, index: int, rows: Array) -> tuple[Array, Array]:
        """weight [r, n], constant [r] with rows @ node `index` <= weight @ x + constant in the region, as executed."""
        return self._substitute({index: (rows, np.abs(rows), 1.0)}, np.zeros(len(rows)), index)

    def _substitute(self, pending: dict[int, Any], constant: Array, start: int) -> tuple[Array, Array]:
        """Replace node after node, from `start` down, by what lies above it. `pending`: per node (rows, |rows|, sign);
        the sum of sign * rows @ node is wanted."""

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
            if start == len(self.network.nodes) and not isinstance(node, Affine):
                weight = self.plane[index][0] if isinstance(node, Normalize) else np.abs(self.line[index][1])
                self.bend = self.bend + (size.sum(axis=0) * weight) @ self.swing[node.source]
            if isinstance(node, Affine):
                constant = constant + sign * (rows @ node.bias) + size @ self.error[index] * _MORE
                for source, (matrix, _) in zip(node.sources, self.matrices[index], strict=True):
                    add(source, sign * (rows @ matrix))
            elif isinstance(node, Normalize):
                scale, pull, middle, shift, gap = self.plane[index]
                add(node.source, sign * (rows * scale - (rows @ pull)[:, None] * middle))
                constant = constant + sign * (rows @ shift) + size @ gap * _MORE
            else:
                # a positive coefficient takes the upper line, a negative one the lower
                mean, bend, bent, shift, gap = self.line[index]
                moved = sign * rows * mean
                moved[:, bent] += size[:, bent] * bend[bent]
                add(node.source, moved)
                constant = constant + sign * (rows @ shift) + size @ gap * _MORE
            constant = constant + 4 * _U64 * np.abs(constant)
        weight = pending[0][2] * pending[0][0] if 0 in pending else np.zeros((len(constant), len(self.center)))
        return weight, constant + 8 * _U64 * (np.abs(weight) @ self.reach)

    def _normalize(self, index: int, node: Normalize) -> None:
        """y = u / sqrt(mean(u^2) + epsilon) around the middle m of u's range (docs/soundness.md, "Normalisation").

        With d = u - m, q = mean(m^2) + epsilon, D = 2 mean(m d) + mean(d^2) and k = q^(-1/2), y is exactly
            k u - k^3 mean(m d) m - k^3 mean(d^2) m / 2 - k^3 D d / 2 + R u,  R = (q + D)^(-1/2) - k + k^3 D / 2:
        two terms that are affine in u, and small ones. R is convex in D and not negative.
        """
        low, high, peak, n = self.low[node.source], self.high[node.source], self._peak(node.source), node.size
        own = 8 * (n + 8) * _U64
        m = 0.5 * (low + high)
        off, least = np.maximum(high - m, m - low) * _MORE, np.maximum(np.maximum(low, -high), 0.0)
        square, far, most = (v @ v / n for v in (m, off, peak))
        q = square + node.epsilon
        pad = own * (q + np.abs(m) @ peak / n)
        fall, rise = (
            self._maximum(*self.above(node.source, 2.0 * sign * m[None] / n), index)[0] - 2.0 * sign * square + pad
            for sign in (-1.0, 1.0)
        )
        floor = np.maximum(q - fall, (node.epsilon + least @ least / n) * (1.0 - own))
        ceiling = np.minimum(q + rise + far, node.epsilon + most) * (1.0 + own)
        k, slow, fast = q**-0.5, ceiling**-0.5, floor**-0.5
        change = np.maximum(np.abs(floor - q), np.abs(ceiling - q)) + pad
        rest = np.maximum(*(e**-0.5 - k + 0.5 * k**3 * (e - q) for e in (floor, ceiling)))
        rest = rest + own * (fast + k + k**3 * change)
        sides = [
            np.maximum(0.5 * k**3 * far * v, 0.0) + np.maximum(end, 0.0) * rest + 0.5 * k**3 * change * off
            for v, end in ((-m, high), (m, -low))
        ]
        # as executed: squares of what is centred only afterwards cancel; else they are a sum of positive terms
        squared = self._peak(node.squared)
        volume = (1.0 + own) * (squared @ squared) / n
        summed = floor if node.squared == node.source else 6.0 * (volume + node.epsilon)
        blurred = _rounding(n + 5, _U32) * summed + 16 * (n + 4) * _TINY * (1.0 + volume)
        relative = 0.63 * blurred / floor + _rounding(8, _U32)
        executed = relative * np.minimum(n**0.5, peak * fast) + 2 * _TINY * (1.0 + fast)
        known = floor > 0.0 and blurred <= 0.25 * floor and n * volume < 2.0**126
        executed = executed * _MORE if known else np.full(n, np.inf)
        shift = k**3 * square * m + 0.5 * (sides[0] - sides[1])
        size = k * peak + k**3 / n * np.abs(m) * (np.abs(m) @ peak) + np.abs(shift) + sides[0] + sides[1]
        gap = 0.5 * (sides[0] + sides[1]) + 4 * own * size
        bent = gap < n**0.5  # or the enclosure says less than |y| <= sqrt(n)
        shift, gap = np.where(bent, shift, 0.0), np.where(bent, gap, n**0.5) * _MORE + executed
        self.plane[index] = k * bent, k**3 / n * m * bent, m, shift, gap
        self.bend = self.bend + self.swing[node.source].sum(axis=0)
        self.swing[index] = self.swing[node.source]
        self.low.append(np.maximum(np.minimum(low * slow, low * fast), -(n**0.5)) - executed)
        self.high.append(np.minimum(np.maximum(high * slow, high * fast), n**0.5) + executed)

    def _elementwise(self, index: int, node: Elementwise) -> None:
        low, high = self.low[node.source], self.high[node.source]
        slope_high, offset_high = _above(node, low, high, 1.0)
        slope_low, offset_low = _above(node, low, high, -1.0)
        slope_low, offset_low = -slope_low, -offset_low
        peak = self._peak(node.source)
        absolute, relative = node.facts.execution(node.parameters)
        executed = (absolute + relative * peak) * _MORE
        steep = np.maximum(np.abs(slope_low), np.abs(slope_high))
        cost = np.maximum(np.abs(offset_low), np.abs(offset_high))
        pad = executed + 16 * _U64 * (peak * steep + (node.size + 4) * cost)
        self.bend = self.bend + self.swing[node.source][slope_low != slope_high].sum(axis=0)
        self.swing[index] = self.swing[node.source]
        values = node(low), node(high)
        if not node.facts.increasing:  # its range is that of its lines
            ends_low = np.minimum(slope_low * low, slope_low * high) + offset_low
            ends_high = np.maximum(slope_high * low, slope_high * high) + offset_high
            values = ends_low - pad, ends_high + pad
        mean, bend = 0.5 * (slope_high + slope_low), 0.5 * (slope_high - slope_low)
        shift, gap = 0.5 * (offset_high + offset_low), 0.5 * (offset_high - offset_low) + pad
        if node.function == "relu":  # nothing, or its argument: no bend and no rounding
            dead, whole = high <= 0.0, low >= 0.0
            mean, bend = np.where(dead, 0.0, np.where(whole, 1.0, mean)), np.where(dead | whole, 0.0, bend)
            shift, gap = np.where(dead | whole, 0.0, shift), np.where(dead, 0.0, np.where(whole, 4 * _U64 * peak, gap))
        self.line[index] = mean, bend, np.flatnonzero(bend), shift, gap
        self.low.append(values[0] - executed * _MORE - 4 * _U64 * np.abs(values[0]))
        self.high.append(values[1] + executed * _MORE + 4 * _U64 * np.abs(values[1]))


def _above(node: Elementwise, low: Array, high: Array, sign: float) -> tuple[Array, Array]:
    """Slope and offset of a line above sign * f on [low, high], as low as can be at the middle.

    For any slope, the least sound offset is the maximum of sign * f(z) - slope * z: over the ends and kinks where f is
    piecewise linear; else over a fine grid, plus what a function of that curvature can rise between its points.
    """
    facts, middle, shape = node.facts, 0.5 * (low + high), node.facts.shape(node.parameters)
    if shape == "odd":  # sign * f(sign * z) is convex before 0 and concave after, whatever the sign
        slope, offset = _tangent(
            lambda z: sign * node(sign * z),
            lambda z: node.derivative(sign * z),
            *((low, high) if sign > 0 else (-high, -low)),
            np.zeros_like(low),
            _LEAN,
        )
        return sign * slope, offset
    if shape == "convex":
        bend = high if sign > 0 else low
        return _tangent(lambda z: sign * node(z), lambda z: sign * node.derivative(z), low, high, bend, 0.0)
    kinks = [np.clip(kink, low, high) for kink in facts.kinks(node.parameters)]
    curvature = facts.curvature(node.parameters)
    steps = _STEPS if curvature else 1
    points = np.stack([low + (high - low) * (k / steps) for k in range(steps)] + [high, *kinks])
    values = sign * node(points)
    rise = 0.125 * curvature * ((high - low) / steps) ** 2 * _MORE + (1e-15 if curvature else 0.0)

    def height(slope: Array) -> Array:
        """Of the line at the middle."""
        return np.asarray((values - slope * (points - middle)).max(axis=0))

    if curvature:
        slopes = sign * node.derivative(points)
        left, right = slopes.min(axis=0), slopes.max(axis=0)
        for _ in range(40):  # height is convex in the slope
            a, b = left + (right - left) / 3, right - (right - left) / 3
            lower = height(a) < height(b)
            left, right = np.where(lower, left, a), np.where(lower, b, right)
        slope, tangent = 0.5 * (left + right), sign * node.derivative(middle)
        slope = np.where(height(tangent) <= height(slope) + 1e-9 * np.abs(values).max(axis=0), tangent, slope)
    else:
        slope, best = np.zeros_like(low), np.full_like(low, np.inf)
        for i, j in combinations(range(len(points)), 2):
            width = points[j] - points[i]
            chord = np.where(width != 0, (values[j] - values[i]) / np.where(width != 0, width, 1.0), 0.0)
            lower = height(chord) < best
            slope, best = np.where(lower, chord, slope), np.where(lower, height(chord), best)
    return slope, (values - slope * points).max(axis=0) + rise


def _tangent(
    f: Callable[[Array], Array], slope: Callable[[Array], Array], low: Array, high: Array, bend: Array, lean: float
) -> tuple[Array, Array]:
    """The same for a function that is convex before `bend` and concave after it: it touches at the middle (or `lean` of
    the interval beyond it), or where a line through the left end does, or it is the chord.

    Above the convex part is what is above its ends, and above the concave part is every tangent of it.
    """
    bend = np.clip(bend, low, high)
    end = f(low)
    left, right = np.maximum(bend, 0.5 * (low + high) + lean * (high - low)), high

    def cuts(t: Array) -> NDArray[np.bool_]:
        return np.asarray(f(t) + slope(t) * (low - t) < end)

    chord = cuts(high) & (high > low)
    for _ in range(50):
        touch = 0.5 * (left + right)
        beyond = cuts(touch)
        left, right = np.where(beyond, touch, left), np.where(beyond, right, touch)
    own = slope(right)
    line = np.where(chord, (f(high) - end) / np.where(chord, high - low, 1.0), own)
    slack = np.maximum(np.maximum((own - line) * (high - right), (own - line) * (bend - right)), 0.0)
    return line, np.maximum(end - line * low, f(right) - line * right + slack) + 2e-15
