"""A policy over regions with every function replaced by lines and every rounding by an unknown: its enclosures.

Forward, every node gets two affine functions of the region's coordinates that enclose its value; backward, chosen
combinations of a node are followed down to the observation, which is tighter. Both keep middle and half-difference of
the two functions instead of the two themselves: then W @ middle and |W| @ half are all that a layer costs, in either
direction, and what only widens a bound can be computed in float32.

Every affine node adds an unknown e, |e| <= delta, to its exact value: what float32 execution may add, in any order of
summation. The e's are treated like any other bounded unknown, so their effect on the output is carried through the
same relaxation. The arithmetic of this module itself is bounded the same way and added. docs/soundness.md has the
argument, step by step.

Arrays on which much is computed may be those of any library with the array API standard (`Backend`); lines around
functions, a small part, are found by NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from .network import Affine, Elementwise, Network, Node, Normalize
from .region import UNIT
from .relax import INFLATE, Touch, natural, relax

Array = NDArray[np.float64]

UNIT32 = 2.0**-24  # unit roundoff of float32
TINY32 = 2.0**-126  # smallest normal float32: what rounding a denormal, or taking it for zero, changes at most
SHORT = 1.0 + 2.0**-19  # covers the rounding of short sums of error bounds in float32: up to 30 roundings
HUGE32 = 2.0**126  # partial sums below this cannot overflow float32
BACKWARD_SIZE = 128 * 128  # largest weight matrix whose node is worth a backward pass of its own
EXECUTION_TERMS = 3  # roundings of each summed term itself: a product, and constants that were rounded when read
DESCENTS, RATE, BENT, DECAY, PROBE = (
    16,
    0.03,
    0.3,
    0.9,
    1e-4,
)  # of lines: steps, first step (of slopes), its shrinking; and for differences


def gamma(terms: Any, unit: float | None = None) -> Any:
    """Higham's gamma_k = k u / (1 - k u): relative error of a sum of k rounded terms, in any order; float32's u if not
    given. Infinite where it says nothing."""
    product = terms * (UNIT32 if unit is None else unit)
    if isinstance(product, float):
        return product / (1.0 - product) if product < 0.5 else np.inf
    return product / ((1.0 - product) * (product < 0.5))


def sum_error(terms: Any, largest: Any, volume: Any, xp: Any = np) -> Any:
    """What a float32 sum of rounded products, in any order, may be off by.

    An addition errs by at most u times its result (Higham, Accuracy and Stability, eq. 4.3), and whatever the order,
    that is the sum of some of the terms: at most `largest`, the larger one of the sum of all positive and the sum of
    all negative terms. Never more than gamma_k (eq. 4.4) times the sum of all magnitudes.

    Args:
        terms: how many are not zero, the bias apart. volume: sum of their magnitudes.
    """
    added = (terms + 1.0) * UNIT32 * (1.0 + gamma(terms + EXECUTION_TERMS + 1.0))
    sharp = added * largest
    sharp += gamma(EXECUTION_TERMS + 1.0) * volume
    return xp.minimum(sharp, gamma(terms + EXECUTION_TERMS) * volume)  # the plain one is less for very few terms


@dataclass(frozen=True)
class Backend:
    """Where the products are computed.

    Attributes:
        xp: a namespace of the array API standard. array, host: from NumPy to its arrays, and back.
        single: the type of what only widens a bound. The rounding terms are those of float32 in any case.
    """

    xp: Any
    array: Callable[[NDArray[Any]], Any]
    host: Callable[[Any], NDArray[Any]]
    single: str = "float32"


class _NumPy:
    """NumPy's namespace, with the standard's names that 1.26 lacks; and without a few slow wrappers."""

    def __init__(self) -> None:
        vars(self).update(vars(np), concat=np.concatenate, permute_dims=np.transpose, astype=np.ndarray.astype)
        self.all = np.ndarray.all


NUMPY = Backend(_NumPy(), lambda x: x, lambda x: x)


@dataclass(frozen=True)
class _Matrix:
    """W of an affine node, [n, k], or [n] for a diagonal; |W|, and the largest sum of a row of it."""

    double: Any
    single: Any
    magnitude: Any
    mass: float

    @property
    def dense(self) -> bool:
        return self.double.ndim == 2


_KEPT: WeakKeyDictionary[Affine, dict[Backend, tuple[list[_Matrix], Any]]] = WeakKeyDictionary()


def _matrices(node: Affine, backend: Backend) -> tuple[list[_Matrix], Any]:
    """A node's matrices and bias, made once per policy."""
    kept = _KEPT.setdefault(node, {})
    if backend not in kept:
        matrices = []
        for weight in node.weights:
            single = weight.astype(backend.single)
            mass = np.abs(weight) if weight.ndim == 1 else np.abs(weight).sum(axis=1)
            double, single, magnitude = (backend.array(k) for k in (weight, single, np.abs(single)))
            matrices.append(_Matrix(double, single, magnitude, float(mass.max(initial=0.0)) * INFLATE))
        kept[backend] = matrices, backend.array(node.bias)
    return kept[backend]


@dataclass
class _Form:
    """constant + middle @ zeta +- (half + tilt @ zeta) encloses a node [n] over B regions.

    Attributes:
        constant, half: [n, B]. middle, tilt: float32 [n, d, B]; tilt is None where it is zero.
        swing: [n, B] at least the sum over d of |middle| + |tilt|.
    """

    constant: Any
    half: Any
    middle: Any
    tilt: Any | None
    swing: Any


