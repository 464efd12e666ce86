"""Pictures of a workload without a screen: a contact sheet of one episode, through EGL or OSMesa."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import WorkloadError

from .workloads import Workload, episode_seed

BACKENDS = ("egl", "osmesa")
COLUMNS, ROWS, WIDTH, HEIGHT = 4, 3, 320, 240


def choose_backend() -> str:
    """Make MuJoCo draw without a screen: MUJOCO_GL as it is set, else the first of BACKENDS that works here.

    MuJoCo reads the variable when it is imported, so this comes first. Whether a library works shows only when it is
    used, and one that failed stays loaded, so each is tried in a process of its own.

    Raises:
        WorkloadError: none works.
    """
    asked = os.environ.get("MUJOCO_GL", "")
    for backend in (asked,) if asked else BACKENDS:
        code = "import mujoco; mujoco.GLContext(8, 8).make_current()"
        tried = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, timeout=120
        )
        if tried.returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return backend
    what = f"MUJOCO_GL={asked} does not work" if asked else f"neither {' nor '.join(BACKENDS)} works"
    raise WorkloadError(
        f"no pictures without OpenGL: {what} here; install libegl1 or libosmesa6 (apt-get) and try MUJOCO_GL=osmesa"
    )


def contact_sheet(
    workload: Workload,
    policy: Callable[[NDArray[np.float32]], NDArray[Any]],
    out: Path,
    seed: int = 0,
    seconds: float | None = None,
) -> float:
    """Draw COLUMNS x ROWS pictures, evenly spaced in time, of the first episode of a seed into one PNG.

    Args:
        policy: maps observations [1, n] to actions [1, m], or indices [1, 1].
        seconds: of the episode; default as long as it lasts.

    Returns:
        Seconds of simulated time shown.

    Raises:
        WorkloadError: a workload that cannot be drawn.
    """
    from PIL import Image, ImageDraw

    spec = workload.spec
    steps = spec.episode_steps if seconds is None else max(1, min(spec.episode_steps, round(seconds / spec.period_s)))
    lasts = sum(1 for _ in _episode(workload, policy, seed, steps))  # a first run tells how long it lasts
    wanted = np.unique(np.linspace(0, lasts - 1, COLUMNS * ROWS).round().astype(int)).tolist()
    sheet = Image.new("RGB", (COLUMNS * WIDTH, ROWS * HEIGHT))
    with _Camera(workload) as camera:
        for k, simulation in enumerate(_episode(camera.workload, policy, seed, steps)):
            if k in wanted:
                place = wanted.index(k)
                picture = Image.fromarray(camera.shoot(simulation)).resize((WIDTH, HEIGHT))
                ImageDraw.Draw(picture).text(
                    (6, 4), f"{k * spec.period_s:.2f} s", fill="white", stroke_width=1, stroke_fill="black"
                )
                sheet.paste(picture, (place % COLUMNS * WIDTH, place // COLUMNS * HEIGHT))
    sheet.quantize(256, Image.Quantize.FASTOCTREE).save(out, optimize=True)
    return lasts * spec.period_s


def _episode(
    workload: Workload, policy: Callable[[NDArray[np.float32]], NDArray[Any]], seed: int, steps: int
) -> Iterator[Any]:
    """The simulation, before each of its steps."""
    simulation = workload.simulation()
    try:
        x = simulation.reset(episode_seed(seed, 0))
        for _ in range(steps):
            yield simulation
            action = np.asarray(policy(x[None]))[0]
            x, _, terminated = simulation.step(int(action[0]) if workload.spec.discrete else action)
            if terminated:
                break
    finally:
        simulation.close()


class _Camera:
    """Draws a simulation: one of MuJoCo's lanes by MuJoCo's renderer, a Gymnasium environment by its own."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._renderer: Any = None
        if workload.spec.name.startswith("gym:"):
            from .gym_env import drawn

            self.workload = drawn(workload)

    def shoot(self, simulation: Any) -> NDArray[np.uint8]:
        """RGB [height, width, 3]."""
        if hasattr(simulation, "picture"):
            return np.asarray(simulation.picture(), np.uint8)
        import mujoco

        lanes = simulation.lanes
        model = lanes.models[0]
        if self._renderer is None:
            self._renderer = mujoco.Renderer(model, HEIGHT, WIDTH)
            self._data = mujoco.MjData(model)
        lanes.load(0, self._data)
        self._renderer.update_scene(self._data, camera=0 if model.ncam else -1)
        return np.asarray(self._renderer.render(), np.uint8)

    def __enter__(self) -> _Camera:
        return self

    def __exit__(self, *_: object) -> None:
        if self._renderer is not None:
            self._renderer.close()
