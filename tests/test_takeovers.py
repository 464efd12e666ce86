"""What a human corrected is not served again unasked: not at once, nor by neighbours, nor by a new library."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Message
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.build.grow import grow
from laws_ros.build.learn import CORRECTED, Learner
from laws_ros.cli import main
from laws_ros.core.card import Card
from laws_ros.core.checker import Checker
from laws_ros.core.errors import ConfigError, LibraryError
from laws_ros.core.library import Library
from laws_ros.core.observation import Binding
from laws_ros.core.region import Regions
from laws_ros.core.safety import OPERATOR, POLICY, Rules
from laws_ros.core.trie import Trie
from laws_ros.nodes.loop import ControlLoop, Step, Update
from laws_ros.nodes.upkeep import Upkeep
from laws_ros.runtime import takeovers
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.history import History
from laws_ros.runtime.quarantine import Quarantine
from laws_ros.runtime.routing import Router
from laws_ros.runtime.takeovers import Correction, Log
from tests.conftest import Built
from tests.support import break_certificates, random_regions


def served(library: Library, quarantine: Quarantine, x: np.ndarray) -> np.ndarray:
    """Which observations the library answers, as the control loop asks."""
    hit = Router(library, library.tolerance).many(x) >= 0
    return hit & ~np.array([quarantine.covers(row) for row in x], dtype=bool)


def write(folder: Path, built: Built, x: np.ndarray, library: Library | None = None, end: bool = True) -> Log:
    """A takeover at these observations, as a controller records it."""
    library = library or built.library
    log = Log(folder, "/controller", built.policy.card, built.policy.sha256)
    quarantine = Quarantine(3, library=library)
    steps = [Correction(10**9 * k, row, [0.5, -0.5], [0.4, -0.4], quarantine.correct(row)) for k, row in enumerate(x)]
    log.add(steps[:1], library)
    log.add(steps[1:], library)
    if end:
        log.end(built.policy.batch(x))
    return log


@settings(max_examples=10, deadline=None)
@given(which=st.lists(st.integers(0, 3999), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_corrected_observations_and_their_regions_are_never_served(built: Built, which: list[int], seed: int) -> None:
    x, regions = built.observations, built.library.certificates.regions
    quarantine = Quarantine(3, library=built.library)
    out = {k for i in which for k in quarantine.correct(x[i])}
    inside = regions[sorted(out)].contains(x.astype(float)).any(axis=1) if out else np.zeros(len(x), dtype=bool)
    inside[which] = True
    asked = np.concatenate([x[inside], x[np.random.default_rng(seed).integers(len(x), size=200)]])
    got = served(built.library, quarantine, asked)
    assert not got[: inside.sum()].any()
    # all others are answered as before
    alone = Router(built.library, built.library.tolerance).many(asked) >= 0
    assert (got == (alone & ~regions[sorted(out)].contains(asked.astype(float)).any(axis=1) if out else got)).all()
    assert (quarantine.many(asked) == [quarantine.covers(row) for row in asked]).all()


def test_no_other_library_serves_them_either(built: Built) -> None:
    """Neither one with larger regions, grown for a looser tolerance, nor one without those of the takeover."""
    x = built.observations[:5]
    quarantine = Quarantine(3, library=built.library)
    volumes = {k for row in x for k in quarantine.correct(row)}
    assert volumes
    loose = grow(
        built.policy, built.network, built.observations, built.policy.batch(built.observations), np.full(2, 0.4),
        max_regions=20,
    ).library  # fmt: skip
    kept = np.array([k for k in range(len(built.library)) if k not in volumes])
    less = replace(
        built.library, certificates=built.library.certificates[kept], visits=built.library.visits[kept]
    ).indexed(built.library.trie)
    near = built.observations[built.library.certificates.regions[sorted(volumes)].contains(built.observations).any(1)]
    for library in (loose, less):
        again = Quarantine(3, quarantine.points, quarantine.volumes, library)
        assert not served(library, again, np.concatenate([x, near])).any()
    assert (Router(loose, loose.tolerance).many(x) >= 0).any()  # it would have


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), radius=st.floats(0.05, 2.0))
def test_what_is_said_to_be_apart_has_nothing_in_common(seed: int, count: int, radius: float) -> None:
    rng = np.random.default_rng(seed)
    volumes, regions = (
        replace(made, round=rng.integers(0, 4, count).astype(np.int32))
        for made in (random_regions(rng, count, 3, radius, center=0.7) for _ in range(2))
    )
    quarantine = Quarantine(3, volumes=volumes)
    touching = quarantine.touching(regions)
    for k in np.flatnonzero(~touching):
        inside = regions.sample(rng, np.full(500, k), edge=0.5).astype(np.float32)
        inside = inside[regions[k : k + 1].contains(inside)[:, 0]]
        assert not quarantine.many(inside).any()
        assert (quarantine.many(inside) == volumes.contains(inside).any(axis=1)).all()
    assert quarantine.touching(volumes).all()
    assert not Quarantine(3).touching(regions).any()


def test_touching_counts_points_too() -> None:
    center = np.array([[0.0, 0.0], [5.0, 5.0]])
    box = Regions.from_axes(center, np.eye(2)[None].repeat(2, 0), np.ones((2, 2)))
    quarantine = Quarantine(2, points=np.array([[0.5, 0.5]], np.float32))
    assert quarantine.touching(box).tolist() == quarantine.holding(box).tolist() == [True, False]


# ------------------------------------------------------------------------------------------------- files


def test_a_takeover_comes_back_as_it_was(built: Built, tmp_path: Path) -> None:
    x = built.observations[:20]
    log = write(tmp_path, built, x)
    (found,) = takeovers.read(tmp_path, built.policy.card)
    assert (found.id, found.robot, found.released) == (log.id, "/controller", "")
    assert found.observations.tolist() == x.tolist()
    assert found.operator.tolist() == [[0.5, -0.5]] * 20
    assert found.commands.tolist() == [[0.4, -0.4]] * 20
    assert found.policy.astype(np.float32).tolist() == built.policy.batch(x).tolist()
    assert sorted(found.regions) == sorted(set(found.regions)) != []
    for i, name in enumerate(found.regions):
        k = built.library.ids.index(name)
        for part in ("center", "transform", "round"):
            assert (getattr(found.volumes, part)[i] == getattr(built.library.certificates, part)[k]).all()


def test_a_killed_controller_loses_at_most_the_line_it_was_writing(built: Built, tmp_path: Path) -> None:
    x = built.observations[:6]
    path = write(tmp_path, built, x, end=False).path
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for cut in range(len(lines[0]) + 1, len(data), 97):
        path.write_bytes(data[:cut])
        (found,) = takeovers.read(tmp_path, built.policy.card)
        whole = data[:cut].count(b"\n") - 1
        assert found.observations.tolist() == x[:whole].tolist()
        assert np.isnan(found.policy).all()
    takeovers.release(tmp_path, found.id, "seen")  # appended behind what is whole
    assert takeovers.read(tmp_path)[0].released == "seen"


def test_a_damaged_record_is_refused_and_not_believed(built: Built, tmp_path: Path) -> None:
    path = write(tmp_path, built, built.observations[:4]).path
    data = path.read_bytes()
    for position in range(3, len(data) - 1, len(data) // 23):
        if data[position : position + 1] == b"\n":
            continue
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(LibraryError, match="is damaged"):
            takeovers.read(tmp_path, built.policy.card)


def test_another_card(built: Built, tmp_path: Path) -> None:
    write(tmp_path, built, built.observations[:2])
    other = Card.plain("other", 3, 2, "none")
    with pytest.raises(LibraryError, match=r"another card \(a.position, b.position, a.velocity\) than other's"):
        takeovers.read(tmp_path, other)
    takeovers.release(tmp_path, takeovers.read(tmp_path)[0].id, "seen")
    assert len(takeovers.read(tmp_path, other)) == 1
    with pytest.raises(ConfigError, match="has no takeover 'x'"):
        takeovers.release(tmp_path, "x", "")


def test_released_after_a_review(built: Built, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = built.observations[:30]
    first, second = (write(tmp_path, built, part).id for part in (x[:10], x[10:]))
    hit = Router(built.library, built.library.tolerance).many(x) >= 0

    def now() -> np.ndarray:
        return served(built.library, takeovers.quarantine_of(takeovers.read(tmp_path), 3, built.library), x)

    assert hit.any() and not now().any()
    assert main(["library", "review", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["takeovers"]
    assert [(t["id"], t["steps"], t["released"]) for t in told] == [(first, 10, ""), (second, 20, "")]
    assert all(0.0 < d < 2.0 for t in told for d in t["largest_difference"].values())
    assert main(["library", "release", str(tmp_path), "--takeover", first, "--reason", "wind"]) == 0
    assert not now()[10:].any()  # the other one still holds
    assert main(["library", "release", str(tmp_path), "--takeover", first]) == 2
    assert "released already (wind)" in capsys.readouterr().err
    assert main(["library", "release", str(tmp_path), "--takeover", second]) == 0
    assert (now() == hit).all()


# ------------------------------------------------------------------------------------------------- the learner


def test_the_learner_keeps_out_and_lets_in_again(built: Built, tmp_path: Path) -> None:
    card, tolerance = built.policy.card, built.library.tolerance
    seen, corrected = built.observations[:600], built.observations[:3]
    with History(tmp_path / "history.db", built.policy.sha256, card, tolerance) as history:
        holding = Quarantine(3, points=corrected).holding(built.library.certificates.regions)
        history.add(built.library.certificates[np.flatnonzero(holding)], "offline")
        learner = Learner(history, built.policy, built.network, most_certificates=300)
        log = write(tmp_path, built, corrected, learner.library)
        found = takeovers.read(tmp_path, card)
        assert learner.obey(found) == bool(found[0].regions)
        history.add_misses(seen, built.policy.batch(seen))
        lesson = learner.learn()
        assert lesson.library is not None and lesson.added > 0
        quarantine = takeovers.quarantine_of(found, 3)
        fresh = [k for k in learner.library.ids if k not in built.library.ids]
        regions = learner.library.certificates.regions[[learner.library.ids.index(k) for k in fresh]]
        assert len(fresh) and not quarantine.touching(regions).any()
        tried, broken = break_certificates(
            built.policy, built.network, learner.library.certificates, np.random.default_rng(0), 50
        )
        assert tried > 100 and broken == 0
        checker = Checker(built.network)
        assert {checker.verdict(learner.library.certificates, k) for k in range(0, len(learner.library), 5)} == {
            "holds"
        }
        outside = seen[~quarantine.many(seen)]
        assert (Router(learner.library, tolerance).many(outside) >= 0).mean() > 0.3
        assert not quarantine.holding(learner.library.certificates.regions).any()
        assert (Router(learner.library, tolerance).many(corrected) < 0).all()  # even without the quarantine
        assert set(found[0].regions) <= {k for k, reason in history.retired().items() if reason == CORRECTED}
        assert not learner.obey(found)  # nothing more to do

        takeovers.release(tmp_path, log.id, "seen")
        assert learner.obey(takeovers.read(tmp_path, card)) == bool(found[0].regions)
        assert set(found[0].regions) <= set(learner.library.ids)
        history.add_misses(seen, built.policy.batch(seen))
        learner.learn()
        assert (Router(learner.library, tolerance).many(seen) >= 0).mean() > 0.8


def test_a_library_of_one_leaf(built: Built) -> None:
    """A trie without questions lists every region at its root."""
    library = built.library.indexed(Trie.root())
    quarantine = Quarantine(3, library=library)
    x = built.observations[0]
    expected = np.flatnonzero(library.certificates.regions.contains(x[None].astype(float))[0])
    assert sorted(quarantine.correct(x)) == expected.tolist()


# ------------------------------------------------------------------------------------------------- the loop


class Node:
    """What a controller's node is to its upkeep."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def get_logger(self) -> Message:
        return Message(info=self.lines.append, warning=self.lines.append, error=self.lines.append)

    def get_fully_qualified_name(self) -> str:
        return "/controller"


