"""The binding between a policy's vectors and messages: which field of which topic is which entry, and how it is scaled.

A binding is a mapping (config/*.binding.yaml) that says, entry by entry in the card's order:

    observation = sign * scale * field + offset        command field = sign * scale * action + offset

`Binding.check` compares it with the policy's card and hash before anything moves: another model, another order, or a
scale that contradicts the units is refused. Messages are duck-typed; nothing here imports ROS.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .card import Card, Channel
from .errors import CardError, ConfigError, ObservationError
from .safety import Limits

JOINT_STATE, ARRAY = "sensor_msgs/msg/JointState", "std_msgs/msg/Float64MultiArray"
IMU, TWIST, TRAJECTORY = "sensor_msgs/msg/Imu", "geometry_msgs/msg/Twist", "trajectory_msgs/msg/JointTrajectory"
JOINT_FIELDS = ("position", "velocity", "effort")
POINT_FIELDS = ("positions", "velocities", "effort")  # of a trajectory's point
_VECTOR, _QUATERNION = "(x|y|z)", "(x|y|z|w)"
_POSE = f"position\\.{_VECTOR}|orientation\\.{_QUATERNION}"
_VELOCITY = f"(linear|angular)\\.{_VECTOR}"
# Type of message -> the fields that an observation may name (None: by joint or index).
READABLE: dict[str, str | None] = {
    JOINT_STATE: None,
    ARRAY: None,
    IMU: f"orientation\\.{_QUATERNION}|(angular_velocity|linear_acceleration)\\.{_VECTOR}|gravity\\.{_VECTOR}",
    TWIST: _VELOCITY,
    "geometry_msgs/msg/TwistStamped": f"twist\\.({_VELOCITY})",
    "geometry_msgs/msg/PoseStamped": f"pose\\.({_POSE})",
}
WRITABLE = (ARRAY, JOINT_STATE, TRAJECTORY)
# One of the first in the second.
CONVERSIONS = {
    ("deg", "rad"): math.pi / 180.0,
    ("deg/s", "rad/s"): math.pi / 180.0,
    ("rpm", "rad/s"): math.pi / 30.0,
    ("mm", "m"): 1e-3,
    ("cm", "m"): 1e-2,
    ("mm/s", "m/s"): 1e-3,
    ("km/h", "m/s"): 1.0 / 3.6,
    ("g", "m/s^2"): 9.80665,
    ("mN m", "N m"): 1e-3,
}
PHYSICAL = {unit for pair in CONVERSIONS for unit in pair} | {"N"}


@dataclass(frozen=True)
class Topic:
    """Where messages come from.

    Attributes:
        name: of the topic; relative ones lie in the node's namespace.
        type: one of READABLE.
        frame: header.frame_id that every message must have; empty: not checked.
        timeout_s: a value older than this is not used; the default of its entries is, or there is no observation.
    """

    name: str
    type: str
    frame: str = ""
    timeout_s: float = math.inf


@dataclass(frozen=True)
class Entry:
    """One entry of a vector and its field.

    Attributes:
        name: as on the card.
        topic: for observations; a command has one topic.
        joint, field: for joint messages the joint's name and position, velocity or effort; else the field's path; of an
            Imu also gravity.x, .y and .z, the direction of gravity in its frame, from the orientation.
        index: for Float64MultiArray; default: the entry's place among those of its topic.
        unit: of the message; default: the card's.
        scale, sign, offset: see the module; without scale, what the units say. offset has the unit of the result.
        default: observations: used while the topic is silent, card units.
        low, high: observations, card units: beyond them the robot is stopped (on_limit). Commands, message units:
            nothing beyond is published; default: what the card's range becomes.
        rate_per_s: commands: largest change, message units per second.
        safe: commands: the reaction safe_pose, message units; default: what is nearest to 0.
    """

    name: str
    topic: str = ""
    joint: str = ""
    field: str = ""
    index: int = -1
    unit: str = ""
    scale: float = math.nan
    sign: int = 1
    offset: float = 0.0
    default: float = math.nan
    low: float = -math.inf
    high: float = math.inf
    rate_per_s: float = math.inf
    safe: float = math.nan


@dataclass(frozen=True)
class Binding:
    """See the module.

    Attributes:
        trigger: an observation is complete when each of these topics has delivered since the last one.
        commands, commands_type: the topic and its type, one of WRITABLE.
        policy_sha256: of the only model that this binding is for; empty: any with this card.
    """

    topics: tuple[Topic, ...]
    trigger: tuple[str, ...]
    observation: tuple[Entry, ...]
    commands: str
    commands_type: str
    action: tuple[Entry, ...]
    policy_sha256: str = ""
    where: str = "binding"

    # ------------------------------------------------------------------------------------------- making one

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Binding:
        """Read a binding strictly.

        Raises:
            ConfigError: an unknown or missing key, a wrong type, a name that stands twice or nowhere.
        """
        top = _mapping(data, where, ("policy_sha256", "trigger", "topics", "observation", "action"))
        topics = []
        for name, row in _mapping(top.get("topics"), f"{where}: topics").items():
            here = f"{where}: topics.{name}"
            topics.append(_record(Topic, {"name": name, **_mapping(row, here)}, here))
            if topics[-1].type not in READABLE:
                known = ", ".join(READABLE)
                raise ConfigError(f"{where}: topics.{name}.type: {topics[-1].type!r} cannot be read; it may be {known}")
        names = [topic.name for topic in topics]
        trigger = top.get("trigger", names[:1])
        trigger = (trigger,) if isinstance(trigger, str) else tuple(trigger)
        action = _mapping(top.get("action"), f"{where}: action", ("topic", "type", "channels"))
        binding = cls(
            tuple(topics),
            trigger,
            _entries(top.get("observation"), f"{where}: observation"),
            str(action.get("topic", "")),
            str(action.get("type", ARRAY)),
            _entries(action.get("channels"), f"{where}: action.channels"),
            str(top.get("policy_sha256", "")),
            where,
        )
        for name in trigger:
            if name not in names:
                raise ConfigError(f"{where}: trigger: {name!r} is none of the topics {', '.join(names)}")
        if not binding.commands:
            raise ConfigError(f"{where}: action.topic is not set")
        if binding.commands_type not in WRITABLE:
            raise ConfigError(
                f"{where}: action.type: {binding.commands_type!r} cannot be commanded; it may be {', '.join(WRITABLE)}"
            )
        binding._check_fields(names)
        return binding

    @classmethod
    def of_card(cls, card: Card, commands: str) -> Binding:
        """The binding without a file, by the names on a card and without any scaling.

        "<joint>.position", ".velocity" and ".effort" are read from joint_states, "imu.<field>" from imu,
        "command.<field>" from cmd_vel, everything else from the array `observation`, in order.
        """
        topics: dict[str, Topic] = {}
        entries = []
        for channel in card.observations:
            head, _, field = channel.name.partition(".")
            joint, kind = _joint(channel.name)
            if head == "imu" and re.fullmatch(READABLE[IMU] or "", field):
                topic = Topic("imu", IMU)
            elif head == "command" and re.fullmatch(READABLE[TWIST] or "", field):
                topic = Topic("cmd_vel", TWIST)
            elif joint:
                topic, field = Topic("joint_states", JOINT_STATE), kind
            else:
                topic, field = Topic("observation", ARRAY), ""
            topics[topic.name] = topic
            entries.append(Entry(channel.name, topic.name, joint if topic.type == JOINT_STATE else "", field))
        return cls(
            tuple(topics.values()),
            tuple(name for name in topics if name != "cmd_vel") or tuple(topics),
            tuple(entries),
            commands,
            ARRAY,
            tuple(Entry(c.name, joint=_joint(c.name)[0], field=_joint(c.name)[1]) for c in _actions(card)),
            where="the default binding",
        )

    def _check_fields(self, topics: list[str]) -> None:
        kinds = {topic.name: topic.type for topic in self.topics}
        for part, entries in (("observation", self.observation), ("action.channels", self.action)):
            for i, entry in enumerate(entries):
                here = f"{self.where}: {part}[{i}] {entry.name}"
                if part == "observation" and entry.topic not in topics:
                    raise ConfigError(f"{here}.topic: {entry.topic!r} is none of the topics {', '.join(topics)}")
                kind = kinds[entry.topic] if part == "observation" else self.commands_type
                pattern = READABLE.get(kind)
                if kind in (JOINT_STATE, TRAJECTORY):
                    if not entry.joint or entry.field not in JOINT_FIELDS:
                        raise ConfigError(f"{here}: a joint and a field ({', '.join(JOINT_FIELDS)}) are needed")
                elif pattern is not None and not re.fullmatch(pattern, entry.field):
                    raise ConfigError(f"{here}.field: {entry.field!r} is no field of {kind} that can be read")
                if entry.sign not in (1, -1):
                    raise ConfigError(f"{here}.sign: {entry.sign} is neither 1 nor -1")

    # ------------------------------------------------------------------------------------------- checking it

    def check(self, card: Card, policy_sha256: str | None) -> Binding:
        """This binding with every scale, offset and limit filled in, if it fits the policy.

        Args:
            policy_sha256: of the policy's file; None where there is no policy (a simulated robot).

        Raises:
            CardError: another model, other names or another order, a scale that contradicts the units.
            ConfigError: limits that contradict each other, or joints that a command's message cannot hold.
        """
        if self.policy_sha256 and policy_sha256 is not None and self.policy_sha256 != policy_sha256:
            raise CardError(
                f"{self.where}: policy_sha256 {self.policy_sha256[:12]}... is not this policy's "
                f"({policy_sha256[:12]}...): it was written for another model"
            )
        observation = self._fit("observation", self.observation, card.observations)
        action = self._fit("action.channels", self.action, _actions(card), inverse=True)
        checked = replace(self, observation=observation, action=action)
        for name, places in checked._groups:
            if [action[k].joint for k in places] != checked.joints:
                raise ConfigError(f"{self.where}: action.channels: {name} is needed for every joint, in one order")
        _ = checked.limits
        return checked

    def _fit(
        self, part: str, entries: Sequence[Entry], channels: Sequence[Channel], inverse: bool = False
    ) -> tuple[Entry, ...]:
        for i, (entry, channel) in enumerate(zip(entries, channels, strict=False)):
            if entry.name != channel.name:
                raise CardError(f"{self.where}: {part}[{i}] is {entry.name!r}, on the policy's card {channel.name!r}")
        if len(entries) != len(channels):
            raise CardError(f"{self.where}: {part} has {len(entries)} names, the policy's card {len(channels)}")
        return tuple(
            self._scaled(f"{self.where}: {part}[{i}] {e.name}", e, c, inverse)
            for i, (e, c) in enumerate(zip(entries, channels, strict=True))
        )

    @staticmethod
    def _scaled(here: str, entry: Entry, channel: Channel, inverse: bool) -> Entry:
        unit = entry.unit or channel.unit
        source, target = (channel.unit, unit) if inverse else (unit, channel.unit)
        implied = 1.0 if source == target else CONVERSIONS.get((source, target))
        if implied is None and (target, source) in CONVERSIONS:
            implied = 1.0 / CONVERSIONS[target, source]
        scale = entry.scale
        if math.isnan(scale):
            if implied is None:
                raise CardError(f"{here}: from {source!r} to {target!r}: say its scale")
            scale = implied
        elif not (scale > 0.0 and math.isfinite(scale)):
            raise CardError(f"{here}.scale: {scale:g} is not above 0 (a direction is turned by sign: -1)")
        elif source in PHYSICAL and target in PHYSICAL and (implied is None or abs(scale / implied - 1.0) > 1e-6):
            right = "no scale is right" if implied is None else f"it has to be {implied:g}"
            raise CardError(f"{here}.scale: {scale:g} from {source} to {target} contradicts the units, {right}")
        values = {**entry.__dict__, "unit": unit, "scale": entry.sign * scale}
        if inverse:
            ends = sorted(values["scale"] * end + entry.offset for end in (channel.low, channel.high))
            values["low"], values["high"] = max(entry.low, ends[0]), min(entry.high, ends[1])
            if values["low"] > values["high"]:
                raise ConfigError(f"{here}: [{entry.low:g}, {entry.high:g}] and the card's have nothing in common")
            if math.isnan(entry.safe):
                values["safe"] = min(max(0.0, values["low"]), values["high"])
        elif not entry.low <= entry.high:
            raise ConfigError(f"{here}: low {entry.low:g} is above high {entry.high:g}")
        return Entry(**values)

    # ------------------------------------------------------------------------------------------- commands

    @property
    def limits(self) -> Limits:
        """Of the commands of a checked binding."""
        columns = ("low", "high", "rate_per_s", "safe")
        return Limits(*(np.array([getattr(e, name) for e in self.action]) for name in columns))

    @cached_property
    def _line(self) -> list[tuple[float, float]]:
        return [(e.scale, e.offset) for e in self.action]

    def command(self, action: Sequence[float]) -> list[float]:
        """An action [m] in the units in which it is published."""
        return [scale * value + offset for value, (scale, offset) in zip(action, self._line, strict=True)]

    @cached_property
    def joints(self) -> list[str]:
        """Whom a joint message commands, in order."""
        return list(dict.fromkeys(e.joint for e in self.action))

    @cached_property
    def _groups(self) -> list[tuple[str, list[int]]]:
        """Of a joint message: its fields in use, and the actions that each holds."""
        if self.commands_type == ARRAY:
            return []
        names = zip(JOINT_FIELDS, POINT_FIELDS if self.commands_type == TRAJECTORY else JOINT_FIELDS, strict=True)
        groups = [(name, [k for k, e in enumerate(self.action) if e.field == field]) for field, name in names]
        return [(name, places) for name, places in groups if places]

    def write_command(self, message: Any, command: Sequence[float]) -> None:
        """Put a command [m] into a message of commands_type; a trajectory holds one point already."""
        # An array('d') is the one form that rclpy does not check number by number.
        if self.commands_type == ARRAY:
            message.data = array("d", command)
            return
        names, target = ("joint_names", message.points[0]) if self.commands_type == TRAJECTORY else ("name", message)
        setattr(message, names, self.joints)
        for name, places in self._groups:
            setattr(target, name, array("d", [command[k] for k in places]))

    def is_empty(self, message: Any) -> bool:
        """Whether a message of commands_type commands nothing."""
        if self.commands_type == ARRAY:
            return not len(message.data)
        return not message.points if self.commands_type == TRAJECTORY else not len(message.name)

    def read_action(self, message: Any) -> NDArray[np.float64]:
        """The action [m] of which a message is the command: what a robot does with it.

        Raises:
            ObservationError: other joints or another length than the binding says.
        """
        if self.commands_type == ARRAY:
            command = np.array(message.data, dtype=float)
        else:
            trajectory = self.commands_type == TRAJECTORY
            names = list(message.joint_names if trajectory else message.name)
            if names != self.joints or (trajectory and not message.points):
                raise ObservationError(f"a command for the joints {', '.join(names)}, not {', '.join(self.joints)}")
            source, command = message.points[-1] if trajectory else message, np.full(len(self.action), math.nan)
            for name, places in self._groups:
                if len(getattr(source, name)) == len(places):
                    command[places] = getattr(source, name)
        if command.shape != (len(self.action),) or not np.isfinite(command).all():
            raise ObservationError(f"refused {command.tolist()}: {len(self.action)} finite values are needed")
        return (command - [offset for _, offset in self._line]) / [scale for scale, _ in self._line]

    def standing(self, observation: NDArray[Any]) -> list[float]:
        """The command [m] that keeps a robot in this state: observed joint positions where they are commanded."""
        seen = {
            e.joint: (float(v) - e.offset) / e.scale
            for e, v in zip(self.observation, observation, strict=True)
            if e.field == "position"
        }
        return [seen.get(e.joint, e.safe) if e.field == "position" else e.safe for e in self.action]

    # ------------------------------------------------------------------------------------------- simulated robots

    def write(self, topic: Topic, message: Any, observation: NDArray[Any]) -> None:
        """Fill a message with what an observation vector [n] says of its topic; unknown joint values are NaN."""
        values = [
            (entry, (float(value) - entry.offset) / entry.scale)
            for entry, value in zip(self.observation, observation, strict=True)
            if entry.topic == topic.name
        ]
        if topic.frame:
            message.header.frame_id = topic.frame
        if topic.type == JOINT_STATE:
            joints = list(dict.fromkeys(entry.joint for entry, _ in values))
            message.name = joints
            for field in JOINT_FIELDS:
                told = {entry.joint: value for entry, value in values if entry.field == field}
                if told:
                    setattr(message, field, [told.get(joint, math.nan) for joint in joints])
        elif topic.type == ARRAY:
            data = [math.nan] * (1 + max(max(entry.index, k) for k, (entry, _) in enumerate(values)))
            for k, (entry, value) in enumerate(values):
                data[entry.index if entry.index >= 0 else k] = value
            message.data = array("d", data)
        else:
            told = {entry.field: value for entry, value in values}
            if any(field.startswith("gravity.") for field in told):
                message.orientation.x, message.orientation.y, message.orientation.w = _attitude(told)
            for entry, value in values:
                *path, last = entry.field.split(".")
                if path == ["gravity"]:
                    continue
                owner = message
                for name in path:
                    owner = getattr(owner, name)
                setattr(owner, last, value)


class Assembler:
    """Makes observation vectors out of the newest messages of a checked binding's topics.

    Args:
        card: that the binding was checked against; what is outside its ranges is no observation.
    """

    def __init__(self, binding: Binding, card: Card) -> None:
        self._card = card
        self._ranges = [(c.low, c.high) for c in card.observations]
        self._parts = [_Part(binding, topic) for topic in binding.topics]
        self._by_name = {part.topic.name: part for part in self._parts}
        self._trigger = [self._by_name[name] for name in binding.trigger]
        self._values = array("f", bytes(4 * len(binding.observation)))
        bounded = [(i, e) for i, e in enumerate(binding.observation) if e.low > -math.inf or e.high < math.inf]
        self._bounded = [(i, e.low, e.high, e) for i, e in bounded]

    def take(self, topic: str, message: Any, now_ns: int) -> bool:
        """Read one message; True when an observation is complete.

        Raises:
            ObservationError: a missing or doubled joint, a wrong length, another frame.
        """
        part = self._by_name[topic]
        part.read(message, now_ns)
        if not all(p.fresh for p in self._trigger):
            return False
        for p in self._trigger:
            p.fresh = False
        return True

    def observation(self, now_ns: int) -> NDArray[np.float32]:
        """The vector [n].

        Raises:
            ObservationError: a topic without a default is silent; a value is no number or outside the card's range.
        """
        out = self._values
        for part in self._parts:
            values = part.current(now_ns)
            for i, value in zip(part.places, values, strict=True):
                out[i] = value
        observation = np.frombuffer(bytes(out), np.float32)
        for value, (low, high) in zip(out, self._ranges, strict=True):
            if not low <= value <= high:
                self._card.check(observation)
        return observation

    @property
    def stamp_ns(self) -> int:
        """Of the newest message of the triggers, 0 if their type has none."""
        return max(part.stamp_ns for part in self._trigger)

    def beyond(self, observation: NDArray[np.float32]) -> str:
        """Which observation lies beyond the robot's own limits, or ""."""
        for i, low, high, entry in self._bounded:
            if not low <= observation[i] <= high:
                return f"{entry.name} = {observation[i]:g} is beyond its limits [{low:g}, {high:g}]"
        return ""


