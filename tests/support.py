"""Shared by the tests: small real ONNX policies, and the one helper that tries to break certificates."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.build.verify import Executed
from laws_ros.core.certificate import Certificates
from laws_ros.core.network import Network
from laws_ros.core.region import Regions, clamped, scattered
from laws_ros.runtime.policy import Policy

Layers = list[tuple[NDArray, NDArray]]  # weight [out, in] and bias [out]


def save_model(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray],
    inputs: int,
    outputs: int,
    opset: int = 17,
    batch: str | int = "batch",
) -> Path:
    """Write an ONNX model with input "observation" and output "action"; constants keep their own type."""
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, [batch, inputs])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, [batch, outputs])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return path


def save_mlp(
    path: Path,
    layers: Layers,
    activation: str = "Relu",
    clip: float | None = None,
    normalize: float | None = None,
    opset: int = 17,
) -> Path:
    """An MLP of (weight [out, in], bias [out]) layers; `clip` limits the output to [-clip, clip]; `normalize` puts a
    LayerNormalization with that epsilon in front of every activation."""
    nodes, constants, name = [], {}, "observation"
    for k, (weight, bias) in enumerate(layers):
        constants |= {f"w{k}": weight.astype(np.float32), f"b{k}": bias.astype(np.float32)}
        last = k == len(layers) - 1
        out = "action" if last and clip is None else f"z{k}"
        nodes.append(helper.make_node("Gemm", [name, f"w{k}", f"b{k}"], [out], transB=1, name=f"gemm{k}"))
        name = out
        if not last and normalize is not None:
            constants |= {
                f"g{k}": np.linspace(0.5, 1.5, len(bias)).astype(np.float32),
                f"c{k}": bias.astype(np.float32),
            }
            inner = [name, f"g{k}", f"c{k}"]
            nodes.append(helper.make_node("LayerNormalization", inner, [f"n{k}"], epsilon=normalize, name=f"norm{k}"))
            name = f"n{k}"
        if not last:
            nodes.append(helper.make_node(activation, [name], [f"a{k}"], name=f"activation{k}"))
            name = f"a{k}"
    if clip is not None:
        constants |= {"low": np.array(-clip, np.float32), "high": np.array(clip, np.float32)}
        nodes.append(helper.make_node("Clip", [name, "low", "high"], ["action"], name="clip"))
    return save_model(path, nodes, constants, layers[0][0].shape[1], len(layers[-1][1]), opset)


def random_mlp(rng: np.random.Generator, sizes: list[int], gain: float = 1.5) -> Layers:
    return [(gain * rng.normal(size=(b, a)) / np.sqrt(a), 0.3 * rng.normal(size=b)) for a, b in pairwise(sizes)]


def cancelling(rng: np.random.Generator) -> Layers:
    """Large weights that cancel exactly in real arithmetic and not in float32."""
    big = 10.0 ** rng.uniform(3, 6, size=(1, 32))
    first = (rng.normal(size=(64, 2)), rng.uniform(0.5, 1, size=64))
    return [first, (np.concatenate([big, -big], axis=1), np.zeros(1))]


def huge_bias(rng: np.random.Generator) -> Layers:
    return [
        (rng.normal(size=(16, 2)), np.full(16, 1e7)),
        (rng.normal(size=(8, 16)), np.full(8, -1e7)),
        (rng.normal(size=(1, 8)), np.zeros(1)),
    ]


def denormal(rng: np.random.Generator) -> Layers:
    return [
        (1e-38 * rng.normal(size=(16, 2)), np.zeros(16)),
        (1e-4 * rng.normal(size=(16, 16)), 1e-42 * rng.normal(size=16)),
        (1e38 * rng.normal(size=(1, 16)), np.zeros(1)),
    ]


ROUNDING = (cancelling, huge_bias, denormal)  # layers of networks that break verifiers which ignore rounding


def random_regions(rng: np.random.Generator, count: int, inputs: int, radius: float, center: float = 1.0) -> Regions:
    """Boxes, balls and cylinders in random axes with half-widths up to `radius`, some of them flat in some axis."""
    axes, _ = np.linalg.qr(rng.normal(size=(count, inputs, inputs)))
    widths = radius * rng.uniform(size=(count, inputs)) * (rng.random((count, inputs)) > 0.1)
    centers = center * rng.normal(size=(count, inputs))
    round = rng.integers(inputs + 1, size=count) * (rng.random(count) < 0.5)
    return Regions.from_axes(centers, axes, widths, round)


def break_certificates(
    policy: Policy, network: Network, certificates: Certificates, rng: np.random.Generator, per_region: int = 200
) -> tuple[int, int]:
    """Try random points, corners, and gradient-climbed points of every region, as executed by ONNX Runtime.

    Returns:
        observations tried inside regions, and how many of them broke a bound (or met a NaN).
    """
    executed = Executed(policy, certificates)
    count = len(certificates)
    inverse = np.linalg.inv(certificates.transform)
    index = np.repeat(np.arange(count), per_region)
    ball = certificates.regions.ball[index]
    xi = scattered(rng, ball, 0.4)
    climb = np.flatnonzero(rng.random(len(index)) < 0.3)
    row = rng.integers(certificates.bound_offset.shape[1], size=len(climb))
    sign = rng.choice([-1.0, 1.0], size=len(climb))
    for step in range(8):
        x = certificates.center[index[climb]] + np.einsum("nij,nj->ni", inverse[index[climb]], xi[climb])
        with np.errstate(all="ignore"):
            gradient = network.gradient(x, executed.rows[row]) - certificates.expert_weight[index[climb], row]
            slope = sign[:, None] * np.einsum("nij,ni->nj", inverse[index[climb]], gradient)
            slope = slope - certificates.bound_weight[index[climb], row]
            far = np.sqrt(np.where(ball[climb], slope * slope, 0.0).sum(axis=1, keepdims=True)) + 1e-300
            ahead = np.where(ball[climb], slope / far, np.sign(slope))
        xi[climb] = clamped(xi[climb] + ahead / (step + 1), ball[climb])
    x = (certificates.center[index] + np.einsum("nij,nj->ni", inverse[index], xi)).astype(np.float32)
    inside, error, bound = executed.compare(index, x)
    return int(inside.sum()), int((inside & ~(error <= bound).all(axis=1)).sum())
