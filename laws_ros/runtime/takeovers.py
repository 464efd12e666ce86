"""Takeovers as files: what an operator corrected, until it has been reviewed, and for later training.

A folder of state belongs to one robot; its controller, its learner and `laws library` share it:

    library.laws         the newest snapshot, written by the learner, taken over by the controller
    history.db           the learner's (runtime.history)
    takeovers/ID.jsonl   one file per takeover, written by the controller while it lasts

A takeover's file is a log that is only appended to: lines of JSON, each after its own CRC-32, and synchronised as
they are written. What a killed process leaves unfinished is its last line, which is dropped; anything else that does
not fit its sum is refused, because what it said must not be served is not known any more. The lines:

    {"takeover": ID, "robot": .., "began": s since the epoch, "policy_sha256": .., "observations": [names], ..}
    {"t": s since it began, "x": [n] observation, "operator": [m] action, "command": [m] as published,
     "regions": {id: center, transform and round, base64 of float64} of those that contain x, where they are new}
    {"ended": s since it began, "policy": [[m], ..] what the policy would have done at every x}
    {"released": s since the epoch, "reason": ..}
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Card
from laws_ros.core.durable import synchronise
from laws_ros.core.errors import ConfigError, LibraryError
from laws_ros.core.library import Library
from laws_ros.core.region import Regions

from .quarantine import Quarantine

SNAPSHOT, HISTORY, TAKEOVERS = "library.laws", "history.db", "takeovers"


@dataclass(frozen=True)
class Takeover:
    """One intervention of an operator.

    Attributes:
        robot: full name of the controller's node. began: seconds since the epoch.
        duration_s: until the last observation or the end. actions: names [m].
        times_s [N], observations [N, n], operator [N, m]: when, where, and the operator's actions, in action units.
        commands [N, m]: as published, message units.
        policy [N, m]: the policy's own actions at the same observations; NaN where the process was killed before.
        regions: ids of the regions in which it happened; volumes: where they lie, in their order.
        released: why it is no longer in force, "" while it is.
    """

    id: str
    robot: str
    began: float
    duration_s: float
    actions: list[str]
    times_s: NDArray[np.float64]
    observations: NDArray[np.float32]
    operator: NDArray[np.float64]
    commands: NDArray[np.float64]
    policy: NDArray[np.float64]
    regions: list[str]
    volumes: Regions
    released: str


class Correction(NamedTuple):
    """One step of a takeover.

    Attributes:
        time_ns: steady clock. regions: of the library in use, those that contain the observation.
        operator: [m] action units. command: [m] as published.
    """

    time_ns: int
    observation: NDArray[np.float32]
    operator: list[float]
    command: list[float]
    regions: list[int]


class Log:
    """Writes one takeover.

    Args:
        folder: of the robot's state. robot: full name of the controller's node.

    Raises:
        LibraryError: it cannot be written; so do all calls.
    """

    def __init__(self, folder: Path, robot: str, card: Card, policy_sha256: str) -> None:
        began, self._began_s, self._regions = time.time(), time.monotonic(), set[str]()
        name = time.strftime("%Y%m%dT%H%M%S", time.gmtime(began)) + f".{int(began % 1 * 1e6):06d}"
        self.id, self.path = name, folder / TAKEOVERS / f"{name}.jsonl"
        head = {"takeover": name, "robot": robot, "began": began, "policy_sha256": policy_sha256}
        actions = [c.name for c in card.actions] if card.decision == "none" else [card.decision]
        head |= {"card": card.digest, "observations": [c.name for c in card.observations], "actions": actions}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LibraryError(f"{self.path.parent}: cannot be made: {error.strerror}") from None
        append(self.path, [head], os.O_CREAT | os.O_EXCL)
        synchronise(self.path.parent)

    def add(self, corrections: list[Correction], library: Library) -> None:
        """Append what was corrected of a library's answers; on the disk when this returns."""
        rows, c = [], library.certificates
        for found in corrections:
            boxes = {}
            for k in found.regions:
                if library.ids[k] not in self._regions:
                    self._regions.add(library.ids[k])
                    box = np.concatenate([c.center[k], c.transform[k].reshape(-1), c.round[k : k + 1]]).astype("<f8")
                    boxes[library.ids[k]] = base64.b64encode(box.tobytes()).decode()
            told = {"x": found.observation.astype(float).tolist(), "operator": found.operator, "command": found.command}
            rows.append({"t": found.time_ns / 1e9 - self._began_s, **told, "regions": boxes})
        append(self.path, rows)

    def end(self, policy: NDArray[np.float32]) -> None:
        """The operator has let go; `policy` [N, m]: its own actions at the observations."""
        after_s = time.monotonic() - self._began_s
        append(self.path, [{"ended": after_s, "policy": np.asarray(policy, float).tolist()}])


