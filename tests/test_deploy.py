"""What deploy/ installs: the unit is valid, and its commands are ones that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from laws_ros.cli import parser
from laws_ros.runtime.files import share_path

DEPLOY = share_path("README.md").parent / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))


def test_systemd_takes_the_units(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    units = []
    for unit in UNITS:
        units.append(tmp_path / unit.name.replace("@", "@arm"))
        units[-1].write_text(unit.read_text().replace("/opt/laws/run", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, units)], capture_output=True, text=True, check=False
    )
    assert [line for line in result.stderr.splitlines() if "laws" in line] == []
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_a_unit_names_commands_files_and_parameters_that_exist(unit: Path) -> None:
    text = unit.read_text()
    for doctor in re.findall(r"ExecStartPre=\S+ (laws .*)", text):
        parser().parse_args(doctor.split()[1:])
    (node,) = re.findall(r"-m laws_ros\.nodes (\w+)", text)
    source = "".join((DEPLOY.parent / f"laws_ros/nodes/{name}.py").read_text() for name in (node, "ros"))
    given = re.findall(r"-p ([\w.]+):=", text)
    assert given and set(given) <= set(re.findall(r'Declared\("([\w.]+)"', source))
    bundled = set(re.findall(r"current/([\w.]+)", text))
    from laws_ros.runtime import bundle

    assert bundled <= set(bundle._NAMES)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a.whl"], "usage:"),
        (["missing.whl", "arm", "missing.zip"], "missing.whl: no such file"),
        (["a.whl", "../x", "a.zip"], "robot name '../x'"),
    ],
    ids=["count", "file", "name"],
)
def test_the_installer_refuses_in_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    for name in ("a.whl", "a.zip"):
        (tmp_path / name).touch()
    result = subprocess.run(
        [str(DEPLOY / "install.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize("name", ["jetpack6", "jetpack7"])
def test_containers_install_what_the_package_needs(name: str) -> None:
    """All of install_requires, ONNX Runtime's wheel apart: on a GPU it has to be NVIDIA's and not the one of PyPI."""
    text = (DEPLOY / f"Containerfile.{name}").read_text()
    (needed,) = re.findall(r"install_requires=\[(.*?)\]", (DEPLOY.parent / "setup.py").read_text())
    (first,) = re.findall(r"pip install --no-cache-dir (numpy .*) \\\n", text)
    named = [word.strip('"').replace("$ONNXRUNTIME", "onnxruntime") for word in first.split()]
    assert sorted(named) == sorted(re.findall(r'"([^"]+)"', needed))
    assert "--no-deps /tmp/laws_ros-*.whl" in text and "ARG ONNXRUNTIME=onnxruntime\n" in text
