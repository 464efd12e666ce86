"""Two robots of one cell as processes on real ROS 2 topics, without the fleet's store.

Written for a busy machine, like tests/test_ros_nodes.py: what is awaited may take `PATIENCE_S`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")

from laws_ros.nodes.processes import private_domain
from tests.fleet_support import ids, joined, learnt, new_desk, proved

PATIENCE_S = 120.0


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[Path], tuple[subprocess.Popen[bytes], Path]]]:
    """start(folder of state): a cell node, and where it writes."""
    running: list[subprocess.Popen[bytes]] = []
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "ROS_DOMAIN_ID": private_domain(),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOG_DIR": str(tmp_path / "log"),
    }

    def start(state: Path) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"{state.name}{len(running)}.said"
        arguments = [
            "--ros-args",
            "-r",
            f"__ns:=/{state.name}",
            "-p",
            f"state:={state.parent}",
            "-p",
            "autostart:=true",
        ]
        command = [sys.executable, "-m", "laws_ros.nodes", "cell", *arguments, "-p", "round_s:=0.2"]
        with log.open("wb") as out:
            running.append(subprocess.Popen(command, stdout=out, stderr=out, env=environment))
        return running[-1], log

    yield start
    for process in running:
        process.kill()
        process.wait()


def until(true: Callable[[], bool], *nodes: tuple[subprocess.Popen[bytes], Path]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        said = [log.read_text() for _, log in nodes]
        assert all(process.poll() is None for process, _ in nodes), said
        assert time.monotonic() < end, said
        time.sleep(0.1)


def test_two_robots_share_what_they_learn_without_the_store(built, start, tmp_path) -> None:
    good = proved(built)
    desk = new_desk(good, tmp_path)
    a, b = (joined(desk, name) for name in ("a", "b"))
    for robot in (a, b):
        robot.pull()
        robot.peers()
    Path(desk.store.url).rename(tmp_path / "gone")
    first = learnt(a, good.library.certificates[:5])
    nodes = [start(robot.folder) for robot in (a, b)]
    until(lambda: ids(b) == set(first), *nodes)
    second = learnt(b, good.library.certificates[5:8])  # as a learner beside a running node does
    until(lambda: ids(a) == {*first, *second}, *nodes)
    for process, log in nodes:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=PATIENCE_S) == 0 and "Traceback" not in log.read_text(), log.read_text()


def test_a_robot_of_no_fleet_is_refused_in_one_line(start, tmp_path) -> None:
    (tmp_path / "alone").mkdir()
    process, log = start(tmp_path / "alone")
    assert process.wait(timeout=PATIENCE_S) == 2
    assert (
        "is of no fleet; `laws fleet join` makes it a member" in log.read_text() and "Traceback" not in log.read_text()
    )
