"""All experts of a library in ONNX Runtime: no session is created, and nothing that grows is allocated, in a control
step.

Affine experts are one model that gathers by index and multiplies. Collapsed ones are one model too: their matrices lie
in one flat table, and a step cuts its own out of it (a copy of a few kilobytes), so that experts of all sizes share it
without padding. Matrices are multiplied out from the policy's weights when the library is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.certificate import COLLAPSED, Certificates
from laws_ros.core.collapsed import Collapsed, States, multiply_out
from laws_ros.core.network import Elementwise, Network

from .policy import Policy
from .routing import Router
from .sessions import session

Floats = NDArray[np.float32]
OPSET, OPSET_GELU = 17, 20
IR_VERSION = 8  # what the ONNX Runtime of JetPack 6 reads; opset 20 needs 9

_OPERATORS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid", "erf": "Erf", "softplus": "Softplus"}
_OPERATORS |= {"leakyrelu": "LeakyRelu", "elu": "Elu", "selu": "Selu", "clip": "Clip"}
_OPERATORS |= {"gelu": "Gelu", "gelu_tanh": "Gelu", "mish": "Mish", "hardswish": "HardSwish"}


class Experts:
    """Runs experts by their index in a library.

    Args:
        router: whose observation they will mostly be called with; affine ones read it where it is.

    Raises:
        LibraryError: a collapsed expert does not fit the policy. ModelError: the policy cannot be collapsed at all.
    """

    def __init__(self, certificates: Certificates, policy: Policy, router: Router | None = None) -> None:
        folded = certificates.among(COLLAPSED)
        self._rows = certificates.expert_weight.shape[1]
        self._affine = _Affine(certificates, router) if not folded.all() else None
        self._folded = _Folded(certificates, np.flatnonzero(folded), policy) if folded.any() else None
        self._runner = [self._folded if flag else self._affine for flag in folded]
        self._router = router

    def __call__(self, region: int, observation: Floats) -> Floats:
        """The values [r] of expert `region` at observation [n]; the array is used again by the next call."""
        return self._runner[region](region, observation)  # type: ignore[misc]  # never None where an expert is

    def routed(self, region: int) -> Floats:
        """The same where the router's last answer is `region`, at its observation: affine ones read both there."""
        runner = self._runner[region]
        if runner is self._affine:
            runner.run()  # type: ignore[union-attr]
            return runner.value  # type: ignore[union-attr]
        return runner(region, self._router.observation)  # type: ignore[misc, union-attr]

    def many(self, index: NDArray[np.intp], x: Floats) -> Floats:
        """Values [N, r] of expert index[k] at x[k], x [N, n]."""
        values = np.zeros((len(index), self._rows), np.float32)
        folded = np.array([runner is self._folded for runner in self._runner], dtype=bool)[index]
        for runner, here in ((self._affine, np.flatnonzero(~folded)), (self._folded, np.flatnonzero(folded))):
            if runner is not None and len(here):
                values[here] = runner.many(index[here], x[here])
        return values


class _Affine:
    """Experts weight @ (x, 1), gathered by index."""

    def __init__(self, certificates: Certificates, router: Router | None) -> None:
        _, rows, inputs = certificates.expert_weight.shape
        extended = np.ones(inputs + 1, np.float32) if router is None else router.extended
        self._observation = extended[:-1]
        self._index = np.zeros(1, np.int64) if router is None else router.region
        self.session = session(experts_model(certificates).SerializeToString(), "experts")
        self.value = np.zeros(rows, np.float32)
        binding = self.session.io_binding()
        # Bound to these very buffers: a query writes into them, and nothing is allocated per step.
        _bind(binding, "index", self._index, (1,))
        _bind(binding, "observation", extended, (1, inputs + 1, 1))
        binding.bind_output("action", "cpu", 0, np.float32, (1, rows, 1), self.value.ctypes.data)
        self.run = bound_call(self.session, binding)

    def __call__(self, region: int, observation: Floats) -> Floats:
        self._index[0] = region
        self._observation[:] = observation
        self.run()
        return self.value

    def many(self, index: NDArray[np.intp], x: Floats) -> Floats:
        extended = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)[:, :, None]
        values: Floats = self.session.run(["action"], {"index": index.astype(np.int64), "observation": extended})[0]
        return values[:, :, 0]


