"""The comparison with the alternatives: each does what its idea says, is tuned by the rule, and is measured alike."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laws_ros.build import baselines, bench, workloads
from laws_ros.build.baselines import Case
from laws_ros.cli import main
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import random_mlp, save_mlp

pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'laws_ros[gym]'")
pytest.importorskip("scipy", reason="the comparison needs SciPy: pip install 'laws_ros[train]'")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    path = save_mlp(tmp_path_factory.mktemp("bench") / "swing.onnx", random_mlp(np.random.default_rng(2), [3, 16, 1]))
    return Policy(path)


def case_of(policy: Policy, tolerance: float = 0.2) -> Case:
    workload = workloads.get("gym:Pendulum-v1")
    rng = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        angle = rng.uniform(-np.pi, np.pi, count)
        return np.column_stack([np.cos(angle), np.sin(angle), rng.uniform(-4, 4, count)]).astype(np.float32)

    x, tuning = draw(2000), draw(400)
    raw, tuning_raw = policy.batch(x), policy.batch(tuning)
    return Case(policy, workload, np.array([tolerance]), [x], x, raw, tuning, tuning_raw)


@pytest.fixture(scope="module")
def case(policy) -> Case:
    return case_of(policy)


def answers(case: Case, method: baselines.Method, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which observations a method answers, and its errors there, in tolerances."""
    found = [method.lookup(row) for row in x]
    hit = np.array([f is not None for f in found])
    given = np.array([f for f in found if f is not None]).reshape(-1, 1)
    return hit, case.error(given, case.policy.decide(case.policy.batch(x[hit])))


def test_replayed_answers_are_those_of_the_cell_or_the_neighbour(case):
    for make in (baselines.exact_cache, baselines.nearest_neighbour):
        method = make(case)
        assert method.guaranteed is None and method.bytes > case.x.nbytes / 2
        known = [method.lookup(row) for row in case.x[:200]]
        assert all(k is not None for k in known)  # what was seen is known
        assert all(any(np.array_equal(k, a) for a in case.actions) for k in known)
        hit, error = answers(case, method, case.tuning_x)
        assert 0.02 < hit.mean() < 1.0 and error.max() <= 1.0  # the rule: nothing beyond the tolerance while tuning
    nearest = baselines.nearest_neighbour(case)
    assert np.array_equal(nearest.lookup(case.x[7]), case.actions[7])
    assert nearest.lookup(np.full(3, 50.0, np.float32)) is None


def test_the_rule_takes_the_most_answers_within_the_tolerance():
    def choice(name, hit_rate, worst, cost, others=0.1):
        error = np.array([worst, others, 0.1])
        return baselines._Choice(hit_rate, error, cost, lambda: baselines.Method(name, lambda x: None, "", 0))

    good = [choice("a", 0.5, 0.9, 1), choice("b", 0.8, 1.0, 9), choice("c", 0.8, 0.4, 2), choice("d", 0.99, 1.01, 1)]
    assert baselines._best(good).name == "c"
    assert baselines._best([good[3], choice("e", 0.1, 1.005, 1)]).name == "e"
    assert baselines._best([choice("f", 0.9, 1.2, 1, 1.1), choice("g", 0.9, 7.0, 1)]).name == "g"  # less often
    score, error = np.array([3.0, 1.0, 2.0, 0.5]), np.array([0.1, 0.2, 1.5, 0.3])
    assert baselines._largest_within(score, error) == 1.0


def test_the_formula_with_the_global_constant_is_true_and_rarely_of_use(case):
    method = baselines.global_formula(case, load_network(case.policy.path))
    rng = np.random.default_rng(3)
    near = (case.x[:1000] + rng.normal(size=(1000, 3)) * 0.003).astype(np.float32)
    hit, error = answers(case, method, near)
    assert hit.sum() > 100 and error.max() <= 1.0 and method.guaranteed == 1.0
    neighbour = baselines.nearest_neighbour(case)
    assert answers(case, method, case.tuning_x)[0].mean() < answers(case, neighbour, case.tuning_x)[0].mean()


def test_learned_stand_ins_run_as_they_were_trained(case, monkeypatch):
    pytest.importorskip("torch", reason="learned stand-ins need PyTorch: make torch")
    monkeypatch.setattr(baselines, "STEPS", 150)
    monkeypatch.setattr(baselines, "WIDTHS", (16, 32))
    monkeypatch.setattr(baselines, "EXPERTS", (4, 8))
    learned = baselines.Learned(case)
    always = learned.student(), learned.mixture()
    for method in always:
        hit, error = answers(case, method, case.tuning_x)
        assert hit.all() and np.median(error) < 2.0  # it learned something: the actions span twenty tolerances
    module, _ = learned._trained[32 if "32" in always[0].setting else 16]
    expected = learned._delivered(module(learned.tuning_z))
    got = np.array([always[0].lookup(row) for row in case.tuning_x])
    np.testing.assert_allclose(got, expected, atol=1e-4)
    router = learned.router()
    hit, error = answers(case, router, case.tuning_x)
    assert error.max(initial=0.0) <= 1.0 and hit.mean() < 1.0  # it sends on what its student gets wrong


