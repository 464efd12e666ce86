"""Recorded bags (rosbag2, MCAP or sqlite3): observations to learn from, and rollouts written down.

Reading: a card's observations are found in a bag by name,
    in a labelled array (Float64MultiArray or Float32MultiArray whose layout names its columns with commas, as `laws
    record` and the controller's ~/decision write them) that has all of them,
    or as a robot's binding says (?binding=FILE, see core.observation), with its scales and offsets,
    or each on its own: "<joint>.position", ".velocity" or ".effort" in a sensor_msgs/JointState, and anything else as
    "<topic>.<field>...", the topic's last word and the path of a number in its message ("imu.angular_velocity.x",
    "cmd_vel.linear.x", "mode.data"). An observation is made at each message of the first observation's topic, from the
    newest message of every other.
A policy without a card learns from the bag's only array of its length.

Writing: /joint_states for the observations that are joints', /observation, /command and /episode as labelled arrays.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rosbags.highlevel import AnyReader, AnyReaderError
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from laws_ros.core.errors import ObservationError, WorkloadError
from laws_ros.core.observation import Assembler, Binding
from laws_ros.runtime.files import load_yaml, resolve
from laws_ros.runtime.policy import Policy

from .workloads import Parameter, Rollouts, Simulation, Workload, WorkloadSpec

PARAMETERS = {
    "order": Parameter("card", "whether joints and labels must stand in the card's order", choices=("card", "any")),
    "topic": Parameter("", "read this topic only"),
    "binding": Parameter("", "a robot's binding, config/*.binding.yaml, that says what is which observation"),
}
JOINT_FIELDS = ("position", "velocity", "effort")
FEWEST = 100
GAP = 20.0  # a pause of more periods than this ends a recorded stretch
EPISODE_GAP_S = 1.0  # written between two episodes: more than GAP periods from 20 Hz on
_ARRAYS = ("std_msgs/msg/Float64MultiArray", "std_msgs/msg/Float32MultiArray")
_JOINTS = "sensor_msgs/msg/JointState"


class _Source(NamedTuple):
    """Some of an observation's entries, and how they are read from a topic's messages."""

    topic: str
    entries: list[int]
    read: Callable[[Any], list[float]]


def workload(path: str, policy: Policy, options: dict[str, Any]) -> Workload:
    """The recording at a path (an MCAP or sqlite3 file, or the folder with its metadata.yaml) as a workload.

    Args:
        policy: its card says what to read, in which order.
        options: values of PARAMETERS.

    Raises:
        WorkloadError: not a readable bag; a topic, joint or label that the card needs is missing; another order.
    """
    stamps, rows = _read(path, policy, options)
    kept = np.isfinite(rows).all(axis=1)
    stamps, rows = stamps[kept], rows[kept]
    if len(rows) < FEWEST:
        raise WorkloadError(f"{path}: {len(rows)} usable observations; at least {FEWEST} are needed")
    steps = np.diff(stamps)
    period = float(np.median(steps))
    breaks = np.flatnonzero((steps <= 0) | (steps > GAP * period)) + 1
    stretches = tuple(np.split(rows, breaks))
    card = policy.card
    spec = WorkloadSpec(
        name=path,
        observations=card.observations,
        actions=card.actions,
        discrete=card.decision != "none",
        period_s=period,
        episode_steps=max(len(s) for s in stretches),
        context=card.context,
    )
    return Workload(spec, partial(_cannot, path), recorded=stretches)


def _cannot(path: str) -> Simulation:
    raise WorkloadError(f"{path}: is a recording, which cannot be simulated")


def _read(path: str, policy: Policy, options: dict[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Stamps [N] in s and observations [N, n], in the order of recording."""
    given = Path(path)
    if not given.exists():
        raise WorkloadError(f"{path}: no such bag")
    try:
        with AnyReader([given], default_typestore=get_typestore(Stores.ROS2_KILTED)) as reader:
            found = _bound if options["binding"] else _observations
            return found(reader, path, policy, options)
    except (AnyReaderError, OSError, ValueError, KeyError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WorkloadError(f"{path}: not a readable rosbag2 recording: {reason}") from None


def _observations(
    reader: AnyReader, path: str, policy: Policy, options: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    wanted = str(options["topic"])
    firsts: dict[str, Any] = {}  # topic -> its first message
    types: dict[str, str] = {}
    for connection in reader.connections:
        types[connection.topic] = connection.msgtype
        if wanted in ("", connection.topic) and connection.topic not in firsts:
            for _, _, raw in reader.messages([connection]):
                firsts[connection.topic] = reader.deserialize(raw, connection.msgtype)
                break
    if wanted and wanted not in firsts:
        raise WorkloadError(f"{path}: no messages on topic {wanted}; the bag has {', '.join(types) or 'none'}")
    sources = {s.topic: s for s in _sources(path, policy, firsts, types, options["order"] == "any")}
    clock = next(s.topic for s in sources.values() if 0 in s.entries)
    current = np.full(policy.observations, np.nan)
    heard: set[str] = set()
    stamps: list[tuple[int, int]] = []
    rows: list[NDArray[np.float64]] = []
    for connection, logged, raw in reader.messages([c for c in reader.connections if c.topic in sources]):
        source = sources[connection.topic]
        message = reader.deserialize(raw, connection.msgtype)
        current[source.entries] = source.read(message)
        heard.add(source.topic)
        if source.topic == clock and len(heard) == len(sources):
            stamps.append((_stamp_ns(message), logged))
            rows.append(current.copy())
    with np.errstate(over="ignore"):
        return _seconds(stamps), np.array(rows).reshape(-1, policy.observations).astype(np.float32)


def _bound(
    reader: AnyReader, path: str, policy: Policy, options: dict[str, Any]
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Observations as the controller makes them; what it would refuse as out of range is left out."""
    file = resolve(str(options["binding"]))
    binding = Binding.from_dict(load_yaml(file), str(file)).check(policy.card, policy.sha256)
    assembler = Assembler(binding, policy.card)
    topics: dict[str, str] = {}  # as in the bag -> as in the binding
    there = [c.topic for c in reader.connections]
    for topic in binding.topics:
        fitting = [t for t in dict.fromkeys(there) if f"/{t}".endswith(f"/{topic.name.strip('/')}")]
        if len(fitting) != 1:
            raise WorkloadError(
                f"{path}: {len(fitting)} topics are {topic.name} of {file}; the bag has {', '.join(there) or 'none'}"
            )
        topics[fitting[0]] = topic.name
    stamps: list[tuple[int, int]] = []
    rows: list[NDArray[np.float32]] = []
    for connection, logged, raw in reader.messages([c for c in reader.connections if c.topic in topics]):
        message = reader.deserialize(raw, connection.msgtype)
        try:
            complete = assembler.take(topics[connection.topic], message, logged)
        except ObservationError as error:
            raise WorkloadError(f"{path}: {connection.topic}: {error} (as {file} needs it)") from None
        if complete:
            with suppress(ObservationError):
                rows.append(assembler.observation(logged))
                stamps.append((assembler.stamp_ns, logged))
    return _seconds(stamps), np.array(rows, np.float32).reshape(-1, policy.observations)


def _sources(
    path: str, policy: Policy, firsts: dict[str, Any], types: dict[str, str], any_order: bool
) -> list[_Source]:
    names = [c.name for c in policy.card.observations]
    labelled = {t: _labels(m) for t, m in firsts.items() if types[t] in _ARRAYS}

    def in_order(topic: str, what: str, found: Sequence[str], needed: Sequence[str]) -> None:
        there = [name for name in found if name in needed]
        if there != list(needed) and not any_order:
            raise WorkloadError(
                f"{path}: {topic} has the {what} {', '.join(there)}; the card of {policy.path.name} has them in "
                f"another order: {', '.join(needed)} (add ?order=any to match them by name)"
            )

    for topic, labels in labelled.items():
        if set(names) <= set(labels):
            in_order(topic, "columns", labels, names)
            read = partial(_from_array, path, topic, len(labels), [labels.index(name) for name in names])
            return [_Source(topic, list(range(len(names))), read)]
    if not policy.has_card:
        fitting = [t for t in labelled if len(firsts[t].data) == len(names)]
        if len(fitting) != 1:
            raise WorkloadError(
                f"{path}: {policy.path.name} has no card that names its {len(names)} observations, and {len(fitting)} "
                f"topics are arrays of that length; write {policy.path.with_suffix('.yaml').name} or add ?topic=NAME "
                f"(the bag has {_contents(firsts, types)})"
            )
        return [_Source(fitting[0], list(range(len(names))), partial(_from_array, path, fitting[0], len(names), None))]

    joints = {t: list(m.name) for t, m in firsts.items() if types[t] == _JOINTS}
    found: dict[str, list[int]] = {}
    missing = []
    for i, name in enumerate(names):
        joint, _, field = name.rpartition(".")
        topics = [t for t, there in joints.items() if field in JOINT_FIELDS and joint in there]
        topics = topics or [t for t, m in firsts.items() if _number(m, _path(t, name)) is not None]
        if len(topics) > 1:
            raise WorkloadError(f"{path}: {name} is on the topics {' and '.join(topics)}; choose with ?topic=NAME")
        if topics:
            found.setdefault(topics[0], []).append(i)
        else:
            missing.append(name)
    if missing:
        raise WorkloadError(
            f"{path}: nothing in it gives {', '.join(missing)}; the card of {policy.path.name} needs "
            f"{', '.join(names)}, the bag has {_contents(firsts, types)}"
        )
    sources = []
    for topic, entries in found.items():
        if topic in joints:
            fields = [(names[i].rpartition(".")[0], names[i].rpartition(".")[2]) for i in entries]
            in_order(topic, "joints", joints[topic], list(dict.fromkeys(joint for joint, _ in fields)))
            sources.append(_Source(topic, entries, partial(_from_joints, path, topic, fields)))
        else:
            paths = [_path(topic, names[i]) for i in entries]
            sources.append(_Source(topic, entries, partial(_from_fields, paths)))
    return sources


def _from_array(path: str, topic: str, size: int, columns: list[int] | None, message: Any) -> list[float]:
    if len(message.data) != size:
        raise WorkloadError(f"{path}: {topic} has messages of {size} and of {len(message.data)} values")
    data = np.asarray(message.data, float)
    values: list[float] = (data if columns is None else data[columns]).tolist()
    return values


def _from_joints(path: str, topic: str, fields: list[tuple[str, str]], message: Any) -> list[float]:
    values = []
    names = list(message.name)
    for joint, field in fields:
        data = getattr(message, field)
        if names.count(joint) != 1 or len(data) != len(names):
            raise WorkloadError(
                f"{path}: a message on {topic} has {len(data)} values of {field} for the joints "
                f"{', '.join(names) or 'none'}; {joint}.{field} is needed"
            )
        values.append(float(data[names.index(joint)]))
    return values


def _from_fields(paths: list[list[str]], message: Any) -> list[float]:
    found = (_number(message, p) for p in paths)
    return [math.nan if value is None else value for value in found]


def _path(topic: str, name: str) -> list[str]:
    """The fields after a topic's name in a channel's name, none if the name begins otherwise."""
    for stem in (topic.strip("/").replace("/", "."), topic.rpartition("/")[2]):
        if name.startswith(f"{stem}."):
            return name[len(stem) + 1 :].split(".")
    return []


def _number(message: Any, fields: list[str]) -> float | None:
    """The number at a path of field names and indices in a message."""
    if not fields:
        return None
    for field in fields:
        if field.isdigit() and isinstance(message, (list, tuple, np.ndarray)) and int(field) < len(message):
            message = message[int(field)]
        else:
            message = getattr(message, field, None)
    return float(message) if isinstance(message, (int, float, np.number)) else None


def _labels(message: Any) -> list[str]:
    """A labelled array's columns; "observation:" before a name, as on ~/decision, is left out."""
    dims = message.layout.dim
    return [label.removeprefix("observation:") for label in dims[0].label.split(",")] if len(dims) == 1 else []


def _stamp_ns(message: Any) -> int:
    stamp = getattr(getattr(message, "header", None), "stamp", None)
    return 0 if stamp is None else int(stamp.sec * 10**9 + stamp.nanosec)


def _seconds(stamps: list[tuple[int, int]]) -> NDArray[np.float64]:
    """[N] s: of the messages' headers, where they have stamps, else of their recording."""
    ns = np.array(stamps, float).reshape(-1, 2)
    return 1e-9 * ns[:, 0 if ns[:, 0].any() else 1]


def _contents(firsts: dict[str, Any], types: dict[str, str]) -> str:
    """A bag's topics in one line, with the names in them."""

    def inside(topic: str) -> str:
        names = list(firsts[topic].name) if types[topic] == _JOINTS else []
        if types[topic] in _ARRAYS:
            names = [label for label in _labels(firsts[topic]) if label] or [f"{len(firsts[topic].data)} values"]
        return f": {', '.join(names)}" if names else ""

    return "; ".join(f"{t} ({types[t]}{inside(t)})" for t in firsts) or "no messages"


def record(found: Rollouts, spec: WorkloadSpec, out: Path, sqlite: bool = False) -> int:
    """Write rollouts as a rosbag2 bag, in simulated time, episode after episode.

    Args:
        out: ends in .mcap: that one file, complete in itself; else a new folder with the data and metadata.yaml.
        sqlite: store as sqlite3 (.db3) instead of MCAP.

    Returns:
        How many messages were written.

    Raises:
        WorkloadError: the folder exists already.
    """
    single = out.suffix in (".mcap", ".db3")
    if out.exists() and not (single and out.is_file()):
        raise WorkloadError(f"{out}: exists already; name a new folder or a file that ends in .mcap")
    plugin = StoragePlugin.SQLITE3 if sqlite or out.suffix == ".db3" else StoragePlugin.MCAP
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".laws_record_") as folder:
        bag = Path(folder) / out.stem
        with Writer(bag, version=9, storage_plugin=plugin) as writer:
            count = _write(writer, found, spec)
        if single:
            (data,) = bag.glob(f"*{out.suffix}")
            data.replace(out)
        else:
            shutil.move(bag, out)
    return count


def _write(writer: Writer, found: Rollouts, spec: WorkloadSpec) -> int:
    store = get_typestore(Stores.ROS2_KILTED)
    types = store.types
    count = 0
    connections = {
        topic: writer.add_connection(topic, msgtype, typestore=store)
        for topic, msgtype in (("/observation", _ARRAYS[0]), ("/command", _ARRAYS[0]), ("/episode", _ARRAYS[0]))
    }
    joints = [(c.name.rpartition(".")[0], c.name.rpartition(".")[2]) for c in spec.observations]
    order = list(dict.fromkeys(joint for joint, field in joints if joint and field in JOINT_FIELDS))
    if order:
        connections["/joint_states"] = writer.add_connection("/joint_states", _JOINTS, typestore=store)

    def put(topic: str, now_ns: int, message: Any) -> None:
        nonlocal count
        connection = connections[topic]
        writer.write(connection, now_ns, store.serialize_cdr(message, connection.msgtype))
        count += 1

    def labelled(names: Sequence[str]) -> Callable[[NDArray[Any]], Any]:
        dim = types["std_msgs/msg/MultiArrayDimension"](label=",".join(names), size=len(names), stride=len(names))
        layout = types["std_msgs/msg/MultiArrayLayout"](dim=[dim], data_offset=0)
        return lambda values: types[_ARRAYS[0]](layout=layout, data=np.asarray(values, np.float64))

    def joint_state(now_ns: int, observation: NDArray[np.float32]) -> Any:
        sec, nanosec = divmod(now_ns, 10**9)
        stamp = types["builtin_interfaces/msg/Time"](sec=sec, nanosec=nanosec)
        header = types["std_msgs/msg/Header"](stamp=stamp, frame_id="")
        values = {field: np.full(len(order), math.nan) for field in {f for _, f in joints if f in JOINT_FIELDS}}
        for (joint, field), value in zip(joints, observation, strict=True):
            if field in values and joint:
                values[field][order.index(joint)] = value
        empty = np.zeros(0)
        return types[_JOINTS](header=header, name=order, **{f: values.get(f, empty) for f in JOINT_FIELDS})

    observation_of = labelled([c.name for c in spec.observations])
    command_of = labelled(["action"] if spec.discrete else [c.name for c in spec.actions])
    episode_of = labelled(["episode", "step", "reward"])
    period_ns, now_ns = round(spec.period_s * 1e9), 0
    for episode, (seen, done, earned) in enumerate(zip(*found, strict=True)):
        for step in range(len(earned)):
            if order:
                put("/joint_states", now_ns, joint_state(now_ns, seen[step]))
            put("/observation", now_ns, observation_of(seen[step]))
            put("/command", now_ns, command_of(done[step]))
            put("/episode", now_ns, episode_of(np.array([episode, step, earned[step]])))
            now_ns += period_ns
        now_ns += round(max(EPISODE_GAP_S, 2 * GAP * spec.period_s) * 1e9)
    return count
