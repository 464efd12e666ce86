"""Kind `lipschitz`: the formula of LAWS (arXiv:2605.04069), |policy - expert| <= eps_fit + 2 Lambda C_E, made sound.

For an observation x of a region and the nearest s of a finite set of samples,

    |policy(x) - expert(x)| <= |(policy - expert)(x) - (policy - expert)(s)| + |policy(s) - expert(s)|
                            <= Lambda C_E                                    + eps_fit

where Lambda bounds the slope of policy - expert in the region and C_E, the covering radius, is the distance from any x
to its nearest sample. With Lambda(policy - expert) <= Lambda(policy) + Lambda(expert) this is at most the paper's. Here

  - distances are measured in the region's own coordinates zeta (core.region), axis by axis;
  - the samples are the centres of a grid of cells over the region, so the covering radius is half a cell, known and not
    estimated, plus what rounding a sample to float32 moves it;
  - `local` is an interval enclosure of the Jacobian over the region (mid-point and radius, rounded outward);
  - `global` is the product of the layers' operator norms, each proved (`spectral_norm`), for comparison;
  - eps_fit is measured through ONNX Runtime at every sample; float32 execution of policy and expert, at x and at s, is
    bounded by the same forward error analysis as in core.bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .bounds import HUGE32, INFLATE, TINY32, UNIT32, gamma
from .certificate import Certificates, decision_rows, kind_code
from .errors import ModelError
from .network import Affine, Elementwise, Network
from .region import UNIT, Regions

Array = NDArray[np.float64]

BATCH = 64  # regions together
CELLS = 64  # in which the slope of a smooth function is enclosed
STRAIGHT, CALM = 40.0, 1e-12  # beyond 40 no smooth function's slope changes by more than 1e-12
COURTESY = 1e-3  # room for another prover


@dataclass(frozen=True)
class Slopes:
    """Of r rows over B regions of n axes.

    Attributes:
        middle, radius [B, r, n]: d row / d zeta lies within radius of middle, for the exact function.
        execution [B, r]: |row as executed in float32 - exact row|, anywhere in the region.
    """

    middle: Array
    radius: Array
    execution: Array

    @property
    def local(self) -> Array:
        """[B, r, n]: largest |d row / d zeta_i|; |row(x) - row(y)| <= sum_i local_i |zeta_i(x) - zeta_i(y)|."""
        return np.abs(self.middle) + self.radius


@dataclass(frozen=True)
class Certified:
    """Certificates of kind `lipschitz` and the parts of their bounds.

    Attributes:
        eps_fit [B, r]: largest error at the samples. samples [B]: how many there are.
        covering [B, n]: covering radius along every axis, in zeta.
    """

    certificates: Certificates
    eps_fit: Array
    samples: NDArray[np.int64]
    covering: Array


def formula(eps_fit: Array, constant: Array, radius: Array) -> Array:
    """The paper's bound."""
    return np.asarray(eps_fit + 2.0 * constant * radius)


def slope_range(node: Elementwise, low: Array, high: Array) -> tuple[Array, Array]:
    """Least and largest derivative of an elementwise function on [low, high], entry by entry.

    Between kinks the derivative moves by at most the curvature times the distance; so its value in the middle of each
    of a number of cells says everything about the cell.
    """
    curvature = node.facts.curvature(node.parameters)
    near, far = np.clip(low, -STRAIGHT, STRAIGHT), np.clip(high, -STRAIGHT, STRAIGHT)
    cells = CELLS if curvature else 1
    inner = [near + (far - near) * (k / cells) for k in range(cells + 1)]
    kinks = [np.clip(kink, low, high) for kink in node.facts.kinks(node.parameters)]
    points = np.sort(np.stack([low, high, *inner, *kinks]), axis=0)
    middle, half = 0.5 * (points[1:] + points[:-1]), 0.5 * (points[1:] - points[:-1])
    slope = node.derivative(middle)
    wander = np.where(np.abs(middle) < STRAIGHT, curvature * half, CALM) if curvature else np.zeros_like(half)
    wander = wander + 1e-12 * (1.0 + np.abs(slope))
    return (slope - wander).min(axis=0), (slope + wander).max(axis=0)


def slopes(network: Network, regions: Regions, decision: str = "none") -> Slopes:
    """Interval enclosure of the Jacobian over regions.

    Raises:
        ModelError: a node that is neither affine nor elementwise.
    """
    rows = decision_rows(network.outputs, decision)
    parts = [_slopes(network, regions[k : k + BATCH], rows) for k in range(0, len(regions), BATCH)]
    return Slopes(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Slopes)))


def _slopes(network: Network, regions: Regions, rows: Array) -> Slopes:
    generators, _ = regions.generators()
    with np.errstate(all="ignore"):
        nodes = [_Node(regions.center, np.zeros_like(regions.center), generators, np.zeros_like(generators))]
        for node in network.nodes:
            if isinstance(node, Affine):
                nodes.append(_affine(node, [nodes[s] for s in node.sources]))
            elif isinstance(node, Elementwise):
                nodes.append(_elementwise(node, nodes[node.source]))
            else:
                raise ModelError(f"node {node.name!r}: no Lipschitz constant is known for it; use the kind linear")
        last, size = nodes[-1], np.abs(rows)
        middle = rows @ last.middle
        radius = (size @ (last.radius + 16 * UNIT * np.abs(last.middle))) * INFLATE
        return Slopes(middle, radius, last.error @ size.T * INFLATE)


