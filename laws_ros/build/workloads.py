"""What a policy is run on: a registry of workloads, and rollouts on many copies of one at once.

A workload is a name of its own, some with parameters ("cartpole", "arm_sort?zipf=1.5"), `gym:ENV_ID` for a Gymnasium
environment, or the path of a recorded bag, which can be learned from but not driven. Simulators are imported when a
workload is asked for, so listing the names needs none of them.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel
from laws_ros.core.errors import WorkloadError

if TYPE_CHECKING:
    from laws_ros.runtime.policy import Policy

# name -> (module with PARAMETERS and workload(**parameters), what it imports, one line of description)
_OWN = {
    "cartpole": (
        "laws_ros.build.cartpole",
        "mujoco",
        "MuJoCo cart-pole: balance under random pushes, sensor noise and one period of delay, 100 Hz, force in N",
    ),
    "arm_sort": (
        "laws_ros.build.arm_sort",
        "mujoco",
        "MuJoCo 7-joint arm with gripper: parts from a pick station into six bins drawn by a Zipf law, 50 Hz",
    ),
    "quadruped_walk": (
        "laws_ros.build.quadruped_walk",
        "mujoco",
        "MuJoCo quadruped of 12 kg: trots as commanded over flat and rough ground, pushed now and then, 50 Hz",
    ),
    "encounter": (
        "laws_ros.build.encounter",
        "numpy",
        "two aircraft meet, as the ACAS Xu networks of VNN-COMP see it: five advisories, 1 Hz, argmin",
    ),
}
_GYM = "gym:"
_BAG_SUFFIXES = (".mcap", ".db3")


@dataclass(frozen=True)
class Parameter:
    """One knob of a workload, as in "arm_sort?zipf=1.5": a number from low to high, one of `choices`, or any text."""

    default: float | str
    about: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def read(self, text: str, where: str) -> float | str:
        """The value that a user wrote.

        Raises:
            WorkloadError: no number, out of range, or none of the choices.
        """
        if self.choices:
            if text not in self.choices:
                raise WorkloadError(f"{where}: {text!r} is none of {', '.join(self.choices)}")
            return text
        if isinstance(self.default, str):
            return text
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not self.low <= value <= self.high:
            raise WorkloadError(f"{where}: {text!r} is no number from {self.low:g} to {self.high:g}")
        return value


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
        context: names of observations that are discrete (task, station, mode), as on a card.
        tolerance: error that the task stands, as a share of each action's range, from `laws calibrate`.
    """

    name: str
    observations: tuple[Channel, ...]
    actions: tuple[Channel, ...]
    discrete: bool
    period_s: float
    episode_steps: int
    context: tuple[str, ...] = ()
    tolerance: float | None = None


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


class BatchStep(NamedTuple):
    """One control period of all lanes: observations float32[lanes, n], rewards float64[lanes], terminated [lanes]."""

    observations: NDArray[np.float32]
    rewards: NDArray[np.float64]
    terminated: NDArray[np.bool_]


class BatchSimulation(Protocol):
    """Many running copies of a workload, the lanes, moved together; each as a Simulation with the same seed would."""

    def reset(self, lanes: Sequence[int], seeds: Sequence[int]) -> NDArray[np.float32]:
        """Start episodes on some lanes; returns their first observations float32[len(lanes), n]."""

    def step(self, actions: NDArray[Any], running: NDArray[np.bool_]) -> BatchStep:
        """Advance the lanes that are running by one period; what the others' rows hold means nothing.

        Args:
            actions: [lanes, m], or indices [lanes, 1] for a discrete workload.
        """

    def close(self) -> None: ...


@dataclass(frozen=True)
class Workload:
    """A spec and a factory of fresh simulations.

    Attributes:
        batch: (lanes, threads) -> BatchSimulation, where the workload has one of its own.
        lanes: how many simulations run side by side, unless told otherwise.
        recorded: of a bag: the observations float32[T, n] of every recorded stretch. It cannot be simulated.
    """

    spec: WorkloadSpec
    simulation: Callable[[], Simulation]
    batch: Callable[[int, int], BatchSimulation] | None = None
    lanes: int = 32
    recorded: tuple[NDArray[np.float32], ...] | None = None


def names() -> list[tuple[str, str]]:
    """Every workload's name and one line about it."""
    return [
        *((name, about) for name, (_, _, about) in _OWN.items()),
        (f"{_GYM}ENV_ID", "any Gymnasium environment with Box observations and Box or Discrete actions"),
        ("BAG", "a recorded bag (rosbag2 MCAP or sqlite3): observations to learn from, nothing to drive"),
    ]


def parameters(name: str) -> dict[str, Parameter]:
    """The parameters that a workload takes as NAME?KEY=VALUE&KEY=VALUE."""
    return _module(name).PARAMETERS if name in _OWN else {}


