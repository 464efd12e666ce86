"""The fleet: what is exchanged, that it is proved again, and that merging is a set's union."""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import tuf.api._payload
import tuf.ngclient._internal.trusted_metadata_set
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.build.learn import Learner
from laws_ros.cli import main
from laws_ros.core import durable
from laws_ros.core.certificate import KINDS, Ragged
from laws_ros.core.collapse import collapse
from laws_ros.core.errors import FleetError, LawsError, RefusedError
from laws_ros.core.library import Library
from laws_ros.core.point import certify_points
from laws_ros.core.record import pack
from laws_ros.fleet import items as exchange
from laws_ros.fleet import robot as robots
from laws_ros.fleet import trust
from laws_ros.fleet.desk import Desk
from laws_ros.fleet.items import Chunk, Identity, Items, chunks, decode, encode, tombstone
from laws_ros.fleet.place import PREVIOUS
from laws_ros.fleet.prove import Prover
from laws_ros.fleet.robot import Robot
from laws_ros.runtime import takeovers
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.history import History
from laws_ros.runtime.quarantine import Quarantine
from laws_ros.runtime.routing import Router
from laws_ros.runtime.takeovers import Correction, Log
from tests.conftest import Built
from tests.fleet_support import TOLERANCE, ids, joined, learnt, new_desk, proved


@pytest.fixture(scope="session", name="built")
def only_proved(built: Built) -> Built:
    return proved(built)


@pytest.fixture
def desk(built, tmp_path) -> Desk:
    return new_desk(built, tmp_path)


# -- a set -------------------------------------------------------------------------------------------------------------


def some_items(built, experts: list[int], events: list[tuple[int, int]]) -> Items:
    """Experts by number; tombstones of experts or, if there are any before, of tombstones."""
    c, names = built.library.certificates, built.library.ids
    found = Items({names[k]: pack(c, k) for k in experts})
    stones: list[str] = []
    for which, target in events:
        of = stones[target % len(stones)] if which % 2 and stones else names[target % 5]
        stone = tombstone(of, f"reason {which}", "r1")
        stones += stone.tombstones
        found |= stone
    return found


sets = st.tuples(
    st.lists(st.integers(0, 7), max_size=4), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=5)
)


@settings(max_examples=60, deadline=None)
@given(a=sets, b=sets, c=sets)
def test_merging_is_the_union_of_sets(built, a, b, c) -> None:
    x, y, z = (some_items(built, *parts) for parts in (a, b, c))
    assert x | y == y | x and (x | y) | z == x | (y | z) and x | x == x and (x | Items()) == x
    assert ((x | y) - x) | x == x | y
    merged = x | y | z
    assert (z | y | x).out() == merged.out()
    # one more item may only change what it names
    assert set(merged.out()) <= {json.loads(stone)["of"] for stone in merged.tombstones.values()}


def test_a_tombstone_of_a_tombstone_gives_back() -> None:
    found = first = tombstone("0123456789abcdef", "bad", "r1")
    assert found.out() == {"0123456789abcdef": "bad"}
    lift = tombstone(next(iter(first.tombstones)), "was fine", "desk")
    assert (first | lift).out() == {next(iter(first.tombstones)): "was fine"}
    again = tombstone(next(iter(lift.tombstones)), "was not", "desk")
    assert "0123456789abcdef" in (again | first | lift).out()


@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_any_order_and_any_repetition_leave_robots_alike(built, tmp_path_factory, data) -> None:
    names, c = built.library.ids, built.library.certificates
    stone = tombstone(names[1], "bad", "desk")
    lift = tombstone(next(iter(tombstone(names[2], "bad", "desk").tombstones)), "was fine", "desk")
    parts = [Items({names[k]: pack(c, k)}) for k in range(4)]
    parts += [stone, tombstone(names[2], "bad", "desk"), lift]
    served = []
    for order in (range(len(parts)), data.draw(st.permutations([*range(len(parts)), *range(3)]))):
        folder = tmp_path_factory.mktemp("order")
        (folder / "fleet").mkdir()
        place = robots.Place(folder, built.path, "r1")
        place.history(np.array(TOLERANCE)).close()
        for k in order:
            place.merge(parts[k], "test")
        place.switch()
        served.append((set(Library.load(folder / "library.laws").ids), place.tombstones()))
    assert served[0] == served[1] and served[0][0] == {names[0], names[2], names[3]}


# -- bytes -------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(which=st.lists(st.integers(0, 30), max_size=6, unique=True), count=st.integers(0, 9), seed=st.integers(0, 99))
def test_chunks_come_back_as_they_were(built, which, count, seed) -> None:
    identity = Identity(built.policy.sha256, built.policy.card)
    items = some_items(built, which, [(0, 1), (1, 0)])
    misses = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    data = encode(identity, Chunk(items, misses))
    found = decode(data, identity, "here")
    assert found.items == items and (found.misses == misses).all()
    assert encode(identity, Chunk(items, misses)) == data