class Robot:
    """A control loop that is fed by hand, and what it publishes."""

    def __init__(self, built: Built, **changes: Any) -> None:
        card = built.policy.card
        binding = Binding.of_card(card, "commands").check(card, built.policy.sha256)
        self.steps: list[Step] = []
        self.loop = ControlLoop(
            CachedPolicy(built.library, built.policy), binding, Rules(10**7, 10**10), lambda command: None,
            self.steps.append, 10**10, **changes,
        )  # fmt: skip
        self.loop.start()

    def sense(self, x: np.ndarray) -> Step:
        a, b, va = map(float, x)
        stamp = Message(sec=0, nanosec=0)
        self.loop.step(
            "joint_states",
            Message(header=Message(stamp=stamp, frame_id=""), name=["a", "b"], position=[a, b], velocity=[va, 0.0]),
        )
        return self.steps[-1]

    def operate(self, *command: float) -> None:
        self.loop.operate("laws/intervention", Message(data=list(command)))


def test_an_update_that_does_not_know_of_a_correction_is_dropped(built: Built) -> None:
    hit = built.observations[Router(built.library, built.library.tolerance).many(built.observations) >= 0][0]
    robot = Robot(built)
    try:
        assert robot.sense(hit).source >= 0
        other = CachedPolicy(replace(built.library, notes={"of": "tonight"}), built.policy)
        robot.loop.renew(Update(other, Quarantine(3, library=other.library), 0))
        assert robot.sense(hit).source >= 0 and robot.loop.cached is other
        robot.operate(0.5, 0.5)
        assert robot.sense(hit).source == OPERATOR
        robot.operate()
        robot.loop.renew(Update(CachedPolicy(built.library, built.policy), Quarantine(3), 0))
        assert robot.sense(hit).source == POLICY
        assert robot.loop.cached is other and robot.loop.dropped_updates == 1
        robot.loop.renew(Update(CachedPolicy(built.library, built.policy), Quarantine(3), 1))  # it does know
        assert robot.sense(hit).source >= 0
    finally:
        robot.loop.stop()