class _Part:
    """The entries that come from one topic, and their newest values."""

    def __init__(self, binding: Binding, topic: Topic) -> None:
        self.topic = topic
        chosen = [(i, e) for i, e in enumerate(binding.observation) if e.topic == topic.name]
        self.places = [i for i, _ in chosen]
        self.entries = [e for _, e in chosen]
        self.fresh = False
        self.stamp_ns = 0
        self._plain = all(e.scale == 1.0 and e.offset == 0.0 for e in self.entries)
        self._values: list[float] | None = None
        self._arrived_ns = 0
        defaults = [e.default for e in self.entries]
        self._defaults = None if any(map(math.isnan, defaults)) else defaults
        self._timeout_ns = None if topic.timeout_s == math.inf else round(topic.timeout_s * 1e9)
        self._order: list[str] | None = None  # the joint names of the last message, to which _indices belong
        self._fields = sorted({e.field for e in self.entries})
        self._indices = [(e.field, e.index if e.index >= 0 else k) for k, e in enumerate(self.entries)]
        self._paths = [e.field.split(".") for e in self.entries]
        self._read = {JOINT_STATE: self._read_joints, ARRAY: self._read_array}.get(topic.type, self._read_fields)

    def read(self, message: Any, now_ns: int) -> None:
        header = getattr(message, "header", None)
        if self.topic.frame and header is not None and header.frame_id != self.topic.frame:
            raise ObservationError(f"frame_id is {header.frame_id!r}, the binding needs {self.topic.frame!r}")
        values = self._read(message)
        if not self._plain:
            values = [e.scale * v + e.offset for e, v in zip(self.entries, values, strict=True)]
        if header is not None:
            self.stamp_ns = header.stamp.sec * 1_000_000_000 + header.stamp.nanosec
        self._values, self._arrived_ns, self.fresh = values, now_ns, True

    def current(self, now_ns: int) -> list[float]:
        late = self._timeout_ns is not None and now_ns - self._arrived_ns > self._timeout_ns
        if self._values is None or late:
            if self._defaults is None:
                silent = f"for {(now_ns - self._arrived_ns) / 1e9:.3f} s" if self._values is not None else "so far"
                raise ObservationError(f"topic {self.topic.name}: nothing has come {silent}")
            return self._defaults
        return self._values

    def _read_joints(self, message: Any) -> list[float]:
        names = message.name
        if names != self._order:
            self._order = None
            for joint in dict.fromkeys(e.joint for e in self.entries):
                if names.count(joint) != 1:
                    found = "stands twice" if joint in names else "is missing"
                    raise ObservationError(f"joint {joint!r} {found}; the message has {', '.join(names) or 'none'}")
            self._indices = [(e.field, names.index(e.joint)) for e in self.entries]
            self._order = list(names)
        for field in self._fields:
            if len(getattr(message, field)) != len(names):
                raise ObservationError(f"{field} has {len(getattr(message, field))} values for {len(names)} joints")
        return [getattr(message, field)[i] for field, i in self._indices]

    def _read_array(self, message: Any) -> list[float]:
        data = message.data
        needed = 1 + max(i for _, i in self._indices)
        if len(data) != needed:
            raise ObservationError(f"{len(data)} values, {needed} are needed")
        return [data[i] for _, i in self._indices]

    def _read_fields(self, message: Any) -> list[float]:
        values = []
        for path in self._paths:
            value = message
            if path[0] == "gravity":
                values.append(_gravity(message.orientation)[path[1]])
                continue
            for name in path:
                value = getattr(value, name)
            values.append(value)
        return values


