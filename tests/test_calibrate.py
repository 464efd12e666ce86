"""How much error a task stands: found again where the answer is known, and what errors are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from onnx import helper

from laws_ros.build import calibrate, workloads
from laws_ros.build.workloads import BatchStep, Workload, WorkloadSpec
from laws_ros.cli import main
from laws_ros.core.card import Channel
from laws_ros.core.errors import ConfigError, WorkloadError
from laws_ros.runtime.files import share_path
from laws_ros.runtime.policy import Policy
from tests.support import save_model

SPEC = WorkloadSpec(
    name="drift",
    observations=(Channel("x"),),
    actions=(Channel("u", "m", -1.0, 3.0),),  # 4 wide
    discrete=False,
    period_s=0.1,
    episode_steps=50,
)


class Drift:
    """x' = decay * x + u, reward 1 - x^2: the return under any error is a sum that can be written down."""

    def __init__(self, decay: float, lanes: int, threads: int) -> None:
        self.decay, self.x = decay, np.zeros(lanes)

    def reset(self, lanes: Sequence[int], seeds: Sequence[int]) -> np.ndarray:
        self.x[list(lanes)] = [0.1 * np.random.default_rng(seed).normal() for seed in seeds]
        return self.x[list(lanes), None].astype(np.float32)

    def step(self, actions: Any, running: Any) -> BatchStep:
        self.x = self.decay * self.x + np.clip(actions[:, 0], -1.0, 3.0)
        return BatchStep(self.x[:, None].astype(np.float32), 1.0 - self.x**2, np.zeros(len(self.x), bool))

    def close(self) -> None: ...


def drift(decay: float) -> Workload:
    return Workload(
        SPEC, lambda: pytest.fail("the batch is to be used"), lambda lanes, threads: Drift(decay, lanes, threads)
    )


@pytest.fixture
def policy(tmp_path) -> Policy:
    """u = -0.5 x."""
    nodes = [helper.make_node("Mul", ["observation", "gain"], ["action"])]
    return Policy(save_model(tmp_path / "p.onnx", nodes, {"gain": np.array([-0.5], np.float32)}, 1, 1))


def test_the_tolerance_of_a_task_that_can_be_solved_by_hand(policy):
    """x' = 0.4 x + e with |e| <= 4 a. A constant e, or the sign of x, holds x near e / 0.6: 1% is lost at x = 0.1."""
    found = calibrate.calibrate(policy, drift(0.9), episodes=16)
    by_hand = 0.1 * 0.6 / 4.0
    step = (calibrate.GRID[1] / calibrate.GRID[0]) ** (0.5**calibrate.REFINE)
    assert by_hand / step / 1.05 < found.tolerance_by_error["bias"] < by_hand * 1.05
    assert found.tolerance_by_error["adversary"] == pytest.approx(found.tolerance_by_error["bias"], rel=0.15)
    # Independent errors add up like a random walk: variance e^2 / 3 / (1 - 0.4^2).
    spread = np.sqrt(0.01 * 3 * (1 - 0.4**2)) / 4.0
    assert spread / step / 1.15 < found.tolerance_by_error["uniform"] < spread * 1.15
    assert found.tolerance == min(found.tolerance_by_error.values()) and not found.beyond
    assert found.tolerance_in_units == [pytest.approx(4.0 * found.tolerance)]


def test_the_adversary_finds_the_sign_that_harms(policy):
    """At decay 1.4 the loop x' = 0.9 x + e adds errors of one sign up; drawn signs hardly do."""
    task = calibrate._Task(policy, drift(1.4), 16, 0, 0.99, lambda text: None)
    about, adversary = calibrate._search(task, 0.005)
    worst = task.measure("adversary", 0.005, adversary, None)
    switching = task.measure("switching", 0.005, *task.drawn(3.0))
    assert 1.0 - worst.kept > 3.0 * (1.0 - switching.kept)
    x = np.linspace(-1.0, 1.0, 40)[:, None]
    signs = adversary(x, -0.5 * x, np.zeros((40, 1)))[:, 0]
    assert (signs * np.sign(x[:, 0]) > 0).mean() > 0.9, about  # always away from the middle


