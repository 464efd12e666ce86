"""Signed metadata as The Update Framework specifies it (https://theupdateframework.io, version 1.0), by python-tuf.

All checks of signatures, thresholds, versions, expiry, lengths and hashes are python-tuf's own: a robot follows
`tuf.ngclient`, the desk verifies uploads by `tuf.api`. Here are the keys, the order in which metadata is signed and
written, and one clear line for each way in which it can be refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner, Key, SSlibKey
from tuf.api import exceptions as tuf
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)

from laws_ros.core import durable
from laws_ros.core.errors import FleetError, RefusedError

from .corrections import ROBOT
from .store import Store

TOP = ("root", "targets", "snapshot", "timestamp")
ROBOTS = "robots"  # the role, delegated by targets, that delegates to every robot what it uploads
ROLES = (*TOP, ROBOTS)
DAYS = {"root": 365.0, "targets": 90.0, "robots": 90.0, "snapshot": 14.0, "timestamp": 2.0}  # until metadata expires
UPLOAD_DAYS = 365.0  # the same for a robot's list


def now() -> datetime:
    return datetime.now(timezone.utc).replace(microsecond=0)


# -- keys --------------------------------------------------------------------------------------------------------------


def new_key(folder: Path) -> CryptoSigner:
    """Make an Ed25519 key; the private half goes to FOLDER/KEYID.pem, readable by its owner only."""
    signer = CryptoSigner.generate_ed25519()
    path = folder / f"{signer.public_key.keyid}.pem"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(signer.private_bytes)
            stream.flush()
            os.fsync(stream.fileno())
        durable.synchronise(folder)
    except OSError as error:
        raise FleetError(f"{path}: cannot be written: {error.strerror}") from None
    return signer


def read_keys(folders: Iterable[Path]) -> dict[str, CryptoSigner]:
    """All private keys in some folders, by their ids.

    Raises:
        FleetError: a file that ends in .pem and is no unencrypted private key.
    """
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("*.pem"))):
        try:
            signer = CryptoSigner(load_pem_private_key(path.read_bytes(), None))  # type: ignore[arg-type]
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise FleetError(f"{path}: cannot be read as a private key: {error}") from None
        found[signer.public_key.keyid] = signer
    return found


def public_text(name: str, key: Key) -> bytes:
    """What a robot hands to the desk: its name and public key."""
    return json.dumps({"robot": name, "keyid": key.keyid, "key": key.to_dict()}, indent=1).encode()


def read_public(path: Path) -> tuple[str, Key]:
    """A robot's name and public key.

    Raises:
        FleetError: not a file that `public_text` made.
    """
    try:
        told = json.loads(path.read_bytes())
        key = SSlibKey.from_dict(told["keyid"], told["key"])
        if not ROBOT.fullmatch(told["robot"]) or told["robot"] in ROLES:
            raise ValueError(f"{told['robot']!r} is no robot's name")
    except OSError as error:
        raise FleetError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise FleetError(f"{path}: no robot's public key ({error}); `laws fleet join` writes one") from None
    return told["robot"], key


# -- the repository ----------------------------------------------------------------------------------------------------


class Repository:
    """The metadata that a desk signs, in a folder of its own and mirrored to a store.

    In the folder, timestamp.json is the last file of a publication to be renamed into place, and nothing is sent before
    it is. What it leads to is the state; files of a publication that did not come so far are written over. Versions
    that anybody may have seen are therefore never used twice. Sending is repeated until all of it has arrived, and
    timestamp.json goes last there, too.

    Args:
        folder: FOLDER/metadata and FOLDER/targets.
        keys: folders with private keys.
        days: role -> how long its metadata is good for.
    """

    def __init__(self, folder: Path, keys: Iterable[Path], days: Mapping[str, float] = DAYS) -> None:
        self.folder, self.days = folder, {**DAYS, **days}
        self.signers = read_keys(keys)

    @classmethod
    def create(
        cls,
        folder: Path,
        keys: Path,
        thresholds: Mapping[str, tuple[int, int]],
        files: Mapping[str, bytes],
        days: Mapping[str, float] = DAYS,
    ) -> Repository:
        """A new repository with new keys in KEYS/ROLE.

        Args:
            thresholds: role -> (signatures needed, keys to make). files: the first targets.

        Raises:
            FleetError: more signatures needed than keys, or a folder cannot be written.
        """
        asked = {role: thresholds.get(role, (1, 1)) for role in ROLES}
        for role, (needed, count) in asked.items():
            if not 1 <= needed <= count:
                raise FleetError(f"role {role}: {needed} of {count} signatures; at least 1, and no more than its keys")
        made = {role: [new_key(keys / role).public_key for _ in range(count)] for role, (_, count) in asked.items()}
        root, targets, robots, snapshot, timestamp = Root(), Targets(), Targets(), Snapshot(), Timestamp()
        for signed in (root, targets, robots, snapshot, timestamp):
            signed.version = 0  # publishing makes it 1
        for role in TOP:
            for key in made[role]:
                root.add_key(key, role)
            root.roles[role].threshold = asked[role][0]
        delegated = DelegatedRole(ROBOTS, [], asked[ROBOTS][0], True, paths=[f"{ROBOTS}/*"])
        targets.delegations = Delegations({}, {ROBOTS: delegated})
        for key in made[ROBOTS]:
            targets.add_key(key, ROBOTS)
        robots.delegations = Delegations({}, {})
        new = cls(folder, [keys / role for role in ROLES], days)
        _made(folder / "metadata")
        new.publish(targets, robots, files, new=(root, ()), last=(snapshot, timestamp))
        return new

    # -- what is signed ----------------------------------------------------------------------------------------------

    def root(self) -> Root:
        """The newest root."""
        versions = [int(path.name.partition(".")[0]) for path in (self.folder / "metadata").glob("*.root.json")]
        if not versions:
            raise FleetError(f"{self.folder}: no fleet's desk; `laws fleet init` makes one")
        return Metadata[Root].from_bytes(self.read(f"{max(versions)}.root")).signed

    def timestamp(self) -> Timestamp:
        return Metadata[Timestamp].from_bytes(self.read("timestamp")).signed

    def snapshot(self) -> Snapshot:
        return Metadata[Snapshot].from_bytes(self.read(f"{self.timestamp().snapshot_meta.version}.snapshot")).signed

    def targets(self, role: str = "targets") -> Targets:
        """Those of the last publication, of this role."""
        return Metadata[Targets].from_bytes(self.read(f"{self.snapshot().meta[f'{role}.json'].version}.{role}")).signed

    def roles(self) -> dict[str, Role]:
        """The fleet's own roles: how many signatures of which keys each needs."""
        root, targets = self.root(), self.targets()
        return {role: (targets if role == ROBOTS else root).get_delegated_role(role) for role in ROLES}

    def expiry(self) -> dict[str, datetime]:
        """When the metadata of each role expires."""
        of = {"root": self.root(), "snapshot": self.snapshot(), "timestamp": self.timestamp()}
        return {role: (of[role] if role in of else self.targets(role)).expires for role in ROLES}

    def robots(self) -> list[str]:
        """Names of those that may upload."""
        return sorted(_delegated(self.targets(ROBOTS)).roles or ())

    # -- changes -----------------------------------------------------------------------------------------------------

    def publish(
        self,
        targets: Targets | None = None,
        robots: Targets | None = None,
        files: Mapping[str, bytes] | None = None,
        new: tuple[Root, tuple[Root, ...]] | None = None,
        last: tuple[Snapshot, Timestamp] | None = None,
    ) -> None:
        """Sign a new state; `send` brings it to the store. Without changes, timestamp alone is good for longer.

        Args:
            targets, robots: changed. files: content of targets that are new.
            new: a new root, and the older ones that have to agree to it.
            last: what was published last.

        Raises:
            FleetError: not enough keys are here, or the disk is full; nothing has changed.
        """
        snapshot, timestamp = last or (self.snapshot(), self.timestamp())
        root = new[0] if new else self.root()
        for name, data in (files or {}).items():
            assert targets is not None
            targets.targets[name] = TargetFile.from_data(name, data, ["sha256"])
            _write(_made(self.folder / "targets") / targets.targets[name].get_prefixed_paths()[0], data)
        # Each names the version, length and hash of the one before: publications cannot be mixed.
        done = {}
        if new:
            self._renew(root, "root")
            done[f"{root.version}.root"] = self._signed(root, "root", root, *new[1])
        for role, changed in (("targets", targets), (ROBOTS, robots)):
            if changed is None and last is None and self._fading(role):
                changed = self.targets(role)
            if changed is not None:
                self._renew(changed, role)
                delegator = root if role == "targets" else targets or self.targets()
                done[f"{changed.version}.{role}"] = data = self._signed(changed, role, delegator)
                snapshot.meta[f"{role}.json"] = MetaFile.from_data(changed.version, data, ["sha256"])
        if done or snapshot.expires - now() < timedelta(days=self.days["snapshot"] / 2):
            self._renew(snapshot, "snapshot")
            done[f"{snapshot.version}.snapshot"] = data = self._signed(snapshot, "snapshot", root)
            timestamp.snapshot_meta = MetaFile.from_data(snapshot.version, data, ["sha256"])
        self._renew(timestamp, "timestamp")
        done["timestamp"] = self._signed(timestamp, "timestamp", root)
        for name, data in done.items():
            _write(self.folder / "metadata" / f"{name}.json", data)

    def rotate(self, role: str, keys: Path, lost: str = "") -> str:
        """Replace a key of a role by a new one, which is written to a folder; the role's metadata is signed anew.

        A new root is signed by enough of the old root's keys and enough of its own.

        Args:
            lost: id, or its beginning, of the key to be replaced; by default the role's first.

        Returns:
            The new key's id.

        Raises:
            FleetError: no such key, or not enough keys are here; nothing has changed.
        """
        old, root, targets = self.root(), self.root(), self.targets()
        delegator: Root | Targets = targets if role == ROBOTS else root
        found = [keyid for keyid in delegator.get_delegated_role(role).keyids if keyid.startswith(lost)]
        if not found:
            raise FleetError(f"role {role} has no key {lost!r}; `laws fleet keys` lists them")
        signer = new_key(keys)
        keyid = signer.public_key.keyid
        self.signers[keyid] = signer
        delegator.revoke_key(found[0], role)
        delegator.add_key(signer.public_key, role)
        try:
            self.publish(
                targets if role in ("targets", ROBOTS) else None,
                self.targets(ROBOTS) if role == ROBOTS else None,
                new=None if role == ROBOTS else (root, (old,)),
            )
        except FleetError:
            (keys / f"{keyid}.pem").unlink()
            raise
        return keyid

    def enrol(self, keys: Mapping[str, Key]) -> None:
        """Let robots upload, by their names; those that are known get another key."""
        robots = self.targets(ROBOTS)
        roles = _delegated(robots).roles
        assert roles is not None
        for name, key in keys.items():
            if name in roles:
                self._forget(robots, name)
            roles[name] = DelegatedRole(name, [], 1, True, paths=[f"{ROBOTS}/{name}/*"])
            robots.add_key(key, name)
        self.publish(robots=robots)

    def revoke(self, name: str) -> None:
        """Let a robot upload no more.

        Raises:
            FleetError: no such robot.
        """
        robots = self.targets(ROBOTS)
        if name not in self.robots():
            raise FleetError(f"{name!r} is no robot of this fleet; it has {', '.join(self.robots()) or 'none'}")
        self._forget(robots, name)
        _write(self.folder / "revoked.json", json.dumps(sorted({*self.revoked(), name})).encode())
        self.publish(robots=robots)

    def revoked(self) -> list[str]:
        """Names of those that were revoked and may not upload again."""
        path = self.folder / "revoked.json"
        found: list[str] = json.loads(path.read_bytes()) if path.is_file() else []
        return sorted({*found} - {*self.robots()})

    def send(self, store: Store) -> int:
        """Bring the store up to date; timestamp.json last. Returns the bytes sent.

        Raises:
            FleetError: the store does not answer, or cannot be written; robots see the state of before.
        """
        log = self.folder / "sent.json"
        told: dict[str, Any] = json.loads(log.read_bytes()) if log.is_file() else {}
        done = set(told["names"]) if told.get("store") == store.url else set()
        names = [f"targets/{path.name}" for path in sorted((self.folder / "targets").iterdir())]
        versions = {role: self.targets(role).version for role in ("targets", ROBOTS)}
        versions |= {"root": self.root().version, "snapshot": self.snapshot().version}
        order = ["root", "targets", ROBOTS, "snapshot"]
        found = [path.name.split(".") for path in (self.folder / "metadata").glob("*.*.json")]
        for version, role, _ in sorted(found, key=lambda parts: (order.index(parts[1]), int(parts[0]))):
            if int(version) <= versions[role]:  # later ones were never published
                names.append(f"metadata/{version}.{role}.json")
        sent = 0
        for name in [*(name for name in names if name not in done), "metadata/timestamp.json"]:
            data = (self.folder / name).read_bytes()
            store.write(name, data)
            sent += len(data)
        _write(log, json.dumps({"store": store.url, "names": names}).encode())
        return sent

    # -- inside ------------------------------------------------------------------------------------------------------

    def _fading(self, role: str) -> bool:
        """Half of its time is over, and the keys to sign it again are here."""
        fading = self.targets(role).expires - now() < timedelta(days=self.days[role] / 2)
        here = (self.targets() if role == ROBOTS else self.root()).get_delegated_role(role)
        return fading and sum(keyid in self.signers for keyid in here.keyids) >= here.threshold

    def _renew(self, signed: Signed, role: str) -> None:
        signed.version += 1
        signed.expires = now() + timedelta(days=self.days[role])

    @staticmethod
    def _forget(robots: Targets, name: str) -> None:
        roles = _delegated(robots).roles
        assert roles is not None
        for keyid in list(roles[name].keyids):
            robots.revoke_key(keyid, name)
        del roles[name]

    def _signed(self, signed: Root | Targets | Snapshot | Timestamp, role: str, *delegators: Root | Targets) -> bytes:
        """Metadata signed by all keys at hand, enough of them for every one of those who delegate."""
        metadata: Metadata[Any] = Metadata(signed)
        for keyid in {keyid: None for one in delegators for keyid in one.get_delegated_role(role).keyids}:
            if keyid in self.signers:
                metadata.sign(self.signers[keyid], append=True)
        for one in delegators:
            result = one.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
            if not result:
                raise FleetError(
                    f"role {role} needs {result.threshold} signatures, {len(result.signed)} of its keys are here: name "
                    "folders with more of them by --keys"
                )
        return bytes(metadata.to_bytes())

    def read(self, name: str) -> bytes:
        """Metadata as it was signed."""
        path = self.folder / "metadata" / f"{name}.json"
        try:
            return path.read_bytes()
        except OSError as error:
            raise FleetError(f"{path}: cannot be read: {error.strerror}; restore the desk's folder") from None


