"""The context operator cache: what a policy computes from its context alone is computed once per context, and replayed.

A policy that is told a goal, an instruction or a history often encodes that first: `context -> tensors`, then
`(observation, tensors) -> action`. The context changes once a task, the observation every control step. The cut is
found in the ONNX graph: every tensor that depends on nothing but the context. It is the same program, cut in two: the
same kernels see the same numbers, so answers are equal bit for bit, and a bound on the policy is a bound on this.

It is LAWS with zero radius and an operator as the expert (the once-inferred tensor of PLDR-LLM, arXiv:2502.13502).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.utils import Extractor

from laws_ros.core.errors import ModelError

from .onnx_graph import load_model
from .sessions import session

_PLACED = ("Add", "Sub", "Mul", "Div", "Cast", "Identity", "Clip", "Neg")  # entry k of the result is of entry k
_MOVES = (*_PLACED, "Slice", "Gather", "Split", "Reshape", "Squeeze", "Unsqueeze", "Flatten")  # not worth a cache
_RANDOM = ("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli")

Source = tuple[str, int]  # an input and a column of its last axis; column -1: all of it


class ContextCache:
    """A policy run in two parts, the first of which is remembered for the contexts seen last.

    Attributes:
        tensors: names of the cached tensors, in the graph.
        computed: how often the first part was run; `replayed`: how often it was not.
    """

    def __init__(
        self,
        path: str | Path,
        context: Sequence[str | int],
        capacity: int = 16,
        threads: int = 1,
    ) -> None:
        """Cut a policy.

        Args:
            context: names of the inputs that are the context; for a policy with one input [batch, n], the columns.
            capacity: how many contexts are remembered; the one used longest ago goes first.

        Raises:
            ModelError: no such input or column, or nothing in the graph is computed from the context alone.
        """
        self.path, self.capacity = Path(path), capacity
        model = load_model(self.path)
        known = {i.name for i in model.graph.initializer}
        self._inputs = [i.name for i in model.graph.input if i.name not in known]
        self._columns, self._context = self._sources(model, context)
        self.tensors = _frontier(model, self._inputs, self._width(model), self._context)
        if not self.tensors:
            raise ModelError(
                f"{self.path}: nothing is computed from {list(context)} alone, so there is nothing to cache; "
                "the context has to enter through an encoder of its own"
            )
        outputs = [o.name for o in model.graph.output]
        try:
            extractor = Extractor(onnx.shape_inference.infer_shapes(model))
            first = extractor.extract_model(self._first_inputs, self.tensors)
            second = extractor.extract_model([*self._second_inputs, *self.tensors], outputs)
        except Exception as error:  # a type that onnx cannot infer
            raise ModelError(f"{self.path}: cannot be cut at {self.tensors}: {error}") from None
        self._first = session(first.SerializeToString(), f"{self.path} (context)", threads)
        self._second = session(second.SerializeToString(), f"{self.path} (rest)", threads)
        self._used = {i.name for i in self._second.get_inputs()}
        self._memory: OrderedDict[bytes, dict[str, NDArray[Any]]] = OrderedDict()
        self.computed = self.replayed = 0

    def __call__(self, feed: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """The policy's outputs for its inputs by name, as its whole graph would give them."""
        key = self._key(feed)
        tensors = self._memory.get(key)
        if tensors is None:
            values = self._first.run(self.tensors, {name: feed[name] for name in self._first_inputs})
            tensors = dict(zip(self.tensors, values, strict=True))
            self._memory[key] = tensors
            if len(self._memory) > self.capacity:
                self._memory.popitem(last=False)
            self.computed += 1
        else:
            self._memory.move_to_end(key)
            self.replayed += 1
        rest = {name: feed[name] for name in self._second_inputs if name in self._used}
        outputs: list[NDArray[Any]] = self._second.run(None, {**rest, **tensors})
        return outputs

    def _key(self, feed: Mapping[str, NDArray[Any]]) -> bytes:
        """The context's very bits, with its shape: zero radius, so no answer is ever that of another context."""
        arrays = [feed[self._inputs[0]][..., self._columns]] if self._columns else [feed[n] for n in self._first_inputs]
        return b"".join(repr((a.shape, a.dtype.str)).encode() + np.ascontiguousarray(a).tobytes() for a in arrays)

    def _sources(self, model: onnx.ModelProto, context: Sequence[str | int]) -> tuple[list[int], set[Source]]:
        names = [c for c in context if isinstance(c, str)]
        columns = [c for c in context if not isinstance(c, str)]
        if unknown := [n for n in names if n not in self._inputs]:
            raise ModelError(f"{self.path}: no input {unknown[0]!r}; its inputs are {self._inputs}")
        if names and not columns:
            self._first_inputs = [i for i in self._inputs if i in names]
            self._second_inputs = [i for i in self._inputs if i not in names]
            return [], {(name, -1) for name in names}
        width = self._width(model)
        if names or not columns or len(self._inputs) != 1 or not all(0 <= c < width for c in columns):
            raise ModelError(
                f"{self.path}: context {list(context)}: name inputs ({self._inputs}), or columns of the only input "
                f"(0 to {width - 1})"
            )
        self._first_inputs = self._second_inputs = list(self._inputs)
        return columns, {(self._inputs[0], c) for c in columns}

    def _width(self, model: onnx.ModelProto) -> int:
        """n of a first input [batch, n], else 0."""
        dims = next(i for i in model.graph.input if i.name == self._inputs[0]).type.tensor_type.shape.dim
        return int(dims[1].dim_value) if len(dims) == 2 else 0


