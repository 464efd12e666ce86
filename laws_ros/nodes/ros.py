"""What the nodes share: declared parameters, labelled arrays, and a main that ends without a traceback.

Only what rclpy has since Humble is used.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import rclpy
import rclpy.lifecycle
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy._rclpy_pybind11 import RCLError
from rclpy.exceptions import NameValidationException, ParameterException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.validate_topic_name import validate_topic_name
from std_msgs.msg import Float64MultiArray, MultiArrayDimension

from laws_ros.core.card import Card
from laws_ros.core.errors import ConfigError, LawsError
from laws_ros.core.observation import Binding
from laws_ros.runtime.files import load_yaml, resolve

from . import exits, notify

SENSOR_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
COMMAND_QOS = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)
# Of many kinds of tools: matches any publisher, and keeps the order of a command and the empty one after it.
OPERATOR_QOS = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
# Never asks a publisher to wait or to send again.
HEARD_QOS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.BEST_EFFORT)
RECORD_QOS = QoSProfile(depth=1000, reliability=ReliabilityPolicy.RELIABLE)


class Declared(NamedTuple):
    """A parameter: its default (a Parameter.Type where an empty value is allowed), meaning and range."""

    name: str
    default: Any
    description: str
    low: float | None = None
    high: float | None = None


AUTOSTART = Declared("autostart", False, "configure and activate at once, and exit with code 2 if that is refused")


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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class Managed(rclpy.lifecycle.LifecycleNode):
    """A lifecycle node whose refusals are one line in its log, and with AUTOSTART its end, with exit code 2."""

    def __init__(self, name: str, parameters: Sequence[Declared]) -> None:
        super().__init__(name)
        declare(self, parameters)
        self.exit_code = 0
        self._declared = parameters
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)

    @abstractmethod
    def configure(self, p: dict[str, Any]) -> None:
        """Get ready with these parameters, or raise a LawsError."""

    @abstractmethod
    def activate(self) -> None:
        """Begin, or raise a LawsError."""

    @abstractmethod
    def stop(self) -> None:
        """End what `activate` has begun, if anything."""

    @abstractmethod
    def release(self) -> None:
        """Back to unconfigured, from wherever."""

    def report(
        self,
        part: str,
        facts: dict[str, Any],
        hardware: str = "",
        level: bytes = DiagnosticStatus.OK,
        words: str = "",
    ) -> None:
        """Publish a diagnosis of a part of this node; its message is `words`, else the state among the facts."""
        message = DiagnosticArray()
        message.header.stamp = self.get_clock().now().to_msg()
        name, words = f"{self.get_fully_qualified_name()}: {part}", words or facts["state"]
        pairs = [KeyValue(key=key, value=str(value)) for key, value in facts.items()]
        message.status = [DiagnosticStatus(level=level, name=name, message=words, hardware_id=hardware, values=pairs)]
        self._diagnostics.publish(message)

    def start(self) -> bool:
        """What `run` asks for: configure and activate at once, with AUTOSTART."""
        success = TransitionCallbackReturn.SUCCESS
        if self.get_parameter("autostart").value and (
            self.trigger_configure() != success or self.trigger_activate() != success
        ):
            self.exit_code = 2 if rclpy.ok() else 0  # a signal may have come meanwhile
            return False
        return True

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("configured", lambda: self.configure(values(self, self._declared)), state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self._transition("activated", self.activate, state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.stop()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.release()
        return super().on_cleanup(state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.release()
        return super().on_shutdown(state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.release()
        return super().on_error(state)

    def _transition(self, done: str, do: Callable[[], None], state: LifecycleState) -> TransitionCallbackReturn:
        try:
            do()
            exits.check()  # else rclpy would log that a transition cannot end in a context that is shut down
        except (LawsError, NameValidationException) as error:
            exits.check()
            if done == "configured":
                self.release()
            self.get_logger().error(f"not {done}: {one_line(error)}")
            return TransitionCallbackReturn.FAILURE
        except Exception:
            exits.check()
            if rclpy.ok():
                self.get_logger().fatal(traceback.format_exc())  # rclpy would swallow it
            raise
        return super().on_configure(state) if done == "configured" else super().on_activate(state)


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
    begun, code = False, 0
    try:
        rclpy.init()
        begun = True
        exits.running()
        gc.freeze()  # what the imports have made need not be looked at by the collection at the end
        node = make()
        if node.start():
            executor = SingleThreadedExecutor()
            executor.add_node(node)
            notify.tell(notify.READY)
            executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        pass
    except (LawsError, ParameterException, NameValidationException, RCLError) as error:
        if rclpy.ok() or not begun:  # otherwise a signal came while something was being made
            print("error:", one_line(error), file=sys.stderr)
            return 2
    except Exception:
        if not exits.told():  # compiled modules make an error of their own of an interrupt while they are imported
            raise
    finally:
        exits.ending()
        sys.setswitchinterval(1e-4)  # whatever other threads compute
        notify.tell(notify.STOPPING)
        if node is not None:
            node.stop()
            if executor is not None:
                executor.shutdown(timeout_sec=0)  # it holds handles; the node would not leave the graph
            node.destroy_node()
            code = node.exit_code
            vars(node).clear()  # what it refers to refers to it, and DDS keeps what is referred to
        with contextlib.suppress(RCLError):  # rclpy's own handler may be at it, too
            if rclpy.ok():
                rclpy.shutdown()
    return code
