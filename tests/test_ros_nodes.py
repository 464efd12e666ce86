"""The nodes as processes on real ROS 2 topics.

Written for a busy machine that takes seconds to make processes acquainted: what is awaited may take `PATIENCE_S`, and
what is said once may be lost, so everything is said until it has its effect.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

rclpy = pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")
from builtin_interfaces.msg import Time as TimeMessage  # noqa: E402
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from rcl_interfaces.srv import ListParameters, SetParameters  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import Float64MultiArray, UInt64  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

from laws_ros.build import workloads  # noqa: E402
from laws_ros.cli import main  # noqa: E402
from laws_ros.core import durable  # noqa: E402
from laws_ros.core.card import Card  # noqa: E402
from laws_ros.core.library import Library  # noqa: E402
from laws_ros.core.observation import Assembler, Binding  # noqa: E402
from laws_ros.core.safety import ON_DEADLINE, ON_ESTOP, ON_LIMIT, ON_SILENCE, ON_TIMEOUT, OPERATOR, POLICY  # noqa: E402
from laws_ros.nodes import control  # noqa: E402
from laws_ros.nodes.controller import columns  # noqa: E402
from laws_ros.nodes.loop import number_of  # noqa: E402
from laws_ros.nodes.processes import private_domain  # noqa: E402
from laws_ros.nodes.ros import COMMAND_QOS, RECORD_QOS, SENSOR_QOS, columns_of, set_data  # noqa: E402
from laws_ros.runtime import takeovers  # noqa: E402
from laws_ros.runtime.files import share_path  # noqa: E402
from laws_ros.runtime.policy import Policy  # noqa: E402
from laws_ros.runtime.routing import Router  # noqa: E402
from laws_ros.runtime.takeovers import SNAPSHOT  # noqa: E402
from tests.conftest import Built  # noqa: E402

PATIENCE_S = 120.0
Type = Parameter.Type
CONFIG = share_path("config/cartpole.yaml")


@pytest.fixture(scope="module", autouse=True)
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_DOMAIN_ID", private_domain())
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        patch.setenv("ROS_LOG_DIR", str(tmp_path_factory.mktemp("ros_log")))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        yield


class Process:
    """A node in a process of its own."""

    def __init__(self, log: Path, code: list[str], arguments: list[str]) -> None:
        self.log = log
        with log.open("wb") as out:
            command = [sys.executable, *code, *(["--ros-args", *arguments] if arguments else [])]
            self.popen = subprocess.Popen(command, stdout=out, stderr=out)

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def lines(self) -> list[str]:
        """What the node itself has said; DDS may complain of what killed processes have left in shared memory."""
        return [line for line in self.output.splitlines() if line.strip() and "[RTPS" not in line]

    def ended(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.popen.wait(timeout=PATIENCE_S)
        assert "Traceback" not in self.output, self.output
        return code

    def end(self, number: int = signal.SIGTERM) -> int:
        assert self.popen.poll() is None, self.output
        self.popen.send_signal(number)
        return self.ended()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """start(node, **parameters): a node of laws_ros with parameters over those of `file`."""
    running: list[Process] = []

    def start(
        node: str, file: Path = CONFIG, code: list[str] | None = None, last: str = "", **parameters: Any
    ) -> Process:
        arguments = ["--params-file", str(file)]
        for name, value in parameters.items():
            if name.startswith("__"):
                arguments += ["-r", f"{name}:={value}"]
            else:
                arguments += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        arguments += ["--", last] if last else []
        log = tmp_path / f"{node}{len(running)}.log"
        running.append(Process(log, code or ["-m", "laws_ros.nodes", node], arguments))
        return running[-1]

    yield start
    for process in running:
        process.popen.kill()
        process.popen.wait()


class Probe:
    """The rest of the robot: sends observations and takes commands, decisions, diagnostics and simulator topics."""

    def __init__(self) -> None:
        self.context = rclpy.Context()
        rclpy.init(context=self.context, signal_handler_options=SignalHandlerOptions.NO)
        self.node = Node("probe", context=self.context)
        self.executor = SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)
        self.seen: dict[str, list[Any]] = {}
        self.react: Callable[[JointState], None] = lambda message: None
        for topic, kind, qos in (
            ("small/commands", Float64MultiArray, COMMAND_QOS),
            ("controller/heartbeat", UInt64, 10),
            ("controller/decision", Float64MultiArray, RECORD_QOS),
            ("/diagnostics", DiagnosticArray, 10),
            ("simulator/episode", Float64MultiArray, RECORD_QOS),
            ("/clock", Clock, SENSOR_QOS),
        ):
            self.seen[topic] = []
            self.node.create_subscription(kind, topic, self.seen[topic].append, qos)
        self.observations = self.node.create_publisher(JointState, "joint_states", SENSOR_QOS)
        self.commands = self.node.create_publisher(Float64MultiArray, "slider_effort_controller/commands", COMMAND_QOS)
        self.clients: dict[str, Any] = {}

    def spin(self, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)

    def until(self, condition: Callable[[], Any], process: Process, also: Callable[[], None] = lambda: None) -> None:
        """Spin until a condition holds; `also` is called again and again meanwhile."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert process.popen.poll() is None, process.output
            assert time.monotonic() < end, process.output
            also()
            self.spin(0.02)

    def settle(self, topic: str) -> int:
        """Wait until a topic is silent for half a second; how many messages it has had."""
        end = time.monotonic() + PATIENCE_S
        count = -1
        while count != len(self.seen[topic]):
            assert time.monotonic() < end, topic
            count = len(self.seen[topic])
            self.spin(0.5)
        return count

    def call(self, kind: Any, name: str, **fields: Any) -> Any:
        if name not in self.clients:
            self.clients[name] = self._acquainted(kind, name)
        future = self.clients[name].call_async(kind.Request(**fields))
        self.executor.spin_until_future_complete(future, timeout_sec=PATIENCE_S)
        assert future.done(), f"{name}: no answer within {PATIENCE_S} s"
        return future.result()

    def _acquainted(self, kind: Any, name: str) -> Any:
        """A client that loses no answer.

        A server that does not know of a client yet drops its answer. Clients become known in the order in which they
        are made: once a later one has had an answer from the same process, this one is known.
        """
        client, end = self.node.create_client(kind, name), time.monotonic() + PATIENCE_S
        later = self.node.create_client(ListParameters, f"{name.rpartition('/')[0]}/list_parameters")
        while time.monotonic() < end:
            if client.wait_for_service(timeout_sec=1.0) and later.wait_for_service(timeout_sec=1.0):
                future = later.call_async(ListParameters.Request())
                self.executor.spin_until_future_complete(future, timeout_sec=2.0)
                if future.done():
                    self.node.destroy_client(later)
                    return client
                later.remove_pending_request(future)
        raise AssertionError(f"{name}: no such service within {PATIENCE_S} s")

    def set(self, node: str, **parameters: Any) -> str:
        """Set a node's parameters; returns why one was refused, or ""."""
        empty = {
            "tolerance": Type.DOUBLE_ARRAY,
            "budget.capacity": Type.DOUBLE_ARRAY,
            "certificates.kinds": Type.STRING_ARRAY,
        }
        messages = [
            Parameter(name, empty[name] if value == [] else None, value).to_parameter_msg()
            if isinstance(value, list)
            else Parameter(name, value=str(value) if isinstance(value, Path) else value).to_parameter_msg()
            for name, value in parameters.items()
        ]
        results = self.call(SetParameters, f"{node}/set_parameters", parameters=messages).results
        return "; ".join(r.reason for r in results if not r.successful)

    def transition(self, label: str, node: str = "controller") -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return self.call(ChangeState, f"{node}/change_state", transition=request.transition).success

    def state(self, node: str = "controller") -> str:
        return self.call(GetState, f"{node}/get_state").current_state.label

    def send(self, stamp_s: int = 7, **fields: Any) -> None:
        message = JointState(**fields)
        message.header.stamp.sec = stamp_s
        self.observations.publish(message)


