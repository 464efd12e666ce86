"""Two lines around an elementwise function on an interval: how bounds turn a bent layer into an affine one.

The upper line supports the least concave function above f, the lower one the greatest convex function below it, and
both are meant to be tightest at the middle of the interval (CROWN: Zhang et al. 2018, arXiv:1811.00866). Slopes are
chosen freely and prove nothing: for whatever slope was chosen, the offset is the least one that can be shown to hold.
So a slope can be poor, but a line cannot be wrong.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .network import Elementwise
from .region import UNIT

Array = NDArray[np.float64]

STEPS, SEARCH, GOLDEN = 32, 20, 0.6180339887498949  # grid and search for functions without a shape of their own
STRAIGHT, FLAT = 40.0, 1e-15  # beyond 40 every smooth function's second derivative is below 1e-15
LEAN = 0.015  # of the interval: how far beyond its middle an upper line touches (where it is used, z tends to be high)
TABLE = 4096  # touching points kept per function
NARROW = 1e-12  # chords of narrower intervals are not worth their rounding
INFLATE = 1.0 + 1e-9  # covers the rounding of the short sums in which error bounds themselves are computed


class Lines(NamedTuple):
    """slope_low z + low <= f(z) <= slope_high z + high, and bottom <= f(z) <= top, for z in an interval, in exact
    arithmetic. Twice `size` is at least the magnitude of each slope * z, low and high."""

    slope_low: Array
    low: Array
    slope_high: Array
    high: Array
    bottom: Array
    top: Array
    size: Array


Touch = tuple[Array, Array]


def relax(node: Elementwise, low: Array, high: Array, touch: Touch | None = None) -> Lines:
    """Lines around the node's function.

    Args:
        low, high: the interval, of any common shape; so are the results.
        touch: what is free in the lower and the upper line, in [0, 1]: where in the interval it touches the function,
            or, for a bent function, where its slope is between those of the two pieces. `natural` ones if None.
    """
    shape = node.facts.shape(node.parameters)
    method = {"bent": _bent, "convex": _convex, "odd": _odd}.get(shape, _any)
    a_l, b_l, a_u, b_u, ends, size = method(node, low, high, touch)
    if size is None:
        size = np.maximum(np.abs(a_l), np.abs(a_u))
        size *= np.maximum(np.abs(low), np.abs(high))
        np.maximum(size, np.maximum(np.abs(b_l), np.abs(b_u)), out=size)
    if node.facts.increasing and (node.function == "clip" or min(node.parameters, default=0.0) >= 0.0):
        bottom, top = ends
        if node.function not in ("relu", "clip"):  # these only select
            room: Any = 32 * UNIT  # values of an odd one are at most 1
            if shape != "odd":
                room = 16 * UNIT * (1.0 + np.maximum(np.abs(bottom), np.abs(top)))
            bottom, top = bottom - room, top + room
    else:
        room = 8 * UNIT * size
        bottom = np.minimum(a_l * low, a_l * high) + b_l - room
        top = np.maximum(a_u * low, a_u * high) + b_u + room
    return Lines(a_l, b_l, a_u, b_u, bottom, top, size)


def natural(node: Elementwise, low: Array, high: Array) -> Touch:
    """The slope of the piece that most of the interval is on; or near the middle."""
    if node.facts.shape(node.parameters) == "bent":
        mostly = (high > -low).astype(float)
        return mostly, mostly
    lean = LEAN if node.facts.shape(node.parameters) == "odd" else 0.0
    return np.full_like(low, 0.5 - lean), np.full_like(low, 0.5 + lean)


# slope and offset below, above; f at the ends; and `Lines.size`, where it is at hand
_Found = tuple[Array, Array, Array, Array, tuple[Array, Array], Array | None]


def _bent(node: Elementwise, low: Array, high: Array, touch: Touch | None) -> _Found:
    """Linear on either side of 0: between the two pieces' slopes, a line through (0, 0) is on the inner side; the
    outer side is the chord, and an error of its slope shows at the ends."""
    left, right = (float(k) for k in node.derivative(np.array([-1.0, 1.0])))
    crossing = (low < 0.0) & (high > 0.0)
    f_low, f_high = node(low), node(high)
    chord = np.where(low >= 0.0, right, left)
    chord = np.where(crossing, (f_high - f_low) / np.where(crossing, high - low, 1.0), chord)
    inner = left + (right - left) * (touch or natural(node, low, high))[left > right]
    inner = np.where(crossing, inner, chord)
    through, zero = (f_low - chord * low, f_high - chord * high), np.zeros_like(low)
    steep = 8 * UNIT * max(abs(left), abs(right))
    pad = np.where(crossing, steep * np.maximum(high, -low), 0.0)
    if left <= right:
        return inner, zero, chord, np.maximum(*through) + pad, (f_low, f_high), None
    return chord, np.minimum(*through) - pad, inner, zero, (f_low, f_high), None


def _convex(node: Elementwise, low: Array, high: Array, touch: Touch | None) -> _Found:
    """The chord above (the difference to any line is largest at an end), a tangent below."""
    width = high - low
    middle = low + (0.5 if touch is None else touch[0]) * width
    f_low, f_high, tangent = node(low), node(high), node.derivative(middle)
    wide = width > NARROW
    chord = np.where(wide, (f_high - f_low) / np.where(wide, width, 1.0), tangent)
    above = np.maximum(f_low - chord * low, f_high - chord * high)
    below = node(middle) - tangent * middle
    peak = np.maximum(np.abs(low), np.abs(high))
    size = 16 * UNIT * (1.0 + peak + np.maximum(np.abs(f_low), np.abs(f_high)))  # no slope is above 1
    return tangent, below - size, chord, above + size, (f_low, f_high), None


def _odd(node: Elementwise, low: Array, high: Array, touch: Touch | None) -> _Found:
    """S-shaped: g = f - f(0) is odd, convex below 0 and concave above, and steepest at 0, by less than 1.2.

    Upper line over [a, b], with touching point t >= 0: for z >= 0, concavity gives g(z) <= g(t) + g'(t) (z - t), so
    with slope s, g(z) - s z <= g(t) - s t + (g'(t) - s) (z - t). The last term vanishes if s = g'(t) (its rounding is
    in the pad), and is not positive if s <= g'(t) and t = b. For z < 0 convexity puts the largest value
    of g(z) - s z at a or at 0 (or at b), which the above covers. The touching point is the given one, or if the tangent
    there cuts the curve, the point whose tangent meets the curve at a (from a table; an inexact one costs tightness
    only), or b, if that lies beyond b, with the chord's slope, which then is less. The lower line is the same, mirrored
    at (0, f(0)).
    """
    zero = float(node(np.zeros(1))[0])
    a = np.empty((2, *low.shape))
    a[0] = low
    np.negative(high, out=a[1])
    b = -a[::-1]
    g_l = node(a)
    if zero:
        g_l -= zero
    below = np.abs(a)
    below -= a
    below += 2.0  # 2 - 2a before 0
    np.divide(2.0 * (TABLE - 1), below, out=below)
    tangent = _touching_points(node.function).take(below.astype(np.int32), mode="clip")  # of NaN: any
    width = high - low
    along = 0.5 + LEAN if touch is None else np.stack([touch[1], 1.0 - touch[0]])
    t = a + along * width
    np.minimum(np.maximum(tangent, t, out=t), b, out=t)
    f_t = node(t)
    slope = node.derivative(t) if node.facts.by_value is None else node.facts.by_value(f_t)
    chord = g_l[0] + g_l[1]
    chord /= width + 1e-300  # 0 where both are 0
    change = np.minimum(np.abs(chord, out=chord), slope)  # never negative
    change -= slope
    change *= tangent >= b  # a product is faster than a choice
    slope += change
    height = f_t
    height -= slope * t
    if zero:
        height -= zero
    size = np.maximum(b[0], b[1])
    size += 1.0
    at_a = slope * a
    np.maximum(np.subtract(g_l, at_a, out=at_a), height, out=height)
    height += (16 * UNIT) * size
    if zero:
        return slope[1], zero - height[1], slope[0], zero + height[0], (zero + g_l[0], zero - g_l[1]), size
    return slope[1], -height[1], slope[0], height[0], (g_l[0], -g_l[1]), size


@cache
def _touching_points(function: str) -> Array:
    """t >= 0 where the tangent passes through (a, f(a)), for a = 1 - 1 / u and u in `TABLE` steps from 0 to 1, each
    the one for the next step: a point beyond the one that it should be gives lines that the checker's are not below."""
    node = Elementwise(0, function, 1)
    u = np.arange(TABLE) / (TABLE - 1.0)
    a = -u / np.maximum(1.0 - u, 1e-3)
    low, high = np.zeros_like(a), 1e-9 - a
    for _ in range(60):
        t = 0.5 * (low + high)
        before = node.derivative(t) * (t - a) > node(t) - node(a)
        low, high = np.where(before, t, low), np.where(before, high, t)
    found = np.where(u > 0.0, 0.5 * (low + high), 0.0)[::-1]
    return np.append(found[1:], 0.0)


def _any(node: Elementwise, low: Array, high: Array, touch: Touch | None) -> _Found:
    """Slopes from a grid; offsets from ends and kinks where f is piecewise linear, else from the grid, since a
    function with |f''| <= c lies at most c h^2 / 8 beyond its values at points h apart."""
    curvature = node.facts.curvature(node.parameters)
    points, spacing = _grid(node, low, high, STEPS if curvature else 1)
    values, middle = node(points), 0.5 * (low + high)
    beyond = np.zeros_like(low)
    if curvature:
        beyond = 0.125 * (curvature * spacing**2 + FLAT * (high - low) ** 2) * INFLATE + 1e-15
    offsets = points - middle
    peak, top = np.maximum(np.abs(low), np.abs(high)), np.abs(values).max(axis=0)
    lines = []
    for sign in (-1.0, 1.0):
        slope = _search(node, middle, offsets, sign * values, sign) if curvature else _chord(offsets, sign * values)
        height = (sign * values - slope * points).max(axis=0)
        lines += [sign * slope, sign * (height + beyond + 8 * UNIT * (np.abs(slope) * peak + top))]
    a_l, b_l, a_u, b_u = lines
    return a_l, b_l, a_u, b_u, (values[0], values[-1]), None


def _grid(node: Elementwise, low: Array, high: Array, intervals: int) -> tuple[Array, Array]:
    """Points [P, ...] in rising order: the ends, the kinks, and `intervals` equal steps; and the steps' width.

    Far out, where functions are straight, there are no steps.
    """
    near, far = np.clip(low, -STRAIGHT, STRAIGHT), np.clip(high, -STRAIGHT, STRAIGHT)
    steps = [near + (far - near) * (k / intervals) for k in range(1, intervals)]
    kinks = [np.clip(kink, low, high) for kink in node.facts.kinks(node.parameters)]
    inner = [near, *steps, far] if intervals > 1 else []
    return np.sort(np.stack([low, high, *inner, *kinks]), axis=0), (far - near) / intervals


def _chord(offsets: Array, values: Array) -> Array:
    """Slope, at offset 0, of the least concave function above a few points."""
    best, slope = np.full_like(offsets[0], -np.inf), np.zeros_like(offsets[0])
    for i, j in combinations(range(len(offsets)), 2):
        over = (offsets[i] <= 0.0) & (offsets[j] >= 0.0) & (offsets[i] < offsets[j])
        chord = (values[j] - values[i]) / np.where(over, offsets[j] - offsets[i], 1.0)
        height = values[i] - chord * offsets[i]
        better = over & (height > best)
        best, slope = np.where(better, height, best), np.where(better, chord, slope)
    return slope


def _search(node: Elementwise, middle: Array, offsets: Array, values: Array, sign: float) -> Array:
    """The same for a smooth function: its tangent at offset 0 or the chord of the ends if nothing of the grid is above
    them, else by golden-section search, as the height at offset 0 of the least line above is convex in its slope."""

    def height(slope: Array, offsets: Array, values: Array) -> Array:
        result: Array = (values - slope * offsets).max(axis=0)
        return result

    slope = sign * node.derivative(middle)
    touches = sign * node(middle)
    width = offsets[-1] - offsets[0]
    chord = (values[-1] - values[0]) / np.where(width > NARROW, width, 1.0)
    ends = values[0] - chord * offsets[0]
    tiny = 1e-12 * (1.0 + np.abs(touches))
    tangent = height(slope, offsets, values) <= touches + tiny
    straight = ~tangent & (height(chord, offsets, values) <= ends + tiny)
    slope = np.where(straight, chord, slope)
    rest = np.nonzero(~tangent & ~straight)
    if len(rest[0]):
        which: Any = (slice(None), *rest)
        some, at = offsets[which], values[which]
        slopes = sign * node.derivative(some + middle[rest])
        left, right = slopes.min(axis=0), slopes.max(axis=0)
        for _ in range(SEARCH):
            a, b = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
            lower = height(a, some, at) < height(b, some, at)
            left, right = np.where(lower, left, a), np.where(lower, b, right)
        slope[rest] = 0.5 * (left + right)
    return slope
