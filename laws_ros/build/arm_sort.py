"""Sorting with a 7-joint arm: sim/arm_sort.xml, one part after the other from a pick station into one of six bins.

Around the policy is what a cell has: a sequencer that knows the task's phase from measured quantities (tool position
from the encoders, gripper opening), and the arm's joint velocity interface (delay, acceleration limits, velocity
servos with torque limits). The policy itself is a memoryless function of the observation.

    approach -> descend -> grasp -> lift -> transfer -> release -> approach ...      (grasped nothing: -> approach)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.runtime.files import share_path

from .mujoco_lanes import MujocoLanes, lanes_workload
from .workloads import Parameter, Workload, WorkloadSpec, parametrised

Floats = NDArray[np.float64]

APPROACH, DESCEND, GRASP, LIFT, TRANSFER, RELEASE = range(6)
BINS = 6
ARM = slice(0, 7)  # of qpos and qvel; then two fingers, then the part
FINGERS = slice(7, 9)
PART = slice(9, 16)

# The Panda's data sheet: velocity limits in rad/s and acceleration limits in rad/s^2; and the share of the former that
# an action of 1 commands, as an integrator would set it for a cell.
VELOCITY = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
ACCELERATION = np.array([15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0])
OVERRIDE = 0.7
OPEN_M = 0.08
DELAY = 2  # control periods between an observation and the start of its command; the servos take about one more

SPEC = WorkloadSpec(
    name="arm_sort",
    observations=(
        *(Channel(f"joint{k}.position", "rad", -3.9, 3.9) for k in range(1, 8)),
        *(Channel(f"joint{k}.velocity", "rad/s", -5.0, 5.0) for k in range(1, 8)),
        Channel("gripper.opening", "m", -0.02, 0.1),
        Channel("target.x", "m", -1.0, 1.0),
        Channel("target.y", "m", -1.0, 1.0),
        Channel("station", "", 0.0, BINS),  # 0: the pick station, k: bin k
        Channel("phase", "", 0.0, RELEASE),
    ),
    actions=(*(Channel(f"joint{k}.velocity", "", -1.0, 1.0) for k in range(1, 8)), Channel("gripper", "", -1.0, 1.0)),
    discrete=False,
    period_s=0.02,
    episode_steps=2000,
    context=("station", "phase"),
    tolerance=0.0042,  # laws calibrate --policy models/arm_sort.onnx --workload arm_sort: docs/adr/0009-workloads.md
)
NOISE = np.array([0.0005] * 7 + [0.01] * 7 + [0.0003] + [0.0005] * 2)  # sensors' standard deviations

PICK = np.array([0.5, 0.0])  # m, the station's middle
JITTER_M, JITTER_RAD = 0.04, 0.1  # a part lies within +- this
VISION_M = 0.001  # standard deviation of where the camera sees it
MASS_KG, FRICTION = (0.05, 0.5), (0.6, 1.2)  # a part's, drawn uniformly
HALF_HEIGHT = 0.025  # of a part, m
HOVER_M, GRASP_M = 0.12, 0.025  # height of the tool above the table
SETTLE_S = 0.6  # after the gripper has let go, until the part is looked at, and the next one lies at the station
CLOSED_S = 0.3  # the gripper has this long to close
EMPTY_M = 0.03  # an opening below this holds nothing
GRASPS = 3  # attempts before a part counts as dropped

PARAMETERS = {
    "zipf": Parameter(1.0, "exponent of the Zipf law by which parts are drawn for bins", low=0.0, high=8.0),
    "seconds": Parameter(40.0, "length of an episode; one part takes about three", low=1.0, high=600.0),
}


@cache
def load_model() -> Any:
    """The mujoco.MjModel of sim/arm_sort.xml; one for all, so copy it to change it."""
    return mujoco.MjModel.from_xml_path(str(share_path("sim/arm_sort.xml")))


def bin_positions(model: Any) -> Floats:
    """[BINS, 3]: x and y of every bin's middle in m, and its angle about z in rad."""
    bodies = [model.body(f"bin{k}") for k in range(1, BINS + 1)]
    return np.array([[*b.pos[:2], 2.0 * np.arctan2(b.quat[3], b.quat[0])] for b in bodies])


