"""The controller, configured and activated; it ends with code 2 and one line if that is refused.

With a folder of state, a learner beside it, which is started again if it should end; the controller goes on meanwhile.
So does a robot of a fleet with its cell, which shares experts with the robots around it.
"""

from pathlib import Path

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare


def nodes(context):
    """Empty arguments leave the parameters file's values as they are."""

    def node(name, *arguments, **options):
        given = {argument: LaunchConfiguration(argument).perform(context) for argument in arguments}
        return Node(
            package="laws_ros",
            executable=name,
            namespace=LaunchConfiguration("namespace"),
            parameters=[
                LaunchConfiguration("params_file"),
                {argument: value for argument, value in given.items() if value},
                {"autostart": True},
            ],
            arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
            output="screen",
            **options,
        )

    started = [node("controller", "policy", "library", "binding", "state")]
    if state := LaunchConfiguration("state").perform(context):
        started.append(node("learner", "policy", "library", "state", respawn=True, respawn_delay=5.0))
        namespace = LaunchConfiguration("namespace").perform(context).strip("/")
        if (Path(state).expanduser() / namespace / "fleet" / "robot.json").is_file():
            started.append(node("cell", "state", respawn=True, respawn_delay=5.0))
    return started


def generate_launch_description():
    default = PathJoinSubstitution([FindPackageShare("laws_ros"), "config", "cartpole.yaml"])
    arguments = [
        DeclareLaunchArgument("params_file", default_value=default, description="YAML file with the nodes' parameters"),
        DeclareLaunchArgument("policy", default_value="", description="ONNX policy; empty: the parameters file's"),
        DeclareLaunchArgument("library", default_value="", description="its library; empty: the parameters file's"),
        DeclareLaunchArgument("binding", default_value="", description="its binding; empty: the parameters file's"),
        DeclareLaunchArgument(
            "state",
            default_value="",
            description="folder for what is learnt and corrected, and a learner; empty: none, or the parameters file's",
        ),
        DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and its topics"),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=nodes)])
