"""`laws up`, `laws top` and the recording, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")
pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")

from laws_ros.nodes.processes import private_domain

PATIENCE_S = 120.0
LAWS = [sys.executable, "-m", "laws_ros.cli"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "ROS_DOMAIN_ID": private_domain(),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOG_DIR": str(tmp_path / "log"),
    }


def laws(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*LAWS, *arguments]
    return subprocess.run(command, capture_output=True, env=environment, timeout=PATIENCE_S, check=False, text=True)


def test_two_robots_watched_and_recorded(environment: dict[str, str], tmp_path: Path) -> None:
    highlevel = pytest.importorskip("rosbags.highlevel", reason="rosbags is missing: pip install rosbags")
    bag = tmp_path / "bag"
    arguments = ["up", "cartpole", "--namespace", "left", "--namespace", "right", "--record", str(bag)]
    topics = ("joint_states", "slider_effort_controller/commands", "controller/decision")
    said = tmp_path / "said"
    with said.open("w") as out:
        up = subprocess.Popen([*LAWS, *arguments], stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + PATIENCE_S
        missing = {f"recording /{side}/{topic}" for side in ("left", "right") for topic in topics}
        while missing and time.monotonic() < end:  # discovery takes its time on a busy machine
            missing -= {line for line in missing if line in said.read_text()}
            time.sleep(0.1)
        end = time.monotonic() + PATIENCE_S
        active: set[str] = set()
        while active != {"/left/controller", "/right/controller"} and time.monotonic() < end:
            found = laws(environment, "top", "--json")
            for name, facts in (json.loads(found.stdout) if found.returncode == 0 else {}).items():
                if facts.get("state") == "active" and int(facts["hits"]) > 0:
                    active.add(name)
        children = Path(f"/proc/{up.pid}/task/{up.pid}/children").read_text().split()
        up.send_signal(signal.SIGINT)
        up.wait(timeout=PATIENCE_S)
        output = said.read_text()
    finally:
        up.kill()
    assert active == {"/left/controller", "/right/controller"}, output
    assert not missing, output
    assert up.returncode == 0, output
    assert "Traceback" not in output
    assert len(children) == 4
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    with highlevel.AnyReader([bag]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        for side in ("left", "right"):
            for topic in topics:
                assert counts[f"/{side}/{topic}"] > 0, counts
        connection = next(c for c in reader.connections if c.topic == "/left/controller/decision")
        _, _, raw = next(reader.messages([connection]))
        assert reader.deserialize(raw, connection.msgtype).layout.dim[0].label.startswith("step,time_s,")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody"], "nobody: neither a robot (arm_sort, cartpole"),
        (["cartpole", "--namespace", "a", "--namespace", "a"], "'a' stands twice"),
        (["cartpole", "--record", "/"], "/: exists already"),
    ],
)
def test_refused(environment: dict[str, str], arguments: list[str], words: str) -> None:
    done = laws(environment, "up", *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line


def test_nobody_to_watch(environment: dict[str, str]) -> None:
    done = laws(environment, "top", "--once")
    assert done.returncode == 1
    assert done.stdout == "no controller has reported\n"


def test_the_policy_given_must_fit(environment: dict[str, str]) -> None:
    """A node that refuses ends everything, with its code."""
    done = laws(environment, "up", "cartpole", "--library", "/nowhere/x.laws")
    assert done.returncode == 2
    assert "not configured: /nowhere/x.laws" in done.stderr + done.stdout
    assert "the controller has ended with code 2" in done.stderr
