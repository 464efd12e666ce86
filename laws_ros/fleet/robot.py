"""A robot as a member of a fleet: it tells what it learnt, and takes in what the fleet has signed.

Both run in a process of their own, beside controller and learner, and share nothing with them but files.

What is to be told waits in files (fleet/outbox) until the desk says, signed, that it took it in. When they are over
the limit (`most_bytes`), observations are dropped first, oldest first, then experts, oldest first (other robots then
learn those themselves); corrections are never dropped. What was dropped is counted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient import Updater, UpdaterConfig

from laws_ros.core import durable
from laws_ros.core.certificate import FORMAL, KINDS
from laws_ros.core.errors import FleetError, RefusedError
from laws_ros.runtime.takeovers import HISTORY

from . import corrections
from .corrections import ROBOT
from .desk import FORMAT, MANIFEST, MOST_UPLOADS, receipts_of
from .items import MOST_CHUNK, Items, chunks, content_name, decode, tombstone
from .place import FLEET, STATE, Merged, Place, Progress, readable
from .store import Fetcher, Store
from .trust import ROBOTS, UPLOAD_DAYS, new_key, now, public_text, read_keys, told, upload

MOST_BYTES = 64 << 20  # that wait to be told
MOST_TARGETS = 1 << 20  # bytes of metadata that lists targets
MOST_ROBOTS = 1 << 22  # likewise, of the list of robots: 360 bytes each
MOST_MANIFEST = 1 << 18
MOST_COLLECTED = 1 << 22
_CORRECTIONS, _EXPERTS, _MISSES = "corrections", "experts", "misses"


@dataclass
class Pulled:
    """What an update brought.

    Attributes:
        sequence: number of the fleet's last publication. switched: to a new snapshot.
        healed: what was wrong with the snapshot in use before, which was rolled back; "" for nothing.
        bytes: read from the store.
    """

    sequence: int
    switched: bool
    healed: str
    bytes: int
    merged: Merged = field(default_factory=Merged)


class Robot:
    """A robot's folder of state.

    Raises:
        LawsError: it is of no fleet, or its policy cannot be read.
    """

    def __init__(self, folder: str | Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.most_bytes = Path(folder), most_bytes
        self.fleet = self.folder / "fleet"
        told_ = self._load("robot.json", None)
        if told_ is None:
            raise FleetError(f"{folder}: is of no fleet; `laws fleet join` makes it a member")
        readable(told_, self.fleet / "robot.json", "robot", "policy", "store")
        self.name: str = told_["robot"]
        self.place = Place(self.folder, told_["policy"], self.name)
        self.store = Store(told_["store"])

    @classmethod
    def join(cls, folder: str | Path, name: str, store: str, policy: str | Path, root: str | Path) -> Robot:
        """Make a folder of state a member of a fleet, with a new key.

        Args:
            root: the fleet's root metadata, from a source that is trusted; everything else follows from it.

        Returns:
            The robot; FOLDER/fleet/robot.pub.json is for the desk.

        Raises:
            LawsError: it is of a fleet already, a file cannot be read, or the name cannot be one.
        """
        if not ROBOT.fullmatch(name):
            raise FleetError(f"{name!r}: a robot's name has up to 40 letters, digits, - and _")
        folder = Path(folder)
        if (folder / "fleet").exists():
            raise FleetError(f"{folder}: is of a fleet already")
        try:
            anchor = Path(root).read_bytes()
            with told(str(root)):
                Metadata[Root].from_bytes(anchor).verify_delegate(Root.type, Metadata[Root].from_bytes(anchor))
            Store(store)
            Place(folder, policy, name)
            (folder / "fleet").mkdir(parents=True)
            durable.write(folder / "fleet" / "root.json", anchor)
            signer = new_key(folder / "fleet" / "key")
            durable.write(folder / "fleet" / "robot.pub.json", public_text(name, signer.public_key))
            about = {"format": STATE, "robot": name, "store": store, "policy": str(Path(policy).absolute())}
            durable.write(folder / "fleet" / "robot.json", json.dumps(about).encode())
        except OSError as error:
            raise FleetError(f"{error.filename or folder}: {error.strerror}") from None
        return cls(folder)

    # -- telling -----------------------------------------------------------------------------------------------------

    def gather(self) -> dict[str, Any]:
        """Put what is new into files that wait; returns the state (see `push`)."""
        state = self._pushed()
        waiting = {row["sha"] for row in state["waiting"]}
        for path in (self.fleet / "outbox").glob("*"):
            if path.name not in waiting:  # written when the power was cut
                path.unlink()
        for name, reason in corrections.released(self.folder, self.name).items():
            stone = tombstone(name, reason, self.name)
            if stone.tombstones.keys() - self.place.tombstones().tombstones.keys():
                self.place.withdraw(stone)
        events = self.place.events()
        told_ = set(state["told"])
        takeovers = {k: v for k, v in events.takeovers.items() if corrections.author(k) == self.name}
        stones = {k: v for k, v in events.tombstones.items() if json.loads(v)["by"] == self.name}
        new = Items(
            takeovers={k: v for k, v in takeovers.items() if content_name(v) not in told_},
            tombstones={k: v for k, v in stones.items() if k not in told_},
        )
        self._keep(state, _CORRECTIONS, chunks(self.place.identity, new))
        if (self.folder / HISTORY).is_file():
            with self.place.history() as history:
                news = history.news(state["row"])
            own = {k: record for k, source, record in news.experts if source != FLEET and KINDS[record[0]] in FORMAL}
            self._keep(state, _EXPERTS, chunks(self.place.identity, Items(own)))
            self._keep(state, _MISSES, chunks(self.place.identity, Items(), news.misses))
            state["row"] = news.last
        state["told"] = sorted({*map(content_name, takeovers.values()), *stones})
        self._drop(state)
        self._save("push.json", state)
        return state

    def push(self) -> dict[str, Any]:
        """Tell the fleet what is new: chunks first, then their signed list.

        Returns:
            sent (chunks), bytes, waiting (until the desk has them), dropped (items, by what they are).

        Raises:
            FleetError: the store does not answer; what is new waits on the disk.
        """
        with self.place.alone():
            state = self.gather()
            sent = size = 0
            waiting = state["waiting"][:MOST_UPLOADS]
            for row in waiting:
                if not row["sent"]:
                    self.store.write(f"uploads/{self.name}/{row['sha']}", self._waiting(row))
                    row["sent"] = True
                    sent, size = sent + 1, size + row["bytes"]
                    self._save("push.json", state)
            names = [row["sha"] for row in waiting]
            # signed long ago, or by a clock that has been set since: a list that may have expired
            age_s = abs(now().timestamp() - state.get("signed", 0.0))
            if names != state["listed"] or (names and age_s > UPLOAD_DAYS * 86400 / 2):
                state["version"] += 1  # saved before anybody sees it, so that none is used twice
                for row in waiting:
                    row["version"] = row["version"] or state["version"]
                self._save("push.json", state)
                signer = next(iter(read_keys([self.fleet / "key"]).values()))
                data = upload(self.name, signer, state["version"], {row["sha"]: self._waiting(row) for row in waiting})
                state["lists"][str(state["version"])] = content_name(data)
                state["signed"] = now().timestamp()
                self._save("push.json", state)
                self.store.write(f"uploads/{self.name}/list.json", data)
                size += len(data)
                state["listed"] = names
            for sha in state["collected"]:
                self.store.delete(f"uploads/{self.name}/{sha}")
            state["collected"] = []
            self._save("push.json", state)
        return {"sent": sent, "bytes": size, "waiting": len(state["waiting"]), "dropped": state["dropped"]}

    def _keep(self, state: dict[str, Any], what: str, found: Iterable[bytes]) -> None:
        for data in found:
            sha = content_name(data)
            if sha not in {row["sha"] for row in state["waiting"]}:
                self._write(f"outbox/{sha}", data)
                row = {"sha": sha, "what": what, "bytes": len(data), "sent": False, "version": 0}
                state["waiting"].append(row)

    def _drop(self, state: dict[str, Any]) -> None:
        for what in (_MISSES, _EXPERTS):
            for row in [row for row in state["waiting"] if row["what"] == what]:
                if sum(other["bytes"] for other in state["waiting"]) <= self.most_bytes:
                    return
                chunk = decode(self._waiting(row), self.place.identity, row["sha"])
                state["dropped"][what] += len(chunk.items) + len(chunk.misses)
                self._finish(state, row)

    def _finish(self, state: dict[str, Any], row: dict[str, Any]) -> None:
        """A chunk waits no more."""
        state["waiting"].remove(row)
        if row["sent"]:
            state["collected"].append(row["sha"])
        self._save("push.json", state)
        (self.fleet / "outbox" / row["sha"]).unlink(missing_ok=True)

    def _waiting(self, row: dict[str, Any]) -> bytes:
        path = self.fleet / "outbox" / row["sha"]
        try:
            return path.read_bytes()
        except OSError as error:
            raise FleetError(f"{path}: cannot be read: {error.strerror}") from None

    # -- taking in ---------------------------------------------------------------------------------------------------

    def pull(self, progress: Progress = lambda text: None) -> Pulled:
        """Follow the fleet's signed state: prove and merge what is new, and serve it.

        Raises:
            RefusedError: what the store says is not what the fleet signed, or not for this robot. FleetError: the store
            does not answer. The snapshot in use stays.
            LawsError: the new snapshot failed its self-check; the old one is in use.
        """
        with self.place.alone():
            try:
                return self._pull(progress)
            except RefusedError as error:
                self.place.refuse(Merged(), "update", self.store.url, str(error))
                raise

    def _pull(self, progress: Progress) -> Pulled:
        try:
            healed = self.place.heal() or ""
        except FleetError as error:  # a new snapshot is made below
            healed = str(error)
        client = _Client(self.fleet, self.store)
        manifest = client.manifest(self.place)
        fresh = not (self.folder / HISTORY).is_file()
        self.place.history(np.array(manifest["tolerance"], float)).close()  # a new one, or one that was not finished
        done = 0 if fresh else self._load("pulled.json", {"sequence": 0})["sequence"]
        merged = Merged()
        for number, names in _missing(manifest, done):
            for name in names:
                data = client.target(name, MOST_CHUNK)
                items = decode(data, self.place.identity, f"store {self.store.url}: {name}").items
                merged += self.place.merge(items, "the fleet", progress)
            self._save("pulled.json", {"sequence": number})
        self._collected(client, manifest)
        self.place.settle()
        return Pulled(manifest["sequence"], self.place.switch(), healed, client.read, merged)

    def _collected(self, client: _Client, manifest: dict[str, Any]) -> None:
        """What the desk has taken in waits no more."""
        state = self._pushed()
        if state["waiting"]:
            found = json.loads(client.target(receipts_of(self.name, manifest), MOST_COLLECTED))
            version, name = found.get(self.name, (0, None))
            if state["lists"].get(str(version)) == name:
                for row in [row for row in state["waiting"] if 0 < row["version"] <= version]:
                    self._finish(state, row)
                state["lists"] = {key: kept for key, kept in state["lists"].items() if int(key) >= version}
            elif version >= state["version"]:  # told by an earlier installation of this robot
                state["version"], state["listed"] = version, []
                for row in state["waiting"]:
                    row["version"] = 0
            self._save("push.json", state)

    def peers(self, reach: bool = True) -> dict[str, Key]:
        """The keys of the fleet's robots, by name, as the desk has signed them; as of the last time, where the store
        does not answer.

        Args:
            reach: for the store, even if there is a list from before.

        Raises:
            FleetError: they were never read, or what was read has expired.
        """
        unreached, path = "", self.fleet / "metadata" / f"{ROBOTS}.json"  # python-tuf verifies it before it writes it
        if reach or not path.exists():
            try:
                _Client(self.fleet, self.store, MOST_ROBOTS).follow(ROBOTS)
            except FleetError as error:
                unreached = f" ({error})"
        try:
            robots = Metadata[Targets].from_bytes(path.read_bytes()).signed
        except (OSError, RepositoryError) as error:
            why = unreached or f" ({error})"
            raise FleetError(
                f"{self.folder}: has no list of the fleet's robots yet; reach the store once{why}"
            ) from None
        if robots.is_expired():
            raise FleetError(f"{path}: expired on {robots.expires:%Y-%m-%d}; reach the store{unreached}")
        assert robots.delegations is not None
        return {
            name: robots.delegations.keys[role.keyids[0]] for name, role in (robots.delegations.roles or {}).items()
        }

    def status(self) -> dict[str, Any]:
        """Where this robot stands; rolls back a snapshot that fails its self-check."""
        with self.place.alone():
            healed = self.place.heal() or ""
            state = self._pushed()
            refused = self.place.refused()
            return {
                "robot": self.name,
                "store": self.store.url,
                "sequence": self._load("pulled.json", {"sequence": 0})["sequence"],
                "waiting": len(state["waiting"]),
                "waiting_bytes": sum(row["bytes"] for row in state["waiting"]),
                "dropped": state["dropped"],
                "withdrawn": self.place.tombstones().out(),
                "refused": len(refused),
                "last_refused": refused[-1] if refused else None,
                "rolled_back": healed,
            }

    def withdraw(self, of: str, reason: str) -> str:
        """Withdraw an expert, here at once and in the fleet; returns the tombstone's name."""
        stone = tombstone(of, reason, self.name)
        with self.place.alone():
            self.place.withdraw(stone)
            self.place.switch()
        return next(iter(stone.tombstones))

    # -- inside ------------------------------------------------------------------------------------------------------

    def _pushed(self) -> dict[str, Any]:
        empty = {"row": 0, "version": 0, "told": [], "waiting": [], "listed": [], "lists": {}, "collected": []}
        found: dict[str, Any] = self._load("push.json", {**empty, "dropped": {_MISSES: 0, _EXPERTS: 0}})
        return found

    def _load(self, name: str, default: Any) -> Any:
        path = self.fleet / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return default
        except (OSError, ValueError) as error:
            raise FleetError(f"{path}: cannot be read: {error}") from None

    def _save(self, name: str, told_: dict[str, Any]) -> None:
        self._write(name, json.dumps(told_).encode())

    def _write(self, name: str, data: bytes) -> None:
        path = self.fleet / name
        try:
            path.parent.mkdir(exist_ok=True)
            durable.write(path, data)
        except OSError as error:
            raise FleetError(f"{path}: cannot be written: {error.strerror}") from None


