"""The sorting cell: its physics, its sequencer, its teacher."""

from __future__ import annotations

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco", reason="workload tests need MuJoCo: pip install 'laws_ros[sim]'")

from laws_ros.build import arm_sort, workloads  # noqa: E402
from laws_ros.build.arm_sort import ACCELERATION, OVERRIDE, RELEASE, SPEC, TRANSFER, VELOCITY, ArmLanes  # noqa: E402


@pytest.fixture(scope="module")
def driven():
    """Four episodes under the teacher, with what the arm was told and did."""
    teacher, lanes = arm_sort.teacher(), ArmLanes(SPEC, 1.0, 4)
    seeds = [workloads.episode_seed(7, k) for k in range(4)]
    x, log = lanes.reset(range(4), seeds), []
    for _ in range(SPEC.episode_steps):
        step = lanes.step(teacher(x))
        log.append((x, lanes.ctrl.copy(), lanes.qvel.copy(), step.rewards))
        x = step.observations
    lanes.close()
    return [np.array(column) for column in zip(*log, strict=True)]


def test_teacher_places_parts_and_drops_none(driven):
    rewards = driven[3]
    assert set(np.unique(rewards)) == {0.0, 1.0}
    assert (rewards.sum(axis=0) >= 11).all()  # in 40 s


def test_limits_of_the_arm_are_respected(driven):
    _, ctrl, qvel, _ = driven
    model = arm_sort.load_model()
    assert (np.abs(np.diff(ctrl[:, :, :7], axis=0)) <= ACCELERATION * SPEC.period_s * (1 + 1e-9)).all()
    assert (np.abs(ctrl[:, :, :7]) <= OVERRIDE * VELOCITY + 1e-12).all()
    assert (np.abs(qvel[:, :, :7]) < VELOCITY).all()
    assert np.array_equal(model.actuator_ctrlrange[:7, 1], VELOCITY)
    assert np.array_equal(model.actuator_forcerange[:7, 1], [87, 87, 87, 87, 12, 12, 12])  # Nm, data sheet


def test_sequence_of_phases_and_stations(driven):
    x = driven[0]
    station, phase = x[..., -2], x[..., -1]
    assert ((station > 0) == ((phase == TRANSFER) | (phase == RELEASE))).all()
    changes = {(int(a), int(b)) for a, b in zip(phase[:-1].ravel(), phase[1:].ravel(), strict=True) if a != b}
    assert changes == {(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)}


def test_a_command_waits_for_the_delay():
    lanes = ArmLanes(SPEC, 1.0, 1)
    lanes.reset([0], [3])
    push = np.zeros((1, 8))
    push[0, 0] = 1.0
    seen = [lanes.step(push) and lanes.ctrl[0, 0] for _ in range(arm_sort.DELAY + 1)]
    assert seen[: arm_sort.DELAY] == [0.0] * arm_sort.DELAY
    assert seen[-1] == pytest.approx(ACCELERATION[0] * SPEC.period_s)
    lanes.close()


def test_a_part_that_is_let_go_on_the_way_counts_as_dropped():
    teacher, lanes = arm_sort.teacher(), ArmLanes(SPEC, 1.0, 1)
    x, rewards = lanes.reset([0], [5]), []
    for _ in range(400):
        action = teacher(x)
        if x[0, -1] == TRANSFER:
            action[0, 7] = 1.0
        step = lanes.step(action)
        x = step.observations
        rewards.append(step.rewards[0])
    assert min(rewards) == -1.0
    assert max(rewards) <= 0.0
    lanes.close()


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.5])
def test_bins_follow_the_zipf_law(exponent):
    chance = arm_sort.zipf(exponent)
    assert chance.sum() == pytest.approx(1.0)
    assert np.allclose(chance / chance[0], np.arange(1.0, 7.0) ** -exponent)
    lanes = ArmLanes(SPEC, exponent, 1)
    lanes.reset([0], [11])
    drawn = []
    for _ in range(3000):
        lanes._announce(0)
        drawn.append(lanes._next[0])
    count = np.bincount(drawn, minlength=6)
    assert (np.abs(count - 3000 * chance) < 4.5 * np.sqrt(3000 * chance * (1 - chance)) + 1).all()
    lanes.close()


def test_the_exponent_is_a_parameter():
    assert workloads.get("arm_sort?zipf=2").spec.name == "arm_sort?zipf=2"
    assert workloads.get("arm_sort").spec.name == "arm_sort"


def test_parts_differ_in_mass_and_friction():
    lanes = ArmLanes(SPEC, 1.0, 8)
    lanes.reset(range(8), range(8))
    mass = np.array([m.body("part").mass[0] for m in lanes.models])
    friction = np.array([m.geom("part").friction[0] for m in lanes.models])
    for values, (low, high) in ((mass, arm_sort.MASS_KG), (friction, arm_sort.FRICTION)):
        assert len(set(values)) == 8
        assert (values >= low).all()
        assert (values <= high).all()
    lanes.close()


def test_reach_points_the_tool_down_at_the_place():
    model = arm_sort.load_model()
    places = np.array([[0.5, 0.03, 0.12], [0.1, 0.5, 0.12], [0.46, -0.04, 0.025]])
    yaw = np.array([0.0, 1.2, 0.1])
    data = mujoco.MjData(model)
    for q, place, turn in zip(arm_sort.reach(model, places, yaw), places, yaw, strict=True):
        data.qpos[:7] = q
        mujoco.mj_forward(model, data)
        pose = data.site_xmat[0].reshape(3, 3)
        assert np.allclose(data.site_xpos[0], place, atol=1e-4)
        assert np.allclose(pose[:, 2], [0, 0, -1], atol=1e-3)
        assert np.allclose(pose[:, 0], [np.cos(turn), np.sin(turn), 0], atol=1e-3)
        joints = model.jnt_range[:7]
        assert (q > joints[:, 0]).all()
        assert (q < joints[:, 1]).all()
