from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.build.kinds import grow_points
from laws_ros.core.certificate import KINDS
from laws_ros.core.checker import Checker
from laws_ros.core.point import certify_points, point_regions
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import random_mlp, save_mlp

FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**99), max_value=2.0**99)


@settings(max_examples=200, deadline=None)
@given(st.lists(FLOAT, min_size=1, max_size=5))
def test_a_point_region_holds_one_float32_vector(values: list[float]) -> None:
    x = np.array([values], np.float32)
    regions = point_regions(x)
    assert regions.contains(x)[0, 0]
    assert np.isfinite(regions.generators()[1]).all()  # so that something can be certified
    for k in range(len(values)):
        for end in (-np.inf, np.inf):
            other = x.copy()
            other[0, k] = np.nextafter(x[0, k], np.float32(end))
            assert not regions.contains(other)[0, 0]


def test_zero_radius_and_identity_are_an_exact_cache(built) -> None:
    """Against the direct implementation: a dictionary from the observation's bytes to the action."""
    rng = np.random.default_rng(0)
    seen = (rng.normal(size=(300, 3)) * [0.5, 0.3, 1.0]).astype(np.float32)
    seen[0] = 0.0
    grown = grow_points(built.policy, built.network, seen[rng.integers(300, size=900)], np.full(2, 1e-3))
    assert grown.train_coverage == 1.0
    cached = CachedPolicy(grown.library, built.policy)
    direct: dict[bytes, np.ndarray] = {}
    center = grown.library.certificates.center.astype(np.float32)
    for x, action in zip(center, built.policy.decide(built.policy.batch(center)), strict=True):
        direct[x.tobytes()] = action
    other = (rng.normal(size=(300, 3)) * [0.5, 0.3, 1.0]).astype(np.float32)
    near = np.nextafter(seen[:100], np.float32(np.inf))
    hits = 0
    for x in np.concatenate([seen, other, near]):
        answer, want = cached.lookup(x), direct.get(x.tobytes())
        assert (answer is None) == (want is None)
        if answer is not None and want is not None:
            assert answer.action.tobytes() == want.tobytes() and answer.kind == "point"
            assert (answer.bound < 1e-3).all()
            hits += 1
    assert hits == len(direct) > 250
    # not proved to be the same in every order of summation, so not good enough for a tolerance of nothing
    assert CachedPolicy(grown.library, built.policy, [0.0]).lookup(center[0]) is None


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_the_bound_covers_other_orders_of_summation(tmp_path, activation: str) -> None:
    """The same policy with its hidden neurons shuffled is the same sum in another order."""
    rng = np.random.default_rng(0)
    (w1, b1), (w2, b2) = random_mlp(rng, [4, 400, 2])
    policy = Policy(save_mlp(tmp_path / "p.onnx", [(w1, b1), (w2, b2)], activation))
    x = rng.normal(size=(100, 4)).astype(np.float32)
    found = certify_points(load_network(policy.path), x, policy.batch(x))
    differs = 0
    for k in range(5):
        order = rng.permutation(400)
        shuffled = Policy(save_mlp(tmp_path / f"{k}.onnx", [(w1[order], b1[order]), (w2[:, order], b2)], activation))
        error = np.abs(shuffled.batch(x).astype(float) - found.expert_bias)
        assert (error <= found.worst).all()
        differs += int((error > 0).sum())
    assert differs > 100  # or the test shows nothing
    checker = Checker(load_network(policy.path))
    assert all(checker.verdict(found, k) == "holds" for k in range(len(found)))
    assert {KINDS[k] for k in found.kind} == {"point"} and (found.cost == 0).all()


def test_decisions_are_replayed_where_rounding_cannot_turn_them(tmp_path) -> None:
    path = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(1), [3, 16, 3]))
    policy = Policy(path, decision="argmin")
    x = np.random.default_rng(2).normal(size=(200, 3)).astype(np.float32)
    grown = grow_points(policy, load_network(path), x, np.zeros(0))
    cached = CachedPolicy(grown.library, policy)
    answers = [cached.lookup(row) for row in x]
    assert sum(a is not None for a in answers) > 190
    for row, answer in zip(x, answers, strict=True):
        assert answer is None or answer.action[0] == policy(row).argmin()