@dataclass
class _Known:
    """The range [n, B] of a node, and a form where one was wanted."""

    low: Any
    high: Any
    form: _Form | None = None

    def sides(self, xp: Any, single: Any) -> tuple[Any, Any]:
        """Twice the sum and twice the difference of how far the range reaches above and below zero, to 4 roundings
        (magnitudes are faster than choices; NaN stays NaN)."""
        low, high = xp.astype(self.low, single), xp.astype(self.high, single)
        above, below = xp.abs(high), xp.abs(low)
        reach, apart = high - low, high + low
        reach += above
        reach += below
        apart += above
        apart -= below
        return reach, apart


@dataclass
class _Bend:
    """Lines of an elementwise node, [B, n]: (mean +- bend) z + shift +- gap; and how many have slopes [B].

    Attributes:
        node, low, high, touch: what the lines were made for (relax.relax), [n, B], on the host.
    """

    node: Elementwise
    low: Array
    high: Array
    touch: Touch | None
    mean: Any
    bend: Any
    shift: Any
    gap: Any
    bent: Any  # bend is not zero
    live: Any  # bend or mean is not zero


@dataclass
class _Slip:
    """Rounding of an affine node: |executed - exact|, and what float64 adds here, <= delta; |W| @ |source| + |bias| <=
    volume, both float32 [B, n]; and what underflow adds to a product with its matrices [B]."""

    delta: Any
    volume: Any
    tiny: Any


@dataclass
class _Scale:
    """A normalisation [n] around u0: y = keep * (s u - rank (u0 . u) u0) + shift +- gap; [B, n], s and rank [B]."""

    s: Any
    rank: Any
    u0: Any
    keep: Any
    shift: Any
    gap: Any

    def rows(self, coefficient: Any) -> Any:
        """coefficient @ (y - shift) as a combination of u: [B, r, n]."""
        kept = coefficient * self.keep[:, None, :]
        along = _dot(kept, self.u0) * self.rank[:, None]
        return kept * self.s[:, None, None] - along[:, :, None] * self.u0[:, None, :]


@dataclass(frozen=True)
class Cut:
    """That a part of a region, center + generators @ eta, lies in the region's ball: zeta = middle + eta / inverse
    does, up to `blur` an axis.

    Attributes:
        middle, inverse: [B, d], zero beside the ball. blur: [B].
    """

    middle: Any
    inverse: Any
    blur: Any

    def reach(self, xp: Any, x: Any) -> Any:
        """At least the largest value [n, B] of x [n, d, B] . eta, in float64, its rounding included."""
        ones, slope = xp.ones_like(x[0, :, 0]), x * self.inverse.T
        beside = ones @ xp.abs(x * (1.0 - xp.astype(self.inverse.T > 0.0, x.dtype)))
        room = (self.blur + 8 * (x.shape[1] + 8) * UNIT) * (ones @ xp.abs(slope) + beside)
        return beside + xp.sqrt(ones @ (slope * slope)) - ones @ (slope * self.middle.T) + room + 2.0**-500