def test_collapsed_experts_travel_as_states(built) -> None:
    identity = Identity(built.policy.sha256, built.policy.card)
    c = collapse(built.network, built.library.certificates[:3].regions, "exact", np.array(TOLERANCE))
    records = {identity.name(pack(c, k)): pack(c, k) for k in range(3)}
    data = encode(identity, Chunk(Items(records), np.zeros((0, 3), np.float32)))
    assert decode(data, identity, "here").items.experts == records


def test_what_is_too_large_is_split(built, monkeypatch) -> None:
    identity = Identity(built.policy.sha256, built.policy.card)
    items = some_items(built, list(range(20)), [(0, 1), (0, 2)])
    misses = np.zeros((50, 3), np.float32)
    monkeypatch.setattr(exchange, "MOST_RAW", 1200)
    parts = [decode(data, identity, "here") for data in chunks(identity, items, misses)]
    assert len(parts) > 5 and sum(len(part.misses) for part in parts) == 50
    merged = Items()
    for part in parts:
        merged |= part.items
    assert merged == items
    monkeypatch.setattr(exchange, "MOST_RAW", 20)
    with pytest.raises(FleetError, match="over the limit"):
        list(chunks(identity, items))


def test_chunks_that_are_not_ours_are_refused(built, monkeypatch) -> None:
    identity = Identity(built.policy.sha256, built.policy.card)
    data = encode(identity, Chunk(some_items(built, [1, 2], [(0, 1)]), np.zeros((2, 3), np.float32)))
    with pytest.raises(FleetError, match="another policy, card or precision"):
        decode(data, Identity("0" * 64, built.policy.card), "here")
    with pytest.raises(FleetError, match="format 9"):
        decode(data[:7] + b"\x09" + data[8:], identity, "here")
    with pytest.raises(FleetError, match="no chunk"):
        decode(b"PK" + data, identity, "here")
    with pytest.raises(FleetError, match="at most"):
        decode(data + bytes(exchange.MOST_CHUNK), identity, "here")
    monkeypatch.setattr(exchange, "MOST_RAW", 100)
    with pytest.raises(FleetError, match="claims"):
        decode(data, identity, "here")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_bytes_make_decoding_fail_otherwise(built, data) -> None:
    """Whatever comes, it is a chunk or refused in one line: nothing else is raised, and nothing grows without bound."""
    identity = Identity(built.policy.sha256, built.policy.card)
    whole = bytearray(encode(identity, Chunk(some_items(built, [1], [(0, 1)]), np.ones((1, 3), np.float32))))
    raw = bytearray(exchange.lzma.decompress(bytes(whole[44:]), exchange.lzma.FORMAT_RAW, filters=exchange._FILTERS))
    target = data.draw(st.sampled_from([whole, raw]))
    for _ in range(data.draw(st.integers(1, 4))):
        target[data.draw(st.integers(0, len(target) - 1))] = data.draw(st.integers(0, 255))
    if target is raw:
        raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
        packed = exchange.lzma.compress(bytes(raw), exchange.lzma.FORMAT_RAW, filters=exchange._FILTERS)
        whole = bytearray(exchange._HEAD.pack(b"LAWSCHK", 1, identity.digest, len(raw)) + packed)
    with contextlib.suppress(FleetError):
        found = decode(bytes(whole), identity, "here")
        assert all(identity.name(record) == name for name, record in found.items.experts.items())


# -- proof on arrival --------------------------------------------------------------------------------------------------


def test_what_is_true_is_proved_and_what_is_not_is_refused(built) -> None:
    prover = Prover(built.policy)
    c = built.library.certificates[:2]
    assert prover.refusal(c, 0) is None
    points = certify_points(built.network, built.observations[:1], built.policy.batch(built.observations[:1]))
    assert prover.refusal(points, 0) is None
    exact = collapse(built.network, c.regions, "exact", np.array(TOLERANCE))
    assert prover.refusal(exact, 0) is None

    def refused(**changes) -> str:
        return prover.refusal(replace(c, **changes), 0) or ""

    assert "not proved" in refused(bound_offset=0.5 * c.bound_offset)
    assert "not proved" in refused(expert_bias=c.expert_bias + np.float32(0.3))
    assert "not proved" in refused(center=c.center + 0.5)
    assert "not proved" in refused(transform=0.5 * c.transform)
    assert "not proved" in refused(transform=0.0 * c.transform)
    assert "not proved" in refused(bound_offset=np.full_like(c.bound_offset, np.nan))
    assert "not proved" in refused(expert_weight=np.full_like(c.expert_weight, np.nan))
    assert "multiplications" in refused(cost=c.cost - 1)
    assert "ball" in refused(round=np.full(2, 9, np.int32))
    assert "nothing in it can be proved" in refused(kind=np.full(2, KINDS.index("statistical"), np.uint8))
    assert refused(kind=np.full(2, KINDS.index("exact"), np.uint8))
    nothing = np.zeros(4, np.float32)  # cut to [0, 0], every expert is the policy
    lies = replace(c, floats=Ragged.of([nothing] * 2, np.float32), bound_offset=np.full_like(c.bound_offset, 1e-6))
    assert "other limits" in (prover.refusal(lies, 0) or "")
    assert "network" in refused(octets=Ragged.of([np.ones(3, np.uint8)] * 2, np.uint8))
    code = exact.octets.row(0).copy()
    code[np.flatnonzero(code < 2)[0]] ^= 1  # the other piece
    lies = replace(exact, octets=Ragged.of([code, exact.octets.row(1)], np.uint8))
    assert prover.refusal(lies, 0)
    assert prover.refusal(replace(exact, bound_offset=0.1 * exact.bound_offset), 0)


