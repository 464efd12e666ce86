"""What pip and colcon are told; the slow tests (make test-install) install it for real."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import runpy
import subprocess
import time
import venv
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import setuptools

import laws_ros
from laws_ros.runtime.files import load_yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def setup_arguments(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py passes to setuptools."""
    caught: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return caught


def test_package_xml(setup_arguments: dict[str, Any]) -> None:
    package = ET.parse(ROOT / "package.xml").getroot()
    assert package.get("format") == "3"
    assert package.findtext("name") == setup_arguments["name"] == "laws_ros"
    assert package.findtext("version") == setup_arguments["version"] == laws_ros.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", laws_ros.__version__)
    assert package.findtext("license") == setup_arguments["license"]
    assert package.findtext("description")
    maintainer = package.find("maintainer")
    # What catkin_pkg accepts; anything else silently makes this a plain Python package for colcon.
    assert re.fullmatch(
        r"[-a-zA-Z0-9_%+]+(\.[-a-zA-Z0-9_%+]+)*@[-a-zA-Z0-9%]+(\.[-a-zA-Z0-9%]+)*", maintainer.get("email")
    )
    assert package.findtext("export/build_type") == "ament_python"


def test_ros_dependencies_are_declared(setup_arguments: dict[str, Any]) -> None:
    """Every ROS package that a node imports stands in package.xml, and its wheel in the extra `ros`."""
    package = ET.parse(ROOT / "package.xml").getroot()
    declared = {node.text for node in package.iter("exec_depend")}
    wheels = {
        re.match(r"ros-([a-z-]+)", wheel).group(1).replace("-", "_")
        for wheel in setup_arguments["extras_require"]["ros"]
    }
    imported = set()
    for path in (ROOT / "laws_ros/nodes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                imported |= {name.split(".")[0] for name in names}
    # Bindings name message types as text ("sensor_msgs/msg/JointState"); they are imported when they are needed.
    text = (ROOT / "laws_ros/core/observation.py").read_text()
    imported |= set(re.findall(r"\b(\w+_msgs)/(?:msg/)?\w+", text))
    ros = {name for name in imported if name.endswith(("_msgs", "_srvs")) or name == "rclpy"}
    assert {"rclpy", "sensor_msgs", "geometry_msgs", "trajectory_msgs"} <= ros
    assert ros <= declared
    assert ros <= wheels
    assert "rclpy" not in " ".join(setup_arguments["install_requires"])


def test_installed_files(setup_arguments: dict[str, Any]) -> None:
    files = dict(setup_arguments["data_files"])
    assert files["share/ament_index/resource_index/packages"] == ["resource/laws_ros"]
    assert files["share/laws_ros"] == ["package.xml"]
    for folder, needed in (
        ("launch", {"controller.launch.py", "sim.launch.py"}),
        ("config", {"cartpole.yaml"}),
        ("sim", {"cartpole.xml"}),
        ("models", {"cartpole.onnx", "cartpole.yaml", "cartpole.laws"}),
    ):
        assert needed <= {Path(file).name for file in files[f"share/laws_ros/{folder}"]}
    for script in files["lib/laws_ros"]:
        assert os.access(ROOT / script, os.X_OK)
        assert (ROOT / script).read_text().startswith("#!/usr/bin/env python3\n")
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    assert config["install"]["install_scripts"] == config["develop"]["script_dir"] == "$base/lib/laws_ros"


PARAMETER_FILES = sorted(path for path in (ROOT / "config").glob("*.yaml") if ".binding." not in path.name)


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.name)
def test_parameter_files_know_only_declared_parameters(path: Path) -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")
    from laws_ros.nodes import controller, learner, simulator

    known = {f"/**/{node.__name__.rpartition('.')[2]}": node.PARAMETERS for node in (controller, learner, simulator)}
    data = load_yaml(path)
    assert set(data) <= set(known)
    for node, section in data.items():
        assert list(section) == ["ros__parameters"]
        assert set(section["ros__parameters"]) <= {p.name for p in known[node]}


@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True], ids=["install", "editable"])
def test_pip_install(tmp_path: Path, editable: bool) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    target = ["--editable", str(ROOT)] if editable else [str(ROOT)]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *target], check=True, cwd=tmp_path)
    command = [tmp_path / "venv/bin/laws", "--version"]
    version = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert laws_ros.__version__ in version
    code = "from laws_ros.runtime.files import share_path; print(share_path('models/cartpole.laws'))"
    found = subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout.strip()
    assert Path(found).is_file()
    assert Path(found).is_relative_to(ROOT if editable else tmp_path)
    if not editable:
        for script in ("controller", "simulator"):
            assert os.access(tmp_path / "venv/lib/laws_ros" / script, os.X_OK)


@pytest.mark.slow
def test_a_release_runs_the_demo_in_a_clean_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """sdist, the wheel made of it, the wheel installed, `laws demo` run: prints the figures of docs/start.md."""
    venv.create(tmp_path / "tools", with_pip=True)
    python = tmp_path / "tools/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True, cwd=tmp_path)
    subprocess.run([python, "-m", "build", "--outdir", tmp_path / "dist", str(ROOT)], check=True, capture_output=True)
    (wheel,), (sdist,) = ([*(tmp_path / "dist").glob(pattern)] for pattern in ("*.whl", "*.tar.gz"))
    start = time.monotonic()
    venv.create(tmp_path / "venv", with_pip=True)
    pip = [tmp_path / "venv/bin/python", "-m", "pip", "install", "--quiet", "--no-cache-dir", f"{wheel}[sim,ros]"]
    subprocess.run(pip, check=True, cwd=tmp_path)
    installed = time.monotonic()
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    command = [tmp_path / "venv/bin/laws", "demo", "--seconds", "30", "--json"]
    demo = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=alone)
    finished = time.monotonic()
    assert json.loads(demo.stdout)["violations"] == 0
    files = {f.stat().st_ino: f.stat().st_size for f in (tmp_path / "venv").rglob("*") if f.is_file()}
    size = sum(files.values()) / 1e6
    with capsys.disabled():
        print(f"\nwheel {wheel.stat().st_size / 1e6:.0f} MB, sdist {sdist.stat().st_size / 1e6:.0f} MB")
        print(f"environment made and installed in {installed - start:.0f} s, {size:.0f} MB")
        print(f"`laws demo` finished {finished - start:.0f} s after the beginning")
    assert size < 700.0


@pytest.mark.slow
def test_colcon_sees_an_ament_package(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    packages = ["setuptools", "colcon-ros", "colcon-package-information", "colcon-python-setup-py"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True, cwd=tmp_path)
    command = [tmp_path / "venv/bin/colcon", "list", "--paths", str(ROOT)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert "(ros.ament_python)" in listed
