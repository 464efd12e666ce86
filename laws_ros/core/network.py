"""The layer graph that bounds are computed on, and its reference evaluation.

A policy is a graph of three kinds of nodes: affine maps of earlier nodes, elementwise functions, and normalisations.
Node 0 is the observation. Weights are float64 arrays that hold the model's float32 constants exactly, so a `Network` is
the same function as the ONNX file in real arithmetic; what float32 execution adds to it is `bounds`' business.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .functions import FUNCTIONS, Function

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Affine:
    """y = sum_k W_k x_k + b over source nodes k.

    Attributes:
        sources: indices of the nodes that feed this one, each once.
        weights: per source a matrix [n, n_source], or a vector [n] that stands for a diagonal matrix.
        bias: [n]
        name: the ONNX node it comes from, for messages.
    """

    sources: tuple[int, ...]
    weights: tuple[Array, ...]
    bias: Array
    name: str = ""

    def __post_init__(self) -> None:
        if len(set(self.sources)) < len(self.sources):
            raise ValueError(f"affine node {self.name!r}: sources {self.sources}, each may be there once")

    @property
    def size(self) -> int:
        return len(self.bias)

    @cached_property
    def magnitudes(self) -> tuple[Array, ...]:
        """|W_k|, kept because every bound needs them."""
        return tuple(np.abs(w) for w in self.weights)


@dataclass(frozen=True, eq=False)
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

    @property
    def sources(self) -> tuple[int, ...]:
        return (self.source,)

    def derivative(self, x: Array) -> Array:
        """A (sub)gradient at x."""
        return self.facts.slope(x, self.parameters)


@dataclass(frozen=True, eq=False)
class Normalize:
    """y = u / sqrt(mean(u^2) + epsilon) over all entries of one observation's u.

    The heart of RMS normalisation, and of LayerNormalization between an affine node that centres and one that has gain
    and bias.

    Attributes:
        source: index of u.
        squared: index of the node whose squares the executed program adds up: u itself, or, where a kernel takes the
            variance as mean(x^2) - mean(x)^2, the x that u centres. It matters to the execution error only
            (docs/soundness.md, "Normalisation").
    """

    source: int
    size: int
    epsilon: float
    squared: int
    name: str = ""

    @property
    def sources(self) -> tuple[int, ...]:
        return self.source, self.squared

    def scale(self, u: Array) -> Array:
        """[N, 1]: the factor 1 / sqrt(mean(u^2) + epsilon) at u [N, n]; infinite where both are zero."""
        with np.errstate(divide="ignore"):
            factor: Array = 1.0 / np.sqrt((u * u).mean(axis=1, keepdims=True) + self.epsilon)
        return factor

    def __call__(self, u: Array) -> Array:
        with np.errstate(invalid="ignore"):
            y: Array = u * self.scale(u)
        return y

    def pull(self, u: Array, grad: Array) -> Array:
        """The gradient [N, n] with respect to u of sum_i grad_i y_i."""
        scale = self.scale(u)
        along = (grad * u).mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return scale * (grad - scale**2 * along * u)


Node = Affine | Elementwise | Normalize


@dataclass(frozen=True, eq=False)
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

    def unlimited(self, low: Array, high: Array) -> tuple[Network, Array] | None:
        """The same network without the clip at its end, for actions that are cut to [low, high] [m] on delivery.

        Where the network ends in a clip, and after it only scales and shifts each action, what is delivered is the same
        without it, as long as the clip is no narrower than the limits: rounding is monotone, so scaling and shifting
        what was clipped gives the clipped value of scaling and shifting, to the clip's own ends as computed. By as much
        as those fall short of the limits, delivered actions may differ.

        Returns:
            The network, and how far delivered actions may be apart [m]; None where there is no such clip.
        """
        end = len(self.nodes)
        while end and isinstance(node := self.nodes[end - 1], Affine):
            if node.sources != (end - 1,) or node.weights[0].ndim != 1 or not (node.weights[0] > 0.0).all():
                return None
            end -= 1
        clip = self.nodes[end - 1] if end else None
        if not isinstance(clip, Elementwise) or clip.function != "clip" or clip.source != end - 1:
            return None
        tail = [n for n in self.nodes[end:] if isinstance(n, Affine)]
        ends, size = [np.full(self.outputs, limit) for limit in clip.parameters], np.abs(clip.parameters).max()
        magnitude = np.full(self.outputs, size)
        for affine in tail:
            ends = [affine.weights[0] * k + affine.bias for k in ends]
            magnitude = affine.weights[0] * magnitude + np.abs(affine.bias)
        rounding = 4.0 * (len(tail) + 1) * 2.0**-24 * magnitude + 2.0**-120
        short = np.maximum(np.maximum(ends[0] - low, high - ends[1]), 0.0) + rounding
        if not (short <= 1e-5 * (high - low)).all():
            return None
        moved = [replace(n, sources=(end + k - 1,)) for k, n in enumerate(tail)]
        return Network(self.inputs, (*self.nodes[: end - 1], *moved)), short

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
            elif isinstance(node, Normalize):
                terms = [(node.source, node.pull(values[node.source], grad))]
            else:
                terms = [(node.source, grad * node.derivative(values[node.source]))]
            for source, term in terms:
                grads[source] = grads[source] + term if source in grads else term
        return grads.get(0, np.zeros((len(x), self.inputs)))
