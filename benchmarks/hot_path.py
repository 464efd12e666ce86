"""What a hit costs: from an observation to a certified action, in process, on one core.

The library is synthetic but true: 10,000 certified regions of a 17-32-6 ReLU policy. Beside the whole hit stand the
router alone and the raw ONNX Runtime call that no hit can be faster than, measured alternately in the same run. "hot"
is a tight loop over observations in random regions; "cold" sweeps the caches before every call, as other work does
between two steps of a real control loop. Routing time against the library's size uses regions of 4 observations, so
that a million of them fit into memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.card import Card, Channel
from laws_ros.core.certificate import Certificates
from laws_ros.core.certify import certify
from laws_ros.core.library import Library
from laws_ros.core.region import Regions
from laws_ros.core.router import Tables
from laws_ros.core.trie import Splitter, Trie
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.experts import experts_model
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy, session
from laws_ros.runtime.routing import Router

Floats = NDArray[np.float64]

OBSERVATIONS, HIDDEN, ACTIONS = 17, 32, 6
RADIUS = 0.02  # half-width of a region, where observations are spread with standard deviation 1
SWEEP_BYTES = 64 * 2**20  # twice the largest last-level cache of a small robot computer or server
SMALL = 4  # observations of the libraries that routing time is measured on against size


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def median_trie(x: Floats, most: int = 1) -> Trie:
    """Median splits along the widest axis, until at most `most` of the points x [N, n] are left in a leaf."""
    splitter = Splitter()
    stack = [(0, np.arange(len(x)))]
    while stack:
        node, here = stack.pop()
        if len(here) <= most:
            continue
        axis = int(np.ptp(x[here], axis=0).argmax())
        order = here[x[here, axis].argsort()]
        half = len(here) // 2
        threshold = 0.5 * (x[order[half - 1], axis] + x[order[half], axis])
        low, high = splitter.split(node, axis, float(threshold))
        stack += [(low, order[:half]), (high, order[half:])]
    return splitter.trie()


def inside(rng: np.random.Generator, certificates: Certificates, count: int) -> NDArray[np.float32]:
    """[count, n] observations in random regions."""
    index = rng.integers(len(certificates), size=count)
    xi = rng.uniform(-0.9, 0.9, certificates.center[index].shape)
    axes = np.linalg.inv(certificates.transform[index])
    return (certificates.center[index] + np.einsum("nij,nj->ni", axes, xi)).astype(np.float32)


def save_policy(path: Path, rng: np.random.Generator) -> None:
    """A random ReLU policy."""
    constants = {
        "w0": rng.normal(size=(OBSERVATIONS, HIDDEN)) / math.sqrt(OBSERVATIONS),
        "b0": 0.3 * rng.normal(size=HIDDEN),
        "w1": rng.normal(size=(HIDDEN, ACTIONS)) / math.sqrt(HIDDEN),
        "b1": 0.3 * rng.normal(size=ACTIONS),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["observation", "w0", "b0"], ["z"]),
            helper.make_node("Relu", ["z"], ["a"]),
            helper.make_node("Gemm", ["a", "w1", "b1"], ["action"]),
        ],
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", OBSERVATIONS])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", ACTIONS])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))


def make_library(path: Path, policy: Policy, count: int, rng: np.random.Generator) -> None:
    """Certify `count` boxes in random axes and save them under a trie of median splits."""
    axes = np.linalg.qr(rng.normal(size=(count, OBSERVATIONS, OBSERVATIONS)))[0]
    widths = RADIUS * rng.uniform(0.3, 1.0, (count, OBSERVATIONS))
    regions = Regions.from_axes(rng.normal(size=(count, OBSERVATIONS)), axes, widths)
    certificates = certify(load_network(policy.path), regions)
    tolerance = np.full(ACTIONS, 1.01 * certificates.worst.max())
    card = replace(policy.card, actions=tuple(Channel(c.name, "", -50.0, 50.0) for c in policy.card.actions))
    library = Library(policy.sha256, card, tolerance, certificates, Trie.root(), np.ones(count, np.int64))
    library.indexed(median_trie(certificates.center)).save(path)


def raw_call(certificates: Certificates) -> Callable[[NDArray[np.float32]], None]:
    """ONNX Runtime with IO binding on the library's experts, and nothing around it."""
    experts = session(experts_model(certificates).SerializeToString(), "experts")
    binding = experts.io_binding()
    rows, inputs = certificates.expert_weight.shape[1:]
    index, query, action = np.zeros(1, np.int64), np.ones((1, inputs + 1, 1), np.float32), np.zeros(rows, np.float32)
    binding.bind_input("index", "cpu", 0, np.int64, (1,), index.ctypes.data)
    binding.bind_input("observation", "cpu", 0, np.float32, query.shape, query.ctypes.data)
    binding.bind_output("action", "cpu", 0, np.float32, (1, rows, 1), action.ctypes.data)
    turn = np.random.default_rng(5).integers(len(certificates), size=4096)

    def call(observation: NDArray[np.float32], count: list[int] = [0]) -> None:  # noqa: B006 (a counter, on purpose)
        experts.run_with_iobinding(binding)

    def keep() -> tuple[Any, ...]:  # the binding reads these buffers
        return index, query, action, turn

    call.keep = keep  # type: ignore[attr-defined]
    return call
