"""Policies as people export them: read, executed, bounded and checked."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.errors import ModelError
from laws_ros.core.network import Network
from laws_ros.core.point import certify_points
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_mlp, random_regions, save_mlp, save_model

torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make torch` adds it")
nn = torch.nn
F = np.float32


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(12, 3)

    def forward(self, x):
        hidden = x + nn.functional.silu(self.inner(x))
        first, second = torch.split(torch.cat([hidden, x], -1), [6, 6], -1)
        return self.outer(torch.cat([second, first], -1))[:, :2]


class History(nn.Module):
    """A convolution over a window of past observations, as locomotion policies have it."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.normal, self.head = nn.Conv1d(2, 4, 2, stride=1), nn.BatchNorm1d(4), nn.Linear(8, 2)
        self.normal.running_mean += 0.3
        self.normal.running_var *= 0.7

    def forward(self, x):
        window = x.reshape(x.shape[0], 3, 2).transpose(1, 2)
        return self.head(torch.relu(self.normal(self.convolution(window))).flatten(1))


class RootMeanSquare(nn.Module):
    """As language models write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, size))

    def forward(self, x):
        return self.gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def mlp(*activations: nn.Module) -> nn.Module:
    layers: list[nn.Module] = []
    size = 6
    for activation in activations:
        layers += [nn.Linear(size, 12), activation]
        size = 12
    return nn.Sequential(*layers, nn.Linear(size, 2))


MODULES = {
    "relu": lambda: mlp(nn.ReLU(), nn.ReLU()),
    "tanh": lambda: mlp(nn.Tanh(), nn.Tanh()),
    "elu": lambda: mlp(nn.ELU(), nn.ELU()),
    "selu": lambda: mlp(nn.SELU(), nn.CELU(0.7)),
    "silu": lambda: mlp(nn.SiLU(), nn.SiLU()),
    "gelu": lambda: mlp(nn.GELU(), nn.GELU("tanh")),
    "mish": lambda: mlp(nn.Mish(), nn.Hardswish()),
    "leaky": lambda: mlp(nn.LeakyReLU(0.1), nn.Softplus()),
    "prelu": lambda: mlp(nn.PReLU(12), nn.Softplus(beta=2.0), nn.ReLU6()),
    "squashed": lambda: nn.Sequential(mlp(nn.ReLU()), nn.Hardtanh()),
    "sigmoid": lambda: nn.Sequential(mlp(nn.Sigmoid(), nn.Hardsigmoid()), nn.Tanh()),
    "residual": Residual,
    "history": History,
    "layernorm": lambda: mlp(nn.Sequential(nn.LayerNorm(12), nn.ELU()), nn.Sequential(nn.Tanh(), nn.LayerNorm(12))),
    "rmsnorm": lambda: mlp(nn.Sequential(RootMeanSquare(12), nn.SiLU())),
}


def scripted(module: nn.Module, path: Path, opset: int, inputs: int = 6, **options: Any) -> Path:
    """By torch's TorchScript exporter."""
    options = {"dynamic_axes": {"observation": {0: "batch"}, "action": {0: "batch"}}} | options
    names: dict[str, Any] = {"input_names": ["observation"], "output_names": ["action"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(1, inputs),),
            str(path),
            dynamo=False,
            opset_version=opset,
            **(names | options),
        )
    return path