def _delegated(targets: Targets) -> Delegations:
    assert targets.delegations is not None
    return targets.delegations


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FleetError(f"{folder}: cannot be made: {error.strerror}") from None
    return folder


def _write(path: Path, data: bytes) -> None:
    try:
        durable.write(path, data)
    except OSError as error:
        raise FleetError(f"{path}: cannot be written: {error.strerror}") from None


# -- uploads -----------------------------------------------------------------------------------------------------------


def upload(name: str, signer: CryptoSigner, version: int, chunks: Mapping[str, bytes]) -> bytes:
    """A robot's signed list of the chunks that it offers.

    Args:
        chunks: content name -> bytes.
    """
    paths = {sha: f"{ROBOTS}/{name}/{sha}" for sha in chunks}
    files = {paths[sha]: TargetFile.from_data(paths[sha], data, ["sha256"]) for sha, data in chunks.items()}
    metadata = Metadata(Targets(version=version, expires=now() + timedelta(days=UPLOAD_DAYS), targets=files))
    metadata.sign(signer)
    return bytes(metadata.to_bytes())


def read_upload(name: str, data: bytes, robots: Targets, seen: int, where: str) -> Targets:
    """A robot's list, if its key signed it, and it is neither old nor somebody else's.

    Args:
        robots: with the robots' keys. seen: the version that was read last.

    Raises:
        RefusedError: it is not.
    """
    with told(where):
        metadata = Metadata[Targets].from_bytes(data)
        robots.verify_delegate(name, metadata.signed_bytes, metadata.signatures)
    found = metadata.signed
    if found.type != Targets.type:
        raise RefusedError(f"{where}: signed by {name}, but no list of chunks")
    if found.is_expired():
        raise RefusedError(
            f"{where}: expired on {found.expires:%Y-%m-%d}: an old upload was replayed, or that robot's clock is wrong"
        )
    if found.version <= seen:
        raise RefusedError(f"{where}: version {found.version}, {seen} was seen already: an old upload was replayed")
    for path, target in found.targets.items():
        if path != f"{ROBOTS}/{name}/{target.hashes.get('sha256')}":
            raise RefusedError(f"{where}: {path!r} is no chunk of {name}")
    return found


