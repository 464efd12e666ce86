"""A cell of robots without the store: everybody ends with the same experts, proved, and believes nobody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from laws_ros.core.errors import FleetError
from laws_ros.core.record import pack, unpack
from laws_ros.fleet import cell as cells
from laws_ros.fleet.cell import Cell
from laws_ros.fleet.items import Items, chunks, tombstone
from tests.fleet_support import ids, joined, learnt, new_desk, proved


class Net:
    """Several cells on one network, which may lose messages; time is a number."""

    def __init__(self, robots, lose=lambda message: False) -> None:
        self.now, self.lose, self.said = 0.0, lose, []
        self.cells = {robot.name: Cell(robot, lambda: self.now) for robot in robots}

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.now += 1.0
            for name, cell in self.cells.items():
                said = cell.round()
                for message in [*([said.have] if said.have else []), *said.chunks]:
                    self.said.append((name, message))
                    if not self.lose(message):
                        for other in self.cells.values():
                            other.hear(message)

    def chunks(self) -> list[str]:
        """Who said chunks, in order."""
        return [name for name, message in self.said if message[9] == cells.CHUNK]


@pytest.fixture
def three(built, tmp_path):
    """Three robots, which have reached the store once; then it is gone."""
    good = proved(built)
    desk = new_desk(good, tmp_path)
    robots = [joined(desk, name) for name in ("a", "b", "c")]
    for robot in robots:
        robot.pull()
        robot.peers()
    Path(desk.store.url).rename(tmp_path / "gone")
    return good, robots


def test_what_one_has_learnt_all_have_and_it_is_said_once(three) -> None:
    good, (a, b, c) = three
    mine = learnt(a, good.library.certificates[:20])
    theirs = learnt(c, good.library.certificates[20:30])
    net = Net([a, b, c])
    net.rounds(4)
    assert ids(a) == ids(b) == ids(c) == {*mine, *theirs}
    assert sorted(net.chunks()) == ["a", "a", "c"]  # 16 and 4, and 10
    net.rounds(30)
    assert len(net.chunks()) == 3  # nobody lacks anything
    assert net.cells["b"].accepted == 30 and net.cells["a"].accepted == 10


def test_who_comes_later_hears_it_from_who_is_left_and_what_is_lost_is_said_again(three) -> None:
    good, (a, b, c) = three
    mine = learnt(a, good.library.certificates[:12])
    net = Net([a, b])
    net.rounds(4)
    net.cells = {"b": net.cells["b"], "c": Cell(c, lambda: net.now)}  # a is switched off
    lost = []
    net.lose = lambda message: message[9] == cells.CHUNK and not lost and not lost.append(message)
    net.rounds(5)
    assert ids(c) == set()  # b waits for a, then its first word is lost
    net.rounds(int(cells.GONE_S + 2 * cells.AGAIN_S))
    assert lost and ids(c) == set(mine)


def test_corrections_travel_from_their_own_robot_only(three) -> None:
    good, (a, b, c) = three
    mine = learnt(a, good.library.certificates[:3])
    net = Net([a, b, c])
    net.rounds(4)
    b.withdraw(mine[0], "jerks")
    net.rounds(4)
    assert ids(a) == ids(b) == ids(c) == set(mine[1:])
    assert net.chunks() == ["a", "b"]
    forged = chunks(a.place.identity, tombstone(mine[1], "no", "c"))
    net.cells["b"].hear(net.cells["a"]._signed(cells.CHUNK, next(iter(forged))))  # a says that c withdrew it
    net.rounds(2)
    assert ids(b) == set(mine[1:])
    assert [row["why"] for row in b.place.refused()] == ["it speaks for another robot"]


def test_nothing_is_believed(three) -> None:
    good, (a, b, c) = three
    cell, other = Cell(a), Cell(b)
    c_key = Cell(c)
    identity, record = a.place.identity, bytearray(pack(good.library.certificates, 0))
    wrong = unpack([bytes(record)], identity.inputs, identity.rows)
    wrong = replace(wrong, expert_bias=wrong.expert_bias + 10.0)
    false = pack(wrong, 0)
    chunk = next(iter(chunks(identity, Items({identity.name(false): false}))))
    whole = other._signed(cells.CHUNK, chunk)
    attacks = {
        "not proved": whole,
        "not signed by its key": whole[:-1] + bytes([whole[-1] ^ 1]),
        "no robot that the desk knows": whole[:13] + b"x" + whole[14:],
        "of a cell": b"LAWSCELL2" + whole[9:],
        "not a whole chunk": other._signed(cells.CHUNK, chunk[:-9]),
    }
    stolen = c_key._signed(cells.CHUNK, chunk)
    attacks["not signed by its key "] = stolen[:13] + b"b" + stolen[14:]
    for message in [*attacks.values(), *attacks.values(), b"", b"\xff" * 99]:
        cell.hear(message)
    said = cell.round()
    assert said.merged.accepted == 0 and ids(a) == set()
    told = [row["why"] for row in a.place.refused()]
    assert len(told) == len(set(told))  # once each
    for why in attacks:
        assert any(why.strip() in line for line in told), (why, told)
    had = said.have
    assert had is not None and bytes.fromhex(identity.name(false)) in had  # so that nobody says it again


def test_a_cell_needs_the_list_of_robots_and_a_revoked_robot_is_not_heard(built, tmp_path) -> None:
    good = proved(built)
    desk = new_desk(good, tmp_path)
    a, b = (joined(desk, name) for name in ("a", "b"))
    store = Path(desk.store.url)
    store.rename(tmp_path / "gone")
    with pytest.raises(FleetError, match="has no list of the fleet's robots yet; reach the store once"):
        Cell(a)
    (tmp_path / "gone").rename(store)
    net = Net([a, b])
    assert sorted(net.cells["a"].keys) == ["a", "b"]
    desk.repository.revoke("b")
    desk.repository.send(desk.store)
    net.cells["a"].keys = a.peers()
    learnt(b, good.library.certificates[:3])
    net.rounds(4)
    assert not (a.folder / "library.laws").exists()
    assert "no robot that the desk knows" in a.place.refused()[0]["why"]
