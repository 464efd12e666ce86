"""A small independent checker: proves a library's certificates again, one by one, with none of the issuer's code.

Where the issuer propagates affine enclosures forward over many regions at once, the checker substitutes backwards from
every layer, one region at a time; where the issuer has a table of lines, the checker searches for slopes and computes
the least sound offset from the function's critical points. Both rest on the same execution model (docs/soundness.md):
float32, any order of summation. "unknown", not proved, never counts as holding. numpy only; runs on a robot."""

from __future__ import annotations

from collections.abc import Callable
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


def _rounding(terms: float | Array, unit: float) -> Array:
    return np.where(terms * unit < 0.5, terms * unit / (1.0 - np.minimum(terms * unit, 0.5)), np.inf)


class Checker:
    """Re-proves certificates of one policy: its layer graph, and what its actions mean (core.card.DECISIONS)."""

    def __init__(self, network: Network, decision: str = "none") -> None:
        self.network = network
        self.rows = decision_rows(network.outputs, decision)
        self.matrices: dict[int, list[tuple[Array, Array]]] = {}
        self.inner: dict[bytes, Any] = {b"": (self, np.zeros(1))}  # of the policy before limits; what they leave out
        for index, node in enumerate(network.nodes, start=1):
            if isinstance(node, Affine):
                full = [np.diag(w) if w.ndim == 1 else w for w in node.weights]
                self.matrices[index] = [(w, np.abs(w)) for w in full]

    def verdict(self, certificates: Certificates, index: int, splits: int = 64) -> str:
        """ "holds" if certificate `index` is proved over its whole region, else "unknown"."""
        key, limits = (k := certificates.floats.row(index).astype(float)).tobytes(), np.array([[-np.inf], [np.inf]])
        if k.size and k.size == 2 * self.network.outputs == 2 * len(self.rows):
            limits = k.reshape(2, -1)
            if key not in self.inner and (found := self.network.unlimited(*limits)):
                self.inner[key] = Checker(found[0]), found[1]
        if certificates.kind[index] not in _AFFINE or key not in self.inner:
            return "unknown"
        inner, short = self.inner[key]
        what = certificates, index
        return str(inner.proved(*what, splits, lambda proof: inner._excess(*what, proof, short, limits)))

    def proved(self, certificates: Certificates, index: int, splits: int, excess: Callable[[Proof], float]) -> str:
        """The same; a region that is not proved as a whole is halved, up to `splits` times, and proved part by part.
        `excess`: how far the error can exceed the claim in a part, as far as can be shown; NaN where none is known."""
        with np.errstate(all="ignore"):
            box, blur = _enclose(certificates.transform[index], int(certificates.round[index]))
            n = len(box)
            ball = np.arange(n) >= n - certificates.round[index]
            parts = [(np.zeros(n), np.ones(n))]  # middle and half-widths in zeta
            root: dict[int, Array] = {}
            while parts and splits >= 0 and np.isfinite(blur):
                middle, half = parts.pop()
                cut = ball & (half < 1.0)  # of these axes only what the others leave of the ball
                least = np.maximum(np.abs(middle) - half, 0.0) * cut
                most = np.where(cut, np.sqrt(np.maximum(_MORE - least @ least + least**2, 0.0)), 1.0)
                low, high = np.maximum(middle - half, -most), np.minimum(middle + half, most)
                part = 0.5 * (low + high), np.where(cut, 0.5 * (high - low) + 1e-12, half), ball
                proof = Proof(self, certificates.center[index], box, blur, root, *part)
                if (low > high).any() or excess(proof) <= 0.0:  # outside; or proved, which a NaN is not
                    continue
                root, splits = root or proof.below, splits - 1
                k = int(np.argmax(proof.bend))
                half = np.where(np.arange(n) == k, 0.5 * half, half)
                shift = np.where(np.arange(n) == k, half, 0.0)
                parts += [(middle - shift, half), (middle + shift, half)]
        return "unknown" if parts else "holds"

    def _excess(self, certificates: Certificates, index: int, proof: Proof, short: Array, limits: Array) -> float:
        """By how much the error of an affine expert, when it and the policy are cut to the limits, may exceed its claim
        in a part of the region."""
        center, n, sign = proof.center, len(proof.center), np.repeat([1.0, -1.0], len(self.rows))
        expert_weight, expert = (k[index].astype(float) for k in (certificates.expert_weight, certificates.expert_bias))
        claim_weight, claim = certificates.bound_weight[index], certificates.bound_offset[index] - short
        size = np.abs(expert_weight) @ proof.reach + np.abs(expert)
        flushed = 2 * (n + 3) + np.abs(expert_weight).sum(axis=1) + np.abs(expert) + proof.reach.sum()
        executed = (_rounding(n + 3, _U32) * size + flushed * _TINY) * _MORE
        claimed = np.abs(claim_weight).sum(axis=1)  # by the router, at its own xi, within blur of zeta, and rounded
        routed = (proof.blur * claimed + 2 * (n + 4) * _U64 * (claimed + np.abs(claim))) * _MORE
        # all of it for errors above and below
        rows, expert_weight, claim_weight = (np.concatenate([k] * 2) for k in (self.rows, expert_weight, claim_weight))
        size, executed, routed, claim, claimed = (np.tile(k, 2) for k in (size, executed, routed, claim, claimed))
        expert_weight, expert = sign[:, None] * expert_weight, sign * np.tile(expert, 2)
        answer = proof.maximum(expert_weight, expert + executed)
        least, worst = claim + claim_weight @ proof.middle - proof.moved(-claim_weight), np.full(len(sign), np.inf)
        for lines in range(1 + bool(proof.root)):
            weight, constant = proof.above(len(self.network.nodes), sign[:, None] * rows, lines)
            slope = (weight - expert_weight) @ proof.box - claim_weight
            excess = (weight - expert_weight) @ center + constant - expert - claim + slope @ proof.middle
            ends = np.stack([proof.maximum(weight, constant), answer]).reshape(2, 2, -1)
            high, low = (np.clip(k, *limits) + 0.0 * k for k in (ends[:, 0], -ends[:, 1]))  # not if infinite
            excess = np.minimum(excess + proof.moved(slope) + executed, (high - low[::-1]).ravel() - least)
            own = np.abs(weight) @ proof.reach + np.abs(constant) + size + claimed + np.abs(claim)
            excess = excess + routed + 16 * (n + 4) * _U64 * own * _MORE
            worst = np.where(np.isfinite(excess) & (excess < worst), excess, worst)
        return float(worst.max())


