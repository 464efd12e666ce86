"""The quadruped: its plant, its teacher, and training from a straight start."""

from __future__ import annotations

import numpy as np
import pytest

mujoco = pytest.importorskip("mujoco", reason="the quadruped needs mujoco: pip install mujoco")

from laws_ros.build import quadruped_walk as quadruped  # noqa: E402
from laws_ros.build.quadruped_walk import CYCLE, REACH, SPEC, STANCE, QuadrupedLanes, teacher, workload  # noqa: E402
from laws_ros.build.workloads import get, rollouts  # noqa: E402
from laws_ros.core.errors import WorkloadError  # noqa: E402

TORQUE = np.tile([23.7, 23.7, 35.5], 4)


def driven(**values):
    """A workload and the teacher's actions, cut to their limits."""
    act = teacher()
    return workload(**values), lambda x: np.clip(act(x), -1.0, 1.0)


def test_the_plant_has_its_data_sheets_mass_and_limits():
    model = quadruped.load_model()
    assert 11.5 < model.body_mass.sum() < 12.5 and model.nu == 12
    np.testing.assert_array_equal(model.actuator_forcerange[:, 1], TORQUE)
    ends = STANCE + REACH * np.array([[-1.0], [1.0]])
    joints = model.jnt_range[1:]
    assert (joints[:, 0] <= ends[0]).all() and (ends[1] <= joints[:, 1] + 0.013).all()  # calves end 0.012 rad earlier


def test_the_legs_geometry_is_the_models():
    model, rng = quadruped.load_model(), np.random.default_rng(0)
    data = mujoco.MjData(model)
    feet = np.stack([rng.uniform(-0.12, 0.12, 4), 0.08 * np.array([1, -1, 1, -1]), rng.uniform(-0.3, -0.2, 4)], axis=1)
    feet[:, 1] += rng.uniform(-0.06, 0.06, 4)
    data.qpos[3], data.qpos[7:] = 1.0, quadruped._joints(feet[None]).ravel()
    mujoco.mj_forward(model, data)
    for k, leg in enumerate(quadruped.LEGS):
        reached = data.geom(f"{leg}_foot").xpos - data.body(f"{leg}_hip").xpos
        np.testing.assert_allclose(reached, feet[k], atol=1e-9)


def test_the_hills_are_as_high_as_mujoco_has_them():
    robots = QuadrupedLanes(1, ground="rough")
    robots.reset([0], [0])
    data = robots.load(0, mujoco.MjData(robots.models[0]))
    rng, off = np.random.default_rng(1), []
    for x, y in robots.qpos[0, :2] + rng.uniform(-8.0, 8.0, (50, 2)):
        ground, hit = np.array([1, 0, 0, 0, 0, 0], np.uint8), np.zeros(1, np.int32)
        down = mujoco.mj_ray(robots.models[0], data, [x, y, 3.0], [0, 0, -1.0], ground, 1, 1, hit)
        off.append(3.0 - down - robots._height(np.array([x]), np.array([y]), True)[0])
    assert np.abs(off).max() < 0.01 and np.ptp(robots._hills) > 0.04


def test_it_stands_on_its_servos_and_the_servos_keep_to_their_limits():
    robots = QuadrupedLanes(4, push=0.0)
    robots.reset(range(4), range(4))
    for _ in range(100):
        step = robots.step(np.zeros((4, 12)))
        assert not step.terminated.any()
    assert np.abs(step.observations[:, :2]).max() < 0.15 and (robots.qvel**2).sum(axis=1).max() < 0.05
    rng, peak = np.random.default_rng(0), np.zeros(12)
    for _ in range(50):
        robots.step(rng.choice([-1.0, 1.0], (4, 12)))
        peak = np.maximum(peak, np.abs(robots.sensors).max(axis=0))
    assert (peak <= TORQUE + 1e-9).all() and (peak > 0.5 * TORQUE).all()


def test_a_command_acts_one_period_later():
    seen = []
    for action in (np.zeros((1, 12)), np.full((1, 12), 0.5)):
        robots = QuadrupedLanes(1)
        robots.reset([0], [5])
        seen.append([robots.step(action).observations, robots.step(action).observations])
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    assert np.abs(seen[0][1] - seen[1][1]).max() > 0.05


def test_a_push_has_the_impulse_that_it_says_and_a_huge_one_ends_the_episode():
    robots = QuadrupedLanes(3, ground="flat", push=50.0)
    robots.reset(range(3), range(3))
    impulse, fallen = np.zeros(3), np.zeros(3, bool)
    for _ in range(500):
        step = robots.step(np.zeros((3, 12)))
        force = np.hypot(*robots.xfrc[:, robots._trunk, :2].T)
        impulse += np.where(robots.pushes == 1, force, 0.0) * SPEC.period_s
        fallen |= step.terminated
    np.testing.assert_allclose(impulse, 50.0, rtol=1e-9)
    assert fallen.all()


