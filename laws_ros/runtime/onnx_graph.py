"""The one adapter from ONNX to `core.network.Network`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from laws_ros.core.errors import ModelError
from laws_ros.core.network import Affine, Elementwise, Network, Node


def load_model(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file.

    Raises:
        ModelError: missing, truncated, or not ONNX.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such policy file")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and onnx raise many kinds for a damaged file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path}: not a readable ONNX model, the file is damaged or truncated ({reason})") from None
    return model


def load_network(path: str | Path) -> Network:
    """The layer graph of an ONNX policy with one observation input and one action output.

    Raises:
        ModelError: an operator, attribute or shape that cannot be bounded, refused by the node's name.
    """
    return _Reader(Path(path)).network


# Operators that only move values, and linear ones that are read off by what they do to unit vectors. What they do is
# asked of onnx's own reference implementation, so every attribute and opset is covered.
MOVES = (
    "Concat",
    "Expand",
    "Flatten",
    "Gather",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
PROBED = ("AveragePool", "Conv", "GlobalAveragePool", "ReduceMean", "ReduceSum")


class _Reader:
    """Walks the ONNX graph.

    For each tensor that depends on the observation, `index` has its node (whose values are the tensor's, in row-major
    order) and `shape` its shape without the batch axis.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        model = load_model(path)
        graph = model.graph
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ModelError(
                f"{path}: a policy has one observation input and one action output, this has inputs "
                f"{[i.name for i in inputs]} and outputs {[o.name for o in graph.output]}"
            )
        dims = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        if not dims or any(d < 1 for d in dims[1:]):
            raise ModelError(
                f"{path}: input {inputs[0].name} has shape {dims}; only its first axis (batch) may be free"
            )
        self.inputs = int(np.prod(dims[1:])) if len(dims) > 1 else dims[0]
        self.nodes: list[Node] = []
        self.index = {inputs[0].name: 0}
        self.shape = {inputs[0].name: tuple(dims[1:]) if len(dims) > 1 else tuple(dims)}
        for node in graph.node:
            self._add(node)
        output = graph.output[0].name
        if output not in self.index:
            raise ModelError(f"{path}: output {output} does not depend on the observation")
        self.network = self._pruned(self.index[output])

    def _pruned(self, output: int) -> Network:
        """Only the nodes that the output depends on, it last."""
        needed, stack = {0}, [output]
        while stack:
            index = stack.pop()
            if index not in needed:
                needed.add(index)
                node = self.nodes[index - 1]
                stack += node.sources if isinstance(node, Affine) else (node.source,)
        number = {index: k for k, index in enumerate(sorted(needed))}
        nodes: list[Node] = []
        for index in sorted(needed - {0}):
            node = self.nodes[index - 1]
            if isinstance(node, Affine):
                nodes.append(replace(node, sources=tuple(number[k] for k in node.sources)))
            else:
                nodes.append(replace(node, source=number[node.source]))
        identity = Affine((0,), (np.ones(self.inputs),), np.zeros(self.inputs), "identity")
        return Network(self.inputs, tuple(nodes) or (identity,))

    def _size(self, index: int) -> int:
        return self.inputs if index == 0 else self.nodes[index - 1].size

    def _refuse(self, node: onnx.NodeProto, why: str) -> ModelError:
        return ModelError(f"{self.path}: node {node.name or node.output[0]!r} ({node.op_type}): {why}")

    def _add(self, node: onnx.NodeProto) -> None:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            if "value" not in attributes:
                raise self._refuse(node, f"constant given as {sorted(attributes)}; only a tensor value is read")
            self.constants[node.output[0]] = numpy_helper.to_array(attributes["value"])
            return
        if node.domain in ("", "ai.onnx") and node.op_type in (*MOVES, *PROBED):
            if any(name in self.index for name in node.input):
                (self._move if node.op_type in MOVES else self._probe)(node)
            else:  # constants made of constants
                outputs = self._run(node, {name: self.constants[name] for name in node.input if name})
                self.constants.update(zip(node.output, outputs, strict=True))
            return
        reader: Callable[..., Node] | None = getattr(self, f"_read_{node.op_type.lower()}", None)
        if node.domain not in ("", "ai.onnx") or reader is None:
            known = sorted(
                [*(n[6:] for n in dir(self) if n.startswith("_read_")), *(n.lower() for n in (*MOVES, *PROBED))]
            )
            raise self._refuse(
                node,
                f"this operator cannot be bounded; bounded are {', '.join(known)} "
                "(a policy with other operators still runs, but without formal certificates)",
            )
        made = reader(node, **attributes)
        like = next((self.shape[name] for name in node.input if name in self.shape), (made.size,))
        self._append(node.output[0], made, like if int(np.prod(like)) == made.size else (*like[:-1], -1))

    def _append(self, name: str, node: Node, shape: tuple[int, ...]) -> None:
        self.nodes.append(node)
        self.index[name] = len(self.nodes)
        self.shape[name] = _fill(shape, node.size) if -1 in shape else shape

    def _run(self, node: onnx.NodeProto, feeds: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        try:
            return list(ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds))
        except Exception as error:  # the reference implementation raises many kinds
            raise self._refuse(
                node, f"cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from None

    def _move(self, node: onnx.NodeProto) -> None:
        """Let the operator move indices instead of values, two observations at once to see that it keeps them apart."""
        sources = list(dict.fromkeys(self.index[n] for n in node.input if n in self.index))
        start = dict(zip(sources, np.cumsum([0, *(self._size(k) for k in sources)]), strict=False))
        total = sum(self._size(k) for k in sources)
        indices, values = {}, {}
        for name in node.input:
            if name in self.index:
                count, shape = self._size(self.index[name]), (2, *self.shape[name])
                place = start[self.index[name]] + np.arange(count)
                indices[name] = np.stack([place, place + total]).reshape(shape)
                values[name] = np.zeros(shape)
            elif name:
                constant = self.constants.get(name)
                if constant is None:
                    raise self._refuse(node, f"its input {name!r} is not a constant")
                moved = node.op_type == "Concat"
                if moved and constant.shape[:1] == (1,):  # of a model whose batch is fixed to 1
                    constant = np.repeat(constant, 2, axis=0)
                values[name] = constant.astype(float) if moved else constant
                indices[name] = np.full(constant.shape, -1) if moved else constant
        for name, place, fixed in zip(node.output, self._run(node, indices), self._run(node, values), strict=True):
            constant = place[:1] < 0
            if len(place) != 2 or not np.array_equal(np.where(constant, place[:1], place[:1] + total), place[1:]):
                raise self._refuse(node, "it mixes observations of a batch")
            where = place[0].reshape(-1)
            if len(sources) == 1 and np.array_equal(where, np.arange(total)):  # the same values in another shape
                self.index[name], self.shape[name] = sources[0], place.shape[1:]
                continue
            weights = []
            for k in sources:
                weight = np.zeros((len(where), self._size(k)))
                here = (where >= start[k]) & (where < start[k] + self._size(k))
                weight[np.flatnonzero(here), where[here] - start[k]] = 1.0
                weights.append(weight)
            bias = np.where(where < 0, fixed[0].reshape(-1), 0.0)
            self._append(name, Affine(tuple(sources), tuple(weights), bias, node.name), place.shape[1:])

    def _probe(self, node: onnx.NodeProto) -> None:
        """Read a linear operator off by its answers to unit vectors (exact: each output is one product plus zeros)."""
        source = self._observed(node, node.input[0])
        count = self._size(source)
        feeds: dict[str, Any] = {node.input[0]: np.eye(count).reshape(count, *self.shape[node.input[0]])}
        linear = onnx.NodeProto()
        linear.CopyFrom(node)
        bias_name = node.input[2] if node.op_type == "Conv" and len(node.input) > 2 else ""
        if bias_name:
            del linear.input[2]
        for name in linear.input[1:]:
            if name:
                value = self._constant(node, name)
                feeds[name] = value.astype(np.int64) if self.constants[name].dtype.kind == "i" else value
        (answer,) = self._run(linear, feeds)
        if answer.shape[:1] != (count,):
            raise self._refuse(node, "it mixes observations of a batch")
        shape = answer.shape[1:]
        bias = np.zeros(shape)
        if bias_name:
            bias = bias + self._constant(node, bias_name).reshape(-1, *(1 for _ in shape[1:]))
        weight = np.ascontiguousarray(answer.reshape(count, -1).T)
        self._append(node.output[0], Affine((source,), (weight,), bias.reshape(-1), node.name), shape)

    def _observed(self, node: onnx.NodeProto, name: str) -> int:
        if name not in self.index:
            raise self._refuse(node, f"its input {name!r} does not depend on the observation")
        return self.index[name]

    def _constant(self, node: onnx.NodeProto, name: str) -> np.ndarray[Any, Any]:
        if name not in self.constants:
            raise self._refuse(node, f"its input {name!r} is not a constant")
        value = self.constants[name]
        if value.dtype.kind == "f" and value.dtype != np.float32:
            raise self._refuse(node, f"its constant {name!r} is {value.dtype}; certificates are for float32 policies")
        if not np.isfinite(value).all():
            raise self._refuse(node, f"its constant {name!r} holds a NaN or an infinite value")
        return value.astype(float)

    def _vector(self, node: onnx.NodeProto, name: str, size: int) -> np.ndarray[Any, Any]:
        value = self._constant(node, name)
        if value.size not in (1, size) or (value.size > 1 and value.shape[-1] != size):
            raise self._refuse(node, f"its constant {name!r} has shape {value.shape}, a vector of {size} is expected")
        return np.array(np.broadcast_to(value.reshape(-1), (size,)))

    # One reader per operator.

    def _read_gemm(
        self, node: onnx.NodeProto, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
    ) -> Affine:
        source = self._observed(node, node.input[0])
        weight = self._constant(node, node.input[1])
        if transA or alpha != 1.0 or beta != 1.0:
            raise self._refuse(node, f"transA={transA}, alpha={alpha}, beta={beta}: only 0, 1, 1 are bounded")
        weight = weight if transB else weight.T
        if weight.shape[1] != self._size(source):
            raise self._refuse(node, f"weight of {weight.shape[1]} columns after {self._size(source)} values")
        has_bias = len(node.input) > 2 and node.input[2]
        bias = self._vector(node, node.input[2], len(weight)) if has_bias else np.zeros(len(weight))
        return Affine((source,), (np.ascontiguousarray(weight),), bias, node.name)

    def _read_matmul(self, node: onnx.NodeProto) -> Affine:
        source = self._observed(node, node.input[0])
        weight = self._constant(node, node.input[1])
        if weight.ndim != 2 or weight.shape[0] != self._size(source):
            raise self._refuse(node, f"weight of shape {weight.shape} after {self._size(source)} values")
        return Affine((source,), (np.ascontiguousarray(weight.T),), np.zeros(weight.shape[1]), node.name)

    def _pair(self, node: onnx.NodeProto) -> tuple[int, np.ndarray[Any, Any], bool]:
        """The observed operand's index, the constant one as a vector, and whether the constant comes first."""
        first = node.input[0] in self.constants
        name, other = (node.input[1], node.input[0]) if first else (node.input[0], node.input[1])
        source = self._observed(node, name)
        value, shape = self._constant(node, other), self.shape[name]
        try:
            full = np.broadcast_to(value, (1, *shape))
        except ValueError:
            raise self._refuse(node, f"its constant {other!r} has shape {value.shape}, not that of {shape}") from None
        return source, np.array(full.reshape(-1)), first

    def _both(self, node: onnx.NodeProto) -> tuple[int, int] | None:
        """The two operands' indices if both depend on the observation; they must have one shape."""
        if not all(name in self.index for name in node.input):
            return None
        a, b = (self.shape[name] for name in node.input)
        if a != b:
            raise self._refuse(node, f"its operands have shapes {a} and {b}; only equal ones are bounded")
        return self.index[node.input[0]], self.index[node.input[1]]

    def _sum(self, node: onnx.NodeProto, sign: float) -> Affine:
        both = self._both(node)
        if both:
            ones = np.ones(self._size(both[0]))
            return Affine(both, (ones, sign * ones), np.zeros(len(ones)), node.name)
        source, value, first = self._pair(node)
        own, other = (sign, 1.0) if first else (1.0, sign)
        return Affine((source,), (np.full(len(value), own),), other * value, node.name)

    def _read_add(self, node: onnx.NodeProto) -> Affine:
        return self._sum(node, 1.0)

    def _read_sub(self, node: onnx.NodeProto) -> Affine:
        return self._sum(node, -1.0)

    def _read_mul(self, node: onnx.NodeProto) -> Node:
        both = self._both(node)
        if both:
            return self._gate(node, *both)
        source, value, _ = self._pair(node)
        return Affine((source,), (value,), np.zeros(len(value)), node.name)

    def _gate(self, node: onnx.NodeProto, a: int, b: int) -> Node:
        """A product of two tensors, where it is an activation as exporters spell it: silu or gelu."""
        for x, gate in ((a, b), (b, a)):
            size = self._size(x)
            if self._is(gate, "sigmoid") == x:
                return Elementwise(x, "silu", size, (), node.name)
            one = self._scaled(gate)
            inner = self._is(one[0], "erf") if one and one[1] == 1.0 and one[2] == 1.0 else None
            argument = self._scaled(inner) if inner is not None else None
            if argument is None or abs(argument[1] - 0.5**0.5) > 1e-7 or argument[2] != 0.0:
                continue
            if argument[0] == x:  # x * (1 + erf(x / sqrt 2)) is twice gelu
                self.nodes.append(Elementwise(x, "gelu", size, (), node.name))
                return Affine((len(self.nodes),), (np.full(size, 2.0),), np.zeros(size), node.name)
            half = self._scaled(x)
            if half and half[0] == argument[0] and half[1] == 0.5 and half[2] == 0.0:
                return Elementwise(half[0], "gelu", size, (), node.name)
        raise self._refuse(node, "a product of two tensors is bounded only where it spells silu or gelu")

    def _is(self, index: int, function: str) -> int | None:
        """The source of a node that is this function, else None."""
        node = self.nodes[index - 1] if index else None
        return node.source if isinstance(node, Elementwise) and node.function == function else None

    def _scaled(self, index: int) -> tuple[int, float, float] | None:
        """(source, factor, offset) of a node that scales and shifts all its values alike, else None."""
        node = self.nodes[index - 1] if index else None
        if not isinstance(node, Affine) or len(node.sources) != 1 or node.weights[0].ndim != 1:
            return None
        factors, offsets = np.unique(node.weights[0]), np.unique(node.bias)
        return (node.sources[0], float(factors[0]), float(offsets[0])) if len(factors) == len(offsets) == 1 else None

    def _read_div(self, node: onnx.NodeProto) -> Affine:
        source, value, first = self._pair(node)
        if first or (value == 0.0).any():
            raise self._refuse(node, "only a division by constants other than zero is bounded")
        # 1 / value is rounded in float64; the execution error of an affine node covers it (bounds.EXECUTION_TERMS).
        return Affine((source,), (1.0 / value,), np.zeros(len(value)), node.name)

    def _read_batchnormalization(
        self,
        node: onnx.NodeProto,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
        spatial: int = 1,
    ) -> Affine:
        source, shape = self._observed(node, node.input[0]), self.shape[node.input[0]]
        if training_mode:
            raise self._refuse(node, "training mode")
        scale, shift, mean, variance = (
            np.broadcast_to(self._constant(node, name).reshape(-1, *(1 for _ in shape[1:])), shape).reshape(-1)
            for name in node.input[1:5]
        )
        # In three steps: then the roundings of each are covered, in whatever form it is executed.
        ones = np.ones(len(mean))
        self.nodes.append(Affine((source,), (ones,), -mean, node.name))
        self.nodes.append(Affine((len(self.nodes),), (scale / np.sqrt(variance + epsilon),), 0.0 * ones, node.name))
        return Affine((len(self.nodes),), (ones,), np.array(shift), node.name)

    def _read_gelu(self, node: onnx.NodeProto, approximate: bytes = b"none") -> Elementwise:
        if approximate != b"none":
            raise self._refuse(node, f"approximate={approximate.decode()!r}: only the exact form is bounded")
        return self._elementwise(node, "gelu")

    def _read_erf(self, node: onnx.NodeProto) -> Elementwise:
        return self._elementwise(node, "erf")

    def _read_relu(self, node: onnx.NodeProto) -> Elementwise:
        return self._elementwise(node, "relu")

    def _read_tanh(self, node: onnx.NodeProto) -> Elementwise:
        return self._elementwise(node, "tanh")

    def _read_clip(self, node: onnx.NodeProto, min: float | None = None, max: float | None = None) -> Elementwise:
        limits = [min, max]
        for k in (0, 1):
            if len(node.input) > k + 1 and node.input[k + 1]:
                limits[k] = float(self._constant(node, node.input[k + 1]).reshape(()))
        if limits[0] is None or limits[1] is None or limits[0] >= limits[1]:
            raise self._refuse(node, f"limits {limits}: a lower limit below an upper one is needed")
        return self._elementwise(node, "clip", limits[0], limits[1])

    def _read_leakyrelu(self, node: onnx.NodeProto, alpha: float = 0.01) -> Elementwise:
        return self._elementwise(node, "leakyrelu", alpha)

    def _read_elu(self, node: onnx.NodeProto, alpha: float = 1.0) -> Elementwise:
        return self._elementwise(node, "elu", alpha)

    def _read_selu(
        self, node: onnx.NodeProto, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
    ) -> Elementwise:
        return self._elementwise(node, "selu", alpha, gamma)

    def _read_sigmoid(self, node: onnx.NodeProto) -> Elementwise:
        return self._elementwise(node, "sigmoid")

    def _read_softplus(self, node: onnx.NodeProto) -> Elementwise:
        return self._elementwise(node, "softplus")

    def _elementwise(self, node: onnx.NodeProto, function: str, *parameters: float) -> Elementwise:
        if any(not 0.0 <= p < 100.0 for p in parameters if function != "clip"):
            raise self._refuse(node, f"parameters {parameters}: values from 0 to 100 are bounded")
        source = self._observed(node, node.input[0])
        return Elementwise(source, function, self._size(source), parameters, node.name)


def _fill(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """A shape with its last axis set so that it holds `size` values."""
    return (*shape[:-1], size // int(np.prod(shape[:-1])))