def _enclose(transform: Array, round: int = 0) -> tuple[Array, float]:
    """A matrix B and a blur so that every x the router accepts is center + B zeta, |zeta| <= 1, |zeta - xi| <= blur,
    and the last `round` entries of zeta lie in the unit ball.

    With N a computed inverse of T, any y = T d satisfies d = N y + N (I - T N)(I + ...) y; the relative defect of
    that, with the rounding of T d, is at most `defect` (docs/soundness.md, step 1); in the ball sqrt(round) times."""
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
    affine nodes, executed; `bend`: per axis how much it moves neurons that bend (where a split helps); `below`: slopes
    of lower lines of functions of two pieces; `root`: those of the whole region, as a part's need not be better."""

    def __init__(
        self, checker: Checker, center: Array, box: Array, blur: float, root: dict[int, Array], *part: NDArray[Any]
    ) -> None:
        """The part {center + box @ (middle + half * eta) : |eta| <= 1} of a region, known up to blur; `part`: middle,
        half, and which axes form the ball. Those that were not halved still do, with what the others leave of it."""
        middle, half, self.ball = part
        taken = np.maximum(np.abs(middle) - half, 0.0)[self.ball]
        self.whole, self.rest = self.ball & (half == 1.0), np.sqrt(max(_MORE - taken @ taken, 0.0))
        self.network, self.matrices, self.blur = checker.network, checker.matrices, blur
        self.center, self.box, self.middle, self.half = center, box, middle, half
        self.reach = np.abs(center) + np.abs(box).sum(axis=1)
        self.bend = np.zeros(len(center))
        self.swing: dict[int, Array] = {0: np.abs(box) * half}
        self.root: dict[int, Array] = root
        self.below: dict[int, Array] = {}
        itself, nothing = np.eye(len(center)), np.zeros(len(center))
        self.low, self.high = [-self.maximum(-itself, nothing)], [self.maximum(itself, nothing)]
        self.error: dict[int, Array] = {}
        self.line: dict[int, tuple[Any, ...]] = {}  # half-differences and means of slopes, the root's second; offsets'
        self.plane: dict[int, tuple[Array, ...]] = {}  # y is in scale u - pull (middle . u) + shift +- gap
        for index, node in enumerate(self.network.nodes, start=1):
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
            sums = size @ np.stack([peak, up + down, np.ones(len(peak))], axis=1)  # what it costs is to read `size`
            volume, spread, flushed = volume + sums[:, 0], spread + sums[:, 1], flushed + sums[:, 2] + peak.sum()
            lean = lean + matrix @ (up - down)
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
        for sign, ends in ((-1.0, self.low), (1.0, self.high)):
            pending = {k: (*m, sign, 0.0) for k, m in zip(node.sources, self.matrices[index], strict=True)}
            line = self._substitute(pending, sign * node.bias + constant, index - 1)
            ends.append(sign * self.maximum(*line))
        self.swing[index] = np.abs(line[0] @ self.box) * self.half

    def maximum(self, weight: Array, constant: Array) -> Array:
        """The largest values of weight @ x + constant in the part."""
        slope = weight @ self.box
        pad = 8 * (len(self.center) + 4) * _U64 * (np.abs(weight) @ self.reach + np.abs(constant))
        return weight @ self.center + constant + slope @ self.middle + self.moved(slope) + pad

    def moved(self, slope: Array) -> Array:
        """By how much slope @ zeta can exceed what it is at the part's middle: beside the halved axes, in the ball."""
        part = self.rest * np.linalg.norm(slope * self.whole, axis=-1) + np.abs(slope) @ (self.half * ~self.whole)
        around = np.linalg.norm(slope * self.ball, axis=-1) * _MORE - slope @ (self.middle * self.ball)
        return np.minimum(part, around + np.abs(slope) @ (self.half * ~self.ball))

    def above(self, index: int, rows: Array, lines: int = 0) -> tuple[Array, Array]:
        """weight [r, n], constant [r] with rows @ node `index` <= weight @ x + constant in the part, as executed.
        `lines`: 0 for the part's own, 1 for those of the root."""
        return self._substitute({index: (rows, np.abs(rows), 1.0, 0.0)}, np.zeros(len(rows)), index, lines)

    def _substitute(
        self, pending: dict[int, tuple[Array, Array, Any, Any]], constant: Array, start: int, lines: int = 0
    ) -> tuple[Array, Array]:
        """Replace node after node, from `start` down, by what lies above it. `pending`: per node (rows, |rows|, scale,
        widen) for coefficients rows * scale + |rows| * widen; rows can be very many, so they are not touched often."""
        final = start == len(self.network.nodes)
        self.bend = self.bend * (not final)  # of what counts at the output only

        def add(index: int, rows: Array, size: Array | None = None, scale: Any = 1.0, widen: Any = 0.0) -> None:
            size = np.abs(rows) if size is None else size
            if index in pending:
                other, its, *scales = pending[index]
                rows, scale, widen = rows * scale + size * widen + other * scales[0] + its * scales[1], 1.0, 0.0
                size = np.abs(rows)
            pending[index] = rows, size, scale, widen

        for index in range(start, 0, -1):
            if index not in pending:
                continue
            constant = constant + 4 * _U64 * np.abs(constant)
            rows, size, scale, widen = pending.pop(index)
            node = self.network.nodes[index - 1]
            if isinstance(node, Affine):
                error = (np.abs(scale) + np.abs(widen)) * self.error[index] * _MORE
                constant = constant + rows @ (scale * node.bias) + size @ (widen * node.bias + error)
                for source, (matrix, _) in zip(node.sources, self.matrices[index], strict=True):
                    if matrix.shape[1] < len(rows):
                        add(source, rows @ (scale * matrix.T).T + size @ (widen * matrix.T).T)
                    else:
                        add(source, (rows * scale + size * widen) @ matrix)
                continue
            if np.ndim(scale):
                rows, scale = rows * scale + size * widen, 1.0
                size = np.abs(rows)
            if isinstance(node, Normalize):
                bend, pull, middle, shift, gap = self.plane[index]
                add(node.source, scale * (rows * bend - (rows @ pull)[:, None] * middle))
            else:  # a positive coefficient takes the upper line, a negative one the lower
                bend, mean, shift, gap = (k[lines * (len(k) > 1)] for k in self.line[index])
                add(node.source, rows, size, scale * mean, bend)
            constant = constant + scale * (rows @ shift) + size @ (gap + 1e-9 * np.abs(gap))  # it can be negative
            if final:
                self.bend = self.bend + (size.sum(axis=0) * np.abs(bend)) @ self.swing[node.source]
        zero = np.zeros((len(constant), len(self.center)))
        rows, size, scale, widen = pending.get(0, (zero, zero, 1.0, 0.0))
        weight, constant = rows * scale + size * widen, constant + 4 * _U64 * np.abs(constant)
        return weight, constant + 8 * _U64 * (np.abs(weight) @ self.reach)

    def _normalize(self, index: int, node: Normalize) -> None:
        """y = u / sqrt(mean(u^2) + epsilon) around the middle m of u's range (docs/soundness.md, "Normalisation").

        With d = u - m, q = mean(m^2) + epsilon, D = 2 mean(m d) + mean(d^2) and k = q^(-1/2), y is exactly
            k u - k^3 mean(m d) m - k^3 mean(d^2) m / 2 - k^3 D d / 2 + R u,  R = (q + D)^(-1/2) - k + k^3 D / 2 >= 0:
        two terms that are affine in u, and small ones."""
        low, high, peak, n = self.low[node.source], self.high[node.source], self._peak(node.source), node.size
        own = 8 * (n + 8) * _U64
        m = 0.5 * (low + high)
        off, least = np.maximum(high - m, m - low) * _MORE, np.maximum(np.maximum(low, -high), 0.0)
        square, far, most = (v @ v / n for v in (m, off, peak))
        q = square + node.epsilon
        pad = own * (q + np.abs(m) @ peak / n)
        rise, fall = self.maximum(*self.above(node.source, 2.0 * np.stack([m, -m]) / n)) + pad
        rise, fall = rise - 2.0 * square, fall + 2.0 * square
        floor = np.maximum(q - fall, (node.epsilon + least @ least / n) * (1.0 - own))
        ceiling = np.minimum(q + rise + far, node.epsilon + most) * (1.0 + own)
        k, slow, fast = q**-0.5, ceiling**-0.5, floor**-0.5
        change = np.maximum(np.abs(floor - q), np.abs(ceiling - q)) + pad
        rest = np.maximum(*(e**-0.5 - k + 0.5 * k**3 * (e - q) for e in (floor, ceiling)))
        rest = rest + own * (fast + k + k**3 * change)
        sides = [np.maximum(0.5 * k**3 * far * v, 0.0) + np.maximum(w, 0.0) * rest for v, w in ((-m, high), (m, -low))]
        sides = [side + 0.5 * k**3 * change * off for side in sides]
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
        slope_low, offset_low = (-k for k in _above(node, low, high, -1.0))
        peak = self._peak(node.source)
        absolute, relative = node.facts.execution(node.parameters)
        executed = (absolute + relative * peak) * _MORE
        below = [slope_low]
        if node.facts.shape(node.parameters) == "bent":
            self.below[index] = slope_low
            left, right = node.derivative(np.array([-1.0, 1.0]))
            turned = (low < 0.0) & (high > 0.0) & (left < right) & bool(self.root)
            below.append(np.where(turned, np.clip(self.root.get(index, slope_low), left, right), slope_low))
        steep = np.maximum(np.abs(below).max(axis=0), np.abs(slope_high))
        cost = np.maximum(np.abs(offset_low), np.abs(offset_high))
        pad = executed + 16 * _U64 * (peak * steep + (node.size + 4) * cost)
        self.bend = self.bend + self.swing[node.source][slope_low != slope_high].sum(axis=0)
        self.swing[index] = self.swing[node.source]
        values = node(low), node(high)
        if not node.facts.increasing:  # its range is that of its lines
            least, most = np.minimum(slope_low * low, slope_low * high), np.maximum(slope_high * low, slope_high * high)
            values = least + offset_low - pad, most + offset_high + pad
        shift, gap = 0.5 * (offset_high + offset_low), 0.5 * (offset_high - offset_low) + pad
        if node.function == "relu":  # nothing, or its argument: no bend and no rounding
            flat = [high <= 0.0, low >= 0.0]
            slope_high, *below = (np.select(flat, [0.0, 1.0], k) for k in (slope_high, *below))
            shift, gap = np.select(flat, [0.0, 0.0], shift), np.select(flat, [0.0, 4 * _U64 * peak], gap)
        bend, mean = ([0.5 * (slope_high + sign * k) for k in below] for sign in (-1.0, 1.0))
        self.line[index] = bend, mean, [shift], [gap]
        self.low.append(values[0] - executed * _MORE - 4 * _U64 * np.abs(values[0]))
        self.high.append(values[1] + executed * _MORE + 4 * _U64 * np.abs(values[1]))