def dynamo(module: nn.Module, path: Path, opset: int) -> Path:
    """By torch's newer exporter, its default."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: `make torch` adds it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            (torch.zeros(2, 6),),
            str(path),
            dynamo=True,
            opset_version=opset,
            input_names=["observation"],
            output_names=["action"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return path


def examine(
    path: Path, module: nn.Module | None = None, radius: float = 0.1, checked: int = 4, least: int = 1000
) -> Network:
    """Is a policy read as it is executed, and are its certificates unbroken and proved again?"""
    network, policy, rng = load_network(path), Policy(path), np.random.default_rng(0)
    x = rng.normal(size=(100, network.inputs)).astype(F)
    executed = policy.batch(x)
    others = [network(x.astype(float))]
    if module is not None:
        with torch.no_grad():
            others.append(module(torch.from_numpy(x)).numpy())
    rounding = certify_points(network, x, executed).bound_offset  # what any order of summation can change
    for other in others:
        np.testing.assert_allclose(executed, other, atol=2e-6)  # the worst seen is 2.5e-7, of LayerNormalization
        assert (np.abs(executed - other) <= rounding).all()
    certificates = certify(network, random_regions(rng, 20, network.inputs, radius))
    assert np.isfinite(certificates.bound_offset).all()
    tried, broken = break_certificates(policy, network, certificates, rng)
    assert tried > least and broken == 0
    checker = Checker(network)
    assert all(checker.verdict(certificates, k) == "holds" for k in range(checked))
    return network


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("opset", [13, 17, 20])
def test_torchscript_exports(name: str, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    examine(scripted(module, tmp_path / "p.onnx", opset), module)


@pytest.mark.parametrize(
    "name", ["tanh", "silu", "gelu", "mish", "prelu", "residual", "history", "layernorm", "rmsnorm"]
)
def test_dynamo_exports(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    examine(dynamo(module, tmp_path / "p.onnx", 20 if len(name) % 2 else 23), module)


def test_a_dynamo_export_with_its_weights_beside_it_is_refused_with_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: `make torch` adds it")
    module = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 2)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.zeros(1, 6),), str(tmp_path / "p.onnx"), dynamo=True, verbose=False)
    with pytest.raises(ModelError, match=r"in a second file; export with external_data=False"):
        load_network(tmp_path / "p.onnx")
    onnx.save_model(onnx.load(tmp_path / "p.onnx"), tmp_path / "q.onnx", save_as_external_data=False)
    examine(tmp_path / "q.onnx", module)


class EmpiricalNormalization(nn.Module):
    """As rsl_rl's: buffers of one row, and a division by what is computed when the policy runs."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.eps = 1e-2
        self.register_buffer("_mean", torch.randn(1, size))
        self.register_buffer("_var", torch.rand(1, size) + 0.1)
        self.register_buffer("_std", self._var.sqrt())

    def forward(self, x):
        return (x - self._mean) / (self._std + self.eps)


@pytest.mark.parametrize("opset", [11, 18])
def test_rsl_rl_actors(opset: int, tmp_path: Path) -> None:
    """nn.Sequential(ELU 512-256-128) behind empirical normalisation; `obs` to `actions`, no free axis.

    Names, opsets and structure of `_OnnxPolicyExporter` in rsl_rl and Isaac Lab (isaaclab_rl/rsl_rl/exporter.py).
    """
    torch.manual_seed(0)
    sizes, layers = [24, 512, 256, 128, 6], []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ELU()]

    class Exporter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.actor, self.normalizer = nn.Sequential(*layers[:-1]), EmpiricalNormalization(24)

        def forward(self, x):
            return self.actor(self.normalizer(x))

    module, names = Exporter(), {"input_names": ["obs"], "output_names": ["actions"]}
    path = scripted(module, tmp_path / "policy.onnx", opset, 24, dynamic_axes={}, **names)
    network = examine(path, module, radius=0.01, checked=1, least=100)  # few float32 points are in flat regions
    assert sum(node.size for node in network.nodes[-7:]) == 2 * (512 + 256 + 128) + 6


class Actor(nn.Module):
    """What Stable-Baselines3's documentation ("Exporting models") wraps a policy's actor in."""

    def __init__(self, policy: nn.Module, first: bool, **options: Any) -> None:
        super().__init__()
        self.policy, self.first, self.options = policy, first, options

    def forward(self, observation):
        answer = self.policy(observation, **self.options)
        return answer[0] if self.first else answer


@pytest.fixture(scope="module")
def baselines() -> ModuleType:
    pytest.importorskip("gymnasium", reason="Gymnasium is not installed")
    return pytest.importorskip("stable_baselines3", reason="Stable-Baselines3 is not installed: pip install it")


@pytest.mark.parametrize("algorithm", ["SAC", "TD3", "PPO", "A2C", "DQN"])
@pytest.mark.parametrize("batch", ["fixed", "free"])
def test_stable_baselines_actors(baselines: ModuleType, algorithm: str, batch: str, tmp_path: Path) -> None:
    model = getattr(baselines, algorithm)(
        "MlpPolicy", "CartPole-v1" if algorithm == "DQN" else "Pendulum-v1", seed=0, device="cpu"
    )
    module = {
        "SAC": lambda: Actor(model.policy.actor, False, deterministic=True),
        "TD3": lambda: Actor(model.policy.actor, False),
        "PPO": lambda: Actor(model.policy, True, deterministic=True),
        "A2C": lambda: Actor(model.policy, True, deterministic=True),
        "DQN": lambda: Actor(model.policy.q_net, False),
    }[algorithm]()
    inputs = model.observation_space.shape[0]
    path = scripted(module, tmp_path / "p.onnx", 17, inputs, **({"dynamic_axes": {}} if batch == "fixed" else {}))
    network = examine(path, module, radius=0.02)
    functions = Counter(getattr(node, "function", "affine") for node in network.nodes)
    hidden = {"tanh": 2} if algorithm in ("PPO", "A2C") else {"relu": 2}
    assert functions == Counter({"affine": 3, **hidden, **({"tanh": 1} if algorithm in ("SAC", "TD3") else {})})


