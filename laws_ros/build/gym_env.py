"""Gymnasium environments as workloads: Box observations (flattened), Box or Discrete actions."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.core.errors import WorkloadError

from .workloads import Step, Workload, WorkloadSpec, index_action, vector_action

# Shares of each action's range, by `laws calibrate` with a policy of models/: docs/adr/0020-workload-figures.md
CALIBRATED = {"HalfCheetah-v5": 0.0035}
SUPPORTED = "supported are Box observations (flattened, no images) and Box or Discrete actions"


def workload(name: str) -> Workload:
    """The workload `gym:ENV_ID`.

    Raises:
        WorkloadError: unknown id, missing dependency, or spaces that are not supported.
    """
    env_id = name.partition(":")[2]
    env = _make(env_id)
    try:
        observed, acted = env.observation_space, env.action_space
        if not isinstance(observed, spaces.Box) or (observed.dtype == np.uint8 and len(observed.shape) > 1):
            raise WorkloadError(f"{name}: observation space {_brief(observed)} cannot be used; {SUPPORTED}")
        if isinstance(acted, spaces.Discrete):
            actions = tuple(Channel(f"action{int(acted.start) + i}") for i in range(int(acted.n)))
        elif isinstance(acted, spaces.Box):
            actions = _channels("u", acted)
        else:
            raise WorkloadError(f"{name}: action space {_brief(acted)} cannot be used; {SUPPORTED}")
        spec = WorkloadSpec(
            name=name,
            observations=_channels("x", observed),
            actions=actions,
            discrete=isinstance(acted, spaces.Discrete),
            period_s=_period(env),
            episode_steps=(env.spec and env.spec.max_episode_steps) or 1000,
            tolerance=CALIBRATED.get(env_id),
        )
    finally:
        env.close()
    return Workload(spec, partial(_GymSimulation, spec, env_id))


def drawn(workload: Workload) -> Workload:
    """The same, its simulations able to take a `picture`."""
    spec = workload.spec
    return Workload(spec, partial(_GymSimulation, spec, spec.name.partition(":")[2], render_mode="rgb_array"))


class _GymSimulation:
    def __init__(self, spec: WorkloadSpec, env_id: str, **options: Any) -> None:
        self._spec = spec
        # The time limit is the spec's; the simulation itself can run on.
        self._env = _make(env_id, max_episode_steps=-1, **options)
        self._steps = 0

    @property
    def time(self) -> float:
        """Simulated seconds since the reset."""
        return self._steps * self._spec.period_s

    def reset(self, seed: int) -> NDArray[np.float32]:
        self._steps = 0
        return _flat(self._env.reset(seed=seed)[0])

    def step(self, action: Any) -> Step:
        observation, reward, terminated, truncated, _ = self._env.step(self._command(action))
        self._steps += 1
        return Step(_flat(observation), float(reward), bool(terminated or truncated))

    def close(self) -> None:
        self._env.close()

    def picture(self) -> Any:
        """RGB [height, width, 3], of a `drawn` workload."""
        found = self._env.render()
        if found is None:
            raise WorkloadError(f"{self._spec.name}: the environment draws no pictures (no render mode rgb_array)")
        return found

    def _command(self, action: Any) -> Any:
        space = self._env.action_space
        if isinstance(space, spaces.Box):
            return vector_action(self._spec, action).reshape(space.shape).astype(space.dtype)
        return index_action(self._spec, action) + int(space.start)


def _make(env_id: str, **options: Any) -> Any:
    try:
        with _unlogged():
            return gymnasium.make(env_id, disable_env_checker=True, **options)
    except (gymnasium.error.DependencyNotInstalled, ModuleNotFoundError) as error:
        raise WorkloadError(f"gym:{env_id}: {_line(error)}; pip install 'gymnasium[all]' brings it") from None
    except gymnasium.error.Error as error:
        near = difflib.get_close_matches(env_id, list(gymnasium.registry), n=3)
        hint = f"; did you mean {' or '.join(f'gym:{n}' for n in near)}?" if near else ""
        raise WorkloadError(f"gym:{env_id}: {_line(error)}{hint}") from None


@contextmanager
def _unlogged() -> Iterator[None]:
    """Without MuJoCo's warnings about the environment's own model, which it prints, and logs into this folder, again
    for every simulation."""
    try:
        import mujoco
    except ModuleNotFoundError:
        yield
        return
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _line(error: Exception) -> str:
    """The first line of an error's message, without what Gymnasium itself suggests."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition(" Did you mean")[0].rstrip(".")


def _brief(space: Any) -> str:
    """A space in a few words: the text of a nested or large one can fill pages."""
    return f"{type(space).__name__}{space.shape} of {space.dtype}" if space.shape else type(space).__name__


def _channels(letter: str, space: spaces.Box) -> tuple[Channel, ...]:
    limits = zip(space.low.reshape(-1), space.high.reshape(-1), strict=True)
    # A channel that cannot vary has no range that a card could hold it to.
    return tuple(
        Channel(f"{letter}{i}", "", float(low), float(high)) if low < high else Channel(f"{letter}{i}")
        for i, (low, high) in enumerate(limits)
    )


def _period(env: Any) -> float:
    """Seconds per step: what the environment calls dt or tau, else its frame rate."""
    for name in ("dt", "tau"):
        value = getattr(env.unwrapped, name, None)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
    return 1.0 / float(env.metadata.get("render_fps") or 50)


def _flat(observation: Any) -> NDArray[np.float32]:
    return np.array(observation, dtype=np.float32).reshape(-1)  # a copy: some environments reuse their buffer
