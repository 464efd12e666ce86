"""Activations that exporters spell out, such as x * sigmoid(x) or 0.5 * x * (1 + erf(x / sqrt(2))), put together again.

A tensor that is a polynomial in one node's values x and in one function of them is kept as a `Formula` until a product
makes it an activation that can be bounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NEAR = 2e-7  # Constants of float32 files are that close to the ones meant; it moves a result by less than its rounding.

_Key = tuple[int, "Gate | None"]
Terms = dict[_Key, float]
"""Sum of coefficient * x^power * gate: (power, gate or None) -> coefficient."""


@dataclass(frozen=True)
class Gate:
    """function(argument), the argument being terms in the same x."""

    function: str
    parameters: tuple[float, ...]
    argument: frozenset[tuple[_Key, float]]


@dataclass(frozen=True)
class Formula:
    """A tensor that is, entry by entry, `terms` in the values x of node `base`; made by the ONNX node `name`."""

    base: int
    terms: Terms
    shape: tuple[int, ...]
    name: str


X: Terms = {(1, None): 1.0}


def gated(function: str, parameters: tuple[float, ...], argument: Terms) -> Terms:
    return {(0, Gate(function, parameters, frozenset(argument.items()))): 1.0}


def plus(a: Terms, b: Terms) -> Terms:
    total = {key: a.get(key, 0.0) + b.get(key, 0.0) for key in {**a, **b}}
    return {key: c for key, c in total.items() if c != 0.0}


def scaled(terms: Terms, factor: float, offset: float = 0.0) -> Terms:
    """factor * terms + offset"""
    return plus({key: factor * c for key, c in terms.items()}, {(0, None): offset})


def times(a: Terms, b: Terms) -> Terms | None:
    """None where gates would be multiplied by gates."""
    product: Terms = {}
    for (p, g), c in a.items():
        for (q, h), d in b.items():
            if g and h:
                return None
            product = plus(product, {(p + q, g or h): c * d})
    return product


def recognise(terms: Terms) -> tuple[float, str, float] | None:
    """(c, f, k) if the terms are c * f(k x), f one of silu, mish, hardswish, gelu, gelu_tanh; else None."""
    gates = {gate for _, gate in terms if gate}
    if len(gates) != 1:
        return None
    (gate,), rest = gates, dict(terms)
    c, argument = rest.pop((1, gate), 0.0), dict(gate.argument)
    k, powers = argument.get((1, None), 0.0), {p for p, _ in argument}
    if c != 0.0 and not rest:  # c * x * gate
        if gate.function == "sigmoid" and argument == {(1, None): k}:
            return c / k, "silu", k
        if gate.function == "tanh" and (k := _softplus(argument)):
            return c / k, "mish", k
        if gate.function == "clip" and powers == {0, 1} and gate.parameters[0] == 0.0:
            limit = gate.parameters[1]
            if _near(6.0 * k, limit) and _near(2.0 * argument.get((0, None), 0.0), limit):
                return c * limit, "hardswish", 1.0
    if c != 0.0 and rest == {(1, None): c}:  # c * x * (1 + gate)
        if gate.function == "erf" and argument == {(1, None): k}:
            k = 1.0 if _near(math.sqrt(2.0) * k, 1.0) else math.sqrt(2.0) * k
            return 2.0 * c / k, "gelu", k
        meant = _near(k, math.sqrt(2.0 / math.pi)) and _near(argument.get((3, None), 0.0), 0.044715 * k)
        if gate.function == "tanh" and powers == {1, 3} and meant:
            return 2.0 * c, "gelu_tanh", 1.0
    return None


def _softplus(terms: Terms) -> float:
    """k if the terms are softplus(k x), else 0."""
    for _, gate in terms:
        if gate and gate.function == "softplus" and terms == {(0, gate): 1.0}:
            k = dict(gate.argument).get((1, None), 0.0)
            return k if dict(gate.argument) == {(1, None): k} else 0.0
    return 0.0


def large_softplus(terms: Terms, beyond: Terms, limit: float) -> tuple[float, float] | None:
    """(c, k) if `terms` are c * softplus(k x) and x is what that is, but for its rounding, where `beyond` > limit."""
    for key, c in terms.items():
        k = _softplus({key: 1.0})
        if k and len(terms) == 1 and _near(c * k, 1.0) and beyond == {(1, None): k} and limit >= 20.0:
            return c, k
    return None


def _near(a: float, b: float) -> bool:
    return abs(a - b) <= NEAR * abs(b)
