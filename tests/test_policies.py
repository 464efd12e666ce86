"""The shipped cart-pole library, and policies that nobody here trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from laws_ros.cli import main
from laws_ros.core.checker import Checker
from laws_ros.runtime.cached_policy import open_pair
from laws_ros.runtime.files import share_path
from laws_ros.runtime.onnx_graph import load_network
from tests.support import break_certificates

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "policies"
foreign = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} is not there: it comes with the project's workplace"
)


def test_the_shipped_library_is_proved_again_and_survives_attack() -> None:
    policy_path = share_path("models/cartpole.onnx")
    library, policy = open_pair(share_path("models/cartpole.laws"), policy_path, threads=2)
    manifest = json.loads(share_path("models/MANIFEST.json").read_text())
    assert hashlib.sha256(policy_path.read_bytes()).hexdigest() == manifest["cartpole.onnx"]["sha256"]
    network = load_network(policy_path)
    assert network.parameters >= 4_000_000
    rng = np.random.default_rng(0)
    chosen = rng.choice(len(library), 40, replace=False)
    checker = Checker(network)
    assert all(checker.verdict(library.certificates, k) == "holds" for k in chosen)
    tried, broken = break_certificates(policy, network, library.certificates[chosen], rng, per_region=50)
    assert tried > 500 and broken == 0


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@foreign
def test_a_vnncomp_cartpole_policy_is_answered_with_its_own_actions(tmp_path, capsys) -> None:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'laws_ros[gym]'")
    policy, library = str(SHARED / "vnncomp_cartpole.onnx"), str(tmp_path / "l.laws")
    gym = ("--workload", "gym:CartPole-v1")
    built = run(capsys, "build", "--policy", policy, *gym, "--decision", "argmax", "--out", library)
    assert built["heldout_hit_rate"] >= 0.9
    verified = run(capsys, "verify", library, "--policy", policy, "--samples", "100000", "--attack")
    assert verified["violations"] == 0 and verified["rechecked"] == verified["certificates"] == built["regions"]
    found = run(capsys, "eval", library, "--policy", policy, *gym, "--episodes", "10")
    assert found["violations"] == 0 and found["return_cached"] == found["return_policy"] and found["hit_rate"] >= 0.9


@foreign
def test_acas_xu_is_bounded_as_executed(tmp_path) -> None:
    from laws_ros.core.certify import certify
    from laws_ros.core.region import Regions
    from laws_ros.runtime.policy import Policy

    path = SHARED / "acasxu_1_1.onnx"
    network, policy = load_network(path), Policy(path, decision="argmin")
    rng = np.random.default_rng(0)
    regions = Regions.from_axes(rng.uniform(-0.5, 0.5, (30, 5)), np.stack([np.eye(5)] * 30), np.full((30, 5), 0.01))
    certificates = certify(network, regions, "argmin")
    tried, broken = break_certificates(policy, network, certificates, rng)
    assert tried > 2000 and broken == 0
    checker = Checker(network, "argmin")
    assert all(checker.verdict(certificates, k) == "holds" for k in range(10))


@foreign
def test_acas_xu_is_answered_with_its_own_advisories_in_encounters() -> None:
    from laws_ros.build import workloads
    from laws_ros.build.evaluate import policy_rollouts
    from laws_ros.build.grow import grow
    from laws_ros.build.verify import verify
    from laws_ros.runtime.cached_policy import CachedPolicy
    from laws_ros.runtime.policy import Policy

    path = SHARED / "acasxu_1_1.onnx"
    network, policy = load_network(path), Policy(path, decision="argmin")
    seen = policy_rollouts(policy, workloads.get("encounter"), 2, 0)
    x, advisories = np.concatenate(seen.observations), np.concatenate(seen.actions)
    assert len(np.unique(advisories)) >= 3  # it was not all clear of conflict
    growth = grow(policy, network, x, advisories, np.zeros(0), 200, 400)
    found = verify(growth.library, policy, network, 5_000, True)
    assert found.good and found.rechecked == len(growth.library) and found.samples == 5_000 and found.attacks > 0
    cached = CachedPolicy(growth.library, policy)
    answers = [(cached.lookup(row), advisory) for row, advisory in zip(x, advisories, strict=True)]
    hits = [(answer.action, advisory) for answer, advisory in answers if answer is not None]
    assert len(hits) == round(growth.train_coverage * len(x)) > 0.3 * len(x)
    assert all(np.array_equal(action, advisory) for action, advisory in hits)
