"""The fleet's desk: proves what robots upload, merges it, and publishes it signed.

A publication consists of chunks of what is new (`delta-N-...`), every so often of everything (`base-N-...`), and of
`library.json`, which says what they are. A robot that saw publication N takes the deltas behind N, one that has seen
nothing, or not for long, the base first. Receipts tell robots which of their uploads have been taken in: they are in
`collected.json`, of large fleets in several files of which each robot reads one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tuf.api.metadata import TargetFile, Targets

from laws_ros.core import durable
from laws_ros.core.certificate import FORMAL, KINDS
from laws_ros.core.errors import FleetError, RefusedError
from laws_ros.core.library import Library
from laws_ros.runtime.cached_policy import check_tolerance

from . import corrections
from .items import MOST_CHUNK, Chunk, Identity, Items, chunks, content_name, decode, tombstone
from .place import STATE, Merged, Place, Progress, readable
from .store import Store
from .trust import DAYS, ROBOTS, Repository, read_upload, told

FORMAT = 1
MANIFEST = "library.json"
SHARING = 256  # robots, about, whose receipts are in one file
TOGETHER = 16  # robots' lists that are read at a time
MOST_DELTAS = 32  # publications that a robot may have missed and still need no base
MOST_LIST = 1 << 17  # bytes of a robot's list of chunks
MOST_UPLOADS = 256  # chunks that a robot may offer at once
NAME = "desk"


def receipts(manifest: Mapping[str, Any]) -> list[str]:
    """The targets that say what was taken in: [version, name] of a list, by robot."""
    count = manifest.get("receipts", 1)
    return ["collected.json"] if count == 1 else [f"collected-{k}.json" for k in range(count)]


def receipts_of(robot: str, manifest: Mapping[str, Any]) -> str:
    """The one of them that a robot's receipt is in."""
    names = receipts(manifest)
    return names[int(content_name(robot.encode()), 16) % len(names)]


