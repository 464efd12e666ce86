"""The one adapter from ONNX to `core.network.Network`."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, inliner, numpy_helper
from onnx.reference import ReferenceEvaluator

from laws_ros.core.errors import ModelError
from laws_ros.core.network import Affine, Array, Elementwise, Network, Node, Normalize

from .spelling import Formula, Terms, X, gated, large_softplus, plus, recognise, scaled, times


def load_model(path: str | Path) -> onnx.ModelProto:
    """Read and check an ONNX file.

    Raises:
        ModelError: missing, truncated, not ONNX, or with weights in a second file (which its hash would not cover).
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such policy file")
    try:
        model = onnx.load(str(path), load_external_data=False)
        outside = [t.name for t in model.graph.initializer if external_data_helper.uses_external_data(t)]
        if not outside:
            onnx.checker.check_model(model)
    except Exception as error:  # protobuf and onnx raise many kinds for a damaged file
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ModelError(f"{path}: not a readable ONNX model, the file is damaged or truncated ({lines[0]})") from None
    if outside:
        raise ModelError(
            f"{path}: weights such as {outside[0]!r} are in a second file; export with external_data=False, or write "
            "one file with onnx.save_model(onnx.load(path), path, save_as_external_data=False)"
        )
    return model


def load_network(path: str | Path) -> Network:
    """The layer graph of an ONNX policy with one observation input and one action output.

    Raises:
        ModelError: an operator, attribute or shape that cannot be bounded, refused by the node's name.
    """
    model = load_model(path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    reader = _Reader(Path(path), model, batch=2)
    if reader.counted and pickle.dumps(reader.network) != pickle.dumps(_Reader(Path(path), model, batch=1).network):
        raise ModelError(f"{path}: its action depends on how many observations it is given at once; {ADVICE}")
    return reader.network


ADVICE = "a statistical certificate is possible: laws build --kind statistical"

# Operators that only move values, and linear ones that are read off by what they do to unit vectors. What they do is
# asked of onnx's own reference implementation, so every attribute and opset is covered.
MOVES = ("Concat", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
PROBED = ("AveragePool", "Conv", "ConvTranspose", "GlobalAveragePool", "MatMul", "Pad", "ReduceMean", "ReduceSum")
# Operators on constants alone: those that IEEE arithmetic rounds correctly, so that every implementation agrees.
FOLDED = (
    *MOVES,
    *("Abs", "Add", "Cast", "Constant", "ConstantOfShape", "Div", "Equal", "Identity", "Max", "Min", "Mul", "Neg"),
    *("Range", "Reciprocal", "Shape", "Sqrt", "Sub", "Where"),
)
PLAIN = {
    "Erf": "erf",
    "HardSwish": "hardswish",
    "Mish": "mish",
    "Relu": "relu",
    "Sigmoid": "sigmoid",
    "Softplus": "softplus",
    "Tanh": "tanh",
}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Values:
    """A tensor that is a node of the network, in row-major order; `shape` is that of one observation."""

    index: int
    shape: Shape

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class _Spread:
    """(mean(u^2) + epsilon) ** power over all values u of node `base`: what a normalisation divides by."""

    base: int
    epsilon: float
    power: float
    shape: Shape
    name: str


@dataclass(frozen=True)
class _Beyond:
    """x > limit, as the branches of a softplus have it."""

    x: _Values
    limit: float
    name: str

    @property
    def shape(self) -> Shape:
        return self.x.shape


@dataclass(frozen=True)
class _Unread:
    """A tensor that cannot be bounded, because of an error that is raised once its values are needed.

    Of some tensors only the shape is: exporters of probability distributions write deterministic actions so.
    """

    error: ModelError
    example: NDArray[Any]


class _Reader:
    """Walks the ONNX graph.

    Attributes:
        tensors: what depends on the observation, by name; constants: what does not.
        counted: the graph asks for the shape of something. Then it has to be read again with one observation: this is
            the program that a robot runs.
    """

    def __init__(self, path: Path, model: onnx.ModelProto, batch: int) -> None:
        """Read a graph with one observation at a time, or with two to see that it keeps them apart."""
        self.path = path
        graph = model.graph
        self.opsets = {o.domain: o.version for o in model.opset_import}
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        inputs = [i for i in graph.input if i.name not in self.constants]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise ModelError(
                f"{path}: a policy has one observation input and one action output, this has inputs "
                f"{[i.name for i in inputs]} and outputs {[o.name for o in graph.output]}; export a module that takes "
                "only the observation and returns only the action"
            )
        dims = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        if not dims or any(d < 1 for d in dims[1:]):
            raise ModelError(
                f"{path}: input {inputs[0].name} has shape {dims}; only its first axis (batch) may be free"
            )
        self.lead: tuple[int, ...] = () if len(dims) == 1 else (1,) if dims[0] == 1 else (batch,)  # the batch axis
        shape = tuple(dims[len(self.lead) :])
        self.inputs = int(np.prod(shape))
        self.counted = False
        self.nodes: list[Node] = []
        self.tensors: dict[str, _Values | Formula | _Spread | _Beyond | _Unread] = {inputs[0].name: _Values(0, shape)}
        needed = _needed(graph)
        for node in needed:
            try:
                self._read(node)
            except ModelError as error:
                self._skip(node, error)
            except (IndexError, KeyError, TypeError, ValueError) as error:  # operands or attributes of another kind
                self._skip(node, self._refuse(node, f"cannot be read: {type(error).__name__}: {error}"))
        output = graph.output[0].name
        if output not in self.tensors:
            raise ModelError(f"{path}: output {output} does not depend on the observation")
        self.network = self._pruned(self._values(needed[-1], output).index)

    def _pruned(self, output: int) -> Network:
        """Only the nodes that the output depends on, it last."""
        needed, stack = {0}, [output]
        while stack:
            index = stack.pop()
            if index not in needed:
                needed.add(index)
                stack += self.nodes[index - 1].sources
        number = {index: k for k, index in enumerate(sorted(needed))}
        nodes: list[Node] = []
        for index in sorted(needed - {0}):
            node = self.nodes[index - 1]
            if isinstance(node, Affine):
                nodes.append(replace(node, sources=tuple(number[k] for k in node.sources)))
            elif isinstance(node, Normalize):
                nodes.append(replace(node, source=number[node.source], squared=number[node.squared]))
            else:
                nodes.append(replace(node, source=number[node.source]))
        identity = Affine((0,), (np.ones(self.inputs),), np.zeros(self.inputs), "identity")
        return Network(self.inputs, tuple(nodes) or (identity,))

    def _refuse(self, node: onnx.NodeProto, why: str) -> ModelError:
        return ModelError(f"{self.path}: node {node.name or node.output[0]!r} ({node.op_type}): {why}; {ADVICE}")

    def _read(self, node: onnx.NodeProto) -> None:
        operator = node.op_type if node.domain in ("", "ai.onnx") else ""
        reader: Callable[..., Any] | None = getattr(self, f"_read_{operator.lower()}", None)
        if not any(name in self.tensors for name in node.input) and operator in FOLDED:
            feeds = {name: self._value(node, name) for name in node.input if name}
            self.constants.update(zip(node.output, self._run(node, feeds), strict=True))
        elif not any(name in self.tensors for name in node.input):
            raise self._refuse(node, "it computes a constant when the policy runs; export with constants folded")
        elif operator == "Shape":
            self.counted = True
            self.constants.update(zip(node.output, self._run(node, self._examples(node)), strict=True))
        elif operator in MOVES:
            self._move(node)
        elif operator in PLAIN:
            self.tensors[node.output[0]] = self._elementwise(node, PLAIN[operator])
        elif reader is not None:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            self.tensors[node.output[0]] = reader(node, **attributes)
        elif operator in PROBED:
            self.tensors[node.output[0]] = self._probe(node)
        elif operator in ("ArgMax", "ArgMin"):
            why = f"export the values before it, and set `decision: {operator.lower()}` in the policy's card"
            raise self._refuse(node, why)
        else:
            raise self._refuse(node, "this operator cannot be bounded")

    def _skip(self, node: onnx.NodeProto, error: ModelError) -> None:
        try:
            answers = self._run(node, self._examples(node))
        except ModelError:
            raise error from None
        for name, answer in zip(node.output, answers, strict=False):
            self.tensors[name] = _Unread(error, np.zeros_like(answer))

    def _run(self, node: onnx.NodeProto, feeds: dict[str, Any]) -> list[NDArray[Any]]:
        try:
            with np.errstate(all="ignore"):  # zeros stand for values of which only the shape is asked
                return list(ReferenceEvaluator(node, opsets=self.opsets).run(None, feeds))
        except Exception as error:  # the reference implementation raises many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise self._refuse(node, f"cannot be read: {reason}") from None

    # Operands.

    def _examples(self, node: onnx.NodeProto) -> dict[str, NDArray[Any]]:
        """Operands of the right shapes, to see the shape of a result."""
        examples = {}
        for name in node.input:
            tensor = self.tensors.get(name)
            if isinstance(tensor, _Unread):
                examples[name] = tensor.example
            elif tensor is not None:
                kind = bool if isinstance(tensor, _Beyond) else np.float32
                examples[name] = np.zeros((*self.lead, *tensor.shape), kind)
            elif name:
                examples[name] = self._value(node, name)
        return examples

    def _values(self, node: onnx.NodeProto, name: str) -> _Values:
        """An operand that is a node of the network."""
        tensor = self.tensors.get(name)
        if isinstance(tensor, _Values):
            return tensor
        if isinstance(tensor, _Unread):
            raise tensor.error
        if tensor is None:
            raise self._refuse(node, f"its input {name!r} does not depend on the observation")
        raise self._refuse(node, f"its input {name!r} comes from node {tensor.name!r}, which {SPELLED}")

    def _value(self, node: onnx.NodeProto, name: str) -> NDArray[Any]:
        if name not in self.constants:
            raise self._refuse(node, f"its input {name!r} is not a constant")
        return self.constants[name]

    def _constant(self, node: onnx.NodeProto, name: str) -> Array:
        value = self._value(node, name)
        if value.dtype.kind == "f" and value.dtype != np.float32:
            raise self._refuse(node, f"its constant {name!r} is {value.dtype}; certificates are for float32 policies")
        if not np.isfinite(value).all():
            raise self._refuse(node, f"its constant {name!r} holds a NaN or an infinite value")
        return value.astype(float)

    def _scalar(self, node: onnx.NodeProto, name: str) -> float | None:
        """A constant all of whose entries are equal, else None."""
        entries = np.unique(self._constant(node, name)) if name in self.constants else np.zeros(0)
        return float(entries[0]) if len(entries) == 1 else None

    def _common(self, node: onnx.NodeProto) -> Shape:
        """The shape of one observation in the result of an operation entry by entry."""
        shapes = {name: example.shape for name, example in self._examples(node).items()}
        alone = {n: (1, *s[1:]) if self.lead and n in self.tensors else s for n, s in shapes.items()}
        try:
            shape = tuple(np.broadcast_shapes(*alone.values()))
        except ValueError:
            raise self._refuse(node, f"its operands have shapes {shapes}, which do not fit") from None
        if self.lead and (shape[0] != 1 or any(len(alone[n]) < len(shape) for n in alone if n in self.tensors)):
            raise self._refuse(node, f"its operands have shapes {shapes}: it mixes observations of a batch")
        return tuple(shape[len(self.lead) :])

    # Results.

    def _append(self, made: Node, shape: Shape | None = None) -> _Values:
        self.nodes.append(made)
        return _Values(len(self.nodes), (made.size,) if shape is None else shape)

    def _sum_of(
        self,
        node: onnx.NodeProto,
        shape: Shape,
        terms: Sequence[tuple[_Values, Array | float]],
        bias: Array | float = 0.0,
    ) -> _Values:
        """The sum of factor * tensor over the terms, and a bias, all broadcast to a shape."""

        def entries(value: Array | float) -> Array:
            return np.array(np.broadcast_to(value, shape if np.ndim(value) <= len(shape) else (1, *shape))).reshape(-1)

        weights: dict[int, Array] = {}
        for tensor, factor in terms:
            weight = entries(factor)  # a vector, which stands for a diagonal matrix
            if tensor.shape != shape or tensor.index in weights:
                place = np.broadcast_to(np.arange(tensor.size).reshape(tensor.shape), shape).reshape(-1)
                weight = weight[:, None] * (place[:, None] == np.arange(tensor.size))
                other = weights.get(tensor.index, np.zeros(tensor.size))
                weight = weight + (np.diag(other) if other.ndim == 1 and tensor.size == len(place) else other)
            weights[tensor.index] = weight
        return self._append(Affine(tuple(weights), tuple(weights.values()), entries(bias), node.name), shape)

    def _apply(self, node: onnx.NodeProto, tensor: _Values, function: str, *parameters: float) -> _Values:
        return self._append(Elementwise(tensor.index, function, tensor.size, parameters, node.name), tensor.shape)

    def _elementwise(self, node: onnx.NodeProto, function: str, *parameters: float) -> _Values | Formula:
        if any(not 0.0 <= p < 100.0 for p in parameters if function != "clip"):
            raise self._refuse(node, f"parameters {parameters}: values from 0 to 100 are bounded")
        tensor = self.tensors[node.input[0]]
        if isinstance(tensor, Formula):
            return replace(tensor, terms=gated(function, parameters, tensor.terms))
        return self._apply(node, self._values(node, node.input[0]), function, *parameters)

    # Operators that are read off by what they do.

    def _move(self, node: onnx.NodeProto) -> None:
        """Let the operator move indices instead of values."""
        operands = {name: self._values(node, name) for name in node.input if name in self.tensors}
        sizes = {tensor.index: tensor.size for tensor in operands.values()}
        start = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
        total, batch = sum(sizes.values()), self.lead[0] if self.lead else 1
        indices: dict[str, Any] = {}
        values: dict[str, Any] = {}
        for name in filter(None, node.input):
            if name in operands:
                tensor = operands[name]
                place = start[tensor.index] + np.arange(tensor.size) + total * np.arange(batch)[:, None]
                indices[name] = place.reshape(*self.lead, *tensor.shape)
                values[name] = np.zeros(indices[name].shape)
            elif node.op_type == "Concat":
                constant = self._constant(node, name)
                if self.lead and len(constant) == 1:  # a row beside every observation
                    constant = np.repeat(constant, batch, axis=0)
                indices[name], values[name] = np.full(constant.shape, -1), constant
            else:
                indices[name] = values[name] = self._value(node, name)
        for name, where, fixed in zip(node.output, self._run(node, indices), self._run(node, values), strict=True):
            where, fixed = (np.atleast_1d(k) if self.lead else k[None] for k in (where, fixed))
            observation = np.arange(len(where)).reshape(-1, *(1 for _ in where.shape[1:]))
            where = np.where(where < 0, -1, where - total * observation)
            mixed = len(where) != batch or (where != where[:1]).any() or (where >= total).any()
            if mixed or (fixed != fixed[:1]).any():
                raise self._refuse(node, "it mixes observations of a batch")
            place, shape = where[0].reshape(-1), where.shape[1:]
            if len(sizes) == 1 and np.array_equal(place, np.arange(total)):  # the same values in another shape
                self.tensors[name] = _Values(next(iter(sizes)), shape)
                continue
            weights = tuple((place[:, None] == start[k] + np.arange(size)).astype(float) for k, size in sizes.items())
            bias = np.where(place < 0, fixed[0].reshape(-1), 0.0)
            self.tensors[name] = self._append(Affine(tuple(sizes), weights, bias, node.name), shape)

    def _probe(self, node: onnx.NodeProto) -> _Values:
        """Read a linear operator off by its answers to unit vectors (exact: each output is one product plus zeros)."""
        (name, *others) = [n for n in node.input if n in self.tensors]
        if others:
            raise self._refuse(node, "only a product with a constant is bounded")
        tensor = self._values(node, name)
        linear = onnx.NodeProto()
        linear.CopyFrom(node)
        bias_name = node.input[2] if node.op_type in ("Conv", "ConvTranspose") and len(node.input) > 2 else ""
        if bias_name:
            del linear.input[2]
        feeds: dict[str, Any] = {}
        for other in filter(None, linear.input):
            if other != name:
                value = self._constant(node, other)
                feeds[other] = value.astype(np.int64) if self.constants[other].dtype.kind == "i" else value
        units = np.concatenate([np.zeros((1, tensor.size)), np.eye(tensor.size)]).reshape(-1, *tensor.shape)

        def answers(rows: Array) -> Array:
            if self.lead:
                return np.asarray(self._run(linear, {**feeds, name: rows})[0])
            return np.stack([self._run(linear, {**feeds, name: row})[0] for row in rows])

        answer = answers(units)
        if len(answer) != len(units) or not np.array_equal(answers(units[::-1])[::-1], answer):
            raise self._refuse(node, "it mixes observations of a batch")
        shape = answer.shape[1:]
        bias = answer[0]  # of padding with something other than zero
        if bias_name:
            bias = bias + self._constant(node, bias_name).reshape(-1, *(1 for _ in shape[1:]))
        weight = np.ascontiguousarray((answer[1:] - answer[:1]).reshape(tensor.size, -1).T)
        return self._append(Affine((tensor.index,), (weight,), bias.reshape(-1), node.name), shape)

    # Products of tensors, as far as they spell an activation or a normalisation.

    def _terms(self, tensor: Any, base: int) -> Terms | None:
        """A tensor as terms in the values of a node, or None."""
        if isinstance(tensor, Formula):
            return tensor.terms if tensor.base == base else None
        if not isinstance(tensor, _Values):
            return None
        if tensor.index == base:
            return X
        node = self.nodes[tensor.index - 1] if tensor.index else None
        if isinstance(node, Elementwise):
            argument = self._terms(_Values(node.source, tensor.shape), base)
            return None if argument is None else gated(node.function, node.parameters, argument)
        if isinstance(node, Affine) and len(node.sources) == 1 and node.weights[0].ndim == 1:
            factors, offsets = np.unique(node.weights[0]), np.unique(node.bias)
            argument = self._terms(_Values(node.sources[0], tensor.shape), base)
            if len(factors) == len(offsets) == 1 and argument is not None:
                return scaled(argument, float(factors[0]), float(offsets[0]))
        return None

    def _combined(self, node: onnx.NodeProto, how: Callable[[Terms, Terms], Terms | None]) -> _Values | Formula | None:
        """Two tensors as terms in some node that both depend on, entry by entry, combined; None if there is none."""
        operands = [self.tensors[name] for name in node.input]
        if len({getattr(tensor, "shape", None) for tensor in operands}) > 1:
            return None
        bases = [t.base for t in operands if isinstance(t, Formula)]
        for tensor in operands:
            if isinstance(tensor, _Values):
                below = self.nodes[tensor.index - 1] if tensor.index else None
                bases += [tensor.index, *(below.sources[:1] if isinstance(below, Affine) else ())]
        formula = None
        for base in bases:
            a, b = (self._terms(tensor, base) for tensor in operands)
            terms = how(a, b) if a is not None and b is not None else None
            if terms is not None:
                found = self._spelled(node, base, terms, self._common(node))
                if isinstance(found, _Values):
                    return found
                formula = formula or found
        return formula

    def _spelled(self, node: onnx.NodeProto, base: int, terms: Terms, shape: Shape) -> _Values | Formula:
        """The activation that terms spell, or a formula as long as they spell none."""
        found = recognise(terms)
        if found is None:
            return Formula(base, terms, shape, node.name or node.output[0])
        return self._stretched(node, _Values(base, shape), *found)

    def _stretched(self, node: onnx.NodeProto, x: _Values, outer: float, function: str, inner: float) -> _Values:
        """outer * function(inner * x)"""
        x = x if inner == 1.0 else self._sum_of(node, x.shape, [(x, inner)])
        y = self._apply(node, x, function)
        return y if outer == 1.0 else self._sum_of(node, x.shape, [(y, outer)])

    def _normalized(self, node: onnx.NodeProto, name: str, spread: _Spread, power: float) -> _Values:
        """u times a power of its spread."""
        u = self._values(node, name)
        if spread.power != power or spread.base != u.index or self._common(node) != u.shape:
            raise self._refuse(node, "only a tensor over its own root mean square is bounded")
        return self._append(Normalize(u.index, u.size, spread.epsilon, u.index, node.name), u.shape)

    # One reader per operator.

    def _read_identity(self, node: onnx.NodeProto) -> Any:
        return self.tensors[node.input[0]]

    def _read_dropout(self, node: onnx.NodeProto, seed: int = 0, ratio: float = 0.5) -> _Values:
        if len(node.output) > 1 or (len(node.input) > 2 and node.input[2] and self._value(node, node.input[2]).any()):
            raise self._refuse(node, "it is exported for training; export with model.eval()")
        return self._values(node, node.input[0])

    def _read_cast(self, node: onnx.NodeProto, to: int, **rounding: Any) -> Any:
        if to != onnx.TensorProto.FLOAT:
            kind = onnx.TensorProto.DataType.Name(to).lower()
            raise self._refuse(node, f"to {kind}; certificates are for float32 policies")
        return self.tensors[node.input[0]]

    def _read_gemm(
        self, node: onnx.NodeProto, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
    ) -> _Values:
        x, weight = self._values(node, node.input[0]), self._constant(node, node.input[1])
        weight = np.ascontiguousarray(alpha * (weight if transB else weight.T))
        if transA or len(x.shape) != 1 or weight.shape[1] != x.size:
            raise self._refuse(node, f"transA={transA}, weight of shape {weight.shape} after {x.shape} values")
        bias: Array | float = 0.0
        if len(node.input) > 2 and node.input[2]:
            bias = beta * self._constant(node, node.input[2])
            if bias.size not in (1, len(weight)) or (bias.size > 1 and bias.shape[-1] != len(weight)):
                raise self._refuse(node, f"bias of shape {bias.shape}, a vector of {len(weight)} is expected")
        full = np.array(np.broadcast_to(np.reshape(bias, -1), len(weight)))
        return self._append(Affine((x.index,), (weight,), full, node.name))

    def _read_matmul(self, node: onnx.NodeProto) -> _Values:
        weight = self.constants.get(node.input[1])
        if weight is None or weight.ndim != 2 or self._values(node, node.input[0]).shape != (len(weight),):
            return self._probe(node)
        weight = np.ascontiguousarray(self._constant(node, node.input[1]).T)
        x = self._values(node, node.input[0])
        return self._append(Affine((x.index,), (weight,), np.zeros(len(weight)), node.name))

    def _read_add(self, node: onnx.NodeProto) -> Any:
        return self._sum(node, [1.0] * len(node.input))

    def _read_sum(self, node: onnx.NodeProto) -> Any:
        return self._sum(node, [1.0] * len(node.input))

    def _read_sub(self, node: onnx.NodeProto) -> Any:
        return self._sum(node, [1.0, -1.0])

    def _read_neg(self, node: onnx.NodeProto) -> Any:
        return self._sum(node, [-1.0])

    def _sum(self, node: onnx.NodeProto, signs: list[float]) -> Any:
        signed = list(zip(node.input, signs, strict=True))
        observed = [(name, sign) for name, sign in signed if name in self.tensors]
        fixed = sum((sign * self._constant(node, n) for n, sign in signed if n in self.constants), np.zeros(()))
        first, offsets = self.tensors[observed[0][0]], np.unique(fixed)
        if len(observed) == 1 and len(offsets) == 1 and self._common(node) == getattr(first, "shape", None):
            sign, offset = observed[0][1], float(offsets[0])
            if isinstance(first, Formula):
                return self._spelled(node, first.base, scaled(first.terms, sign, offset), first.shape)
            if isinstance(first, _Spread) and first.power == 1.0 and sign > 0 and offset >= 0.0:
                return replace(first, epsilon=first.epsilon + offset)
        if len(observed) == len(node.input) == 2 and any(isinstance(self.tensors[n], Formula) for n in node.input):
            found = self._combined(node, lambda a, b: plus(scaled(a, signs[0]), scaled(b, signs[1])))
            if found is not None:
                return found
        terms = [(self._values(node, name), sign) for name, sign in observed]
        return self._sum_of(node, self._common(node), terms, fixed)

    def _read_mul(self, node: onnx.NodeProto) -> Any:
        if all(name in self.tensors for name in node.input):
            for u, other in (node.input, node.input[::-1]):
                spread = self.tensors[other]
                if isinstance(spread, _Spread):
                    return self._normalized(node, u, spread, -0.5)
            found = self._combined(node, times)
            if found is None:
                for name in node.input:
                    self._values(node, name)
                raise self._refuse(node, f"a product of tensors {SPELLED}")
            return found
        name, other = node.input if node.input[0] in self.tensors else node.input[::-1]
        return self._times(node, name, self._constant(node, other))

    def _read_div(self, node: onnx.NodeProto) -> Any:
        first, second = node.input
        spread = self.tensors.get(second)
        if isinstance(spread, _Spread):
            if first in self.tensors:
                return self._normalized(node, first, spread, 0.5)
            if self._scalar(node, first) == 1.0:
                return self._power(node, second, -1.0)
        if spread is not None or (self._constant(node, second) == 0.0).any():
            raise self._refuse(node, "only a division by constants other than zero or by a root mean square is bounded")
        # 1 / value is rounded in float64; the execution error of an affine node covers it (bounds.EXECUTION_TERMS).
        return self._times(node, first, 1.0 / self._constant(node, second))

    def _times(self, node: onnx.NodeProto, name: str, factor: Array) -> _Values | Formula:
        tensor, entries = self.tensors[name], np.unique(factor)
        shape = self._common(node)
        if isinstance(tensor, Formula) and len(entries) == 1 and shape == tensor.shape:
            return self._spelled(node, tensor.base, scaled(tensor.terms, float(entries[0])), shape)
        return self._sum_of(node, shape, [(self._values(node, name), factor)])

    def _read_pow(self, node: onnx.NodeProto) -> Formula | _Spread:
        exponent = self._scalar(node, node.input[1])
        if isinstance(self.tensors[node.input[0]], _Spread) and exponent in (0.5, -0.5):
            return self._power(node, node.input[0], exponent)
        if exponent not in (2.0, 3.0):
            raise self._refuse(node, f"exponent {exponent}: only squares and cubes in activations and norms")
        x = self._values(node, node.input[0])
        return Formula(x.index, {(int(exponent), None): 1.0}, x.shape, node.name or node.output[0])

    def _power(self, node: onnx.NodeProto, name: str, exponent: float) -> _Spread:
        spread = self.tensors[name]
        if not isinstance(spread, _Spread) or abs(spread.power * exponent) != 0.5:
            raise self._refuse(node, "bounded only as the root of a mean square that a tensor is divided by")
        return replace(spread, power=spread.power * exponent)

    def _read_sqrt(self, node: onnx.NodeProto) -> _Spread:
        return self._power(node, node.input[0], 0.5)

    def _read_reciprocal(self, node: onnx.NodeProto) -> _Spread:
        return self._power(node, node.input[0], -1.0)

    def _read_reducemean(self, node: onnx.NodeProto, **attributes: Any) -> _Values | _Spread:
        square = self.tensors[node.input[0]]
        if not isinstance(square, Formula) or square.terms != {(2, None): 1.0}:
            return self._probe(node)
        (answer,) = self._run(node, self._examples(node))
        if answer.shape[: len(self.lead)] != self.lead or answer.size != int(np.prod(self.lead)):
            raise self._refuse(node, f"mean squares of shape {answer.shape}: only that of all values is bounded")
        return _Spread(square.base, 0.0, 1.0, answer.shape[len(self.lead) :], node.name or node.output[0])

    def _read_layernormalization(
        self, node: onnx.NodeProto, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> _Values:
        # The mean and the centred values are nodes of their own: in the fused kernel, too, both are rounded values.
        x = self._values(node, node.input[0])
        mean = self._append(Affine((x.index,), (np.full((1, x.size), 1.0 / x.size),), np.zeros(1), node.name))
        weights = (np.ones(x.size), -np.ones((x.size, 1)))
        centred = self._append(Affine((x.index, mean.index), weights, np.zeros(x.size), node.name))
        return self._norm(node, axis, stash_type, Normalize(centred.index, x.size, epsilon, x.index, node.name))

    def _read_rmsnormalization(
        self, node: onnx.NodeProto, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
    ) -> _Values:
        x = self._values(node, node.input[0])
        return self._norm(node, axis, stash_type, Normalize(x.index, x.size, epsilon, x.index, node.name))

    def _norm(self, node: onnx.NodeProto, axis: int, stash: int, made: Normalize) -> _Values:
        """A normalisation operator's end: gain and bias."""
        shape = self._values(node, node.input[0]).shape
        before = (axis if axis >= 0 else axis + len(self.lead) + len(shape)) - len(self.lead)
        if before < 0 or int(np.prod(shape[:before])) != 1:
            raise self._refuse(node, f"axis {axis} of {shape}: only a normalisation of all values together is bounded")
        if not made.epsilon >= 0.0 or stash != onnx.TensorProto.FLOAT:
            raise self._refuse(node, f"epsilon={made.epsilon}, stash_type={stash}: 0 or more and 1 (float) are bounded")
        y = self._append(made, shape)
        gain, bias = (self._constant(node, n) if n else None for n in [*node.input[1:], "", ""][:2])
        return self._sum_of(node, shape, [(y, 1.0 if gain is None else gain)], 0.0 if bias is None else bias)

    def _read_batchnormalization(
        self,
        node: onnx.NodeProto,
        epsilon: float = 1e-5,
        momentum: float = 0.9,
        training_mode: int = 0,
        spatial: int = 1,
    ) -> _Values:
        x = self._values(node, node.input[0])
        if training_mode:
            raise self._refuse(node, "training mode; export with model.eval()")
        scale, shift, mean, variance = (
            self._constant(node, name).reshape(-1, *(1 for _ in x.shape[1:])) for name in node.input[1:5]
        )
        # In three steps: then the roundings of each are covered, in whatever form it is executed.
        x = self._sum_of(node, x.shape, [(x, 1.0)], -mean)
        x = self._sum_of(node, x.shape, [(x, scale / np.sqrt(variance + epsilon))])
        return self._sum_of(node, x.shape, [(x, 1.0)], shift)

    def _read_gelu(self, node: onnx.NodeProto, approximate: bytes = b"none") -> _Values | Formula:
        return self._elementwise(node, "gelu" if approximate == b"none" else "gelu_tanh")

    def _read_swish(self, node: onnx.NodeProto, alpha: float = 1.0) -> _Values:
        if alpha == 0.0:
            raise self._refuse(node, "alpha is 0")
        return self._stretched(node, self._values(node, node.input[0]), 1.0 / alpha, "silu", alpha)

    def _read_greater(self, node: onnx.NodeProto) -> _Beyond:
        limit = self._scalar(node, node.input[1])
        if limit is None:
            raise self._refuse(node, "a comparison is bounded only where it spells softplus")
        return _Beyond(self._values(node, node.input[0]), limit, node.name or node.output[0])

    def _read_where(self, node: onnx.NodeProto) -> _Values:
        beyond, x, y = (self.tensors.get(name) for name in node.input)
        if isinstance(beyond, _Beyond) and isinstance(x, _Values):
            small, large = self._terms(y, x.index), self._terms(beyond.x, x.index)
            found = large_softplus(small or {}, large or {}, beyond.limit)
            if found and beyond.shape == x.shape == getattr(y, "shape", None):
                return self._stretched(node, x, found[0], "softplus", found[1])
        raise self._refuse(node, "a choice is bounded only where it spells softplus")

    def _read_clip(self, node: onnx.NodeProto, min: float | None = None, max: float | None = None) -> Any:
        limits = [min, max]
        for k, name in enumerate(node.input[1:3]):
            if name:
                limits[k] = float(self._constant(node, name).reshape(()))
        low, high = limits
        if low is not None and high is not None:
            if low >= high:
                raise self._refuse(node, f"limits {limits}: a lower limit below an upper one is needed")
            return self._elementwise(node, "clip", low, high)
        x = self._values(node, node.input[0])
        if low is not None:
            return self._larger(node, x.shape, [x], low, 1.0)
        return x if high is None else self._larger(node, x.shape, [x], high, -1.0)

    def _read_max(self, node: onnx.NodeProto) -> _Values:
        return self._extreme(node, 1.0)

    def _read_min(self, node: onnx.NodeProto) -> _Values:
        return self._extreme(node, -1.0)

    def _extreme(self, node: onnx.NodeProto, sign: float) -> _Values:
        tensors = [self._values(node, name) for name in node.input if name in self.tensors]
        constants = [self._constant(node, name) for name in node.input if name in self.constants]
        if len(node.input) != 2:
            raise self._refuse(node, f"{len(node.input)} operands; two are bounded")
        return self._larger(node, self._common(node), tensors, constants[0] if constants else 0.0, sign)

    def _larger(
        self, node: onnx.NodeProto, shape: Shape, tensors: list[_Values], limit: Array | float, sign: float
    ) -> _Values:
        """max(a, b) = b + relu(a - b) (sign 1) or min(a, b) = b - relu(b - a) (sign -1); b may be a constant limit."""
        a, *b = tensors
        gap = self._sum_of(node, shape, [(a, sign), *((t, -sign) for t in b)], -sign * np.asarray(limit))
        return self._sum_of(node, shape, [(self._apply(node, gap, "relu"), sign), *((t, 1.0) for t in b)], limit)

    def _read_abs(self, node: onnx.NodeProto) -> _Values:
        return self._bent(node, -1.0)

    def _read_prelu(self, node: onnx.NodeProto) -> _Values:
        return self._bent(node, self._constant(node, node.input[1]))

    def _read_leakyrelu(self, node: onnx.NodeProto, alpha: float = 0.01) -> Any:
        return self._elementwise(node, "leakyrelu", alpha) if 0.0 <= alpha < 100.0 else self._bent(node, alpha)

    def _bent(self, node: onnx.NodeProto, slope: Array | float) -> _Values:
        """x where it is positive and slope * x elsewhere: slope * x + (1 - slope) * relu(x)."""
        x, slope = self._values(node, node.input[0]), np.asarray(slope)
        if self._common(node) != x.shape:
            raise self._refuse(node, f"its slopes have shape {slope.shape}, its values {x.shape}")
        return self._sum_of(node, x.shape, [(x, slope), (self._apply(node, x, "relu"), 1.0 - slope)])

    def _read_hardsigmoid(self, node: onnx.NodeProto, alpha: float = 0.2, beta: float = 0.5) -> _Values:
        x = self._values(node, node.input[0])
        return self._apply(node, self._sum_of(node, x.shape, [(x, alpha)], beta), "clip", 0.0, 1.0)

    def _read_elu(self, node: onnx.NodeProto, alpha: float = 1.0) -> Any:
        return self._elementwise(node, "elu", alpha)

    def _read_celu(self, node: onnx.NodeProto, alpha: float = 1.0) -> _Values:
        x = self._values(node, node.input[0])
        if not 0.0 < alpha < 100.0:
            raise self._refuse(node, f"alpha {alpha}: values above 0, below 100 are bounded")
        y = self._apply(node, self._sum_of(node, x.shape, [(x, 1.0 / alpha)]), "elu", 1.0)
        return self._sum_of(node, x.shape, [(y, alpha)])

    def _read_selu(
        self, node: onnx.NodeProto, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875
    ) -> Any:
        return self._elementwise(node, "selu", alpha, gamma)


SPELLED = "is bounded only where it spells gelu, silu, mish, hardswish or a normalisation of all values"


def _needed(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that the output depends on, in their order."""
    wanted, kept = {graph.output[0].name}, []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted |= set(node.input)
            kept.append(node)
    return kept[::-1]
