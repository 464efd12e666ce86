"""Sound affine bounds of a policy *as executed in float32* over regions, batched over regions.

Method: linear bound propagation (CROWN: Zhang et al. 2018, arXiv:1811.00866; LiRPA: Xu et al. 2020, arXiv:2002.12920).
A forward pass keeps, for every node, two affine functions of the region's coordinates that enclose its value; a
backward pass through the relaxed graph then bounds chosen combinations of the outputs more tightly.

Execution error: every affine node adds an unknown e, |e| <= delta, to its exact value; delta covers float32 evaluation
in any order of summation, with or without fused multiply-add (Higham, Accuracy and Stability, ch. 3; Jeannerod & Rump
2013), of the terms that are not exactly zero in the region. The e's are treated like any other bounded unknown, so
their effect on the output is carried through the same relaxations. The arithmetic of this module itself is float64;
its rounding is bounded the same way and added to delta. docs/soundness.md has the chain of the argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .network import Affine, Elementwise, Network
from .region import UNIT, Regions

Array = NDArray[np.float64]

UNIT32 = 2.0**-24  # unit roundoff of float32
TINY32 = 2.0**-126  # smallest normal float32: what rounding a denormal, or taking it for zero, changes at most
HUGE32 = 2.0**126  # partial sums below this cannot overflow float32
BACKWARD_SIZE = 128 * 128  # largest weight matrix whose node is worth a backward pass of its own
EXECUTION_TERMS = 3  # roundings on top of one per summed term: the bias, and a constant that was rounded when read
STEPS, SEARCH, GOLDEN = 32, 20, 0.6180339887498949  # grid and search by which smooth functions are relaxed
STRAIGHT, FLAT = 40.0, 1e-15  # beyond 40 every smooth function's second derivative is below 1e-15
INFLATE = 1.0 + 1e-9  # covers the rounding of the short sums in which error bounds themselves are computed


def gamma(terms: Array | int, unit: float = UNIT32) -> Array:
    """Higham's gamma_k = k u / (1 - k u): relative error of a sum of k rounded terms, in any order."""
    product = np.asarray(terms, dtype=float) * unit
    return np.where(product < 0.5, product / (1.0 - np.minimum(product, 0.5)), np.inf)


@dataclass(frozen=True)
class AffineBounds:
    """L(zeta) <= (rows @ policy output as executed) <= U(zeta) for every zeta in [-1, 1]^n, region by region.

    Attributes:
        lower, upper: [B, r, n + 1] coefficients in the *observation* x; the last column is the constant.
    """

    lower: Array
    upper: Array


def relax(node: Elementwise, low: Array, high: Array) -> tuple[Array, Array, Array, Array]:
    """Lines a_l z + b_l <= f(z) <= a_u z + b_u for low <= z <= high: the ones that are tightest at the middle.

    The upper line supports the least concave function above f, the lower one the greatest convex function below it
    (for a bent ReLU: the chord above, and below 0 or the identity, whichever leaves less area). Slopes are searched;
    offsets are then computed for whatever slope was found: at ends and kinks for piecewise linear functions, else on a
    grid, where a function with |f''| <= c lies at most c h^2 / 8 beyond its values at points h apart. So a slope can be
    poor, but a line cannot be wrong.

    Args:
        low, high: bounds of the node's argument, any common shape.

    Returns:
        (a_l, b_l, a_u, b_u), each of that shape.
    """
    curvature = node.facts.curvature(node.parameters)
    points, spacing = _grid(node, low, high, STEPS if curvature else 1)
    values = node(points)
    beyond = np.zeros_like(low)
    if curvature:
        beyond = 0.125 * (curvature * spacing**2 + FLAT * (high - low) ** 2) * INFLATE + 1e-15
    offsets = points - 0.5 * (low + high)
    peak = np.maximum(np.abs(low), np.abs(high))
    lines = []
    for sign in (-1.0, 1.0):
        if curvature:
            tangent = sign * node.derivative(0.5 * (low + high))
            slope = _touching(offsets, sign * values, sign * node.derivative(points), tangent)
        else:
            slope = _highest_chord(offsets, sign * values)
        height = (sign * values - slope * points).max(axis=0)
        pad = 8 * UNIT * (np.abs(slope) * peak + np.abs(values).max(axis=0))
        lines += [sign * slope, sign * (height + beyond + pad)]
    a_l, b_l, a_u, b_u = lines
    return a_l, b_l, a_u, b_u


