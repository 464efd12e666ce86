"""Eviction: the budget holds, what stays is worth most, and nothing is ever lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.build import learn
from laws_ros.build.learn import EVICTED, Learner
from laws_ros.core.record import pack
from laws_ros.core.retention import expected_savings, retained, sizes
from laws_ros.core.trie import Trie
from laws_ros.runtime.history import History
from laws_ros.runtime.routing import Router

EXPERTS = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), max_size=9)


@settings(max_examples=200, deadline=None)
@given(experts=EXPERTS, most=st.none() | st.integers(0, 9), most_bytes=st.none() | st.integers(0, 200))
def test_a_budget_is_never_exceeded_and_what_stays_is_worth_nearly_the_most_that_fits(experts, most, most_bytes):
    savings, size = np.array([e[0] for e in experts]), np.array([e[1] for e in experts], int)
    kept = retained(savings, size, most, most_bytes)
    assert most is None or kept.sum() <= most
    assert most_bytes is None or size[kept].sum() <= most_bytes
    every = range(len(experts))
    best = max(
        sum(savings[list(k)])
        for k in chain.from_iterable(combinations(every, r) for r in range(len(experts) + 1))
        if (most is None or len(k) <= most) and (most_bytes is None or sum(size[list(k)]) <= most_bytes)
    )
    got = savings[kept].sum()
    if most_bytes is None:
        assert got == pytest.approx(best)
    elif most is None:
        assert got >= best - savings.max(initial=0.0) - 1e-9


@settings(max_examples=100, deadline=None)
@given(answers=st.lists(st.floats(0, 1e6), min_size=1, max_size=30), data=st.data())
def test_probabilities_are_a_distribution_and_more_answers_save_more(answers, data):
    answers = np.array(answers)
    cost = np.zeros(len(answers), int)
    savings = expected_savings(answers, cost, 1.0)
    assert (savings > 0).all() and savings.sum() < 1.0  # none of them answering has a probability, too
    k = data.draw(st.integers(0, len(answers) - 1))
    more = answers.copy()
    more[k] += 1.0
    assert expected_savings(more, cost, 1.0)[k] >= savings[k]
    dear = cost.copy()
    dear[k] = 2
    assert expected_savings(answers, dear, 1.0)[k] == 0.0  # an expert that costs more than the policy saves nothing


def test_sizes_are_what_experts_take_in_a_snapshot_and_in_onnx_runtime(built, tmp_path):
    library = built.library
    less = replace(library, certificates=library.certificates[:10], visits=library.visits[:10])
    (library.indexed(Trie.root())).save(tmp_path / "more.laws")
    (less.indexed(Trie.root())).save(tmp_path / "less.laws")
    size, rows, n = sizes(library.certificates), *library.certificates.expert_weight.shape[1:]
    listed = 4 + 8 + 16  # in the trie's only leaf, its visits, and where its (empty) ragged rows begin
    in_snapshot = size[10:] - 4 * rows * (n + 1) + listed
    files = [(tmp_path / name).stat().st_size for name in ("more.laws", "less.laws")]
    assert abs(files[0] - files[1] - in_snapshot.sum()) < 64 * 20 + 200  # arrays and the header are padded
    assert len(sizes(library.certificates[:0])) == 0


@pytest.fixture
def history(built, tmp_path):
    with History(tmp_path / "h.db", built.policy.sha256, built.policy.card, built.library.tolerance) as opened:
        yield opened


def test_evicted_experts_stay_in_the_history_and_come_back_by_one_call_or_with_their_traffic(
    built, history, monkeypatch
):
    half = built.observations[:, 0] < 0
    old, new = built.observations[half][:600], built.observations[~half][:600]
    learner = Learner(history, built.policy, built.network)
    history.add_misses(old, built.policy.batch(old))
    learner.learn(now=0.0)
    ids, certificates = history.experts()
    records = {name: pack(certificates, k) for k, name in enumerate(ids)}
    answered = old[Router(learner.library, history.tolerance).many(old) >= 0]

    learner.most_bytes = int(sizes(certificates).sum())
    history.add_misses(new, built.policy.batch(new))
    lesson = learner.learn(now=30 * history.half_life_s)
    assert lesson.added > 0 < lesson.retired
    assert sizes(lesson.library.certificates).sum() <= learner.most_bytes
    gone = {name for name, reason in history.retired().items() if reason == EVICTED}
    assert gone & set(ids) and not gone & set(history.experts()[0])
    found, back = history.experts(retired=EVICTED)
    assert set(found) == gone
    assert all(pack(back, k) == records[name] for k, name in enumerate(found) if name in records)

    # Their traffic comes back, and so do they, with nothing certified anew, for all that they answered then.
    monkeypatch.setattr(learn, "grow", lambda *_, **__: pytest.fail("certified again"))
    missed = answered[Router(learner.library, history.tolerance).many(answered) < 0]
    assert len(missed)
    learner.most_bytes = None
    history.add_misses(missed, built.policy.batch(missed))
    lesson = learner.learn(now=31 * history.half_life_s)
    assert lesson.restored > 0 and lesson.added == 0
    assert (Router(lesson.library, history.tolerance).many(missed) >= 0).all()

    left = sorted(name for name, reason in history.retired().items() if reason == EVICTED)
    history.restore(left, "by hand")
    assert set(history.experts()[0]) >= set(ids) | gone and not history.retired()


def test_what_a_human_retired_does_not_come_back_with_its_traffic(built, history):
    x = built.observations[:300]
    learner = Learner(history, built.policy, built.network)
    history.add_misses(x, built.policy.batch(x))
    learner.learn()
    ids = history.experts()[0]
    history.retire(ids, "a human took over")
    again = Learner(history, built.policy, built.network)
    history.add_misses(x, built.policy.batch(x))
    lesson = again.learn()
    assert lesson.restored == 0 and set(history.retired()) == set(ids)