class Relaxed:
    """A policy over B regions with every elementwise node replaced by lines and every rounding by an unknown."""

    def __init__(
        self,
        network: Network,
        center: Array,
        generators: Array,
        effort: str = "backward",
        backend: Backend = NUMPY,
        ball: NDArray[np.bool_] | None = None,
        cut: Cut | None = None,
        lean: bool = False,
    ) -> None:
        """{center + generators @ zeta}: |zeta| <= 1, and of the columns in `ball` [B, d] the 2-norm, too; what `cut`
        tells of a part. `lean`: keep what `bent` of `backward` needs."""
        self.ball = backend.array(ball.astype(float)) if ball is not None and (cut or ball.any()) else None
        self.cut = Cut(*(backend.array(k) for k in vars(cut).values())) if cut else None
        self.network, self.backend, self.xp, self.array = network, backend, backend.xp, backend.array
        self.single, self.count = getattr(backend.xp, backend.single), len(center)
        self.center, self.generators = self.array(center), self.array(generators)
        self.reach = self.array(np.abs(center) + np.abs(generators) @ np.ones(generators.shape[2]))  # [B, n], of |x|
        self.flat = effort == "interval"
        self.columns = 0 if self.flat else generators.shape[2]
        self.bends: dict[int, _Bend] = {}
        self.slips: dict[int, _Slip] = {}
        self.scales: dict[int, _Scale] = {}
        self.leans: dict[int, Any] = {}
        self.matrices = {k: _matrices(n, backend) for k, n in enumerate(network.nodes, 1) if isinstance(n, Affine)}
        self.known: list[_Known] = [self._observation()]
        wanted, alone, self.sole = _plan(network, effort in ("interval", "forward"))
        last = {source: index for index, node in enumerate(network.nodes, start=1) for source in node.sources}
        for index, node in enumerate(network.nodes, start=1):
            if isinstance(node, Affine):
                known = self._affine(index, node, wanted[index])
                if alone[index]:
                    low, high = self._span(index, self.array(np.eye(node.size)[None]))
                    known.low, known.high = (self._tighter(a, b.T) for a, b in ((known.low, low), (-known.high, -high)))
                    known.high = -known.high
            elif isinstance(node, Normalize):
                known = self._normalize(index, node, wanted[index])
            else:
                known = self._elementwise(index, node, wanted[index])
            if self.flat and not isinstance(node, Affine):
                assert known.form is not None
                known.form.constant = 0.5 * (known.low + known.high)
                known.form.half = (0.5 + 4 * UNIT) * (known.high - known.low) + 4 * UNIT * self.xp.abs(known.low)
            self.known.append(known)
            # forms go as soon as they have been read: memory that was in use just now is several times faster
            for source in set(node.sources):
                form = self.known[source].form
                if form is not None and last[source] == index:
                    if lean:
                        self.leans[source] = form.middle
                    self.known[source].form = None

    def _zeros(self, *shape: int) -> Any:
        return self.array(np.zeros(shape))

    def _total(self, x: Any) -> Any:
        """[n, B] -> [1, B], float64."""
        return self.xp.astype(_ones(self.backend, x.shape[0], x.dtype) @ x, self.xp.float64)  # faster than a sum

    def _narrow(self, x: Any) -> Any:
        """As the type of what only widens a bound; a number fits any."""
        return x if isinstance(x, float) else self.xp.astype(x, self.single)

    def _tighter(self, low: Any, other: Any) -> Any:
        """The larger one, where it is known."""
        return self.xp.where(other > low, other, self.xp.where(low == low, low, other))

    def _observation(self) -> _Known:
        """A float32 observation enters exactly; its form is off by the rounding of its slopes to float32."""
        xp, center = self.xp, self.center.T
        swing = xp.sum(xp.abs(self.generators), axis=2).T
        columns = xp.permute_dims(self.generators, (1, 2, 0))
        below, above = (swing, swing) if self.ball is None else (self._reach(-columns), self._reach(columns))
        slip = 4 * (self.generators.shape[2] + 2) * UNIT * (xp.abs(center) + swing)
        below, above = below + slip, above + slip
        middle = xp.astype(columns[:, : self.columns], self.single)
        half = xp.maximum(below, above) if self.flat else UNIT32 * swing + self.columns * TINY32
        form = _Form(center, half * INFLATE, middle, None, 0.0 * swing if self.flat else swing * (1.0 + 2 * UNIT32))
        return _Known(center - below, center + above, form)

    def _affine(self, index: int, node: Affine, wanted: bool) -> _Known:
        """sum_k W_k @ source_k + bias, and what its execution in float32 may add.

        Rounding here, with g = gamma32(terms that are not zero): a float32 product of slopes errs by at most
        g |W| @ swing, which is added to half *before* that is multiplied by |W| (`spread`). A float32 sum of positive
        terms, |W| @ spread or |W| @ reach, is too small by a factor of 1 - g at most (`grown`). What underflows adds
        TINY32 per operation and, where a factor is taken for zero, times the other factor (`flush`).
        """
        xp, columns = self.xp, self.columns
        matrices, bias = self.matrices[index]
        sources = [self.known[s] for s in node.sources]
        depth = sum(m.double.shape[1] if m.dense else 1 for m in matrices) + 2 * len(matrices) + 4
        terms = sum(self._alive(s, m) for s, m in zip(node.sources, matrices, strict=True))
        relative = gamma(terms + 2 * len(matrices) + 4)
        constant = bias[:, None]
        flushed = flush = self._zeros(1, self.count)
        magnitude = balance = slop = middle = tilt = None
        for source, matrix in zip(sources, matrices, strict=True):
            reach, apart = source.sides(xp, self.single)
            flushed = flushed + self._total(reach)
            balance = _plus(balance, _times(matrix.single, apart))
            magnitude = _plus(magnitude, _times(matrix.magnitude, reach))
            if not wanted:
                continue
            form = source.form
            assert form is not None
            spread = relative * form.swing
            spread += form.half
            flush = flush + self._total(spread) + self._total(form.swing)
            middle = _plus(middle, _times(matrix.single, form.middle))
            constant = constant + _times(matrix.double, form.constant)
            if form.tilt is not None:
                tilt = _plus(tilt, _times(matrix.magnitude, form.tilt))
            slop = _plus(slop, _times(matrix.magnitude, xp.astype(spread, self.single)))
        # From here on in place, and in float32, which SHORT pays for: passes over memory are what it costs.
        grown = self._narrow(_grown(relative, xp))
        mass = TINY32 * (2 * columns + 4) * (2 * depth + sum(m.mass for m in matrices))
        flush = self._narrow(SHORT * (TINY32 * (flush + flushed) + mass))
        single = self._narrow(bias)[:, None]
        volume = magnitude * (0.5 * grown)
        volume += flush
        volume += SHORT * xp.abs(single)
        balance += 2.0 * single
        largest = xp.abs(balance)
        largest *= 0.25 * SHORT
        largest += volume * (0.5 * SHORT * grown)
        terms = self._narrow(terms)
        delta = sum_error(terms, largest, volume, xp)
        # The float64 sums here are over `depth` terms, those of the backward pass over node.size: they err by 4 gamma
        # times `volume`, of which delta is at least 2^-23. (So SHORT alone covers some roundings of the constant, too.)
        delta *= SHORT * SHORT + 2.0**25 * gamma(float(depth + node.size), UNIT)
        # as executed: each product and sum may be flushed to zero, each factor taken for zero, where it is denormal
        delta += mass + TINY32 * (2 * terms + 8) + flush
        if not bool(xp.all(volume < HUGE32)):
            delta = xp.where(volume < HUGE32, delta, xp.inf)  # may overflow: nothing can be said
        tiny = 4 * node.size * TINY32 * (self._total(volume) + flushed + 1.0)[0]
        self.slips[index] = _Slip(_rows(delta), _rows(volume), tiny)
        if not wanted:
            return _Known(self._zeros(*delta.shape) - xp.inf, self._zeros(*delta.shape) + xp.inf)
        # |constant| <= peak + half: the executed value at zeta = 0 lies in both
        half = slop * grown
        half += delta
        half += flush
        return self._ranged(constant, half, middle, tilt)

    def _alive(self, index: int, matrix: _Matrix) -> Any:
        """How many terms of a sum over a node are not exactly zero, a number or [1, B]; 1 for a diagonal matrix."""
        source = self.known[index]
        if not matrix.dense or (index > 0 and _never_zero(self.network.nodes[index - 1])):
            return float(matrix.double.shape[1] if matrix.dense else 1)
        alive = (source.high != 0.0) | (source.low != 0.0)
        if source.form is not None:
            alive = alive | (source.form.half > 0.0) | (source.form.swing > 0.0)
        if bool(self.xp.all(alive)):
            return float(matrix.double.shape[1])
        return self._total(self.xp.astype(alive, self.xp.float64))

    def _ranged(self, constant: Any, half: Any, middle: Any, tilt: Any | None) -> _Known:
        """A form with its swing and range. Sums of float32 magnitudes are too small by a factor of 1 - g at most; the
        rounding of `constant` is part of `half`, which is float32."""
        xp, single, tiny = self.xp, 2.0 * gamma(self.columns + 8.0), 4 * self.columns * TINY32
        if tilt is None:
            below = above = self._sum(middle)
            swing = below * (1.0 + single)
        else:
            below, above = self._sum(tilt - middle), self._sum(tilt + middle)
            swing = below + above
            swing *= 1.0 + 2 * single
        swing += tiny
        if self.ball is not None:
            ends = (-middle, middle) if tilt is None else (tilt - middle, tilt + middle)
            below, above = (self._reach(k) for k in ends)
        room = single * swing
        room += SHORT * half
        room += tiny
        low, high = constant - xp.astype(below + room, xp.float64), constant + xp.astype(above + room, xp.float64)
        half, swing = (xp.astype(k, xp.float64) for k in (half, swing))
        return _Known(low, high, _Form(constant, half, middle, tilt, swing))

    def _sum(self, x: Any, axis: int = 1) -> Any:
        """Of magnitudes over one of three axes, the middle or the last: as a product, as `_total`."""
        ones, x = _ones(self.backend, x.shape[axis], x.dtype)[0], self.xp.abs(x)
        return ones @ x if axis == 1 else x @ ones

    def _reach(self, x: Any) -> Any:
        """Largest value of x [n, d, B] . zeta over the regions [n, B]; errs as `_sum`, relative to what that gives.

        With a ball: the 1-norm over the columns of the box, the 2-norm over those of the ball, in float64, where the
        square of a float32 number does not underflow; that of a float64 number may, which the last term covers.
        """
        if self.ball is None or self.columns == 0:
            return self._sum(x)
        xp = self.xp
        whole, ball = xp.astype(x, xp.float64), self.ball.T
        squares = _ones(self.backend, x.shape[1], whole.dtype)[0] @ (whole * whole * ball)
        own = self._sum(x * xp.astype(1.0 - ball, x.dtype)) + xp.sqrt(squares) + x.shape[1] * 2.0**-511
        return own if self.cut is None else xp.minimum(own, self.cut.reach(xp, whole))

    def _lines(self, node: Elementwise, low: Array, high: Array, touch: Touch | None = None) -> tuple[_Bend, list[Any]]:
        """The lines of an elementwise node, and what its form needs of them: slopes of both, and its range."""

        lines = relax(node, low, high, touch)
        absolute, relative = (k * INFLATE for k in node.facts.execution(node.parameters))
        execution: Any = absolute + relative * np.maximum(-low, high) if relative else absolute
        mean, bend = lines.slope_high + lines.slope_low, lines.slope_high - lines.slope_low
        shift, gap = lines.high + lines.low, lines.high - lines.low
        for half in (mean, bend, shift):
            half *= 0.5
        # rounding of what is done with these lines, here and (over node.size terms) in the backward pass
        gap *= 0.5 * INFLATE
        rounding = (16 * (node.size + 12) * UNIT) * lines.size
        rounding += execution
        gap += rounding
        if node.function == "relu":  # an inactive one is exactly zero, whatever was padded
            gap = np.where(high <= 0.0, 0.0, gap)
        bent = live = np.full(low.shape[1], float(node.size))
        if not _never_zero(node):
            bent, live = (np.ones(node.size) @ k for k in (bend != 0.0, (bend != 0.0) | (mean != 0.0)))
        rows = [self.array(np.ascontiguousarray(k.T)) for k in (mean, bend, shift, gap)]
        rows += [self.array(bent), self.array(live)]
        bottom, top = lines.bottom - execution, lines.top + execution
        columns = (mean, bend, lines.slope_low, lines.slope_high, shift, gap, bottom, top)
        return _Bend(node, low, high, touch, *rows), [self.array(k) for k in columns]

    def _elementwise(self, index: int, node: Elementwise, wanted: bool) -> _Known:
        xp, source = self.xp, self.known[node.source]
        self.bends[index], columns = self._lines(node, self.backend.host(source.low), self.backend.host(source.high))
        mean, bend, a_l, a_u, shift, gap, bottom, top = columns
        known, form = _Known(bottom, top), source.form
        if not wanted:
            return known
        assert form is not None
        # upper = a_u (m + h) + b_u, or a_u (m - h) + b_u if a_u < 0; the lower one alike
        over, under = bend, mean
        if node.facts.shape(node.parameters) != "odd" and not bool(xp.all((a_l >= 0.0) & (a_u >= 0.0))):
            steep_l, steep_u = xp.abs(a_l), xp.abs(a_u)
            over, under = 0.5 * (steep_u - steep_l), 0.5 * (steep_u + steep_l)
        steepest = under + xp.abs(over)  # at most twice `under`
        # float32: 3 roundings of products that sum to at most steepest * swing, twice
        swing = steepest * form.swing
        slack = (8 * UNIT32) * swing
        slack += (8 * TINY32) * (self._total(form.swing) + self.columns * (self._total(steepest) + 1.0))
        if not _never_zero(node):
            slack = xp.where(steepest > 0.0, slack, 0.0)
        constant = mean * form.constant
        constant += over * form.half
        constant += shift
        half = ((1.0 + 64 * UNIT) * under) * form.half
        half += bend * form.constant
        half += gap
        half += slack
        swing += slack
        mean, bend = (xp.astype(k, self.single)[:, None, :] for k in (mean, bend))
        middle, tilt = mean * form.middle, bend * form.middle
        if form.tilt is not None:
            over, under = (xp.astype(k, self.single)[:, None, :] for k in (over, under))
            middle += over * form.tilt
            tilt += under * form.tilt
        known.form = _Form(constant, half, middle, tilt, swing)
        return known

    def _normalize(self, index: int, node: Normalize, wanted: bool) -> _Known:
        """y = u q^-1/2, q = mean(u^2) + epsilon, to second order around u0, the middle of u's range.

        With q0, s = q0^-1/2 those of u0, d = u - u0, t = 2 mean(u0 d), w = mean(d^2) and D = q - q0 = t + w,
        y_j = s u_j - s^3/2 t u0_j - s^3/2 (u0_j w + d_j D) + u_j R(D), R(D) = (q0 + D)^-1/2 - s + s^3 D / 2. The first
        two terms are affine in u, the others make up `gap`: w is bounded entry by entry, t as the affine function that
        it is, and R is convex with its least value, zero, at D = 0. (With s and q0 as computed, all of this holds up to
        a rounding that `tiny` and `double` cover.) Execution: docs/soundness.md, "Normalisation".
        """
        xp, n, source = self.xp, node.size, self.known[node.source]
        u0, peak = 0.5 * (source.low + source.high), xp.maximum(-source.low, source.high)
        radius = xp.maximum(source.high - u0, u0 - source.low) * INFLATE
        double = 8 * gamma(n + 16.0, UNIT)
        norm = self._total(u0 * u0)[0] / n
        q0 = norm + node.epsilon
        s, rank = q0**-0.5, q0**-1.5 / n
        low, high = self._span(node.source, (2.0 / n) * u0.T[:, None, :])
        tiny = double * (q0 + 2 * norm + (2.0 / n) * self._total(xp.abs(u0) * peak)[0])
        w = self._total(radius * radius)[0] * (INFLATE / n) + tiny
        nearest = xp.where(source.low > 0.0, source.low, xp.where(source.high < 0.0, source.high, 0.0))
        below, above = low[:, 0] - 2 * norm - tiny, high[:, 0] - 2 * norm + w + tiny
        least = xp.maximum(self._total(nearest * nearest)[0] / n + node.epsilon, q0 + below) * (1.0 - double) - tiny
        least = xp.where(least > 0.0, least, xp.nan)
        below = xp.maximum(below, least - q0 - tiny)

        def rest(change: Any) -> Any:
            return xp.maximum(q0 + change, least) ** -0.5 - s + 0.5 * s**3 * change

        farthest = xp.maximum(xp.abs(below), xp.abs(above))
        bow = xp.maximum(rest(below), rest(above)) + double * (s + s**3 * farthest + least**-0.5)
        gap = 0.5 * s**3 * (xp.abs(u0) * w + radius * farthest) + peak * bow
        largest = peak * least**-0.5
        largest = xp.where(largest < n**0.5, largest, n**0.5) * INFLATE
        squared = self.known[node.squared]
        squares = self._total(xp.maximum(-squared.low, squared.high) ** 2)[0] * (INFLATE / n)
        # sums of squares of u itself err relative to what they are; mean(x^2) - mean(x)^2 cancels
        total = least if node.squared == node.source else squares + node.epsilon
        error = 8 * gamma(n + 4.0) * total + 16 * (n + 4) * TINY32 * (1.0 + squares)
        relative = xp.where((error <= 0.25 * least) & (n * squares < HUGE32), error / least, xp.nan) * INFLATE
        execution = ((relative + gamma(8.0)) * largest + 2 * TINY32 * (1.0 + least**-0.5)) * INFLATE
        # rounding of what is done with all this
        size = s * peak + rank * xp.abs(u0) * self._total(xp.abs(u0) * (peak + xp.abs(u0)))
        gap = gap * INFLATE + 4 * double * size
        keep = xp.astype(gap < largest, xp.float64)
        gap = xp.where(gap < largest, gap, largest) + execution
        shift = keep * (rank * n * norm) * u0
        self.scales[index] = _Scale(s, rank, *(_rows(k) for k in (u0, keep, shift, gap)))
        # the range: that of u times that of q^-1/2
        steep, gentle, room = least**-0.5, (q0 + above) ** -0.5, execution + double * largest
        bottom = xp.where(source.low < 0.0, source.low * steep, source.low * gentle)
        top = xp.where(source.high > 0.0, source.high * steep, source.high * gentle)
        known, form = _Known(xp.maximum(bottom, -largest) - room, xp.minimum(top, largest) + room), source.form
        if not wanted:
            return known
        assert form is not None
        own, other = keep * s, keep * rank * xp.abs(u0)
        diagonal = own - 2 * other * xp.abs(u0)

        def spread(h: Any) -> Any:
            """|A| h for the matrix A of `_Scale`, whose diagonal is not negative."""
            more = (slice(None),) + (None,) * (h.ndim - 2)
            return diagonal[more] * h + other[more] * xp.sum(xp.abs(u0)[more] * h, axis=0)

        constant = own * form.constant - keep * rank * u0 * self._total(u0 * form.constant) + shift
        swing = (own * form.swing + other * self._total(xp.abs(u0) * form.swing)) * (1.0 + 8 * UNIT32)
        slack = 8 * UNIT32 * swing + 8 * self.columns * TINY32 + 4 * double * spread(form.half)
        middle = xp.astype(form.middle, xp.float64)
        along = xp.sum(u0[:, None, :] * middle, axis=0)
        middle = own[:, None, :] * middle - (keep * rank * u0)[:, None, :] * along
        tilt = None if form.tilt is None else xp.astype(spread(xp.astype(form.tilt, xp.float64)), self.single)
        half = spread(form.half) + gap + slack
        known.form = _Form(constant, half, xp.astype(middle, self.single), tilt, swing)
        return known

    def _span(self, index: int, rows: Any) -> tuple[Any, Any]:
        """Range [B, r] of rows [1 or B, r, n] @ node `index`, by a backward pass."""
        middle, tilt, constant, half = self.backward(index, rows)
        constant, half = constant + _dot(middle, self.center), half + _dot(tilt, self.center)
        middle, tilt = middle @ self.generators, tilt @ self.generators
        self.leans[index] = self.xp.permute_dims(middle, (1, 2, 0))
        # `half` has room for the rounding of these, too
        below, above = (self._swing(k) for k in (tilt - middle, tilt + middle))
        return constant - half - below, constant + half + above

    def _swing(self, x: Any) -> Any:
        """`_reach` of x [B, r, d]: [B, r]."""
        if self.ball is None:
            return self._sum(x, 2)
        return self._reach(self.xp.permute_dims(x, (1, 2, 0))).T

    def forward(self, rows: Array, transform: Array) -> tuple[Any, Any, Any, Any]:
        """As `backward` from the output, but from its form: each function of zeta is given slopes in x, and what that
        leaves over is added to `half`."""
        xp, form, matrix = self.xp, self.known[-1].form, self.array(rows)
        assert form is not None
        inputs, room = self.network.inputs, 8 * gamma(matrix.shape[1] + 8.0, UNIT)
        size = xp.abs(form.constant) + form.half + form.swing
        constants = [(matrix @ form.constant).T, (xp.abs(matrix) @ (form.half + room * size)).T]
        slopes = [(matrix, form.middle), (xp.abs(matrix), form.tilt)]
        found, over = [], 16 * UNIT * xp.abs(constants[0])
        for k, (of, slope) in enumerate(slopes):
            if self.flat or slope is None:
                found.append(self._zeros(self.count, len(rows), inputs))
                continue
            slope = xp.permute_dims(_times(of, xp.astype(slope, xp.float64)), (2, 0, 1))
            found.append(slope @ self.array(transform))
            constants[k] = constants[k] - _dot(found[k], self.center)
            over = over + self._sum(slope - found[k] @ self.generators, 2)
            over = over + 16 * (inputs + 8) * UNIT * _dot(xp.abs(found[k]), self.reach)
        return found[0], found[1], constants[0], constants[1] + over * INFLATE

    def backward(
        self, start: int, rows: Any, bent: Array | None = None, trace: dict[int, Any] | None = None
    ) -> tuple[Any, Any, Any, Any]:
        """rows @ node `start` lies within (constant + middle @ x) +- (half + tilt @ x).

        Args:
            rows: [1 or B, r, n].
            bent: [B, n], to which is added how far each axis of the region moves what bends (if `lean`).
            trace: filled with the coefficients of every elementwise node.

        Returns:
            middle, tilt [B, r, n], constant, half [B, r].
        """
        xp, nodes = self.xp, self.network.nodes
        zero = self._zeros(self.count, rows.shape[1])
        constant, half, slack = zero, zero, zero
        pending: dict[int, tuple[Any, Any, Any]] = {start: (rows, None, zero[:, 0])}
        for index in range(start, 0, -1):
            if index not in pending:
                continue
            middle, tilt, terms = pending.pop(index)
            node = nodes[index - 1]
            if isinstance(node, Affine):
                slip, (matrices, bias) = self.slips[index], self.matrices[index]
                bias = bias[:, None]
                constant = constant + _rows_times(middle, bias)[..., 0]
                half = half + _dot(xp.abs(middle), xp.astype(slip.delta, xp.float64))
                if tilt is not None:
                    half = half + _rows_times(xp.astype(tilt, xp.float64), bias)[..., 0] + slip.tiny[:, None]
                    tilt = xp.astype(tilt, self.single)
                    # a product in float32, of `terms` that are not zero, up to 3 roundings in a coefficient and one in
                    # a weight; underflow, also of the coefficients themselves
                    own = self._narrow(SHORT * gamma(terms + 4.0))[:, None] * slip.volume
                    own += slip.delta
                    own = xp.astype(_dot(xp.abs(tilt), own), xp.float64)
                    half = half + (1.0 + 2.0 * gamma(node.size + 8.0)) * own
                found = []
                for source, matrix in zip(node.sources, matrices, strict=True):
                    product = None if tilt is None else xp.astype(_rows_times(tilt, matrix.single), xp.float64)
                    found.append(
                        (source, _rows_times(middle, matrix.double), product, zero[:, 0] + matrix.double.shape[-1])
                    )
            elif isinstance(node, Normalize):
                scale = self.scales[index]
                constant = constant + _dot(middle, scale.shift)
                half = half + _dot(xp.abs(middle), scale.gap)
                if tilt is not None:
                    half = half + _dot(tilt, scale.shift) + _dot(xp.abs(tilt), scale.gap)
                    tilt = scale.rows(tilt)
                found = [(node.source, scale.rows(middle), tilt, zero[:, 0] + float(node.size))]
            else:
                line = self.bends[index]
                mean, bend = line.mean[:, None, :], line.bend[:, None, :]
                constant = constant + _dot(middle, line.shift)
                if bent is not None:
                    moved = xp.abs(self.leans[node.source])
                    weight = xp.sum(xp.abs(middle), axis=1) * xp.abs(line.bend)
                    bent += self.backend.host(xp.sum(xp.astype(moved, xp.float64) * weight.T[:, None, :], axis=0).T)
                if tilt is None:
                    size = xp.abs(middle)
                    half = half + _dot(size, line.gap)
                    traced, narrow = (None, size), size
                    if self.sole[node.source]:  # in float32: its reader pays for the rounding, and here for underflow
                        half = half + xp.max(size, axis=2) * self.slips[node.source].tiny[:, None]
                        narrow, bend = self._narrow(size), self._narrow(bend)
                    found = [(node.source, middle * mean, narrow * bend, line.bent)]
                else:
                    over, down, bend = abs(middle + tilt), abs(middle - tilt), 0.5 * bend  # in place, unlike xp.abs
                    under = over + down  # twice what docs/soundness.md calls so
                    over -= down
                    del down
                    constant = constant + 0.5 * _dot(over, line.gap)
                    half = half + _dot(tilt, line.shift) + 0.5 * _dot(under, line.gap)
                    if trace is not None:
                        traced = 0.5 * over, 0.5 * under
                    over *= bend
                    under *= bend
                    over += middle * mean
                    under += tilt * mean
                    found = [(node.source, over, under, line.live)]
                if trace is not None:
                    trace[index] = middle, tilt, *traced
            slack = slack + 4 * UNIT * (xp.abs(constant) + xp.abs(half))
            for source, m, t, terms in found:
                if source in pending:
                    other = pending[source]
                    m, t, terms = other[0] + m, _plus(other[1], t), other[2] + terms
                pending[source] = m, t, terms
        nothing = self._zeros(self.count, rows.shape[1], self.network.inputs)
        middle, tilt, _ = pending.get(0, (nothing, None, None))
        middle, tilt = middle + nothing, nothing if tilt is None else tilt
        # Last rounding: of the sums above, and of evaluating coefficient @ x anywhere in the region, in float64.
        swing = _dot(xp.abs(middle) + xp.abs(tilt), self.reach)
        depth = len(nodes) + self.network.inputs + 8
        slack = slack + 8 * depth * UNIT * (swing + xp.abs(constant) + xp.abs(half) + slack)
        return middle, tilt, constant, half + slack * INFLATE

    def optimised(self, rows: Array) -> tuple[Any, Any, Any, Any]:
        """`backward` from the output with lines of its own for each region and row, chosen by descent.

        What is minimised is the largest value of half + tilt @ x in the region. At its corner it is a function of the
        coefficients, of which `trace` is the one pass; a pass forward from the corner gives the other factors of the
        gradient with respect to each line. Every step's result is a sound bound, and the best is kept.
        """
        xp, count, last = self.xp, len(rows), len(self.network.nodes)
        many = copy(self)
        many.count = self.count * count
        many.center, many.generators, many.reach = (
            self._each(k, count) for k in (self.center, self.generators, self.reach)
        )
        many.ball = None if self.ball is None else self._each(self.ball, count)
        many.slips = {i: _Slip(*(self._each(v, count) for v in vars(k).values())) for i, k in self.slips.items()}
        many.scales = {i: _Scale(*(self._each(v, count) for v in vars(k).values())) for i, k in self.scales.items()}
        many.bends, touch = {}, {}
        for index, line in self.bends.items():
            low, high = (np.repeat(k, count, axis=1) for k in (line.low, line.high))
            touch[index] = natural(line.node, low, high)
            many.bends[index], _ = many._lines(line.node, low, high, touch[index])
        wanted = self.array(np.tile(rows, (self.count, 1))[:, None, :])
        best: list[Any] = []
        pull: dict[int, Touch] = {}
        for step in range(DESCENTS):
            trace: dict[int, Any] = {}
            found = many.backward(last, wanted, trace=trace)
            slope = found[1] @ many.generators
            corner = xp.sign(slope)
            if many.ball is not None:
                size = xp.sqrt(xp.sum(slope * slope * many.ball[:, None, :], axis=2))[..., None] + TINY32
                corner = xp.where(many.ball[:, None, :] > 0.0, slope / size, corner)
            value = found[3] + _dot(found[1], many.center) + many._swing(slope)
            if step == 0:
                best, least = list(found), value
            else:
                better = value < least
                least = xp.where(better, value, least)
                best = [
                    xp.where(better[..., None] if b.ndim > 2 else better, f, b)
                    for f, b in zip(found, best, strict=True)
                ]
            at = many.center + (many.generators @ corner[:, 0, :, None])[..., 0]
            many._descend(trace, at, touch, pull, DECAY**step)
        middle, tilt, constant, half = (xp.reshape(k, (self.count, count, *k.shape[2:])) for k in best)
        return middle, tilt, constant, half

    def _each(self, x: Any, count: int) -> Any:
        """[B, ...] -> [B * count, ...], each entry `count` times."""
        return self.xp.reshape(self.xp.stack([x] * count, axis=1), (-1, *x.shape[1:]))

    def _descend(
        self, trace: dict[int, Any], corner: Any, touch: dict[int, Touch], pull: dict[int, Touch], rate: float
    ) -> None:
        """One step of all lines. `middle` and `tilt` are the derivatives of half + tilt @ corner with respect to a
        node's coefficients in the backward pass; unit rows."""
        xp, host = self.xp, self.backend.host
        middle, tilt = [0.0 * corner], [corner]
        for index, node in enumerate(self.network.nodes, start=1):
            if isinstance(node, Affine):
                matrices, bias = self.matrices[index]
                sums = [
                    sum(_times(m.double, of[s].T) for s, m in zip(node.sources, matrices, strict=True)).T
                    for of in (middle, tilt)
                ]
                middle.append(sums[0])
                tilt.append(sums[1] + bias)
            elif isinstance(node, Normalize):
                scale = self.scales[index]
                for of, constant in ((middle, 0.0), (tilt, scale.shift)):
                    u = of[node.source]
                    along = (scale.rank * xp.sum(scale.u0 * u, axis=1))[:, None]
                    of.append(scale.keep * (scale.s[:, None] * u - along * scale.u0) + constant)
            elif index not in trace:
                middle.append(0.0 * middle[node.source])
                tilt.append(0.0 * tilt[node.source])
            else:
                line, z_m, z_t = self.bends[index], middle[node.source], tilt[node.source]
                p, q, over, under = (0.0 * z_m if k is None else k[:, 0] + 0.0 * z_m for k in trace[index])
                up, down = xp.sign(p + q), xp.sign(p - q)
                apart, along = 0.5 * (up - down), 0.5 * (up + down)
                middle.append(line.mean * z_m + line.bend * (z_m * apart + z_t * along) + line.gap * along)
                tilt.append(line.mean * z_t + line.bend * (z_m * along + z_t * apart) + line.shift + line.gap * apart)
                mean, bend = p * z_m + q * z_t, over * z_m + under * z_t
                # to the slopes and offsets of the lower and of the upper line
                force = [
                    host(k).T for k in (0.5 * (mean - bend), 0.5 * (q - under), 0.5 * (mean + bend), 0.5 * (q + under))
                ]
                now = relax(line.node, line.low, line.high, touch[index])
                probe = relax(line.node, line.low, line.high, (touch[index][0] + PROBE, touch[index][1] + PROBE))
                change = [(b - a) / PROBE for a, b in zip(now[:4], probe[:4], strict=True)]
                slope = (force[0] * change[0] + force[1] * change[1], force[2] * change[2] + force[3] * change[3])
                before = pull.get(index, slope)
                pull[index] = (0.5 * (before[0] + slope[0]), 0.5 * (before[1] + slope[1]))
                far = rate * (BENT if line.node.facts.shape(line.node.parameters) == "bent" else RATE)
                low, high = (
                    np.clip(t - far * np.sign(np.nan_to_num(p)), 0.0, 1.0)
                    for t, p in zip(touch[index], pull[index], strict=True)
                )
                touch[index] = low, high
                self.bends[index], _ = self._lines(line.node, line.low, line.high, touch[index])


