"""The doctor finds what is wrong, and only that."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
from dataclasses import replace

import numpy as np
import pytest
from onnx import helper

from laws_ros.cli import main
from laws_ros.core.errors import LawsError
from laws_ros.core.functions import FUNCTIONS
from laws_ros.runtime import doctor
from laws_ros.runtime.doctor import examine
from tests.support import random_mlp, save_mlp, save_model


@pytest.fixture(scope="module")
def pair(built, tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor") / "x.laws"
    built.library.save(path)
    return built.path, path


def test_a_machine_that_runs_these_tests_is_well(pair) -> None:
    findings = examine(*pair)
    assert [f for f in findings if f.verdict == "fail"] == []
    topics = {f.topic for f in findings}
    assert {"numpy", "arithmetic", "relu", "clock", "a hit", "the policy", "on cpu"} <= topics


def test_a_function_that_errs_too_much_is_found(tmp_path, monkeypatch) -> None:
    path = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(0), [3, 8, 2]), "Tanh")
    assert "fail" not in {f.verdict for f in examine(path)}
    monkeypatch.setitem(FUNCTIONS, "tanh", replace(FUNCTIONS["tanh"], execution=lambda p: (1e-9, 0.0)))
    assert [f.topic for f in examine(path) if f.verdict == "fail"] == ["tanh"]


def test_sums_that_err_too_much_are_found(monkeypatch) -> None:
    run = doctor._run
    monkeypatch.setattr(doctor, "_run", lambda *a: run(*a) * np.float32(1.001))
    assert "arithmetic" in [f.topic for f in examine() if f.verdict == "fail"]


def test_a_policy_that_cannot_be_bounded_is_noted(tmp_path) -> None:
    nodes = [helper.make_node("Mul", ["observation", "observation"], ["action"])]
    findings = examine(save_model(tmp_path / "p.onnx", nodes, {}, 2, 2))
    assert [f.verdict for f in findings if f.topic == "certificates"] == ["note"]


def test_a_missing_policy_is_one_clear_line(tmp_path) -> None:
    with pytest.raises(LawsError, match="no such policy file"):
        examine(tmp_path / "none.onnx")


def test_a_machine_without_ros_or_rights_is_told_so(monkeypatch, capsys) -> None:
    def refused(*given) -> None:
        raise PermissionError

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rclpy" else find(name))
    monkeypatch.setattr(os, "sched_setscheduler", refused)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr(doctor, "_locks", lambda: False)
    assert main(["doctor"]) == 0  # libraries are built on such a machine; what a robot needs is a note
    lines = {line[5:29].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["ROS 2"].startswith("note") and "source ROS's setup file" in lines["ROS 2"]
    assert lines["SCHED_FIFO"].startswith("note") and "not permitted: set rtprio" in lines["SCHED_FIFO"]
    assert lines["memory locking"].startswith("note") and "limited to 0.0655 MB" in lines["memory locking"]


def test_from_the_command_line(pair, capsys, monkeypatch) -> None:
    assert main(["doctor", "--policy", str(pair[0]), "--library", str(pair[1]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"] is True
    run = doctor._run
    monkeypatch.setattr(doctor, "_run", lambda *a: run(*a) * np.float32(1.001))
    assert main(["doctor"]) == 1
    assert "do not run" in capsys.readouterr().out
    assert main(["doctor", "--library", "x.laws"]) == 2
