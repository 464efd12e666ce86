"""A quadruped that trots where it is told to, over flat and rough ground, and is pushed: sim/quadruped_walk.xml.

Who does what, as on a robot of this kind: joint servos hold the joints' targets, a state estimator tells the trunk's
attitude and velocity, the task layer gives the velocity command and the clock of the gait. The policy is in between, at
50 Hz: from trunk, command and clock to twelve joint targets. It needs no memory and no joint sensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.runtime.files import share_path

from .mujoco_lanes import MujocoLanes, lanes_workload
from .workloads import Parameter, Workload, WorkloadSpec, parametrised

Floats = NDArray[np.float64]

PERIOD_S = 0.02
CYCLE = 20  # control periods of one gait cycle: 2.5 Hz
LEGS = ("FL", "FR", "RL", "RR")
# Joint targets are STANCE + REACH * action, rad: hip, thigh, calf of every leg.
STANCE = np.tile([0.0, 0.85, -1.7], 4)
REACH = np.tile([0.5, 0.8, 0.8], 4)

SPEC = WorkloadSpec(
    name="quadruped_walk",
    observations=(
        # The direction of gravity in the trunk's frame: x is the sine of the pitch (nose down), -y that of the roll.
        Channel("trunk.gravity_x", "", -1.1, 1.1),
        Channel("trunk.gravity_y", "", -1.1, 1.1),
        Channel("trunk.roll_rate", "rad/s", -30.0, 30.0),
        Channel("trunk.pitch_rate", "rad/s", -30.0, 30.0),
        Channel("trunk.yaw_rate", "rad/s", -30.0, 30.0),
        # Of the trunk's centre over the ground, along its heading and to its left, as a state estimator gives it.
        Channel("trunk.forward_velocity", "m/s", -10.0, 10.0),
        Channel("trunk.left_velocity", "m/s", -10.0, 10.0),
        Channel("command.forward_velocity", "m/s", -1.0, 1.0),
        Channel("command.left_velocity", "m/s", -1.0, 1.0),
        Channel("command.yaw_rate", "rad/s", -1.0, 1.0),
        # The clock of the gait: which control period of its cycle this is.
        Channel("gait.step", "", 0.0, CYCLE - 1.0),
    ),
    actions=tuple(
        Channel(f"{leg}_{joint}.target", "", -1.0, 1.0) for leg in LEGS for joint in ("hip", "thigh", "calf")
    ),
    discrete=False,
    period_s=PERIOD_S,
    episode_steps=1000,
    context=("gait.step",),
    tolerance=0.0077,  # laws calibrate --policy models/quadruped_walk.onnx --workload quadruped_walk: docs/adr/0020
)
NOISE = np.array([0.004, 0.004, 0.02, 0.02, 0.02, 0.03, 0.03])  # standard deviations of the first seven
COMMAND_LOW, COMMAND_HIGH = np.array([-0.5, -0.25, -0.6]), np.array([0.8, 0.25, 0.6])
COMMAND_S = 3.0, 5.0  # a command stands for a time between these
COMMAND_SLEW = np.array([1.0, 1.0, 2.0]) * PERIOD_S  # m/s and rad/s per period: 1 m/s^2, 2 rad/s^2
PUSH_GAP_S = 1.0  # from the start of a push to that of the next: this and an exponential time of mean PUSH_MEAN_S
PUSH_MEAN_S = 3.0
PUSH_S = 0.1
TRACKING = 0.25  # squared error of velocity, (m/s)^2 and (rad/s)^2, that halves the reward
LOWEST_M = 0.15  # the episode ends when the trunk's centre is lower over the ground,
STEEPEST = 0.7  # or when it leans more: cosine of the angle between the trunk's z axis and the vertical

PARAMETERS = {
    "ground": Parameter(
        "mixed", "where an episode starts: on the plane, on the hills, or either", choices=("mixed", "flat", "rough")
    ),
    "push": Parameter(
        6.0, "impulse of every push, N s (6 changes the velocity of the whole robot by 0.5 m/s)", low=0.0, high=50.0
    ),
}


@cache
def load_model() -> Any:
    """The mujoco.MjModel of sim/quadruped_walk.xml; one for all, so copy it to change it.

    Its hills are noise smoothed over 0.5 m, always the same.
    """
    import mujoco

    model = mujoco.MjModel.from_xml_path(str(share_path("sim/quadruped_walk.xml")))
    height = np.random.default_rng(0).normal(size=(model.hfield_nrow[0], model.hfield_ncol[0]))
    for axis in (0, 0, 1, 1):
        height = np.sum([w * np.roll(height, k, axis) for k, w in zip(range(-2, 3), (1, 4, 6, 4, 1), strict=True)], 0)
    model.hfield_data[:] = np.clip(0.5 + 0.2 * height / height.std(), 0.0, 1.0).ravel()
    return model


def _spec(**values: Any) -> WorkloadSpec:
    return replace(SPEC, name=parametrised(SPEC.name, PARAMETERS, values))


class QuadrupedLanes(MujocoLanes):
    """The command given with observation k acts during [k + 1, k + 2) periods.

    The model never changes: an episode on rough ground is dropped somewhere on the hills, in any heading.

    Attributes:
        command: [lanes, 3] what the robot is told now: m/s ahead, m/s to the left, rad/s. pushes: [lanes] so far.
    """

    def __init__(self, lanes: int, threads: int = 0, *, ground: str = "mixed", push: float = 6.0) -> None:
        model = load_model()
        super().__init__(
            _spec(ground=ground, push=push), model, lanes, threads, noise=len(NOISE), inputs=["xfrc_applied"]
        )
        self._ground, self._push = ground, push
        self._trunk = model.body("trunk").id
        hills = model.geom("hills").id
        self._origin = model.geom_pos[hills] - [*model.hfield_size[0, :2], 0.0]
        self._cell = 2 * model.hfield_size[0, 0] / (model.hfield_ncol[0] - 1)
        self._hills = model.hfield_data.reshape(model.hfield_nrow[0], -1) * model.hfield_size[0, 2]
        self._middle = model.geom_pos[hills, :2].copy()
        self.command, self.pushes = np.zeros((lanes, 3)), np.zeros(lanes, np.int64)
        self._pending = np.zeros((lanes, 12))
        self._rough = np.zeros(lanes, bool)
        self._count = np.zeros(lanes, np.int64)
        self._mean = np.zeros((lanes, 3))
        self._target, self._next_target = np.zeros((lanes, 3)), np.zeros(lanes)
        self._pushed, self._push_ends, self._next_push = np.zeros(lanes, bool), np.zeros(lanes), np.zeros(lanes)

    def start(self, lane: int, rng: np.random.Generator) -> None:
        self._rough[lane] = self._ground == "rough" or (self._ground == "mixed" and rng.random() < 0.5)
        place, heading = rng.uniform(-5.0, 5.0, 2), rng.uniform(-np.pi, np.pi)
        x, y = self._middle + place if self._rough[lane] else place
        around = np.linspace(-0.25, 0.25, 9)
        grid_x, grid_y = np.meshgrid(x + around, y + around)
        ground = self._height(grid_x, grid_y, self._rough[lane]).max()
        self.qpos[lane] = [x, y, ground + 0.31, np.cos(heading / 2), 0.0, 0.0, np.sin(heading / 2), *STANCE]
        self._pending[lane], self._mean[lane], self._count[lane] = 0.0, 0.0, rng.integers(CYCLE)
        self.command[lane] = self._target[lane] = 0.0
        self._next_target[lane] = rng.uniform(0.5, 1.5)
        self.pushes[lane], self._pushed[lane], self._push_ends[lane] = 0, False, 0.0
        self._next_push[lane] = PUSH_GAP_S + rng.exponential(PUSH_MEAN_S)

    def act(self, actions: Floats) -> None:
        self._shove()
        self._steer()
        self._count[:] = (self._count + 1) % CYCLE
        self.ctrl[:] = STANCE + REACH * self._pending
        self._pending[:] = actions

    def judge(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Near one where the trunk moves as commanded, less an effort of 1e-4 per (N m)^2 summed over the joints.

        A trot sways; what counts is the velocity's running mean over about a gait cycle.
        """
        axes = self._axes()
        self._mean += (np.stack([*self._velocity(axes), self.qvel[:, 5]], axis=1) - self._mean) / CYCLE
        off = ((self._mean - self.command) ** 2).sum(axis=1)
        rewards = 1.0 / (1.0 + off / TRACKING) - 1e-4 * (self.sensors**2).sum(axis=1)
        height = self.qpos[:, 2] - self._height(self.qpos[:, 0], self.qpos[:, 1], self._rough)
        return rewards, (height < LOWEST_M) | (axes[2, 2] < STEEPEST)

    def observe(self, noise: Floats) -> Floats:
        axes = self._axes()
        felt = np.stack([*-axes[2, :2], *self.qvel[:, 3:].T[:3], *self._velocity(axes)], axis=1)
        return np.concatenate([felt + NOISE * noise, self.command, self._count[:, None]], axis=1)

    def _axes(self) -> Floats:
        """The rows of the trunk's rotation matrix [3, 3, lanes]: the world's x, y and z axes in the trunk's frame."""
        w, x, y, z = self.qpos[:, 3:7].T
        return np.array(
            [
                [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
            ]
        )

    def velocity(self) -> tuple[Floats, Floats]:
        """Horizontal velocity of the trunk along its heading and to the left [lanes], m/s."""
        return self._velocity(self._axes())

    def _velocity(self, axes: Floats) -> tuple[Floats, Floats]:
        x, y = axes[:2, 0]
        length = np.sqrt(x * x + y * y) + 1e-9
        vx, vy = self.qvel[:, 0], self.qvel[:, 1]
        return (x * vx + y * vy) / length, (x * vy - y * vx) / length

    def _height(self, x: Floats, y: Floats, rough: Any) -> Floats:
        """Height of the ground, m: of the plane, or between the four nearest points of the hills."""
        column = np.clip((x - self._origin[0]) / self._cell, 0, self._hills.shape[1] - 1.001)
        row = np.clip((y - self._origin[1]) / self._cell, 0, self._hills.shape[0] - 1.001)
        i, j = row.astype(int), column.astype(int)
        a, b = row - i, column - j
        z = self._hills
        near = (1 - a) * ((1 - b) * z[i, j] + b * z[i, j + 1]) + a * ((1 - b) * z[i + 1, j] + b * z[i + 1, j + 1])
        return np.where(rough, self._origin[2] + near, 0.0)

    def _shove(self) -> None:
        """Pulses of PUSH_S on the trunk's centre of mass, horizontal, in any direction."""
        ended = self.time > self._push_ends - PERIOD_S / 2
        for lane in np.flatnonzero(ended & self._pushed):
            self.xfrc[lane, self._trunk], self._pushed[lane] = 0.0, False
        for lane in np.flatnonzero(ended & (self.time >= self._next_push)):
            rng, now = self.rng[lane], self.time[lane]
            angle = rng.uniform(-np.pi, np.pi)
            self.xfrc[lane, self._trunk, :2] = self._push / PUSH_S * np.cos(angle), self._push / PUSH_S * np.sin(angle)
            self.pushes[lane] += 1
            self._pushed[lane], self._push_ends[lane] = True, now + PUSH_S
            self._next_push[lane] = now + PUSH_GAP_S + rng.exponential(PUSH_MEAN_S)

    def _steer(self) -> None:
        """A new velocity to reach now and then; the command follows it at a limited rate."""
        for lane in np.flatnonzero(self.time >= self._next_target):
            self._target[lane] = self.rng[lane].uniform(COMMAND_LOW, COMMAND_HIGH)
            self._next_target[lane] = self.time[lane] + self.rng[lane].uniform(*COMMAND_S)
        self.command += np.clip(self._target - self.command, -COMMAND_SLEW, COMMAND_SLEW)


def workload(**values: Any) -> Workload:
    """The quadruped on given ground, with pushes of a given impulse: see PARAMETERS."""
    return lanes_workload(_spec(**values), partial(QuadrupedLanes, **values))


WORKLOAD = workload(**{key: parameter.default for key, parameter in PARAMETERS.items()})


@dataclass(frozen=True)
class Gait:
    """The teacher's numbers, found by `benchmarks/quadruped.py --tune`.

    Lengths in m; feedback moves feet, in m per unit of what is wrong: m/s of velocity, rad/s of turning, or the sine
    of a tilt. A foot is on the ground for the share `duty` of the cycle, then in the air.

    Attributes:
        height: of the hips over the feet. lift: of a foot in the air. press: how much deeper a foot on the ground aims,
            so that the soft servos carry the weight. ahead, apart: feet ahead of their hips, and further out.
        stroke, swing: a foot's way on the ground and in the air, as a share of what the commanded speed asks for.
        brake_x, brake_y: feet on the ground move this way per m/s too fast, to slow the trunk down.
        place_x, place_y: feet in the air do, to land where they will.
        turn: feet turn about the trunk's centre per rad/s too fast.
        level_roll, level_pitch, damp_roll, damp_pitch: legs on the low or sinking side push harder.
        lean_x, lean_y, catch_x, catch_y: feet go where the trunk tilts, or is tilting, to.
    """

    height: float = 0.285
    lift: float = 0.1
    press: float = -0.0138
    duty: float = 0.615
    ahead: float = -0.0519
    apart: float = -0.0264
    stroke: float = 0.846
    swing: float = 1.54
    brake_x: float = 0.11
    brake_y: float = 0.0345
    place_x: float = -0.0812
    place_y: float = 0.0402
    turn: float = 0.0991
    level_roll: float = -0.246
    level_pitch: float = 0.065
    damp_roll: float = 0.0309
    damp_pitch: float = -0.0157
    lean_x: float = 0.0639
    lean_y: float = 0.0989
    catch_x: float = 0.00846
    catch_y: float = 0.00427


LEG_M = 0.213  # thigh and calf
HIP_M = 0.08  # from the hip's axis to the leg's plane
_SIDE = np.array([1.0, -1.0, 1.0, -1.0])  # left is positive
_HIP_X = 0.1881 * np.array([1.0, 1.0, -1.0, -1.0])
_FOOT_Y = (0.04675 + HIP_M) * _SIDE
_PHASE = np.array([0.0, 0.5, 0.5, 0.0])  # a trot: diagonal legs together


def teacher(gait: Gait | None = None) -> Callable[[NDArray[Any]], Floats]:
    """A trot by foot placement (Raibert 1986): observations [N, 11] to actions [N, 12], *before* they saturate.

    Feet follow the command through a fixed cycle and move by a matrix times what is wrong with the trunk, the joints by
    the slope of the leg's geometry at the foot's place in the cycle of a trot on the spot. So at each step of the clock
    the teacher is affine. With the geometry itself it is no better (docs/adr/0020-workload-figures.md).
    """
    g = gait or Gait()
    phase = (np.arange(CYCLE)[:, None] / CYCLE + _PHASE) % 1.0  # [CYCLE, 4], as the next four
    stance = phase < g.duty
    air = np.where(stance, 0.0, (phase - g.duty) / (1 - g.duty))
    # From +1, where a foot lands, to -1, where it leaves, times half the way that the ground makes meanwhile, in s.
    way = np.where(stance, g.stroke * (1 - 2 * phase / g.duty), -g.swing * np.cos(np.pi * air))
    way *= g.duty * CYCLE * PERIOD_S / 2
    lift = np.where(stance, -g.press, g.lift * np.sin(np.pi * air) ** 2)
    brake = np.stack([np.where(stance, g.brake_x, g.place_x), np.where(stance, g.brake_y, g.place_y)])

    def feet(step: NDArray[np.int64], velocity: Floats) -> Floats:
        """Where the feet should be from their hips' axes [N, 4, 3] for a command [N, 3]."""
        ahead, left, turn = velocity.T[:, :, None]
        x = g.ahead + way[step] * (ahead - turn * _FOOT_Y)
        y = (HIP_M + g.apart) * _SIDE + way[step] * (left + turn * _HIP_X)
        return np.stack([x, y, lift[step] - g.height], axis=2)

    on_the_spot = feet(np.arange(CYCLE), np.zeros((CYCLE, 3)))
    pose, nudge = _joints(on_the_spot), 1e-5 * np.eye(3)
    slope = np.stack([(_joints(on_the_spot + d) - _joints(on_the_spot - d)) / 2e-5 for d in nudge], axis=3)

    def act(observations: NDArray[Any]) -> Floats:
        seen = observations.astype(float)
        step = np.rint(seen[:, 10]).astype(int) % CYCLE
        gx, gy, roll_rate, pitch_rate, yaw_rate, forward, left, to_x, to_y, to_turn = seen.T[:10, :, None]
        fast_x, fast_y, fast_turn = forward - to_x, left - to_y, yaw_rate - to_turn
        x = brake[0, step] * fast_x - g.turn * fast_turn * _FOOT_Y + g.lean_x * gx + g.catch_x * pitch_rate
        y = brake[1, step] * fast_y + g.turn * fast_turn * _HIP_X + g.lean_y * gy - g.catch_y * roll_rate
        roll, pitch = g.damp_roll * roll_rate - g.level_roll * gy, g.damp_pitch * pitch_rate + g.level_pitch * gx
        z = np.where(stance[step], _FOOT_Y * roll - _HIP_X * pitch, 0.0)
        moved = feet(step, seen[:, 7:10]) - on_the_spot[step] + np.stack([x, y, z], axis=2)
        joints = pose[step] + np.einsum("nlij,nlj->nli", slope[step], moved)
        return (joints.reshape(-1, 12) - STANCE) / REACH

    return act


def _joints(feet: Floats) -> Floats:
    """Hip, thigh and calf angles [N, 4, 3] that put the feet at `feet` [N, 4, 3] from their hips' axes, knees back."""
    x, y, z = np.moveaxis(feet, 2, 0)
    down = np.sqrt(np.maximum(y * y + z * z - HIP_M**2, 0.1**2))  # in the leg's plane
    hip = np.arctan2(y, -z) - np.arctan2(HIP_M * _SIDE, down)
    reach = np.clip(x * x + down * down, 0.12**2, 0.42**2)
    calf = -np.arccos(reach / (2 * LEG_M**2) - 1)
    return np.stack([hip, np.arctan2(-x, down) - calf / 2, calf], axis=2)


# What `laws train quadruped_walk` does differently (build.cacheable.Recipe).
RECIPE: dict[str, Any] = {
    "hidden": 1024,
    "steps": 300,
    "learning_rate": 2e-5,
    "rounds": 1,
    "episodes": 48,
    "jitter": 0.5,
    "half_width": 1.0,
    "rounding": 0.2,
    "straight": True,
    "room": 3.0,
    "ridge": 1e-4,
    "fan_in": 32,
    "check_episodes": 100,
}
