from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.functions import FUNCTIONS
from laws_ros.core.lipschitz import (
    certify_lipschitz,
    formula,
    global_constant,
    slope_range,
    slopes,
    spectral_norm,
)
from laws_ros.core.network import Elementwise
from laws_ros.core.region import Regions
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_mlp, random_regions, save_mlp

PARAMETERS = {"leakyrelu": (0.1,), "clip": (-0.5, 0.7), "elu": (1.3,), "selu": (1.67, 1.05)}


@pytest.fixture(scope="module", params=["Relu", "Tanh", "Sigmoid"])
def policy(request, tmp_path_factory) -> Policy:
    path = tmp_path_factory.mktemp("lipschitz") / "p.onnx"
    return Policy(save_mlp(path, random_mlp(np.random.default_rng(1), [3, 24, 24, 2]), request.param))


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_slope_ranges_enclose_every_chord(name: str) -> None:
    """A chord's slope is a mean of derivatives, so it lies in the range: that is all that the proof needs."""
    rng = np.random.default_rng(0)
    low = np.concatenate([rng.normal(size=400) * 10.0 ** rng.integers(-3, 3, 400), [-1e6]])
    high = low + np.append(np.abs(rng.normal(size=400)) * 10.0 ** rng.integers(-3, 3, 400), 2e6)
    node = Elementwise(0, name, len(low), PARAMETERS.get(name, ()))
    least, largest = slope_range(node, low, high)
    a, b = np.sort(rng.uniform(low, high, (2, 200, len(low))), axis=0)
    wide = b - a > 1e-6 * (1.0 + np.abs(a))
    chord = (node(b) - node(a))[wide] / (b - a)[wide]
    slack = 1e-8 * (1.0 + np.abs(chord))  # of this quotient
    assert (chord >= np.broadcast_to(least, a.shape)[wide] - slack).all()
    assert (chord <= np.broadcast_to(largest, a.shape)[wide] + slack).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30), st.integers(1, 30), st.floats(-20, 20))
def test_spectral_norms_are_upper_bounds_and_close(seed: int, rows: int, columns: int, magnitude: float) -> None:
    matrix = np.random.default_rng(seed).normal(size=(rows, columns)) * 10.0**magnitude
    true = np.linalg.svd(matrix, compute_uv=False)[0]
    assert true <= spectral_norm(matrix) <= 1.001 * true
    assert spectral_norm(np.zeros((rows, columns))) == 0.0


def test_constants_bound_every_chord_of_the_executed_policy(policy: Policy) -> None:
    rng, network = np.random.default_rng(2), load_network(policy.path)
    regions = random_regions(rng, 20, 3, 0.4)
    found, everywhere = slopes(network, regions), global_constant(network, regions)
    generators, _ = regions.generators()
    one, two = rng.uniform(-1, 1, (2, 20, 300, 3))
    x = [regions.center[:, None] + np.einsum("bij,bkj->bki", generators, zeta) for zeta in (one, two)]
    y = [network(k.reshape(-1, 3)).reshape(20, 300, 2) for k in x]
    moved = np.abs(y[0] - y[1])
    assert (moved <= np.einsum("brn,bkn->bkr", found.local, np.abs(one - two)) + 1e-12).all()
    assert (moved <= everywhere[:, None] * np.linalg.norm(one - two, axis=2)[..., None] + 1e-12).all()
    executed = policy.batch(x[0].reshape(-1, 3).astype(np.float32)).reshape(20, 300, 2)
    exact = network(x[0].reshape(-1, 3).astype(np.float32).astype(float)).reshape(20, 300, 2)
    assert (np.abs(executed - exact) <= found.execution[:, None]).all()


def test_certificates_hold_and_are_proved_by_the_checker(policy: Policy) -> None:
    rng, network = np.random.default_rng(3), load_network(policy.path)
    regions = random_regions(rng, 30, 3, 0.3)
    found = certify_lipschitz(network, regions, policy.batch, samples=512)
    known = np.isfinite(found.certificates.bound_offset).all(axis=1)
    certificates = found.certificates[known]
    assert known.sum() >= 20 and (certificates.bound_weight == 0).all()
    tried, violations = break_certificates(policy, network, certificates, rng)
    assert tried > 1000 and violations == 0
    shrunk = replace(certificates, bound_offset=0.2 * certificates.bound_offset)
    assert break_certificates(policy, network, shrunk, rng)[1] > 0
    checker = Checker(network)
    assert all(checker.verdict(certificates, k) == "holds" for k in range(len(certificates)))
    assert checker.verdict(replace(certificates, bound_offset=0.1 * certificates.bound_offset), 0) == "unknown"
    # what is certified lies between the linear kind and the paper's formula, local and global
    linear = certify(network, regions).worst[known]
    local = found.eps_fit + 2 * np.einsum("brn,bn->br", slopes(network, regions).local, found.covering)
    radius = np.linalg.norm(found.covering, axis=1)[:, None]
    everywhere = formula(found.eps_fit, global_constant(network, regions), radius)
    assert np.median(linear) < np.median(certificates.worst) < np.median(local[known]) < np.median(everywhere[known])


def test_the_covering_radius_is_true(policy: Policy) -> None:
    """No point of the region is farther, along any axis, from its nearest sample."""
    seen: list[np.ndarray] = []

    def execute(x: np.ndarray) -> np.ndarray:
        seen.append(x)
        return policy.batch(x)

    rng = np.random.default_rng(4)
    regions = random_regions(rng, 8, 3, 0.5)
    found = certify_lipschitz(load_network(policy.path), regions, execute, samples=200)
    used = np.isfinite(found.certificates.bound_offset).all(axis=1)
    assert [len(x) for x in seen] == found.samples[used].tolist() and found.samples.max() <= 200
    for k, x in zip(np.flatnonzero(used), seen, strict=True):
        samples = Regions(regions.center[k : k + 1], regions.transform[k : k + 1]).coordinates(x)[:, 0]
        assert (np.abs(samples) <= 1).all()
        far = np.abs(rng.uniform(-1, 1, (500, 1, 3)) - samples)
        assert (far <= found.covering[k]).all(axis=2).any(axis=1).all()


def test_nothing_is_certified_about_what_is_not_finite(policy: Policy) -> None:
    network = load_network(policy.path)
    regions = random_regions(np.random.default_rng(5), 3, 3, 0.1)
    center = regions.center.copy()
    center[0, 0], center[1, 1] = np.nan, 1e38
    found = certify_lipschitz(network, Regions(center, regions.transform), policy.batch).certificates
    assert np.isinf(found.bound_offset[:2]).all()
