"""The layer graph that bounds are computed on, and its reference evaluation.

A policy is a graph of two kinds of nodes: affine maps of earlier nodes, and elementwise functions. Node 0 is the
observation. Weights are float64 arrays that hold the model's float32 constants exactly, so a `Network` is the same
function as the ONNX file in real arithmetic; what float32 execution adds to it is `bounds`' business.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .functions import FUNCTIONS, Function

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Affine:
    """y = sum_k W_k x_k + b over source nodes k.

    Attributes:
        sources: indices of the nodes that feed this one.
        weights: per source a matrix [n, n_source], or a vector [n] that stands for a diagonal matrix.
        bias: [n]
        name: the ONNX node it comes from, for messages.
    """

    sources: tuple[int, ...]
    weights: tuple[Array, ...]
    bias: Array
    name: str = ""

    @property
    def size(self) -> int:
        return len(self.bias)

    @cached_property
    def magnitudes(self) -> tuple[Array, ...]:
        """|W_k|, kept because every bound needs them."""
        return tuple(np.abs(w) for w in self.weights)


@dataclass(frozen=True)
class Elementwise:
    """y = f(x) entry by entry, f one of `functions.FUNCTIONS`."""

    source: int
    function: str
    size: int
    parameters: tuple[float, ...] = ()
    name: str = ""

    @property
    def facts(self) -> Function:
        return FUNCTIONS[self.function]

    def __call__(self, x: Array) -> Array:
        return self.facts.value(x, self.parameters)

    def derivative(self, x: Array) -> Array:
        """A (sub)gradient at x."""
        return self.facts.slope(x, self.parameters)


Node = Affine | Elementwise


@dataclass(frozen=True)
class Network:
    """A policy as a graph in topological order; `nodes[i]` has index i + 1, index 0 is the observation."""

    inputs: int
    nodes: tuple[Node, ...]

    @property
    def outputs(self) -> int:
        return self.nodes[-1].size

    @property
    def parameters(self) -> int:
        return sum(w.size for n in self.nodes if isinstance(n, Affine) for w in (*n.weights, n.bias))

    def values(self, x: Array) -> list[Array]:
        """Every node's value [N, n] at observations x [N, inputs], in float64."""
        values = [np.asarray(x, dtype=float)]
        for node in self.nodes:
            if isinstance(node, Affine):
                y = np.broadcast_to(node.bias, (len(x), node.size))
                for source, weight in zip(node.sources, node.weights, strict=True):
                    y = y + (values[source] * weight if weight.ndim == 1 else values[source] @ weight.T)
                values.append(y)
            else:
                values.append(node(values[node.source]))
        return values

    def __call__(self, x: Array) -> Array:
        """The action [N, outputs] at observations x [N, inputs], in float64."""
        return self.values(x)[-1]

    def gradient(self, x: Array, seed: Array) -> Array:
        """The gradient [N, inputs] of sum_i seed_i * action_i at x [N, inputs]; seed is [N, outputs]."""
        values = self.values(x)
        grads: dict[int, Array] = {len(self.nodes): seed}
        for index in range(len(self.nodes), 0, -1):
            grad = grads.pop(index, None)
            if grad is None:
                continue
            node = self.nodes[index - 1]
            if isinstance(node, Affine):
                terms = [
                    (s, grad * w if w.ndim == 1 else grad @ w) for s, w in zip(node.sources, node.weights, strict=True)
                ]
            else:
                terms = [(node.source, grad * node.derivative(values[node.source]))]
            for source, term in terms:
                grads[source] = grads[source] + term if source in grads else term
        return grads.get(0, np.zeros((len(x), self.inputs)))
