"""The elementwise functions of policies: what bounds need to know of each.

A function is smooth between its kinks, and its second derivative there is at most `curvature` in magnitude; that is all
that its relaxation uses, so a new function is one entry here.
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
    """

    value: Callable[[Array, Parameters], Array]
    slope: Callable[[Array, Parameters], Array]
    kinks: Callable[[Parameters], Parameters] = lambda p: ()
    curvature: Callable[[Parameters], float] = lambda p: 0.0
    execution: Callable[[Parameters], tuple[float, float]] = lambda p: (0.0, 0.0)
    increasing: bool = True


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


_FEW_ULP = 2.0**-19

FUNCTIONS: dict[str, Function] = {
    "relu": Function(lambda z, p: np.maximum(z, 0.0), lambda z, p: (z > 0.0).astype(float), lambda p: (0.0,)),
    "leakyrelu": Function(
        lambda z, p: np.where(z > 0, z, p[0] * z),
        lambda z, p: np.where(z > 0, 1.0, p[0]),
        lambda p: (0.0,),
        execution=lambda p: (0.0, 2.0**-21 * abs(p[0])),
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
    ),
    "sigmoid": Function(
        lambda z, p: _sigmoid(z),
        lambda z, p: _sigmoid(z) * _sigmoid(-z),
        curvature=lambda p: 0.0963,  # 1 / (6 sqrt 3)
        execution=lambda p: (_FEW_ULP, 0.0),
    ),
    "erf": Function(
        lambda z, p: _erf(z),
        lambda z, p: 2.0 / math.sqrt(math.pi) * np.exp(-z * z),
        curvature=lambda p: 0.968,  # sqrt(8 / (pi e))
        execution=lambda p: (_FEW_ULP, 0.0),
    ),
    "softplus": Function(
        lambda z, p: np.logaddexp(0.0, z),
        lambda z, p: _sigmoid(z),
        curvature=lambda p: 0.25,
        execution=lambda p: (_FEW_ULP, _FEW_ULP),
    ),
    "elu": Function(
        lambda z, p: _elu(z, p[0]),
        lambda z, p: _elu_slope(z, p[0]),
        lambda p: (0.0,),
        lambda p: abs(p[0]),
        lambda p: (_FEW_ULP * abs(p[0]), 0.0),
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
}
