"""Bundles: the same bytes for the same content, no changed byte accepted, and a switch that is all or nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.cli import main
from laws_ros.core.errors import LawsError, LibraryError
from laws_ros.runtime.bundle import bundle, install, read, roll_back
from laws_ros.runtime.cached_policy import CachedPolicy


@pytest.fixture(scope="module")
def made(built, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle")
    built.library.save(folder / "x.laws")
    (folder / "c.yaml").write_text("rate_hz: 100\n")
    manifest = bundle(folder / "x.laws", built.path, folder / "robot.zip", folder / "c.yaml")
    return folder, manifest


def test_a_bundle_holds_all_that_a_robot_needs(built, made, tmp_path) -> None:
    folder, manifest = made
    assert manifest["policy_sha256"] == built.policy.sha256
    again = bundle(folder / "x.laws", built.path, tmp_path / "again.zip", folder / "c.yaml")
    assert again == manifest
    assert (tmp_path / "again.zip").read_bytes() == (folder / "robot.zip").read_bytes()
    release = install(folder / "robot.zip", tmp_path / "robot")
    assert release.samefile(tmp_path / "robot" / "current")
    cached = CachedPolicy.open(release / "library.laws", release / "policy.onnx")
    direct = CachedPolicy(built.library, built.policy)
    for x in built.observations[:50]:
        np.testing.assert_array_equal(cached.answer(x).action, direct.answer(x).action)
    assert (release / "config.yaml").read_text() == "rate_hz: 100\n"


def test_rolling_back_returns_to_the_release_before(built, made, tmp_path) -> None:
    folder, _ = made
    bundle(folder / "x.laws", built.path, tmp_path / "plain.zip")  # without a configuration: another release
    with pytest.raises(LibraryError, match="no earlier release"):
        roll_back(tmp_path / "robot")
    first = install(folder / "robot.zip", tmp_path / "robot")
    second = install(tmp_path / "plain.zip", tmp_path / "robot")
    install(tmp_path / "plain.zip", tmp_path / "robot")  # twice is once
    assert second.samefile(tmp_path / "robot" / "current")
    assert roll_back(tmp_path / "robot").samefile(first)
    assert first.samefile(tmp_path / "robot" / "current")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_changed_or_missing_byte_is_installed(made, tmp_path_factory, data) -> None:
    folder, _ = made
    content = bytearray((folder / "robot.zip").read_bytes())
    original = read(folder / "robot.zip")
    path = tmp_path_factory.mktemp("damage") / "x.zip"
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(bytes(content))
    with contextlib.suppress(LibraryError):  # a flipped bit in a file's date, say, changes nothing that counts
        assert read(path) == original
        return
    with pytest.raises(LibraryError):
        install(path, path.with_name("robot"))
    assert not path.with_name("robot").exists()


def test_a_bundle_with_another_name_or_a_wrong_library_is_refused(built, made, tmp_path) -> None:
    folder, _ = made
    with zipfile.ZipFile(folder / "robot.zip") as old, zipfile.ZipFile(tmp_path / "evil.zip", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr("../../outside", b"x")
    with pytest.raises(LibraryError, match="not those that its manifest lists"):
        install(tmp_path / "evil.zip", tmp_path / "robot")
    other = tmp_path / "other.onnx"
    other.write_bytes(built.path.read_bytes() + b"\x0a\x00")
    with pytest.raises(LawsError):
        bundle(folder / "x.laws", other, tmp_path / "y.zip")
    assert not (tmp_path / "y.zip").exists()


INSTALL = "import sys; from laws_ros.runtime.bundle import install; print('go', flush=True); install(*sys.argv[1:])"


def test_a_killed_installation_leaves_the_old_release_or_the_new_one(built, made, tmp_path) -> None:
    folder, _ = made
    bundle(folder / "x.laws", built.path, tmp_path / "plain.zip")
    first = install(folder / "robot.zip", tmp_path / "robot")
    rng = np.random.default_rng(0)
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", INSTALL, str(tmp_path / "plain.zip"), str(tmp_path / "robot")],
            stdout=subprocess.PIPE,
        )
        process.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        current = tmp_path / "robot" / "current"
        assert os.readlink(current).startswith("releases/")
        CachedPolicy.open(current / "library.laws", current / "policy.onnx")
        install(folder / "robot.zip", tmp_path / "robot")
    assert first.samefile(tmp_path / "robot" / "current")


def test_from_the_command_line(built, made, tmp_path, capsys) -> None:
    folder, _ = made
    out = str(tmp_path / "robot.zip")
    assert main(["bundle", str(folder / "x.laws"), "--policy", str(built.path), "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"]["policy.onnx"]["sha256"] == built.policy.sha256
    assert main(["install", out, "--into", str(tmp_path / "robot")]) == 0
    capsys.readouterr()
    for wrong in (["install", out, "--roll-back"], ["install"], ["install", "--roll-back"], ["install", "none.zip"]):
        assert main([*wrong, "--into", str(tmp_path / "robot")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
