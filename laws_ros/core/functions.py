"""The elementwise functions of policies: what bounds need to know of each.

A function is smooth between its kinks, and its second derivative there is at most `curvature` in magnitude; that is all
that its relaxation needs, so a new function is one entry here. A `shape` makes its relaxation cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parameters = tuple[float, ...]


@dataclass(frozen=True)
class Function:
    """f(z, parameters).

    Attributes:
        value, slope: f and a derivative of it, entry by entry, float64.
        kinks: where its derivative jumps.
        curvature: bound on |f''| between kinks.
        execution: (absolute, relative) error of ONNX Runtime's float32 result: at most absolute + relative * |z|.
            Zero for functions that only select; the others are measured by tests/test_functions.py.
        increasing: f is monotone, so its range over an interval is that of the ends.
        shape: "bent" (linear on either side of 0, 0 at 0), "convex", "odd" (f - f(0) is odd; convex before 0, concave
            after), or "any".
        by_value: slope as a function of the value, for an "odd" one whose value is dear.
    """

    value: Callable[[Array, Parameters], Array]
    slope: Callable[[Array, Parameters], Array]
    kinks: Callable[[Parameters], Parameters] = lambda p: ()
    curvature: Callable[[Parameters], float] = lambda p: 0.0
    execution: Callable[[Parameters], tuple[float, float]] = lambda p: (0.0, 0.0)
    increasing: bool = True
    shape: Callable[[Parameters], str] = lambda p: "any"
    by_value: Callable[[Array], Array] | None = None


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1.0, small) / (1.0 + small)


def _normal_cdf(z: Array) -> Array:
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(-z / math.sqrt(2.0)) if z.size else z


def _erf(z: Array) -> Array:
    return np.vectorize(math.erf, otypes=[float])(z) if z.size else z


def _normal_pdf(z: Array) -> Array:
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _elu(z: Array, alpha: float, gain: float = 1.0) -> Array:
    return gain * np.where(z > 0, z, alpha * np.expm1(np.minimum(z, 0.0)))


def _elu_slope(z: Array, alpha: float, gain: float = 1.0) -> Array:
    return gain * np.where(z > 0, 1.0, alpha * np.exp(np.minimum(z, 0.0)))


def _gelu_argument(z: Array) -> Array:
    z = np.clip(z, -1e3, 1e3)  # far beyond where the sigmoid of this is 0 or 1
    return math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)


def _gelu_tanh_slope(z: Array) -> Array:
    gate, steepness = _sigmoid(2.0 * _gelu_argument(z)), math.sqrt(2.0 / math.pi) * (1.0 + 3 * 0.044715 * z * z)
    return gate + 2.0 * z * steepness * gate * (1.0 - gate)


def _mish_slope(z: Array) -> Array:
    tanh = np.tanh(np.logaddexp(0.0, z))
    return tanh + z * _sigmoid(z) * (1.0 - tanh * tanh)


_FEW_ULP = 2.0**-19

FUNCTIONS: dict[str, Function] = {
    "relu": Function(
        lambda z, p: np.maximum(z, 0.0),
        lambda z, p: (z > 0.0).astype(float),
        lambda p: (0.0,),
        shape=lambda p: "bent",
    ),
    "leakyrelu": Function(
        lambda z, p: np.where(z > 0, z, p[0] * z),
        lambda z, p: np.where(z > 0, 1.0, p[0]),
        lambda p: (0.0,),
        execution=lambda p: (0.0, 2.0**-21 * abs(p[0])),
        shape=lambda p: "bent",
    ),
    "clip": Function(
        lambda z, p: np.clip(z, p[0], p[1]),
        lambda z, p: ((z > p[0]) & (z < p[1])).astype(float),
        lambda p: p,
    ),
    "tanh": Function(
        lambda z, p: np.tanh(z),
        lambda z, p: 1.0 - np.tanh(z) ** 2,
        curvature=lambda p: 0.77,  # 4 / (3 sqrt 3)
        execution=lambda p: (_FEW_ULP, 0.0),
        shape=lambda p: "odd",
        by_value=lambda y: 1.0 - y * y,
    ),
    "sigmoid": Function(
        lambda z, p: _sigmoid(z),
        lambda z, p: _sigmoid(z) * _sigmoid(-z),
        curvature=lambda p: 0.0963,  # 1 / (6 sqrt 3)
        execution=lambda p: (_FEW_ULP, 0.0),
        shape=lambda p: "odd",
        by_value=lambda y: y * (1.0 - y),
    ),
    "erf": Function(
        lambda z, p: _erf(z),
        lambda z, p: 2.0 / math.sqrt(math.pi) * np.exp(-z * z),
        curvature=lambda p: 0.968,  # sqrt(8 / (pi e))
        execution=lambda p: (_FEW_ULP, 0.0),
        shape=lambda p: "odd",
    ),
    "softplus": Function(
        lambda z, p: np.logaddexp(0.0, z),
        lambda z, p: _sigmoid(z),
        curvature=lambda p: 0.25,
        execution=lambda p: (_FEW_ULP, _FEW_ULP),
        shape=lambda p: "convex",
    ),
    "elu": Function(
        lambda z, p: _elu(z, p[0]),
        lambda z, p: _elu_slope(z, p[0]),
        lambda p: (0.0,),
        lambda p: abs(p[0]),
        lambda p: (_FEW_ULP * abs(p[0]), 0.0),
        shape=lambda p: "convex" if 0.0 <= p[0] <= 1.0 else "any",
    ),
    "selu": Function(
        lambda z, p: _elu(z, p[0], p[1]),
        lambda z, p: _elu_slope(z, p[0], p[1]),
        lambda p: (0.0,),
        lambda p: abs(p[0] * p[1]),
        lambda p: (_FEW_ULP * abs(p[0] * p[1]), 2.0**-22 * abs(p[1])),
    ),
    "silu": Function(
        lambda z, p: z * _sigmoid(z),
        lambda z, p: _sigmoid(z) * (1.0 + z * _sigmoid(-z)),
        curvature=lambda p: 0.5,  # at 0
        execution=lambda p: (_FEW_ULP, _FEW_ULP),
        increasing=False,
    ),
    "gelu": Function(
        lambda z, p: z * _normal_cdf(z),
        lambda z, p: _normal_cdf(z) + z * _normal_pdf(z),
        curvature=lambda p: 0.798,  # sqrt(2 / pi), at 0
        execution=lambda p: (_FEW_ULP, _FEW_ULP),
        increasing=False,
    ),
    "gelu_tanh": Function(
        lambda z, p: z * _sigmoid(2.0 * _gelu_argument(z)),  # (1 + tanh w) / 2 = sigmoid(2 w)
        lambda z, p: _gelu_tanh_slope(z),
        # With S = 1 - tanh^2, w' = c (1 + 3 a z^2): f'' = S (c (1 + 6 a z^2) - z tanh(w) w'^2). Above, S <=
        # 1 / (1 + w^2) and 6 a < c^2 give f'' <= c = sqrt(2 / pi). Below, S tanh(w) <= 0.385 gives 0.63 for
        # |z| <= 1.5, and S <= 4 exp(-2 w) gives 0.47 from there on, where that bound falls.
        curvature=lambda p: 0.798,
        execution=lambda p: (_FEW_ULP, _FEW_ULP),
        increasing=False,
    ),
    "mish": Function(
        lambda z, p: z * np.tanh(np.logaddexp(0.0, z)),
        lambda z, p: _mish_slope(z),
        # With s = sigmoid, T = tanh(softplus), S = 1 - T^2: f'' = S (2 s + z s (1 - s) - 2 z T s^2), S T <= 0.385,
        # |z| s (1 - s) <= 0.23. For z >= 0: S <= 0.64, so f'' <= 1.43; S <= 4 exp(-2 z), so f'' >= -2 z S T >= -1.46
        # (z <= 1.9) or -0.34. For z <= 0: |z| s <= 0.28, s <= 1/2, so f'' is between -0.23 and 1.11.
        curvature=lambda p: 1.5,
        execution=lambda p: (_FEW_ULP, _FEW_ULP),
        increasing=False,
    ),
    "hardswish": Function(
        lambda z, p: z * np.clip(z / 6.0 + 0.5, 0.0, 1.0),
        lambda z, p: np.where(z <= -3.0, 0.0, np.where(z >= 3.0, 1.0, z / 3.0 + 0.5)),
        lambda p: (-3.0, 3.0),
        lambda p: 1.0 / 3.0,
        lambda p: (_FEW_ULP, _FEW_ULP),
        increasing=False,
    ),
}
