"""Simulator and controller; when one of them ends, so does the other (a learner may come and go)."""

from launch import LaunchDescription
from launch.actions import (
    DeclareLaunchArgument,
    EmitEvent,
    IncludeLaunchDescription,
    RegisterEventHandler,
)
from launch.event_handlers import OnProcessExit
from launch.events import Shutdown
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare


def ended(event, context):
    """Everything ends with either of the two; what else a launch file around this one has started is its own."""
    ours = isinstance(event.action, Node) and event.action.node_package == "laws_ros"
    if ours and event.action.node_executable in ("controller", "simulator"):
        return [EmitEvent(event=Shutdown(reason="a node has ended"))]
    return []


def generate_launch_description():
    share = FindPackageShare("laws_ros")
    return LaunchDescription(
        [
            # The arguments of robot.launch.py and controller.launch.py are arguments of this file, too.
            DeclareLaunchArgument("robot", default_value="cartpole", description="names config/ROBOT.yaml"),
            DeclareLaunchArgument("seed", default_value="0", description="of the simulated episodes"),
            DeclareLaunchArgument("duration_s", default_value="0.0", description="simulated seconds; 0: until stopped"),
            DeclareLaunchArgument("real_time_factor", default_value="1.0", description="simulated seconds per second"),
            DeclareLaunchArgument(
                "clock", default_value="true", description="publish /clock; of several robots in a graph only one may"
            ),
            RegisterEventHandler(OnProcessExit(on_exit=ended)),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "robot.launch.py"]))
            ),
            Node(
                package="laws_ros",
                executable="simulator",
                namespace=LaunchConfiguration("namespace"),
                parameters=[
                    LaunchConfiguration("params_file"),
                    {
                        "seed": ParameterValue(LaunchConfiguration("seed"), value_type=int),
                        "duration_s": ParameterValue(LaunchConfiguration("duration_s"), value_type=float),
                        "real_time_factor": ParameterValue(LaunchConfiguration("real_time_factor"), value_type=float),
                        "clock": ParameterValue(LaunchConfiguration("clock"), value_type=bool),
                    },
                ],
                arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
                output="screen",
            ),
        ]
    )