# -- robots and desk ---------------------------------------------------------------------------------------------------


def test_what_one_robot_learns_all_have(built, desk) -> None:
    a, b = joined(desk, "a"), joined(desk, "b")
    mine = learnt(a, built.library.certificates[:6])
    with a.place.history() as history:
        history.add_misses(built.observations[:20], built.policy.batch(built.observations[:20]))
    assert a.push()["sent"] == 2
    found = desk.collect()
    assert found["a"].accepted == 6 and not found["a"].refused and desk.collect() == {}
    with desk.place.history() as history:
        assert (history.misses()[0] == built.observations[:20]).all()
    assert desk.publish()["experts"] == 6
    got = b.pull()
    assert got.merged.accepted == 6 and got.switched and ids(b) == set(mine)
    # it serves them
    cached = CachedPolicy.open(b.folder / "library.laws", built.path)
    x = built.observations[:300]
    assert sum(cached.lookup(row) is not None for row in x) > 0
    # again: nothing new, nothing proved or sent twice
    again = b.pull()
    assert again.merged.accepted == 0 and not again.switched
    assert desk.publish()["experts"] == 0
    a.pull()
    a.push()
    assert a.push() == {"sent": 0, "bytes": 0, "waiting": 0, "dropped": {"misses": 0, "experts": 0}}
    assert not list((desk.folder.parent / "store" / "uploads" / "a").glob("[0-9a-f]*"))
    with b.place.history() as history:
        assert {source for _, source, _ in history.news().experts} == {"fleet"}
    assert b.push()["sent"] == 0  # what came from the fleet is not told again


def test_a_learner_beside_it_goes_on(built, desk) -> None:
    robot = joined(desk, "a")
    desk.add(replace(built.library, certificates=built.library.certificates[:5], visits=built.library.visits[:5]))
    desk.publish()
    with History(robot.folder / "history.db", built.policy.sha256, built.policy.card, TOLERANCE) as history:
        learner = Learner(history, built.policy, built.network)
        history.add_misses(built.observations[:500], built.policy.batch(built.observations[:500]))
        assert robot.pull().merged.accepted == 5
        learner.learn()
        assert set(built.library.ids[:5]) < set(learner.library.ids)
    assert robot.push()["sent"] == 1
    assert desk.collect()["a"].accepted == len(learner.library) - 5


