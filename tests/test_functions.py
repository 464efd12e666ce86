"""What `core.functions` states as facts: derivative, curvature, kinks, monotony, and the error of execution."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

from laws_ros.core.functions import FUNCTIONS
from laws_ros.core.network import Elementwise
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import save_model

PARAMETERS = {"clip": (-0.7, 1.3), "leakyrelu": (0.01,), "elu": (1.3,), "selu": (1.6732632, 1.0507010)}
OPERATORS = {
    "relu": ("Relu", {}),
    "leakyrelu": ("LeakyRelu", {"alpha": 0.01}),
    "tanh": ("Tanh", {}),
    "sigmoid": ("Sigmoid", {}),
    "softplus": ("Softplus", {}),
    "elu": ("Elu", {"alpha": 1.3}),
    "selu": ("Selu", {}),
    "erf": ("Erf", {}),
    "gelu": ("Gelu", {}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
    "mish": ("Mish", {}),
    "hardswish": ("HardSwish", {}),
}


def node(name: str) -> Elementwise:
    return Elementwise(0, name, 1, PARAMETERS.get(name, ()))


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_derivative_curvature_kinks_and_monotony(name: str) -> None:
    f, step = node(name), 1e-5
    z = np.linspace(-60.0, 60.0, 1_200_001)
    kinks = f.facts.kinks(f.parameters)
    smooth = np.all([np.abs(z - k) > 2 * step for k in kinks], axis=0) if kinks else np.ones(len(z), dtype=bool)
    numeric = (f(z + step) - f(z - step)) / (2 * step)
    np.testing.assert_allclose(f.derivative(z)[smooth], numeric[smooth], atol=1e-6)
    bend = np.abs(f.derivative(z + step) - f.derivative(z - step))[smooth] / (2 * step)
    assert bend.max() <= f.facts.curvature(f.parameters) + 1e-9
    assert bend[np.abs(z[smooth]) > 40].max() <= 1e-9
    assert (np.diff(f(z)).min() >= -1e-15) == f.facts.increasing


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_execution_error_is_within_a_quarter_of_its_allowance(name: str, tmp_path) -> None:
    """Float32 values at a stride through all magnitudes up to 60, both signs; another build has room for four times."""
    operator, attributes = OPERATORS[name]
    nodes = [helper.make_node(operator, ["observation"], ["action"], **attributes)]
    path = save_model(tmp_path / "p.onnx", nodes, {}, 1, 1, opset=20)
    bits = np.arange(0, np.float32(60.0).view(np.uint32), 997, dtype=np.uint32)
    x = bits.view(np.float32)
    x = np.concatenate([x, -x, np.linspace(-10, 10, 2_000_001, dtype=np.float32)])
    (read,) = load_network(path).nodes
    assert isinstance(read, Elementwise) and read.function == name
    error = np.abs(Policy(path).batch(x[:, None])[:, 0].astype(float) - read(x.astype(float)))
    absolute, relative = read.facts.execution(read.parameters)
    assert (error <= (absolute + relative * np.abs(x.astype(float))) / 4 + 2.0**-126).all()
