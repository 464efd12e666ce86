"""Learning from misses: from nothing to nearly what an offline build covers, within a budget, following the traffic."""

from __future__ import annotations

import os
from itertools import pairwise

import numpy as np
import pytest

from laws_ros.build import learn
from laws_ros.build.grow import grow
from laws_ros.build.learn import Learner
from laws_ros.core import sealed
from laws_ros.core.checker import Checker
from laws_ros.core.library import Library
from laws_ros.runtime.history import History
from laws_ros.runtime.routing import Router
from tests.support import break_certificates


@pytest.fixture
def history(built, tmp_path):
    with History(tmp_path / "h.db", built.policy.sha256, built.policy.card, built.library.tolerance) as opened:
        yield opened


def feed(history: History, built, x: np.ndarray) -> None:
    history.add_misses(x, built.policy.batch(x))


def share(library, x: np.ndarray) -> float:
    return float((Router(library, library.tolerance).many(x) >= 0).mean())


def test_from_an_empty_library_the_learner_alone_nears_the_offline_build(built, history) -> None:
    held_out = (np.random.default_rng(5).normal(size=(2000, 3)) * [0.5, 0.3, 1.0]).astype(np.float32)
    learner = Learner(history, built.policy, built.network)
    assert len(learner.library) == 0
    rates, news = [], []
    for part in np.array_split(built.observations, 4):
        feed(history, built, part)
        lesson = learner.learn()
        assert lesson.misses == len(part)
        assert lesson.library is not None
        rates.append(share(lesson.library, held_out))
        news.append(lesson.news)
    assert rates == sorted(rates)  # adding experts never takes an answer away
    assert rates[-1] > 0.8 * share(built.library, held_out)
    assert news[-1] < 0.5 * news[0]
    library = learner.library
    rng = np.random.default_rng(0)
    tried, broken = break_certificates(built.policy, built.network, library.certificates, rng)
    assert tried > 5000 and broken == 0
    checker = Checker(built.network)
    assert all(checker.verdict(library.certificates, k) == "holds" for k in range(0, len(library), 7))


def test_what_the_library_already_answers_teaches_nothing(built, history) -> None:
    learner = Learner(history, built.policy, built.network)
    feed(history, built, built.observations[:1000])
    first = learner.learn()
    answered = Router(first.library, first.library.tolerance).many(built.observations[:1000]) >= 0
    feed(history, built, built.observations[:1000][answered])
    second = Learner(history, built.policy, built.network).learn()
    assert (second.library, second.news, second.added) == (None, 0, 0)
    assert learner.learn().misses == 0  # and they are not kept


def test_lessons_over_everything_come_when_there_are_half_as_many_more_misses(built, history, monkeypatch) -> None:
    lessons: list[np.ndarray] = []

    def recorded(policy, network, x, *rest, **named):
        lessons.append(x)
        return grow(policy, network, x, *rest, **named)

    monkeypatch.setattr(learn, "grow", recorded)
    learner = Learner(history, built.policy, built.network, most_certificates=60)
    seen, whole = np.zeros((0, 3), np.float32), []
    for part in np.array_split(built.observations[:1000], 10):
        seen = np.concatenate([seen, part[Router(learner.library, history.tolerance).many(part) < 0]])
        feed(history, built, part)
        learner.learn()
        if len(lessons[-1]) == len(seen):
            np.testing.assert_array_equal(lessons[-1], seen)  # every miss so far, answered by now or not
            whole.append(len(seen))
    assert 2 <= len(whole) < len(lessons)
    assert all(later >= 1.5 * earlier for earlier, later in pairwise(whole))  # so all of them are three builds' work
    assert sum(whole) <= 3 * len(seen)


def test_a_crash_before_the_misses_are_forgotten_only_repeats_work(built, history, monkeypatch) -> None:
    feed(history, built, built.observations[:500])
    learner = Learner(history, built.policy, built.network)

    class Killed(BaseException):
        pass

    def killed(self, last):
        raise Killed

    monkeypatch.setattr(History, "forget_misses", killed)
    with pytest.raises(Killed):
        learner.learn()
    monkeypatch.undo()
    stored = len(history.experts()[0])
    assert stored > 0
    again = Learner(history, built.policy, built.network).learn()
    assert again.misses == 500
    assert again.added <= stored  # most of them are answered by now


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that can be sealed on this system")
def test_a_published_library_lies_in_the_memory_of_everyone_who_opens_it(built, history, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sealed, "LEAST", 0)
    monkeypatch.setattr(sealed, "LINKS", tmp_path)
    history.add(built.library.certificates[:50])
    learner = Learner(history, built.policy, built.network)
    before = learner.library
    published = learner.publish(tmp_path / "x.laws")
    assert learner.library is published and published.digest == before.digest and published.ids == before.ids
    opened = Library.load(tmp_path / "x.laws")
    assert len({link.stat().st_ino for link in (tmp_path / f"laws-{os.geteuid()}").iterdir()}) == 1
    assert opened.digest == published.digest
    feed(history, built, built.observations[:500])
    assert learner.learn().added > 0 and len(learner.library) > len(published) == 50


def test_experts_whose_traffic_stops_make_room(built, history) -> None:
    half = built.observations[:, 0] < 0
    old, new = built.observations[half][:800], built.observations[~half][:800]
    learner = Learner(history, built.policy, built.network)
    feed(history, built, old)
    experts = learner.learn(now=0.0).added
    learner.most_experts = experts // 2
    later = 20 * history.half_life_s
    feed(history, built, new)
    lesson = learner.learn(now=later)
    assert lesson.retired == experts + lesson.added - experts // 2 > 0
    assert len(lesson.library) == experts // 2
    assert share(lesson.library, new) > 0.5 > share(lesson.library, old)


def test_budgets_hold(built, history) -> None:
    learner = Learner(history, built.policy, built.network, most_experts=10, most_certificates=300)
    feed(history, built, built.observations)
    lesson = learner.learn()
    assert len(lesson.library) == 10 == lesson.added - lesson.retired
    best = lesson.library
    learner.most_experts = 5
    assert learner.learn().retired == 5
    # those that answered most stay
    assert sorted(learner.library.visits) == sorted(best.visits)[5:]
