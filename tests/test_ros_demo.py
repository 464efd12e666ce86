"""The main job with the shipped policy and library, and the check that it makes afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")
pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")

from laws_ros.nodes import demo
from laws_ros.runtime.cached_policy import CachedPolicy
from tests.conftest import Built

PATIENCE_S = 120.0
DEMO = [sys.executable, "-m", "laws_ros.cli", "demo"]


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


def test_demo(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*DEMO, "--seconds", "5", "--json"],
        capture_output=True,
        env=environment,
        timeout=PATIENCE_S,
        check=False,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["every_answer_kept_its_bound"] is True
    assert summary["violations"] == summary["unrecorded"] == 0
    assert summary["seconds"] == pytest.approx(5.0)
    assert summary["steps"] > 100
    assert all(b <= t for b, t in zip(summary["largest_bound"], summary["tolerance"], strict=True))
    assert summary["return_policy"] > 0
    # A busy machine may miss some of the 500 ticks, and a robot with fewer commands is another one.
    without = summary["held"] + summary["deadline_misses"]
    if without < 25:
        share = 0.9 if without < 5 else 0.5
        assert summary["steps"] >= 450
        assert summary["hit_rate"] > share
        assert summary["return_cached"] > share * summary["return_policy"]
    lines = done.stderr.splitlines()
    assert any(line.startswith("YES: all") for line in lines)
    assert any("| hits " in line for line in lines)  # the live view


def started(environment: dict[str, str]) -> tuple[subprocess.Popen[str], list[int]]:
    """A demonstration that has begun to move, and its children."""
    process = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "| hits " in line:
            break
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2, children
    return process, [int(child) for child in children]


def gone(pids: list[int]) -> bool:
    end = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_interrupt_is_clean(environment: dict[str, str]) -> None:
    process, children = started(environment)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    assert "interrupted" in output
    assert "YES: all" in output
    assert "Traceback" not in output
    assert gone(children)


def test_no_orphans(environment: dict[str, str]) -> None:
    process, children = started(environment)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    assert gone(children)


def test_a_missing_library_names_the_command_that_builds_it(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [*DEMO, "--library", "/nowhere/x.laws"],
        capture_output=True,
        env=environment,
        timeout=PATIENCE_S,
        check=False,
        text=True,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "/nowhere/x.laws" in line
    assert "laws build --policy" in line


@pytest.fixture
def answers(built: Built) -> tuple[demo.Table, CachedPolicy]:
    """A faithful recording of 300 answers of the small policy's library."""
    cached = CachedPolicy(built.library, built.policy)
    observations = np.concatenate([built.observations[:200], 3.0 * built.observations[:100]])
    given = [cached.answer(x) for x in observations]
    table: dict[str, Any] = {
        "step": np.arange(1.0, 301.0),
        "region": np.array([a.region for a in given], float),
        "action": np.array([a.action for a in given], float),
        "bound": np.array([a.bound for a in given]),
        "tolerance": np.tile(cached.tolerance, (300, 1)),
        "observation": observations.astype(float),
    }
    assert 0 < (table["region"] >= 0).sum() < 300
    return table, cached


def test_check_accepts_a_faithful_recording(answers: tuple[demo.Table, CachedPolicy]) -> None:
    result = demo.check(*answers)
    assert result["every_answer_kept_its_bound"]
    assert result["violations"] == result["unrecorded"] == 0
    assert 0 < result["worst_error_over_bound"] <= 1


@pytest.mark.parametrize("hit", [True, False], ids=["hit", "miss"])
@pytest.mark.parametrize("what", ["action", "action is NaN", "observation", "bound", "lost"])
def test_check_finds_a_single_false_answer(answers: tuple[demo.Table, CachedPolicy], hit: bool, what: str) -> None:
    table, cached = answers
    k = int(np.flatnonzero((table["region"] >= 0) == hit)[0])
    if what == "action":
        # By more than the error and the bound together; for the policy's own answers, by the last bit.
        table["action"][k, 1] = np.nextafter(table["action"][k, 1] + 2 * table["bound"][k, 1], np.inf)
    elif what == "action is NaN":
        table["action"][k, 1] = np.nan
    elif what == "observation":
        table["observation"][k] += 1.0
    elif what == "bound":
        table["bound"][k, 0] = cached.tolerance[0] * 1.01
    else:
        table = {name: np.delete(column, k, axis=0) for name, column in table.items()}
    result = demo.check(table, cached)
    assert not result["every_answer_kept_its_bound"]
    assert (result["unrecorded"] if what == "lost" else result["violations"]) == 1