class _Folded:
    """Collapsed experts, cut out of one table."""

    def __init__(self, certificates: Certificates, which: NDArray[np.intp], policy: Policy) -> None:
        from .onnx_graph import load_network  # only where a library needs it

        network = load_network(policy.path)
        parts = [multiply_out(network, States.of(certificates, int(k), network)).rounded() for k in which]
        self._row = {int(k): row for row, k in enumerate(which)}
        model, self._places = _folded_model(network, parts)
        self.session = session(model.SerializeToString(), "collapsed experts")
        self._place = np.zeros(self._places.shape[1], np.int64)
        self._value, self._observation = np.zeros(network.outputs, np.float32), np.ones(1 + network.inputs, np.float32)
        binding = self.session.io_binding()
        for name, cut, shape in _places(self._places.shape[1]):
            _bind(binding, name, self._place[cut], shape)
        _bind(binding, "observation", self._observation, (1, len(self._observation)))
        binding.bind_output("action", "cpu", 0, np.float32, (1, network.outputs), self._value.ctypes.data)
        self._run = bound_call(self.session, binding)

    def __call__(self, region: int, observation: Floats) -> Floats:
        self._place[:] = self._places[self._row[region]]
        self._observation[1:] = observation
        self._run()
        return self._value

    def many(self, index: NDArray[np.intp], x: Floats) -> Floats:
        values = np.zeros((len(index), len(self._value)), np.float32)
        extended = np.concatenate([np.ones((len(x), 1), np.float32), x], axis=1)
        for region in np.unique(index):
            here = np.flatnonzero(index == region)
            place = self._places[self._row[int(region)]]
            feed = {name: place[cut] for name, cut, _ in _places(len(place))}
            values[here] = self.session.run(["action"], {**feed, "observation": extended[here]})[0]
        return values


def bound_call(session: ort.InferenceSession, binding: ort.IOBinding) -> Callable[[], object]:
    """`session.run_with_iobinding(binding)` with options made once (making them takes 0.7 us), and by the compiled
    object that it passes both on to where there is one: what it asks before, about web GPUs, takes 0.5 us."""
    options, inner = ort.RunOptions(), getattr(session, "_sess", None)
    run, bound = getattr(inner, "run_with_iobinding", None), getattr(binding, "_iobinding", None)
    if run is None or bound is None:
        return partial(session.run_with_iobinding, binding, options)
    return partial(run, bound, options)


def _bind(binding: ort.IOBinding, name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, shape, array.ctypes.data)


