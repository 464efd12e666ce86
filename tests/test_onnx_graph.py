from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.errors import LawsError, ModelError
from laws_ros.core.network import Normalize
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_mlp, random_regions, save_mlp, save_model

F = np.float32
N = 6  # observations of the graphs of one operator


def newest_opset(folder: Path) -> int:
    """The newest opset that both onnx and ONNX Runtime know."""
    for opset in range(onnx.defs.onnx_opset_version(), 20, -1):
        nodes = [helper.make_node("Identity", ["observation"], ["action"])]
        try:
            Policy(save_model(folder / "probe.onnx", nodes, {}, 1, 1, opset))
        except LawsError:
            continue
        return opset
    raise AssertionError("no opset above 20")


@dataclass
class Graph:
    """A chain of ONNX nodes from "observation" [batch, N] to "action", in a notation for tests."""

    since: int = 13
    until: int = 99
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray] = field(default_factory=dict)
    outputs: int = N

    def __call__(self, operator: str, *operands: object, out: str = "action", **attributes: object) -> Graph:
        """Append a node; operands are names (the observation if there are none) or constants."""
        names = []
        for operand in operands or ("observation",):
            if not isinstance(operand, str):
                value = np.asarray(operand)
                operand = f"c{len(self.constants)}"
                self.constants[operand] = value.astype(F) if value.dtype == float else value
            names.append(operand)
        outs = out.split()
        self.nodes.append(helper.make_node(operator, names, outs, name=f"node{len(self.nodes)}", **attributes))
        return self

    def gives(self, outputs: int) -> Graph:
        self.outputs = outputs
        return self

    def save(self, path: Path, opset: int, batch: str | int = "batch") -> Path:
        return save_model(path, self.nodes, self.constants, N, self.outputs, opset, batch)


RNG = np.random.default_rng(0)
W, B, V = RNG.normal(size=(N, 4)), RNG.normal(size=4), RNG.uniform(0.5, 1.5, size=N)


def spelled_norm(axes_attribute: bool, *rest: tuple[str, ...]) -> Graph:
    """LayerNormalization as torch writes it below opset 17; the operands' order and the root are `rest`'s."""
    g = Graph(13, 17) if axes_attribute else Graph(18)
    mean = {"axes": [-1]} if axes_attribute else {}
    axes = () if axes_attribute else (np.array([-1]),)
    g("ReduceMean", "observation", *axes, out="mean", **mean)("Sub", "observation", "mean", out="u")
    g("Mul", "u", "u", out="square") if rest else g("Pow", "u", 2.0, out="square")
    g("ReduceMean", "square", *axes, out="v", **mean)("Add", "v", 1e-5, out="ve")("Sqrt", "ve", out="root")
    if rest:
        g("Reciprocal", "root", out="inverse")("Mul", "inverse", "u", out="y")
    else:
        g("Div", "u", "root", out="y")
    return g("Mul", "y", V, out="z")("Add", "z", 0.3 * V)