@pytest.mark.parametrize("switch_steps", [None, 3.0, np.inf])
def test_drawn_errors_are_bounded_and_a_function_of_the_seed(policy, switch_steps):
    task = calibrate._Task(policy, drift(0.9), 6, 0, 0.99, lambda text: None)
    error, draws = task.drawn(switch_steps)
    runs = [task.run(0.01, error, draws, 0, range(6)) for _ in range(2)]
    columns = [x[:, 1] for x in runs[0].observations]
    assert all(np.array_equal(a, b) for a, b in zip(columns, (x[:, 1] for x in runs[1].observations), strict=True))
    values = np.concatenate(columns)
    assert (np.abs(values) <= 1.0).all()
    switches = np.mean([(np.diff(np.sign(c)) != 0).mean() for c in columns])
    if switch_steps is None:
        assert values.std() == pytest.approx(3**-0.5, rel=0.1)
    else:
        assert (np.abs(values) == 1.0).all() and switches == pytest.approx(1.0 / switch_steps, abs=0.12)


def test_what_is_clearly_not_stood_ends_early_and_what_is_stood_does_not(policy):
    task = calibrate._Task(policy, drift(0.9), 32, 0, 0.99, lambda text: None)
    bias = task.drawn(np.inf)
    crash, stood = (task.measure("bias", amplitude, *bias) for amplitude in (0.16, 0.005))
    assert crash.episodes == 8 and crash.kept < 0.9
    assert stood.episodes == 32 and stood.kept > 0.99
    again = calibrate._Task(policy, drift(0.9), 8, 0, 0.99, lambda text: None)
    assert again.measure("bias", 0.16, *bias) == crash  # the same episodes, however many were asked for


@pytest.mark.parametrize("name", ["cartpole", "arm_sort", "quadruped_walk"])
def test_a_workloads_default_tolerance_is_what_was_measured(name):
    pytest.importorskip("mujoco", reason="needs MuJoCo: pip install 'laws_ros[sim]'")
    found = json.loads(share_path(f"docs/workloads/{name}-calibrate.json").read_text())
    tolerance = workloads.get(name).spec.tolerance
    assert found["keep"] == 0.99 and found["episodes"] >= 32
    assert 0.0 <= found["tolerance"] - tolerance < 1e-4
    assert found["tolerance"] == min(found["tolerance_by_error"].values())


def test_what_cannot_be_calibrated(policy, tmp_path):
    decides = Policy(save_model(tmp_path / "q.onnx", [helper.make_node("Neg", ["observation"], ["action"])], {}, 4, 2),
                     decision="argmax")  # fmt: skip
    with pytest.raises(ConfigError, match="decides by argmax"):
        calibrate.calibrate(decides, drift(0.9))
    endless = replace(drift(0.9), spec=replace(SPEC, actions=(Channel("u"),)))
    with pytest.raises(WorkloadError, match="an action without limits"):
        calibrate.calibrate(policy, endless)
    pytest.importorskip("mujoco", reason="needs MuJoCo: pip install 'laws_ros[sim]'")
    with pytest.raises(WorkloadError, match="takes 1 observations, cartpole gives 4"):
        calibrate.calibrate(policy, workloads.get("cartpole"))


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("gymnasium", reason="needs Gymnasium: pip install 'laws_ros[gym]'")
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'laws_ros[plot]'")
    monkeypatch.setattr(calibrate, "GRID", (0.01, 0.3))
    monkeypatch.setattr(calibrate, "REFINE", 1)
    nodes = [helper.make_node("MatMul", ["observation", "gain"], ["action"])]
    path = save_model(tmp_path / "p.onnx", nodes, {"gain": np.array([[-1.0], [-2.0], [-3.0]], np.float32)}, 3, 1)
    picture = tmp_path / "curve.png"
    arguments = ["calibrate", "--policy", str(path), "--workload", "gym:Pendulum-v1", "--episodes", "2"]
    assert main([*arguments, "--plot", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"tolerance", "tolerance_by_error", "curve", "return_policy"} <= set(found)
    assert {p["error"] for p in found["curve"]} == {"uniform", "bias", "switching", "adversary"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([*arguments, "--keep", "1.5"]) == 2
    assert main([*arguments, "--plot", str(tmp_path / "none/x.png")]) == 2