def test_upkeep_offers_again_until_everything_is_in_it(built: Built, tmp_path: Path) -> None:
    """Also a snapshot that came while an operator was in command, and after a disk that could not be written."""
    hit = built.observations[Router(built.library, built.library.tolerance).many(built.observations) >= 0][:2]
    node, blocked = Node(), tmp_path / takeovers.TAKEOVERS
    upkeep: Upkeep
    robot = Robot(built, corrected=lambda correction: upkeep.corrected(correction))
    upkeep = Upkeep(node, robot.loop, tmp_path)
    blocked.touch()  # no folder can be made of that name
    upkeep.start()
    try:
        robot.sense(hit[0])
        for x in hit:
            robot.operate(0.5, 0.5)
            assert robot.sense(x).source == OPERATOR
        robot.operate()
        snapshot = replace(built.library, notes={"of": "tonight"})
        snapshot.save(tmp_path / takeovers.SNAPSHOT)
        end = time.monotonic() + 60.0
        while not any("takeover not kept, trying again" in line for line in node.lines):
            assert time.monotonic() < end
            assert {robot.sense(x).source for x in hit} == {POLICY}
            time.sleep(0.01)
        blocked.unlink()
        while robot.loop.cached.library.digest != snapshot.digest:
            assert time.monotonic() < end, node.lines
            assert {robot.sense(x).source for x in hit} == {POLICY}
            time.sleep(0.01)
        assert {robot.sense(x).source for x in hit} == {POLICY}
        assert takeovers.read(tmp_path)[0].observations.tolist() == hit.tolist()
    finally:
        robot.loop.stop()
        upkeep.stop()
