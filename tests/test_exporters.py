"""Policies as people export them: read, executed, bounded and checked."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_regions, save_mlp

torch = pytest.importorskip("torch", reason="PyTorch is not installed: `make torch` adds it")
nn = torch.nn


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
        return self.head(torch.relu(self.normal(self.convolution(x.reshape(-1, 3, 2).transpose(1, 2)))).flatten(1))


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
    "elu": lambda: mlp(nn.ELU(), nn.ELU()),  # rsl_rl's default
    "selu": lambda: mlp(nn.SELU()),
    "silu": lambda: mlp(nn.SiLU(), nn.SiLU()),
    "gelu": lambda: mlp(nn.GELU(), nn.GELU()),
    "leaky": lambda: mlp(nn.LeakyReLU(0.1), nn.Softplus()),
    "squashed": lambda: nn.Sequential(mlp(nn.ReLU()), nn.Hardtanh()),
    "sigmoid": lambda: nn.Sequential(mlp(nn.Sigmoid()), nn.Tanh()),
    "residual": Residual,
    "history": History,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("opset", [13, 20])
def test_an_exported_policy_is_read_bounded_and_checked(name: str, opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = MODULES[name]().eval(), tmp_path / f"{name}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module,
            (torch.zeros(1, 6),),
            str(path),
            dynamo=False,
            opset_version=opset,
            input_names=["observation"],
            output_names=["action"],
            dynamic_axes={"observation": {0: "batch"}, "action": {0: "batch"}},
        )
    network, policy = load_network(path), Policy(path)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 6)).astype(np.float32)
    with torch.no_grad():
        np.testing.assert_allclose(policy.batch(x), module(torch.from_numpy(x)).numpy(), atol=2e-6)
    np.testing.assert_allclose(network(x.astype(float)), policy.batch(x), atol=2e-6)
    certificates = certify(network, random_regions(rng, 30, 6, 0.1))
    assert np.isfinite(certificates.bound_offset).all()
    tried, broken = break_certificates(policy, network, certificates, rng)
    assert tried > 1000 and broken == 0
    checker = Checker(network)
    assert all(checker.verdict(certificates, k) == "holds" for k in range(8))


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