def test_the_desk_learns_from_what_robots_missed(built, desk, capsys) -> None:
    robot = joined(desk, "a")
    robot.pull()
    with robot.place.history() as history:
        history.add_misses(built.observations[:300], built.policy.batch(built.observations[:300]))
    robot.push()
    assert main(["fleet", "publish", str(desk.folder), "--learn", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["learnt"] == told["experts"] > 5
    found = robot.pull().merged
    assert found.accepted + len(found.refused) == told["experts"] and found.accepted > 5


def test_a_desk_remembers_its_lessons(built, desk, monkeypatch) -> None:
    """Each publication is a process of its own, and learns what a single one would that went on all the time."""
    made = partial(Learner, policy=built.policy, network=built.network, most_certificates=300)
    x, known = built.observations[:900], []
    for memory in (None, desk.folder / "fleet" / "lessons.npz"):
        with History(
            desk.folder / f"{memory is None}.db", built.policy.sha256, built.policy.card, TOLERANCE
        ) as history:
            learner = made(history)
            for part in np.array_split(x, 3):
                if memory is not None:
                    learner = made(history, memory=memory)
                history.add_misses(part, built.policy.batch(part))
                learner.learn()
            known.append(history.known())
    assert known[0] == known[1] and len(known[0]) > 10
    whole = memory.read_bytes()
    with desk.place.history() as history:
        assert len(made(history, memory=memory)._seen) > len(made(history)._seen) == 0
        for damaged in (b"", whole[:-50], whole.replace(built.policy.sha256[:9].encode("utf-32-le"), bytes(36))):
            memory.write_bytes(damaged)
            learner, said = made(history, memory=memory), []
            assert len(learner._seen) == 0
            learner.learn(progress=said.append)
            assert any("lessons begin anew" in line and "\n" not in line for line in said)


def test_robots_that_missed_many_publications_catch_up(built, desk, monkeypatch) -> None:
    monkeypatch.setattr("laws_ros.fleet.desk.MOST_DELTAS", 4)
    a, b, c = joined(desk, "a"), joined(desk, "b"), joined(desk, "c")
    part = built.library.certificates
    for k in range(7):
        with desk.place.history() as history:
            history.add(part[k : k + 1], "test")
        desk.publish()
        a.pull()  # always
        if k == 1:
            b.pull()  # until the second, and then the last
    assert b.pull().merged.accepted == 5 and c.pull().merged.accepted == 7
    assert ids(a) == ids(b) == ids(c) == set(built.library.ids[:7])


def test_statistical_certificates_stay_where_they_were_measured(built, desk) -> None:
    robot = joined(desk, "a")
    part = built.library.certificates[:3]
    learnt(robot, replace(part, kind=np.array([0, KINDS.index("statistical"), 0], np.uint8)))
    assert robot.push()["sent"] == 1
    assert desk.collect()["a"].accepted == 2


def test_foreign_nonsense_harms_nobody_else(built, desk) -> None:
    a, b = joined(desk, "a"), joined(desk, "b")
    good = built.library.certificates[:2]
    learnt(a, replace(good, bound_offset=0.2 * good.bound_offset))
    learnt(b, good)
    a.push(), b.push()
    found = desk.collect()
    assert found["a"].accepted == 0 and len(found["a"].refused) == 2 and found["b"].accepted == 2
    # logged once, however often it comes
    a.gather()
    state = json.loads((a.fleet / "push.json").read_text())
    (a.fleet / "push.json").write_text(json.dumps({**state, "row": 0, "waiting": [], "listed": []}))
    a.push()
    desk.collect()
    assert [row["from"] for row in desk.place.refused()] == ["a", "a"] and desk.status()["refused"] == 2


def take_over(robot: Robot, built, x: np.ndarray, library: Library) -> str:
    """An operator corrects robot at observations [N, n]."""
    log = Log(robot.folder, f"/{robot.name}", built.policy.card, built.policy.sha256)
    quarantine = Quarantine(3, library=library)
    steps = [Correction(k * 10**9, row, [0.5, 0.5], [0.4, 0.4], quarantine.correct(row)) for k, row in enumerate(x)]
    log.add(steps, library)
    log.end(built.policy.batch(x))
    return f"{robot.name}.{log.id}"


def test_a_correction_of_one_robot_holds_on_all(built, desk) -> None:
    a, b = joined(desk, "a"), joined(desk, "b")
    hit = built.observations[Router(built.library, built.library.tolerance).many(built.observations.astype(float)) >= 0]
    name = take_over(a, built, hit[:3], built.library)
    a.push()
    assert desk.collect()["a"].takeovers == 1
    desk.publish()
    assert b.pull().merged.takeovers == 1

    def held(robot: Robot) -> np.ndarray:
        found = takeovers.read(robot.folder, built.policy.card)
        return takeovers.quarantine_of(found, 3, built.library).many(hit[:3])

    assert held(a).all() and held(b).all()
    # released where it happened, it is released everywhere
    takeovers.release(a.folder, name.partition(".")[2], "the operator slipped")
    a.push()
    desk.collect(), desk.publish(), b.pull()
    assert not held(b).any() and "the operator slipped" in takeovers.read(b.folder)[0].released
    # and the desk may put it in force again
    stone = next(iter(a.place.tombstones().tombstones))
    desk.withdraw(stone, "it did not")
    desk.publish(), a.pull(), b.pull()
    assert held(a).all() and held(b).all()


def test_a_robot_speaks_for_itself_only(built, desk) -> None:
    a, b = joined(desk, "a"), joined(desk, "b")
    hit = built.observations[:3]
    name = take_over(a, built, hit, built.library)
    a.push(), desk.collect(), desk.publish(), b.pull()
    for stone in (tombstone(name, "by another robot", "b"), tombstone(name, "in another's name", "a")):
        b.place.withdraw(stone)
    log = b.place.events().takeovers[name].replace(name.encode(), name.replace("a.", "c.").encode())
    forged = Items(takeovers={name.replace("a.", "c."): log})
    state = b.gather()
    b._keep(state, "corrections", chunks(b.place.identity, forged))
    b._save("push.json", state)
    b.push()
    found = desk.collect()["b"]
    assert found.takeovers == found.tombstones == 0 and len(found.refused) == 2
    assert set(found.refused.values()) == {"it speaks for another robot"}


def test_a_takeover_that_would_stop_a_controller_is_refused(built, desk) -> None:
    a, b = joined(desk, "a"), joined(desk, "b", enrol=False)
    name = take_over(a, built, built.observations[:2], built.library)
    good = json.loads(a.place.events().takeovers[name])
    b.place.history(np.array(TOLERANCE)).close()

    def merged(rows) -> dict[str, str]:
        return b.place.merge(Items(takeovers={name: json.dumps(rows).encode()}), "test").refused

    for rows in (
        [{**good[0], "card": "0" * 16}, *good[1:]],
        [{**good[0], "takeover": "../../evil"}, *good[1:]],
        [good[0], {**good[1], "x": [0.0, float("nan"), 0.0]}],
        [good[0], {**good[1], "x": [0.0]}],
        [good[0], {**good[1], "operator": "none"}],
        [good[0], {**good[1], "regions": {"r": "AAAA"}}],
        [good[0], {**good[1], "regions": {"r": base64.b64encode(np.full(13, 4.0).tobytes()).decode()}}],
        [good[0], {**good[1], "regions": {"r": base64.b64encode(np.full(13, np.nan).tobytes()).decode()}}],
        [good[0], {**good[1], "regions": None}],
        {},
        [],
    ):
        assert merged(rows) and takeovers.read(b.folder) == []
    assert merged(good) == {} and len(takeovers.read(b.folder, built.policy.card)) == 1


def test_quarantine_by_hand(built, desk, capsys) -> None:
    a = joined(desk, "a")
    learnt(a, built.library.certificates[:4])
    assert main(["fleet", "push", str(a.folder)]) == 0
    assert main(["fleet", "publish", str(desk.folder)]) == 0
    assert main(["fleet", "pull", str(a.folder)]) == 0
    bad = built.library.ids[2]
    capsys.readouterr()
    assert main(["fleet", "quarantine", str(a.folder), bad[:9], "--reason", "it looks wrong", "--json"]) == 0
    stone = json.loads(capsys.readouterr().out)["tombstone"]
    assert ids(a) == set(built.library.ids[:4]) - {bad}
    assert main(["fleet", "push", str(a.folder)]) == main(["fleet", "publish", str(desk.folder)]) == 0
    b = joined(desk, "b")
    assert main(["fleet", "pull", str(b.folder)]) == 0
    assert ids(b) == ids(a)
    assert main(["fleet", "quarantine", str(desk.folder), stone, "--lift"]) == 0
    assert main(["fleet", "publish", str(desk.folder)]) == 0
    for robot in (a, b):
        assert main(["fleet", "pull", str(robot.folder)]) == 0
        assert ids(robot) == set(built.library.ids[:4])
    assert main(["fleet", "quarantine", str(desk.folder), "zzz"]) == 2
    assert "0 of 4 experts" in capsys.readouterr().err


# -- the snapshot in use -----------------------------------------------------------------------------------------------


def test_a_snapshot_that_fails_its_self_check_is_not_used(built, desk) -> None:
    robot = joined(desk, "a")
    learnt(robot, built.library.certificates[:3])
    assert robot.place.switch()
    before = (robot.folder / "library.laws").read_bytes()
    bad = built.library.certificates[5:6]
    # as if memory or disk had failed behind the checker
    learnt(robot, replace(bad, expert_bias=bad.expert_bias + np.float32(0.5)))
    with pytest.raises(LawsError, match="beyond its bound here"):
        robot.pull()
    assert (robot.folder / "library.laws").read_bytes() == before and robot.place.heal() is None


def test_a_damaged_snapshot_is_rolled_back(built, desk) -> None:
    robot = joined(desk, "a")
    learnt(robot, built.library.certificates[:3])
    robot.place.switch()
    first = ids(robot)
    learnt(robot, built.library.certificates[3:6])
    robot.place.switch()
    assert len(ids(robot)) == 6 and set(Library.load(robot.folder / PREVIOUS).ids) == first
    data = bytearray((robot.folder / "library.laws").read_bytes())
    data[-100] ^= 1
    (robot.folder / "library.laws").write_bytes(data)
    assert "damaged" in robot.status()["rolled_back"] and ids(robot) == first
    assert robot.pull().switched and len(ids(robot)) == 6  # it tries again
    (robot.folder / "library.laws").write_bytes(b"")
    (robot.folder / PREVIOUS).write_bytes(b"")
    with pytest.raises(FleetError, match="no earlier snapshot"):
        robot.status()
    assert "no earlier snapshot" in robot.pull().healed and len(ids(robot)) == 6  # made anew


# -- networks with gaps ------------------------------------------------------------------------------------------------


def test_what_cannot_be_told_waits(built, desk) -> None:
    robot = joined(desk, "a")
    store = desk.folder.parent / "store"
    store.rename(store.with_name("away"))
    store.write_text("no folder")
    for minute in range(60):  # an hour of a timer
        if minute % 20 == 0:
            learnt(robot, built.library.certificates[minute // 10 : minute // 10 + 2])
        with pytest.raises(FleetError, match="cannot be written"):
            robot.push()
        assert robot.status()["waiting"] == minute // 20 + 1
    with pytest.raises(FleetError, match="cannot be read"):
        robot.pull()
    store.unlink()
    store.with_name("away").rename(store)
    assert robot.push()["sent"] == 3
    assert desk.collect()["a"].accepted == 6


@contextlib.contextmanager
def clock_off_by(days: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Wrong(datetime):
        @classmethod
        def now(cls, tz=None) -> datetime:
            return datetime.now(tz) + timedelta(days=days)

    with monkeypatch.context() as patch:
        for module in (trust, tuf.api._payload):
            patch.setattr(module, "datetime", Wrong)
        there = SimpleNamespace(datetime=Wrong, timezone=timezone)
        patch.setattr(tuf.ngclient._internal.trusted_metadata_set, "datetime", there)
        yield


def test_a_clock_that_is_wrong(built, desk, monkeypatch) -> None:
    """It may hold an update up and says so; once it is right, all goes on and nothing is lost."""
    robot, other = joined(desk, "a"), joined(desk, "b")
    mine = learnt(robot, built.library.certificates[:2])
    with clock_off_by(-20_000, monkeypatch):  # a robot that has just been switched on
        assert robot.push()["sent"] == 1
    assert "that robot's clock is wrong" in next(iter(desk.collect()["a"].refused.values()))
    assert robot.push()["sent"] == 0 and desk.collect()["a"].accepted == 2  # the same chunk, signed again
    with clock_off_by(-400, monkeypatch):
        desk.publish()
    with pytest.raises(RefusedError, match=r"expired.*this clock .* is wrong"):
        other.pull()
    with clock_off_by(400, monkeypatch):
        desk.publish()
    assert other.pull().merged.accepted == 2 and ids(other) == set(mine)
    desk.add(built.library)
    desk.publish()
    with clock_off_by(400, monkeypatch), pytest.raises(RefusedError, match=r"expired.*this clock .* is wrong"):
        other.pull()
    assert ids(other) == set(mine)
    assert other.pull().switched and ids(other) == set(built.library.ids)


def test_commands_in_one_folder_wait_for_each_other(desk) -> None:
    robot = joined(desk, "a")
    other = Robot(robot.folder)
    at_work = pytest.raises(FleetError, match="another `laws fleet` command is at work")
    with robot.place.alone(), at_work, other.place.alone(patience_s=0.1):
        pass
    timer = threading.Timer(0.3, lambda held: held.__exit__(None, None, None), [held := robot.place.alone()])
    held.__enter__()
    timer.start()
    with other.place.alone():
        assert not timer.is_alive() or timer.finished.is_set()


def test_waiting_is_bounded_observations_go_first(built, desk) -> None:
    robot = joined(desk, "a")
    x = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    learnt(robot, built.library.certificates[:8])
    with robot.place.history() as history:
        history.add_misses(x[:2000], built.policy.batch(x[:2000]))
    robot.gather()
    learnt(robot, built.library.certificates[8:16])
    with robot.place.history() as history:
        history.add_misses(x[2000:], built.policy.batch(x[2000:]))
    take_over(robot, built, x[:1], built.library)
    waiting = robot.gather()["waiting"]
    rows = {what: [row["bytes"] for row in waiting if row["what"] == what] for what in ("misses", "experts")}
    assert len(rows["misses"]) == len(rows["experts"]) == 2
    robot.most_bytes = sum(rows["experts"]) + rows["misses"][1] + 2000
    state = robot.gather()
    assert [row["what"] for row in state["waiting"]] == ["experts", "corrections", "experts", "misses"]
    assert state["dropped"] == {"misses": 2000, "experts": 0}
    robot.most_bytes = 1
    state = robot.gather()
    assert [row["what"] for row in state["waiting"]] == ["corrections"]
    assert state["dropped"] == {"misses": 4000, "experts": 16}
    assert len(list((robot.fleet / "outbox").iterdir())) == 1


def test_a_history_that_was_begun_and_not_finished(built, desk) -> None:
    """As a process leaves it that is killed just after it made the file."""
    robot = joined(desk, "a")
    desk.add(built.library)
    desk.publish()
    (robot.folder / "history.db").touch()
    with pytest.raises(LawsError, match="was never finished; pull"):
        robot.push()
    assert robot.pull().switched and ids(robot) == set(built.library.ids)
    robot.push()


def test_receipts_of_many_robots_are_in_several_files(built, desk, monkeypatch) -> None:
    monkeypatch.setattr("laws_ros.fleet.desk.SHARING", 1)
    members = [joined(desk, name) for name in ("a", "b", "c")]
    for k, robot in enumerate(members):
        learnt(robot, built.library.certificates[k : k + 1])
        robot.push()
        if k == 0:
            desk.collect(), desk.publish()
            assert "collected.json" in desk.repository.targets().targets
    for _ in range(2):  # those of whom nothing was taken in yet, too
        members[0].pull(), members[2].pull()
        assert members[0].status()["waiting"] == 0 and members[2].status()["waiting"] == 1
    desk.collect(), desk.publish()
    names = {name for name in desk.repository.targets().targets if name.startswith("collected")}
    assert names == {"collected-0.json", "collected-1.json", "collected-2.json"}
    for robot in members:
        robot.pull()
        assert robot.status()["waiting"] == 0


def test_lists_are_read_at_the_same_time(built, desk, monkeypatch) -> None:
    """A store that answers late must not be asked for one robot's list after the other's."""
    for k, name in enumerate(("a", "b", "c")):
        robot = joined(desk, name)
        learnt(robot, built.library.certificates[k : k + 1])
        robot.push()
    read, together = desk.store.read, threading.Barrier(3, timeout=100.0)

    def late(name: str, most: int) -> bytes | None:
        if name.endswith("list.json"):
            together.wait()
        return read(name, most)

    monkeypatch.setattr(desk.store, "read", late)
    assert [merged.accepted for merged in desk.collect().values()] == [1, 1, 1]


def test_a_reinstalled_robot_is_heard_again(built, desk) -> None:
    robot = joined(desk, "a")
    learnt(robot, built.library.certificates[:2])
    robot.push(), desk.collect(), desk.publish()
    key = (robot.fleet / "key").rename(desk.folder.parent / "key")
    shutil.rmtree(robot.folder)
    robot = joined(desk, "a", enrol=False)
    shutil.rmtree(robot.fleet / "key")
    key.rename(robot.fleet / "key")
    learnt(robot, built.library.certificates[2:4])
    robot.push()
    assert "replayed" in next(iter(desk.collect()["a"].refused.values()))
    robot.pull()
    robot.push()
    assert desk.collect()["a"].accepted == 2


def test_a_fleet_by_its_commands(built, tmp_path, capsys) -> None:
    def laws(*arguments: object) -> dict:
        assert main(["fleet", *map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    folder, robot, store = tmp_path / "desk", tmp_path / "r1", tmp_path / "store"
    about = ("--store", store, "--policy", built.path)
    made = laws("init", folder, *about, "--tolerance", 0.1, "--threshold", "root=2/3", "--days", "timestamp=1")
    assert len(made["keys"]) == 7
    public = laws("join", robot, "--name", "r1", *about, "--root", made["root"])["public_key"]
    assert laws("keys", folder, "--enrol", public)["robots"] == ["r1"]
    before = laws("keys", folder)["roles"]
    after = laws("keys", folder, "--rotate", "timestamp")["roles"]
    assert before["root"]["threshold"] == 2 and len(before["root"]["keys"]) == 3
    assert before["timestamp"]["keys"].keys().isdisjoint(after["timestamp"]["keys"])
    with Robot(robot).place.history(np.array(TOLERANCE)) as history:
        mine = history.add(built.library.certificates[:3], "learner")
    assert laws("push", robot)["waiting"] == 1
    assert laws("publish", folder)["experts"] == 3
    found = laws("pull", robot)
    assert (found["sequence"], found["switched"]) == (1, True) and ids(Robot(robot)) == set(mine)
    told = laws("status", robot), laws("status", folder)
    assert told[0]["waiting"] == 0 and told[0]["sequence"] == told[1]["sequence"] == 1 and told[1]["experts"] == 3
    stone = laws("quarantine", folder, mine[0], "--reason", "jerks")["tombstone"]
    laws("publish", folder), laws("pull", robot)
    assert ids(Robot(robot)) == set(mine[1:]) and laws("status", robot)["withdrawn"] == {mine[0]: "jerks"}
    laws("quarantine", folder, stone, "--lift"), laws("publish", folder), laws("pull", robot)
    assert ids(Robot(robot)) == set(mine)
    assert laws("keys", folder, "--revoke", "r1")["robots"] == []
    learnt(Robot(robot), built.library.certificates[3:4])
    laws("push", robot)
    assert "it was revoked" in laws("publish", folder)["collected"]["r1"]["refused"]["upload of r1"]


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_mistakes_end_in_one_line(built, desk, tmp_path, capsys) -> None:
    root = str(desk.folder / "fleet" / "metadata" / "1.root.json")
    join = ["fleet", "join", str(tmp_path / "x"), "--policy", str(built.path)]

    def fails(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert error.startswith("laws fleet: ") and error.count("\n") == 1
        return error

    assert "of no fleet" in fails("fleet", "pull", str(tmp_path))
    assert "of no fleet" in fails("fleet", "status", str(tmp_path))
    assert "no fleet's desk" in fails("fleet", "publish", str(tmp_path))
    assert "is a fleet's desk already" in fails(
        *("fleet", "init", str(desk.folder), "--store", "x", "--policy", str(built.path), "--tolerance", "0.1")
    )
    init = ("fleet", "init", str(tmp_path / "y"), "--policy", str(built.path), "--tolerance", "0.1")
    assert "nosuch" in fails(*init, "--store", "nosuch://x")
    assert "3 of 2 signatures" in fails(*init, "--store", "x", "--threshold", "root=3/2")
    assert "ROLE=VALUE" in fails(*init, "--store", "x", "--threshold", "boss=1/1")
    assert "up to 40 letters" in fails(*join, "--name", "../a", "--store", desk.store.url, "--root", root)
    assert "cannot be used" in fails(*join, "--name", "a", "--store", desk.store.url, "--root", str(built.path))
    assert "No such file" in fails(*join, "--name", "a", "--store", desk.store.url, "--root", "nowhere.json")
    assert "no robot of this fleet" in fails("fleet", "keys", str(desk.folder), "--revoke", "nobody")
    assert "no robot's public key" in fails("fleet", "keys", str(desk.folder), "--enrol", str(built.path))
    some = [joined(desk, name, enrol=False).fleet / "robot.pub.json" for name in ("many-1", "many-2")]
    before = desk.repository.targets("robots").version
    assert main(["fleet", "keys", str(desk.folder), "--enrol", str(some[0]), "--enrol", str(some[1])]) == 0
    assert desk.repository.robots() == ["many-1", "many-2"]
    assert desk.repository.targets("robots").version == before + 1  # a signature for all
    assert main([*join, "--name", "a", "--store", desk.store.url, "--root", root, "--json"]) == 0
    assert "is of a fleet already" in fails(*join, "--name", "a", "--store", desk.store.url, "--root", root)
    capsys.readouterr()
    # an upload of a robot that nobody enrolled is not even looked at
    robot = Robot(tmp_path / "x")
    learnt(robot, built.library.certificates[:1])
    robot.push()
    assert desk.collect() == {}


def test_a_read_only_store(built, desk, monkeypatch, capsys) -> None:
    robot, write, store = joined(desk, "a"), durable.write, desk.folder.parent / "store"
    mine = learnt(robot, built.library.certificates[:2])

    def read_only(path, *parts: bytes) -> None:
        if path.is_relative_to(store):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        write(path, *parts)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "write", read_only)
        for action, folder in (("push", robot.folder), ("publish", desk.folder)):
            assert main(["fleet", action, str(folder)]) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and f"store {store}: cannot be written: Read-only file system" in error
    robot.push(), desk.collect(), desk.publish(), robot.pull()
    assert ids(robot) == set(mine) and robot.status()["waiting"] == 0


def test_fleet_imports_nothing_heavy_and_the_command_line_nothing_of_the_fleet() -> None:
    """A robot runs this without torch, mujoco or gymnasium, and `laws --help` without tuf."""
    code = "import sys; sys.modules.update(dict.fromkeys({names}, None)); import {module}"
    for names, module in (
        (["torch", "mujoco", "gymnasium", "scipy", "rclpy"], "laws_ros.fleet.robot, laws_ros.fleet.desk"),
        (["tuf", "fsspec", "securesystemslib", "cryptography"], "laws_ros.cli"),
    ):
        subprocess.run([sys.executable, "-c", code.format(names=names, module=module)], check=True)


def test_a_store_that_is_no_folder(built, tmp_path) -> None:
    """Through fsspec alone, as with object storage."""
    url = f"memory://{tmp_path.name}"
    desk = Desk.create(tmp_path / "desk", url, built.path, TOLERANCE)
    assert desk.repository.send(desk.store) > 0
    a, b = joined(desk, "a"), joined(desk, "b")
    learnt(a, built.library.certificates[:3])
    assert a.push()["sent"] == 1 and desk.collect()["a"].accepted == 3
    desk.publish()
    assert b.pull().merged.accepted == 3
    a.pull(), a.push()
    assert desk.store.read("uploads/a/list.json", 1 << 20) and a.status()["waiting"] == 0
    with pytest.raises(FleetError, match="more than 10 bytes"):
        desk.store.read("uploads/a/list.json", 10)


def test_object_storage_as_s3_has_it(built, tmp_path, monkeypatch) -> None:
    pytest.importorskip("s3fs", reason="S3 stores need s3fs")
    server = pytest.importorskip("moto.server", reason="moto stands in for S3").ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        for name, value in (("ACCESS_KEY_ID", "a"), ("SECRET_ACCESS_KEY", "b"), ("DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        fsspec.filesystem("s3").mkdir("bucket")
        desk = Desk.create(tmp_path / "desk", "s3://bucket/fleet", built.path, TOLERANCE)
        desk.repository.send(desk.store)
        a, b = joined(desk, "a"), joined(desk, "b")
        mine = learnt(a, built.library.certificates[:3])
        assert a.push()["sent"] == 1 and desk.collect()["a"].accepted == 3
        desk.publish()
        assert b.pull().merged.accepted == 3 and ids(b) == set(mine)
        a.pull(), a.push()
        assert a.status()["waiting"] == 0 and len(fsspec.filesystem("s3").ls("bucket/fleet/uploads/a")) == 1
    finally:
        server.stop()
    with pytest.raises(FleetError, match="cannot be read"):
        b.pull()


def test_a_store_behind_http_can_be_read_only(built, desk, tmp_path) -> None:
    pytest.importorskip("aiohttp", reason="HTTP stores need aiohttp")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "store"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        robot = joined(desk, "a")
        told = json.loads((robot.fleet / "robot.json").read_text())
        url = f"http://127.0.0.1:{server.server_port}"
        (robot.fleet / "robot.json").write_text(json.dumps({**told, "store": url}))
        desk.add(built.library)
        desk.publish()
        robot = Robot(robot.folder)
        assert robot.pull().merged.accepted == len(built.library)
        learnt(robot, certify_points(built.network, built.observations[:1], built.policy.batch(built.observations[:1])))
        with pytest.raises(FleetError, match="cannot be written"):
            robot.push()
        server.shutdown()
    with pytest.raises(FleetError, match="cannot be read"):
        robot.pull()
