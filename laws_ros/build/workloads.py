"""What a policy is run on: a registry of simulated workloads, and rollouts on many copies of one at once.

A workload is a name of its own ("cartpole") or `gym:ENV_ID` for a Gymnasium environment. Simulators are imported when
a workload is asked for, so listing the names needs none of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.core.errors import WorkloadError

# name -> (module with a WORKLOAD, what it imports, one line of description)
_OWN = {
    "cartpole": (
        "laws_ros.build.cartpole",
        "mujoco",
        "MuJoCo cart-pole: balance under random pushes, sensor noise and one period of delay, 100 Hz, force in N",
    )
}
_GYM = "gym:"


class Step(NamedTuple):
    """What one control period led to: the next observation float32[n], its reward, and whether the episode is over."""

    observation: NDArray[np.float32]
    reward: float
    terminated: bool


@dataclass(frozen=True)
class WorkloadSpec:
    """What a workload observes and accepts.

    Attributes:
        actions: the action vector; if `discrete`, one channel per alternative, as on a decision's card.
        discrete: `Simulation.step` takes the index of an alternative instead of an action vector.
        period_s: one control step.
        episode_steps: an episode is cut off after this many.
    """

    name: str
    observations: tuple[Channel, ...]
    actions: tuple[Channel, ...]
    discrete: bool
    period_s: float
    episode_steps: int


class Simulation(Protocol):
    """One running copy of a workload; everything random in it is drawn from the seed of its last reset."""

    @property
    def time(self) -> float:
        """Simulated seconds since the reset."""

    def reset(self, seed: int) -> NDArray[np.float32]:
        """Start an episode; returns a fresh array, the first observation float32[n]."""

    def step(self, action: Any) -> Step:
        """Advance one period. Actions beyond their limits are cut to them.

        Raises:
            WorkloadError: an action of the wrong length, not finite, or an index that is no alternative.
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class Workload:
    """A spec and a factory of fresh simulations."""

    spec: WorkloadSpec
    simulation: Callable[[], Simulation]


def names() -> list[tuple[str, str]]:
    """Every workload's name and one line about it."""
    own = [(name, about) for name, (_, _, about) in _OWN.items()]
    return [*own, (f"{_GYM}ENV_ID", "any Gymnasium environment with Box observations and Box or Discrete actions")]


def get(name: str) -> Workload:
    """The workload of that name.

    Raises:
        WorkloadError: no such workload, one whose spaces are not supported, or its simulator is not installed.
    """
    if name.startswith(_GYM):
        try:
            from . import gym_env
        except ModuleNotFoundError as error:
            raise _missing(name, error, "gymnasium") from None
        return gym_env.workload(name)
    if name not in _OWN:
        near = difflib.get_close_matches(name, [*_OWN, *(f"{_GYM}{own}" for own in _OWN)], n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise WorkloadError(f"workload {name!r} is unknown{hint} (known: {', '.join(n for n, _ in names())})")
    module, needs, _ = _OWN[name]
    try:
        import_module(needs)
    except ModuleNotFoundError as error:
        raise _missing(name, error, needs) from None
    workload: Workload = import_module(module).WORKLOAD
    return workload


def _missing(name: str, error: ModuleNotFoundError, package: str) -> WorkloadError:
    return WorkloadError(f"workload {name!r}: {error.name} is not installed; pip install {package}")


def vector_action(spec: WorkloadSpec, action: Any) -> NDArray[np.float64]:
    """An action vector [m] cut to its limits, for `Simulation.step`.

    Raises:
        WorkloadError: wrong length, or not finite.
    """
    vector = np.asarray(action, dtype=float).reshape(-1)
    if vector.shape != (len(spec.actions),) or not np.isfinite(vector).all():
        raise WorkloadError(f"{spec.name}: action {action!r}: {len(spec.actions)} finite values are needed")
    return np.clip(vector, [c.low for c in spec.actions], [c.high for c in spec.actions])


class Rollouts(NamedTuple):
    """Episodes: for each, what was observed float32[T, n], done float32[T, m] and earned float64[T]."""

    observations: list[NDArray[np.float32]]
    actions: list[NDArray[np.float32]]
    rewards: list[NDArray[np.float64]]

    @property
    def returns(self) -> NDArray[np.float64]:
        """The sum of rewards of every episode."""
        return np.array([r.sum() for r in self.rewards])


def rollouts(
    workload: Workload,
    policy: Callable[[NDArray[np.float32]], NDArray[Any]],
    episodes: int,
    seed: int,
    lanes: int = 32,
) -> Rollouts:
    """Run a policy for a number of episodes, several simulations in lockstep.

    Episode k depends on (seed, k) only, not on `lanes`, as long as the policy treats the rows of a batch alone.

    Args:
        policy: maps a batch of observations [N, n] to actions [N, m]; for a discrete workload to indices [N, 1].
        lanes: how many simulations run side by side.

    Returns:
        Rollouts, episode by episode.
    """
    spec = workload.spec
    lanes = min(lanes, episodes)
    found: list[tuple[list[Any], list[Any], list[float]]] = [([], [], []) for _ in range(episodes)]
    simulations = [workload.simulation() for _ in range(lanes)]
    try:
        running = {lane: lane for lane in range(lanes)}  # lane -> episode
        current = {lane: simulations[lane].reset(episode_seed(seed, lane)) for lane in running}
        following = lanes
        while running:
            order = list(running)
            actions = np.array(policy(np.stack([current[lane] for lane in order])), dtype=np.float32)
            for lane, action in zip(order, actions, strict=True):
                episode = running[lane]
                seen, done, earned = found[episode]
                seen.append(current[lane])
                done.append(action)
                current[lane], reward, terminated = simulations[lane].step(int(action[0]) if spec.discrete else action)
                earned.append(reward)
                if terminated or len(earned) >= spec.episode_steps:
                    del running[lane]
                    if following < episodes:
                        running[lane] = following
                        current[lane] = simulations[lane].reset(episode_seed(seed, following))
                        following += 1
    finally:
        for simulation in simulations:
            simulation.close()
    return Rollouts(
        [np.stack(seen) for seen, _, _ in found],
        [np.stack(done) for _, done, _ in found],
        [np.array(earned) for _, _, earned in found],
    )


def episode_seed(seed: int, episode: int) -> int:
    """The seed of one episode: a mixed 32-bit number, so that neighbouring seeds share no episodes."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
