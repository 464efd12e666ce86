"""Growth: what its boxes must get right, on policies whose shape is known."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from onnx import helper

from laws_ros.build.grow import grow, tighten
from laws_ros.build.verify import verify
from laws_ros.core.card import Card, Channel
from laws_ros.core.checker import Checker
from laws_ros.core.errors import ConfigError
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router
from tests.support import random_mlp, save_mlp, save_model

TOLERANCE = np.array([0.05, 0.05])


@pytest.fixture(scope="module")
def arm(tmp_path_factory):
    """clip(K x + b(mode)), two actions over three sensors and a mode of three values, as a hand-made network."""
    constants = {
        "gain": np.array([[2.0, 0.3], [-1.0, 1.5], [0.5, -2.0], [0.0, 0.0]], np.float32),
        # mode m makes relu(m - 0.5) and relu(m - 1.5), which shift the actions
        "ramp": np.array([[0.0, 0.0, 0.0, 1.0]] * 2, np.float32),
        "at": np.array([-0.5, -1.5], np.float32),
        "shift": np.array([[1.5, -4.0], [-1.0, 3.0]], np.float32),
        "low": np.array(-1.0, np.float32),
        "high": np.array(1.0, np.float32),
    }
    nodes = [
        helper.make_node("Gemm", ["observation", "ramp", "at"], ["z"], transB=1),
        helper.make_node("Relu", ["z"], ["r"]),
        helper.make_node("Gemm", ["r", "shift"], ["b"], transB=1),
        helper.make_node("MatMul", ["observation", "gain"], ["kx"]),
        helper.make_node("Add", ["kx", "b"], ["free"]),
        helper.make_node("Clip", ["free", "low", "high"], ["action"]),
    ]
    path = save_model(tmp_path_factory.mktemp("grow") / "p.onnx", nodes, constants, 4, 2)
    card = Card(
        "p",
        (*(Channel(f"s{k}", "rad") for k in range(3)), Channel("mode")),
        (Channel("a", "", -1.0, 1.0), Channel("b", "", -1.0, 1.0)),
        context=("mode",),
    )
    path.with_suffix(".yaml").write_text(yaml.safe_dump(card.to_dict()))
    return Policy(path), load_network(path)


def observations(count, seed):
    rng = np.random.default_rng(seed)
    mode = rng.choice(3, size=count, p=[0.6, 0.3, 0.1])
    mixing = np.array([[0.5, 0.2, 0.0], [0.0, 0.3, 0.1], [0.0, 0.0, 0.4]])
    return np.column_stack([rng.normal(size=(count, 3)) @ mixing, mode]).astype(np.float32)


@pytest.fixture(scope="module")
def grown(arm):
    policy, network = arm
    x = observations(20_000, 0)
    return grow(policy, network, x, policy.batch(x), TOLERANCE)


def test_a_clipped_affine_policy_takes_few_regions(arm, grown):
    fresh = observations(5_000, 1)
    hit = Router(grown.library, TOLERANCE).many(fresh) >= 0
    at_limit = (np.abs(arm[0].batch(fresh)) == 1.0).any(axis=1)
    assert 0.2 < at_limit.mean() < 0.8  # the test tests something
    assert grown.train_coverage > 0.99
    assert hit.mean() > grown.train_coverage - 0.03
    assert len(grown.library) < 250  # boxes that straddle limits, as they once did: 1,845, and 83% of fresh ones
    assert int(grown.library.visits.sum()) == round(grown.train_coverage * 20_000)


def test_answers_are_within_tolerance_and_stay_in_their_mode(arm, grown):
    fresh = observations(5_000, 2)
    found = Router(grown.library, TOLERANCE).many(fresh)
    certificates = grown.library.certificates
    hit = found >= 0
    inside, value, bound = certificates.at(found[hit], fresh[hit])
    assert inside.all()
    assert (np.abs(arm[0].decide(value) - arm[0].batch(fresh[hit])) <= bound + 1e-6).all()  # float64
    assert (bound <= TOLERANCE).all()
    assert (np.abs(certificates.center[found[hit], 3] - fresh[hit, 3]) < 1e-3).all()
    between = fresh.copy()
    between[:, 3] += 0.5  # no mode: nothing was learned there
    assert (Router(grown.library, TOLERANCE).many(between) < 0).all()


def test_same_observations_same_library(arm, grown):
    policy, network = arm
    x = observations(20_000, 0)
    again = grow(policy, network, x, policy.batch(x), TOLERANCE)
    assert again.certificates_tried == grown.certificates_tried
    assert again.library.ids == grown.library.ids


def test_budgets_are_kept(arm):
    policy, network = arm
    x = observations(5_000, 3)
    assert len(grow(policy, network, x, policy.batch(x), TOLERANCE, max_regions=3).library) <= 3
    none = grow(policy, network, x, policy.batch(x), TOLERANCE, max_certificates=0)
    assert (len(none.library), none.certificates_tried, none.train_coverage) == (0, 0, 0.0)


def test_bounds_of_parts_are_tighter_and_answer_no_less(tmp_path):
    path = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(0), [3, 16, 16, 1], 1.2))
    policy, network, tolerance = Policy(path), load_network(path), np.array([0.1])
    x = np.random.default_rng(1).normal(scale=0.5, size=(3_000, 3)).astype(np.float32)
    loose, tight = (
        grow(policy, network, x, policy.batch(x), tolerance, max_certificates=1_500, effort=effort).library
        for effort in ("backward", "split:4")
    )
    assert (loose.certificates.round == 3).any()  # balls among them
    answered = [Router(library, tolerance).many(x) >= 0 for library in (loose, tight)]
    assert not (answered[0] & ~answered[1]).any()
    again, tried = tighten(loose, network)
    assert set(tight.ids) <= set(again.ids) and tried == len(loose)  # a build does that in the end, and then prunes
    found = verify(tight, policy, network, 5_000, attack=True)
    assert found.good  # the checker proves bounds of parts, of balls, too
    before = verify(loose, policy, network, 5_000, True, recheck=False)
    assert np.nanmedian(found.ratio) < 0.9 * np.nanmedian(before.ratio)
    same, tried = tighten(tight, network, "forward")  # never tighter: given up after the first regions
    assert same.ids == tight.ids and tried <= 64
    with pytest.MonkeyPatch.context() as patch:  # what is not proved is not taken
        patch.setattr(Checker, "verdict", lambda self, certificates, index, splits: "unknown")
        assert tighten(loose, network)[0].ids == loose.ids


def test_an_effort_that_is_none_is_refused(arm):
    policy, network = arm
    x = observations(100, 0)
    with pytest.raises(ConfigError, match=r"effort 'tight'"):
        grow(policy, network, x, policy.batch(x), TOLERANCE, effort="tight")