def _grid(node: Elementwise, low: Array, high: Array, intervals: int) -> tuple[Array, Array]:
    """Points [P, ...] in rising order: the ends, the kinks, and `intervals` equal steps; and the steps' width.

    Far out, where functions are straight, there are no steps.
    """
    near, far = np.clip(low, -STRAIGHT, STRAIGHT), np.clip(high, -STRAIGHT, STRAIGHT)
    steps = [near + (far - near) * (k / intervals) for k in range(1, intervals)]
    kinks = [np.clip(kink, low, high) for kink in node.facts.kinks(node.parameters)]
    inner = [near, *steps, far] if intervals > 1 else []
    return np.sort(np.stack([low, high, *inner, *kinks]), axis=0), (far - near) / intervals


def _highest_chord(offsets: Array, values: Array) -> Array:
    """Slope, at offset 0, of the least concave function above a few points."""
    best, slope = np.full_like(offsets[0], -np.inf), np.zeros_like(offsets[0])
    for i, j in combinations(range(len(offsets)), 2):
        over = (offsets[i] <= 0.0) & (offsets[j] >= 0.0) & (offsets[i] < offsets[j])
        chord = (values[j] - values[i]) / np.where(over, offsets[j] - offsets[i], 1.0)
        height = values[i] - chord * offsets[i]
        better = over & (height > best)
        best, slope = np.where(better, height, best), np.where(better, chord, slope)
    return slope


def _touching(offsets: Array, values: Array, slopes: Array, tangent: Array) -> Array:
    """The same for many points of a smooth function with the given slopes: golden-section search, since the height at
    offset 0 of the least line above the points is a convex function of the line's slope."""

    def height(slope: Array) -> Array:
        result: Array = (values - slope * offsets).max(axis=0)
        return result

    left, right = slopes.min(axis=0), slopes.max(axis=0)
    a, b = right - GOLDEN * (right - left), left + GOLDEN * (right - left)
    at_a, at_b = height(a), height(b)
    for _ in range(SEARCH):
        lower = at_a < at_b
        left, right = np.where(lower, left, a), np.where(lower, b, right)
        new = np.where(lower, right - GOLDEN * (right - left), left + GOLDEN * (right - left))
        at_new = height(new)
        a, b = np.where(lower, new, b), np.where(lower, a, new)
        at_a, at_b = np.where(lower, at_new, at_b), np.where(lower, at_a, at_new)
    found = 0.5 * (left + right)
    # where the function itself is on top at offset 0, many slopes serve equally on a grid, and the tangent is meant
    return np.where(height(tangent) <= height(found), tangent, found)


@dataclass
class _Forms:
    """Forward affine enclosure of a node over B regions: middle +- half, [n, B, d + 1] in zeta, constant last."""

    middle: Array
    half: Array
    low: Array  # [n, B]
    high: Array


def _interval(middle: Array, half: Array) -> tuple[Array, Array]:
    """Range over zeta in [-1, 1]^d of middle - half and middle + half, rounded outward."""
    lower, upper = middle - half, middle + half
    swing_l, swing_u = np.abs(lower[..., :-1]).sum(-1), np.abs(upper[..., :-1]).sum(-1)
    pad = 4 * (middle.shape[-1] + 2) * UNIT
    low = lower[..., -1] - swing_l
    high = upper[..., -1] + swing_u
    return low - pad * (np.abs(lower[..., -1]) + swing_l), high + pad * (np.abs(upper[..., -1]) + swing_u)


def _at(weight: Array, constant: Array, center: Array) -> Array:
    """weight @ center + constant, region by region."""
    return np.einsum("brn,bn->br", weight, center) + constant


def affine_bounds(network: Network, regions: Regions, rows: Array | None = None) -> AffineBounds:
    """Affine bounds over regions of combinations of the policy's outputs as executed in float32.

    Args:
        network: the policy.
        regions: B of them.
        rows: [r, outputs] combinations to bound; the outputs themselves if None.

    Returns:
        AffineBounds; NaN or infinite where nothing could be shown (which callers must treat as unknown).
    """
    rows = np.eye(network.outputs) if rows is None else rows
    generators, _ = regions.generators()
    with np.errstate(all="ignore"):
        lines, deltas = _forward(network, regions.center, generators)
        lower = _backward(network, regions.center, generators, rows, lines, deltas, sign=-1.0)
        upper = _backward(network, regions.center, generators, rows, lines, deltas, sign=1.0)
    return AffineBounds(lower, upper)


_Lines = tuple[Array, Array, Array, Array, NDArray[np.bool_]]