@dataclass(frozen=True)
class _Node:
    """Of a node over B regions: exact value at the centre up to `error`, Jacobian, and the executed value's error."""

    value: Array  # [B, k]
    error: Array  # [B, k], also at least that of `value` itself: float64 rounds less than float32
    middle: Array  # [B, k, n]
    radius: Array

    @property
    def ends(self) -> tuple[Array, Array]:
        """Range over the region of the exact and of the executed value."""
        swing = (np.abs(self.middle) + self.radius).sum(axis=2)
        swing = (swing + 2 * self.error + 4 * UNIT * np.abs(self.value)) * INFLATE
        return self.value - swing, self.value + swing

    @property
    def peak(self) -> Array:
        low, high = self.ends
        return np.maximum(np.abs(low), np.abs(high))


def _affine(node: Affine, sources: list[_Node]) -> _Node:
    value, magnitude, terms = node.bias, np.abs(node.bias), 3
    middle = radius = np.zeros((1, 1, 1))
    error = flushed = np.zeros((1, 1))
    for source, weight in zip(sources, node.weights, strict=True):
        matrix = np.diag(weight) if weight.ndim == 1 else weight
        size, peak = np.abs(matrix), source.peak
        rounding = gamma(matrix.shape[1] + 4, UNIT)
        value = value + source.value @ matrix.T
        middle = middle + matrix @ source.middle
        radius = radius + size @ (source.radius * INFLATE + 2 * rounding * (np.abs(source.middle) + source.radius))
        error = error + source.error @ size.T
        magnitude = magnitude + peak @ size.T
        flushed = flushed + size.sum(axis=1) + peak.sum(axis=1, keepdims=True)
        terms += matrix.shape[1]
    executed = gamma(terms) * magnitude + TINY32 * (2 * terms + flushed)
    error = (error + np.where(magnitude < HUGE32, executed, np.inf)) * INFLATE
    return _Node(value, error, middle, radius)


def _elementwise(node: Elementwise, source: _Node) -> _Node:
    low, high = source.ends
    least, largest = slope_range(node, low, high)
    mean, spread = 0.5 * (largest + least), 0.5 * (largest - least) * INFLATE
    absolute, relative = node.facts.execution(node.parameters)
    steep = np.maximum(np.abs(least), np.abs(largest))
    error = (steep * source.error + absolute + relative * source.peak) * INFLATE
    reach = np.abs(source.middle) + source.radius
    middle = mean[..., None] * source.middle
    radius = np.abs(mean)[..., None] * source.radius + (spread + 8 * UNIT * steep)[..., None] * reach
    return _Node(node(source.value), error, middle, radius * INFLATE)


