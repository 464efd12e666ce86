from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from laws_ros.core.errors import ModelError
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import random_mlp, save_mlp, save_model

F = np.float32


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_graphs_of_all_operators_equal_onnx_runtime(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    size = first = data.draw(st.integers(1, 6))
    nodes, constants, name = [], {}, "observation"
    for k in range(data.draw(st.integers(1, 8))):
        kind = data.draw(
            st.sampled_from(
                [
                    "Gemm",
                    "MatMul",
                    "Add",
                    "Sub",
                    "SubFrom",
                    "Mul",
                    "Div",
                    "Relu",
                    "Tanh",
                    "Clip",
                    "Flatten",
                    "Reshape",
                    "Identity",
                ]
            )
        )
        out, c = f"t{k}", f"c{k}"
        if kind in ("Gemm", "MatMul"):
            new = data.draw(st.integers(1, 6))
            transposed = data.draw(st.booleans()) and kind == "Gemm"
            constants[c] = rng.normal(size=(new, size) if transposed else (size, new)).astype(F)
            if kind == "Gemm":
                constants[f"{c}b"] = rng.normal(size=new).astype(F)
                nodes.append(helper.make_node("Gemm", [name, c, f"{c}b"], [out], transB=int(transposed)))
            else:
                nodes.append(helper.make_node("MatMul", [name, c], [out]))
            size = new
        elif kind in ("Add", "Sub", "SubFrom", "Mul", "Div"):
            shape = data.draw(st.sampled_from([(), (1,), (size,), (1, size)]))
            constants[c] = np.array(rng.uniform(0.5, 2, size=shape), F)
            operands = [c, name] if kind == "SubFrom" else [name, c]
            nodes.append(helper.make_node("Sub" if kind == "SubFrom" else kind, operands, [out]))
        elif kind == "Clip":
            constants |= {f"{c}l": np.array(-0.7, F), f"{c}h": np.array(1.1, F)}
            nodes.append(helper.make_node("Clip", [name, f"{c}l", f"{c}h"], [out]))
        elif kind == "Reshape":
            constants[c] = np.array([-1, size] if data.draw(st.booleans()) else [0, -1], np.int64)
            nodes.append(helper.make_node("Reshape", [name, c], [out]))
        else:
            nodes.append(helper.make_node(kind, [name], [out]))
        name = out
    nodes.append(helper.make_node("Identity", [name], ["action"]))
    path = save_model(tmp_path_factory.mktemp("onnx") / "p.onnx", nodes, constants, first, size)
    network, policy = load_network(path), Policy(path)
    x = rng.normal(size=(20, first)).astype(F)
    exact = network(x.astype(float))
    assert exact.shape == (20, size)
    np.testing.assert_allclose(policy.batch(x), exact, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose([policy(v) for v in x], exact, rtol=1e-4, atol=1e-4)


def test_gradient_is_the_derivative(tmp_path) -> None:
    rng = np.random.default_rng(0)
    network = load_network(save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 16, 2]), "Tanh", clip=1.0))
    x, seed, h = rng.normal(size=(5, 3)), rng.normal(size=(5, 2)), 1e-6
    for axis in range(3):
        step = h * np.eye(3)[axis]
        numeric = ((network(x + step) - network(x - step)) * seed).sum(axis=1) / (2 * h)
        np.testing.assert_allclose(network.gradient(x, seed)[:, axis], numeric, atol=1e-5)


@pytest.mark.parametrize(
    "name, nodes",
    [
        ("Sin", [helper.make_node("Sin", ["observation"], ["action"], name="wave")]),
        ("Softmax", [helper.make_node("Softmax", ["observation"], ["action"], name="wave")]),
        ("Mul", [helper.make_node("Mul", ["observation", "observation"], ["action"], name="wave")]),
    ],
)
def test_what_cannot_be_bounded_is_refused_by_node_and_operator(tmp_path, name, nodes) -> None:
    path = save_model(tmp_path / "p.onnx", nodes, {}, 2, 2)
    with pytest.raises(ModelError, match=rf"p\.onnx: node 'wave' \({name}\)"):
        load_network(path)


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
