"""The launch files: read as they stand, and run where ROS's launch packages are installed (they are not on PyPI)."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from laws_ros.nodes.processes import private_domain
from laws_ros.runtime.files import share_path

ROOT = Path(__file__).parents[1]
FILES = sorted(share_path("launch").glob("*.launch.py"))
LAUNCH = """
import sys
from launch import LaunchDescription, LaunchService
from launch.actions import IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
file, *arguments = sys.argv[1:]
source = PythonLaunchDescriptionSource(file)
service = LaunchService()
service.include_launch_description(
    LaunchDescription([IncludeLaunchDescription(source, launch_arguments=[a.split(":=") for a in arguments])])
)
sys.exit(service.run())
"""

needs_launch = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("rclpy", "launch_ros", "mujoco")) or find_spec("launch").origin is None,
    reason="ROS's launch, launch_ros or rclpy, or MuJoCo, is missing: run this where ROS 2 is installed",
)


def calls(path: Path, name: str) -> list[ast.Call]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "id", None) == name]


def declared(path: Path) -> set[str]:
    """The arguments of a launch file and of those that it includes."""
    included = re.findall(r'"launch", "(\w+\.launch\.py)"', path.read_text())
    own = {call.args[0].value for call in calls(path, "DeclareLaunchArgument")}
    return own.union(*(declared(path.with_name(name)) for name in included))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_arguments_and_executables(path: Path) -> None:
    for call in calls(path, "DeclareLaunchArgument"):
        given = {keyword.arg for keyword in call.keywords}
        assert {"default_value", "description"} <= given, ast.unparse(call)
    constants = [
        call.args[0].value for call in calls(path, "LaunchConfiguration") if isinstance(call.args[0], ast.Constant)
    ]
    assert constants
    assert set(constants) <= declared(path)
    nodes = [{k.arg: k.value for k in call.keywords} for call in calls(path, "Node")]
    started = [node["executable"] for node in nodes if node["package"].value == "laws_ros"]
    # controller.launch.py's own `node` is given the name
    for name in [e.value for e in started if isinstance(e, ast.Constant)] + [
        c.args[0].value for c in calls(path, "node")
    ]:
        assert os.access(ROOT / "scripts" / name, os.X_OK)


@pytest.fixture
def launch(tmp_path: Path):
    """launch(file, *arguments): the output of running a launch file against this checkout."""
    # What an installation looks like to ROS: the package's marker, its share and its executables.
    marker = tmp_path / "share/ament_index/resource_index/packages"
    marker.mkdir(parents=True)
    (marker / "laws_ros").touch()
    (tmp_path / "share/laws_ros").symlink_to(ROOT)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/laws_ros").symlink_to(ROOT / "scripts")
    environment = {
        **os.environ,
        "AMENT_PREFIX_PATH": os.pathsep.join([str(tmp_path), os.environ.get("AMENT_PREFIX_PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "ROS_DOMAIN_ID": private_domain(),
        "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        "ROS_LOG_DIR": str(tmp_path / "log"),
    }

    def launch(file: str, *arguments: str) -> str:
        command = [sys.executable, "-c", LAUNCH, str(ROOT / "launch" / file), *arguments]
        done = subprocess.run(command, capture_output=True, env=environment, timeout=300, check=False, text=True)
        output = done.stdout + done.stderr
        assert "Traceback" not in output, output
        return output

    return launch


@needs_launch
def test_sim_launch(launch) -> None:
    output = launch("sim.launch.py", "duration_s:=2", "namespace:=robot1", "clock:=false")
    assert "/robot1/joint_states -> /robot1/slider_effort_controller/commands" in output
    assert output.count("process has finished cleanly") == 2, output


@needs_launch
def test_a_folder_of_state_brings_a_learner(launch, tmp_path: Path) -> None:
    state = tmp_path / "state"
    output = launch("sim.launch.py", "duration_s:=15", "namespace:=robot1", "clock:=false", f"state:={state}")
    assert f"[robot1.learner]: configured: {state}/robot1: " in output
    assert output.count("process has finished cleanly") == 3, output
    assert (state / "robot1" / "library.laws").is_file()


@needs_launch
def test_refused_controller_launch(launch) -> None:
    output = launch("controller.launch.py", "library:=/nowhere/x.laws")
    assert "not configured: /nowhere/x.laws" in output
    assert "exit code 2" in output


@needs_launch
def test_robot_launch(launch) -> None:
    """Without the robot's model it refuses; with one it is the controller of config/ROBOT.yaml."""
    output = launch("robot.launch.py", "robot:=cartpole", "library:=/nowhere/x.laws", "namespace:=left")
    assert "[left.controller]: not configured: /nowhere/x.laws" in output


SOMEBODY_ELSES = """
from launch import LaunchDescription
from launch.actions import ExecuteProcess, GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import PathJoinSubstitution
from launch_ros.actions import SetRemap
from launch_ros.substitutions import FindPackageShare

FILE = PathJoinSubstitution([FindPackageShare("laws_ros"), "launch", "sim.launch.py"])


def robot(namespace, **arguments):
    given = {"namespace": namespace, "duration_s": "3", **arguments}
    include = IncludeLaunchDescription(PythonLaunchDescriptionSource(FILE), launch_arguments=given.items())
    return GroupAction([SetRemap("joint_states", "measured"), include])


def generate_launch_description():
    own = ExecuteProcess(cmd=["true"])
    return LaunchDescription([own, robot("left"), robot("right", clock="false")])
"""


@needs_launch
def test_two_robots_in_somebody_elses_launch_file(launch, tmp_path: Path) -> None:
    """Each in its namespace, with a remapped topic; what else that file starts may end."""
    file = tmp_path / "other.launch.py"
    file.write_text(SOMEBODY_ELSES)
    output = launch(str(file))
    for name in ("left", "right"):
        assert f"/{name}/measured -> /{name}/slider_effort_controller/commands" in output
    assert output.count("process has finished cleanly") == 5, output
    assert "no command within" not in output  # they found each other on the topic by its other name