def _gravity(q: Any) -> dict[str, float]:
    """The direction of gravity in the frame that a quaternion turns into the world's."""
    x, y, z, w = q.x, q.y, q.z, q.w
    return {"x": 2.0 * (w * y - x * z), "y": -2.0 * (y * z + w * x), "z": 2.0 * (x * x + y * y) - 1.0}


def _attitude(told: dict[str, float]) -> tuple[float, float, float]:
    """The inverse of `_gravity` from its x and y: a quaternion (x, y, w) with z = 0, upright, which they leave open."""
    x, y = told.get("gravity.x", 0.0), told.get("gravity.y", 0.0)
    length = max(1.0, math.hypot(x, y))  # sensor noise may make it longer than one
    x, y = x / length, y / length
    w = math.sqrt((1.0 + math.sqrt(max(0.0, 1.0 - x * x - y * y))) / 2.0)
    return -y / (2.0 * w), x / (2.0 * w), w


def _actions(card: Card) -> tuple[Channel, ...]:
    """What is commanded: the actions, or the index of the chosen one."""
    return card.actions if card.decision == "none" else (Channel("decision", "", 0.0, len(card.actions) - 1.0),)


def _joint(name: str) -> tuple[str, str]:
    """Joint and field of "<joint>.<field>", or two empty strings."""
    joint, _, field = name.rpartition(".")
    return (joint, field) if joint and field in JOINT_FIELDS else ("", "")


