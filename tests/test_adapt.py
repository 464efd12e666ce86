"""Distilling a finished policy: the interface stays, both figures are reported."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from laws_ros.cli import main
from laws_ros.runtime.policy import Policy

pytest.importorskip("torch", reason="adapting needs PyTorch: make torch")
pytest.importorskip("gymnasium", reason="needs Gymnasium: pip install 'laws_ros[gym]'")

SMALL = ["--hidden", "16", "--steps", "40", "--episodes", "2", "--check-episodes", "2", "--max-regions", "20"]
CARD = """
name: swing
observations: [{name: cos}, {name: sin}, {name: rate, unit: rad/s, low: -8.1, high: 8.1}]
actions: [{name: torque, unit: N m, low: -2, high: 2}]
"""


def foreign(path, operator, nodes, inputs, outputs, **constants):
    """A policy as another exporter may name and shape it: input obs [batch, 1, n], output `linear0`."""
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["obs"], ["flat"]), *nodes, helper.make_node(operator, ["y"], ["linear0"])],
        "foreign",
        [helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["batch", 1, inputs])],
        [helper.make_tensor_value_info("linear0", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def test_a_continuous_policy_keeps_its_interface(tmp_path, capsys):
    product = [helper.make_node("MatMul", ["flat", "gain"], ["y"])]
    path = foreign(tmp_path / "p.onnx", "Tanh", product, 3, 1, gain=[[0.5], [-1.0], [-0.5]])
    path.with_suffix(".yaml").write_text(CARD)
    out = tmp_path / "q.onnx"
    task = ["--policy", str(path), "--workload", "gym:Pendulum-v1"]
    with pytest.raises(SystemExit):
        main(["adapt", *task])
    assert main(["adapt", *task, "--out", str(tmp_path / "q.pt")]) == 2
    assert main(["adapt", "--policy", str(path), "--workload", "gym:CartPole-v1", "--out", str(out)]) == 2
    assert main(["adapt", *task, "--out", str(path), *SMALL]) == 2
    capsys.readouterr()
    # The workload calls its channels otherwise than this card: refused, as everywhere.
    assert main(["adapt", *task, "--out", str(out), *SMALL]) == 2
    assert "'cos' where gym:Pendulum-v1 gives 'x0'" in capsys.readouterr().err
    path.with_suffix(".yaml").write_text(CARD.replace("cos", "x0").replace("sin", "x1").replace("rate,", "x2,"))
    assert main(["adapt", *task, "--out", str(out), *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    before, after = Policy(path), Policy(out)
    assert after.card == before.card
    for kind in ("get_inputs", "get_outputs"):
        ((a,), (b,)) = (getattr(p.session, kind)() for p in (before, after))
        assert (a.name, a.shape[1:]) == (b.name, b.shape[1:])
    assert found["training"]["sha256"] == after.sha256 and found["training"]["parity"]["worst_action_difference"] < 1e-4
    assert np.isfinite([found["return_policy"], found["return_adapted"]]).all()
    assert 0.0 <= found["coverage_policy"]["answered"] <= 1.0 and found["coverage_adapted"]["regions"] <= 20
    assert {p.name for p in tmp_path.iterdir()} == {"p.onnx", "p.yaml", "q.onnx", "q.yaml"}


def test_a_deciding_policy_that_nobody_can_certify(tmp_path, capsys):
    product = [helper.make_node("MatMul", ["flat", "gain"], ["y"])]
    gain = np.random.default_rng(0).normal(size=(4, 2))
    path = foreign(tmp_path / "p.onnx", "Sin", product, 4, 2, gain=gain)
    task = ["--policy", str(path), "--workload", "gym:CartPole-v1", "--decision", "argmax"]
    assert main(["adapt", *task, "--out", str(tmp_path / "q.onnx"), *SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["coverage_policy"]["answered"] is None and "Sin" in found["coverage_policy"]["reason"]
    assert found["coverage_adapted"]["answered"] is not None
    assert Policy(tmp_path / "q.onnx").card.decision == "argmax"