def get(name: str, policy: Policy | None = None) -> Workload:
    """The workload of that name.

    Args:
        policy: whose card tells what to read from a bag; only a bag needs it.

    Raises:
        WorkloadError: no such workload or parameter, spaces that are not supported, a bag that does not fit the
            policy's card, or a simulator or reader that is not installed.
    """
    if name.startswith(_GYM):
        try:
            from . import gym_env
        except ModuleNotFoundError as error:
            raise _missing(name, error, "gymnasium") from None
        return gym_env.workload(name)
    base, _, query = name.partition("?")
    if base not in _OWN and (Path(base).suffix in _BAG_SUFFIXES or Path(base).is_dir()):
        try:
            from . import bags
        except ModuleNotFoundError as error:
            raise _missing(name, error, "rosbags") from None
        if policy is None:
            raise WorkloadError(f"{name}: is a recording, which cannot be simulated; name a workload that can")
        return bags.workload(base, policy, _assigned(name, query, bags.PARAMETERS))
    if base not in _OWN:
        near = difflib.get_close_matches(base, _candidates(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise WorkloadError(f"workload {name!r} is unknown{hint} (known: {', '.join(n for n, _ in names())})")
    module = _module(base)
    workload: Workload = module.workload(**_assigned(name, query, module.PARAMETERS)) if query else module.WORKLOAD
    return workload


def parametrised(name: str, known: dict[str, Parameter], values: dict[str, Any]) -> str:
    """A workload's name with those of its parameters that differ from their defaults."""
    changed = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items() if v != known[k].default]
    return f"{name}?{'&'.join(changed)}" if changed else name


def module(name: str) -> Any:
    """The module of one of our own workloads: PARAMETERS, workload(**parameters), and where it can be trained also
    teacher() and RECIPE (build.cacheable). None for every other name."""
    base = name.partition("?")[0]
    return _module(base) if base in _OWN else None


def _assigned(name: str, query: str, known: dict[str, Parameter]) -> dict[str, float | str]:
    """Every parameter's value: as the query says, else its default."""
    values = {key: parameter.default for key, parameter in known.items()}
    for pair in filter(None, query.split("&")):
        key, _, text = pair.partition("=")
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise WorkloadError(f"workload {name!r}: unknown parameter {key!r}; {takes}")
        values[key] = known[key].read(text, f"workload {name!r}: {key}")
    return values


def _module(name: str) -> Any:
    module, needs, _ = _OWN[name]
    try:
        import_module(needs)
    except ModuleNotFoundError as error:
        raise _missing(name, error, needs) from None
    return import_module(module)


def _candidates() -> list[str]:
    """Names that a misspelt one may have meant."""
    try:
        from gymnasium import registry
    except ModuleNotFoundError:
        registry = {}
    return [*_OWN, *(f"{_GYM}{env_id}" for env_id in registry)]


def _missing(name: str, error: ModuleNotFoundError, package: str) -> WorkloadError:
    return WorkloadError(f"workload {name!r}: {error.name} is not installed; pip install {package}")


def vector_action(spec: WorkloadSpec, action: Any) -> NDArray[np.float64]:
    """An action vector [m] cut to its limits, for `Simulation.step`.

    Raises:
        WorkloadError: wrong length, or not finite.
    """
    return vector_actions(spec, np.asarray(action, dtype=float).reshape(1, -1))[0]


def vector_actions(spec: WorkloadSpec, actions: Any) -> NDArray[np.float64]:
    """Action vectors [N, m] cut to their limits, for `BatchSimulation.step`; errors as for `vector_action`."""
    vectors = np.asarray(actions, dtype=float)
    if vectors.ndim != 2 or vectors.shape[1] != len(spec.actions) or not np.isfinite(vectors).all():
        wrong = vectors if vectors.ndim != 2 else vectors[~np.isfinite(vectors).all(axis=1)][:1]
        raise WorkloadError(
            f"{spec.name}: action {(wrong if len(wrong) else vectors[:1])[0].tolist()}: {len(spec.actions)} finite "
            "values are needed"
        )
    return np.clip(vectors, *_limits(spec))


@lru_cache(maxsize=16)
def _limits(spec: WorkloadSpec) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.array([c.low for c in spec.actions]), np.array([c.high for c in spec.actions])


def index_action(spec: WorkloadSpec, action: Any) -> int:
    """The alternative that an action chooses, for `Simulation.step` of a discrete workload.

    Raises:
        WorkloadError: not one whole number, or no alternative.
    """
    given = np.asarray(action).reshape(-1)
    if given.shape != (1,) or given[0] not in range(len(spec.actions)):
        raise WorkloadError(f"{spec.name}: action {action!r} is no index from 0 to {len(spec.actions) - 1}")
    return int(given[0])


class Rollouts(NamedTuple):
    """Episodes: for each, what was observed float32[T, n], done float32[T, m] and earned float64[T]."""

    observations: list[NDArray[np.float32]]
    actions: list[NDArray[np.float32]]
    rewards: list[NDArray[np.float64]]

    @property
    def returns(self) -> NDArray[np.float64]:
        """The sum of rewards of every episode."""
        return np.array([r.sum() for r in self.rewards])

    def chosen(self, which: Sequence[int]) -> Rollouts:
        """Some of the episodes."""
        seen, done, earned = self
        return Rollouts([seen[k] for k in which], [done[k] for k in which], [earned[k] for k in which])


def rollouts(
    workload: Workload,
    policy: Callable[[NDArray[np.float32]], NDArray[Any]],
    episodes: int,
    seed: int,
    lanes: int | None = None,
    *,
    first: int = 0,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Rollouts:
    """Run a policy for a number of episodes, several simulations in lockstep.

    Episode k is a function of (seed, k) alone, not of `lanes`, `threads` or `first`, as long as the policy treats the
    rows of a batch alone. So any machine can run any range of episodes, and the ranges joined are what one machine
    would have run: `Parts` does so through a folder that they share.

    Args:
        policy: maps a batch of observations [N, n] to actions [N, m]; for a discrete workload to indices [N, 1].
        lanes: how many simulations run side by side; by default the workload's.
        first: number of the first episode.
        threads: for the physics of a batched simulation, by default one per core that this process may use.
        progress: told the numbers of episodes that are over and of steps done, once per step of all lanes.

    Returns:
        Rollouts, episode by episode.
    """
    if workload.recorded is not None:
        raise WorkloadError(f"{workload.spec.name}: is a recording, which cannot be simulated")
    spec = workload.spec
    lanes = min(lanes or workload.lanes, episodes)
    threads = _cores() if threads is None else threads
    simulation = batched(workload)(lanes, threads if threads > 1 and lanes > 1 else 0)
    log: list[tuple[NDArray[Any], ...]] = []  # of every step: the episode of each row, observations, actions, rewards
    try:
        episode = np.arange(first, first + lanes)
        current = simulation.reset(range(lanes), [episode_seed(seed, int(k)) for k in episode])
        length = np.zeros(lanes, int)
        running = np.ones(lanes, bool)
        following, steps, over = first + lanes, 0, 0
        padded: NDArray[np.float32] | None = None
        while running.any():
            rows = slice(None) if running.all() else np.flatnonzero(running)
            actions = np.array(policy(current[rows]), dtype=np.float32)
            if padded is None:
                padded = np.zeros((lanes, *actions.shape[1:]), np.float32)
            padded[rows] = actions
            step = simulation.step(padded, running)
            log.append((episode[rows].copy(), current[rows], actions, step.rewards[rows]))
            current = step.observations
            length += running
            steps += len(actions)
            ended = np.flatnonzero(running & (step.terminated | (length >= spec.episode_steps)))
            over += len(ended)
            fresh = ended[: max(0, first + episodes - following)]
            if len(fresh):
                episode[fresh] = np.arange(following, following + len(fresh))
                following += len(fresh)
                current[fresh] = simulation.reset(fresh.tolist(), [episode_seed(seed, int(k)) for k in episode[fresh]])
                length[fresh] = 0
            running[ended[len(fresh) :]] = False
            progress(over, steps)
    finally:
        simulation.close()
    owner, *columns = (np.concatenate(column) for column in zip(*log, strict=True))
    order = np.argsort(owner, kind="stable")
    ends = np.cumsum(np.bincount(owner - first, minlength=episodes))
    return Rollouts(*([column[order[a:b]] for a, b in pairwise((0, *ends))] for column in columns))


def batched(workload: Workload) -> Callable[[int, int], BatchSimulation]:
    """(lanes, threads) -> BatchSimulation: the workload's own, else one of single simulations in a row."""
    return workload.batch or (lambda lanes, threads: _Stacked(workload, lanes))


class _Stacked:
    """Single simulations as a batch."""

    def __init__(self, workload: Workload, lanes: int) -> None:
        self._spec = workload.spec
        self._simulations = [workload.simulation() for _ in range(lanes)]

    def reset(self, lanes: Sequence[int], seeds: Sequence[int]) -> NDArray[np.float32]:
        return np.stack([self._simulations[lane].reset(seed) for lane, seed in zip(lanes, seeds, strict=True)])

    def step(self, actions: NDArray[Any], running: NDArray[np.bool_]) -> BatchStep:
        lanes = len(self._simulations)
        observations = np.zeros((lanes, len(self._spec.observations)), np.float32)
        rewards, terminated = np.zeros(lanes), np.zeros(lanes, bool)
        for lane in np.flatnonzero(running):
            action = int(actions[lane, 0]) if self._spec.discrete else actions[lane]
            observations[lane], rewards[lane], terminated[lane] = self._simulations[lane].step(action)
        return BatchStep(observations, rewards, terminated)

    def close(self) -> None:
        for simulation in self._simulations:
            simulation.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def episode_seed(seed: int, episode: int) -> int:
    """The seed of one episode: a mixed 32-bit number, so that neighbouring seeds share no episodes."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])
