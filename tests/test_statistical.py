from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from laws_ros.build import statistical
from laws_ros.build.statistical import examine, grow_statistical, trial
from laws_ros.build.verify import verify
from laws_ros.build.workloads import Step, Workload, WorkloadSpec, rollouts
from laws_ros.core.card import Channel
from laws_ros.core.certificate import KINDS, Ragged
from laws_ros.core.errors import LibraryError, ModelError
from laws_ros.core.library import Library
from laws_ros.core.region import Regions
from laws_ros.core.statistical import Evidence, drawn, log_tail, refuted, samples_needed, upper_limit
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import save_model

DELTA, BETA = 0.05, 1e-3


class Walk:
    """A walk that is drawn back to the origin, and pushed a little by the action."""

    time = 0.0

    def reset(self, seed: int) -> np.ndarray:
        self.rng = np.random.default_rng(seed)
        self.x = self.rng.normal(size=2)
        return self.x.astype(np.float32)

    def step(self, action: np.ndarray) -> Step:
        self.x = 0.7 * self.x + 0.7 * self.rng.normal(size=2) - 0.05 * action
        return Step(self.x.astype(np.float32), -(float(action[0]) ** 2), bool(self.rng.random() < 0.02))

    def close(self) -> None:
        pass


SPEC = WorkloadSpec("walk", (Channel("x0"), Channel("x1")), (Channel("y0", "", -9, 9),), False, 0.1, 40)
WALK = Workload(SPEC, Walk)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> Policy:
    """sin(x0) + 0.1 x1: an operator that the certifier refuses."""
    path = tmp_path_factory.mktemp("statistical") / "wave.onnx"
    nodes = [
        helper.make_node("Sin", ["observation"], ["wave"], name="wave"),
        helper.make_node("MatMul", ["wave", "w"], ["one"]),
        helper.make_node("MatMul", ["observation", "v"], ["two"]),
        helper.make_node("Add", ["one", "two"], ["action"]),
    ]
    constants = {"w": np.array([[1.0], [0.0]], np.float32), "v": np.array([[0.0], [0.1]], np.float32)}
    save_model(path, nodes, constants, 2, 1)
    with pytest.raises(ModelError, match="Sin"):
        load_network(path)
    return Policy(path)


@pytest.fixture(scope="module")
def grown(policy):
    run = rollouts(WALK, lambda x: policy.decide(policy.batch(x)), 150, 1)
    return grow_statistical(policy, run.observations, trial(policy, WALK, DELTA, BETA, 2, 2000), np.array([0.15]))


def fresh(policy: Policy, seed: int = 9) -> list[np.ndarray]:
    return rollouts(WALK, lambda x: policy.decide(policy.batch(x)), 200, seed).observations


def test_the_limit_is_that_of_clopper_and_pearson() -> None:
    scipy = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install 'laws_ros[train]'")
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(10 ** rng.uniform(0, 5))
        k, beta = int(rng.integers(0, min(n, 200) + 1)), 10 ** -rng.uniform(0.5, 12)
        want = 1.0 if k == n else scipy.beta.isf(beta, k + 1, n - k)
        found = upper_limit(k, n, beta)
        assert want <= found * (1 + 1e-12) and found == pytest.approx(want, rel=1e-5)
        p = float(rng.uniform(0.5, 2.0)) * (k + 1) / (n + 2)
        if p >= 1:
            continue
        assert log_tail(k, n, p) == pytest.approx(scipy.binom.logcdf(k, n, p), rel=1e-6, abs=1e-7)
        tail = scipy.binom.sf(k - 1, n, p)
        assert abs(tail - beta) < 1e-3 * beta or refuted(k, n, p, beta) == (k > 0 and tail <= beta)


@pytest.mark.parametrize("n, p, beta", [(30, 0.1, 0.05), (200, 0.01, 0.1), (1000, 0.002, 0.05)])
def test_the_limit_covers_as_often_as_it_says(n: int, p: float, beta: float) -> None:
    """Simulated: the limit may lie below the truth with probability at most beta."""
    seen = np.random.default_rng(0).binomial(n, p, 20_000)
    limits = {k: upper_limit(k, n, beta) for k in np.unique(seen).tolist()}
    missed = np.mean([limits[k] < p for k in seen.tolist()])
    assert missed <= beta + 4 * math.sqrt(beta / 20_000)


