"""The cart-pole of the main job: sim/cartpole.xml under random pushes, with sensor noise and an actuator delay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.runtime.files import share_path

from .workloads import Step, Workload, WorkloadSpec, vector_action

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
)
NOISE = np.array([0.001, 0.002, 0.01, 0.015])  # standard deviations of the sensors, in the observation's units
START = np.array([0.2, 0.05, 0.1, 0.1])  # an episode starts uniformly within +- this
RAIL_END = 1.75  # m; the episode ends when the cart is beyond
FALLEN = 0.8  # rad; the episode ends when the pole leans further
PUSHES_PER_S = 1.0
PUSH_S = 0.1
PUSH_N = {"cart": 6.0, "pole": 1.6}  # largest force on each body, at its centre of mass


def load_model() -> Any:
    """The mujoco.MjModel of sim/cartpole.xml."""
    import mujoco

    return mujoco.MjModel.from_xml_path(str(share_path("sim/cartpole.xml")))


class CartpoleSimulation:
    """The command given with observation k acts during [k + 1, k + 2) periods, as it does over a ROS topic.

    Attributes:
        model, data: MuJoCo's, for pictures; only this class changes them.
    """

    def __init__(self) -> None:
        import mujoco

        self._mujoco = mujoco
        self.model = load_model()
        self.data = mujoco.MjData(self.model)
        self._substeps = round(SPEC.period_s / self.model.opt.timestep)
        self._bodies = [(self.model.body(name).id, force) for name, force in PUSH_N.items()]

    @property
    def time(self) -> float:
        """Simulated seconds since the reset."""
        return float(self.data.time)

    def reset(self, seed: int) -> NDArray[np.float32]:
        # Two streams, so that the pushes of a seed do not depend on how many observations were drawn.
        self._push_rng, self._sensor_rng = np.random.default_rng(seed).spawn(2)
        self._mujoco.mj_resetData(self.model, self.data)
        start = self._push_rng.uniform(-START, START)
        self.data.qpos[:], self.data.qvel[:] = start[:2], start[2:]
        self._pending = 0.0
        self._push_ends = 0.0
        self._next_push = self._push_rng.exponential(1.0 / PUSHES_PER_S)
        return self._observe()

    def step(self, action: Any) -> Step:
        command = vector_action(SPEC, action)[0]
        self._push()
        self.data.ctrl[0] = self._pending
        self._mujoco.mj_step(self.model, self.data, nstep=self._substeps)
        self._pending = command
        position, angle = self.data.qpos
        reward = 1.0 / (1.0 + (position / 0.5) ** 2 + (angle / 0.1) ** 2)
        return Step(self._observe(), float(reward), bool(abs(position) > RAIL_END or abs(angle) > FALLEN))

    def close(self) -> None:
        pass

    def _observe(self) -> NDArray[np.float32]:
        noise = self._sensor_rng.normal(0.0, NOISE)
        return (np.concatenate([self.data.qpos, self.data.qvel]) + noise).astype(np.float32)

    def _push(self) -> None:
        """Poisson-timed pulses on the cart or the pole; one that would overlap the last is put off to its end."""
        now = self.data.time
        if now >= self._push_ends:
            self.data.xfrc_applied[:] = 0.0
        if now >= max(self._next_push, self._push_ends):
            body, force = self._bodies[self._push_rng.integers(len(self._bodies))]
            self.data.xfrc_applied[body, 0] = self._push_rng.uniform(-force, force)
            self._push_ends = now + PUSH_S
            self._next_push = now + self._push_rng.exponential(1.0 / PUSHES_PER_S)


WORKLOAD = Workload(SPEC, CartpoleSimulation)


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
