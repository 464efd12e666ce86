"""How much history a key needs: laws and windows of policies whose decay is known, and of one that learned its own."""

from __future__ import annotations

import json

import numpy as np
import pytest

from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.history_length import history_length
from laws_ros.build.workloads import get
from laws_ros.cli import main
from laws_ros.core.errors import ConfigError
from laws_ros.runtime.files import resolve
from laws_ros.runtime.policy import Policy
from tests.support import save_mlp

FRAMES, TARGET = 24, np.array([0.05])


def linear(path, weight: np.ndarray) -> Policy:
    """action = sum of weight[l] times the (only) entry of the frame at lag l; in a window the oldest comes first."""
    return Policy(save_mlp(path, [(weight[None, ::-1], np.zeros(1))]))


def noise(seed: int, entries: int = FRAMES) -> list[np.ndarray]:
    return [np.random.default_rng(seed + k).normal(size=(2000, entries)).astype(np.float32) for k in range(4)]


@pytest.mark.parametrize(("law", "rate"), [("power", 1.7), ("power", 2.5), ("exponential", 0.4), ("exponential", 0.15)])
def test_a_known_decay_is_found_with_its_rate_and_the_window_that_it_needs(tmp_path, law, rate) -> None:
    lag = np.arange(FRAMES)
    weight = np.exp(-rate * lag) if law == "exponential" else 1.0 / np.maximum(lag, 1) ** rate
    policy = linear(tmp_path / "p.onnx", weight)
    found = history_length(policy, noise(0), FRAMES, TARGET)
    assert found.decided and found.laws[0].name == law
    assert found.laws[0].rate == pytest.approx(rate, rel=0.05)
    np.testing.assert_allclose(found.sensitivity, weight[1:] * np.sqrt(2 / np.pi) / TARGET, rtol=0.1)
    # Independent frames predict nothing of each other: D(L) is normal with the variance of the weights left out.
    left_out = np.sqrt(np.cumsum(weight[::-1] ** 2)[::-1])
    needed = 1 + int(np.flatnonzero(np.append(2.5758 * left_out[1:], 0.0) < TARGET[0])[0])
    assert abs(found.window - needed) <= 1
    tail = np.cumsum(found.sensitivity[::-1])[::-1]
    assert (np.array(found.distortion[:-1]) <= tail * (1 + 1e-9)).all()
    assert found.distortion[-1] == found.distortion_99[-1] == 0.0


def test_a_longer_history_is_predicted_where_the_law_goes_on(tmp_path) -> None:
    rate = 0.15
    found = history_length(linear(tmp_path / "p.onnx", np.exp(-rate * np.arange(FRAMES))), noise(1), FRAMES, TARGET)
    tail = np.sqrt(2 / np.pi) * np.exp(-rate * np.arange(200)) / (1 - np.exp(-rate)) / TARGET[0]
    assert found.predicted is not None and abs(found.predicted - int(np.argmax(tail <= 1.0))) <= 2 < FRAMES
    assert found.predicted > FRAMES  # further back than this policy sees
    slow = 1.0 / np.maximum(np.arange(FRAMES), 1) ** 0.7
    assert history_length(linear(tmp_path / "q.onnx", slow), noise(2), FRAMES, TARGET).predicted is None


def test_frames_that_newer_ones_predict_are_not_needed(tmp_path) -> None:
    """The same weights on a signal that goes straight on: two frames say it all."""
    rng = np.random.default_rng(0)
    start, slope = rng.normal(size=(2, 4000, 1))
    x = (start - slope * np.arange(FRAMES)[::-1] / FRAMES).astype(np.float32)
    policy = linear(tmp_path / "p.onnx", 1.0 / np.maximum(np.arange(FRAMES), 1))
    found = history_length(policy, np.array_split(x, 4), FRAMES, TARGET)
    assert found.window == 2 and found.distortion[0] > 1.0


def test_a_policy_that_sees_positions_only_needs_the_frames_that_tell_its_velocity(tmp_path) -> None:
    """Learned from the cart-pole's policy: eight frames of two positions, the velocities left out."""
    teacher, workload, frames = Policy(resolve("models/cartpole.onnx")), get("cartpole"), 8
    runs = policy_rollouts(teacher, workload, 8, 3)
    windows, actions = [], []
    for x, y in zip(runs.observations, runs.actions, strict=True):
        places = np.stack([x[k : len(x) - frames + 1 + k, :2] for k in range(frames)], axis=1)
        windows.append(places.reshape(len(places), -1))
        actions.append(y[frames - 1 :])
    seen, wanted = np.concatenate(windows), np.concatenate(actions)
    rng = np.random.default_rng(0)
    spread = seen.std(axis=0)
    mixed, bias = rng.normal(size=(300, 2 * frames)) / spread / 6, rng.normal(size=300)
    features = np.tanh(seen @ mixed.T + bias)
    readout = np.linalg.solve(features.T @ features + 1e-3 * np.eye(300), features.T @ wanted)
    layers = [(mixed, bias), (readout.T, np.zeros(1))]
    student = Policy(save_mlp(tmp_path / "student.onnx", layers, "Tanh"))
    assert np.abs(student.batch(seen) - wanted).mean() < 0.75 * np.abs(wanted - wanted.mean(axis=0)).mean()
    target = np.array([0.5])  # N, of a range of 20
    found = history_length(student, windows, frames, target)
    assert found.distortion_99[0] > 1.0  # a single frame has no velocity
    assert 2 <= found.window <= frames
    assert found.sensitivity[0] > found.sensitivity[-1]


def test_the_command_measures_a_policy_that_drives_over_several_frames(tmp_path, capsys) -> None:
    path = tmp_path / "p.onnx"
    gains = np.array([[1.5, 18.0, 2.5, 3.5]])
    weight = np.concatenate([gains * share for share in (0.01, 0.04, 0.15, 0.8)], axis=1)
    save_mlp(path, [(weight, np.zeros(1))], clip=10.0)
    arguments = ["history-length", "--policy", str(path), "--workload", "cartpole", "--episodes", "4", "--json"]
    assert main([*arguments, "--distortion", "0.5"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["frames"] == 4 and 1 <= result["window"] <= 4 and len(result["distortion"]) == 4
    assert main(["history-length", "--policy", "models/cartpole.onnx", "--workload", "cartpole"]) == 2
    assert "--frames" in capsys.readouterr().err


def test_a_window_of_no_frames_is_refused(tmp_path) -> None:
    policy = linear(tmp_path / "p.onnx", np.ones(FRAMES))
    for frames in (1, 5):
        with pytest.raises(ConfigError, match=r"no .* frames"):
            history_length(policy, noise(0), frames, TARGET)
    with pytest.raises(ConfigError, match="positive"):
        history_length(policy, noise(0), FRAMES, np.array([0.0]))