def test_the_fewest_samples_are_what_the_logarithm_says() -> None:
    n = samples_needed(0.01, 1e-6)
    assert n == 1375 and upper_limit(0, n, 1e-6) <= 0.01 < upper_limit(0, n - 1, 1e-6)
    assert upper_limit(5, 5, 0.1) == 1.0


def test_a_record_comes_back_and_a_bad_one_is_named() -> None:
    evidence = Evidence(0.01, 1e-7, 5000, 3, 5000, bytes(range(32)), 12)
    assert Evidence.read(evidence.record()) == evidence and Evidence.inconsistency(evidence.record()) is None
    before = replace(evidence, stay=0)  # as records were that know of no stay
    assert Evidence.read(before.record()[:-8]) == before and Evidence.inconsistency(before.record()[:-8]) is None
    assert evidence.holds and not replace(evidence, episodes=4999).holds  # several draws of an episode show nothing
    for bad in (
        evidence.record()[:-1],
        replace(evidence, delta=0.0).record(),
        replace(evidence, beta=float("nan")).record(),
        replace(evidence, exceedances=5001).record(),
        replace(evidence, episodes=0).record(),
        replace(evidence, stay=-1).record(),
    ):
        assert "evidence" in (Evidence.inconsistency(bad) or "")


def test_a_library_for_a_policy_that_nothing_can_be_proved_about(policy, grown, tmp_path) -> None:
    library = grown.library
    assert 2 <= len(library) <= grown.certificates_tried and grown.train_coverage > 0.8
    assert {KINDS[k] for k in library.certificates.kind} == {"statistical"}
    library.save(tmp_path / "w.laws")
    library = Library.load(tmp_path / "w.laws")
    for k in range(len(library)):
        evidence = Evidence.read(library.certificates.octets.row(k))
        assert evidence.holds and evidence.beta == BETA / grown.certificates_tried
        assert evidence.samples == evidence.episodes >= samples_needed(DELTA, BETA)  # one draw per episode
        assert 1 <= evidence.stay <= SPEC.episode_steps

    x = np.concatenate(fresh(policy))
    formal = CachedPolicy(library, policy)
    assert all(formal.lookup(row) is None for row in x)  # never by default
    cached = CachedPolicy(library, policy, kinds=["statistical"])
    answers = [cached.lookup(row) for row in x]
    hits = [(row, a) for row, a in zip(x, answers, strict=True) if a is not None]
    assert len(hits) > 0.75 * len(x) and all(a.kind == "statistical" for _, a in hits)
    beyond = [bool((np.abs(a.action - policy.decide(policy(row))) > a.bound).any()) for row, a in hits]
    assert np.mean(beyond) <= DELTA
    assert cached.lookup(np.array([40.0, 0.0], np.float32)) is None  # outside every box


def test_bounds_are_chosen_by_episodes_that_the_expert_was_not_fitted_to(tmp_path, monkeypatch) -> None:
    """A wave too quick to be fitted, in 24 sensors: an expert looks better where it was fitted than anywhere else."""
    n, rng = 24, np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["observation", "quick"], ["phase"], name="phase"),
        helper.make_node("Sin", ["phase"], ["action"], name="wave"),
    ]
    save_model(tmp_path / "p.onnx", nodes, {"quick": 99 * rng.normal(size=(n, 1)).astype(np.float32)}, n, 1)
    policy = Policy(tmp_path / "p.onnx")
    monkeypatch.setattr(statistical, "ROOM", 1.0)

    def beyond(every: int, length: int) -> float:
        """How often fresh observations are beyond the bound of an expert from `every` episodes of that length."""
        x = rng.normal(size=(every, length, n)).astype(np.float32)
        one = statistical.Trial(DELTA, BETA, 10**6, lambda: [], bytes(32))
        chooser = statistical._Chooser(policy, list(x), np.array([9.0]), one, 1)
        found = chooser._fit(Regions.from_axes(np.zeros((1, n)), np.eye(n)[None], np.full((1, n), 99.0)))
        assert found is not None
        new = rng.normal(size=(4000, n)).astype(np.float32)
        error = np.abs(new @ found.expert_weight[0].T + found.expert_bias[0] - policy.batch(new))
        return float((error > found.bound_offset[0]).mean())

    assert np.mean([beyond(30, 4) for _ in range(10)]) < DELTA / 2