class _Client:
    """python-tuf's client of one store; it has followed root, timestamp, snapshot and targets when this returns."""

    def __init__(self, fleet: Path, store: Store, most_targets: int = MOST_TARGETS) -> None:
        self._fetcher, self._where = Fetcher(store), f"store {store.url}"
        with told(self._where):
            try:
                anchor = (fleet / "root.json").read_bytes()
                (fleet / "metadata").mkdir(exist_ok=True)
                (fleet / "targets").mkdir(exist_ok=True)
                config = UpdaterConfig(targets_max_length=most_targets)
                self._updater = Updater(
                    str(fleet / "metadata"),
                    "metadata/",
                    str(fleet / "targets"),
                    "targets/",
                    self._fetcher,
                    config,
                    bootstrap=anchor,
                )
                self._updater.refresh()
            except OSError as error:
                raise FleetError(f"{fleet}: {error.strerror}: {error.filename}") from None

    @property
    def read(self) -> int:
        """Bytes that came from the store so far."""
        return self._fetcher.bytes

    def target(self, name: str, most: int) -> bytes:
        """A target's content, as it was signed."""
        with told(f"{self._where}: {name}"):
            info = self._updater.get_targetinfo(name)
            if info is None:
                raise RefusedError(f"{self._where}: {name} is not among what the fleet has signed")
            if info.length > most:
                raise RefusedError(f"{self._where}: {name} has {info.length} bytes, at most {most} are read")
            try:
                path = Path(self._updater.find_cached_target(info) or self._updater.download_target(info))
                data = path.read_bytes()
                path.unlink()  # it is taken in next; read again only if that is interrupted
            except OSError as error:
                raise FleetError(f"{name}: {error.strerror}: {error.filename}") from None
        return data

    def follow(self, role: str) -> None:
        """Follow a role that targets delegates to; its metadata is on the disk then."""
        with told(f"{self._where}: {role}"):
            self._updater.get_targetinfo(f"{role}/-")

    def manifest(self, place: Place) -> dict[str, Any]:
        """What the fleet has published, for this policy.

        Raises:
            RefusedError: for another policy, card or precision, or by a newer program.
        """
        found: dict[str, Any] = json.loads(self.target(MANIFEST, MOST_MANIFEST))
        if found["format"] != FORMAT:
            raise RefusedError(f"{self._where}: format {found['format']}, this program reads {FORMAT}; update laws_ros")
        identity = place.identity
        mine = {"policy_sha256": identity.policy_sha256, "card": identity.card.digest, "precision": identity.precision}
        for key, value in mine.items():
            if found[key] != value:
                raise RefusedError(
                    f"{self._where}: the fleet's library is for {key.partition('_')[0]} {found[key][:12]}..., this "
                    f"robot's is {value[:12]}...; nothing was taken in"
                )
        return found


def _missing(manifest: dict[str, Any], done: int) -> list[tuple[int, list[str]]]:
    """What a robot that has seen publication `done` still needs: its number, and its chunks."""
    deltas = [(number, names) for number, names in manifest["deltas"] if number > done]
    expected = range(manifest["sequence"] - len(deltas) + 1, manifest["sequence"] + 1)
    if [number for number, _ in deltas] == list(expected) and len(deltas) == manifest["sequence"] - done:
        return deltas
    base = manifest["base"]
    return [(base["sequence"], base["files"]), *((n, names) for n, names in deltas if n > base["sequence"])]
