"""What the nodes share: declared parameters, labelled arrays, and a main that ends without a traceback.

Only what rclpy has since Humble is used.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from array import array
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import rclpy
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy._rclpy_pybind11 import RCLError
from rclpy.exceptions import NameValidationException, ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.validate_topic_name import validate_topic_name
from std_msgs.msg import Float64MultiArray, MultiArrayDimension

from laws_ros.core.card import Card
from laws_ros.core.errors import ConfigError, LawsError
from laws_ros.core.observation import Binding
from laws_ros.runtime.files import load_yaml, resolve

from . import exits

SENSOR_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMAND_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
RECORD_QOS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)


class Declared(NamedTuple):
    """A parameter: its default (a Parameter.Type where an empty value is allowed), meaning and range."""

    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None


def declare(node: Node, parameters: Sequence[Declared]) -> None:
    """Declare parameters; an override of a wrong type or out of range raises one of rclpy's ParameterExceptions."""
    for p in parameters:
        descriptor = ParameterDescriptor(description=p.description)
        if isinstance(p.default, float):
            descriptor.floating_point_range = [FloatingPointRange(from_value=p.low, to_value=p.high)]
        elif p.low is not None:
            descriptor.integer_range = [IntegerRange(from_value=p.low, to_value=p.high, step=1)]
        node.declare_parameter(p.name, p.default, descriptor)


def values(node: Node, parameters: Sequence[Declared]) -> dict[str, Any]:
    """The values of declared parameters; an unset array is an empty list.

    Raises:
        ConfigError: a parameters file or command line sets a parameter that this node does not have.
    """
    # rclpy keeps what was asked for but never declared in this one place, from Humble to Kilted.
    for name in node._parameter_overrides:
        if not node.has_parameter(name):
            known = ", ".join(p.name for p in parameters)
            raise ConfigError(f"node {node.get_fully_qualified_name()}: unknown parameter {name!r}; it knows {known}")
    found = node.get_parameters_by_prefix("")
    return {p.name: [] if found[p.name].value is None else found[p.name].value for p in parameters}


def binding_of(node: Node, p: dict[str, Any], card: Card, policy_sha256: str | None) -> Binding:
    """The checked binding that the parameters `binding` or else `controller_name` ask for.

    Raises:
        ConfigError: both or neither are set, or the file is no binding.
        CardError: it does not fit the card.
        NameValidationException: a topic of it is no name.
    """
    if bool(p["binding"]) == bool(p["controller_name"]):
        what = "neither parameter binding nor" if not p["binding"] else "both parameters binding and"
        raise ConfigError(f"node {node.get_fully_qualified_name()}: {what} controller_name is set; set one of them")
    if p["binding"]:
        path = resolve(p["binding"])
        found = Binding.from_dict(load_yaml(path), str(path))
    else:
        found = Binding.of_card(card, f"{p['controller_name']}/commands")
    for name in (found.commands, *(topic.name for topic in found.topics)):
        validate_topic_name(name)
    return found.check(card, policy_sha256)


def message_class(kind: str) -> Any:
    """The class of "package/msg/Name".

    Raises:
        ConfigError: the package is not installed.
    """
    package, _, name = kind.partition("/msg/")
    try:
        return getattr(import_module(f"{package}.msg"), name)
    except ModuleNotFoundError:
        raise ConfigError(f"message type {kind}: the package {package} is not installed") from None


def labelled(columns: Sequence[str]) -> Float64MultiArray:
    """An array message whose layout names its columns, so that a recording explains itself."""
    message = Float64MultiArray()
    message.layout.dim = [MultiArrayDimension(label=",".join(columns), size=len(columns), stride=len(columns))]
    return message


def columns_of(message: Float64MultiArray) -> list[str]:
    """The names of the columns of a `labelled` message."""
    return message.layout.dim[0].label.split(",")


def set_data(message: Float64MultiArray, numbers: Iterable[float]) -> Float64MultiArray:
    """Replace a message's data; an array('d') is the one form that rclpy does not check number by number."""
    message.data = array("d", numbers)
    return message


def fail(node: Any, error: Exception) -> None:
    """End a node whose own thread has failed, with the traceback in the log and exit code 1."""
    if not rclpy.ok():
        return  # ROS was shut down under it
    node.get_logger().fatal("".join(traceback.format_exception(error)))
    node.exit_code = 1
    rclpy.shutdown()


def run(make: Callable[[], Any]) -> int:
    """Run a node until it shuts ROS down or is told to end.

    Args:
        make: returns a node that has, beside rclpy's, `start()` (False ends it at once), `stop()` and `exit_code`.

    Returns:
        The node's exit code (0 after SIGINT and SIGTERM), or 2 for bad parameters, with one line on stderr.
    """
    node: Any = None
    executor: Any = None
    begun = False
    try:
        rclpy.init()
        begun = True
        exits.running()
        node = make()
        if node.start():
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (LawsError, ParameterException, NameValidationException, RCLError) as error:
        if rclpy.ok() or not begun:  # otherwise a signal came while something was being made
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
    finally:
        exits.ending()
        if node is not None:
            node.stop()
            if executor is not None:
                executor.shutdown(timeout_sec=0)  # it holds handles; the node would not leave the graph
            node.destroy_node()
        with contextlib.suppress(RCLError):  # rclpy's own handler may be at it, too
            if rclpy.ok():
                rclpy.shutdown()
    return 0 if node is None else node.exit_code