def _frontier(model: onnx.ModelProto, inputs: list[str], width: int, context: set[Source]) -> list[str]:
    """Tensors computed from the context alone that something else, or the caller, reads; [] if none took real work."""
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    by_column = any(column >= 0 for _, column in context)
    # Per tensor what it depends on; per tensor whose last axis still is columns of the input, which column each is.
    depends: dict[str, frozenset[Source]] = dict.fromkeys(constants, frozenset())
    columns: dict[str, NDArray[np.int64]] = {}
    for name in inputs:
        depends[name] = frozenset({(name, -1)})
    if by_column:
        columns[inputs[0]] = np.arange(width)
        depends[inputs[0]] = frozenset((inputs[0], k) for k in range(width))
    worked: dict[str, bool] = {}
    for node in graph.node:
        read = _reads(node)
        sources = frozenset().union(*(depends[name] for name in read if name in depends))
        if node.op_type in _RANDOM or node.domain not in ("", "ai.onnx", "com.microsoft"):
            sources |= {("", -1)}  # nothing that may differ from call to call is ever cached
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                constants[node.output[0]] = numpy_helper.to_array(value)
        places = _places(node, columns, constants)
        for k, name in enumerate(node.output):
            depends[name] = sources
            worked[name] = node.op_type not in _MOVES or any(worked.get(r, False) for r in read)
            if places is not None:
                columns[name] = places[k]
                depends[name] = frozenset((inputs[0], int(c)) for c in places[k])

    def contextual(name: str) -> bool:
        return bool(depends.get(name)) and depends[name] <= context

    found: dict[str, None] = {}
    for node in graph.node:
        if not all(contextual(name) or not depends[name] for name in node.output):
            found |= {name: None for name in _reads(node) if contextual(name) and name not in inputs}
    found |= {o.name: None for o in graph.output if contextual(o.name)}
    return list(found) if any(worked[name] for name in found) else []


def _reads(node: onnx.NodeProto) -> list[str]:
    """Every tensor that a node reads, also from within its subgraphs."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names += _reads(inner)
            names += [o.name for o in graph.output]
    return [name for name in names if name]


def _places(
    node: onnx.NodeProto, columns: dict[str, NDArray[np.int64]], constants: dict[str, NDArray[Any]]
) -> list[NDArray[np.int64]] | None:
    """For operators that select columns of a 2-D tensor or leave each in its place: the columns of every output."""
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    placed = [name for name in node.input if name in columns]
    if len(placed) != 1:
        return None
    old = columns[placed[0]]
    others = [constants.get(name) for name in node.input if name and name not in columns]
    if any(o is None for o in others):
        return None
    fixed = [np.asarray(o) for o in others]
    if node.op_type in _PLACED:
        ok = all(c.ndim == 0 or (c.ndim <= 2 and c.shape[-1] in (1, len(old))) for c in fixed)
        return [old] if ok and not any(c.ndim == 2 and c.shape[0] != 1 for c in fixed) else None
    last = attributes.get("axis", 0) in (1, -1)
    if node.op_type == "Gather" and node.input[0] == placed[0] and last and fixed[0].ndim == 1:
        return [old[fixed[0].astype(np.int64)]]
    if node.op_type == "Slice" and len(fixed) >= 3:
        starts, ends, axes = (c.reshape(-1).astype(np.int64) for c in fixed[:3])
        steps = fixed[3].reshape(-1) if len(fixed) > 3 else np.ones(1, np.int64)
        if len(starts) == 1 and axes[0] in (1, -1) and steps[0] > 0:
            return [old[int(starts[0]) : int(np.clip(ends[0], -(2**31), 2**31)) : int(steps[0])]]
    if node.op_type == "Split" and last:
        if fixed:
            return list(np.split(old, np.cumsum(fixed[0].astype(np.int64))[:-1]))
        if len(old) % len(node.output) == 0:
            return list(np.split(old, len(node.output)))
    return None
