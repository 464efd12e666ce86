"""The controller, configured and activated; it ends with code 2 and one line if that is refused."""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, OpaqueFunction
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare


def controller(context):
    """Empty arguments leave the parameters file's values as they are."""
    given = {name: LaunchConfiguration(name).perform(context) for name in ("policy", "library", "binding")}
    node = Node(
        package="laws_ros",
        executable="controller",
        namespace=LaunchConfiguration("namespace"),
        parameters=[
            LaunchConfiguration("params_file"),
            {name: value for name, value in given.items() if value},
            {"autostart": True},
        ],
        arguments=["--ros-args", "--log-level", LaunchConfiguration("log_level")],
        output="screen",
    )
    return [node]


def generate_launch_description():
    default = PathJoinSubstitution([FindPackageShare("laws_ros"), "config", "cartpole.yaml"])
    arguments = [
        DeclareLaunchArgument("params_file", default_value=default, description="YAML file with the nodes' parameters"),
        DeclareLaunchArgument("policy", default_value="", description="ONNX policy; empty: the parameters file's"),
        DeclareLaunchArgument("library", default_value="", description="its library; empty: the parameters file's"),
        DeclareLaunchArgument("binding", default_value="", description="its binding; empty: the parameters file's"),
        DeclareLaunchArgument("namespace", default_value="", description="namespace of the node and its topics"),
        DeclareLaunchArgument("log_level", default_value="info", description="debug, info, warn, error or fatal"),
    ]
    return LaunchDescription([*arguments, OpaqueFunction(function=controller)])
