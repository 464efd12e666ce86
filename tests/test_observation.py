"""Bindings: what fits is read and written exactly, what does not fit is refused before anything moves."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace as Message

import numpy as np
import pytest

from laws_ros.core.card import Card, Channel
from laws_ros.core.errors import CardError, ConfigError, LawsError, ObservationError
from laws_ros.core.observation import Assembler, Binding
from laws_ros.runtime.files import load_yaml, share_path
from laws_ros.runtime.policy import Policy

SHA = "ab" * 32
CARD = Card(
    "leg",
    (
        Channel("hip.position", "rad", -3, 3),
        Channel("knee.position", "rad", -3, 3),
        Channel("hip.velocity", "", -10, 10),
        Channel("gyro.z", "rad/s", -10, 10),
        Channel("speed", "m/s", -1, 1),
        Channel("task", "", 0, 3),
    ),
    (Channel("hip.position", "", -1, 1), Channel("knee.position", "rad", -1, 1)),
)
DATA = {
    "policy_sha256": SHA,
    "trigger": ["joint_states", "imu"],
    "topics": {
        "joint_states": {"type": "sensor_msgs/msg/JointState"},
        "imu": {"type": "sensor_msgs/msg/Imu", "frame": "imu_link"},
        "cmd_vel": {"type": "geometry_msgs/msg/Twist", "timeout_s": 0.5},
        "task": {"type": "std_msgs/msg/Float64MultiArray"},
    },
    "observation": [
        {"name": "hip.position", "topic": "joint_states", "joint": "l_hip", "field": "position", "unit": "deg"},
        {"name": "knee.position", "topic": "joint_states", "joint": "l_knee", "field": "position", "sign": -1,
         "offset": 0.5, "low": -1.5, "high": 1.5},
        {"name": "hip.velocity", "topic": "joint_states", "joint": "l_hip", "field": "velocity", "unit": "rad/s",
         "scale": 0.05},
        {"name": "gyro.z", "topic": "imu", "field": "angular_velocity.z"},
        {"name": "speed", "topic": "cmd_vel", "field": "linear.x", "default": 0},
        {"name": "task", "topic": "task", "index": 1},
    ],
    "action": {
        "topic": "legs/commands",
        "channels": [
            {"name": "hip.position", "joint": "l_hip", "field": "position", "unit": "rad", "scale": 0.25,
             "offset": 0.1, "low": -0.1},
            {"name": "knee.position", "joint": "l_knee", "field": "position", "rate_per_s": 2, "safe": 0.5},
        ],
    },
}  # fmt: skip


def changed(path: str, value) -> dict:
    data = deepcopy(DATA)
    *keys, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    place = data
    for key in keys:
        place = place[key]
    place[last] = value
    return data


def stamp(ns: int = 0, frame: str = ""):
    return Message(stamp=Message(sec=ns // 10**9, nanosec=ns % 10**9), frame_id=frame)


def joints(**joint) -> Message:
    """joints(l_hip=(position, velocity), ...)"""
    position, velocity = zip(*joint.values(), strict=True)
    return Message(name=list(joint), position=list(position), velocity=list(velocity), effort=[], header=stamp())


def imu(z: float, frame: str = "imu_link") -> Message:
    return Message(angular_velocity=Message(x=0.0, y=0.0, z=z), header=stamp(5, frame))


def twist(x: float) -> Message:
    return Message(linear=Message(x=x, y=0.0, z=0.0), angular=Message(x=0.0, y=0.0, z=0.0))


@pytest.fixture
def assembler() -> Assembler:
    return Assembler(Binding.from_dict(DATA, "leg.yaml").check(CARD, SHA), CARD)


def test_reading(assembler: Assembler) -> None:
    assert not assembler.take("task", Message(data=[9.0, 2.0]), 0)
    assert not assembler.take("joint_states", joints(other=(7, 7), l_knee=(1.0, 0.0), l_hip=(90.0, 4.0)), 0)
    assert assembler.take("imu", imu(0.25), 0)
    expected = np.array([math.pi / 2, -0.5, 0.2, 0.25, 0.0, 2.0], np.float32)
    first = assembler.observation(0)
    assert first.dtype == np.float32
    assert first.tolist() == expected.tolist()
    assert not assembler.take("cmd_vel", twist(0.75), 1)
    assert not assembler.take("joint_states", joints(l_hip=(90.0, 4.0), l_knee=(1.0, 0.0)), 2)
    assert assembler.take("imu", imu(0.5), 3)
    assert assembler.observation(3)[[3, 4]].tolist() == [0.5, 0.75]
    assert first.tolist() == expected.tolist()  # vectors share no memory
    assert assembler.observation(1 + 500_000_000)[4] == 0.75
    assert assembler.observation(2 + 500_000_000)[4] == 0.0  # the command has timed out


def test_nothing_without_every_topic(assembler: Assembler) -> None:
    assembler.take("joint_states", joints(l_hip=(0, 0), l_knee=(0, 0)), 0)
    assembler.take("imu", imu(0.0), 0)
    with pytest.raises(ObservationError, match="topic task: nothing has come so far"):
        assembler.observation(0)


@pytest.mark.parametrize(
    ("topic", "message", "words"),
    [
        ("joint_states", joints(l_hip=(0, 0)), "'l_knee' is missing"),
        ("imu", imu(0.0, "base"), "frame_id is 'base', the binding needs 'imu_link'"),
        ("task", Message(data=[1.0]), "1 values, 2 are needed"),
        ("task", Message(data=[1.0, 2.0, 3.0]), "3 values, 2 are needed"),
        ("joint_states", Message(name=["l_hip", "l_knee"] * 2, position=[0] * 4, velocity=[0] * 4, header=stamp()),
         "'l_hip' stands twice"),
        ("joint_states", Message(name=["l_hip", "l_knee"], position=[0], velocity=[0, 0], header=stamp()),
         "position has 1 values for 2 joints"),
    ],
)  # fmt: skip
def test_bad_messages(assembler: Assembler, topic: str, message, words: str) -> None:
    with pytest.raises(ObservationError, match=words):
        assembler.take(topic, message, 0)


@pytest.mark.parametrize(("value", "words"), [(math.nan, "not a number"), (3.5, r"outside \[-3, 3\]"), (1e300, "inf")])
def test_values_outside_the_card(assembler: Assembler, value: float, words: str) -> None:
    assembler.take("task", Message(data=[9.0, 2.0]), 0)
    assembler.take("imu", imu(0.0), 0)
    assembler.take("joint_states", joints(l_hip=(0, 0), l_knee=(-value, 0)), 0)
    with pytest.raises(ObservationError, match=f"knee.position = .*{words}"):
        assembler.observation(0)


def test_robot_limits(assembler: Assembler) -> None:
    x = np.zeros(6, np.float32)
    assert assembler.beyond(x) == ""
    x[1] = 1.75
    assert assembler.beyond(x) == "knee.position = 1.75 is beyond its limits [-1.5, 1.5]"


def test_commands() -> None:
    binding = Binding.from_dict(DATA, "leg.yaml").check(CARD, SHA)
    assert binding.command([1.0, -0.5]) == pytest.approx([0.35, -0.5])
    limits = binding.limits
    assert limits.low.tolist() == pytest.approx([-0.1, -1.0])
    assert limits.high.tolist() == pytest.approx([0.35, 1.0])
    assert limits.safe.tolist() == [0.0, 0.5]
    assert limits.rate_per_s.tolist() == [math.inf, 2.0]
    standing = binding.standing(np.array([math.pi / 2, -0.5, 0, 0, 0, 0]))
    assert standing == pytest.approx([90.0, 1.0])  # as the joints report themselves


@pytest.mark.parametrize("kind", ["std_msgs/msg/Float64MultiArray", "sensor_msgs/msg/JointState",
                                  "trajectory_msgs/msg/JointTrajectory"])  # fmt: skip
def test_commands_round_trip(kind: str) -> None:
    data = changed("action/type", kind)
    data["action"]["channels"][1]["sign"] = -1
    data["action"]["channels"][1]["safe"] = -0.5
    binding = Binding.from_dict(data, "leg.yaml").check(CARD, None)
    point = Message(positions=[], velocities=[], effort=[])
    message = Message(data=[], name=[], joint_names=[], position=[], velocity=[], effort=[], points=[point])
    binding.write_command(message, binding.command([0.5, -0.25]))
    assert binding.read_action(message).tolist() == pytest.approx([0.5, -0.25])
    told = {"std": message.data, "sen": message.position, "tra": point.positions}[kind[:3]]
    assert list(told) == pytest.approx([0.225, 0.25])
    for bad in ([0.1], [0.1, math.nan], [0.1, 0.2, 0.3]):
        message.data = message.position = point.positions = bad
        with pytest.raises(ObservationError, match="2 finite values"):
            binding.read_action(message)
    message.name = message.joint_names = ["l_knee", "l_hip"]
    if kind[:3] != "std":
        with pytest.raises(ObservationError, match="for the joints l_knee, l_hip, not l_hip, l_knee"):
            binding.read_action(message)


REFUSED = {
    "mixed fields": (
        {**DATA, "action": {**DATA["action"], "type": "sensor_msgs/msg/JointState",
                            "channels": [DATA["action"]["channels"][0],
                                         {**DATA["action"]["channels"][1], "field": "velocity"}]}},
        "position is needed for every joint",
    ),
    "swapped model": (changed("policy_sha256", "cd" * 32), "cdcdcdcdcdcd.* was written for another model"),
    "reordered joints": (
        changed("observation", [DATA["observation"][i] for i in (1, 0, 2, 3, 4, 5)]),
        r"observation\[0\] is 'knee.position', on the policy's card 'hip.position'",
    ),
    "too few": (changed("observation", DATA["observation"][:5]), "observation has 5 names, the policy's card 6"),
    "reordered actions": (
        changed("action/channels", DATA["action"]["channels"][::-1]),
        r"action.channels\[0\] is 'knee.position'",
    ),
    "another scale": (changed("observation/0/scale", 1.0), "1 from deg to rad contradicts the units.*0.0174533"),
    "scale without reason": (changed("observation/3/scale", 2.0), "2 from rad/s to rad/s .* has to be 1"),
    "another dimension": (changed("observation/3/unit", "m"), "from 'm' to 'rad/s': say its scale"),
    "another dimension, scaled": (
        {**DATA, "observation": [*DATA["observation"][:3], {**DATA["observation"][3], "unit": "m", "scale": 2.0},
                                 *DATA["observation"][4:]]},
        "no scale is right",
    ),
    "scale missing": (changed("observation/2", {k: v for k, v in DATA["observation"][2].items() if k != "scale"}),
                      "from 'rad/s' to '': say its scale"),
    "negative scale": (changed("observation/2/scale", -0.05), "turned by sign"),
    "sign": (changed("observation/2/sign", 2), "neither 1 nor -1"),
    "limits": (changed("observation/1/low", 2.0), "low 2 is above high 1.5"),
    "limits of commands": (changed("action/channels/0/low", 5.0), "nothing in common"),
    "safe": (changed("action/channels/1/safe", 5.0), "safe 5 is not within"),
    "unknown key": (changed("observation/0/scal", 1.0), "unknown key 'scal'"),
    "unknown top key": ({**DATA, "frame": "x"}, "unknown key 'frame'"),
    "wrong type": (changed("observation/0/scale", "big"), r"observation\[0\].scale: 'big' is no float"),
    "NaN": (changed("observation/0/scale", math.nan), "nan is no float"),
    "no name": (changed("observation/0", {"topic": "imu"}), r"observation\[0\]: name is missing"),
    "twice": (changed("observation/0/name", "knee.position"), "'knee.position' stands twice"),
    "topic": (changed("observation/0/topic", "joints"), "'joints' is none of the topics joint_states"),
    "trigger": ({**DATA, "trigger": "lidar"}, "'lidar' is none of the topics"),
    "type": (changed("topics/imu/type", "sensor_msgs/msg/LaserScan"), "cannot be read; it may be"),
    "field": (changed("observation/3/field", "angular_velocity.w"), "no field of sensor_msgs/msg/Imu"),
    "joint": (changed("observation/0/field", "angle"), "a joint and a field"),
    "command type": (changed("action/type", "sensor_msgs/msg/Imu"), "cannot be commanded"),
    "no command topic": (changed("action/topic", ""), "action.topic is not set"),
    "empty": ({}, "a mapping is needed"),
    "list": ({**DATA, "observation": {}}, "a list of at least one entry"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    data, words = REFUSED[case]
    with pytest.raises(LawsError, match=words) as refusal:
        Binding.from_dict(data, "leg.yaml").check(CARD, SHA)
    assert isinstance(refusal.value, (CardError, ConfigError))
    assert "\n" not in str(refusal.value)


def test_default_binding_and_writing_round_trip() -> None:
    card = Card(
        "robot",
        tuple(
            Channel(name)
            for name in (
                *("a.position", "task", "imu.angular_velocity.y", "b.velocity", "command.linear.x", "phase"),
                "imu.orientation.w",
            )
        ),
        (Channel("a.position"), Channel("b.effort")),
    )
    binding = Binding.of_card(card, "robot/commands").check(card, SHA)
    assert [t.name for t in binding.topics] == ["joint_states", "observation", "imu", "cmd_vel"]
    assert binding.trigger == ("joint_states", "observation", "imu")
    x = np.array([0.1, 2.0, -0.3, 0.4, 0.5, 0.6, 0.7], np.float32)
    assembler = Assembler(binding, card)
    complete = []
    for topic in reversed(binding.topics):
        message = Message(
            header=stamp(), name=[], position=[], velocity=[], effort=[], data=[], linear=Message(),
            angular_velocity=Message(), orientation=Message(),
        )  # fmt: skip
        binding.write(topic, message, x)
        complete.append(assembler.take(topic.name, message, 0))
    assert complete == [False, False, False, True]
    assert assembler.observation(0).tolist() == x.tolist()
    assert binding.standing(x) == [pytest.approx(0.1), 0.0]


@pytest.mark.parametrize("angle", [-1.2, -0.1, 0.0, 0.3, 1.5])
def test_gravity_from_an_orientation(angle: float) -> None:
    card = Card("trunk", tuple(Channel(f"gravity_{axis}") for axis in "xyz"), (Channel("a"),))
    data = {
        "topics": {"imu": {"type": "sensor_msgs/msg/Imu"}},
        "observation": [{"name": f"gravity_{axis}", "topic": "imu", "field": f"gravity.{axis}"} for axis in "xyz"],
        "action": {"topic": "commands", "channels": [{"name": "a"}]},
    }
    binding = Binding.from_dict(data, "trunk.yaml").check(card, None)
    half, yaw = angle / 2, 0.4  # turned by yaw first, which gravity does not see, then pitched nose down
    q = Message(
        x=-math.sin(half) * math.sin(yaw), y=math.sin(half) * math.cos(yaw), z=math.cos(half) * math.sin(yaw),
        w=math.cos(half) * math.cos(yaw),
    )  # fmt: skip
    assembler = Assembler(binding, card)
    assert assembler.take("imu", Message(orientation=q, header=stamp()), 0)
    seen = assembler.observation(0)
    assert seen.tolist() == pytest.approx([math.sin(angle), 0.0, -math.cos(angle)], abs=1e-6)
    written = Message(orientation=Message(x=0.0, y=0.0, z=0.0, w=1.0), header=stamp())
    binding.write(binding.topics[0], written, seen)
    assembler.take("imu", written, 0)
    assert assembler.observation(0).tolist() == pytest.approx(seen.tolist(), abs=1e-6)


@pytest.mark.parametrize("path", sorted(share_path("config").glob("*.binding.yaml")), ids=lambda p: p.name)
def test_shipped_bindings(path: Path) -> None:
    """Each fits its workload, and the model that is shipped for it."""
    name = path.name.partition(".")[0]
    spec = pytest.importorskip("laws_ros.build.workloads").get(name).spec
    card = Card(spec.name, spec.observations, spec.actions, context=spec.context)
    model = share_path(f"models/{name}.onnx")
    if model.exists():
        policy = Policy(model)
        card, digest = policy.card, policy.sha256
    binding = Binding.from_dict(load_yaml(path), str(path)).check(card, digest if model.exists() else None)
    assert np.isfinite(binding.limits.low).all() and np.isfinite(binding.limits.high).all()


def test_decisions_are_commanded_by_index() -> None:
    card = Card("game", (Channel("x0"),), (Channel("left"), Channel("right"), Channel("none")), "argmin")
    binding = Binding.of_card(card, "game/commands").check(card, SHA)
    assert binding.limits.low.tolist() == [0.0]
    assert binding.limits.high.tolist() == [2.0]
