"""Recorded bags: what is written, read back by others and by us, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from laws_ros.build import workloads
from laws_ros.build.evaluate import observed
from laws_ros.build.workloads import Rollouts
from laws_ros.cli import main
from laws_ros.core.card import Channel
from laws_ros.core.errors import WorkloadError
from laws_ros.runtime.policy import Policy
from tests.support import random_mlp, save_mlp

pytest.importorskip("rosbags", reason="bag tests need rosbags: pip install 'laws_ros[sim]'")

from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from laws_ros.build import bags

STORE = get_typestore(Stores.ROS2_KILTED)
T = STORE.types
SPEC = workloads.WorkloadSpec(
    name="cell",
    observations=(
        *(Channel(f"{joint}.position", "rad") for joint in ("b_joint", "a_joint")),
        Channel("b_joint.velocity", "rad/s"),
        Channel("imu.angular_velocity.z", "rad/s"),
        Channel("cmd_vel.linear.x", "m/s"),
    ),
    actions=(Channel("u", "N", -1.0, 1.0),),
    discrete=False,
    period_s=0.02,
    episode_steps=150,
)
CARD = "name: cell\nobservations: [{}]\nactions: [{{name: u, unit: N, low: -1, high: 1}}]\n"


def carded(folder: Path, names: list[str]) -> Policy:
    path = save_mlp(folder / "p.onnx", random_mlp(np.random.default_rng(0), [len(names), 8, 1]))
    path.with_suffix(".yaml").write_text(CARD.format(", ".join(f"{{name: {name}}}" for name in names)))
    return Policy(path)


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return carded(tmp_path, [c.name for c in SPEC.observations])


@pytest.fixture
def run() -> Rollouts:
    rng = np.random.default_rng(1)
    lengths = (150, 120)
    return Rollouts(
        [rng.normal(size=(k, 5)).astype(np.float32) for k in lengths],
        [rng.normal(size=(k, 1)).astype(np.float32) for k in lengths],
        [rng.normal(size=k) for k in lengths],
    )


def stamp(k: int) -> object:
    return T["builtin_interfaces/msg/Time"](*divmod(k * 20_000_000, 10**9))


def joint_state(k: int, names: list[str], position: list[float], velocity: list[float]) -> object:
    header = T["std_msgs/msg/Header"](stamp=stamp(k), frame_id="")
    return T["sensor_msgs/msg/JointState"](header, names, np.array(position), np.array(velocity), np.zeros(0))


def twist(x: float) -> object:
    vector = T["geometry_msgs/msg/Vector3"]
    return T["geometry_msgs/msg/Twist"](vector(x, 0.0, 0.0), vector(0.0, 0.0, 0.0))


def imu(k: int, z: float) -> object:
    vector, nine = T["geometry_msgs/msg/Vector3"], np.zeros(9)
    return T["sensor_msgs/msg/Imu"](
        T["std_msgs/msg/Header"](stamp=stamp(k), frame_id=""),
        T["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0),
        nine,
        vector(0.0, 0.0, z),
        nine,
        vector(0.0, 0.0, 9.8),
        nine,
    )


def bag(path: Path, rows: list[list[tuple[str, object]]]) -> str:
    """A bag in a folder: row k's (topic, message) pairs, 20 ms apart."""
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as writer:
        connections = {}
        for k, row in enumerate(rows):
            for topic, message in row:
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=STORE)
                data = STORE.serialize_cdr(message, message.__msgtype__)
                writer.write(connections[topic], 10**15 + k * 20_000_000, data)
    return str(path)


@pytest.mark.parametrize("name", ["run.mcap", "run.db3", "run"])
def test_what_is_recorded_is_read_back_exactly(policy, run, tmp_path, name):
    out = tmp_path / name
    assert bags.record(run, SPEC, out) == 4 * 270
    found = workloads.get(str(out), policy)
    assert len(found.recorded) == 2
    assert all(np.array_equal(a, b) for a, b in zip(found.recorded, run.observations, strict=True))
    assert found.spec.period_s == pytest.approx(0.02)
    assert (tmp_path / "run/metadata.yaml").is_file() == (name == "run")
    assert not list(tmp_path.glob(".laws_record*"))


def test_the_file_is_what_other_readers_of_mcap_and_ros_take(policy, run, tmp_path):
    mcap = pytest.importorskip("mcap.reader", reason="needs the mcap package")
    serialization = pytest.importorskip("rclpy.serialization", reason="needs ROS: pip install 'laws_ros[ros]'")
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Float64MultiArray

    bags.record(run, SPEC, tmp_path / "run.mcap")
    with open(tmp_path / "run.mcap", "rb") as stream:
        reader = mcap.make_reader(stream)
        assert reader.get_header().profile == "ros2"
        assert reader.get_summary().statistics.message_count == 4 * 270
        read = [(c.topic, s.name, m) for s, c, m in reader.iter_messages()]
    joints = [(m, serialization.deserialize_message(m.data, JointState)) for t, _, m in read if t == "/joint_states"]
    arrays = [serialization.deserialize_message(m.data, Float64MultiArray) for t, _, m in read if t == "/command"]
    assert {s for _, s, _ in read} == {"sensor_msgs/msg/JointState", "std_msgs/msg/Float64MultiArray"}
    whole, actions = np.concatenate(run.observations), np.concatenate(run.actions)
    for (message, state), row in zip(joints, whole, strict=True):
        assert state.name == ["b_joint", "a_joint"]
        assert list(state.position) == row[:2].tolist() and state.velocity[0] == row[2] and np.isnan(state.velocity[1])
        assert state.header.stamp.sec * 10**9 + state.header.stamp.nanosec == message.log_time
    assert [a.data[0] for a in arrays] == actions[:, 0].tolist()
    assert arrays[0].layout.dim[0].label == "u"