def zipf(exponent: float) -> Floats:
    """[BINS]: the probability of every bin, proportional to rank ** -exponent."""
    weight = np.arange(1.0, BINS + 1) ** -exponent
    return np.asarray(weight / weight.sum())


class ArmLanes(MujocoLanes):
    """Reward: +1 for a part that lies in its bin, -1 for one that does not, given SETTLE_S after its release.

    Attributes:
        phase, station: [lanes] the task's context.
    """

    def __init__(self, spec: WorkloadSpec, exponent: float, lanes: int, threads: int = 0) -> None:
        model = load_model()
        super().__init__(spec, model, lanes, threads, noise=len(NOISE), own_models=True)
        self._data = mujoco.MjData(model)
        self._part = model.body("part").id, model.geom("part").id
        self._inertia = model.body_inertia[self._part[0]] / model.body_mass[self._part[0]]
        self._bins = bin_positions(model)
        self._chance = zipf(exponent)
        self.phase, self.station = np.zeros(lanes, int), np.zeros(lanes, int)
        self._bin = np.zeros(lanes, int)  # where the part goes, or went if it is not yet looked at; from 0
        self._next = np.zeros(lanes, int)  # and the following one
        self._part_at = np.zeros((lanes, 2))  # where the camera sees the part, or the one to come
        self._since = np.zeros(lanes)  # time at which the phase began
        self._grasps = np.zeros(lanes, int)
        self._looked = np.zeros(lanes)  # time at which the released part is looked at; infinite if there is none
        self._arriving = np.zeros((lanes, 3))  # x, y, yaw of the part to come
        self._commands = np.zeros((lanes, DELAY, len(spec.actions)))  # on their way, oldest first
        self._target = np.zeros((lanes, 2))

    # ------------------------------------------------------------------------------------------------- episode

    def start(self, lane: int, rng: np.random.Generator) -> None:
        self.qpos[lane, ARM] = HOME + rng.uniform(-0.1, 0.1, 7)
        self.qpos[lane, FINGERS] = 0.5 * OPEN_M
        self._commands[lane] = 0.0
        self._commands[lane, :, 7] = 1.0
        self.phase[lane], self._since[lane], self._looked[lane] = APPROACH, 0.0, np.inf
        self._announce(lane)
        self._arrive(lane)
        self._aim()

    def act(self, actions: Floats) -> None:
        step = ACCELERATION * self.spec.period_s
        wanted = self._commands[:, 0]
        change = wanted[:, :7] * (OVERRIDE * VELOCITY) - self.ctrl[:, ARM]
        # all joints are held back alike, so that the direction of motion stays
        self.ctrl[:, ARM] += change / np.maximum(1.0, (np.abs(change) / step).max(axis=1, keepdims=True))
        self.ctrl[:, 7] = 0.5 * OPEN_M * (1.0 + wanted[:, 7])
        self._commands[:, :-1] = self._commands[:, 1:]
        self._commands[:, -1] = actions

    def judge(self) -> tuple[Floats, NDArray[np.bool_]]:
        reward = self._look()
        self._sequence(reward)
        self._aim()
        return reward, np.zeros(self.lanes, bool)

    def observe(self, noise: Floats) -> Floats:
        opening = self.qpos[:, FINGERS].sum(axis=1, keepdims=True)
        sensed = np.concatenate([self.qpos[:, ARM], self.qvel[:, ARM], opening, self._target], axis=1)
        return np.concatenate([sensed + NOISE * noise, self.station[:, None], self.phase[:, None]], axis=1)

    # ------------------------------------------------------------------------------------------------ the task

    def _sequence(self, reward: Floats) -> None:
        """The cell's sequencer: one transition at most, on what it measures."""
        tool, moving = self.sensors[:, :3], np.abs(self.sensors[:, 3:6]).max(axis=1)
        aside = np.abs(tool[:, :2] - self._target).max(axis=1)
        opening = self.qpos[:, FINGERS].sum(axis=1)
        there = np.isinf(self._looked)
        lasted = self.time - self._since
        phase = self.phase
        begin = np.full(self.lanes, -1)
        begin[(phase == APPROACH) & there & (aside < 0.02) & (opening > 0.065) & (moving < 0.2)] = DESCEND
        begin[(phase == DESCEND) & (tool[:, 2] < GRASP_M + 0.012) & (aside < 0.02)] = GRASP
        begin[(phase == GRASP) & (lasted > CLOSED_S)] = LIFT
        begin[(phase == LIFT) & (tool[:, 2] > HOVER_M - 0.03)] = TRANSFER
        begin[(phase == TRANSFER) & (aside < 0.04) & (moving < 0.2)] = RELEASE
        begin[(phase == RELEASE) & (opening > 0.06) & (lasted > 0.1)] = APPROACH
        empty = ((phase == LIFT) | (phase == TRANSFER)) & (opening < EMPTY_M)
        begin[empty] = APPROACH
        for lane in np.flatnonzero(empty | (begin == APPROACH)).tolist():
            if not empty[lane]:
                self._looked[lane] = self.time[lane] + SETTLE_S
                self._bin[lane] = self._next[lane]
                self._announce(lane)
            elif self._grasps[lane] < GRASPS and self._at_station(lane):
                self._see(lane, self.qpos[lane, PART])
            else:
                reward[lane] -= 1.0
                self._announce(lane)
                self._arrive(lane)
        changed = begin >= 0
        self._grasps += changed & (begin == GRASP)
        self._since[changed] = self.time[changed]
        phase[changed] = begin[changed]

    def _look(self) -> Floats:
        """Judge parts that were released, and bring the next ones."""
        reward = np.zeros(self.lanes)
        for lane in np.flatnonzero(self.time >= self._looked).tolist():
            x, y, angle = self._bins[self._bin[lane]]
            dx, dy = self.qpos[lane, PART][:2] - (x, y)
            along = np.abs([dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)])
            reward[lane] = 1.0 if along.max() < 0.075 and self.qpos[lane, PART][2] < 0.05 else -1.0
            self._looked[lane] = np.inf
            self._arrive(lane)
        return reward

    def _announce(self, lane: int) -> None:
        """Draw the next part; the camera sees it on its way."""
        rng = self.rng[lane]
        self._arriving[lane] = [*(PICK + rng.uniform(-JITTER_M, JITTER_M, 2)), rng.uniform(-JITTER_RAD, JITTER_RAD)]
        self._next[lane] = rng.choice(BINS, p=self._chance)
        self._grasps[lane] = 0
        self._see(lane, self._arriving[lane])

    def _see(self, lane: int, at: Floats) -> None:
        self._part_at[lane] = at[:2] + VISION_M * self.rng[lane].standard_normal(2)

    def _at_station(self, lane: int) -> bool:
        x, y, z = self.qpos[lane, PART][:3]
        return bool(max(abs(x - PICK[0]), abs(y - PICK[1])) < JITTER_M + 0.02 and abs(z - HALF_HEIGHT) < 0.01)

    def _arrive(self, lane: int) -> None:
        """The next part lies at the station: another mass, another friction."""
        rng, model, (body, geom) = self.rng[lane], self.models[lane], self._part
        x, y, yaw = self._arriving[lane]
        self.qpos[lane, PART] = [x, y, HALF_HEIGHT, np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2)]
        self.qvel[lane, 9:] = 0.0
        mass = rng.uniform(*MASS_KG)
        model.body_mass[body], model.body_inertia[body] = mass, mass * self._inertia
        model.geom_friction[geom, 0] = rng.uniform(*FRICTION)
        mujoco.mj_setConst(model, self._data)

    def _aim(self) -> None:
        bound = (self.phase == TRANSFER) | (self.phase == RELEASE)
        self.station[:] = np.where(bound, self._next + 1, 0)
        self._target[:] = np.where(bound[:, None], self._bins[self._next, :2], self._part_at)