def _forward(network: Network, center: Array, generators: Array) -> tuple[dict[int, _Lines], dict[int, Array]]:
    """Relaxation lines of every elementwise node and error bounds delta [n, B] of every affine node.

    A float32 observation enters exactly, so node 0 has no error. Forms of all regions stand side by side as columns,
    which makes every layer two matrix products: W @ middle and |W| @ half.
    """
    count = len(center)
    middle = np.concatenate([np.moveaxis(generators, 0, 1), center.T[:, :, None]], axis=2)
    half = np.zeros_like(middle)
    forms = [_Forms(middle, half, *_interval(middle, half))]
    lines: dict[int, _Lines] = {}
    deltas: dict[int, Array] = {}
    bends = [0]  # per node, how many elementwise nodes lie before it on the longest way
    for index, node in enumerate(network.nodes, start=1):
        if isinstance(node, Affine):
            form, deltas[index] = _forward_affine(node, forms, count)
            bends.append(max(bends[s] for s in node.sources))
            # Behind one layer of bends, forward and backward bounds are the same; behind more, backward is tighter,
            # but takes a product per region. The output gets its backward pass from the caller.
            small = max(w.size for w in node.weights) <= BACKWARD_SIZE
            if bends[index] > 1 and small and index < len(network.nodes):
                for sign in (-1.0, 1.0):
                    bound = _backward(network, center, generators, np.eye(node.size), lines, deltas, sign, start=index)
                    weight, constant = bound[..., :-1], bound[..., -1]
                    middle = np.concatenate([weight @ generators, _at(weight, constant, center)[..., None]], axis=2)
                    low, high = _interval(np.moveaxis(middle, 0, 1), np.zeros((node.size, 1, 1)))
                    if sign < 0:
                        form.low = np.maximum(form.low, low)
                    else:
                        form.high = np.minimum(form.high, high)
            forms.append(form)
        else:
            bends.append(bends[node.source] + 1)
            source = forms[node.source]
            a_l, b_l, a_u, b_u = relax(node, source.low, source.high)
            peak = np.maximum(np.abs(source.low), np.abs(source.high))
            absolute, relative = node.facts.execution(node.parameters)
            execution = (absolute + relative * peak) * INFLATE
            steepest = np.maximum(np.abs(a_l), np.abs(a_u))
            pad = execution + 4 * UNIT * (peak * steepest + np.abs(b_l) + np.abs(b_u))
            b_l, b_u = b_l - pad, b_u + pad
            # An inactive ReLU is exactly zero, whatever was padded.
            dead = source.high <= 0.0 if node.function == "relu" else np.zeros_like(peak, dtype=bool)
            b_l[dead] = b_u[dead] = 0.0
            lines[index] = (a_l, b_l, a_u, b_u, dead)
            lower, upper = source.middle - source.half, source.middle + source.half
            if (a_l < 0.0).any() or (a_u < 0.0).any():  # a falling line takes the other end
                lower, upper = (
                    np.where(a_l[..., None] < 0.0, upper, lower),
                    np.where(a_u[..., None] < 0.0, lower, upper),
                )
            lower, upper = a_l[..., None] * lower, a_u[..., None] * upper
            lower[..., -1] += b_l
            upper[..., -1] += b_u
            slack = 8 * UNIT * (np.abs(lower).sum(-1) + np.abs(upper).sum(-1))
            middle, half = 0.5 * (upper + lower), 0.5 * (upper - lower)
            half[..., -1] += slack
            low, high = _interval(middle, half)
            if node.facts.increasing:  # the function's own range is often tighter than its lines'
                wiggle = execution + 4 * UNIT * np.abs(node(peak)) if absolute else execution
                low = np.maximum(low, node(source.low) - wiggle)
                high = np.minimum(high, node(source.high) + wiggle)
            forms.append(_Forms(middle, half, low, high))
    return lines, deltas


