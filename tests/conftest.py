from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from laws_ros.build.grow import grow
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import random_mlp, save_mlp

# A shell starts background jobs with SIGINT ignored, and so would be every process that a test wants to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(repr=False)
class Built:
    """A small policy with a card and a library grown for it."""

    path: Path
    policy: Policy
    network: Network
    library: Library
    observations: np.ndarray


CARD = """
name: small
observations:
  - {name: a.position, unit: rad, low: -5, high: 5}
  - {name: b.position, unit: m, low: -5, high: 5}
  - {name: a.velocity, unit: rad/s, low: -5, high: 5}
actions:
  - {name: a.effort, unit: N m, low: -1, high: 1}
  - {name: b.effort, unit: N, low: -1, high: 1}
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(0)
    path = save_mlp(folder / "small.onnx", random_mlp(rng, [3, 24, 24, 2], gain=0.7), "Relu", clip=1.0)
    path.with_suffix(".yaml").write_text(CARD)
    policy, network = Policy(path), load_network(path)
    observations = (rng.normal(size=(4000, 3)) * [0.5, 0.3, 1.0]).astype(np.float32)
    growth = grow(policy, network, observations, policy.batch(observations), np.full(2, 0.1), max_regions=300)
    return Built(path, policy, network, growth.library, observations)