HOME = np.array([0.0, -0.3, 0.0, -2.3, 0.0, 2.0, 0.785])


def workload(zipf: float, seconds: float) -> Workload:
    """The cell.

    Args:
        zipf: exponent of the law by which parts are drawn for bins; 0 draws them evenly.
        seconds: length of an episode.
    """
    name = parametrised("arm_sort", PARAMETERS, {"zipf": zipf, "seconds": seconds})
    spec = replace(SPEC, name=name, episode_steps=round(seconds / SPEC.period_s))
    return lanes_workload(spec, partial(ArmLanes, spec, zipf))


WORKLOAD = workload(**{key: float(parameter.default) for key, parameter in PARAMETERS.items()})


# ------------------------------------------------------------------------------------------------------ the teacher

GAIN = 5.0  # 1/s
PREDICT_S = 0.05  # delay that the teacher looks ahead
GRIP = 0.9  # within the limits of its action: a constant that no limit bends


def reach(model: Any, places: Floats, yaw: Floats) -> Floats:
    """Joint positions [N, 7] that hold the tool at places [N, 3] in m, pointing down, turned by yaw [N] about z.

    Damped least squares from HOME, with what is left of the freedom used to stay near it.
    """
    data, site = mujoco.MjData(model), model.site("tool").id
    jacobian, found = np.zeros((6, model.nv)), np.zeros((len(places), 7))
    for k, (place, turn) in enumerate(zip(places, yaw, strict=True)):
        q = HOME.copy()
        q[0] = np.arctan2(place[1], place[0])
        want = np.array([[np.cos(turn), np.sin(turn), 0.0], [np.sin(turn), -np.cos(turn), 0.0], [0.0, 0.0, -1.0]])
        for _ in range(60):
            data.qpos[ARM] = q
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, jacobian[:3], jacobian[3:], site)
            is_ = data.site_xmat[site].reshape(3, 3)
            turned = 0.5 * np.cross(is_.T, want.T).sum(axis=0)
            error = np.concatenate([place - data.site_xpos[site], turned])
            j = jacobian[:, ARM]
            inverse = j.T @ np.linalg.inv(j @ j.T + 1e-6 * np.eye(6))
            rest = HOME - q
            rest[0] = 0.0
            q = q + inverse @ error + 0.5 * (np.eye(7) - inverse @ j) @ rest
        found[k] = q
    return found