def _places(length: int) -> list[tuple[str, slice, tuple[int, ...]]]:
    """Names, places and shapes of the model's inputs that say where an expert's matrices are: four numbers for each."""
    names: list[tuple[str, slice, tuple[int, ...]]] = []
    for k in range(length // 4):
        first = 4 * k
        names += [(f"start{k}", slice(first, first + 1), (1,)), (f"end{k}", slice(first + 1, first + 2), (1,))]
        names.append((f"shape{k}", slice(first + 2, first + 4), (2,)))
    return names


def _folded_model(network: Network, experts: list[Collapsed]) -> tuple[onnx.ModelProto, NDArray[np.int64]]:
    """ONNX model (where an expert's matrices are, observation [k, 1 + n]) -> action [k, m], and the places [E, *].

    The observation's first entry is 1. Stages that no expert has, and blocks of columns that are zero in all of them,
    are left out.
    """
    used = [
        [any(flags) for flags in zip(*by_expert, strict=True)]
        for by_expert in zip(*(expert.used() for expert in experts), strict=True)
    ]
    stages = [any(len(expert.stages[k].kept) for expert in experts) for k in range(len(used) - 1)]
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {}
    blocks, table, places, position, slot = ["observation"], [], [], 0, 0
    elementwise = [node for node in network.nodes if isinstance(node, Elementwise)]
    for k, present in enumerate([*stages, True]):
        blocks_used = [name for name, use in zip(blocks, used[k], strict=True) if use and name]
        if not present:
            blocks.append("")
            continue
        place = []
        for expert in experts:
            columns = [part for part, use in zip(expert.blocks, used[k], strict=False) if use]
            matrix = np.concatenate([expert.matrices[k][:, part] for part in columns], axis=1).astype(np.float32)
            table.append(matrix.T.reshape(-1))
            place.append([position, position + matrix.size, matrix.shape[1], matrix.shape[0]])
            position += matrix.size
        places.append(np.array(place, np.int64))
        nodes += [
            helper.make_node("Slice", ["table", f"start{slot}", f"end{slot}"], [f"flat{slot}"]),
            helper.make_node("Reshape", [f"flat{slot}", f"shape{slot}"], [f"matrix{slot}"], allowzero=1),
        ]
        basis = blocks_used[0]
        if len(blocks_used) > 1:
            basis = f"basis{slot}"
            nodes.append(helper.make_node("Concat", blocks_used, [basis], axis=1))
        last = k == len(stages)
        nodes.append(helper.make_node("MatMul", [basis, f"matrix{slot}"], ["action" if last else f"z{slot}"]))
        if not last:
            nodes += _function(elementwise[k], f"z{slot}", f"h{slot}", constants)
            blocks.append(f"h{slot}")
        slot += 1
    constants["table"] = np.concatenate(table)
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, shape) for name, _, shape in _places(4 * slot)]
    inputs.append(helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["k", 1 + network.inputs]))
    outputs = [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["k", network.outputs])]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "collapsed", inputs, outputs, initializers)
    gelu = any(node.op_type in ("Gelu", "Mish") for node in nodes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET_GELU if gelu else OPSET)])
    model.ir_version = IR_VERSION + gelu
    return model, np.concatenate(places, axis=1)


def _function(node: Elementwise, source: str, target: str, constants: dict[str, NDArray[Any]]) -> list[onnx.NodeProto]:
    """An elementwise function as ONNX nodes."""
    p = node.parameters
    if node.function == "silu":
        gate = f"{target}.gate"
        return [helper.make_node("Sigmoid", [source], [gate]), helper.make_node("Mul", [source, gate], [target])]
    attributes: dict[str, Any] = {}
    inputs = [source]
    if node.function == "clip":
        inputs += [f"{target}.low", f"{target}.high"]
        constants |= {name: np.array(value, np.float32) for name, value in zip(inputs[1:], p, strict=True)}
    elif node.function == "gelu_tanh":
        attributes["approximate"] = "tanh"
    elif p:
        attributes = dict(zip(("alpha", "gamma"), p, strict=False))
    return [helper.make_node(_OPERATORS[node.function], inputs, [target], **attributes)]


def experts_model(certificates: Certificates) -> onnx.ModelProto:
    """All affine experts as one ONNX model: (index int64 [k], observation float32 [k, n + 1, 1]) -> action [k, r, 1].

    The observation's last entry is 1: it multiplies the bias.
    """
    _, rows, inputs = certificates.expert_weight.shape
    weight = np.concatenate([certificates.expert_weight, certificates.expert_bias[..., None]], axis=2)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["weight", "index"], ["expert"]),
            helper.make_node("MatMul", ["expert", "observation"], ["action"]),
        ],
        "experts",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, ["k"]),
            helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["k", inputs + 1, 1]),
        ],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["k", rows, 1])],
        [numpy_helper.from_array(np.ascontiguousarray(weight), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    return model