@pytest.fixture
def probe() -> Iterator[Probe]:
    probe = Probe()
    yield probe
    probe.node.destroy_node()
    probe.context.try_shutdown()


@pytest.fixture(scope="module")
def small(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters of a controller for the small policy of conftest.py; it is never late and never times out."""
    library = tmp_path_factory.mktemp("library") / "small.laws"
    built.library.save(library)
    return {
        "policy": built.path,
        "library": library,
        "binding": "''",
        "controller_name": "small",
        "observation_timeout_s": 60.0,
        "miss.deadline_s": 5.0,  # a busy machine may take long to run another thread
        "autostart": False,
    }


def joint_state(x: np.ndarray) -> dict[str, Any]:
    """The observation (a.position, b.position, a.velocity) with the joints in another order, and one more."""
    a, b, va = map(float, x)
    return {"name": ["other", "b", "a"], "position": [9.0, b, a], "velocity": [9.0, 0.0, va]}


def test_lifecycle_and_hit(start: Any, probe: Probe, small: dict[str, Any], built: Built) -> None:
    controller = start("controller", **small)
    assert probe.state() == "unconfigured"
    x = built.observations[0]
    assert not probe.transition("activate")
    assert probe.transition("configure")
    assert probe.state() == "inactive"
    for _ in range(10):
        probe.send(**joint_state(x))
        probe.spin(0.02)
    assert not probe.seen["small/commands"]  # inactive

    assert probe.transition("activate")
    hits: list[Any] = []
    for x in built.observations[:40]:
        row = answer_to(probe, controller, x)
        action = np.array([row["action:a.effort"], row["action:b.effort"]])
        assert row["stamp_s"] == 7.0
        assert action.tolist() == [row["command:a.effort"], row["command:b.effort"]]
        again = partial(probe.send, **joint_state(x))
        probe.until(lambda action=action: commanded(probe) == action.tolist(), controller, again)
        error = np.abs(action - built.policy.decide(built.policy(x)))
        assert (error <= [row["bound:a.effort"], row["bound:b.effort"]]).all()
        hits.append(row["region"] >= 0)
    assert any(hits)

    def diagnosed() -> bool:
        values = {v.key: v.value for m in probe.seen["/diagnostics"] for s in m.status for v in s.values}
        return values.get("state") == "active" and values.get("library") == built.library.digest

    probe.until(diagnosed, controller)
    assert probe.transition("deactivate")
    count = probe.settle("small/commands")
    probe.send(**joint_state(x))
    assert probe.settle("small/commands") == count
    assert probe.transition("cleanup")
    assert probe.state() == "unconfigured"
    assert probe.transition("configure")
    assert controller.end() == 0


NAN = float("nan")
BAD_MESSAGES = {
    "NaN": ({"name": ["a", "b"], "position": [NAN, 0.0], "velocity": [0.0, 0.0]}, "a.position = nan"),
    "infinite": ({"name": ["a", "b"], "position": [0.0, 0.0], "velocity": [float("inf"), 0.0]}, "a.velocity = inf"),
    "too large for float32": ({"name": ["a", "b"], "position": [1e300, 0.0], "velocity": [0.0, 0.0]}, "a.position"),
    "out of range": ({"name": ["a", "b"], "position": [0.0, 5.5], "velocity": [0.0, 0.0]}, "b.position = 5.5 m"),
    "missing joint": ({"name": ["a"], "position": [0.0], "velocity": [0.0]}, "joint 'b' is missing"),
    "joint twice": ({"name": ["a", "b", "a"], "position": [0.0] * 3, "velocity": [0.0] * 3}, "'a' stands twice"),
    "no velocity": ({"name": ["a", "b"], "position": [0.0, 0.0]}, "velocity has 0 values for 2 joints"),
    "wrong length": ({"name": ["a", "b"], "position": [0.0], "velocity": [0.0, 0.0]}, "position has 1 values"),
    "empty": ({}, "the message has none"),
}


def test_a_bad_message_never_produces_an_action(start: Any, probe: Probe, small: dict[str, Any]) -> None:
    controller = start("controller", **{**small, "autostart": True})
    good = np.array([0.25, 0.5, 0.125], np.float32)  # the bad ones are not like it
    answer_to(probe, controller, good)
    for bad, words in BAD_MESSAGES.values():
        probe.until(
            lambda words=words: any(
                words in line and "/joint_states" in line for line in controller.output.splitlines()
            ),
            controller,
            lambda bad=bad: probe.send(**bad),
        )
        assert observed(answer_to(probe, controller, good)) == good.tolist()
    rows = [row_of(message) for message in probe.seen["controller/decision"]]
    assert {tuple(observed(row)) for row in rows} == {tuple(good.tolist())}  # nothing else was ever answered
    assert controller.end(signal.SIGINT) == 0


@pytest.mark.parametrize("reaction", ["hold", "zero"])
def test_observation_timeout(start: Any, probe: Probe, small: dict[str, Any], reaction: str) -> None:
    controller = start(
        "controller", **{**small, "autostart": True, "observation_timeout_s": 0.2, "on_timeout": reaction}
    )
    commands, decisions = probe.seen["small/commands"], probe.seen["controller/decision"]
    probe.until(lambda: "no usable message" in controller.output, controller)
    assert not commands  # nothing was ever observed, so there is nothing to hold
    probe.until(
        lambda: any(row_of(m)["region"] >= POLICY for m in decisions),
        controller,
        lambda: probe.send(**joint_state(np.ones(3))),
    )
    answer = next(row for row in map(row_of, decisions) if row["region"] >= POLICY)
    action = [answer["action:a.effort"], answer["action:b.effort"]]
    assert any(action)
    probe.until(lambda: newest(probe)["region"] == ON_TIMEOUT, controller)
    count = len(commands)
    probe.until(lambda: len(commands) > count + 2, controller)  # repeated
    probe.until(lambda: commanded(probe) == (action if reaction == "hold" else [0.0, 0.0]), controller)
    assert controller.end() == 0


def test_a_clock_that_jumps_back(start: Any, probe: Probe, small: dict[str, Any]) -> None:
    """Stamps from before the newest are refused until nothing else comes; that of the node itself disturbs nothing."""
    controller = start("controller", use_sim_time=True, **{**small, "autostart": True, "observation_timeout_s": 0.5})
    clock = probe.node.create_publisher(Clock, "/clock", SENSOR_QOS)
    x = np.array([0.25, 0.5, 0.125], np.float32)
    stamps = iter(range(10**9))

    def send(*times_s: int) -> None:
        time_s = times_s[next(stamps) % len(times_s)]
        clock.publish(Clock(clock=TimeMessage(sec=time_s)))
        probe.send(time_s, **joint_state(x))

    def answered(time_s: float) -> bool:
        rows = [row_of(message) for message in probe.seen["controller/decision"]]
        return any(row["stamp_s"] == time_s and row["region"] >= POLICY for row in rows)

    probe.until(lambda: answered(100.0), controller, lambda: send(100))
    probe.until(lambda: "a clock that was set back" in controller.output, controller, lambda: send(100, 3))
    probe.until(lambda: answered(3.0), controller, lambda: send(3))
    probe.seen["/diagnostics"].clear()
    probe.until(lambda: len(probe.seen["/diagnostics"]) > 2, controller, lambda: send(3))
    assert controller.end() == 0


# ------------------------------------------------------------------------------------------------- reactions


def row_of(message: Float64MultiArray) -> dict[str, float]:
    return dict(zip(columns_of(message), message.data, strict=True))


def observed(row: dict[str, float]) -> list[float]:
    """The observation that a row of ~/decision answers."""
    return [value for name, value in row.items() if name.startswith("observation:")]


def answer_to(probe: Probe, process: Process, x: np.ndarray) -> dict[str, float]:
    """Send an observation until it is answered; the newest row about it. What was under way before does not count."""
    decisions, before = probe.seen["controller/decision"], len(probe.seen["controller/decision"])

    def found() -> list[dict[str, float]]:
        return [row for row in map(row_of, decisions[before:]) if observed(row) == x.astype(float).tolist()]

    probe.until(found, process, lambda: probe.send(**joint_state(x)))
    return found()[-1]


def commanded(probe: Probe) -> list[float]:
    """The last command, as the robot gets it; [] before the first."""
    return probe.seen["small/commands"][-1].data.tolist() if probe.seen["small/commands"] else []


def newest(probe: Probe) -> dict[str, float]:
    """The last row on ~/decision by column."""
    return row_of(probe.seen["controller/decision"][-1])


def test_a_stalled_policy(start: Any, probe: Probe, small: dict[str, Any], built: Built) -> None:
    """Late answers become the reaction, the emergency stop does not wait for the policy, and tolerances change live."""
    parameters = {**small, "autostart": True, "tolerance": "[1e-9, 1e-9]", "miss.deadline_s": 1.0, "on_estop": "zero"}
    controller = start("controller", **parameters)
    decisions = probe.seen["controller/decision"]
    x = np.array([0.5, 0.1, 0.3], np.float32)

    def send() -> None:
        probe.send(**joint_state(x))

    action = built.policy.decide(built.policy(x)).tolist()
    assert any(action)
    probe.until(lambda: decisions and newest(probe)["region"] == POLICY, controller, send)
    probe.until(lambda: commanded(probe) == action, controller, send)

    assert probe.set("controller", **{"fault.policy_stall_s": 3.0}) == ""
    probe.until(lambda: newest(probe)["region"] == ON_DEADLINE, controller, send)
    assert commanded(probe) == action  # hold
    assert np.isnan(newest(probe)["action:a.effort"])
    probe.until(lambda: "answers later than 1000 ms" in controller.output, controller, send)
    probe.until(lambda: "the policy is held up by 3 s" in controller.output, controller, send)

    assert probe.call(Trigger, "controller/estop").success
    probe.until(lambda: newest(probe)["region"] == ON_ESTOP, controller, send)
    assert newest(probe)["command:a.effort"] == newest(probe)["command:b.effort"] == 0.0
    probe.until(lambda: commanded(probe) == [0.0, 0.0], controller)
    assert probe.set("controller", **{"fault.policy_stall_s": 0.0}) == ""
    probe.spin(0.3)
    assert newest(probe)["region"] == ON_ESTOP  # latched, and repeated without observations
    probe.until(lambda: level_of(probe) == DiagnosticStatus.ERROR, controller)
    assert probe.transition("deactivate")
    assert probe.transition("activate")
    probe.until(lambda: newest(probe)["region"] == ON_ESTOP, controller, send)  # it survives that

    assert probe.call(Trigger, "controller/estop_reset").success
    assert not probe.call(Trigger, "controller/estop_reset").success
    probe.until(lambda: newest(probe)["region"] == POLICY, controller, send)
    assert "3 values for 2 actions" in probe.set("controller", tolerance=[0.1, 0.1, 0.1])
    assert "at least 0" in probe.set("controller", tolerance=[0.1, float("nan")])
    assert "rate_hz" in probe.set("controller", rate_hz=50.0)
    assert probe.set("controller", tolerance=[0.5, 0.5]) == ""
    probe.until(lambda: newest(probe)["region"] >= 0, controller, send)
    assert newest(probe)["tolerance:a.effort"] == 0.5
    beats = probe.seen["controller/heartbeat"]
    probe.until(lambda: beats and beats[-1].data > 0, controller)
    assert controller.end() == 0


def level_of(probe: Probe) -> Any:
    messages = probe.seen["/diagnostics"]
    return messages[-1].status[0].level if messages else None


def test_limits_budget_and_rivals(
    start: Any, probe: Probe, small: dict[str, Any], tmp_path: Path, built: Built
) -> None:
    rows = binding()["observation"]
    channels = [
        {"name": "a.effort", "joint": "a", "field": "effort", "rate_per_s": 1.0, "safe": 0.3},
        {"name": "b.effort", "joint": "b", "field": "effort", "low": -0.05, "high": 0.05, "sign": -1},
    ]
    limited = binding(
        observation=[rows[0], {**rows[1], "high": 2.0}, rows[2]],
        action={"topic": "small/commands", "channels": channels},
    )
    file = tmp_path / "limited.yaml"
    file.write_text(yaml.safe_dump(limited))
    parameters = {
        **small, "autostart": True, "binding": file, "controller_name": "''", "on_limit": "safe_pose",
        "budget.capacity": "[0.3]", "budget.drain_per_s": "[0.0]", "certificates.kinds": "[linear]",
        "on_timeout": "ramp_down",
    }  # fmt: skip
    controller = start("controller", **parameters)
    commands, decisions = probe.seen["small/commands"], probe.seen["controller/decision"]
    x = built.observations[0]
    probe.until(lambda: decisions, controller, lambda: probe.send(**joint_state(x)))
    for k in range(60):
        probe.send(**joint_state(x if k < 30 else built.observations[k]))
        probe.spin(0.02)
    probe.until(lambda: newest(probe)["region"] == POLICY, controller, lambda: probe.send(**joint_state(x)))
    table = np.array([message.data for message in decisions])
    names = columns_of(decisions[0])
    hit = table[:, names.index("region")] >= 0
    spent = table[hit][:, [names.index("bound:a.effort"), names.index("bound:b.effort")]].sum(axis=0)
    assert hit.any()
    assert (spent <= 0.3).all()  # the budget never drains: all there ever is
    beyond = np.array([0.0, 2.5, 0.0])
    probe.until(lambda: newest(probe)["region"] == ON_LIMIT, controller, lambda: probe.send(**joint_state(beyond)))
    probe.until(
        lambda: commanded(probe)[:1] == pytest.approx([0.3]), controller, lambda: probe.send(**joint_state(beyond))
    )
    probe.until(lambda: "b.position = 2.5 is beyond its limits [-inf, 2]: safe_pose" in controller.output, controller)
    sent = np.array([message.data for message in commands])
    assert np.abs(sent[:, 1]).max() <= 0.05
    table = np.array([message.data for message in decisions])  # none lost, unlike commands
    steps = np.abs(np.diff(table[:, names.index("command:a.effort")]))
    assert steps.max() <= 1.0 * 0.01
    assert steps.max() > 0.009

    # A second controller on the same commands is refused; a publisher that comes later makes this one let go.
    second = start("controller", **{**parameters, "__node": "other", "autostart": False})
    assert probe.transition("configure", "other")
    if probe.transition("activate", "other"):  # it had not discovered the first one yet: one or both will let go soon
        probe.until(lambda: "inactive" in (probe.state(), probe.state("other")), controller)
        probe.until(lambda: probe.state("other") == "inactive" or probe.transition("deactivate", "other"), controller)
        probe.until(lambda: probe.state() == "active" or probe.transition("activate"), controller)
        probe.until(lambda: not probe.transition("activate", "other"), controller)
    assert "small/commands: 1 other publisher(s) command it already" in second.output
    assert second.end() == 0
    before = len(controller.output)
    rival = probe.node.create_publisher(Float64MultiArray, "small/commands", COMMAND_QOS)
    probe.until(lambda: "this one stops commanding" in controller.output[before:], controller)
    probe.until(lambda: probe.state() == "inactive", controller)
    probe.seen["/diagnostics"].clear()
    probe.until(lambda: len(probe.seen["/diagnostics"]) > 2, controller)  # it goes on telling its state
    probe.node.destroy_publisher(rival)
    assert controller.end() == 0


def caught(pid: int, number: int) -> bool:
    """Whether a process has a handler of its own for a signal."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    (mask,) = [int(line.split()[1], 16) for line in lines if line.startswith("SigCgt")] or [0]
    return bool(mask >> (number - 1) & 1)


@pytest.mark.parametrize("node", ["controller", "learner", "simulator"])
def test_a_signal_at_any_time_ends_a_node_cleanly(start: Any, small: dict[str, Any], tmp_path: Path, node: str) -> None:
    """From its first own line on, through imports, DDS, configuring and compiling."""
    running = []
    for k, delay in enumerate((0.0, 0.1, 0.3, 0.6, 1.0, 1.5, 2.5)):
        parameters = {**small, "autostart": True} if node == "controller" else {}
        if node == "learner":
            parameters = {"policy": small["policy"], "library": small["library"], "state": tmp_path / str(k)}
        process = start(node, **parameters)
        end = time.monotonic() + PATIENCE_S
        while not caught(process.popen.pid, signal.SIGTERM) and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(delay)
        process.popen.send_signal((signal.SIGTERM, signal.SIGINT)[k % 2])
        running.append((delay, process))
    for delay, process in running:
        assert process.ended() == 0, (delay, process.output)
        assert process.output.count("error") == 0, (delay, process.output)


@pytest.fixture(scope="module")
def other_policy(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network in a file that differs in one remark."""
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    model = onnx.load(str(built.path))
    model.doc_string = "another training run"
    onnx.save(model, str(path))
    path.with_suffix(".yaml").write_text(built.path.with_suffix(".yaml").read_text())
    return path


@pytest.fixture(scope="module")
def bare_policy(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same file, without a card beside it."""
    path = tmp_path_factory.mktemp("bare") / "bare.onnx"
    path.write_bytes(built.path.read_bytes())
    return path


def test_a_model_without_a_card(start: Any, probe: Probe, small: dict[str, Any], bare_policy: Path) -> None:
    """The card that its library has kept serves, and a line says so."""
    controller = start("controller", **{**small, "policy": bare_policy, "autostart": True})
    answer_to(probe, controller, np.array([0.25, 0.5, 0.125], np.float32))
    assert "bare.onnx: no card beside it; its observations are taken for a.position, b.pos" in controller.output
    assert controller.end() == 0


def binding(**changes: Any) -> dict[str, Any]:
    """A binding for the small policy, as from its YAML file."""
    rows = [
        {"name": f"{joint}.{field}", "topic": "joint_states", "joint": joint, "field": field}
        for joint, field in (("a", "position"), ("b", "position"), ("a", "velocity"))
    ]
    return {
        "topics": {"joint_states": {"type": "sensor_msgs/msg/JointState"}},
        "observation": rows,
        "action": {
            "topic": "small/commands",
            "channels": [{"name": f"{joint}.effort", "joint": joint, "field": "effort"} for joint in "ab"],
        },
        **changes,
    }


REORDERED = binding(observation=[binding()["observation"][i] for i in (1, 0, 2)])
RESCALED = binding(observation=[{**binding()["observation"][0], "scale": 57.3}, *binding()["observation"][1:]])
FOREIGN = binding(policy_sha256="0" * 64)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "library of another policy": ({"policy": "OTHER"}, ["small.laws", "other.onnx"]),
    "observation order": ({"binding": REORDERED}, ["observation[0]", "'b.position'", "'a.position'", ".yaml"]),
    "model without a card": (
        {"policy": "BARE", "library": "", "state": "STATE", "tolerance": [0.1, 0.1], "binding": binding()},
        ["observation[0]", "'a.position'", "'x0'"],
    ),
    "another scale": ({"binding": RESCALED}, ["a.position.scale: 57.3", "contradicts the units"]),
    "binding of another model": ({"binding": FOREIGN}, ["000000000000", "another model"]),
    "two bindings": ({"binding": "x.yaml"}, ["both parameters binding and controller_name"]),
    "missing binding": ({"binding": "/nowhere/x.yaml", "controller_name": ""}, ["/nowhere/x.yaml"]),
    "unknown kind": ({"certificates.kinds": ["hearsay"]}, ["hearsay"]),
    "budget": ({"budget.capacity": [1.0]}, ["budget.drain_per_s"]),
    "no policy": ({"policy": ""}, ["/controller", "'policy' is not set"]),
    "missing library": ({"library": "/nowhere/x.laws"}, ["/nowhere/x.laws"]),
    "tolerance of the wrong length": ({"tolerance": [0.1, 0.1, 0.1]}, ["tolerance", "3 values for 2 actions"]),
    "negative tolerance": ({"tolerance": [0.1, -0.1]}, ["tolerance", "-0.1"]),
    "unknown reaction": ({"on_timeout": "panic"}, ["on_timeout", "'panic'", "hold, zero, safe_pose, ramp_down"]),
    "topic that is no name": ({"controller_name": "a b"}, ["a b"]),
}


def test_refused_when_configuring(
    start: Any, probe: Probe, small: dict[str, Any], other_policy: Path, bare_policy: Path, tmp_path: Path
) -> None:
    """One error line each, exactly one, so that it is not lost among others; and then it can still be configured."""
    controller = start("controller", **small)
    assert probe.state() == "unconfigured"
    plain = {"tolerance": [], "certificates.kinds": [], "budget.capacity": [], "on_timeout": "hold", "state": ""}
    files = {"OTHER": str(other_policy), "BARE": str(bare_policy), "STATE": str(tmp_path)}
    for case, (changes, words) in REFUSED.items():
        changes = {k: files.get(v, v) if isinstance(v, str) else v for k, v in changes.items()}
        if isinstance(changes.get("binding"), dict):
            file = tmp_path / f"{case}.yaml"
            file.write_text(yaml.safe_dump(changes["binding"]))
            changes |= {"binding": str(file), "controller_name": ""}
        before = len(controller.lines)
        assert probe.set("controller", **changes) == ""
        assert not probe.transition("configure"), case
        (line,) = controller.lines[before:]
        assert "[ERROR]" in line
        for word in words:
            assert word in line, case
        assert (
            probe.set("controller", **{name: small.get(name, plain.get(name)) for name in changes} | {"binding": ""})
            == ""
        )
    assert probe.state() == "unconfigured"
    assert probe.transition("configure")
    assert controller.end() == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"library": "/nowhere/x.laws"}, ["not configured", "/nowhere/x.laws"]),
        ({"tolerence": "[0.1, 0.1]"}, ["not configured", "/controller", "'tolerence'"]),
    ],
    ids=["missing library", "unknown key"],
)
def test_refused_at_start(start: Any, small: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    """With autostart, exit code 2 and one error line."""
    controller = start("controller", **{**small, "autostart": True, **changes})
    assert controller.ended() == 2
    (line,) = controller.lines
    for word in ["[ERROR]", *words]:
        assert word in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rate_hz": 100}, ["rate_hz", "DOUBLE"]), ({"rate_hz": 0.0}, ["rate_hz", "0.0"])],
    ids=["wrong type", "out of range"],
)
def test_bad_parameter_values(start: Any, small: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    controller = start("controller", **{**small, **changes})
    assert controller.ended() == 2
    (line,) = controller.lines
    for word in ["error:", *words]:
        assert word in line


def test_a_refused_transition_leaves_the_node_up(
    start: Any, probe: Probe, small: dict[str, Any], other_policy: Path, tmp_path: Path
) -> None:
    controller = start("controller", **{**small, "policy": other_policy})
    assert not probe.transition("configure")
    assert probe.state() == "unconfigured"
    assert "not configured:" in controller.output
    assert controller.end() == 0


HEAVY = ("torch", "mujoco", "gymnasium", "scipy")


def test_the_dashboard_shows_what_it_says() -> None:
    """config/foxglove.json names columns of ~/decision by number: each label must be that column's name."""
    policy = Policy(share_path("models/cartpole.onnx"))
    names = columns(policy.card, Binding.of_card(policy.card, "x").check(policy.card, None))
    layout = json.loads(share_path("config/foxglove.json").read_text())
    series = [p for panel in layout["configById"].values() for p in panel.get("paths", [])]
    shown = [p for p in series if p["value"].startswith("/controller/decision.data[")]
    assert len(shown) >= 6
    for p in shown:
        assert p["label"] == names[int(p["value"].rpartition("[")[2].rstrip("]"))]
    assert set(re.findall(r"\w+!\w+", json.dumps(layout["layout"]))) == set(layout["configById"])


def test_controller_without_training_and_simulation(start: Any, probe: Probe, small: dict[str, Any]) -> None:
    """What a robot has: importing any of the others fails, and the controller answers all the same."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    code = f"{block}; from laws_ros.nodes.__main__ import main; sys.exit(main('controller'))"
    for name in HEAVY:
        result = subprocess.run([sys.executable, "-c", f"{block}; import {name}"], capture_output=True, check=False)
        assert result.returncode == 1  # the block blocks
    controller = start("controller", code=["-c", code], **{**small, "autostart": True})
    probe.until(
        lambda: probe.seen["small/commands"], controller, lambda: probe.send(**joint_state(np.zeros(3, np.float32)))
    )
    assert controller.end() == 0


# ------------------------------------------------------------------------------------------------- operator, learner


class Operator:
    """A robot's newest observation, sent again and again, and an operator who may be in command of it."""

    def __init__(self, probe: Probe, x: np.ndarray) -> None:
        self.probe, self.x = probe, x
        self.publisher = probe.node.create_publisher(Float64MultiArray, "laws/intervention", COMMAND_QOS)
        self.command: list[float] | None = None  # an empty one hands back

    def __call__(self) -> None:
        if self.command is not None:
            self.publisher.publish(set_data(Float64MultiArray(), self.command))
        self.probe.send(**joint_state(self.x))

    def rows(self) -> list[dict[str, float]]:
        return [row_of(message) for message in self.probe.seen["controller/decision"]]

    def until(self, source: int | None, process: Process) -> dict[str, float]:
        """Go on until a decision of a source (None: a region) about x comes; it."""
        seen = self.probe.seen["controller/decision"]
        seen.clear()
        wanted = [float(v) for v in self.x]

        def found() -> list[dict[str, float]]:
            rows = [row for row in self.rows() if observed(row) == wanted]
            return [row for row in rows if (row["region"] >= 0 if source is None else row["region"] == source)]

        self.probe.until(found, process, self)
        return found()[-1]


def test_what_an_operator_corrects_is_not_served_again(
    start: Any, probe: Probe, small: dict[str, Any], tmp_path: Path, built: Built
) -> None:
    """Not in the next step, not after a restart, not from a new snapshot; but once it is released."""
    state = tmp_path / "state"
    library = built.library
    hit = built.observations[Router(library, library.tolerance).many(built.observations) >= 0]
    first = library.certificates.regions.contains(hit[:1].astype(float))[0]
    elsewhere = hit[~library.certificates.regions[np.flatnonzero(first)].contains(hit.astype(float)).any(axis=1)][0]
    parameters = {**small, "autostart": True, "state": state, "silence_timeout_s": 3.0, "on_silence": "zero"}
    controller = start("controller", **parameters)
    operator = Operator(probe, hit[0])
    operator.until(None, controller)

    operator.command = [0.25, 5.0]
    row = operator.until(OPERATOR, controller)
    assert [row["command:a.effort"], row["command:b.effort"]] == [0.25, 1.0]  # within the limits
    assert np.isnan(row["action:a.effort"])
    probe.until(lambda: commanded(probe) == [0.25, 1.0], controller, operator)
    assert probe.set("controller", tolerance=[0.2, 0.2]) == ""  # the node is responsive meanwhile
    operator.command = [float("nan"), 0.0]
    operator.until(ON_SILENCE, controller)  # not a word that can be used is none
    probe.until(lambda: "laws/intervention: refused [nan, 0.0]" in controller.output, controller, operator)
    assert newest(probe)["command:b.effort"] == 0.0
    operator.command = [0.25, 0.0, 0.0]
    probe.until(lambda: "refused [0.25, 0.0, 0.0]" in controller.output, controller, operator)
    operator.command = [-0.25, 0.0]
    operator.until(OPERATOR, controller)
    operator.command = []
    operator.until(POLICY, controller)
    operator.command = None
    assert all(row["region"] < 0 for row in operator.rows())
    probe.until(lambda: "the operator has handed back" in controller.output, controller, operator)
    operator.until(POLICY, controller)
    assert all(row["region"] == POLICY for row in operator.rows())
    operator.x = elsewhere
    operator.until(None, controller)  # the rest of the library answers
    (found,) = takeovers.read(state)
    assert {tuple(x) for x in found.observations.tolist()} == {tuple(hit[0].tolist())}
    assert {tuple(command) for command in found.commands.tolist()} == {(0.25, 1.0), (-0.25, 0.0)}
    assert found.policy[0].astype(np.float32).tolist() == built.policy.decide(built.policy(hit[0])).tolist()

    controller.popen.kill()
    controller.popen.wait()
    controller = start("controller", **parameters)
    operator.until(None, controller)
    operator.x = hit[0]
    operator.until(POLICY, controller)
    assert all(row["region"] == POLICY for row in operator.rows() if row["observation:a.position"] == float(hit[0][0]))

    # A snapshot with the very experts that were corrected, and one that is none.
    replace(library, notes={"of": "tonight"}).save(state / SNAPSHOT)
    probe.until(lambda: f"library {library.digest} -> " in controller.output, controller, operator)
    row = operator.until(POLICY, controller)
    assert row["library"] == number_of(Library.load(state / SNAPSHOT)) != number_of(library)
    durable.write(state / SNAPSHOT, b"LAWSLIB2 and then nothing")
    probe.until(lambda: "snapshot refused: " in controller.output, controller, operator)
    assert operator.until(POLICY, controller)["library"] == row["library"]
    assert all(row["region"] == POLICY for row in operator.rows())

    assert main(["library", "release", str(state), "--takeover", found.id]) == 0
    operator.until(None, controller)
    refusals = [line for line in controller.output.splitlines() if "snapshot refused" in line]
    assert len(refusals) == 1
    assert controller.end() == 0


def test_without_a_folder_a_takeover_outlives_deactivation(
    start: Any, probe: Probe, small: dict[str, Any], built: Built
) -> None:
    hit = built.observations[Router(built.library, built.library.tolerance).many(built.observations) >= 0]
    controller = start("controller", **{**small, "autostart": True, "silence_timeout_s": 0.1, "on_silence": "policy"})
    operator = Operator(probe, hit[0])
    operator.until(None, controller)
    operator.command = [0.5, 0.5]
    operator.until(OPERATOR, controller)
    operator.command = None
    operator.until(POLICY, controller)  # silence is handing back here
    probe.until(lambda: "until this process ends: set 'state'" in controller.output, controller, operator)
    for transition in ("deactivate", "cleanup", "configure", "activate"):
        assert probe.transition(transition)
    operator.until(POLICY, controller)
    assert all(row["region"] == POLICY for row in operator.rows())
    assert controller.end() == 0


def test_a_learner_fills_an_empty_library_and_may_be_killed(
    start: Any, probe: Probe, small: dict[str, Any], tmp_path: Path, built: Built
) -> None:
    parameters = {**small, "library": "''", "autostart": True, "state": tmp_path / "state", "tolerance": "[0.1, 0.1]"}
    own = {k: parameters[k] for k in ("policy", "library", "autostart", "state", "tolerance")} | {"round_s": 0.2}
    controller, learner = start("controller", **parameters), start("learner", **own)
    decisions, sent = probe.seen["controller/decision"], iter(np.tile(built.observations[:1500], (100, 1)))

    def rate(last: int = 200) -> float:
        return float(np.mean([row_of(message)["region"] >= 0 for message in decisions[-last:] if message.layout.dim]))

    def send() -> None:
        for _ in range(5):
            probe.send(**joint_state(next(sent)))
            probe.spin(0.002)

    probe.until(lambda: len(decisions) > 30, controller, send)
    assert rate() == 0.0
    probe.until(lambda: rate() > 0.6, controller, send)
    probe.until(lambda: "misses" in learner.output and " added, " in learner.output, controller, send)

    foreign = probe.node.create_publisher(Float64MultiArray, "controller/decision", RECORD_QOS)
    refused = "controller/decision: '' are no decisions of this policy's"
    probe.until(
        lambda: refused in learner.output, learner, lambda: foreign.publish(set_data(Float64MultiArray(), [1.0]))
    )
    probe.node.destroy_publisher(foreign)
    learner.popen.kill()  # in the middle of whatever it does
    learner.popen.wait()
    count = len(decisions)
    probe.until(lambda: len(decisions) > count + 200, controller, send)
    assert rate() > 0.5
    again = start("learner", **own)
    probe.until(lambda: "configured: " in again.output, again, send)
    regions = int(re.search(r": (\d+) regions for small", again.output)[1])  # type: ignore[index]
    assert regions > 0  # nothing that was acknowledged is lost
    second = start("learner", **own)
    assert second.ended() == 2
    assert "one learner at a time" in second.output
    assert again.end() == 0
    assert controller.end() == 0


REFUSED_LEARNERS = {
    "no folder": ({"state": ""}, "parameter 'state' is not set"),
    "no tolerance": ({}, "parameter 'tolerance' is not set"),
    "missing library": ({"library": "/nowhere/x.laws"}, "/nowhere/x.laws"),
    "a folder that cannot be": ({"state": "/proc/x"}, "/proc/x cannot be made"),
}


def test_refused_learners(start: Any, small: dict[str, Any], tmp_path: Path) -> None:
    own = {"policy": small["policy"], "library": "''", "state": tmp_path, "autostart": True}
    learners = {
        case: start("learner", **{**own, **{k: v or "''" for k, v in changes.items()}})
        for case, (changes, _) in REFUSED_LEARNERS.items()
    }
    for case, learner in learners.items():
        assert learner.ended() == 2
        (line,) = learner.lines
        assert "[ERROR]" in line and REFUSED_LEARNERS[case][1] in line


# A control thread that hangs as soon as a file is there.
HANGING = """
import sys, time
from pathlib import Path
from laws_ros.nodes.loop import ControlLoop
ticked = ControlLoop.tick
def tick(self):
    while Path(sys.argv[-1]).exists():
        Path(sys.argv[-1] + "ing").touch()
        time.sleep(0.01)
    ticked(self)
ControlLoop.tick = tick
from laws_ros.nodes.__main__ import main
sys.exit(main("controller"))
"""


def test_systemd_is_told(
    start: Any, probe: Probe, small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """READY once active, WATCHDOG only while the control thread is alive, STOPPING before the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        name = f"laws-test-{os.getpid()}"
        systemd.bind(f"\0{name}")
        systemd.settimeout(PATIENCE_S)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        hang = tmp_path / "hang"
        controller = start("controller", code=["-c", HANGING], last=str(hang), **{**small, "autostart": True})
        assert [systemd.recv(100) for _ in range(3)] == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1"]
        assert probe.state() == "active"
        systemd.setblocking(False)

        def heard() -> list[bytes]:
            told = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    told.append(systemd.recv(100))
            return told

        hang.touch()
        probe.until((tmp_path / "hanging").exists, controller)
        hung_ns = time.time_ns()

        def diagnosed(count: int) -> bool:
            """Whether there have been so many diagnoses since."""
            stamps = [message.header.stamp for message in probe.seen["/diagnostics"]]
            return sum(stamp.sec * 10**9 + stamp.nanosec > hung_ns for stamp in stamps) >= count

        probe.until(lambda: diagnosed(2), controller)  # the first one may have seen the thread's last turn
        heard()
        probe.until(lambda: diagnosed(5), controller)
        assert heard() == []
        hang.unlink()
        probe.until(lambda: b"WATCHDOG=1" in heard(), controller)
        assert controller.end() == 0
        assert heard()[-1] == b"STOPPING=1"


def test_real_time_that_is_not_permitted(
    start: Any, probe: Probe, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line says what, why, and who can permit it; the controller runs without."""
    controller = start("controller", **{**small, "autostart": True, "realtime.cpus": "[9999]"})
    answer_to(probe, controller, np.array([0.25, 0.5, 0.125], np.float32))
    assert "realtime.cpus [9999]: Invalid argument; the control thread runs on any" in controller.output
    assert controller.end() == 0

    def refused(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refused)
    monkeypatch.setattr(control.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(mlockall=lambda flags: -1))
    (warning,) = control.privileges(50, ())
    for word in ("realtime.priority 50", "not permitted", "at normal priority", "rtprio 99", "--cap-add SYS_NICE"):
        assert word in warning
    assert "realtime.lock_memory: " in control.lock_memory() and "memlock unlimited" in control.lock_memory()


# ------------------------------------------------------------------------------------------------- simulator


def reader_of(spec: Any) -> Callable[[JointState], np.ndarray]:
    """JointState messages of a workload as observation vectors."""
    card = Card(spec.name, spec.observations, spec.actions)
    assembler = Assembler(Binding.of_card(card, "x").check(card, None), card)

    def read(message: JointState) -> np.ndarray:
        assert assembler.take("joint_states", message, 0)
        return assembler.observation(0)

    return read


def test_simulator(start: Any, probe: Probe) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    spec = workloads.get("cartpole").spec
    simulator = start("simulator", seed=3, real_time_factor=0.5)
    reader = reader_of(spec)
    arrived: list[tuple[float, list[float]]] = []

    def react(message: JointState) -> None:
        stamp = message.header.stamp
        arrived.append((stamp.sec + stamp.nanosec * 1e-9, reader(message).tolist()))

    probe.node.create_subscription(JointState, "joint_states", react, SENSOR_QOS)
    probe.until(lambda: len(arrived) > 5, simulator)
    first = workloads.get("cartpole").simulation().reset(workloads.episode_seed(3, 0))
    assert {time_s for time_s, _ in arrived} == {0.0}  # it waits for the first command
    assert all(observation == first.tolist() for _, observation in arrived)

    command = Float64MultiArray()
    probe.commands.publish(set_data(command, [NAN]))
    probe.until(lambda: "refused [nan]" in simulator.output, simulator, lambda: probe.commands.publish(command))
    for _ in range(20):
        probe.commands.publish(set_data(command, [1.0, 2.0]))
        probe.spin(0.02)
    assert arrived[-1][0] == 0.0

    rows = probe.seen["simulator/episode"]
    probe.until(lambda: len(rows) > 20, simulator, lambda: probe.commands.publish(set_data(command, [0.0])))
    names = columns_of(rows[-1])
    table = np.array([row.data for row in rows])
    assert np.diff(table[:, names.index("time_s")]) == pytest.approx(spec.period_s)
    assert table[-1, names.index("refused")] > 0
    held = table[-1, names.index("held")]
    probe.until(lambda: rows[-1].data[names.index("held")] > held + 2, simulator)  # without commands the last is held

    assert probe.call(Trigger, "simulator/reset").success
    probe.until(lambda: rows[-1].data[names.index("episode")] >= 1, simulator)

    assert probe.call(SetBool, "simulator/pause", data=True).success
    count = probe.settle("/clock")
    assert count > 0
    assert probe.call(SetBool, "simulator/pause", data=False).success
    probe.until(lambda: len(probe.seen["/clock"]) > count, simulator)
    assert simulator.end(signal.SIGINT) == 0


def test_faults(start: Any, probe: Probe) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    simulator = start("simulator", command_timeout_s=0.3)
    seen: list[JointState] = []
    probe.node.create_subscription(JointState, "joint_states", seen.append, SENSOR_QOS)
    rows, command = probe.seen["simulator/episode"], set_data(Float64MultiArray(), [1.0])

    def drive() -> None:
        probe.commands.publish(command)

    def stamp(message: JointState) -> float:
        return message.header.stamp.sec + message.header.stamp.nanosec * 1e-9

    probe.until(lambda: seen and len(rows) > 20, simulator, drive)
    assert probe.set("simulator", fault="nan hinge.velocity") == ""
    probe.until(lambda: np.isnan(seen[-1].velocity[1]), simulator, drive)
    assert np.isfinite(seen[-1].position).all()
    assert probe.set("simulator", fault="freeze") == ""
    probe.until(lambda: len(seen) > 3 and seen[-1].position == seen[-3].position, simulator, drive)
    assert stamp(seen[-1]) > stamp(seen[-3])
    assert stamp(seen[-1]) > 0.0
    assert probe.set("simulator", fault="clock 1000") == ""
    probe.until(lambda: stamp(seen[-1]) == 0.0, simulator, drive)
    assert probe.set("simulator", fault="lock slider") == ""
    probe.until(lambda: abs(seen[-1].velocity[0]) < 0.1, simulator, drive)
    assert probe.set("simulator", fault="drop 1") == ""
    count, clock = len(seen), len(probe.seen["/clock"])

    def silent() -> bool:
        nonlocal count, clock
        if len(seen) != count:  # what was under way
            count, clock = len(seen), len(probe.seen["/clock"])
        return len(probe.seen["/clock"]) > clock + 10

    probe.until(silent, simulator, drive)
    assert probe.set("simulator", fault="") == ""
    probe.until(lambda: len(seen) > count and stamp(seen[-1]) > 0, simulator, drive)
    column = columns_of(rows[-1]).index("let_go")
    before = rows[-1].data[column]
    probe.until(lambda: rows[-1].data[column] > before, simulator)
    for fault, words in (
        ("smoke", "'smoke' is none of freeze, nan"),
        ("nan elbow", "one of slider.position, hinge.position"),
        ("lock elbow", "one of slider, hinge is needed after lock"),
        ("drop 2", "a number from 0 to 1"),
        ("delay soon", "a number from 0 to 10"),
        ("freeze now", "nothing may stand after freeze"),
    ):
        assert words in probe.set("simulator", fault=fault)
    assert "start only" in probe.set("simulator", seed=5)
    assert simulator.end() == 0


def test_a_peer_that_dies(start: Any, probe: Probe) -> None:
    """The controller without its robot, and the robot without its controller; either goes on once the other is back."""
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    probe.node.destroy_publisher(probe.commands)
    decisions, rows = probe.seen["controller/decision"], probe.seen["simulator/episode"]

    def answers() -> bool:
        return bool(decisions) and newest(probe)["region"] >= POLICY

    def let_go() -> bool:
        return bool(rows) and row_of(rows[-1])["let_go"] > 0

    controller, simulator = start("controller", on_timeout="zero"), start("simulator")
    probe.until(answers, controller)
    simulator.popen.kill()
    probe.until(lambda: newest(probe)["region"] == ON_TIMEOUT, controller)
    assert newest(probe)["command:slider.effort"] == 0.0
    probe.until(lambda: "joint_states: no usable message for" in controller.output, controller)
    rows.clear()
    simulator = start("simulator", command_timeout_s=2.0)
    probe.until(lambda: rows and answers(), controller)  # it has had a command
    controller.popen.kill()
    probe.until(let_go, simulator)
    assert "slider_effort_controller/commands: no new one for 2 s, the actuators let go" in simulator.output
    decisions.clear()
    controller = start("controller")
    probe.until(answers, controller)  # what is left of its predecessor is no rival
    assert controller.end() == simulator.end() == 0


def test_simulator_that_nobody_commands(start: Any) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    simulator = start("simulator", start_timeout_s=0.5)
    assert simulator.ended() == 1
    assert "/slider_effort_controller/commands: no command within 0.5 s" in simulator.output


def test_simulator_of_a_workload_without_joints(start: Any, probe: Probe) -> None:
    """Whatever has no message of its own is one array, and decisions are commanded by index."""
    pytest.importorskip("gymnasium", reason="Gymnasium is missing: pip install -e '.[gym]'")
    simulator = start("simulator", workload="gym:CartPole-v1", binding="''", controller_name="slider_effort_controller")
    seen: list[Any] = []
    probe.node.create_subscription(Float64MultiArray, "observation", seen.append, SENSOR_QOS)
    rows, command = probe.seen["simulator/episode"], set_data(Float64MultiArray(), [1.0])
    probe.until(lambda: seen and len(rows) >= 3, simulator, lambda: probe.commands.publish(command))
    assert len(seen[-1].data) == 4


def test_over_ros_and_offline_are_the_same_plant(start: Any, probe: Probe) -> None:
    """Commands that depend on the observation give the same rewards over topics as in `rollouts`, to the last bit."""
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    workload = workloads.get("cartpole")

    def law(x: np.ndarray) -> np.ndarray:
        return np.clip((x * np.array([3.0, 40.0, 5.0, 8.0], np.float32)).sum(axis=1, keepdims=True), -10, 10)

    expected = workloads.rollouts(workload, law, 10, seed=5).rewards
    simulator = start("simulator", seed=5, real_time_factor=0.02)  # half a second for every answer
    reader = reader_of(workload.spec)
    rows, answer, stamps = probe.seen["simulator/episode"], Float64MultiArray(), [0]

    def react(message: JointState) -> None:
        if rows and message.header.stamp.nanosec == stamps[-1]:
            return  # observation 0 is repeated until the first command arrives, and so are the answers to it
        stamps.append(message.header.stamp.nanosec)
        probe.commands.publish(set_data(answer, law(reader(message)[None])[0].tolist()))

    def steps(episode: int) -> list[dict[str, float]]:
        return [row for row in map(row_of, rows) if row["episode"] == episode]

    def late(episode: int) -> bool:
        """Whether a tick of it came before its command; that makes another plant."""
        before = max((row["held"] for row in map(row_of, rows) if row["episode"] < episode), default=0.0)
        return any(row["held"] > before for row in steps(episode))

    probe.node.create_subscription(JointState, "joint_states", react, SENSOR_QOS)
    for episode in range(len(expected)):
        probe.until(lambda k=episode: late(k) or len(steps(k)) >= 12, simulator)
        if not late(episode):
            break
        assert probe.call(Trigger, "simulator/reset").success
    own = [row["return"] for row in steps(episode)]
    assert len(own) >= 12
    assert own == pytest.approx(np.cumsum(expected[episode])[: len(own)], rel=1e-12)
