"""A real robot: the controller in front of ros2_control's forward controller, whose commands it writes.

The robot's own launch file starts its drivers, controller_manager and broadcasters; include this one in it, once per
robot, each in its namespace. Topics can be remapped around it with SetRemap, as around any launch file.
"""

from launch import LaunchDescription
from launch.actions import DeclareLaunchArgument, ExecuteProcess, IncludeLaunchDescription
from launch.conditions import IfCondition
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch.substitutions import LaunchConfiguration, PathJoinSubstitution, PythonExpression
from launch_ros.actions import Node
from launch_ros.substitutions import FindPackageShare


def given(name):
    """A condition: the argument is not empty."""
    return IfCondition(PythonExpression(["'", LaunchConfiguration(name), "' != ''"]))


def generate_launch_description():
    share = FindPackageShare("laws_ros")
    file = [PathJoinSubstitution([share, "config", LaunchConfiguration("robot")]), ".yaml"]
    return LaunchDescription(
        [
            # The arguments of controller.launch.py are arguments of this file, too.
            DeclareLaunchArgument("robot", default_value="arm_sort", description="names config/ROBOT.yaml"),
            DeclareLaunchArgument(
                "params_file", default_value=file, description="YAML file with the nodes' parameters; default: ROBOT's"
            ),
            DeclareLaunchArgument(
                "forward_controller",
                default_value="",
                description="ros2_control controller to load and activate; empty: it runs already",
            ),
            DeclareLaunchArgument(
                "record", default_value="", description="new folder for a bag of all topics (ros2 bag); empty: none"
            ),
            IncludeLaunchDescription(
                PythonLaunchDescriptionSource(PathJoinSubstitution([share, "launch", "controller.launch.py"]))
            ),
            Node(
                package="controller_manager",
                executable="spawner",
                namespace=LaunchConfiguration("namespace"),
                arguments=[LaunchConfiguration("forward_controller")],
                condition=given("forward_controller"),
                output="screen",
            ),
            ExecuteProcess(
                cmd=["ros2", "bag", "record", "--all", "--output", LaunchConfiguration("record")],
                condition=given("record"),
                output="screen",
            ),
        ]
    )