def test_fresh_episodes_confirm_or_refute(policy, grown) -> None:
    x = fresh(policy)
    found = verify(grown.library, policy, None, 100, attack=True, fresh=x)
    assert found.good and found.by_kind == {"statistical": {"holds": len(grown.library), "violated": 0, "unknown": 0}}
    assert found.samples == found.attacks == 0 and 100 < found.fresh <= 200 * len(grown.library)
    assert found.exceedances <= DELTA * found.fresh
    c = grown.library.certificates
    lying = replace(grown.library, certificates=replace(c, bound_offset=0.2 * c.bound_offset))
    refused = verify(lying, policy, None, 100, attack=False, fresh=x)
    assert not refused.good and "violated" in refused.verdicts and "was claimed" in (refused.first or "")
    weak = Evidence(DELTA, BETA, 20, 0, 20, bytes(32))
    few = replace(c, octets=Ragged.of([weak.record()] * len(c), np.uint8))
    assert set(verify(replace(grown.library, certificates=few), policy, None, 0, False).verdicts) == {"unknown"}


def test_what_chooses_never_tests(policy, grown) -> None:
    """Draws come from episodes of their own and follow from their seed alone."""
    one, same, other = (trial(policy, WALK, DELTA, BETA, seed, 300) for seed in (5, 5, 6))
    assert one.source == same.source != other.source
    c = grown.library.certificates
    stays = [4] * len(c)
    assert examine(policy, c, stays, one) == examine(policy, c, stays, same)
    worse = replace(c, bound_offset=0.05 * c.bound_offset)
    assert not any(e.holds for e in examine(policy, worse, stays, one))


def test_draws_of_one_episode_are_not_taken_for_independent_ones() -> None:
    """Bad episodes exceed a bound at every visit, and stay four times as long. A tenth of what counts is bad, so the
    claim of less than a tenth may be made with probability beta at most; visits as if independent make it all the time.
    """
    delta, beta, stay, bad = 0.1, 0.05, 10, 0.5 / 9.5  # 10 bad / (10 bad + 5 (1 - bad)) = delta
    region = Regions(np.zeros((1, 1)), np.eye(1)[None])
    rng = np.random.default_rng(0)
    claims = np.zeros(2)
    for _ in range(600):
        episodes = [
            np.concatenate([[7.0], np.full(20, 0.5) if rng.random() < bad else np.full(5, -0.5)])[:, None]
            for _ in range(60)
        ]
        every = [e[np.abs(e[:, 0]) <= 1.0] for e in episodes]
        for way, x in enumerate((drawn(region, episodes, stay, rng), np.concatenate(every))):
            claims[way] += upper_limit(int((x > 0).sum()), len(x), beta) <= delta
    assert claims[0] <= 600 * beta + 4 * math.sqrt(600 * beta)
    assert claims[1] > 3 * claims[0]


def test_an_episode_gives_one_draw_at_most_by_the_time_it_spends_there() -> None:
    region = Regions(np.zeros((1, 1)), np.eye(1)[None])
    rng = np.random.default_rng(1)
    episodes = [np.linspace(-2.0, 2.0, 41, dtype=np.float32)[:, None], np.full((5, 1), 3.0, np.float32)]
    x = np.concatenate([drawn(region, episodes, 42, rng) for _ in range(8000)])[:, 0]
    assert abs(len(x) / 8000 - 21 / 42) < 0.03  # 21 of its observations are inside
    values, counts = np.unique(x, return_counts=True)
    assert len(values) == 21 and counts.min() > 0.7 * counts.mean()
    assert all(len(drawn(region, episodes, stay, rng)) == 1 for stay in (1, 5, 21))


def test_evidence_that_is_damaged_is_refused(grown, tmp_path) -> None:
    c = grown.library.certificates
    broken = replace(c, octets=Ragged.of([np.zeros(3, np.uint8)] * len(c), np.uint8))
    replace(grown.library, certificates=broken).save(tmp_path / "b.laws")
    with pytest.raises(LibraryError, match="evidence"):
        Library.load(tmp_path / "b.laws")
