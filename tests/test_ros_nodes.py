"""The nodes as processes on real ROS 2 topics. No tight timing: what is awaited may take `PATIENCE_S`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

rclpy = pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")
from diagnostic_msgs.msg import DiagnosticArray  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from rclpy.executors import SingleThreadedExecutor  # noqa: E402
from rclpy.node import Node  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import JointState  # noqa: E402
from std_msgs.msg import Float64MultiArray  # noqa: E402
from std_srvs.srv import SetBool, Trigger  # noqa: E402

from laws_ros.build import workloads  # noqa: E402
from laws_ros.nodes.joints import JointBinding  # noqa: E402
from laws_ros.nodes.ros import COMMAND_QOS, RECORD_QOS, SENSOR_QOS, columns_of, set_data  # noqa: E402
from laws_ros.runtime.files import share_path  # noqa: E402
from tests.conftest import Built  # noqa: E402

PATIENCE_S = 30.0
CONFIG = share_path("config/cartpole.yaml")


@pytest.fixture(scope="module", autouse=True)
def domain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_DOMAIN_ID", str(1 + os.getpid() % 100))
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        patch.setenv("ROS_LOG_DIR", str(tmp_path_factory.mktemp("ros_log")))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        yield


class Process:
    """A node in a process of its own."""

    def __init__(self, log: Path, code: list[str], arguments: list[str]) -> None:
        self.log = log
        with log.open("wb") as out:
            self.popen = subprocess.Popen([sys.executable, *code, "--ros-args", *arguments], stdout=out, stderr=out)

    @property
    def output(self) -> str:
        return self.log.read_text()

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

    def start(node: str, file: Path = CONFIG, code: list[str] | None = None, **parameters: Any) -> Process:
        arguments = ["--params-file", str(file)]
        for name, value in parameters.items():
            arguments += ["-p", f"{name}:={str(value).lower() if isinstance(value, bool) else value}"]
        log = tmp_path / f"{node}{len(running)}.log"
        running.append(Process(log, code or ["-m", f"laws_ros.nodes.{node}"], arguments))
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
            ("controller/decision", Float64MultiArray, RECORD_QOS),
            ("/diagnostics", DiagnosticArray, 10),
            ("simulator/episode", Float64MultiArray, RECORD_QOS),
            ("/clock", Clock, SENSOR_QOS),
        ):
            self.seen[topic] = []
            self.node.create_subscription(kind, topic, self.seen[topic].append, qos)
        self.observations = self.node.create_publisher(JointState, "joint_states", SENSOR_QOS)
        self.commands = self.node.create_publisher(Float64MultiArray, "slider_effort_controller/commands", COMMAND_QOS)

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

    def call(self, kind: Any, name: str, **fields: Any) -> Any:
        client = self.node.create_client(kind, name)
        assert client.wait_for_service(timeout_sec=PATIENCE_S)
        future = client.call_async(kind.Request(**fields))
        self.executor.spin_until_future_complete(future, timeout_sec=PATIENCE_S)
        return future.result()

    def transition(self, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return self.call(ChangeState, "controller/change_state", transition=request.transition).success

    def state(self) -> str:
        return self.call(GetState, "controller/get_state").current_state.label

    def send(self, **fields: Any) -> None:
        message = JointState(**fields)
        message.header.stamp.sec = 7
        self.observations.publish(message)


@pytest.fixture
def probe() -> Iterator[Probe]:
    probe = Probe()
    yield probe
    probe.node.destroy_node()
    probe.context.try_shutdown()


@pytest.fixture(scope="module")
def small(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Parameters of a controller for the small policy of conftest.py; it never times out by itself."""
    library = tmp_path_factory.mktemp("library") / "small.laws"
    built.library.save(library)
    return {
        "policy": built.path,
        "library": library,
        "observation": "[a.position, b.position, a.velocity]",
        "controller_name": "small",
        "observation_timeout_s": 60.0,
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
        count = len(probe.seen["controller/decision"])
        probe.until(
            lambda count=count: len(probe.seen["controller/decision"]) > count,
            controller,
            lambda x=x: probe.send(**joint_state(x)),
        )
        probe.spin(0.05)
        message = probe.seen["controller/decision"][-1]
        row = dict(zip(columns_of(message), message.data, strict=True))
        action = np.array(probe.seen["small/commands"][-1].data)
        assert row["stamp_s"] == 7.0
        assert [row["action:a.effort"], row["action:b.effort"]] == action.tolist()
        sent = [row[f"observation:{c.name}"] for c in built.policy.card.observations]
        assert sent == x.tolist()
        error = np.abs(action - built.policy.decide(built.policy(x)))
        assert (error <= [row["bound:a.effort"], row["bound:b.effort"]]).all()
        hits.append(row["region"] >= 0)
    assert any(hits)

    def diagnosed() -> bool:
        values = {v.key: v.value for m in probe.seen["/diagnostics"] for s in m.status for v in s.values}
        return values.get("state") == "active" and values.get("library") == built.library.digest

    probe.until(diagnosed, controller)
    assert probe.transition("deactivate")
    probe.spin(0.1)
    count = len(probe.seen["small/commands"])
    probe.send(**joint_state(x))
    probe.spin(0.3)
    assert len(probe.seen["small/commands"]) == count
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
    commands = probe.seen["small/commands"]
    good = joint_state(np.zeros(3))
    probe.until(lambda: commands, controller, lambda: probe.send(**good))
    for bad, words in BAD_MESSAGES.values():
        probe.spin(0.1)
        count = len(commands)
        probe.until(
            lambda words=words: any(
                words in line and "/joint_states" in line for line in controller.output.splitlines()
            ),
            controller,
            lambda bad=bad: probe.send(**bad),
        )
        assert len(commands) == count
        probe.until(lambda count=count: len(commands) > count, controller, lambda: probe.send(**good))
    assert controller.end(signal.SIGINT) == 0


@pytest.mark.parametrize("reaction", ["hold", "zero"])
def test_observation_timeout(start: Any, probe: Probe, small: dict[str, Any], reaction: str) -> None:
    controller = start(
        "controller", **{**small, "autostart": True, "observation_timeout_s": 0.2, "on_timeout": reaction}
    )
    commands, decisions = probe.seen["small/commands"], probe.seen["controller/decision"]
    probe.until(lambda: "no usable message" in controller.output, controller)
    assert not commands  # nothing was ever observed, so there is nothing to hold
    probe.until(lambda: decisions, controller, lambda: probe.send(**joint_state(np.ones(3))))
    action = decisions[-1].data[columns_of(decisions[-1]).index("action:a.effort") :][:2].tolist()
    probe.spin(0.5)
    assert len(decisions) < len(commands)
    assert commands[-1].data.tolist() == (action if reaction == "hold" else [0.0, 0.0])
    assert controller.end() == 0


@pytest.fixture(scope="module")
def other_policy(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network in a file that differs in one remark."""
    path = tmp_path_factory.mktemp("other") / "other.onnx"
    model = onnx.load(str(built.path))
    model.doc_string = "another training run"
    onnx.save(model, str(path))
    path.with_suffix(".yaml").write_text(built.path.with_suffix(".yaml").read_text())
    return path


REFUSED = {
    "library of another policy": ({"policy": "OTHER"}, ["small.laws", "other.onnx"]),
    "observation order": (
        {"observation": "[b.position, a.position, a.velocity]"},
        ["observation[0]", "'b.position'", "'a.position'", "small.onnx"],
    ),
    "too few observations": ({"observation": "[a.position, b.position]"}, ["observation has 2 names", "3"]),
    "unknown key": ({"tolerence": "[0.1, 0.1]"}, ["/controller", "'tolerence'"]),
    "no policy": ({"policy": "''"}, ["/controller", "'policy' is not set"]),
    "missing library": ({"library": "/nowhere/x.laws"}, ["/nowhere/x.laws"]),
    "tolerance of the wrong length": ({"tolerance": "[0.1, 0.1, 0.1]"}, ["tolerance", "3 values for 2 actions"]),
    "negative tolerance": ({"tolerance": "[0.1, -0.1]"}, ["tolerance", "-0.1"]),
    "unknown reaction": ({"on_timeout": "panic"}, ["on_timeout", "'panic'", "hold, zero"]),
    "topic that is no name": ({"controller_name": "a b"}, ["a b"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_start(start: Any, small: dict[str, Any], other_policy: Path, case: str) -> None:
    """Exit code 2 and one error line; exactly one, so that it is not lost among others."""
    changes, words = REFUSED[case]
    changes = {k: other_policy if v == "OTHER" else v for k, v in changes.items()}
    controller = start("controller", **{**small, "autostart": True, **changes})
    assert controller.ended() == 2
    (line,) = [line for line in controller.output.splitlines() if line.strip()]
    assert "[ERROR]" in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"rate_hz": 100}, ["rate_hz", "DOUBLE"]), ({"rate_hz": 0.0}, ["rate_hz", "0.0"])],
    ids=["wrong type", "out of range"],
)
def test_bad_parameter_values(start: Any, small: dict[str, Any], changes: dict[str, Any], words: list[str]) -> None:
    controller = start("controller", **{**small, **changes})
    assert controller.ended() == 2
    (line,) = controller.output.splitlines()
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


def test_controller_without_training_and_simulation(start: Any, probe: Probe, small: dict[str, Any]) -> None:
    """What a robot has: importing any of the others fails, and the controller answers all the same."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))"
    code = f"{block}; from laws_ros.nodes.controller import main; sys.exit(main())"
    for name in HEAVY:
        result = subprocess.run([sys.executable, "-c", f"{block}; import {name}"], capture_output=True, check=False)
        assert result.returncode == 1  # the block blocks
    controller = start("controller", code=["-c", code], **{**small, "autostart": True})
    probe.until(
        lambda: probe.seen["small/commands"], controller, lambda: probe.send(**joint_state(np.zeros(3, np.float32)))
    )
    assert controller.end() == 0


# ------------------------------------------------------------------------------------------------- simulator


def test_simulator(start: Any, probe: Probe) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    spec = workloads.get("cartpole").spec
    simulator = start("simulator", seed=3, real_time_factor=0.5)
    joints = JointBinding(spec.observations)
    arrived: list[tuple[float, list[float]]] = []

    def react(message: JointState) -> None:
        stamp = message.header.stamp
        arrived.append((stamp.sec + stamp.nanosec * 1e-9, joints.read(message).tolist()))

    probe.node.create_subscription(JointState, "joint_states", react, SENSOR_QOS)
    probe.until(lambda: len(arrived) > 5, simulator)
    first = workloads.get("cartpole").simulation().reset(workloads.episode_seed(3, 0))
    assert {time_s for time_s, _ in arrived} == {0.0}  # it waits for the first command
    assert all(observation == first.tolist() for _, observation in arrived)

    command = Float64MultiArray()
    probe.commands.publish(set_data(command, [NAN]))
    probe.until(lambda: "refused [nan]" in simulator.output, simulator, lambda: probe.commands.publish(command))
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
    probe.spin(0.2)
    count = len(probe.seen["/clock"])
    probe.spin(0.3)
    assert len(probe.seen["/clock"]) == count > 0
    assert probe.call(SetBool, "simulator/pause", data=False).success
    probe.until(lambda: len(probe.seen["/clock"]) > count, simulator)
    assert simulator.end(signal.SIGINT) == 0


def test_simulator_that_nobody_commands(start: Any) -> None:
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    simulator = start("simulator", start_timeout_s=0.5)
    assert simulator.ended() == 1
    assert "/slider_effort_controller/commands: no command within 0.5 s" in simulator.output


def test_simulator_refuses_a_workload_without_joints(start: Any) -> None:
    pytest.importorskip("gymnasium", reason="Gymnasium is missing: pip install -e '.[gym]'")
    simulator = start("simulator", workload="gym:CartPole-v1")
    assert simulator.ended() == 2
    (line,) = simulator.output.splitlines()
    assert "observations[0]" in line
    assert "JointState" in line


def test_over_ros_and_offline_are_the_same_plant(start: Any, probe: Probe) -> None:
    """Commands that depend on the observation give the same rewards over topics as in `rollouts`, to the last bit."""
    pytest.importorskip("mujoco", reason="MuJoCo is missing: pip install -e '.[sim]'")
    workload = workloads.get("cartpole")

    def law(x: np.ndarray) -> np.ndarray:
        return np.clip(x @ np.array([[3.0], [40.0], [5.0], [8.0]], np.float32), -10, 10)

    (expected,) = workloads.rollouts(workload, law, 1, seed=5).rewards
    simulator = start("simulator", seed=5, real_time_factor=0.2)
    joints = JointBinding(workload.spec.observations)
    answer = Float64MultiArray()
    stamps: list[int] = []

    def react(message: JointState) -> None:
        if message.header.stamp.nanosec in stamps[-1:]:
            return  # observation 0 is repeated until the first command arrives
        stamps.append(message.header.stamp.nanosec)
        probe.commands.publish(set_data(answer, law(joints.read(message)[None])[0].tolist()))

    probe.until(lambda: probe.node.count_subscribers("slider_effort_controller/commands") > 0, simulator)
    probe.spin(1.0)
    probe.node.create_subscription(JointState, "joint_states", react, SENSOR_QOS)
    rows = probe.seen["simulator/episode"]
    probe.until(lambda: len(rows) >= 80, simulator)
    names = columns_of(rows[0])
    table = np.array([row.data for row in rows])
    assert table[-1, names.index("held")] == 0
    assert table[:, names.index("return")] == pytest.approx(np.cumsum(expected)[: len(rows)], rel=1e-12)