def release(folder: Path, name: str, reason: str) -> None:
    """What was corrected in a takeover may be served again, after a review.

    Raises:
        ConfigError: no such takeover, or it is released already. LibraryError: its file is damaged.
    """
    path = folder / TAKEOVERS / f"{name}.jsonl"
    if not path.is_file():
        raise ConfigError(f"{folder}: has no takeover {name!r}; `laws library review {folder}` lists them")
    found = _read(path)
    if found is not None and found.released:
        raise ConfigError(f"{path}: was released already ({found.released})")
    append(path, [{"released": time.time(), "reason": reason}])


def read(folder: Path, card: Card | None = None) -> list[Takeover]:
    """All takeovers of a robot, oldest first.

    Raises:
        LibraryError: a file is damaged, or of another card than the one given and not released.
    """
    found = []
    for path in sorted((folder / TAKEOVERS).glob("*.jsonl")):
        takeover = _read(path, card)
        if takeover is not None:
            found.append(takeover)
    return found


def quarantine_of(takeovers: list[Takeover], inputs: int, library: Library | None = None) -> Quarantine:
    """What those takeovers that are not released keep from being served by a library."""
    found = [t for t in takeovers if not t.released]
    points = np.concatenate([np.zeros((0, inputs), np.float32), *(t.observations for t in found)])
    none = Regions(np.zeros((0, inputs)), np.zeros((0, inputs, inputs)))
    volumes = [none, *(t.volumes for t in found)]
    parts = (np.concatenate([getattr(v, name) for v in volumes]) for name in ("center", "transform", "round"))
    return Quarantine(inputs, points, Regions(*parts), library)


def signature(folder: Path) -> tuple[Any, ...]:
    """Changes whenever the snapshot (its first entry) or a takeover does."""

    def of(path: Path) -> tuple[Any, ...]:
        try:
            about = path.stat()
        except OSError:
            return (path.name,)
        return path.name, about.st_ino, about.st_mtime_ns, about.st_size

    return tuple(of(path) for path in (folder / SNAPSHOT, *sorted((folder / TAKEOVERS).glob("*.jsonl"))))


def append(path: Path, rows: list[dict[str, Any]], flags: int = 0) -> None:
    """Append lines to a takeover's file; they are on the disk when this returns.

    Args:
        flags: of os.open, for a file that is to be made.

    Raises:
        LibraryError: it cannot be written.
    """
    lines = [json.dumps(row, separators=(",", ":")).encode() for row in rows]
    data = b"".join(b"%08x %s\n" % (zlib.crc32(line), line) for line in lines)
    try:
        handle = os.open(path, os.O_RDWR | flags, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            whole = _whole(os.pread(handle, os.fstat(handle).st_size, 0)) if not flags else 0
            os.ftruncate(handle, whole)
            os.pwrite(handle, data, whole)
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise LibraryError(f"{path}: cannot be written: {error.strerror}") from None


def _whole(data: bytes) -> int:
    """How many bytes are whole lines; the rest is what a killed process left."""
    return data.rfind(b"\n") + 1


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a takeover's file, without one that was being written when a process was killed.

    Raises:
        LibraryError: it cannot be read or is damaged.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise LibraryError(f"{path}: cannot be read: {error.strerror}") from None
    found = []
    for k, line in enumerate(data[: _whole(data)].splitlines()):
        if len(line) < 9 or b"%08x" % zlib.crc32(line[9:]) != line[:8]:
            raise LibraryError(
                f"{path}: line {k + 1} is damaged; what was corrected there is not known: restore the file"
            )
        found.append(json.loads(line[9:]))
    return found


def _read(path: Path, card: Card | None = None) -> Takeover | None:
    told = lines(path)
    if not told:
        return None  # nothing was commanded yet
    head, rows = told[0], [line for line in told if "x" in line]
    last = {key: line for line in told for key in ("ended", "released") if key in line}
    released = str(last["released"]["reason"]) if "released" in last else ""
    if card is not None and not released and head["card"] != card.digest:
        raise LibraryError(
            f"{path}: an operator corrected a policy of another card ({', '.join(head['observations'])}) than "
            f"{card.name}'s; release it (`laws library release`) or use another folder of state"
        )
    n, m = len(head["observations"]), len(head["actions"])

    def column(key: str, width: int, dtype: Any = float) -> NDArray[Any]:
        return np.array([line[key] for line in rows], dtype).reshape(len(rows), width)

    volumes = {name: base64.b64decode(text) for line in rows for name, text in line["regions"].items()}
    boxes = np.frombuffer(b"".join(volumes.values()), "<f8").reshape(-1, n + n * n + 1)
    policy = np.full((len(rows), m), np.nan)
    if "ended" in last and len(last["ended"]["policy"]) == len(rows):
        policy = np.array(last["ended"]["policy"], float).reshape(len(rows), m)
    return Takeover(
        head["takeover"],
        head["robot"],
        head["began"],
        last["ended"]["ended"] if "ended" in last else rows[-1]["t"] if rows else 0.0,
        head["actions"],
        column("t", 1)[:, 0],
        column("x", n, np.float32),
        column("operator", m),
        column("command", len(rows[0]["command"]) if rows else m),
        policy,
        list(volumes),
        Regions(boxes[:, :n], boxes[:, n:-1].reshape(-1, n, n), boxes[:, -1].astype(np.int32)),
        released,
    )