def test_everything_is_measured_on_the_same_episodes(policy, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch", reason="learned stand-ins need PyTorch: make torch")
    for name, value in (("STEPS", 100), ("WIDTHS", (16,)), ("EXPERTS", (4,))):
        monkeypatch.setattr(baselines, name, value)
    arguments = ["bench", "gym:Pendulum-v1", "--policy", str(policy.path), "--tolerance", "0.4", "--steps", "1000"]
    arguments += ["--episodes", "2", "--max-regions", "60", "--delta", "0.4", "--beta", "0.1", "--fresh-episodes", "20"]
    tmp_path = tmp_path / "new" / "folder"
    assert main([*arguments, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in found["rows"]}
    assert list(rows) == list(bench.METHODS.values()) and found["skipped"] == {}
    alone = rows["full policy"]
    assert alone["hit_rate"] == 0.0 and alone["worst_error"] < 1e-5 and alone["speedup"] == pytest.approx(1.0)
    for row in rows.values():
        assert 0.0 < row["step_us"]["p50"] <= row["step_us"]["p99"] and row["speedup"] > 0
        assert (row["beyond"] > 0) == (row["worst_error"] > 1.0)
        if row["hit_rate"] == 0.0:
            assert row["mean_return"] == alone["mean_return"]  # the same episodes, step by step
    formal = rows["LAWS, formal"]
    assert formal["hit_rate"] > 0.3 and formal["worst_error"] <= formal["guaranteed"] == 1.0 and formal["bytes"] > 1000
    assert rows["distilled student"]["hit_rate"] == rows["mixture of experts"]["hit_rate"] == 1.0
    table = (tmp_path / "bench.md").read_text()
    assert all(f"| {name} |" in table for name in rows) and json.loads((tmp_path / "bench.json").read_text())["rows"]
    picture = ElementTree.fromstring((tmp_path / "bench.svg").read_text())
    words = " ".join(picture.itertext())
    assert all(name in words for name in rows) and "href" not in (tmp_path / "bench.svg").read_text()


def test_the_table_in_words_says_who_leads_at_what():
    def row(name, step, worst, beyond=0.0, guaranteed=None, promise="none"):
        steps = {"mean": step, "p50": step, "p99": step}
        return bench.Row(name, "", 0.9, steps, 1000 / step, worst, beyond, guaranteed, promise, 99.0, 1, 1.0)

    policy = row("full policy", 1000.0, 0.0, 0.0, 0.0, "is the policy")
    ours = row("LAWS, formal", 40.0, 0.8, 0.0, 1.0, "proved, as executed")
    formula = row("formula, global constant", 900.0, 0.0, 0.0, 1.0, "proved, up to rounding")
    student, near = row("distilled student", 20.0, 1.5, 0.01), row("learned router", 42.0, 0.5)

    def said(*rows):
        return bench.verdicts(bench.Comparison("w", "p", [1.0], 1, 1, 1, 0, list(rows), {}))

    alone = said(policy, ours, formula, row("mixture of experts", 60.0, 0.1))
    assert "25.0 times cheaper" in alone[0] and "100.00% of the return" in alone[0]
    assert [line.rpartition(": ")[2] for line in alone[1:]] == ["none."] * 3  # slower ones beat nothing
    many = said(policy, ours, formula, student, near)
    assert "learned router (0.95 times as fast; at worst 0.5" in many[2] and "student" not in many[2]
    assert "distilled student (2 times as fast; at worst 1.5 tolerances, 1.00% of the steps beyond)" in many[3]
    quick = replace(formula, step_us={"mean": 10.0, "p50": 10.0, "p99": 10.0})
    assert "formula" in said(policy, ours, quick)[1] and said(policy, student) == []


def test_decisions_are_compared_too(tmp_path, capsys):
    path = save_mlp(tmp_path / "d.onnx", random_mlp(np.random.default_rng(1), [4, 12, 2]))
    arguments = ["bench", "gym:CartPole-v1", "--policy", str(path), "--decision", "argmax", "--steps", "400"]
    assert main([*arguments, "--episodes", "2", "--methods", "cache,nearest,formula,formal", "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert len(rows) == 5
    for name in ("formula, global constant", "LAWS, formal"):
        assert rows[name]["worst_error"] == 0.0  # a decision that is proved is the policy's
        assert rows[name]["mean_return"] == rows["full policy"]["mean_return"]


def test_what_is_not_installed_is_skipped_by_name(policy, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    arguments = ["bench", "gym:Pendulum-v1", "--policy", str(policy.path), "--tolerance", "0.4", "--steps", "300"]
    assert main([*arguments, "--episodes", "1", "--methods", "student,router,cache"]) == 0
    table = capsys.readouterr().out
    assert "Not measured: distilled student: the Python package torch is not installed." in table
    assert "Not measured: learned router: " in table and "| exact cache |" in table


def test_bad_input_is_one_line(policy, tmp_path, capsys):
    path = str(policy.path)
    for arguments, words in (
        (("gym:Pendulum-v1", "--policy", path, "--methods", "fomal"), "'fomal' is none of policy, cache"),
        (("gym:Pendulum-v1", "--policy", path, "--out", path), "cannot be made a folder"),
        (("gym:CartPole-v1", "--policy", path), "takes 3 observations"),
        (("cart", "--policy", path), "unknown"),
    ):
        assert main(["bench", *arguments]) == 2
        streams = capsys.readouterr()
        assert words in streams.err and len(streams.err.strip().splitlines()) == 1 and streams.out == ""
    assert not list(Path(tmp_path).iterdir())
