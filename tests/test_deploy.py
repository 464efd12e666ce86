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


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = tmp_path / "laws@arm.service"
    unit.write_text((DEPLOY / "laws@.service").read_text().replace("/opt/laws/run", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert [line for line in result.stderr.splitlines() if "laws@" in line] == []
    assert result.returncode == 0, result.stderr


def test_the_unit_names_commands_and_files_that_exist() -> None:
    text = (DEPLOY / "laws@.service").read_text()
    (doctor,) = re.findall(r"ExecStartPre=\S+ (laws .*)", text)
    parser().parse_args(doctor.split()[1:])
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