def _plan(network: Network, forward: bool) -> tuple[list[bool], list[bool], list[bool]]:
    """Per node: is its form wanted; does it get a backward pass of its own; is it affine, with one reader.

    Behind one layer of bends, forward and backward bounds are the same; behind more, backward is tighter, but takes a
    product per region. The output gets its backward pass from the caller.
    """
    bends, alone, last = [0], [False], len(network.nodes)
    for index, node in enumerate(network.nodes, start=1):
        affine = isinstance(node, Affine)
        bends.append(max(bends[s] for s in node.sources) + (not affine))
        small = isinstance(node, Affine) and max(w.size for w in node.weights) <= BACKWARD_SIZE
        alone.append(bool(bends[index] > 1 and small and index < last and not forward))
    wanted = [forward] * (last + 1)
    for index in range(last, 0, -1):
        for source in network.nodes[index - 1].sources:
            affine = source > 0 and isinstance(network.nodes[source - 1], Affine) and not alone[source]
            wanted[source] = wanted[source] or wanted[index] or affine
    readers = [source for node in network.nodes for source in node.sources]
    sole = [False] + [isinstance(n, Affine) and readers.count(k) == 1 for k, n in enumerate(network.nodes, start=1)]
    return wanted, alone, sole


def _never_zero(node: Node) -> bool:
    """Is it not worth counting which of a node's values, or of its lines' slopes, are exactly zero?"""
    return isinstance(node, Elementwise) and node.facts.shape(node.parameters) in ("convex", "odd")