def real_rows(count: int = 120, order: tuple[str, ...] = ("b_joint", "gripper", "a_joint")) -> list:
    """Topics as a robot has them: joints in an order of their own, an IMU, and commands now and then."""
    rows = []
    for k in range(count):
        position = {"a_joint": 0.1 * k, "b_joint": 0.2 * k, "gripper": 7.0}
        state = joint_state(k, list(order), [position[j] for j in order], [-position[j] for j in order])
        rows.append([("/imu", imu(k, 0.5 * k)), ("/robot/joint_states", state)])
        if k % 10 == 5:
            rows[-1].insert(0, ("/cmd_vel", twist(float(k))))
    return rows


def test_a_robots_own_topics_by_name(policy, tmp_path):
    (seen,) = workloads.get(bag(tmp_path / "real", real_rows()), policy).recorded
    k = np.arange(5, 120)  # nothing before all topics have spoken
    want = np.stack([0.2 * k, 0.1 * k, -0.2 * k, 0.5 * k, 5 + 10 * ((k - 5) // 10)], axis=1)
    np.testing.assert_array_equal(seen, want.astype(np.float32))


BINDING = """
trigger: joint_states
topics:
  joint_states: {type: sensor_msgs/msg/JointState}
  imu: {type: sensor_msgs/msg/Imu}
  cmd_vel: {type: geometry_msgs/msg/Twist}
observation:
  - {name: b_joint.position, topic: joint_states, joint: b_joint, field: position, sign: -1}
  - {name: a_joint.position, topic: joint_states, joint: a_joint, field: position, offset: 0.5}
  - {name: b_joint.velocity, topic: joint_states, joint: b_joint, field: velocity}
  - {name: imu.angular_velocity.z, topic: imu, field: angular_velocity.z}
  - {name: cmd_vel.linear.x, topic: cmd_vel, field: linear.x, default: 9}
action: {topic: commands, channels: [{name: u}]}
"""


def test_through_a_robots_binding(policy, tmp_path):
    (tmp_path / "robot.yaml").write_text(BINDING)
    path = bag(tmp_path / "real", real_rows())
    (seen,) = workloads.get(f"{path}?binding={tmp_path / 'robot.yaml'}", policy).recorded
    k = np.arange(120)
    speed = np.where(k < 5, 9, 5 + 10 * ((k - 5) // 10))  # its default until it speaks
    want = np.stack([-0.2 * k, 0.5 + 0.1 * k, -0.2 * k, 0.5 * k, speed], axis=1)
    np.testing.assert_array_equal(seen, want.astype(np.float32))
    other = bag(tmp_path / "other", [row[:1] for row in real_rows()])
    assert "0 topics are joint_states of" in refused(f"{other}?binding={tmp_path / 'robot.yaml'}", policy)
    (tmp_path / "robot.yaml").write_text(BINDING.replace("joint: a_joint", "joint: c_joint"))
    assert "joint 'c_joint' is missing; the message has" in refused(f"{path}?binding={tmp_path / 'robot.yaml'}", policy)


def test_a_pause_and_a_clock_set_back_end_a_stretch(policy, tmp_path):
    rows = real_rows(300)
    for k in range(100, 150):
        rows[k] = []
    recorded = workloads.get(bag(tmp_path / "real", rows), policy).recorded
    assert [len(s) for s in recorded] == [95, 150]


def refused(path: str, policy: Policy) -> str:
    with pytest.raises(WorkloadError) as caught:
        workloads.get(path, policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_joints_order_topics_and_files_are_refused_with_both_sides(policy, tmp_path):
    other = bag(tmp_path / "order", real_rows(order=("a_joint", "gripper", "b_joint")))
    message = refused(other, policy)
    assert "the joints a_joint, b_joint" in message and "another order: b_joint, a_joint" in message
    assert len(workloads.get(f"{other}?order=any", policy).recorded[0]) == 115

    state = joint_state(0, ["b_joint", "joint1"], [0.0, 1.0], [0.0, 1.0])
    rows = [[("/joint_states", state), ("/imu", imu(k, 0.0)), ("/cmd_vel", twist(0.0))] for k in range(120)]
    message = refused(bag(tmp_path / "names", rows), policy)
    assert "nothing in it gives a_joint.position" in message
    assert "needs b_joint.position, a_joint.position" in message and "JointState: b_joint, joint1" in message

    message = refused(bag(tmp_path / "topics", [row[-1:] for row in real_rows()]), policy)
    assert "nothing in it gives imu.angular_velocity.z, cmd_vel.linear.x" in message

    state = joint_state(0, ["b_joint", "a_joint"], [0.0, 1.0], [])
    rows = [[("/imu", imu(k, 0.0)), ("/cmd_vel", twist(0.0)), ("/joint_states", state)] for k in range(120)]
    assert "0 values of velocity for the joints b_joint, a_joint" in refused(bag(tmp_path / "short", rows), policy)

    twice = [[*row, ("/other/joint_states", row[-1][1])] for row in real_rows()]
    assert "topics /robot/joint_states and /other/joint_states" in refused(bag(tmp_path / "twice", twice), policy)
    assert "no messages on topic /x; the bag has" in refused(f"{tmp_path / 'twice'}?topic=/x", policy)
    assert "usable observations" in refused(bag(tmp_path / "few", real_rows(20)), policy)
    assert "no such bag" in refused(str(tmp_path / "none.mcap"), policy)
    (tmp_path / "broken.mcap").write_bytes(b"\x89MCAP0\r\n" + bytes(100))
    assert "not a readable rosbag2 recording" in refused(str(tmp_path / "broken.mcap"), policy)
    assert "unknown parameter 'x'; it takes order, topic, binding" in refused(f"{tmp_path / 'few'}?x=1", policy)


def test_labelled_columns_in_another_order(run, policy, tmp_path):
    spec = replace(SPEC, observations=SPEC.observations[::-1])
    bags.record(run, spec, tmp_path / "run.mcap")
    message = refused(f"{tmp_path / 'run.mcap'}?topic=/observation", policy)
    assert "has the columns cmd_vel.linear.x, imu" in message and "another order: b_joint.position, a_joint" in message
    found = workloads.get(f"{tmp_path / 'run.mcap'}?topic=/observation&order=any", policy)
    assert np.array_equal(found.recorded[0], run.observations[0][:, ::-1])


def test_a_policy_without_a_card_takes_the_one_array_of_its_length(run, tmp_path):
    path = save_mlp(tmp_path / "plain.onnx", random_mlp(np.random.default_rng(0), [5, 8, 1]))
    bags.record(run, SPEC, tmp_path / "run.mcap")
    assert np.array_equal(workloads.get(str(tmp_path / "run.mcap"), Policy(path)).recorded[1], run.observations[1])
    wide = Policy(save_mlp(tmp_path / "wide.onnx", random_mlp(np.random.default_rng(0), [9, 8, 1])))
    assert "has no card that names its 9 observations, and 0 topics" in refused(str(tmp_path / "run.mcap"), wide)


def test_learning_and_holding_out_split_a_recording(policy, run, tmp_path):
    bags.record(run, SPEC, tmp_path / "run.mcap")
    workload = workloads.get(str(tmp_path / "run.mcap"), policy)
    learnt, held = observed(policy, workload, 10, (0, 1))
    rows = [{row.tobytes() for x in part.observations for row in x} for part in (learnt, held)]
    assert not rows[0] & rows[1] and rows[0] | rows[1] == {row.tobytes() for x in run.observations for row in x}
    assert 0.1 < len(rows[1]) / 270 < 0.3
    with pytest.raises(WorkloadError, match="is a recording, which cannot be simulated"):
        workloads.rollouts(workload, lambda x: x, 1, 0)
    with pytest.raises(WorkloadError, match="is a recording, which cannot be simulated"):
        workloads.get(str(tmp_path / "run.mcap"))


def test_record_build_and_eval_from_the_command_line(tmp_path, capsys):
    policy = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(2), [3, 16, 1], gain=0.5), clip=2.0)
    out, library = str(tmp_path / "run.mcap"), str(tmp_path / "p.laws")
    pendulum = ["--workload", "gym:Pendulum-v1", "--policy", str(policy)]
    parts = str(tmp_path / "parts")
    assert main(["record", *pendulum, "--out", out, "--episodes", "5", "--parts", parts]) == 0
    assert list(Path(parts).glob("*.npz")) and "5 episodes, 1000 steps" in capsys.readouterr().out
    bag = ["--workload", out, "--policy", str(policy)]
    assert main(["build", *bag, "--out", library, "--tolerance", "0.2", "--max-regions", "40"]) == 0
    capsys.readouterr()
    assert main(["eval", library, *bag, "--episodes", "9"]) == 0
    text = capsys.readouterr().out
    assert "1000 steps" in text and "there is no return" in text
    assert main(["record", *pendulum, "--out", str(tmp_path / "none/run.mcap")]) == 2
    assert main(["record", *pendulum, "--out", str(tmp_path)]) == 2
    assert main(["calibrate", *bag]) == 2
    assert "cannot be simulated" in capsys.readouterr().err


def test_the_missing_reader_is_named():
    code = "import sys; sys.modules['rosbags'] = None; from laws_ros.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = ["record", "--workload", "cartpole", "--policy", "models/cartpole.onnx", "--out", "x.mcap"]
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert found.returncode == 2 and "rosbags is not installed" in found.stderr, found.stderr
