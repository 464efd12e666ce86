"""`laws up`: robots, simulated or real, under their controllers, as the launch files start them, without ROS launch."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from laws_ros.core.errors import ConfigError
from laws_ros.core.observation import Binding
from laws_ros.runtime.files import load_yaml, resolve, share_path

from .processes import Child, interrupts
from .record import BagRecorder


def run(
    robot: str,
    namespaces: Sequence[str] = ("",),
    simulate: bool = True,
    seconds: float = 0.0,
    record: str | None = None,
    state: str | None = None,
    overrides: dict[str, dict[str, Any]] | None = None,
) -> int:
    """Start the nodes of every namespace; when a controller or simulator ends, so do all.

    Args:
        robot: names config/ROBOT.yaml, or is the path of such a parameters file.
        simulate: without it the robots' own drivers publish the observations.
        seconds: of operation; 0: until interrupted.
        record: a new folder for a bag of all observations, commands, decisions and diagnostics.
        state: the robots' folder of state; with it, there are learners, and cells for those that are of a fleet.
        overrides: node -> parameters over those of the file.

    Returns:
        The exit code of the process that ended first, 0 after an interrupt.

    Raises:
        ConfigError: no such robot, a namespace twice, or nothing can be recorded.
    """
    parameters = share_path(f"config/{robot}.yaml")
    if not parameters.exists() or os.sep in robot:
        parameters = Path(robot)
    if not parameters.is_file():
        known = sorted(p.stem for p in share_path("config").glob("*.yaml") if "." not in p.stem)
        raise ConfigError(f"{robot}: neither a robot ({', '.join(known)}) nor a parameters file")
    for namespace in namespaces:
        if list(namespaces).count(namespace) > 1:
            raise ConfigError(f"namespace {namespace!r} stands twice; two robots would share its topics")
    if "ROS_LOG_DIR" not in os.environ:
        os.environ["ROS_LOG_DIR"] = tempfile.mkdtemp(prefix="laws_up_")
    children: list[Child] = []
    with interrupts() as interrupted, ExitStack() as at_the_end:
        recorder = Recording(record, parameters, namespaces, simulate) if record else None
        if recorder is not None:
            at_the_end.callback(recorder.close)
        at_the_end.callback(_end, children)
        for k, namespace in enumerate(namespaces):
            names = ["controller", *(["simulator"] if simulate else []), *(["learner"] if state else [])]
            if state and (Path(state) / namespace.strip("/") / "fleet" / "robot.json").is_file():
                names.append("cell")
            for name in names:
                own = dict((overrides or {}).get(name, {}))
                if state and name != "simulator":
                    own["state"] = str(Path(state).absolute())
                if name == "cell":
                    own["autostart"] = True  # no parameters file speaks of it
                if name == "simulator" and k:
                    own["clock"] = False
                children.append(Child(name, parameters, namespace=namespace, **own))
        end = time.monotonic() + seconds if seconds else float("inf")
        while time.monotonic() < end and not interrupted():
            for child in [child for child in children if not child.running()]:
                code = child.process.returncode
                print(f"laws up: the {child.name} has ended with code {code}", file=sys.stderr)
                if child.name not in ("learner", "cell"):
                    return code if code >= 0 else 128 - code  # killed: as a shell says it
                children.remove(child)  # the robot goes on without
            if recorder is not None:
                recorder.spin(0.1)
            else:
                time.sleep(0.1)
    return 0


def _end(children: list[Child]) -> None:
    for child in children:
        child.process.terminate()  # all at once, then wait for each
    for child in children:
        child.end()


class Recording:
    """A bag of everything that the robots of a parameters file say, in a context of its own."""

    def __init__(self, folder: str, parameters: Path, namespaces: Sequence[str], simulate: bool) -> None:
        wanted = _parameters(parameters, "controller")
        if not wanted.get("binding"):
            raise ConfigError(f"{parameters}: without a binding it is not known what to record; use ros2 bag record")
        path = resolve(wanted["binding"])
        binding = Binding.from_dict(load_yaml(path), str(path))
        array = "std_msgs/msg/Float64MultiArray"
        topics = {"/diagnostics": "diagnostic_msgs/msg/DiagnosticArray"}
        for namespace in namespaces:
            prefix = f"/{namespace.strip('/')}/".replace("//", "/")
            topics |= {prefix + topic.name: topic.type for topic in binding.topics}
            topics |= {prefix + name: binding.commands_type for name in (binding.commands, "laws/intervention")}
            topics[prefix + "controller/decision"] = array
            if simulate:
                topics[prefix + "simulator/episode"] = array
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = Node("laws_record", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._bag = BagRecorder(self._node, Path(folder), topics)

    def spin(self, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def close(self) -> None:
        self._bag.close()
        self._node.destroy_node()
        self._context.try_shutdown()


def _parameters(path: Path, node: str) -> dict[str, Any]:
    for name, entry in load_yaml(path).items():
        if name.rpartition("/")[2] == node and isinstance(entry, dict):
            found: dict[str, Any] = entry.get("ros__parameters", {})
            return found
    raise ConfigError(f"{path}: no parameters of a node named {node}")
