"""Many copies of one MuJoCo workload in lockstep: one call of `mujoco.rollout` per control period moves all of them.

A workload subclasses MujocoLanes and writes its task (start, delay, pushes, reward, sensors) in NumPy over lanes; no
Python runs per lane and period, nor inside the physics. Its single `Simulation` is the same class with one lane.

    act(actions) -> physics, substeps in C on a pool of threads -> judge() -> observe(noise)

An episode's bits depend on its seed alone, not on the other lanes, the number of lanes or threads, as long as what the
subclass computes for one lane does not depend on how many there are: elementwise NumPy does not, a BLAS product may.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mujoco
import numpy as np
from mujoco import rollout
from numpy.typing import NDArray

from .workloads import BatchStep, Step, Workload, WorkloadSpec, vector_action, vector_actions

Floats = NDArray[np.float64]

NOISE_BLOCK = 128  # control periods whose noise is drawn at once for a lane
_FULL = mujoco.mjtState.mjSTATE_FULLPHYSICS


class MujocoLanes(ABC):
    """Base class of a workload's simulation. A subclass implements start, act, judge and observe.

    Attributes:
        lanes: how many copies. models: the model of each lane (the same object, unless `own_models`).
        time: [lanes] s. qpos: [lanes, nq]. qvel: [lanes, nv]. Views of the physics state: writing to them moves bodies.
        ctrl: [lanes, nu]; xfrc: [lanes, nbody, 6] if asked for; `inputs` has these and the others by name. They stay as
            they are until written again.
        sensors: [lanes, nsensordata], the MJCF sensors at the start of the last substep (after `start`: at the start).
        rng: each lane's generator for what happens now and then; the sensors' noise has a stream of its own, so that
            events do not depend on how many sensors there are.
    """

    def __init__(
        self,
        spec: WorkloadSpec,
        model: Any,
        lanes: int,
        threads: int = 0,
        *,
        noise: int = 0,
        inputs: Sequence[str] = (),
        own_models: bool = False,
    ) -> None:
        """Args:
        threads: of the pool; 0 runs on the calling thread.
        noise: how many standard normals `observe` gets for a lane and period.
        inputs: MuJoCo's inputs beside ctrl: "xfrc_applied", "qfrc_applied", "eq_active", "mocap_pos", "mocap_quat".
        own_models: every lane has a copy of the model, which `start` may randomise (it must write every field anew).
        """
        self.spec, self.lanes, self.substeps = spec, lanes, round(spec.period_s / model.opt.timestep)
        self.models = [copy.copy(model) for _ in range(lanes)] if own_models else [model] * lanes
        self._scratch = [mujoco.MjData(model) for _ in range(max(1, threads))]
        self._pool = rollout.Rollout(nthread=threads)
        self._initial, views = _rows(model, self._scratch[0], ["time", "qpos", "qvel"], int(_FULL))
        self._state = np.repeat(self._initial[None], lanes, axis=0)
        self.time = self._state[:, 0]
        self.qpos, self.qvel = self._state[:, views["qpos"]], self._state[:, views["qvel"]]
        names = sorted({"ctrl", *inputs}, key=_bit)
        self._input_bits = sum(_bit(name) for name in names)
        self._neutral, views = _rows(model, self._scratch[0], names, self._input_bits)
        self._inputs = np.repeat(self._neutral[None], lanes, axis=0)
        self.inputs = {name: self._inputs[:, views[name]] for name in names}
        self.ctrl = self.inputs["ctrl"]
        if "xfrc_applied" in names:
            self.xfrc = self.inputs["xfrc_applied"].reshape(lanes, model.nbody, 6)
        self.sensors = np.zeros((lanes, model.nsensordata))
        self.rng = [np.random.default_rng(0)] * lanes
        self._sensor_rng = list(self.rng)
        # Row `_turn` is everyone's next noise; a lane's block began, and is drawn anew, at the row `_began`.
        self._noise = np.zeros((NOISE_BLOCK, lanes, noise))
        self._turn, self._began = 0, np.zeros(lanes, int)
        shape = (lanes, self.substeps)
        self._controls = np.zeros((*shape, self._inputs.shape[1]))
        self._states = np.zeros((*shape, self._state.shape[1]))
        self._sensed = np.zeros((*shape, model.nsensordata))
        self._everyone = np.arange(lanes)

    # --------------------------------------------------------------------------------- what a workload implements

    @abstractmethod
    def start(self, lane: int, rng: np.random.Generator) -> None:
        """Begin an episode on a lane whose physics and inputs are as the MJCF file has them: draw what is random, set
        every array of the task. Once per episode, so plain Python is fine."""

    @abstractmethod
    def act(self, actions: Floats) -> None:
        """Write the inputs of the coming period from the commands [lanes, m], which lie within their limits."""

    @abstractmethod
    def judge(self) -> tuple[Floats, NDArray[np.bool_]]:
        """Rewards [lanes] of the period that is over, and which lanes' episodes end with it [lanes]."""

    @abstractmethod
    def observe(self, noise: Floats) -> Floats:
        """Observations [lanes, n], a new array; `noise` [lanes, k] are fresh standard normals. Changes nothing."""

    # ------------------------------------------------------------------------------------------ BatchSimulation

    def reset(self, lanes: Sequence[int], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Start episodes on some lanes; their first observations [len(lanes), n]."""
        for lane, seed in zip(lanes, seeds, strict=True):
            self.rng[lane], self._sensor_rng[lane] = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
            self._state[lane], self._inputs[lane] = self._initial, self._neutral
            self._draw(lane)
            self.start(lane, self.rng[lane])
            if self.sensors.shape[1]:
                self.sensors[lane] = self.load(lane, self._scratch[0]).sensordata
        return self.observe(self._noise[self._turn]).astype(np.float32)[list(lanes)]

    def step(self, actions: NDArray[Any], running: NDArray[np.bool_] | None = None) -> BatchStep:
        """One control period of the lanes that run; the others stand still until they are reset, and what they return
        means nothing."""
        self.act(vector_actions(self.spec, actions))
        rows = self._everyone if running is None or running.all() else np.flatnonzero(running)
        self._advance(rows)
        rewards, terminated = self.judge()
        self._turn = (self._turn + 1) % NOISE_BLOCK
        for lane in np.flatnonzero(self._began == self._turn):
            self._draw(int(lane))
        return BatchStep(self.observe(self._noise[self._turn]).astype(np.float32), rewards, terminated)

    def close(self) -> None:
        self._pool.close()

    def load(self, lane: int, data: Any) -> Any:
        """Put a lane's state into an mjData and evaluate it there (for pictures); returns the mjData."""
        model = self.models[lane]
        mujoco.mj_setState(model, data, self._state[lane], int(_FULL))
        mujoco.mj_setState(model, data, self._inputs[lane], self._input_bits)
        mujoco.mj_forward(model, data)
        return data

    def _advance(self, rows: NDArray[np.intp]) -> None:
        k = len(rows)
        everyone = k == self.lanes
        state = self._state if everyone else self._state[rows]
        controls, states, sensed = self._controls[:k], self._states[:k], self._sensed[:k]
        controls[:] = (self._inputs if everyone else self._inputs[rows])[:, None]
        self._pool.rollout(
            self.models if everyone else [self.models[row] for row in rows],
            self._scratch,
            state,
            controls,
            control_spec=self._input_bits,
            nstep=self.substeps,
            state=states,
            sensordata=sensed,
            skip_checks=True,
        )
        where = slice(None) if everyone else rows
        self._state[where] = states[:, -1]
        self.sensors[where] = sensed[:, -1]

    def _draw(self, lane: int) -> None:
        """The next block of standard normals of a lane, from now on."""
        block = self._sensor_rng[lane].standard_normal((NOISE_BLOCK, self._noise.shape[2]))
        rest = NOISE_BLOCK - self._turn
        self._noise[self._turn :, lane], self._noise[: self._turn, lane] = block[:rest], block[rest:]
        self._began[lane] = self._turn


class OneLane:
    """A workload's single simulation: its batched one with one lane.

    Attributes:
        lanes: the MujocoLanes behind it.
    """

    def __init__(self, factory: Callable[[int, int], MujocoLanes]) -> None:
        self.lanes = factory(1, 0)

    @property
    def time(self) -> float:
        """Simulated seconds since the reset."""
        return float(self.lanes.time[0])

    def reset(self, seed: int) -> NDArray[np.float32]:
        return self.lanes.reset([0], [seed])[0]

    def step(self, action: Any) -> Step:
        found = self.lanes.step(vector_action(self.lanes.spec, action)[None])
        return Step(found.observations[0], float(found.rewards[0]), bool(found.terminated[0]))

    def close(self) -> None:
        self.lanes.close()


def lanes_workload(spec: WorkloadSpec, factory: Callable[[int, int], MujocoLanes], lanes: int = 128) -> Workload:
    """The workload of a factory (lanes, threads) -> MujocoLanes.

    Args:
        lanes: side by side by default: as many as make a period some milliseconds of physics, beside which NumPy's
            calls and the waking of threads are little (docs/adr/0020-workload-figures.md).
    """
    return Workload(spec, partial(OneLane, factory), factory, lanes)


def _bit(name: str) -> int:
    """The mjtState bit of an mjData field; a state vector holds its fields in the order of their bits."""
    return int(getattr(mujoco.mjtState, f"mjSTATE_{name.upper()}"))


def _rows(model: Any, data: Any, names: Sequence[str], bits: int) -> tuple[Floats, dict[str, slice]]:
    """A fresh mjData's state vector of these bits, and where the named fields (the vector's first) lie in it."""
    values = np.zeros(mujoco.mj_stateSize(model, bits))
    mujoco.mj_getState(model, data, values, bits)
    ends = np.cumsum([0, *(mujoco.mj_stateSize(model, _bit(name)) for name in names)])
    return values, {name: slice(*ends[k : k + 2]) for k, name in enumerate(names)}
