"""The history of a library: every expert ever certified, what became of it, how it was used, and what missed.

One SQLite file in write-ahead mode with full synchronisation. SQLite, because its recovery from a crash at any
instant is tested far beyond what a project like this could do, it is in Python's standard library, it lets any number
of processes read while one writes, and people can look into it. What is acknowledged (a call that returned) is on the
disk; a process killed at any other instant leaves all of a batch or nothing.

Everything but the counters of use is an append-only log of frames, each with its own sha256. So a row that was changed
is noticed when it is read, and from a file that SQLite itself can no longer read, `recover` carves every intact frame.
The hot path never sees this file: it maps snapshots (`History.library`).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Card
from laws_ros.core.certificate import Certificates, decision_rows
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import Library
from laws_ros.core.record import pack, unpack
from laws_ros.core.trie import Trie

FORMAT = 1
PAGE = 65536  # bytes; the largest there is, so that an expert's frame lies within one page and can be carved
_MAGIC = b"LAWSREC1"
_HEAD = struct.Struct("<8ssI32s")  # magic, kind, length, sha256 of kind and payload
_META, _EXPERT, _EVENT, _MISS = b"M", b"X", b"E", b"O"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT, key TEXT, frame BLOB);
CREATE UNIQUE INDEX IF NOT EXISTS experts ON log (key) WHERE kind = 'X';
CREATE INDEX IF NOT EXISTS kinds ON log (kind, seq);
CREATE TABLE IF NOT EXISTS uses (id TEXT PRIMARY KEY, hits INTEGER NOT NULL, recent REAL NOT NULL, last REAL NOT NULL);
"""


class Use(NamedTuple):
    """How often an expert answered, the same with old answers counting less, and when it last did.

    Attributes:
        recent: sum over its answers of 2^(-age / half-life), as of `last`.
        last: seconds since the epoch.
    """

    hits: int
    recent: float
    last: float


class News(NamedTuple):
    """What came to a history since some row of its log.

    Attributes:
        experts: id, source and record of each, in the order of arrival.
        misses: observations [N, n] that still wait to be learnt from.
        last: number of the last row of the log.
    """

    experts: list[tuple[str, str, bytes]]
    misses: NDArray[np.float32]
    last: int


class Moment(NamedTuple):
    """Something that happened to an expert: when, in seconds since the epoch; "added", "retired" or "restored"."""

    at: float
    event: str
    id: str


class Recovered(NamedTuple):
    """What `recover` found intact."""

    experts: int
    events: int
    misses: int