R = TypeVar("R", Topic, Entry)


def _mapping(data: Any, where: str, known: Sequence[str] = ()) -> dict[str, Any]:
    if not isinstance(data, dict) or not data:
        raise ConfigError(f"{where}: a mapping is needed, found {data!r}")
    for key in data:
        if known and key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}; known keys: {', '.join(known)}")
    return data


def _entries(rows: Any, where: str) -> tuple[Entry, ...]:
    if not isinstance(rows, list) or not rows:
        raise ConfigError(f"{where}: a list of at least one entry is needed, found {rows!r}")
    entries = [_record(Entry, row, f"{where}[{i}]") for i, row in enumerate(rows)]
    names = [entry.name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{where}: the name {name!r} stands twice")
    return tuple(entries)


def _record(kind: type[R], row: Any, where: str) -> R:
    """A record from a mapping: no key that it does not have, and every value of the type of its field."""
    types = {f.name: str(f.type) for f in fields(kind)}
    row = _mapping(row, where, list(types))
    for field in fields(kind):
        if field.default is MISSING and field.name not in row:
            raise ConfigError(f"{where}: {field.name} is missing")
    for name, value in row.items():
        good: tuple[type, ...] = {"float": (int, float), "int": (int,), "str": (str,)}[types[name]]
        if isinstance(value, bool) or not isinstance(value, good) or value != value:
            raise ConfigError(f"{where}.{name}: {value!r} is no {types[name]}")
    values: dict[str, Any] = {name: float(v) if types[name] == "float" else v for name, v in row.items()}
    return kind(**values)
