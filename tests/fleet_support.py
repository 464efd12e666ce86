"""Shared by the tests of the fleet: a desk, robots, and what they learn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from laws_ros.core.certificate import Certificates
from laws_ros.core.library import Library
from laws_ros.core.trie import Trie
from laws_ros.fleet.desk import Desk
from laws_ros.fleet.prove import Prover
from laws_ros.fleet.robot import Robot
from laws_ros.fleet.trust import read_public
from tests.conftest import Built

TOLERANCE = [0.1, 0.1]


def proved(built: Built) -> Built:
    """The same with those of the first experts that the checker proves, as what travels has to be."""
    c, prover = built.library.certificates[:40], Prover(built.policy)
    good = np.array([k for k in range(len(c)) if prover.refusal(c, k) is None])
    assert len(good) > 30
    library = replace(built.library, certificates=c[good], visits=built.library.visits[good])
    return replace(built, library=library.indexed(Trie.over(c[good].regions)))


def new_desk(built: Built, tmp_path: Path) -> Desk:
    desk = Desk.create(tmp_path / "desk", str(tmp_path / "store"), built.path, TOLERANCE)
    desk.repository.send(desk.store)
    return desk


def joined(desk: Desk, name: str, enrol: bool = True) -> Robot:
    root = desk.folder / "fleet" / "metadata" / "1.root.json"
    robot = Robot.join(desk.folder.parent / name, name, desk.store.url, desk.place.policy.path, root)
    if enrol:
        desk.repository.enrol(dict([read_public(robot.fleet / "robot.pub.json")]))
        desk.repository.send(desk.store)
    return robot


def learnt(robot: Robot, certificates: Certificates, source: str = "learner") -> list[str]:
    """As if the robot's learner had certified them."""
    with robot.place.history(np.array(TOLERANCE)) as history:
        return history.add(certificates, source)


def ids(robot: Robot) -> set[str]:
    return set(Library.load(robot.folder / "library.laws").ids)