@cache
def _ones(backend: Backend, size: int, kind: Any) -> Any:
    return backend.xp.astype(backend.array(np.ones((1, size))), kind)


def _grown(relative: Any, xp: Any) -> Any:
    """What a float32 sum of positive terms has to be multiplied by, which errs by `relative` at most."""
    if isinstance(relative, float):
        return SHORT * (1.0 + 2.0 * relative) if relative < 0.25 else np.inf
    return xp.where(relative < 0.25, SHORT * (1.0 + 2.0 * relative), xp.inf)


def _plus(a: Any | None, b: Any | None) -> Any | None:
    return b if a is None else a if b is None else a + b


def _rows(x: Any) -> Any:
    """[n, B] -> [B, n], in that order in memory."""
    return x.T.reshape((-1,)).reshape((x.shape[1], x.shape[0]))


def _dot(x: Any, y: Any) -> Any:
    """[B or 1, r, n], [B, n] -> [B, r]."""
    return y @ x[0].T if len(x) == 1 else (x @ y[:, :, None])[..., 0]


def _times(weight: Any, x: Any) -> Any:
    """W @ x for x [k, ...]; W may be a diagonal."""
    if weight.ndim == 1:
        return weight.reshape((-1,) + (1,) * (x.ndim - 1)) * x
    return (weight @ x.reshape((x.shape[0], prod(x.shape[1:])))).reshape((weight.shape[0], *x.shape[1:]))


def _rows_times(x: Any, weight: Any) -> Any:
    """x @ W for x [B, r, n], as one large product instead of one per region."""
    if weight.ndim == 1:
        return x * weight
    return (x.reshape((-1, x.shape[-1])) @ weight).reshape((*x.shape[:2], -1))