def spectral_norm(matrix: Array) -> float:
    """An upper bound of a matrix's largest singular value, proved: s is one if s^2 I - A^T A is positive definite.

    That is so if its Cholesky factorisation in floating point runs to completion, up to a shift of gamma_(n+1) times
    the trace (Demmel; Rump, BIT 46, 2006); the rounding of A^T A itself is at most gamma_k |A|_F^2.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram, (height, n) = tall.T @ tall, tall.shape
    square = float(np.trace(gram)) * INFLATE
    if square == 0.0 or not math.isfinite(square):
        return math.sqrt(square)
    guess = float(np.linalg.eigvalsh(gram)[-1]) * (1 + 1e-9) + 1e-13 * square
    while True:
        try:
            np.linalg.cholesky(guess * np.eye(n) - gram)
            break
        except np.linalg.LinAlgError:
            guess *= 1.01
    slack = float(gamma(height + 4, UNIT)) * square + 2 * float(gamma(n + 4, UNIT)) * n * guess
    return math.sqrt(guess + slack) * INFLATE


def global_constant(network: Network, regions: Regions, decision: str = "none") -> Array:
    """[B, r]: product of the layers' operator norms, Euclidean in the regions' coordinates zeta.

    |row(x) - row(y)| <= constant |zeta(x) - zeta(y)|_2 for all x, y, not only in the region.

    Raises:
        ModelError: a node that is neither affine nor elementwise.
    """
    rows = decision_rows(network.outputs, decision)
    generators, _ = regions.generators()
    constants = [1.0]
    for index, node in enumerate(network.nodes, start=1):
        if isinstance(node, Affine):
            if index == len(network.nodes):
                break
            norms = [np.abs(w).max() if w.ndim == 1 else spectral_norm(w) for w in node.weights]
            constants.append(sum(n * constants[s] for n, s in zip(norms, node.sources, strict=True)) * INFLATE)
        elif isinstance(node, Elementwise):
            everywhere = np.array([1e6])
            steep = max(float(np.abs(end[0])) for end in slope_range(node, -everywhere, everywhere))
            constants.append(constants[node.source] * steep * INFLATE)
        else:
            raise ModelError(f"node {node.name!r}: no Lipschitz constant is known for it; use the kind linear")
    last = network.nodes[-1]
    if isinstance(last, Affine):
        matrices = [np.diag(w) if w.ndim == 1 else w for w in last.weights]
        pairs = zip(matrices, last.sources, strict=True)
        per_row = sum((np.linalg.norm(rows @ w, axis=1) * constants[s] for w, s in pairs), np.zeros(len(rows)))
    else:
        per_row = np.linalg.norm(rows, axis=1) * constants[-1]
    scale = np.array([spectral_norm(g) if np.isfinite(g).all() else np.inf for g in generators])
    return np.asarray(scale[:, None] * per_row * (1.0 + 1e-9))


def certify_lipschitz(
    network: Network,
    regions: Regions,
    execute: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    decision: str = "none",
    samples: int = 1024,
) -> Certified:
    """Fit an affine expert per region to samples of the policy, and certify it by the formula.

    Args:
        execute: the policy's raw outputs [N, m] at observations [N, n], by ONNX Runtime.
        samples: at most so many per region; the grid is finer along axes where the policy moves more.

    Returns:
        Certified; where nothing could be shown the certificate's bound_offset is infinite.
    """
    rows = decision_rows(network.outputs, decision)
    generators, eps = regions.generators()
    found = slopes(network, regions, decision)
    inputs, count = network.inputs, len(regions)
    weight, bias = np.zeros((count, len(rows), inputs), np.float32), np.zeros((count, len(rows)), np.float32)
    fit, covering, sizes = np.full((count, len(rows)), np.inf), np.ones((count, inputs)), np.zeros(count, np.int64)
    for b in range(count):
        steps = _steps(found.local[b].max(axis=0), samples)
        cell = np.arange(steps.prod())[:, None] // np.cumprod([1, *steps[:-1]]) % steps
        zeta = (2 * cell + 1.0) / steps - 1.0
        reach = np.abs(regions.center[b]) + np.abs(generators[b]).sum(axis=1)
        # how far rounding moves a sample: by M^-1 = (1 - R)^-1 T / (1 + 4 e), R below 0.1% (Regions.generators)
        drift = np.abs(regions.transform[b]) @ (2 * UNIT32 * reach + TINY32)
        drift += 0.002 * drift.max()
        covering[b], sizes[b] = 1.0 / steps + drift, len(zeta)
        if not (np.isfinite(found.local[b]).all() and np.isfinite(eps[b]) and (drift * steps < 1.0).all()):
            continue  # samples that may lie outside the region show nothing
        x = (regions.center[b] + zeta @ generators[b].T).astype(np.float32)
        y = execute(x).astype(float) @ rows.T
        moment = (zeta**2).sum(axis=0)
        slope = np.where(moment > 0, y.T @ zeta / np.maximum(moment, 1e-300), found.middle[b])
        with np.errstate(over="ignore"):
            weight[b] = slope @ regions.transform[b]
            rest = y - x @ weight[b].astype(float).T
            bias[b] = 0.5 * (rest.max(axis=0) + rest.min(axis=0))
        size = np.abs(x.astype(float)) @ np.abs(weight[b].astype(float)).T + np.abs(bias[b]) + np.abs(y)
        fit[b] = (np.abs(rest - bias[b]) + 4 * (inputs + 4) * UNIT * size).max(axis=0)
    with np.errstate(all="ignore"):
        line, constant = weight.astype(float), np.abs(bias.astype(float))
        reach = np.abs(regions.center) + np.abs(generators).sum(axis=2)
        size = np.einsum("brn,bn->br", np.abs(line), reach) + constant
        own = 8 * (inputs + 4) * UNIT * (np.abs(line) @ np.abs(generators))
        steepness = np.abs(found.middle - line @ generators) + found.radius + own
        flushed = 2 * (inputs + 3) + np.abs(line).sum(axis=2) + constant + reach.sum(axis=1)[:, None]
        executed = 2 * found.execution + gamma(inputs + 3) * size + flushed * TINY32
        offset = (fit + np.einsum("brn,bn->br", steepness, covering) + executed) * (1.0 + COURTESY)
    known = np.isfinite(offset) & (size < HUGE32) & np.isfinite(line).all(axis=2)
    certificates = Certificates(
        regions.center,
        regions.transform,
        np.where(known[..., None], weight, np.float32(0)),
        np.where(known, bias, np.float32(0)),
        np.zeros_like(found.middle),
        np.where(known, offset, np.inf),
        np.full(count, kind_code("lipschitz"), np.uint8),
        round=regions.round,  # shown for the box around a ball
    )
    return Certified(certificates, fit, sizes, covering)


def _steps(steepness: Array, samples: int) -> NDArray[np.int64]:
    """Cells per axis, at most `samples` in all: one more where half a cell costs most, while there is room."""
    steps = np.ones(len(steepness), np.int64)
    while True:
        gain = steepness / steps - steepness / (steps + 1)
        room = steps.prod() // steps * (steps + 1) <= samples
        if not room.any():
            return steps
        steps[np.argmax(np.where(room, gain, -1.0))] += 1