def _above(node: Elementwise, low: Array, high: Array, sign: float) -> tuple[Array, Array]:
    """Slope and offset of a line above sign * f on [low, high], as low as can be at the middle. For any slope, the
    least sound offset is the maximum of sign * f(z) - slope * z: over the ends and kinks where f is piecewise linear;
    else over a fine grid, plus what a function of that curvature can rise between its points."""
    facts, middle, shape = node.facts, 0.5 * (low + high), node.facts.shape(node.parameters)
    if shape == "odd":  # sign * f(sign * z) is convex before 0 and concave after, whatever the sign
        ends = (low, high) if sign > 0 else (-high, -low)
        f, derivative = (lambda z: sign * node(sign * z)), (lambda z: node.derivative(sign * z))
        slope, offset = _tangent(f, derivative, *ends, np.zeros_like(low), _LEAN)
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
        i, j = np.triu_indices(len(points), 1)
        width = points[j] - points[i]
        chords = np.where(width != 0, (values[j] - values[i]) / np.where(width != 0, width, 1.0), 0.0)
        slope = np.take_along_axis(chords, np.argmin([height(k) for k in chords], axis=0)[None], axis=0)[0]
    return slope, (values - slope * points).max(axis=0) + rise


def _tangent(
    f: Callable[[Array], Array], slope: Callable[[Array], Array], low: Array, high: Array, bend: Array, lean: float
) -> tuple[Array, Array]:
    """The same for a function that is convex before `bend` and concave after it: it touches at the middle (or `lean` of
    the interval beyond it), or where a line through the left end does, or it is the chord. Above the convex part is
    what is above its ends, and above the concave part is every tangent of it."""
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