def _forward_affine(node: Affine, forms: list[_Forms], count: int) -> tuple[_Forms, Array]:
    columns = forms[0].middle.shape[2]
    middle = np.zeros((node.size, count, columns))
    half = np.zeros_like(middle)
    middle[..., -1] = node.bias[:, None]
    magnitude = np.broadcast_to(np.abs(node.bias)[:, None], (node.size, count)).copy()  # sum of |terms| as executed
    spread = magnitude.copy()  # the same for the terms of this module's own sums
    terms = flushed = np.zeros((1, count))
    for source, weight, positive in zip(node.sources, node.weights, node.magnitudes, strict=True):
        form = forms[source]
        peak = np.maximum(np.abs(form.low), np.abs(form.high))
        size = np.abs(form.middle).sum(-1) + np.abs(form.half).sum(-1)
        if weight.ndim == 1:
            middle += weight[:, None, None] * form.middle
            half += positive[:, None, None] * form.half
            magnitude += positive[:, None] * peak
            spread += positive[:, None] * size
            terms = terms + 1
            flushed = flushed + positive[:, None] + peak
        else:
            middle += (weight @ form.middle.reshape(weight.shape[1], -1)).reshape(middle.shape)
            stacked = np.concatenate([form.half.reshape(len(peak), -1), peak, size], axis=1)
            product = positive @ stacked
            half += product[:, : -2 * count].reshape(half.shape)
            magnitude += product[:, -2 * count : -count]
            spread += product[:, -count:]
            terms = terms + (peak > 0.0).sum(axis=0)[None, :]
            flushed = flushed + positive.sum(axis=1)[:, None] + peak.sum(axis=0)
    depth = sum(1 if w.ndim == 1 else w.shape[1] for w in node.weights) + 4
    terms = terms + EXECUTION_TERMS
    # each product and each sum may be flushed to zero, and each factor may be taken for zero, where it is denormal
    execution = (gamma(terms) * magnitude + TINY32 * (2 * terms + flushed)) * INFLATE
    execution = np.where(magnitude < HUGE32, execution, np.inf)  # may overflow: nothing can be said
    arithmetic = 4 * gamma(depth, UNIT) * (spread + magnitude)
    half[..., -1] += (execution + arithmetic) * INFLATE
    delta = (execution + 4 * gamma(depth, UNIT) * magnitude) * INFLATE
    return _Forms(middle, half, *_interval(middle, half)), delta


def _backward(
    network: Network,
    center: Array,
    generators: Array,
    rows: Array,
    lines: dict[int, _Lines],
    deltas: dict[int, Array],
    sign: float,
    start: int | None = None,
) -> Array:
    """Upper (sign +1) or lower (-1) affine bound [B, r, d + 1] of rows @ node `start` (the output), coefficients in x.

    Bounds sign * rows from above and turns the result back, so that one code path serves both.
    """
    count = len(center)
    start = len(network.nodes) if start is None else start
    pending: dict[int, Array] = {start: np.broadcast_to(sign * rows, (count, *rows.shape))}
    constant = np.zeros((count, len(rows)))
    slack = np.zeros_like(constant)
    for index in range(start, 0, -1):
        coefficient = pending.pop(index, None)
        if coefficient is None:
            continue
        node = network.nodes[index - 1]
        if isinstance(node, Affine):
            constant = constant + coefficient @ node.bias
            slack = slack + 2 * UNIT * np.abs(constant)
            # delta also covers the float64 rounding of coefficient @ weight, whose effect has the same form
            slack = slack + np.einsum("brn,nb->br", np.abs(coefficient), deltas[index])
            flat = coefficient.reshape(-1, node.size)  # one large product instead of one per region
            terms = [
                (s, (flat * w if w.ndim == 1 else flat @ w).reshape(*coefficient.shape[:2], -1))
                for s, w in zip(node.sources, node.weights, strict=True)
            ]
        else:
            a_l, b_l, a_u, b_u, dead = (line.T[:, None, :] for line in lines[index])
            up, down = np.maximum(coefficient, 0.0), np.minimum(coefficient, 0.0)
            constant = constant + (up * b_u + down * b_l).sum(-1)
            slack = slack + 2 * UNIT * np.abs(constant)
            slack = slack + 2 * (coefficient.shape[-1] + 4) * UNIT * (up * np.abs(b_u) - down * np.abs(b_l)).sum(-1)
            terms = [(node.source, np.where(dead, 0.0, up * a_u + down * a_l))]
        for source, term in terms:
            pending[source] = pending[source] + term if source in pending else term
    coefficient = pending.get(0, np.zeros((count, len(rows), network.inputs)))
    # Last rounding: of the sums above, and of evaluating coefficient @ x anywhere in the region, in float64.
    reach = np.abs(center) + np.abs(generators).sum(axis=2)
    swing = np.einsum("brn,bn->br", np.abs(coefficient), reach)
    depth = sum(1 for _ in network.nodes) + network.inputs + 8
    slack = slack + 8 * depth * UNIT * (swing + np.abs(constant) + slack)
    result = np.concatenate([coefficient, (constant + slack * INFLATE)[..., None]], axis=2)
    return sign * result
