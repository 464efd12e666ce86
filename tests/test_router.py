from __future__ import annotations

import gc
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from laws_ros.build.grow import answered, grow
from laws_ros.core import router
from laws_ros.core.certificate import FORMAL, KINDS, kind_code
from laws_ros.core.errors import ConfigError, ObservationError
from laws_ros.core.library import Library
from laws_ros.core.router import Tables
from laws_ros.runtime import routing
from laws_ros.runtime.cached_policy import CachedPolicy, check_tolerance
from laws_ros.runtime.experts import Experts, bound_call
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router
from laws_ros.runtime.sessions import session
from tests.support import random_mlp, save_mlp


def some(library: Library, which: np.ndarray) -> Library:
    """The library with only some of its regions."""
    return replace(library, certificates=library.certificates[which], visits=library.visits[which]).indexed(
        library.trie
    )


def queries(built, seed: int, count: int = 400) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, 3)) * [0.5, 0.3, 1.0]).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_hit_is_any_region_within_tolerance_and_nothing_else(built, seed) -> None:
    rng = np.random.default_rng(seed)
    tolerance = np.full(2, rng.uniform(0.02, 0.2))
    x = queries(built, seed, 100)
    found = Router(built.library, tolerance).many(x)
    c = built.library.certificates
    brute = np.stack([answered(c, np.full(len(x), k), x, tolerance, "none") for k in range(len(c))])
    # the reference sums in another order: only queries on the very edge of a region or the tolerance may differ
    assert (brute.any(axis=0) == (found >= 0)).mean() > 0.98
    hit = found >= 0
    assert brute[found[hit], np.flatnonzero(hit)].sum() >= 0.98 * hit.sum()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_adding_experts_never_lowers_coverage_and_order_does_not_matter(built, seed) -> None:
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(built.library))
    less, more = some(built.library, order[: len(order) // 2]), some(built.library, order)
    x = queries(built, seed)
    hit_less, hit_more = (Router(k, built.library.tolerance).many(x) for k in (less, more))
    assert (hit_more[hit_less >= 0] >= 0).all()
    whole = Router(built.library, built.library.tolerance).many(x)
    names = lambda library, found: [library.ids[k] if k >= 0 else None for k in found]  # noqa: E731
    assert names(more, hit_more) == names(built.library, whole)


def assorted(built, rng: np.random.Generator) -> Library:
    """The library with regions of every kind that an affine expert may have, some of them of no cost."""
    c = built.library.certificates
    kind = rng.choice([kind_code(k) for k in ("linear", "point", "lipschitz", "statistical")], len(c)).astype(np.uint8)
    mixed = replace(c, kind=kind, cost=rng.integers(0, 3, len(c)))
    return replace(built.library, certificates=mixed).indexed(built.library.trie)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_only_the_kinds_that_were_named_answer_and_more_kinds_answer_more(built, seed) -> None:
    rng = np.random.default_rng(seed)
    library, x = assorted(built, rng), queries(built, seed)
    hit = np.zeros(len(x), bool)
    for k in range(1, len(KINDS) + 1):
        found = Router(library, library.tolerance, KINDS[:k]).many(x)
        assert (found[hit] >= 0).all()  # adding a kind never takes an answer away
        hit = found >= 0
        assert {KINDS[code] for code in library.certificates.kind[found[hit]]} <= set(KINDS[:k])
    formal = Router(library, library.tolerance).many(x)
    np.testing.assert_array_equal(formal, Router(library, library.tolerance, FORMAL).many(x))
    without = some(library, np.flatnonzero(library.certificates.among(FORMAL)))
    assert ((Router(without, library.tolerance).many(x) >= 0) == (formal >= 0)).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_cheapest_that_may_answer_does_whatever_the_order_of_insertion(built, seed) -> None:
    rng = np.random.default_rng(seed)
    library, x = assorted(built, rng), queries(built, seed, 100)
    shuffled = some(library, rng.permutation(len(library)))
    one, two = (Router(k, library.tolerance, KINDS).many(x) for k in (library, shuffled))
    assert [library.ids[k] for k in one if k >= 0] == [shuffled.ids[k] for k in two if k >= 0]
    c = library.certificates
    for query, region in zip(x, one, strict=True):
        if region >= 0:
            able = answered(c, np.arange(len(c)), np.tile(query, (len(c), 1)), library.tolerance * (1 - 1e-9), "none")
            assert not len(c.cost[able]) or c.cost[region] <= c.cost[able].min()


def test_unknown_kinds_are_refused_with_the_nearest_names(built) -> None:
    for bad in ("statistic", "lineal", "formal"):
        with pytest.raises(ConfigError, match=rf"kinds: '{bad}'"):
            CachedPolicy(built.library, built.policy, kinds=[bad])
    with pytest.raises(ConfigError, match="did you mean statistical"):
        CachedPolicy(built.library, built.policy, kinds=["linear", "statistic"])
    assert CachedPolicy(built.library, built.policy, kinds=[]).kinds == FORMAL


def test_a_tolerance_can_change_between_two_steps(built) -> None:
    cached, x = CachedPolicy(built.library, built.policy), queries(built, 6)
    wide = [cached.lookup(row) is not None for row in x]
    cached.set_tolerance([0.01, 0.02])
    narrow = [cached.lookup(row) for row in x]
    other = CachedPolicy(built.library, built.policy, [0.01, 0.02])
    assert [a is not None for a in narrow] == [other.lookup(row) is not None for row in x]
    assert all((a.bound <= [0.01, 0.02]).all() for a in narrow if a is not None)
    with pytest.raises(ConfigError, match="tolerance"):
        cached.set_tolerance([-1.0])
    assert cached.tolerance.tolist() == [0.01, 0.02]
    cached.set_tolerance(built.library.tolerance)
    assert [cached.lookup(row) is not None for row in x] == wide and sum(wide) > sum(a is not None for a in narrow)


def test_a_larger_tolerance_answers_more(built) -> None:
    x = queries(built, 1)
    shares = [(Router(built.library, np.full(2, t)).many(x) >= 0).mean() for t in (0.0, 0.01, 0.03, 0.1, 0.3)]
    assert shares == sorted(shares) and shares[0] < shares[-1]


def test_compiled_and_plain_router_are_the_same_function(built) -> None:
    if routing._framed is None:
        pytest.skip("numba is not installed: there is only the plain router")
    compiled = Router(built.library, built.library.tolerance)
    for x in queries(built, 2, 200):
        region = compiled(x)
        bound = compiled.bound.copy()
        assert router.route(x, *compiled._arguments) == region
        if region >= 0:
            np.testing.assert_array_equal(compiled.bound, bound)


@pytest.mark.parametrize("decision", ["argmax", "argmin"])
def test_compiled_and_plain_router_decide_the_same_by_the_same_numbers(built, tmp_path, decision) -> None:
    if routing._framed is None:
        pytest.skip("numba is not installed: there is only the plain router")
    rng = np.random.default_rng(1)
    policy = Policy(save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 16, 4])), decision=decision)
    x = queries(built, 8, 600)
    grown = grow(policy, load_network(policy.path), x, policy.decide(policy.batch(x)), np.zeros(0), max_regions=100)
    compiled, hits = Router(grown.library, np.zeros(0)), 0
    for row in x[:200]:
        region = compiled(row)
        wins = compiled.wins.copy()
        assert router.route(row, *compiled._arguments) == region
        if region >= 0:
            hits += 1
            assert wins.tolist() == compiled.wins.tolist() and wins.argmax() == policy.decide(policy(row))[0]
    assert hits > 100


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import numpy as np
from laws_ros.runtime.cached_policy import CachedPolicy
cached = CachedPolicy.open(*sys.argv[1:3])
x = np.load(sys.argv[3])
answers = [cached.answer(row) for row in x]
assert cached.router.many(x).tolist() == [a.region for a in answers]
np.savez(sys.argv[4], region=[a.region for a in answers], action=[a.action for a in answers])
"""


def test_without_numba_the_answers_are_the_same(built, tmp_path) -> None:
    x = queries(built, 10, 100)
    built.library.save(tmp_path / "l.laws")
    np.save(tmp_path / "x.npy", x)
    files = [tmp_path / "l.laws", built.path, tmp_path / "x.npy", tmp_path / "found.npz"]
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA, *map(str, files)], check=True, timeout=120)
    found, cached = np.load(tmp_path / "found.npz"), CachedPolicy(built.library, built.policy)
    answers = [cached.answer(row) for row in x]
    assert found["region"].tolist() == [a.region for a in answers]
    np.testing.assert_array_equal(found["action"], [a.action for a in answers])


def test_many_observations_are_routed_as_one_by_one(built) -> None:
    one, x = Router(built.library, built.library.tolerance), queries(built, 9, 300)
    assert one.many(x).tolist() == [one(row) for row in x]
    assert one.many(x[:0]).tolist() == []
    for wrong in (x[:, :2], x[0], np.zeros((5, 4))):
        with pytest.raises(ValueError, match="observations of shape"):
            one.many(wrong)


def test_arrays_that_do_not_fit_together_are_refused(built) -> None:
    c = built.library.certificates
    for broken in (replace(c, center=c.center[:, :2]), replace(c, bound_offset=c.bound_offset[:-1])):
        with pytest.raises(ValueError, match=r"certificates\."):
            Tables.of(broken, built.library.trie)
    with pytest.raises(ValueError, match="the trie lists region"):
        Tables.of(c[:5], built.library.trie)


def test_a_fixed_library_is_a_mixture_of_experts(built) -> None:
    """Against the direct implementation, bit for bit: a gate of region tests, the products of all experts, a sum."""
    library, c = built.library, built.library.certificates
    count, rows, n = c.expert_weight.shape
    weight = np.concatenate([c.expert_weight, c.expert_bias[..., None]], axis=2)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["weight", "observation"], ["value"])],
        "mixture",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, [count, n + 1, 1])],
        [helper.make_tensor_value_info("value", TensorProto.FLOAT, [count, rows, 1])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    experts = session(model.SerializeToString(), "mixture")
    order = sorted(range(count), key=lambda k: (c.cost[k], library.ids[k]))

    def gate(x: np.ndarray) -> np.ndarray:
        for k in order:
            away = x.astype(float) - c.center[k]
            xi = np.array([sum((t * d for t, d in zip(row, away, strict=True)), 0.0) for row in c.transform[k]])
            box = n - c.round[k]
            if not (np.abs(xi[:box]) <= 1.0).all() or not sum((z * z for z in xi[box:]), 0.0) <= 1.0:
                continue
            terms = zip(c.bound_weight[k], c.bound_offset[k], strict=True)
            bound = [sum((w * z for w, z in zip(row, xi, strict=True)), offset) for row, offset in terms]
            if (np.array(bound) <= library.tolerance).all():
                return np.eye(1, count, k, dtype=np.float32)[0]
        return np.zeros(count, np.float32)

    cached, hits = CachedPolicy(library, built.policy), 0
    for x in queries(built, 7, 300):
        chosen = gate(x)
        everywhere = np.tile(np.append(x, np.float32(1.0))[None, :, None], (count, 1, 1))
        values = experts.run(None, {"observation": everywhere})[0][:, :, 0]
        direct = np.clip(chosen @ values, -1.0, 1.0) if chosen.any() else built.policy.decide(built.policy(x))
        answer = cached.answer(x)
        assert answer.region == (int(chosen.argmax()) if chosen.any() else -1)
        np.testing.assert_array_equal(answer.action, direct)
        hits += chosen.any()
    assert hits > 100


def test_answers_keep_their_bound_and_limits(built) -> None:
    cached = CachedPolicy(built.library, built.policy)
    hits = 0
    for x in queries(built, 3, 1000):
        answer = cached.answer(x)
        want = np.clip(built.policy(x), -1, 1)
        assert (np.abs(answer.action) <= 1).all()
        assert (np.abs(answer.action.astype(float) - want) <= answer.bound).all()
        assert (answer.bound <= cached.tolerance).all()
        hits += answer.region >= 0
    assert hits > 500
    for bad in ([np.nan, 0, 0], [np.inf, 0, 0], [1e30, 0, 0]):
        assert cached.lookup(np.array(bad, np.float32)) is None


def test_answers_leave_nothing_behind(built) -> None:
    cached, x = CachedPolicy(built.library, built.policy), queries(built, 11, 500)
    x = x[cached.router.many(x) >= 0]

    def blocks() -> int:
        for _ in range(10_000 // len(x)):
            for row in x:
                cached.lookup(row)
        gc.collect()
        return sys.getallocatedblocks()

    blocks()
    before = blocks()
    assert blocks() - before < 200  # of the interpreter's memory, after ten thousand hits


def test_no_step_opens_a_session_or_a_file(built, monkeypatch) -> None:
    cached, x = CachedPolicy(built.library, built.policy), queries(built, 13, 300)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("in a control step")

    monkeypatch.setattr(ort, "InferenceSession", refused)
    monkeypatch.setattr("builtins.open", refused)
    monkeypatch.setattr("os.open", refused)
    assert {cached.answer(row).region >= 0 for row in x} == {True, False}


def test_a_hit_is_the_experts_answer_by_whatever_call_it_is_run(built) -> None:
    cached, x = CachedPolicy(built.library, built.policy), queries(built, 12, 200)
    alone = Experts(built.library.certificates, built.policy)  # with buffers of its own
    hits = 0
    for row, region in zip(x, cached.router.many(x), strict=True):
        cached._experts(0, x[0])  # leaves another expert and another observation in the buffers
        answer = cached.lookup(row)
        assert (answer is not None) == (region >= 0)
        if answer is not None:
            hits += 1
            np.testing.assert_array_equal(answer.action, np.clip(alone(region, row), -1, 1))
    assert hits > 50

    model = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        "negative",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])],
    )
    made = helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)])
    made.ir_version = 8
    run = session(made.SerializeToString(), "negative")
    source, target, binding = np.array([1, 2, 3], np.float32), np.zeros(3, np.float32), run.io_binding()
    binding.bind_input("x", "cpu", 0, np.float32, (3,), source.ctypes.data)
    binding.bind_output("y", "cpu", 0, np.float32, (3,), target.ctypes.data)
    public = SimpleNamespace(run_with_iobinding=run.run_with_iobinding)  # a release without the inner object
    for call in (bound_call(run, binding), bound_call(public, binding)):
        target[:] = 0
        call()
        np.testing.assert_array_equal(target, -source)


def test_an_empty_library_leaves_everything_to_the_policy(built) -> None:
    cached = CachedPolicy(some(built.library, np.zeros(0, np.intp)), built.policy)
    x = queries(built, 4, 1)[0]
    answer = cached.answer(x)
    assert answer.region == -1 and (answer.bound == 0).all()
    np.testing.assert_array_equal(answer.action, np.clip(built.policy(x), -1, 1))


@pytest.mark.parametrize("value", [[0.1, 0.1, 0.1], [-0.1], [float("nan")], [float("inf"), 0.1], []])
def test_tolerances_that_mean_nothing_are_refused(built, value) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        check_tolerance(value, built.policy)


def test_zero_tolerance_is_allowed_and_answers_nothing_inexact(built) -> None:
    assert CachedPolicy(built.library, built.policy, [0.0]).lookup(queries(built, 5, 1)[0]) is None


def test_a_policy_that_answers_nan_gives_no_action(built, tmp_path) -> None:
    layers = [(np.full((2, 3), 3e38), np.zeros(2)), (np.array([[1.0, -1.0]]), np.zeros(1))]
    policy = Policy(save_mlp(tmp_path / "p.onnx", layers))
    empty = some(built.library, np.zeros(0, np.intp))
    library = replace(empty, policy_sha256=policy.sha256, card=policy.card, tolerance=np.zeros(1))
    with pytest.raises(ObservationError, match="not finite"):
        CachedPolicy(library, policy).answer(np.ones(3, np.float32))