# What `laws train arm_sort` does otherwise than by default (build.cacheable.Recipe).
RECIPE = {
    "steps": 5000,
    "learning_rate": 1e-3,
    "rounds": 2,
    "episodes": 16,
    "jitter": 0.15,
    "boxes": 8,
    "half_width": 3.0,
    "relaxation": 0.05,
    "check_episodes": 100,
}


def teacher() -> Callable[[NDArray[Any]], Floats]:
    """Each joint goes to the phase's goal at a speed in proportion to what is left: observations [N, 19] to actions
    [N, 8], *before* they saturate. Goals at the pick station are a polynomial in the target's position."""
    model = load_model()
    grid = PICK + 1.5 * JITTER_M * np.array([[i, j] for i in np.linspace(-1, 1, 7) for j in np.linspace(-1, 1, 7)])
    heights = np.array([HOVER_M, GRASP_M])
    goals = [reach(model, np.c_[grid, np.full(len(grid), h)], np.zeros(len(grid))) for h in heights]
    pick = np.stack([np.linalg.lstsq(_cubic(grid), goal, rcond=None)[0] for goal in goals])  # [2, terms, 7]
    bins = bin_positions(model)
    bins = reach(model, np.c_[bins[:, :2], np.full(BINS, HOVER_M)], bins[:, 2])
    height = np.array([0, 1, 1, 0, 0, 0])

    def command(observations: NDArray[Any]) -> Floats:
        x = np.asarray(observations, dtype=float)
        station, phase = x[:, -2].round().astype(int), x[:, -1].round().astype(int)
        goal = np.einsum("nt,ntj->nj", _cubic(x[:, 15:17]), pick[height[phase]])
        goal = np.where(station[:, None] > 0, bins[station - 1], goal)
        speed = GAIN * (goal - x[:, :7] - PREDICT_S * x[:, 7:14])
        closed = (phase == GRASP) | (phase == LIFT) | (phase == TRANSFER)
        return np.concatenate([speed / (OVERRIDE * VELOCITY), np.where(closed, -GRIP, GRIP)[:, None]], axis=1)

    return command


def _cubic(places: Floats) -> Floats:
    """[N, 10]: the terms up to third order of places [N, 2] around the station's middle."""
    x, y = ((places - PICK) / JITTER_M).T
    return np.stack([x**i * y**j for i in range(4) for j in range(4 - i)], axis=1)
