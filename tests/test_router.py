from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.build.grow import answered
from laws_ros.core import router
from laws_ros.core.certificate import FORMAL, KINDS, kind_code
from laws_ros.core.errors import ConfigError, ObservationError
from laws_ros.core.library import Library
from laws_ros.runtime import routing
from laws_ros.runtime.cached_policy import CachedPolicy, check_tolerance
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router
from tests.support import save_mlp


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
    if routing._route is router.route:
        pytest.skip("numba is not installed: there is only the plain router")
    compiled = Router(built.library, built.library.tolerance)
    for x in queries(built, 2, 200):
        region = compiled(x)
        bound = compiled.bound.copy()
        assert router.route(x, *compiled._arguments) == region
        if region >= 0:
            np.testing.assert_array_equal(compiled.bound, bound)


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
