"""The contract of commands, run in process on a real workload with a policy that nobody here trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from laws_ros.cli import main, parse_tolerance
from laws_ros.core.errors import ConfigError
from tests.support import random_mlp, save_mlp, save_model

pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'laws_ros[gym]'")


@pytest.fixture(scope="session")
def discrete(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A ReLU policy for CartPole-v1 that decides by argmax (a balancing rule plus bends), and a library for it."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    first, bias = rng.normal(size=(32, 4)), 0.1 * rng.normal(size=32)
    gain = np.array([0.3, 0.6, 3.0, 1.0])
    second = np.linalg.lstsq(first.T, gain, rcond=None)[0]
    layers = [
        (np.concatenate([first, -first]), np.concatenate([bias, -bias])),
        (np.stack([np.concatenate([-second, second]), np.concatenate([second, -second])]), np.zeros(2)),
    ]
    policy, library = save_mlp(folder / "balance.onnx", layers), folder / "balance.laws"
    assert (
        main(
            [
                "build",
                "--policy",
                str(policy),
                "--workload",
                "gym:CartPole-v1",
                "--decision",
                "argmax",
                "--steps",
                "6000",
                "--out",
                str(library),
            ]
        )
        == 0
    )
    return policy, library


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    capsys.readouterr()
    code = main([*arguments, "--json"])
    out = capsys.readouterr().out
    return {**json.loads(out), "exit": code}


def test_build_verify_eval_explain(discrete, capsys, tmp_path) -> None:
    policy, library = map(str, discrete)
    built = run_json(
        capsys,
        "build",
        "--policy",
        policy,
        "--workload",
        "gym:CartPole-v1",
        "--decision",
        "argmax",
        "--steps",
        "3000",
        "--out",
        str(tmp_path / "l.laws"),
        "--max-regions",
        "150",
        "--seed",
        "3",
    )
    assert {"regions", "certificates_tried", "train_coverage", "heldout_hit_rate", "tolerance", "seconds"} <= set(built)
    assert 0 < built["regions"] <= 150 and built["heldout_hit_rate"] > 0.4

    verified = run_json(capsys, "verify", library, "--policy", policy, "--samples", "20000", "--attack")
    assert verified["exit"] == 0 and verified["violations"] == 0 and verified["rechecked"] == verified["certificates"]
    assert verified["samples"] >= 20000 and verified["median_bound_over_worst_seen"] >= 1

    found = run_json(capsys, "eval", library, "--policy", policy, "--workload", "gym:CartPole-v1", "--episodes", "2")
    assert found["exit"] == 0 and found["hit_rate"] > 0.6 and found["worst_error_over_bound"] == 0.0
    assert found["return_cached"] == found["return_policy"]  # the very same decisions
    assert {"p50", "p99"} == set(found["hit_us"]) == set(found["policy_us"]) and found["mean_step_speedup"] > 0

    laws = run_json(capsys, "explain", library)["regions"]
    assert {"key", "box", "expert", "bound", "probability", "hits"} <= set(laws[0])
    one = run_json(capsys, "explain", library, "--region", laws[0]["id"])["regions"]
    assert one == laws[:1]
    assert main(["explain", library]) == 0 and "x2" in capsys.readouterr().out
    target = str(tmp_path / "v")
    found = run_json(capsys, "export-vnnlib", library, "--region", laws[0]["id"], "--policy", policy, "--out", target)
    assert [Path(p).suffix for p in found["paths"]] == [".onnx", ".vnnlib"]
    assert all(Path(p).is_file() for p in found["paths"])


def test_workloads_are_listed(capsys) -> None:
    assert "cartpole" in [w["name"] for w in run_json(capsys, "workloads")["workloads"]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 2
    streams = capsys.readouterr()
    assert streams.out == "" and len(streams.err.strip().splitlines()) == 1, streams.err
    return streams.err


def test_bad_input_ends_in_one_line_and_exit_code_2(discrete, built, capsys, tmp_path) -> None:
    policy, library = map(str, discrete)
    sine = save_model(
        tmp_path / "sine.onnx", [helper.make_node("Sin", ["observation"], ["action"], name="wave")], {}, 4, 4
    )
    wide = save_mlp(tmp_path / "wide.onnx", random_mlp(np.random.default_rng(0), [7, 4, 2]))
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(Path(policy).read_bytes()[:300])
    broken = tmp_path / "broken.laws"
    broken.write_bytes(Path(library).read_bytes()[:-5])
    out = str(tmp_path / "o.laws")
    gym = ("--workload", "gym:CartPole-v1", "--out", out)
    assert "node 'wave' (Sin)" in refused(capsys, "build", "--policy", str(sine), "--decision", "argmax", *gym)
    assert "cut.onnx" in refused(capsys, "build", "--policy", str(cut), *gym)
    assert "absent.onnx" in refused(capsys, "build", "--policy", "absent.onnx", *gym)
    assert "takes 7 observations, gym:CartPole-v1 gives 4" in refused(
        capsys, "build", "--policy", str(wide), "--decision", "argmax", *gym
    )
    assert "--decision argmax" in refused(capsys, "build", "--policy", policy, *gym)
    assert "cartpole" in refused(capsys, "build", "--policy", policy, "--workload", "cartpol", "--out", out)
    assert "CartPole" in refused(capsys, "build", "--policy", policy, "--workload", "gym:CartPoll-v1", "--out", out)
    assert "does not exist" in refused(
        capsys, "build", "--policy", policy, "--workload", "gym:CartPole-v1", "--out", str(tmp_path / "no/o.laws")
    )
    assert "a folder of that name" in refused(
        capsys, "build", "--policy", policy, "--workload", "gym:CartPole-v1", "--out", str(tmp_path)
    )
    assert "sha256" in refused(capsys, "verify", library, "--policy", str(built.path))
    assert "damaged" in refused(capsys, "verify", str(broken), "--policy", policy)
    assert "not a LAWS library" in refused(capsys, "eval", policy, "--policy", policy, "--workload", "gym:CartPole-v1")
    assert "--region 'zz'" in refused(capsys, "explain", library, "--region", "zz")
    assert not Path(out).exists()


def test_usage_errors_exit_with_2(capsys) -> None:
    for arguments in (
        ["build"],
        ["nothing"],
        ["verify", "x", "--policy", "y", "--samples", "-1"],
        ["eval", "x", "--policy", "y", "--workload", "w", "--seed", "-1"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    for command in ("build", "verify", "eval", "explain", "export-vnnlib", "workloads", "train", "demo"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0


@pytest.mark.parametrize(
    "text, value",
    [("0.5", [0.5, 0.5]), ("2.5%", [0.05, 0.05]), ("0.1, 10%", [0.1, 0.2]), (None, [0.05, 0.05]), ("0", [0, 0])],
)
def test_tolerance_notation(built, text, value) -> None:
    np.testing.assert_allclose(parse_tolerance(text, built.policy), value)


@pytest.mark.parametrize("text", ["x", "1,2,3", "-1", "nan", "inf", "-2%", "1;2"])
def test_bad_tolerances(built, text) -> None:
    with pytest.raises(ConfigError, match="tolerance"):
        parse_tolerance(text, built.policy)


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    code = "import sys; sys.modules['rclpy'] = None; from laws_ros.cli import main; sys.exit(main(['demo']))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.strip() == "laws demo: the Python package rclpy is not installed: pip install 'laws_ros[ros]'"


def test_kinds_from_build_to_eval(discrete, capsys, tmp_path) -> None:
    policy, library = str(discrete[0]), str(tmp_path / "k.laws")
    gym = ("--policy", policy, "--workload", "gym:CartPole-v1")
    for kind in ("point", "lipschitz"):
        options = ("--kind", kind, "--decision", "argmax", "--steps", "600", "--max-regions", "100", "--out", library)
        built = run_json(capsys, "build", *gym, *options)
        assert built["kind"] == kind and 0 < built["regions"] <= 100
        verified = run_json(capsys, "verify", library, "--policy", policy, "--samples", "2000", "--attack")
        assert verified["exit"] == 0 and verified["kinds"] == {
            kind: {"holds": built["regions"], "violated": 0, "unknown": 0}
        }
        found = run_json(capsys, "eval", library, *gym, "--episodes", "1", "--kinds", kind)
        assert found["violations"] == 0 and found["kinds"] == [kind]
        assert run_json(capsys, "explain", library)["regions"][0]["kind"] == kind
    assert run_json(capsys, "eval", library, *gym, "--episodes", "1", "--kinds", "exact")["hit_rate"] == 0.0
    assert "'linar' is no kind of certificate; did you mean linear" in refused(
        capsys, "eval", library, *gym, "--kinds", "linar"
    )


def test_a_policy_that_nothing_can_be_proved_about(capsys, tmp_path) -> None:
    gain = np.array([[0.3], [0.6], [3.0], [1.0]], np.float32)
    nodes = [
        helper.make_node("Sin", ["observation"], ["wave"], name="wave"),
        helper.make_node("MatMul", ["wave", "w"], ["action"]),
    ]
    path = save_model(tmp_path / "wave.onnx", nodes, {"w": np.concatenate([-gain, gain], axis=1)}, 4, 2)
    policy, library = str(path), str(tmp_path / "wave.laws")
    gym = ("--policy", policy, "--workload", "gym:CartPole-v1")
    built = run_json(
        capsys, "build", *gym, "--out", library, "--kind", "statistical", "--decision", "argmax", "--steps", "4000",
        "--delta", "0.1", "--beta", "0.01", "--fresh-episodes", "400",
    )  # fmt: skip
    assert built["regions"] > 0 and built["heldout_hit_rate"] > 0.3 and built["heldout_exceedance"] <= 0.1
    assert (built["delta"], built["beta"]) == (0.1, 0.01) and built["fresh_episodes"] == 400
    verified = run_json(
        capsys, "verify", library, "--policy", policy, "--workload", "gym:CartPole-v1", "--episodes", "5"
    )
    assert (
        verified["exit"] == 0
        and verified["samples"] == 0
        and verified["exceedances"] <= 0.1 * verified["fresh_observations"]
    )
    assert main(["verify", library, "--policy", policy]) == 0 and "proved again" not in capsys.readouterr().out
    assert run_json(capsys, "eval", library, *gym, "--episodes", "1")["hit_rate"] == 0.0  # never unless it is named
    found = run_json(capsys, "eval", library, *gym, "--episodes", "1", "--kinds", "statistical")
    assert found["statistical_hits"] > 0 and found["exceedances"] <= 0.1 * found["statistical_hits"]
    law = run_json(capsys, "explain", library)["regions"][0]
    assert law["kind"] == "statistical" and "nothing is proved" in law["standing"] and "10.00%" in law["standing"]
    for option in ("--delta", "--beta"):
        with pytest.raises(SystemExit):
            main(["build", *gym, "--out", library, option, "1"])


def test_collapsed_experts_from_build_to_eval(discrete, capsys, tmp_path) -> None:
    policy = str(save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(3), [3, 24, 24, 1], gain=2.5)))
    library, gym = str(tmp_path / "k.laws"), ("--policy", policy, "--workload", "gym:Pendulum-v1")
    built = run_json(
        capsys, "build", *gym, "--kind", "linear+exact", "--share", "0.9", "--steps", "2000", "--tolerance", "0.02",
        "--max-regions", "300", "--out", library,
    )  # fmt: skip
    verified = run_json(capsys, "verify", library, "--policy", policy, "--samples", "3000", "--attack")
    assert verified["exit"] == 0 and set(verified["kinds"]) == {"linear", "exact"} and built["heldout_hit_rate"] > 0.1
    found = run_json(capsys, "eval", library, *gym, "--episodes", "2")
    assert found["violations"] == 0 and found["worst_error_over_bound"] <= 1
    only = [
        run_json(capsys, "eval", library, *gym, "--episodes", "2", "--kinds", k)["hit_rate"]
        for k in ("linear", "exact")
    ]
    assert max(only) <= found["hit_rate"] <= 1 and min(only) > 0
    laws = run_json(capsys, "explain", library, "--all")["regions"]
    assert any("multiplications left" in law["expert"][0] for law in laws if law["kind"] == "exact")
    balance = ("--policy", str(discrete[0]), "--workload", "gym:CartPole-v1", "--decision", "argmax")
    assert "cannot decide by argmax" in refused(capsys, "build", *balance, "--kind", "exact", "--out", library)


def test_an_effort_that_is_none_is_refused_before_any_work(capsys, tmp_path) -> None:
    arguments = ["build", "--policy", "p.onnx", "--workload", "cartpole", "--out", str(tmp_path / "p.laws")]
    assert main([*arguments, "--effort", "tight"]) == 2
    assert "effort 'tight': choose interval, forward, backward, optimised, or split:N" in capsys.readouterr().err


def test_a_library_is_tightened(built, capsys, tmp_path) -> None:
    policy, old, new = ["--policy", str(built.policy.path)], tmp_path / "old.laws", tmp_path / "new.laws"
    built.library.save(old)
    found = run_json(capsys, "tighten", str(old), *policy, "--out", str(new))
    assert 0 < found["tighter"] <= found["regions"] == len(built.library) and found["median_bound_over_old"] < 1.0
    verified = run_json(capsys, "verify", str(new), *policy, "--samples", "2000")
    assert verified["rechecked"] == found["regions"] and verified["violations"] == 0
    assert "effort 'more'" in refused(capsys, "tighten", str(old), *policy, "--effort", "more", "--out", str(new))
