"""The robots of one cell among themselves: what one has certified the others have, though no store can be reached.

Everybody says what it *has* (eight bytes of the name of each item), and again whenever that changes. Where somebody
lacks an expert, the robot with the smallest name of those that have it says it; where somebody lacks a correction, the
robot that was corrected. So nothing is asked for, everything is said once however many listen, and what is lost, late
or said by a robot that leaves is said again by the next one. It is the merging of fleet.items: in any order and with
any repetition all end with the same set.

Messages are signed by the robots' keys, which the desk has signed (role `robots` of fleet.trust), as far as the store
was reached last; what a robot the desk does not know says is not looked at. As everywhere, a signature says who it is,
and the proof on arrival whether it is true: experts of others are taken in when they are proved, and corrections only
of the robot that says them. An old message that is played again changes nothing: sets only grow.
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, Signature

from laws_ros.core.certificate import FORMAL, KINDS
from laws_ros.core.errors import RefusedError
from laws_ros.runtime.takeovers import HISTORY

from . import corrections
from .items import MOST_CHUNK, Items, chunks, content_name, decode
from .place import Merged, Progress
from .robot import Robot
from .trust import read_keys

HAVE, CHUNK = 0, 1
GONE_S = 60.0  # who has not said anything for so long is not waited for, nor counted on
REPEAT_S = 10.0  # everybody says what it has so often, changed or not
AGAIN_S = 60.0  # something that is still lacking is said again
TOGETHER = 16  # experts in a chunk: 30 KB, so that the network is not held up
AT_ONCE = 8  # chunks that are said in a round
MOST_WAITING = 64  # messages; what is dropped is lacking still, and said again
_MAGIC = b"LAWSCELL1"
_HEAD = struct.Struct("<9sBBH")  # magic, kind, bytes of the robot's name, bytes of the signature


def _short(name: str) -> bytes:
    return bytes.fromhex(name)[:8]


@dataclass(frozen=True)
class Said:
    """What came of a round: messages to send (what this robot has, if it is time to say so; chunks), and what was
    taken in."""

    have: bytes | None
    chunks: list[bytes]
    merged: Merged


class Cell:
    """One robot's part in its cell.

    Args:
        robot: whose state this is; its learner and controller may be at work.
        clock: seconds that only grow.

    Raises:
        FleetError: the robot never saw the desk's list of robots, and cannot reach it, or that has expired.
    """

    def __init__(self, robot: Robot, clock: Callable[[], float] = time.monotonic) -> None:
        self.robot, self._place, self._clock = robot, robot.place, clock
        self._signer = next(iter(read_keys([robot.fleet / "key"]).values()))
        self.keys: Mapping[str, Key] = robot.peers(reach=False)
        self._inbox: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._others: dict[str, tuple[float, frozenset[bytes]]] = {}  # when heard, what they have
        self._experts: set[str] = set()  # formal ones, so far
        self._row = 0
        self._said: dict[bytes, float] = {}
        self._had: tuple[float, bytes] = -REPEAT_S, b""
        self.accepted = 0

    @property
    def topic(self) -> str:
        """A name that only robots with the same policy, card and precision have."""
        return f"/laws/cell/p{self._place.identity.digest.hex()[:12]}"

    @property
    def present(self) -> list[str]:
        """Names of the other robots that were heard lately."""
        return sorted(name for name, (at, _) in self._others.items() if self._clock() - at < GONE_S)

    def hear(self, message: bytes) -> None:
        """Take a message for the next round; may be called from another thread."""
        self._inbox.append(message)

    def round(self, progress: Progress = lambda text: None) -> Said:
        """Take in what was heard, serve it, and see what is to be said now.

        Raises:
            FleetError: another `laws fleet` command is at work here, or the disk is full; what was heard is said again
                by the others, as it is still lacking.
        """
        merged = Merged()
        with self._place.alone(patience_s=0.0):
            while self._inbox and merged.accepted < 2 * TOGETHER:  # then it is another command's turn
                merged += self._take(self._inbox.popleft(), progress)
            if merged.accepted or merged.takeovers or merged.tombstones:
                self._place.switch()
            self.accepted += merged.accepted
            have, now = b"".join(sorted(self._has())), self._clock()
            told = self._chunks() if self.present else []
        if have == self._had[1] and now - self._had[0] < REPEAT_S:
            return Said(None, told, merged)
        self._had = now, have
        return Said(self._signed(HAVE, have), told, merged)

    # -- what it hears -----------------------------------------------------------------------------------------------

    def _take(self, message: bytes, progress: Progress) -> Merged:
        merged, name = Merged(), "?"
        try:
            kind, name, payload = self._opened(message)
            if name == self.robot.name:
                return merged
            if kind == HAVE:
                have = frozenset(payload[k : k + 8] for k in range(0, len(payload), 8))
                self._others = {**self._others, name: (self._clock(), have)}  # `present` may be read meanwhile
                return merged
            chunk = decode(payload, self._place.identity, f"chunk {content_name(payload)[:12]} of {name}")
            items, strange = corrections.may_tell(name, chunk.items)
            for key in strange:
                self._place.refuse(merged, key, name, "it speaks for another robot")
            merged += self._place.merge(items, name, progress)
        except RefusedError as error:
            self._place.refuse(merged, "cell", name, str(error))
        return merged

    def _opened(self, message: bytes) -> tuple[int, str, bytes]:
        """What kind of message it is, who signed it, and what it says.

        Raises:
            RefusedError: nobody whom the desk knows, or no message of a cell.
        """
        try:
            magic, kind, size, signed = _HEAD.unpack_from(message)
            name = message[_HEAD.size : _HEAD.size + size].decode()
            rest = message[_HEAD.size + size :]
            signature, payload = rest[:signed], rest[signed:]
        except (struct.error, UnicodeDecodeError):
            raise RefusedError("a message that is not of a cell") from None
        if magic != _MAGIC or kind not in (HAVE, CHUNK) or len(payload) > MOST_CHUNK:
            raise RefusedError(f"a message that is not of a cell, or of a newer one, or over {MOST_CHUNK} bytes")
        key = self.keys.get(name)
        if key is None:
            raise RefusedError("somebody who is no robot that the desk knows")  # no name: the log stays short
        try:
            key.verify_signature(Signature(key.keyid, signature.hex()), _to_sign(kind, name, payload))
        except UnverifiedSignatureError:
            raise RefusedError(f"{name}: not signed by its key") from None
        return kind, name, payload

    # -- what it says ------------------------------------------------------------------------------------------------

    def _signed(self, kind: int, payload: bytes) -> bytes:
        name = self.robot.name
        signature = bytes.fromhex(self._signer.sign(_to_sign(kind, name, payload)).signature)
        return _HEAD.pack(_MAGIC, kind, len(name), len(signature)) + name.encode() + signature + payload

    def _has(self) -> set[bytes]:
        """Short names of all that is here or was refused."""
        if (self.robot.folder / HISTORY).is_file():
            with self._place.history() as history:
                news = history.news(self._row)
            self._row = news.last
            self._experts |= {name for name, _, record in news.experts if KINDS[record[0]] in FORMAL}
        events = self._place.events()
        names = [*self._experts, *events.tombstones, *map(content_name, events.takeovers.values())]
        return {_short(name) for name in names} | {
            _short(row["what"]) for row in self._place.refused() if _is_expert(row["what"])
        }

    def _chunks(self) -> list[bytes]:
        """What it is this robot's turn to say."""
        now, name = self._clock(), self.robot.name
        others = {other: self._others[other][1] for other in self.present}
        events, out = self._place.events(), self._place.tombstones().out()

        def due(short: bytes, everybody: bool) -> bool:
            lacking = any(short not in have for have in others.values())
            first = everybody or name < min((other for other, have in others.items() if short in have), default="~")
            return lacking and first and now - self._said.get(short, -AGAIN_S) >= AGAIN_S

        experts = sorted(e for e in self._experts - out.keys() if due(_short(e), False))[: TOGETHER * AT_ONCE]
        own = Items(
            takeovers={
                k: log for k, log in events.takeovers.items()
                if corrections.author(k) == name and due(_short(content_name(log)), True)
            },
            tombstones={
                k: stone for k, stone in events.tombstones.items()
                if json.loads(stone)["by"] == name and due(_short(k), True)
            },
        )  # fmt: skip
        records: dict[str, bytes] = {}
        if experts:
            with self._place.history() as history:
                records = {k: record for k, _, record in history.news().experts if k in set(experts)}
        found = []
        for start in range(0, len(experts), TOGETHER):
            some = Items({k: records[k] for k in experts[start : start + TOGETHER]})
            found += list(chunks(self._place.identity, some))
        found += list(chunks(self._place.identity, own))
        told = [*experts, *own.tombstones, *map(content_name, own.takeovers.values())]
        self._said |= {_short(k): now for k in told}
        return [self._signed(CHUNK, data) for data in found]


def _to_sign(kind: int, name: str, payload: bytes) -> bytes:
    return _MAGIC + bytes([kind]) + name.encode() + b"\0" + hashlib.sha256(payload).digest()


def _is_expert(name: Any) -> bool:
    return isinstance(name, str) and len(name) == 16 and all(c in "0123456789abcdef" for c in name)