@contextmanager
def told(where: str) -> Iterator[None]:
    """python-tuf's refusals as one clear line each.

    Raises:
        RefusedError: it was refused. FleetError: the store does not answer.
    """
    try:
        yield
    except tuf.ExpiredMetadataError as error:
        raise RefusedError(
            f"{where}: {error}: either nobody has published since, or the store is held back, or this clock "
            f"({now():%Y-%m-%d} UTC) is wrong"
        ) from None
    except tuf.BadVersionNumberError as error:
        raise RefusedError(f"{where}: older than what was seen before ({error}): a rollback, refused") from None
    except tuf.UnsignedMetadataError as error:
        raise RefusedError(f"{where}: {error}: not signed by enough of the fleet's keys, refused") from None
    except tuf.LengthOrHashMismatchError as error:
        raise RefusedError(f"{where}: not what was signed ({error}): tampered with or damaged, refused") from None
    except tuf.DownloadLengthMismatchError as error:
        raise RefusedError(f"{where}: longer than was signed or than is read at all ({error}), refused") from None
    except tuf.RepositoryError as error:
        raise RefusedError(f"{where}: metadata that cannot be used ({error}), refused") from None
    except tuf.DownloadError as error:
        raise FleetError(str(error.__cause__ or error)) from None
    except ValueError as error:  # no such delegation: a robot that was revoked
        raise RefusedError(f"{where}: {error}, refused") from None