class History:
    """The history of the library of one policy file, card and precision.

    One process writes, any number read. Not for several threads at once.
    """

    def __init__(
        self,
        path: str | Path,
        policy_sha256: str,
        card: Card,
        tolerance: Iterable[float] = (),
        precision: str = "float32",
        most_misses: int = 100_000,
        half_life_s: float = 7 * 86400.0,
        alone: bool = True,
    ) -> None:
        """Open for writing; a new file if there is none.

        Args:
            tolerance: [m] action units, for a new file; an old one keeps its own.
            half_life_s: an answer so old counts half in `Use.recent`.
            alone: False for a process beside the learner that only adds, retires and restores experts.
            most_misses: more that wait than this are dropped, oldest first, and counted in `dropped_misses`.

        Raises:
            LibraryError: another process writes, the file is damaged, or it is of another policy, card or precision.
        """
        self.path, self.most_misses, self.dropped_misses = Path(path), most_misses, 0
        self.half_life_s = half_life_s
        self._lock = self._locked() if alone else None
        try:
            self._open(policy_sha256, card, list(tolerance), precision)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if hasattr(self, "_database"):
            self._database.close()
        if self._lock is not None:
            os.close(self._lock)

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- writing ---------------------------------------------------------------------------------------------------

    def add(self, certificates: Certificates, source: str = "") -> list[str]:
        """Store experts; those that are there already are left alone.

        Args:
            source: who made them (a learner, a robot's name), for people.

        Returns:
            The ids of all of them, in their order.
        """
        ids = self._named(certificates)
        head = json.dumps({"source": source, "added": time.time()}).encode()
        rows = [(ids[k], struct.pack("<I", len(head)) + head + pack(certificates, k)) for k in range(len(ids))]
        with self._transaction() as database:
            database.executemany(
                "INSERT OR IGNORE INTO log (kind, key, frame) VALUES ('X', ?, ?)",
                ((key, _frame(_EXPERT, key.encode() + payload)) for key, payload in rows),
            )
        return ids

    def retire(self, ids: Iterable[str], reason: str) -> None:
        """Take experts out of the library (tombstones: they stay in the history and never come back by themselves)."""
        self._event(ids, "retired", reason)

    def restore(self, ids: Iterable[str], reason: str) -> None:
        """Undo `retire`, after a review."""
        self._event(ids, "restored", reason)

    def used(self, hits: dict[str, int], now: float | None = None) -> None:
        """Add to the experts' counts of answers."""
        at = time.time() if now is None else now
        old = self.uses()
        rows = []
        for name, count in hits.items():
            use = old.get(name, Use(0, 0.0, at))
            last = max(use.last, at)
            recent = self.faded(use, last) + count * 0.5 ** ((last - at) / self.half_life_s)
            rows.append((name, use.hits + count, recent, last))
        with self._transaction() as database:
            database.executemany("INSERT OR REPLACE INTO uses VALUES (?, ?, ?, ?)", rows)

    def faded(self, use: Use, now: float) -> float:
        """`use.recent` as of a later time."""
        return use.recent * float(0.5 ** ((now - use.last) / self.half_life_s))

    def add_misses(self, observations: NDArray[np.float32], actions: NDArray[np.float32]) -> None:
        """Store what the policy had to answer: observations [N, n] and its answers [N, m]."""
        frames = [
            _frame(_MISS, struct.pack("<HH", len(x), len(y)) + x.tobytes() + y.tobytes())
            for x, y in zip(np.asarray(observations, "<f4"), np.asarray(actions, "<f4"), strict=True)
        ]
        with self._transaction() as database:
            database.executemany("INSERT INTO log (kind, frame) VALUES ('O', ?)", [(f,) for f in frames])
            (waiting,) = database.execute("SELECT count(*) FROM log WHERE kind = 'O'").fetchone()
            if waiting > self.most_misses:
                over = waiting - self.most_misses
                database.execute(
                    "DELETE FROM log WHERE seq IN (SELECT seq FROM log WHERE kind = 'O' ORDER BY seq LIMIT ?)", (over,)
                )
                self.dropped_misses += over

    def forget_misses(self, last: int) -> None:
        """Delete misses up to and with that number: they were learnt from."""
        with self._transaction() as database:
            database.execute("DELETE FROM log WHERE kind = 'O' AND seq <= ?", (last,))

    # -- reading ---------------------------------------------------------------------------------------------------

    def misses(self, most: int = 100_000) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
        """The misses that wait, oldest first: observations [N, n], answers [N, m], and the last one's number."""
        rows = self._rows("SELECT seq, frame FROM log WHERE kind = 'O' ORDER BY seq LIMIT ?", (most,))
        n, m = len(self.card.observations), len(self.card.actions)
        found = [_miss(payload, n, m) for _, payload in rows]
        x = np.array([pair[0] for pair in found], np.float32).reshape(-1, n)
        y = np.array([pair[1] for pair in found], np.float32).reshape(-1, m)
        return x, y, rows[-1][0] if rows else 0

    def known(self) -> set[str]:
        """Ids of all experts that were ever added, retired ones too."""
        with self._guarded():
            return {key for (key,) in self._database.execute("SELECT key FROM log WHERE kind = 'X'")}

    def news(self, after: int = 0) -> News:
        """What was added behind row `after` of the log; misses that were learnt from meanwhile are not in it."""
        experts, misses, last = [], [], after
        n, m = len(self.card.observations), len(self.card.actions)
        for kind in "XO":
            for seq, payload in self._rows(
                "SELECT seq, frame FROM log WHERE kind = ? AND seq > ? ORDER BY seq", (kind, after)
            ):
                last = max(last, seq)
                if kind == "X":
                    name, record = _expert(payload)
                    experts.append((name, _headed(payload)[1]["source"], record))
                else:
                    misses.append(_miss(payload, n, m)[0])
        return News(experts, np.array(misses, np.float32).reshape(-1, n), last)

    def retired(self) -> dict[str, str]:
        """Ids of the experts that are out of the library, and why."""
        state: dict[str, str] = {}
        for _, payload in self._rows("SELECT seq, frame FROM log WHERE kind = 'E' ORDER BY seq"):
            event = json.loads(payload)
            if event["event"] == "retired":
                state[event["id"]] = event["reason"]
            else:
                state.pop(event["id"], None)
        return state

    def uses(self) -> dict[str, Use]:
        """How the experts were used."""
        with self._guarded():
            return {name: Use(*rest) for name, *rest in self._database.execute("SELECT * FROM uses")}

    def experts(self, retired: str | None = None) -> tuple[list[str], Certificates]:
        """All experts that are not retired, by the order of their ids (not of their arrival).

        Args:
            retired: instead, those that were retired for this reason.
        """
        out = self.retired()
        found = {}
        for _, payload in self._rows("SELECT seq, frame FROM log WHERE kind = 'X'"):
            name, record = _expert(payload)
            if out.get(name) == retired:
                found[name] = record
        ids = sorted(found)
        certificates = unpack([found[name] for name in ids], len(self.card.observations), self._answers)
        if self._named(certificates) != ids:
            raise LibraryError(f"{self.path}: an expert is not what its id says; {self._cure}")
        return ids, certificates

    def library(self, notes: dict[str, Any] | None = None, retired: str | None = None) -> Library:
        """A snapshot of all that is not retired: a function of the set of experts, whatever order they came in.

        Args:
            retired: instead, of those that were retired for this reason.
        """
        ids, certificates = self.experts(retired)
        uses = self.uses()
        visits = np.array([uses[name].hits if name in uses else 0 for name in ids], np.int64)
        library = self._library(certificates, visits, notes or {})
        return library.indexed(Trie.over(certificates.regions, self.card.context_indices))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _open(self, policy_sha256: str, card: Card, tolerance: list[float], precision: str) -> None:
        with self._guarded():
            self._database = sqlite3.connect(self.path, timeout=10.0, isolation_level=None)
            self._database.execute(f"PRAGMA page_size = {PAGE}")
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 32"):
                self._database.execute(f"PRAGMA {pragma}")
            (verdict,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(str(verdict))
            self._database.executescript(_SCHEMA)
        rows = self._rows("SELECT seq, frame FROM log WHERE kind = 'M' ORDER BY seq LIMIT 1")
        if not rows:
            if not tolerance and card.decision == "none":  # whoever began it was stopped before this was written
                raise LibraryError(f"{self.path}: was never finished; pull, or let the robot learn, first")
            meta = {"format": FORMAT, "policy_sha256": policy_sha256, "card": card.to_dict(), "tolerance": tolerance}
            with self._transaction() as database:
                frame = _frame(_META, json.dumps({**meta, "precision": precision}).encode())
                database.execute("INSERT INTO log (kind, frame) VALUES ('M', ?)", (frame,))
            rows = self._rows("SELECT seq, frame FROM log WHERE kind = 'M' LIMIT 1")
        meta = json.loads(rows[0][1])
        if meta["format"] != FORMAT:
            raise LibraryError(f"{self.path}: history format {meta['format']}, this program reads {FORMAT}")
        self.card = Card.from_dict(meta["card"], f"{self.path}: card")
        self.policy_sha256, self.precision = meta["policy_sha256"], meta["precision"]
        self.tolerance = np.array(meta["tolerance"], dtype=float)
        self._answers = len(decision_rows(len(self.card.actions), self.card.decision))
        empty = self._library(Certificates.none(len(self.card.observations), self._answers), np.zeros(0, np.int64), {})
        empty.check_policy(policy_sha256, card, str(self.path), "the policy given")
        if precision != self.precision:
            raise LibraryError(f"{self.path}: of precision {self.precision!r}, not {precision!r}")

    @property
    def _cure(self) -> str:
        return f"save what is intact with `laws library recover {self.path} --out NEW`"

    def _library(self, certificates: Certificates, visits: NDArray[np.int64], notes: dict[str, Any]) -> Library:
        return Library(
            self.policy_sha256, self.card, self.tolerance, certificates, Trie.root(), visits, notes, self.precision
        )

    def _named(self, certificates: Certificates) -> list[str]:
        return self._library(certificates, np.zeros(len(certificates), np.int64), {}).ids

    def _event(self, ids: Iterable[str], event: str, reason: str) -> None:
        frames = [
            (_frame(_EVENT, json.dumps({"id": name, "event": event, "reason": reason, "at": time.time_ns()}).encode()),)
            for name in ids
        ]
        with self._transaction() as database:
            database.executemany("INSERT INTO log (kind, frame) VALUES ('E', ?)", frames)

    def _rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[int, bytes]]:
        with self._guarded():
            rows = self._database.execute(query, values).fetchall()
        found = []
        for seq, frame in rows:
            payload = _payload(frame)
            if payload is None:
                raise LibraryError(f"{self.path}: row {seq} is damaged; {self._cure}")
            found.append((seq, payload))
        return found

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # a full disk, no permission, a lock
            raise LibraryError(f"{self.path}: {error}; nothing of this step was stored, all earlier are") from None
        except sqlite3.DatabaseError as error:
            raise LibraryError(f"{self.path}: damaged ({error}); {self._cure}") from None

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._guarded():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise

    def _locked(self) -> int:
        """An advisory lock beside the file: two learners would answer for each other's misses."""
        path = self.path.with_name(f"{self.path.name}.lock")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LibraryError(f"{path}: cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.read(handle, 20).decode(errors="replace").strip() or "?"
            os.close(handle)
            raise LibraryError(f"{self.path}: process {owner} writes to it; one learner at a time") from None
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        return handle


def snapshot(path: str | Path) -> Library:
    """The library of a history as it stands, for its own policy and card.

    Raises:
        LibraryError: no such file, another process writes to it, or it is damaged.
    """
    with _existing(Path(path)) as history:
        return history.library({"history": Path(path).name})


def timeline(path: str | Path) -> list[Moment]:
    """What happened to the experts of a history, in the log's order; a learner may be writing to it.

    Raises:
        LibraryError: no such file, or it is damaged.
    """
    moments = []
    with _existing(Path(path), alone=False) as history:
        for seq, payload in history._rows("SELECT seq, frame FROM log WHERE kind = 'X'"):
            name, head = _headed(payload)
            moments.append((seq, Moment(head["added"], "added", name)))
        for seq, payload in history._rows("SELECT seq, frame FROM log WHERE kind = 'E'"):
            event = json.loads(payload)
            moments.append((seq, Moment(event["at"] / 1e9, event["event"], event["id"])))
    return [moment for _, moment in sorted(moments)]


def _existing(path: Path, alone: bool = True) -> History:
    """A history that is there, for its own policy and card."""
    if not path.is_file():
        raise LibraryError(f"{path}: no such history")
    meta = _meta(path)
    card = Card.from_dict(meta["card"], f"{path}: card")
    return History(path, meta["policy_sha256"], card, precision=meta["precision"], alone=alone)


def _meta(path: Path) -> dict[str, Any]:
    """What a history is bound to, read without SQLite, as `recover` has to."""
    try:
        data = path.read_bytes() + (wal.read_bytes() if (wal := path.with_name(f"{path.name}-wal")).is_file() else b"")
    except OSError as error:
        raise LibraryError(f"{path}: cannot be read: {error.strerror}") from None
    metas = _carved(data)[_META]
    if not metas:
        raise LibraryError(f"{path}: the record of its policy and card is lost; build the library again")
    found: dict[str, Any] = json.loads(next(iter(metas)))
    return found


def _carved(data: bytes) -> dict[bytes, dict[bytes, None]]:
    """Every intact frame in some bytes, by kind."""
    frames: dict[bytes, dict[bytes, None]] = {kind: {} for kind in (_META, _EXPERT, _EVENT, _MISS)}
    position = data.find(_MAGIC)
    while position >= 0:
        kind, payload = data[position + 8 : position + 9], _payload(data[position : position + PAGE])
        if payload is not None and kind in frames:
            frames[kind][payload] = None
        position = data.find(_MAGIC, position + 1)
    return frames


def recover(path: str | Path, out: str | Path) -> Recovered:
    """Carve every intact frame out of a damaged history and its write-ahead log into a new one.

    Counts of use are not framed and start again from zero. Misses that were learnt from may come back; they do no harm.

    Raises:
        LibraryError: `path` cannot be read, `out` exists, or not even the record of policy and card is intact.
    """
    path, out = Path(path), Path(out)
    if out.exists():
        raise LibraryError(f"{out}: exists already; name a new file")
    meta = _meta(path)
    wal = path.with_name(f"{path.name}-wal")
    frames = _carved(path.read_bytes() + (wal.read_bytes() if wal.is_file() else b""))
    card = Card.from_dict(meta["card"], f"{path}: card")
    with History(out, meta["policy_sha256"], card, meta["tolerance"], meta["precision"]) as history:
        n, m = len(card.observations), len(card.actions)
        for payload in frames[_EXPERT]:
            name, record = _expert(payload)
            if history.add(unpack([record], n, history._answers), f"recovered from {path.name}") != [name]:
                raise LibraryError(f"{path}: expert {name} is not what its id says")
        for event in sorted((json.loads(payload) for payload in frames[_EVENT]), key=lambda event: event["at"]):
            history._event([event["id"]], event["event"], event["reason"])
        pairs = [_miss(payload, n, m) for payload in frames[_MISS]]
        if pairs:
            history.add_misses(np.array([x for x, _ in pairs]), np.array([y for _, y in pairs]))
    return Recovered(len(frames[_EXPERT]), len(frames[_EVENT]), len(frames[_MISS]))


def _frame(kind: bytes, payload: bytes) -> bytes:
    return _HEAD.pack(_MAGIC, kind, len(payload), hashlib.sha256(kind + payload).digest()) + payload


def _payload(frame: bytes) -> bytes | None:
    """What a frame holds, or None if it is not intact; bytes behind it are ignored."""
    if len(frame) < _HEAD.size:
        return None
    magic, kind, length, digest = _HEAD.unpack_from(frame)
    payload = bytes(frame[_HEAD.size : _HEAD.size + length])
    intact = magic == _MAGIC and len(payload) == length and hashlib.sha256(kind + payload).digest() == digest
    return payload if intact else None


def _expert(payload: bytes) -> tuple[str, bytes]:
    """Id and record."""
    (length,) = struct.unpack_from("<I", payload, 16)
    return payload[:16].decode(), payload[20 + length :]


def _headed(payload: bytes) -> tuple[str, dict[str, Any]]:
    """Id of an expert, and what was written down about it: its source, and when it was added."""
    (length,) = struct.unpack_from("<I", payload, 16)
    return payload[:16].decode(), json.loads(payload[20 : 20 + length])


def _miss(payload: bytes, n: int, m: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    sizes = struct.unpack_from("<HH", payload)
    if sizes != (n, m) or len(payload) != 4 + 4 * (n + m):
        raise LibraryError(f"a stored miss has {sizes[0]} observations and {sizes[1]} actions, not {n} and {m}")
    return np.frombuffer(payload, "<f4", n, 4), np.frombuffer(payload, "<f4", m, 4 + 4 * n)
