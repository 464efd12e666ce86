"""The one adapter from ONNX to `core.network.Network`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

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


class _Reader:
    """Walks the ONNX graph; `self.index` maps each tensor that depends on the observation to its node's index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        graph = load_model(path).graph
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
        for node in graph.node:
            self._add(node)
        output = graph.output[0].name
        if output not in self.index:
            raise ModelError(f"{path}: output {output} does not depend on the observation")
        last = self.index[output]
        # The network's output is its last node: drop what comes after, keep an identity input as an affine map.
        self.nodes = self.nodes[:last] or [Affine((0,), (np.ones(self.inputs),), np.zeros(self.inputs), "identity")]
        self.network = Network(self.inputs, tuple(self.nodes))

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
        reader: Callable[..., Node | None] | None = getattr(self, f"_read_{node.op_type.lower()}", None)
        if node.domain not in ("", "ai.onnx") or reader is None:
            known = sorted(n[6:] for n in dir(self) if n.startswith("_read_"))
            raise self._refuse(
                node,
                f"this operator cannot be bounded; bounded are {', '.join(known)} "
                "(a policy with other operators still runs, but without formal certificates)",
            )
        made = reader(node, **attributes)
        if made is None:
            self.index[node.output[0]] = self._observed(node, node.input[0])
        else:
            self.nodes.append(made)
            self.index[node.output[0]] = len(self.nodes)

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

    # One reader per operator; None means "the same values under another name or shape".

    def _read_identity(self, node: onnx.NodeProto) -> None:
        return None

    def _read_flatten(self, node: onnx.NodeProto, axis: int = 1) -> None:
        if axis != 1:
            raise self._refuse(node, f"axis {axis}: only the batch axis may stay apart")

    def _read_reshape(self, node: onnx.NodeProto, allowzero: int = 0) -> None:
        shape = self.constants.get(node.input[1])
        size = self._size(self._observed(node, node.input[0]))
        rest = [] if shape is None else [int(d) for d in shape[1:]]
        if not rest or (int(np.prod([d for d in rest if d > 0])) != size and -1 not in rest):
            raise self._refuse(
                node, f"target shape {None if shape is None else shape.tolist()} does not keep the batch axis"
            )

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
        return source, self._vector(node, other, self._size(source)), first

    def _read_add(self, node: onnx.NodeProto) -> Affine:
        source, value, _ = self._pair(node)
        return Affine((source,), (np.ones(len(value)),), value, node.name)

    def _read_sub(self, node: onnx.NodeProto) -> Affine:
        source, value, first = self._pair(node)
        sign = -1.0 if first else 1.0
        return Affine((source,), (np.full(len(value), sign),), -sign * value, node.name)

    def _read_mul(self, node: onnx.NodeProto) -> Affine:
        source, value, _ = self._pair(node)
        return Affine((source,), (value,), np.zeros(len(value)), node.name)

    def _read_div(self, node: onnx.NodeProto) -> Affine:
        source, value, first = self._pair(node)
        if first or (value == 0.0).any():
            raise self._refuse(node, "only a division by constants other than zero is bounded")
        # 1 / value is rounded in float64; the execution error of an affine node covers it (bounds.EXECUTION_TERMS).
        return Affine((source,), (1.0 / value,), np.zeros(len(value)), node.name)

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