class Desk:
    """A fleet's desk in a folder of state.

    Args:
        keys: folders with private keys, beside the desk's own.

    Raises:
        LawsError: no desk, or its policy cannot be read.
    """

    def __init__(self, folder: str | Path, keys: Sequence[str | Path] = ()) -> None:
        self.folder = Path(folder)
        missing = f"{folder}: no fleet's desk; `laws fleet init` makes one"
        path = self.folder / "fleet" / "desk.json"
        self._told = readable(_load(path, missing), path, "policy", "policy_sha256", "store", "days")
        self.place = Place(self.folder, self._told["policy"], NAME)
        if self.place.policy.sha256 != self._told["policy_sha256"]:
            raise FleetError(f"{self._told['policy']}: not the policy that this fleet was made for; make another fleet")
        self.store = Store(self._told["store"])
        own = sorted(path for path in (self.folder / "keys").glob("*") if path.is_dir())
        self.repository = Repository(self.folder / "fleet", [*own, *map(Path, keys)], self._told["days"])

    @classmethod
    def create(
        cls,
        folder: str | Path,
        store: str,
        policy: str | Path,
        tolerance: Sequence[float] | NDArray[np.float64],
        thresholds: Mapping[str, tuple[int, int]] | None = None,
        days: Mapping[str, float] | None = None,
    ) -> Desk:
        """A new fleet for one policy.

        Args:
            tolerance: [m] action units, of the libraries that robots make of it; one for all; empty for a decision.
            thresholds: role -> (signatures needed, keys to make). days: role -> how long its metadata is good for.

        Raises:
            LawsError: there is a desk already, the policy cannot be read, or the folder cannot be written.
        """
        folder = Path(folder)
        Store(store)
        if (folder / "fleet" / "desk.json").exists():
            raise FleetError(f"{folder}: is a fleet's desk already")
        try:
            (folder / "fleet").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FleetError(f"{folder}: cannot be made: {error.strerror}") from None
        place = Place(folder, policy, NAME)
        allowed = check_tolerance(tolerance, place.policy)
        place.history(allowed).close()
        manifest = _manifest(place.identity, allowed)
        files = {MANIFEST: json.dumps(manifest).encode(), receipts(manifest)[0]: b"{}"}
        lasting = {**DAYS, **(days or {})}
        Repository.create(folder / "fleet", folder / "keys", thresholds or {}, files, lasting)
        told = {"format": STATE, "store": store, "policy": str(Path(policy).absolute())}
        told["policy_sha256"] = place.policy.sha256
        _save(folder / "fleet" / "desk.json", {**told, "days": lasting})
        return cls(folder)

    # -- what comes in -----------------------------------------------------------------------------------------------

    def add(self, library: Library) -> list[str]:
        """Take in the experts of a library that was built here; statistical ones do not travel.

        Raises:
            LibraryError: it is of another policy or card.
        """
        library.check_policy(self.place.policy.sha256, self.place.policy.card, "the library", "the fleet")
        formal = np.flatnonzero(library.certificates.among(FORMAL))
        with self.place.history() as history:
            return history.add(library.certificates[formal], "library")

    def collect(self, progress: Progress = lambda text: None) -> dict[str, Merged]:
        """Read, prove and merge what every robot has uploaded since; one robot's nonsense stops no other one.

        Returns:
            What came of it, for every robot that had something new.

        Raises:
            FleetError: the store does not answer.
        """
        found: dict[str, Merged] = {}
        with self.place.alone():
            seen = self._seen()
            robots, revoked = self.repository.targets(ROBOTS), self.repository.revoked()
            for name, data in self._lists([*self.repository.robots(), *revoked]):
                merged = Merged()
                try:
                    if isinstance(data, RefusedError):
                        raise data
                    if data is None or content_name(data) == seen.get(name, {}).get("list"):
                        continue
                    if name in revoked:
                        raise RefusedError(f"upload of {name}: it was revoked; nothing that it tells is read")
                    self._collect(name, data, robots, seen, merged, progress)
                except RefusedError as error:
                    self.place.refuse(merged, f"upload of {name}", name, str(error))
                found[name] = merged
        return found

    def _lists(self, names: Sequence[str]) -> Iterator[tuple[str, bytes | RefusedError | None]]:
        """Each robot's list, None if there is none, or why it is not read; some at a time, as a store may be far."""

        def read(name: str) -> bytes | RefusedError | None:
            try:
                return self.store.read(f"uploads/{name}/list.json", MOST_LIST)
            except RefusedError as error:
                return error

        with ThreadPoolExecutor(TOGETHER) as pool:
            for start in range(0, len(names), TOGETHER):
                some = names[start : start + TOGETHER]
                yield from zip(some, pool.map(read, some), strict=True)

    def _collect(
        self, name: str, data: bytes, robots: Targets, seen: dict[str, Any], merged: Merged, progress: Progress
    ) -> None:
        before = seen.get(name, {"version": 0, "chunks": [], "list": ""})
        upload = read_upload(name, data, robots, before["version"], f"upload of {name}")
        if len(upload.targets) > MOST_UPLOADS:
            raise RefusedError(
                f"upload of {name}: {len(upload.targets)} chunks, at most {MOST_UPLOADS} are read at once"
            )
        done = []
        for target in upload.targets.values():
            sha = target.hashes["sha256"]
            if sha not in before["chunks"]:
                try:
                    chunk = self._fetch(name, target)
                except RefusedError as error:  # not what the robot signed, so it is not taken for received
                    self.place.refuse(merged, sha, name, str(error))
                    continue
                try:
                    self._take(
                        name, decode(chunk, self.place.identity, f"chunk {sha[:12]} of {name}"), merged, progress
                    )
                except RefusedError as error:
                    self.place.refuse(merged, sha, name, str(error))
            done.append(sha)
        whole = len(done) == len(upload.targets)
        seen[name] = {"version": upload.version, "list": content_name(data)} if whole else dict(before)
        seen[name]["chunks"] = done
        _save(self.folder / "fleet" / "seen.json", seen)

    def _fetch(self, name: str, target: TargetFile) -> bytes:
        where = f"chunk {target.hashes['sha256'][:12]} of {name}"
        data = self.store.read(f"uploads/{name}/{target.hashes['sha256']}", MOST_CHUNK)
        if data is None:
            raise RefusedError(f"{where}: missing in the store")
        with told(where):
            target.verify_length_and_hashes(data)
        return data

    def _take(self, name: str, chunk: Chunk, merged: Merged, progress: Progress) -> None:
        mine, strange = corrections.may_tell(name, chunk.items)
        for key in strange:
            self.place.refuse(merged, key, name, "it speaks for another robot")
        merged += self.place.merge(mine, name, lambda text: progress(f"{name}: {text}"))
        x = chunk.misses[np.isfinite(chunk.misses).all(axis=1)]
        if len(x):
            with self.place.history() as history:
                history.add_misses(x, self.place.policy.batch(x))

    # -- what goes out -----------------------------------------------------------------------------------------------

    def publish(self) -> dict[str, Any]:
        """Sign and send what is new since the last publication, and a new timestamp in any case.

        Returns:
            sequence, experts and events (new ones), chunks, bytes (sent).

        Raises:
            FleetError: not enough keys, or the store does not answer: what is signed is sent the next time.
        """
        with self.place.alone():
            done = self._published()
            with self.place.history() as history:
                news = history.news(done["row"])
            events = self.place.events()
            new = Items({name: record for name, _, record in news.experts if _formal(record)}) | Items(
                takeovers={k: v for k, v in events.takeovers.items() if content_name(v) not in done["events"]},
                tombstones={k: v for k, v in events.tombstones.items() if k not in done["events"]},
            )
            targets = self.repository.targets()
            manifest = json.loads(self._content(targets, MANIFEST))
            told = self._receipts(manifest)
            files = self._chunked(manifest, new, events) if len(new) else {}
            current = {**told, MANIFEST: json.dumps(manifest).encode()}
            files |= {name: data for name, data in current.items() if not _is(targets.targets.get(name), data)}
            if files:
                kept = {*current, *manifest["base"]["files"], *(f for d in manifest["deltas"] for f in d[1])}
                targets.targets = {name: target for name, target in targets.targets.items() if name in kept}
            self.repository.publish(targets if files else None, files=files)
            if len(new):
                told_ = {*events.tombstones, *map(content_name, events.takeovers.values())}
                _save(self.folder / "fleet" / "published.json", {"row": news.last, "events": sorted(told_)})
            sent = self.repository.send(self.store)
        return {
            "sequence": manifest["sequence"],
            "experts": len(new.experts),
            "events": len(new.takeovers) + len(new.tombstones),
            "chunks": sum(name.startswith(("base", "delta")) for name in files),
            "bytes": sent,
        }

    def _receipts(self, manifest: dict[str, Any]) -> dict[str, bytes]:
        """The files of receipts; the manifest says how many there are, if more than one."""
        seen = {name: [row["version"], row["list"]] for name, row in self._seen().items()}
        if len(seen) > SHARING * manifest.get("receipts", 1):
            manifest["receipts"] = math.ceil(len(seen) / SHARING)
        files: dict[str, dict[str, Any]] = {name: {} for name in receipts(manifest)}
        for robot in sorted(seen):
            files[receipts_of(robot, manifest)][robot] = seen[robot]
        return {name: json.dumps(told).encode() for name, told in files.items()}

    def _chunked(self, manifest: dict[str, Any], new: Items, events: Items) -> dict[str, bytes]:
        """Chunks of what is new; the manifest is brought up to date."""
        number = manifest["sequence"] = manifest["sequence"] + 1
        manifest["experts"] += len(new.experts)
        files = {f"delta-{number}-{k}": data for k, data in enumerate(chunks(self.place.identity, new))}
        manifest["deltas"].append([number, sorted(files)])
        if len(manifest["deltas"]) > MOST_DELTAS:
            with self.place.history() as history:
                found = {name: record for name, _, record in history.news().experts if _formal(record)}
            base = enumerate(chunks(self.place.identity, Items(found) | events))
            files |= {f"base-{number}-{k}": data for k, data in base}
            manifest["base"] = {"sequence": number, "files": sorted(name for name in files if name.startswith("base"))}
            manifest["deltas"] = manifest["deltas"][-(MOST_DELTAS // 2) :]
        return files

    def _content(self, targets: Targets, name: str) -> bytes:
        path = self.folder / "fleet" / "targets" / targets.targets[name].get_prefixed_paths()[0]
        try:
            return path.read_bytes()
        except OSError as error:
            raise FleetError(f"{path}: cannot be read: {error.strerror}; restore the desk's folder") from None

    def withdraw(self, of: str, reason: str) -> str:
        """Withdraw an item; returns the tombstone's name. It travels with the next publication."""
        stone = tombstone(of, reason, NAME)
        with self.place.alone():
            self.place.withdraw(stone)
        return next(iter(stone.tombstones))

    def status(self) -> dict[str, Any]:
        """Where the fleet stands."""
        manifest = json.loads(self._content(self.repository.targets(), MANIFEST))
        refused = self.place.refused()
        return {
            "store": self.store.url,
            "sequence": manifest["sequence"],
            "experts": manifest["experts"],
            "robots": self.repository.robots(),
            "expires": {role: f"{when:%Y-%m-%dT%H:%M:%SZ}" for role, when in self.repository.expiry().items()},
            "withdrawn": self.place.tombstones().out(),
            "refused": len(refused),
            "last_refused": refused[-1] if refused else None,
        }

    def _seen(self) -> dict[str, Any]:
        return _load(self.folder / "fleet" / "seen.json") or {}

    def _published(self) -> dict[str, Any]:
        return _load(self.folder / "fleet" / "published.json") or {"row": 0, "events": []}


def _manifest(identity: Identity, tolerance: NDArray[np.float64]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "policy_sha256": identity.policy_sha256,
        "card": identity.card.digest,
        "precision": identity.precision,
        "tolerance": np.asarray(tolerance, float).tolist(),
        "sequence": 0,
        "experts": 0,
        "base": {"sequence": 0, "files": []},
        "deltas": [],
    }


def _is(target: TargetFile | None, data: bytes) -> bool:
    return target is not None and target.hashes["sha256"] == content_name(data)


def _formal(record: bytes) -> bool:
    return KINDS[record[0]] in FORMAL


def _load(path: Path, missing: str = "") -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing:
            raise FleetError(missing) from None
        return {}
    except (OSError, ValueError) as error:
        raise FleetError(f"{path}: cannot be read: {error}") from None
    return found


def _save(path: Path, told: dict[str, Any]) -> None:
    try:
        durable.write(path, json.dumps(told).encode())
    except OSError as error:
        raise FleetError(f"{path}: cannot be written: {error.strerror}") from None
