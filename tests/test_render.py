"""Contact sheets, drawn in processes of their own: MuJoCo chooses its OpenGL when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from laws_ros.build import render
from laws_ros.core.errors import WorkloadError
from tests.support import random_mlp, save_mlp

pytest.importorskip("mujoco", reason="pictures need MuJoCo: pip install 'laws_ros[sim]'")
image = pytest.importorskip("PIL.Image", reason="pictures need Pillow: pip install 'laws_ros[plot]'")


def laws(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "laws_ros.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("backend", ["", *render.BACKENDS])
def test_a_contact_sheet_shows_different_moments(backend, tmp_path):
    out = tmp_path / "sheet.png"
    policy = str(save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(0), [4, 8, 1])))
    arguments = ["render", "cartpole", "--policy", policy, "--out", str(out), "--seconds", "1"]
    found = laws(*arguments, MUJOCO_GL=backend)
    if found.returncode == 2 and "no pictures without OpenGL" in found.stderr:
        pytest.skip(f"no {backend or 'headless OpenGL'} here: {found.stderr.strip()}")
    assert found.returncode == 0, found.stderr
    assert out.stat().st_size < 300_000
    with image.open(out) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    rows, columns = render.ROWS, render.COLUMNS
    assert pixels.shape == (rows * render.HEIGHT, columns * render.WIDTH, 3)
    cells = pixels.reshape(rows, render.HEIGHT, columns, render.WIDTH, 3).swapaxes(1, 2).reshape(rows * columns, -1)
    assert len({cell.tobytes() for cell in cells}) == rows * columns and cells.std(axis=1).min() > 5


def test_no_opengl_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(WorkloadError, match="MUJOCO_GL=nonsense does not work here; install libegl1"):
        render.choose_backend()


def test_a_gymnasium_environment(tmp_path):
    pytest.importorskip("gymnasium", reason="needs Gymnasium: pip install 'laws_ros[gym]'")
    policy = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(0), [3, 8, 1]))
    out = tmp_path / "pendulum.png"
    found = laws("render", "gym:Pendulum-v1", "--policy", str(policy), "--out", str(out), "--seconds", "2")
    if found.returncode == 2 and "no pictures without OpenGL" in found.stderr:
        pytest.skip(found.stderr.strip())
    assert found.returncode == 0, found.stderr
    assert 1000 < out.stat().st_size < 300_000