def test_the_teacher_walks_as_told_and_survives_pushes():
    flat, act = driven(ground="flat", push=6.0)
    assert all(len(rewards) == SPEC.episode_steps for rewards in rollouts(flat, act, 8, seed=3).rewards)
    calm, act = driven(ground="flat", push=0.0)
    found = rollouts(calm, act, 8, seed=4)
    errors = []
    for x in found.observations:
        command, velocity = x[:, 7:10], x[:, [5, 6, 4]]
        for k in range(60, len(x) - CYCLE, CYCLE):
            if np.ptp(command[k - 50 : k + CYCLE], axis=0).max() == 0.0:
                errors.append(np.abs(velocity[k : k + CYCLE].mean(axis=0) - command[k]))
    assert len(errors) > 50 and (np.mean(errors, axis=0) < 0.1).all()
    assert np.mean(found.returns) > 0.85 * SPEC.episode_steps
    rough, act = driven(ground="rough", push=0.0)
    assert np.mean([len(rewards) for rewards in rollouts(rough, act, 8, seed=5).rewards]) > 800


def test_the_teacher_is_affine_at_every_step_of_the_clock():
    act, rng = teacher(), np.random.default_rng(0)
    x, move = np.zeros((2, 50, 11))
    x[:, :10], move[:, :10] = 0.1 * rng.normal(size=(50, 10)), rng.normal(size=(50, 10))
    x[:, 10] = rng.integers(CYCLE, size=50)
    assert np.abs(act(x + move) - 2 * act(x) + act(x - move)).max() < 1e-9
    later = x.copy()
    later[:, 10] = (x[:, 10] + 5) % CYCLE
    assert (np.abs(act(later) - act(x)).max(axis=1) > 0.1).all()  # and another one at each


def test_parameters_are_checked_and_named():
    assert get("quadruped_walk?ground=rough&push=0").spec.name == "quadruped_walk?ground=rough&push=0"
    with pytest.raises(WorkloadError, match="flat, rough"):
        get("quadruped_walk?ground=lava")


def test_a_straight_start_is_affine_in_every_context():
    torch = pytest.importorskip("torch", reason="training needs PyTorch: `make torch` adds it")
    from laws_ros.build.regularizers import certified_gap
    from laws_ros.build.straight import start_straight

    random = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 4, generator=random).clamp(-3, 3) * 0.4
    x[:, 3] = torch.randint(3, (4000,), generator=random) * 0.8 - 0.8
    gains = torch.randn(3, 3, 2, generator=random)
    y = torch.einsum("ni,nio->no", x[:, :3], gains[((x[:, 3] + 0.8) / 0.8).round().long()])
    boxes = torch.cat([0.3 * torch.eye(3), torch.zeros(1, 3)]).expand(50, -1, -1)
    rounding = []
    for how in ((1.0, 1e-3, 0), (2.0, 1e-4, 0), (2.0, 1e-4, 12)):
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 96), torch.nn.ReLU(), torch.nn.Linear(96, 96), torch.nn.ReLU(), torch.nn.Linear(96, 2)
        )
        start_straight(net, x, y, [3], random, *how)
        with torch.no_grad():
            # Another gain in each context, which one affine map cannot be, and yet no unit that bends in these boxes.
            assert (net(x) - y).square().mean().sqrt() < 0.1 * y.square().mean().sqrt()
            gap = certified_gap(net, x[:50] * torch.tensor([0.3, 0.3, 0.3, 1.0]), boxes)
            assert gap.relaxation.max() < 1e-5
            rounding.append(gap.rounding.max())
    assert rounding[2] < 0.7 * rounding[1]


def test_tiny_training(tmp_path):
    pytest.importorskip("torch", reason="training needs PyTorch: `make torch` adds it")
    from laws_ros.build.cacheable import Recipe
    from laws_ros.build.train import train
    from laws_ros.runtime.policy import Policy

    small = {"hidden": 192, "steps": 40, "rounds": 1, "episodes": 3, "check_episodes": 3, "parity_samples": 500}
    entry = train("quadruped_walk", tmp_path, recipe=Recipe(**{**quadruped.RECIPE, **small}), log=lambda line: None)
    card = Policy(tmp_path / "quadruped_walk.onnx").card
    assert card.context == ("gait.step",) and len(card.actions) == 12
    assert entry["policy_over_teacher"] > 0.8 and entry["parity"]["worst_action_difference"] < 1e-4
