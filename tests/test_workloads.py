"""One contract for every workload, and what the registry refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from laws_ros.build import workloads
from laws_ros.build.parts import rollouts_in_parts
from laws_ros.core.errors import WorkloadError

pytest.importorskip("mujoco", reason="workload tests need MuJoCo: pip install 'laws_ros[sim]'")
gymnasium = pytest.importorskip("gymnasium", reason="workload tests need Gymnasium: pip install 'laws_ros[gym]'")

ALL = [
    *(name for name, _ in workloads.names()[:-2]),  # all but gym: and bags, so that a new one is held to it, too
    *("arm_sort?zipf=1.5", "quadruped_walk?ground=rough"),
    *("gym:CartPole-v1", "gym:Pendulum-v1", "gym:MountainCarContinuous-v0"),
]
STEPS = 60


@pytest.fixture(scope="module", params=ALL)
def workload(request):
    found = workloads.get(request.param)
    return replace(found, spec=replace(found.spec, episode_steps=min(STEPS, found.spec.episode_steps)))


def some_policy(spec):
    """A policy that does something else everywhere, in range, row by row the same whatever the batch."""
    weights = np.random.default_rng(3).normal(size=len(spec.observations)).astype(np.float32)

    def policy(x):
        y = (x * weights).sum(axis=1, keepdims=True)
        if spec.discrete:
            return (y > 0.0).astype(np.float32) * (len(spec.actions) - 1)
        return np.tanh(y) * np.array([c.high for c in spec.actions], np.float32)

    return policy


def equal(a, b):
    return all(
        len(x) == len(y) and all(np.array_equal(p, q) for p, q in zip(x, y, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def test_spec_and_one_rollout(workload):
    spec = workload.spec
    assert spec.period_s > 0
    assert spec.episode_steps > 0
    assert len({c.name for c in spec.observations}) == len(spec.observations)
    assert set(spec.context) <= {c.name for c in spec.observations}
    found = workloads.rollouts(workload, some_policy(spec), episodes=3, seed=0)
    low, high = np.array([(c.low, c.high) for c in spec.observations]).T
    for seen, done, earned in zip(*found, strict=True):
        steps = len(earned)
        assert 0 < steps <= spec.episode_steps
        assert seen.shape == (steps, len(spec.observations))
        assert done.shape == (steps, 1 if spec.discrete else len(spec.actions))
        assert (seen.dtype, done.dtype, earned.dtype) == (np.float32, np.float32, np.float64)
        assert np.isfinite(seen).all()
        assert np.isfinite(earned).all()
        assert (seen >= low).all()
        assert (seen <= high).all()


def test_same_seed_same_bits_whatever_the_lanes_and_threads(workload):
    policy = some_policy(workload.spec)
    one = workloads.rollouts(workload, policy, episodes=4, seed=5, lanes=1)
    assert equal(one, workloads.rollouts(workload, policy, episodes=4, seed=5, lanes=3, threads=2))
    assert not equal(one, workloads.rollouts(workload, policy, episodes=4, seed=6, lanes=3))


def test_a_lane_that_starts_later_meets_the_same_noise():
    """Longer than a block of noise, and the fourth episode begins in the middle of one."""
    pytest.importorskip("scipy", reason="the teachers need SciPy: `make torch` adds it")
    cartpole = workloads.get("cartpole")
    cartpole = replace(cartpole, spec=replace(cartpole.spec, episode_steps=200))
    policy = workloads.module("cartpole").teacher()
    one, three = (workloads.rollouts(cartpole, policy, episodes=4, seed=5, lanes=lanes) for lanes in (1, 3))
    assert equal(one, three) and all(len(rewards) == 200 for rewards in one.rewards)
    assert all(not np.array_equal(x[:70], x[128:198]) for x in one.observations)


def test_the_batch_is_as_many_single_simulations(workload):
    if workload.batch is None:
        pytest.skip("this workload has no batch of its own; single simulations are stacked")
    policy = some_policy(workload.spec)
    single = replace(workload, batch=None)
    assert equal(*(workloads.rollouts(w, policy, episodes=3, seed=8) for w in (workload, single)))


def test_any_range_of_episodes_can_be_run_alone(workload, tmp_path):
    policy = some_policy(workload.spec)
    whole = workloads.rollouts(workload, policy, episodes=5, seed=5)
    assert equal(whole.chosen([3, 4]), workloads.rollouts(workload, policy, episodes=2, seed=5, first=3))
    runs = []

    def counted(x):
        runs.append(len(x))
        return policy(x)

    def in_parts(episodes):
        return rollouts_in_parts(workload, counted, episodes, 5, tmp_path, "some policy", part=2)

    assert equal(whole, in_parts(5))
    runs.clear()
    assert equal(whole, in_parts(5)) and not runs
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert equal(whole, in_parts(5)) and runs


def test_progress_counts_to_the_end(workload):
    seen = []
    found = workloads.rollouts(
        workload, some_policy(workload.spec), episodes=3, seed=0, lanes=2, progress=lambda *now: seen.append(now)
    )
    assert seen[-1] == (3, sum(len(r) for r in found.rewards)) and seen == sorted(seen)


def test_simulation_restarts_and_shares_no_buffers(workload):
    simulation, other = workload.simulation(), workload.simulation()
    first = simulation.reset(1)
    kept = first.copy()
    assert simulation.time == 0.0
    action = 0 if workload.spec.discrete else np.zeros(len(workload.spec.actions))
    seen = [simulation.step(action).observation for _ in range(5)]
    assert simulation.time == pytest.approx(5 * workload.spec.period_s)
    assert np.array_equal(first, kept)
    assert not any(np.shares_memory(a, b) for i, a in enumerate(seen) for b in seen[:i])
    other.reset(2)
    other.step(action)  # must not disturb the first
    assert np.array_equal(simulation.reset(1), kept)
    assert all(np.array_equal(simulation.step(action).observation, s) for s in seen)
    simulation.close()
    other.close()


def test_actions_saturate_and_bad_ones_are_refused(workload):
    spec, simulation = workload.spec, workload.simulation()
    simulation.reset(1)
    if spec.discrete:
        bad = [len(spec.actions), -1, 0.5, [0, 0], float("nan")]
    else:
        high = np.array([c.high for c in spec.actions])
        runs = []
        for action in (high, 100.0 * high):
            simulation.reset(1)
            runs.append([simulation.step(action).observation for _ in range(5)])
        assert np.array_equal(*runs)
        bad = [np.full(len(high), np.nan), np.zeros(len(high) + 1), np.full(len(high), np.inf)]
    for action in bad:
        with pytest.raises(WorkloadError, match=re.escape(spec.name)):
            simulation.step(action)
    simulation.close()


def test_cartpole_command_acts_one_period_later():
    workload = workloads.get("cartpole")
    pushed, idle = workload.simulation(), workload.simulation()
    for simulation in (pushed, idle):
        simulation.reset(7)
    seen = [(pushed.step([10.0]).observation, idle.step([0.0]).observation) for _ in range(3)]
    assert np.array_equal(*seen[0])
    assert seen[1][0][2] - seen[1][1][2] == pytest.approx(10.0 / 1.2 * 0.01, rel=0.2)  # m/s after one period of 10 N


def test_cartpole_falls_without_control():
    workload = workloads.get("cartpole")
    found = workloads.rollouts(workload, lambda x: np.zeros((len(x), 1)), episodes=4, seed=0)
    assert all(len(r) < 500 for r in found.rewards)
    assert all((r > 0.0).all() and (r <= 1.0).all() for r in found.rewards)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cartpol", "did you mean cartpole"),
        ("nothing", "known: cartpole, .*gym:ENV_ID"),
        ("CartPole-v1", "did you mean gym:CartPole-v1"),
        ("quadruped", "did you mean quadruped_walk"),
        ("cartpole?mass=2", "unknown parameter 'mass'; it takes none"),
        ("arm_sort?zip=1.5", "unknown parameter 'zip'; it takes .*zipf"),
        ("arm_sort?zipf=abc", "zipf: 'abc' is no number from"),
        ("arm_sort?zipf=-1", "zipf: '-1' is no number from"),
        ("arm_sort?zipf=nan", "zipf: 'nan' is no number from"),
        ("quadruped_walk?ground=ice", "ground: 'ice' is none of .*flat"),
        ("gym:CartPol-v1", "`CartPol` doesn't exist; did you mean gym:CartPole-v1"),
        ("gym:CartPole-v99", "CartPole"),
        ("gym:Blackjack-v1", "observation space Tuple.*supported are Box observations"),
        ("gym:no_such_module:Env-v0", "no_such_module"),
    ],
)
def test_unknown_and_unsupported_names(name, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        workloads.get(name)
    assert "\n" not in str(caught.value)


class _Shaped(gymnasium.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


@pytest.mark.parametrize(
    ("observed", "acted", "message"),
    [
        (gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8), gymnasium.spaces.Discrete(2), "no images"),
        (gymnasium.spaces.Dict(a=gymnasium.spaces.Discrete(2)), gymnasium.spaces.Discrete(2), "observation space Dict"),
        (gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.MultiDiscrete([2, 2]), "action space MultiDiscrete"),
    ],
)
def test_unsupported_spaces(observed, acted, message):
    gymnasium.register("LawsShaped-v0", entry_point=lambda: _Shaped(observed, acted))
    try:
        with pytest.raises(WorkloadError, match=message):
            workloads.get("gym:LawsShaped-v0")
    finally:
        del gymnasium.registry["LawsShaped-v0"]


def test_names_are_listed_without_simulators():
    names = [name for name, _ in workloads.names()]
    assert {"cartpole", "arm_sort", "quadruped_walk"} < set(names) and names[-2:] == ["gym:ENV_ID", "BAG"]
    assert all(about for _, about in workloads.names())


def test_parameters_change_the_workload():
    plain, changed = (workloads.get(name) for name in ("arm_sort", "arm_sort?zipf=3"))
    assert (plain.spec.name, changed.spec.name) == ("arm_sort", "arm_sort?zipf=3")
    assert workloads.get("arm_sort?zipf=3").spec == changed.spec
    default = workloads.parameters("arm_sort")["zipf"].default
    assert workloads.get(f"arm_sort?zipf={default}").spec == plain.spec
    teacher = workloads.module("arm_sort").teacher()
    short = [replace(w, spec=replace(w.spec, episode_steps=300)) for w in (plain, changed)]
    assert not equal(*(workloads.rollouts(w, teacher, episodes=4, seed=1) for w in short))


@pytest.mark.parametrize("actions", [np.full((2, 1), np.nan), np.zeros((2, 2)), np.zeros(2)])
def test_bad_batches_of_actions_are_refused(actions):
    simulation = workloads.get("cartpole").batch(2, 0)
    simulation.reset([0, 1], [1, 2])
    with pytest.raises(WorkloadError, match=r"cartpole: action .*1 finite values are needed"):
        simulation.step(actions, np.ones(2, bool))
    simulation.close()