# Every operator that is bounded, alone.
OPERATORS = {
    "Relu": Graph()("Relu"),
    "LeakyRelu": Graph()("LeakyRelu", alpha=0.1),
    "LeakyRelu falling": Graph()("LeakyRelu", alpha=-0.4),
    "PRelu": Graph()("PRelu", "observation", V - 1.0),
    "Abs": Graph()("Abs"),
    "Elu": Graph()("Elu", alpha=1.3),
    "Celu": Graph()("Celu", alpha=0.7),
    "Selu": Graph()("Selu"),
    "Tanh": Graph()("Tanh"),
    "Sigmoid": Graph()("Sigmoid"),
    "HardSigmoid": Graph()("HardSigmoid", alpha=0.3),
    "HardSwish": Graph(14)("HardSwish"),
    "Mish": Graph(18)("Mish"),
    "Softplus": Graph()("Softplus"),
    "Erf": Graph()("Erf"),
    "Gelu": Graph(20)("Gelu"),
    "Gelu tanh": Graph(20)("Gelu", approximate="tanh"),
    "Swish": Graph(24, 24)("Swish", alpha=1.7),
    "Clip": Graph()("Clip", "observation", -0.5, 0.7),
    "Clip below": Graph()("Clip", "observation", -0.5),
    "Clip above": Graph()("Clip", "observation", "", 0.4),
    "Clip not": Graph()("Clip"),
    "Max": Graph()("Max", V - 1.0, "observation"),
    "Min": Graph()("Min", "observation", 0.3),
    "Max of two": Graph()("Neg", out="a")("Max", "a", "observation"),
    "Min of two": Graph()("Relu", out="a")("Tanh", out="b")("Min", "a", "b"),
    "Neg": Graph()("Neg"),
    "Add": Graph()("Add", "observation", "observation"),
    "Sum": Graph()("Relu", out="a")("Sum", "a", "observation", V),
    "Sub": Graph()("Tanh", out="a")("Sub", V, "a"),
    "Sub itself": Graph()("Relu", out="a")("Sub", "a", "observation", out="b")("Sub", "b", "b", out="c")(
        "Add", "c", "a"
    ),
    "Mul": Graph()("Mul", V, "observation"),
    "Div": Graph()("Div", "observation", V),
    "Gemm": Graph()("Gemm", "observation", W, B, alpha=0.5, beta=2.0).gives(4),
    "Gemm transposed": Graph()("Gemm", "observation", W.T, transB=1).gives(4),
    "MatMul": Graph()("MatMul", "observation", W).gives(4),
    "MatMul of rows": Graph()("Reshape", "observation", np.array([-1, 3, 2]), out="a")("MatMul", "a", W[:2], out="b")(
        "Flatten", "b"
    ).gives(12),
    "MatMul of columns": Graph()("Reshape", "observation", np.array([-1, 3, 2]), out="a")(
        "MatMul", W[:5, :3], "a", out="b"
    )("Flatten", "b").gives(10),
    "BatchNormalization": Graph()("BatchNormalization", "observation", V, 0.2 * V, V - 1.0, V),
    "LayerNormalization": Graph(17)("LayerNormalization", "observation", V, 0.2 * V),
    "LayerNormalization without bias": Graph(17)("LayerNormalization", "observation", V, axis=1, epsilon=0.01),
    "RMSNormalization": Graph(23)("RMSNormalization", "observation", V),
    "Norm spelled": spelled_norm(True),
    "Norm spelled with reciprocal": spelled_norm(True, ("Reciprocal",)),
    "Norm spelled, newer": spelled_norm(False),
    "RMS spelled": Graph(18)("Pow", "observation", 2.0, out="a")("ReduceMean", "a", np.array([-1]), out="b")(
        "Add", 1e-6, "b", out="c"
    )("Sqrt", "c", out="d")("Div", 1.0, "d", out="e")("Mul", "observation", "e"),
    "RMS by power": Graph(18)("Mul", "observation", "observation", out="a")("ReduceMean", "a", np.array([-1]), out="b")(
        "Add", "b", 1e-6, out="c"
    )("Pow", "c", -0.5, out="d")("Mul", "d", "observation"),
    "Silu spelled": Graph()("Sigmoid", out="a")("Mul", "observation", "a"),
    "Quick gelu": Graph()("Mul", "observation", 1.702, out="a")("Sigmoid", "a", out="b")("Mul", "b", "observation"),
    "Gelu spelled": Graph()("Div", "observation", 2.0**0.5, out="a")("Erf", "a", out="b")("Add", "b", 1.0, out="c")(
        "Mul", "observation", "c", out="d"
    )("Mul", "d", 0.5),
    "Gelu tanh spelled": Graph()("Pow", "observation", 3.0, out="a")("Mul", "a", 0.044715, out="b")(
        "Add", "observation", "b", out="c"
    )("Mul", "c", (2 / np.pi) ** 0.5, out="d")("Tanh", "d", out="e")("Add", 1.0, "e", out="f")(
        "Mul", "observation", 0.5, out="g"
    )("Mul", "g", "f"),
    "Mish spelled": Graph()("Softplus", out="a")("Tanh", "a", out="b")("Mul", "observation", "b"),
    "HardSwish spelled": Graph()("Add", "observation", 3.0, out="a")("Clip", "a", 0.0, 6.0, out="b")(
        "Mul", "observation", "b", out="c"
    )("Div", "c", 6.0),
    "Softplus with a branch": Graph()("Greater", "observation", 20.0, out="a")("Softplus", out="b")(
        "Where", "a", "observation", "b"
    ),
    "Identity": Graph()("Identity"),
    "Dropout": Graph()("Dropout"),
    "Cast": Graph()("Cast", to=TensorProto.FLOAT),
    "Concat": Graph()("Tanh", out="a")("Concat", "observation", "a", axis=1).gives(2 * N),
    "Slice": Graph()("Slice", "observation", np.array([4]), np.array([0]), np.array([1]), np.array([-2])).gives(2),
    "Split": Graph()("Split", "observation", np.array([1, 3, 2]), out="a action b", axis=1).gives(3),
    "Gather": Graph()("Gather", "observation", np.array([5, 0, 0]), axis=1).gives(3),
    "Expand": Graph()("Expand", "observation", np.array([1, N])),
    "Transpose": Graph()("Reshape", "observation", np.array([-1, 3, 2]), out="a")(
        "Transpose", "a", out="b", perm=[0, 2, 1]
    )("Flatten", "b"),
    "Unsqueeze": Graph()("Unsqueeze", "observation", np.array([1]), out="a")("Squeeze", "a", np.array([1])),
    "Shape": Graph()("Shape", out="a")("Gather", "a", np.array([0]), out="b")(
        "Concat", "b", np.array([2, 3]), out="c", axis=0
    )("Reshape", "observation", "c", out="d")("Flatten", "d"),
    "Shape of what is not bounded": Graph()("Exp", out="a")("Shape", "a", out="b")("Expand", "observation", "b"),
    "Conv": Graph()("Reshape", "observation", np.array([-1, 2, 3]), out="a")(
        "Conv", "a", W[:6].reshape(4, 2, 3)[:, :, :2], B, out="b"
    )("Flatten", "b").gives(8),
    "ConvTranspose": Graph()("Reshape", "observation", np.array([-1, 2, 3]), out="a")(
        "ConvTranspose", "a", W[:4].reshape(2, 4, 2), B, out="b"
    )("Flatten", "b").gives(16),
    "Pad": Graph()("Pad", "observation", np.array([0, 1, 0, 2]), 0.5).gives(N + 3),
    "AveragePool": Graph()("Reshape", "observation", np.array([-1, 2, 3]), out="a")(
        "AveragePool", "a", out="b", kernel_shape=[2]
    )("Flatten", "b").gives(4),
    "GlobalAveragePool": Graph()("Reshape", "observation", np.array([-1, 2, 3]), out="a")(
        "GlobalAveragePool", "a", out="b"
    )("Flatten", "b").gives(2),
    "ReduceSum": Graph()("ReduceSum", "observation", np.array([1])).gives(1),
    "ReduceMean": Graph(18)("ReduceMean", "observation", np.array([1]), out="a")("Add", "a", "observation"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_alone_is_evaluated_bounded_and_checked(name: str, tmp_path: Path) -> None:
    graph, newest = OPERATORS[name], newest_opset(tmp_path)
    if graph.since > newest:
        pytest.skip(f"{name} came with opset {graph.since}; this ONNX Runtime reads up to {newest}")
    opsets = sorted({max(13, graph.since), min(17, graph.until), min(newest, graph.until)} - set(range(graph.since)))
    for opset in opsets:
        path = graph.save(tmp_path / f"{opset}.onnx", opset)
        network, policy, rng = load_network(path), Policy(path), np.random.default_rng(0)
        x = 2 * rng.normal(size=(200, N)).astype(F)
        np.testing.assert_allclose(network(x.astype(float)), policy.batch(x), rtol=1e-5, atol=3e-6)
        np.testing.assert_allclose([policy(v) for v in x[:5]], policy.batch(x[:5]), rtol=1e-6, atol=1e-6)
    certificates = certify(network, random_regions(rng, 16, N, 0.4))
    assert np.isfinite(certificates.bound_offset).all()
    tried, broken = break_certificates(policy, network, certificates, rng)
    assert tried > 1000 and broken == 0
    assert all(Checker(network).verdict(certificates, k) == "holds" for k in range(3))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_graphs_of_all_operators_equal_onnx_runtime(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    newest = newest_opset(tmp_path_factory.mktemp("newest"))
    opset = data.draw(st.sampled_from([k for k in (13, 15, 17, 18, 20, 22, 24) if k <= newest]))
    batch = data.draw(st.sampled_from(["batch", 1]))
    plain = ["Relu", "Tanh", "Sigmoid", "Softplus", "Elu", "Selu", "Abs", "Neg", "Identity", "Flatten", "Erf"]
    plain += ["HardSigmoid", "LeakyRelu", "Celu", *(["HardSwish"] if opset >= 14 else [])]
    plain += [*(["Mish"] if opset >= 18 else []), *(["Gelu"] if opset >= 20 else [])]
    kinds = ["Gemm", "MatMul", "Add", "Sub", "SubFrom", "Mul", "Div", "Max", "Min", "Clip", "Reshape", "Transpose"]
    kinds += ["Residual", "Concat", "Split", "Silu", "Norm", "PRelu", "Conv", "Plain", "Plain", "Plain"]
    graph, size, name = Graph(), N, "observation"
    for k in range(data.draw(st.integers(1, 8))):
        kind, out = data.draw(st.sampled_from(kinds)), f"t{k}"
        kind = data.draw(st.sampled_from(plain)) if kind == "Plain" else kind
        if kind in ("Gemm", "MatMul"):
            new = data.draw(st.integers(1, 6))
            transposed = data.draw(st.booleans()) and kind == "Gemm"
            weight = rng.normal(size=(new, size) if transposed else (size, new)) / size**0.5
            bias = [rng.normal(size=new)] if kind == "Gemm" else []
            graph(kind, name, weight, *bias, out=out, **({"transB": 1} if transposed else {}))
            size = new
        elif kind in ("Add", "Sub", "SubFrom", "Mul", "Div", "Max", "Min"):
            shape = data.draw(st.sampled_from([(), (1,), (size,), (1, size)]))
            constant = rng.uniform(0.5, 2, size=shape)
            operands = (constant, name) if kind == "SubFrom" else (name, constant)
            graph(kind.removesuffix("From"), *operands, out=out)
        elif kind == "Clip":
            graph(kind, name, -0.7, 1.1, out=out)
        elif kind == "PRelu":
            graph(kind, name, rng.normal(size=size), out=out)
        elif kind == "Reshape":
            graph(kind, name, np.array([-1, size] if data.draw(st.booleans()) else [0, -1]), out=out)
        elif kind == "Transpose":
            graph("Unsqueeze", name, np.array([2]), out=f"{out}a")(kind, f"{out}a", out=f"{out}b", perm=[0, 2, 1])
            graph("Flatten", f"{out}b", out=out)
        elif kind == "Residual":
            graph("Tanh", name, out=f"{out}a")(data.draw(st.sampled_from(["Add", "Sub"])), name, f"{out}a", out=out)
        elif kind == "Concat":
            graph("Relu", name, out=f"{out}a")(kind, name, f"{out}a", out=out, axis=-1)
            size *= 2
        elif kind == "Split":
            graph(kind, name, np.array([1, size - 1]), out=f"{out} {out}a", axis=1) if size > 1 else graph(
                "Identity", name, out=out
            )
            size = 1 if size > 1 else size
        elif kind == "Silu":
            graph("Sigmoid", name, out=f"{out}a")("Mul", f"{out}a", name, out=out)
        elif kind == "Norm" and opset >= 17 and size > 1:
            graph("LayerNormalization", name, rng.normal(size=size), rng.normal(size=size), out=out, epsilon=0.1)
        elif kind == "Conv" and size > 1:
            graph("Unsqueeze", name, np.array([1]), out=f"{out}a")
            graph(kind, f"{out}a", rng.normal(size=(2, 1, 2)), rng.normal(size=2), out=f"{out}b")
            graph("Flatten", f"{out}b", out=out)
            size = 2 * (size - 1)
        else:
            graph("Identity" if kind in ("Norm", "Conv") else kind, name, out=out)
        name = out
    graph("Identity", name).gives(size)
    path = graph.save(tmp_path_factory.mktemp("onnx") / "p.onnx", opset, batch)
    network, policy = load_network(path), Policy(path)
    x = rng.normal(size=(20, N)).astype(F)
    exact = network(x.astype(float))
    assert exact.shape == (20, size)
    scale = 1.0 + np.abs(exact).max()
    np.testing.assert_allclose(policy.batch(x), exact, rtol=1e-4, atol=1e-4 * scale)
    np.testing.assert_allclose([policy(v) for v in x], exact, rtol=1e-4, atol=1e-4 * scale)


def test_gradient_is_the_derivative(tmp_path) -> None:
    rng = np.random.default_rng(0)
    mlp = load_network(save_mlp(tmp_path / "p.onnx", random_mlp(rng, [N, 16, 2]), "Tanh", clip=1.0))
    norm = Graph(17)("Gemm", "observation", W, B, out="a")("LayerNormalization", "a", V[:4], V[:4]).gives(4)
    for network in (mlp, load_network(norm.save(tmp_path / "n.onnx", 17))):
        x, seed, h = rng.normal(size=(5, N)), rng.normal(size=(5, network.outputs)), 1e-6
        for axis in range(N):
            step = h * np.eye(N)[axis]
            numeric = ((network(x + step) - network(x - step)) * seed).sum(axis=1) / (2 * h)
            np.testing.assert_allclose(network.gradient(x, seed)[:, axis], numeric, atol=1e-5)


REFUSED = {
    "Sin": Graph()("Sin"),
    "Softmax": Graph()("Softmax"),
    "Exp": Graph()("Exp"),
    "Softsign": Graph()("Softsign"),
    "ThresholdedRelu": Graph()("ThresholdedRelu"),
    "MaxPool": Graph()("Reshape", "observation", np.array([-1, 2, 3]), out="a")(
        "MaxPool", "a", out="b", kernel_shape=[2]
    )("Flatten", "b").gives(4),
    "InstanceNormalization": Graph()("Unsqueeze", "observation", np.array([1]), out="a")(
        "InstanceNormalization", "a", V[:1], V[:1], out="b"
    )("Flatten", "b"),
    "LayerNormalization": Graph(17)("Reshape", "observation", np.array([-1, 2, 3]), out="a")(
        "LayerNormalization", "a", V[:3], out="b"
    )("Flatten", "b"),
    "Div": Graph()("Abs", out="a")("Add", "a", 1.0, out="b")("Div", "observation", "b"),
    "Div by another's": Graph(18)("Mul", "observation", "observation", out="a")(
        "ReduceMean", "a", np.array([-1]), out="b"
    )("Sqrt", "b", out="c")("Tanh", out="d")("Div", "d", "c"),
    "Div by another shape": Graph(18)("Mul", "observation", "observation", out="a")(
        "ReduceMean", "a", np.array([-1]), out="b", keepdims=0
    )("Sqrt", "b", out="c")("Div", "observation", "c"),
    "Mul of rows and columns": Graph()("Reshape", "observation", np.array([-1, 1, 6]), out="a")(
        "Reshape", "observation", np.array([-1, 6, 1]), out="b"
    )("Sigmoid", "b", out="c")("Mul", "a", "c", out="d")("Flatten", "d").gives(36),
    "PRelu": Graph()("PRelu", V, "observation"),
    "Pow": Graph()("Pow", "observation", 4.0),
    "Sqrt": Graph()("Abs", out="a")("Sqrt", "a"),
    "Elu": Graph()("Elu", alpha=-1.0),
    "Selu": Graph()("Selu", gamma=-1.0),
    "Gemm": Graph()("MatMul", "observation", W, out="a")("Gemm", "observation", W, "a").gives(4),
    "MatMul": Graph()("Transpose", out="a", perm=[1, 0])("MatMul", "a", "observation"),
    "Where": Graph()("Greater", "observation", 0.0, out="a")("Where", "a", "observation", V),
    "Clip": Graph()("Clip", "observation", 1.0, 1.0),
    "Cast": Graph()("Cast", out="a", to=TensorProto.DOUBLE)("Cast", "a", to=TensorProto.FLOAT),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_bounded_is_refused_by_node_and_operator(tmp_path, name) -> None:
    graph = REFUSED[name]
    with pytest.raises(
        ModelError, match=rf"p\.onnx: node 'node\d' \({name.split()[0]}\): .*laws build --kind statistical"
    ):
        load_network(graph.save(tmp_path / "p.onnx", max(17, graph.since)))


@pytest.mark.parametrize(
    "graph",
    [
        Graph()("Mul", "observation", "observation"),  # a square
        Graph()("Mul", "observation", "observation", out="a")("MatMul", "a", W).gives(4),
        Graph()("Relu", out="a")("Mul", "observation", "a"),
        Graph()("Tanh", out="a")("Sigmoid", out="b")("Mul", "a", "b"),  # a gated unit
        Graph()("Greater", "observation", 5.0, out="a")("Softplus", out="b")("Where", "a", "observation", "b"),
        Graph()("Pow", "observation", 3.0, out="a")("Mul", "a", 0.05, out="b")("Add", "observation", "b", out="c")(
            "Tanh", "c", out="e"
        )("Add", 1.0, "e", out="f")("Mul", "observation", "f"),  # nearly gelu
    ],
)
def test_products_that_spell_no_activation_are_refused(tmp_path: Path, graph: Graph) -> None:
    with pytest.raises(ModelError, match=r"node 'node\d'.* bounded only where it spells"):
        load_network(graph.save(tmp_path / "p.onnx", 17))


def test_only_what_the_action_depends_on_is_read(tmp_path: Path) -> None:
    graph = Graph()("Exp", out="a")("ReduceMax", "a", out="b")("MatMul", "observation", W).gives(4)
    assert len(load_network(graph.save(tmp_path / "p.onnx", 17)).nodes) == 1


def test_an_action_that_depends_on_the_size_of_a_batch_is_refused(tmp_path: Path) -> None:
    graph = Graph()("Shape", out="a")("Cast", "a", out="b", to=1)("Gather", "b", np.array(0), out="c")
    with pytest.raises(ModelError, match="how many observations"):
        load_network(graph("Mul", "observation", "c").save(tmp_path / "p.onnx", 17))


def test_an_index_of_the_best_is_refused_with_what_to_do(tmp_path: Path) -> None:
    graph = Graph()("ArgMax", out="a", axis=1)("Cast", "a", to=1).gives(1)
    with pytest.raises(ModelError, match=r"\(ArgMax\).*decision: argmax"):
        load_network(graph.save(tmp_path / "p.onnx", 17))


def test_weights_in_a_second_file_are_refused(tmp_path: Path) -> None:
    path = Graph()("MatMul", "observation", W).gives(4).save(tmp_path / "p.onnx", 17)
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="weights", size_threshold=0)
    for reader in (load_network, Policy):
        with pytest.raises(ModelError, match=r"second file.*external_data=False"):
            reader(path)


def test_functions_of_a_model_are_read(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
    layer = helper.make_function("own", "Layer", ["x", "w"], ["y"], body, [helper.make_opsetid("", 17)])
    path = Graph()("Tanh", out="a")("MatMul", "a", W).gives(4).save(tmp_path / "p.onnx", 17)
    model = onnx.load(path)
    model.functions.append(layer)
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node[1].op_type, model.graph.node[1].domain = "Layer", "own"
    onnx.save(model, path)
    x = np.random.default_rng(0).normal(size=(9, N)).astype(F)
    np.testing.assert_allclose(load_network(path)(x.astype(float)), Policy(path).batch(x), atol=1e-6)


def test_a_policy_without_a_batch_axis(tmp_path: Path) -> None:
    graph = Graph(17)("MatMul", "observation", W, out="a")("LayerNormalization", "a", V[:4], out="b")(
        "Concat", "b", V[:1], axis=0
    )
    path = graph.gives(5).save(tmp_path / "p.onnx", 17)
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        del value.type.tensor_type.shape.dim[0]
    onnx.save(model, path)
    x = np.random.default_rng(0).normal(size=(9, N)).astype(F)
    assert any(isinstance(node, Normalize) for node in load_network(path).nodes)
    np.testing.assert_allclose(load_network(path)(x.astype(float)), Policy(path).batch(x), atol=1e-6)


def test_damaged_and_missing_files_are_one_line(tmp_path) -> None:
    path = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(0), [2, 4, 1]))
    data = path.read_bytes()
    for size in (0, 10, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        for reader in (load_network, Policy):
            with pytest.raises(ModelError, match=r"p\.onnx") as caught:
                reader(path)
            assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="no such policy"):
        load_network(tmp_path / "absent.onnx")


def test_double_precision_constants_are_refused(tmp_path) -> None:
    nodes = [
        helper.make_node("Cast", ["observation"], ["x"], to=11),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="wide"),
        helper.make_node("Cast", ["y"], ["action"], to=1),
    ]
    path = save_model(tmp_path / "p.onnx", nodes, {"w": np.eye(2)}, 2, 2)
    with pytest.raises(ModelError, match="Cast"):
        load_network(path)


def test_models_with_a_fixed_batch_still_run_in_batches(tmp_path) -> None:
    rng = np.random.default_rng(1)
    w = rng.normal(size=(3, 2)).astype(F)
    path = save_model(
        tmp_path / "p.onnx", [helper.make_node("MatMul", ["observation", "w"], ["action"])], {"w": w}, 3, 2, batch=1
    )
    policy = Policy(path)
    x = rng.normal(size=(7, 3)).astype(F)
    np.testing.assert_allclose(policy.batch(x), x @ w, rtol=1e-5)


def test_constants_may_be_made_of_constants_and_joined_to_observations(tmp_path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=helper.make_tensor("w", 1, [2, 3], [1, 2, 3, 4, 5, 6])),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["observation", "wt"], ["y"]),
        helper.make_node("Concat", ["y", "one", "observation"], ["z"], axis=1),
        helper.make_node("Gather", ["z", "order"], ["action"], axis=1),
    ]
    constants = {"one": np.array([[7.0]], F), "order": np.array([5, 2, 0, 0], np.int64)}
    path = save_model(tmp_path / "p.onnx", nodes, constants, 3, 4, batch=1)
    x = np.array([0.5, -1.0, 2.0], F)
    np.testing.assert_allclose(load_network(path)(x[None].astype(float)), [[2.0, 7.0, 4.5, 4.5]])
    np.testing.assert_allclose(Policy(path)(x), [2.0, 7.0, 4.5, 4.5])


def test_what_mixes_observations_of_a_batch_is_refused(tmp_path) -> None:
    nodes = [helper.make_node("Transpose", ["observation"], ["action"], perm=[1, 0], name="mix")]
    path = save_model(tmp_path / "p.onnx", nodes, {}, 2, 2, batch=2)
    with pytest.raises(ModelError, match=r"'mix'.*mixes observations of a batch"):
        load_network(path)
