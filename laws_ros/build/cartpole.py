"""The cart-pole of the main job: sim/cartpole.xml under random pushes, with sensor noise and an actuator delay."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.runtime.files import share_path

from .mujoco_lanes import MujocoLanes, lanes_workload
from .workloads import Parameter, Workload, WorkloadSpec

SPEC = WorkloadSpec(
    name="cartpole",
    observations=(
        Channel("slider.position", "m", -2.0, 2.0),
        Channel("hinge.position", "rad", -1.6, 1.6),
        Channel("slider.velocity", "m/s", -10.0, 10.0),
        Channel("hinge.velocity", "rad/s", -30.0, 30.0),
    ),
    actions=(Channel("slider.effort", "N", -10.0, 10.0),),
    discrete=False,
    period_s=0.01,
    episode_steps=1000,
    tolerance=0.0168,  # laws calibrate --policy models/cartpole.onnx --workload cartpole: docs/adr/0009-workloads.md
)
NOISE = np.array([0.001, 0.002, 0.01, 0.015])  # standard deviations of the sensors, in the observation's units
START = np.array([0.2, 0.05, 0.1, 0.1])  # an episode starts uniformly within +- this
RAIL_END = 1.75  # m; the episode ends when the cart is beyond
FALLEN = 0.8  # rad; the episode ends when the pole leans further
PUSHES_PER_S = 1.0
PUSH_S = 0.1
PUSH_N = {"cart": 6.0, "pole": 1.6}  # largest force on each body, at its centre of mass


@cache
def load_model() -> Any:
    """The mujoco.MjModel of sim/cartpole.xml; one for all, so copy it to change it."""
    import mujoco

    return mujoco.MjModel.from_xml_path(str(share_path("sim/cartpole.xml")))


class CartpoleLanes(MujocoLanes):
    """The command given with observation k acts during [k + 1, k + 2) periods, as it does over a ROS topic."""

    def __init__(self, lanes: int, threads: int = 0) -> None:
        model = load_model()
        super().__init__(SPEC, model, lanes, threads, noise=len(NOISE), inputs=["xfrc_applied"])
        self._bodies = [(model.body(name).id, force) for name, force in PUSH_N.items()]
        self._pending = np.zeros((lanes, 1))
        self._pushed, self._push_ends, self._next_push = np.zeros(lanes, bool), np.zeros(lanes), np.zeros(lanes)

    def start(self, lane: int, rng: np.random.Generator) -> None:
        start = rng.uniform(-START, START)
        self.qpos[lane], self.qvel[lane] = start[:2], start[2:]
        self._pending[lane] = 0.0
        self._pushed[lane], self._push_ends[lane] = False, 0.0
        self._next_push[lane] = rng.exponential(1.0 / PUSHES_PER_S)

    def act(self, actions: NDArray[np.float64]) -> None:
        self._push()
        self.ctrl[:] = self._pending
        self._pending[:] = actions

    def judge(self) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        position, angle = self.qpos.T
        reward = 1.0 / (1.0 + (position / 0.5) ** 2 + (angle / 0.1) ** 2)
        return reward, (np.abs(position) > RAIL_END) | (np.abs(angle) > FALLEN)

    def observe(self, noise: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.concatenate([self.qpos, self.qvel], axis=1) + NOISE * noise

    def _push(self) -> None:
        """Poisson-timed pulses on the cart or the pole; one that would overlap the last is put off to its end."""
        ended = self.time >= self._push_ends
        for lane in np.flatnonzero(ended & self._pushed):
            self.xfrc[lane], self._pushed[lane] = 0.0, False
        for lane in np.flatnonzero(ended & (self.time >= self._next_push)):
            rng, now = self.rng[lane], self.time[lane]
            body, force = self._bodies[rng.integers(len(self._bodies))]
            self.xfrc[lane, body, 0] = rng.uniform(-force, force)
            self._pushed[lane], self._push_ends[lane] = True, now + PUSH_S
            self._next_push[lane] = now + rng.exponential(1.0 / PUSHES_PER_S)


PARAMETERS: dict[str, Parameter] = {}


def workload() -> Workload:
    """The cart-pole; it has no parameters."""
    return lanes_workload(SPEC, CartpoleLanes, lanes=512)


WORKLOAD = workload()


# The teacher: u = -K x of the linear-quadratic regulator, except that the cart's predicted excursion (where it will be
# EXCURSION_S later) counts for at most EXCURSION_M. A far cart then never asks for more lean than 10 N can catch:
# docs/adr/0002-cartpole-training.md compares it with the plain regulator.
STATE_COST = np.array([4.0, 16.0, 1.0, 1.0])
ACTION_COST = 0.03
EXCURSION_S = 0.3
EXCURSION_M = 0.4


def teacher() -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """Optimal control on the MuJoCo model: observations [N, 4] to forces [N, 1] in N, *before* they saturate."""
    import mujoco
    from scipy.linalg import solve_discrete_are

    model = load_model()
    a, b = np.zeros((4, 4)), np.zeros((4, 1))
    mujoco.mjd_transitionFD(model, mujoco.MjData(model), 1e-6, True, a, b, None, None)
    period_a, period_b = np.eye(4), np.zeros((4, 1))
    for _ in range(round(SPEC.period_s / model.opt.timestep)):
        period_a, period_b = a @ period_a, a @ period_b + b
    value = solve_discrete_are(period_a, period_b, np.diag(STATE_COST), np.array([[ACTION_COST]]))
    gain = np.linalg.solve(ACTION_COST + period_b.T @ value @ period_b, period_b.T @ value @ period_a)[0]
    # The regulator is designed without the actuator's delay: with it the closed loop must still be stable.
    delayed = np.block([[period_a, period_b], [-gain[None, :], np.zeros((1, 1))]])
    assert np.abs(np.linalg.eigvals(delayed)).max() < 0.99

    def force(observations: NDArray[Any]) -> NDArray[np.float64]:
        excursion = observations[:, 0] + EXCURSION_S * observations[:, 2]
        beyond = excursion - np.clip(excursion, -EXCURSION_M, EXCURSION_M)
        return (gain[0] * beyond - observations @ gain)[:, None]

    return force