def test_a_stable_baselines_policy_that_also_returns_values_is_refused(baselines: ModuleType, tmp_path: Path) -> None:
    model = baselines.PPO("MlpPolicy", "Pendulum-v1", seed=0, device="cpu")
    path = scripted(Actor(model.policy, False, deterministic=True), tmp_path / "p.onnx", 17, 3)
    with pytest.raises(ModelError, match=r"returns only the action"):
        load_network(path)


@pytest.mark.parametrize("opset", [13, 15, 17])
def test_graphs_in_the_manner_of_tf2onnx(opset: int, tmp_path: Path) -> None:
    """MatMul and Add of transposed constants, Identity, Cast, a Reshape that is none, names with ":0"."""
    rng = np.random.default_rng(0)
    (w0, b0), (w1, b1), (w2, b2) = random_mlp(rng, [6, 16, 16, 2], 1.0)
    nodes = [
        helper.make_node("Cast", ["observation"], ["cast:0"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["cast:0", "const_shape"], ["flat:0"]),
        helper.make_node("Transpose", ["kernel"], ["kernel_t:0"], perm=[1, 0]),
        helper.make_node("MatMul", ["flat:0", "kernel_t:0"], ["dense/MatMul:0"], name="dense/MatMul"),
        helper.make_node("Add", ["dense/MatMul:0", "bias"], ["dense/BiasAdd:0"], name="dense/BiasAdd"),
        helper.make_node("Relu", ["dense/BiasAdd:0"], ["dense/Relu:0"]),
        helper.make_node("Identity", ["kernel_1"], ["dense_1/ReadVariableOp:0"]),
        helper.make_node("MatMul", ["dense/Relu:0", "dense_1/ReadVariableOp:0"], ["dense_1/MatMul:0"]),
        helper.make_node("Add", ["dense_1/MatMul:0", "bias_1"], ["dense_1/BiasAdd:0"]),
        helper.make_node("Max", ["dense_1/BiasAdd:0", "low"], ["clip/Maximum:0"]),
        helper.make_node("Min", ["clip/Maximum:0", "high"], ["clip:0"]),
        helper.make_node("MatMul", ["clip:0", "kernel_2"], ["dense_2/MatMul:0"]),
        helper.make_node("Add", ["dense_2/MatMul:0", "bias_2"], ["dense_2/BiasAdd:0"]),
        helper.make_node("Tanh", ["dense_2/BiasAdd:0"], ["tanh:0"]),
        helper.make_node("Mul", ["scale", "tanh:0"], ["mul:0"]),
        helper.make_node("Identity", ["mul:0"], ["action"]),
    ]
    constants = {"kernel": w0, "bias": b0[None], "kernel_1": w1.T, "bias_1": b1, "kernel_2": w2.T, "bias_2": b2}
    constants |= {"low": np.array(-0.5), "high": np.full(16, 1.5), "scale": np.array([2.0])}
    constants = {name: value.astype(F) for name, value in constants.items()}
    constants["const_shape"] = np.array([-1, 6], np.int64)
    examine(save_model(tmp_path / "p.onnx", nodes, constants, 6, 2, opset))


def test_bounds_hold_in_a_thread_that_takes_denormals_for_zero(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [(1e-38 * rng.normal(size=(16, 2)), np.zeros(16)), (1e38 * rng.normal(size=(1, 16)), np.zeros(1))]
    path = save_mlp(tmp_path / "p.onnx", layers)
    network, policy = load_network(path), Policy(path)
    certificates = certify(network, random_regions(rng, 40, 2, 0.3))
    x = np.full((1, 2), 0.3, np.float32)
    gradual = policy(x[0])
    assert torch.set_flush_denormal(True)
    try:
        flushed = policy(x[0])
        tried, broken = break_certificates(policy, network, certificates, rng)
    finally:
        torch.set_flush_denormal(False)
    assert flushed != gradual  # or nothing was tested
    assert tried > 1000 and broken == 0
