"""A folder of state as a member of a fleet: what it knows, what it takes in, and the snapshot that it serves.

    library.laws             the snapshot in use; switched by renaming a file over it
    library.previous.laws    the one before, which a broken one is rolled back to
    history.db, takeovers/   runtime.history, runtime.takeovers
    fleet/tombstones/        one file each
    fleet/refused.jsonl      what was refused, once each, and why

Whatever is taken in is on the disk before the next step, and taking it in again changes nothing: a process may be
killed anywhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core import durable
from laws_ros.core.certificate import FORMAL, decision_rows
from laws_ros.core.errors import FleetError, LawsError, LibraryError
from laws_ros.core.library import Library
from laws_ros.core.record import unpack
from laws_ros.runtime.cached_policy import CachedPolicy, open_pair
from laws_ros.runtime.experts import Experts
from laws_ros.runtime.history import History
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.takeovers import HISTORY, SNAPSHOT

from . import corrections
from .corrections import BY_FLEET
from .items import Identity, Items
from .prove import Prover

PREVIOUS = "library.previous.laws"
FLEET = "fleet"  # source of experts in the history that came from elsewhere
STATE = 1  # layout of what is kept in fleet/; older ones are read, newer ones refused
_BATCH = 16  # experts that are proved before they are stored
PATIENCE_S = 30.0  # for another command; a robot's cell (fleet.cell) is at work for some seconds now and then
_SAMPLES = 1024  # observations of a self-check

Progress = Callable[[str], None]


@dataclass
class Merged:
    """What came of some items.

    Attributes:
        accepted: experts that were new, and proved. refused: what was not taken in, and why.
        takeovers, tombstones: that were new.
    """

    accepted: int = 0
    takeovers: int = 0
    tombstones: int = 0
    refused: dict[str, str] = field(default_factory=dict)

    def __iadd__(self, other: Merged) -> Merged:
        self.accepted += other.accepted
        self.takeovers += other.takeovers
        self.tombstones += other.tombstones
        self.refused |= other.refused
        return self


def readable(told: Any, path: Path, *names: str) -> dict[str, Any]:
    """What robot.json or desk.json says, with at least these names.

    Raises:
        FleetError: it is damaged, or a newer program wrote it.
    """
    if not isinstance(told, dict) or (missing := [name for name in names if name not in told]):
        raise FleetError(f"{path}: damaged: {'no object' if not isinstance(told, dict) else f'lacks {missing[0]!r}'}")
    if told.get("format", 1) > STATE:
        raise FleetError(f"{path}: format {told['format']}, this program reads up to {STATE}; update laws_ros")
    return told


class Place:
    """One folder of state, for one policy.

    Args:
        name: of the robot whose folder it is.

    Raises:
        LawsError: the policy cannot be read.
    """

    def __init__(self, folder: str | Path, policy: str | Path, name: str) -> None:
        self.folder, self.name = Path(folder), name
        self.fleet = self.folder / "fleet"
        self.policy = Policy(policy)
        self.identity = Identity(self.policy.sha256, self.policy.card)
        self._prover = Prover(self.policy)

    @contextmanager
    def alone(self, patience_s: float = PATIENCE_S) -> Iterator[None]:
        """Keeps other `laws fleet` commands out of this folder, and waits for one that is at work there.

        Raises:
            FleetError: one is at work, the folder cannot be written, or the disk is full.
        """
        try:
            handle = os.open(self.fleet / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise FleetError(f"{self.fleet}: cannot be written: {error.strerror}") from None
        try:
            end = time.monotonic() + patience_s
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= end:
                        raise FleetError(f"{self.folder}: another `laws fleet` command is at work there") from None
                    time.sleep(0.05)
            yield
        except OSError as error:
            where = error.filename or self.folder
            raise FleetError(f"{where}: {error.strerror}; what is done stays, the same command goes on") from None
        finally:
            os.close(handle)

    # -- what it knows -----------------------------------------------------------------------------------------------

    def history(self, tolerance: NDArray[np.float64] | None = None) -> History:
        """Its history, beside a learner; a new one if a tolerance is given.

        Raises:
            FleetError: there is none. LibraryError: it is damaged or of another policy.
        """
        if tolerance is None and not (self.folder / HISTORY).is_file():
            raise FleetError(f"{self.folder}: has no {HISTORY} yet; pull, or let the robot learn, first")
        return History(
            self.folder / HISTORY,
            self.policy.sha256,
            self.policy.card,
            () if tolerance is None else tolerance,
            alone=False,
        )

    def find(self, text: str, lift: bool) -> str:
        """The item whose name, or its beginning, a user gave.

        Args:
            lift: among withdrawals instead of experts and takeovers.

        Raises:
            FleetError: there is none, or more than one.
        """
        if lift:
            names = set(self.tombstones().tombstones)
        else:
            with self.history() as history:
                names = history.known() | set(self.events().takeovers)
        found = [text] if text in names else sorted(name for name in names if name.startswith(text))
        if len(found) != 1:
            what = "withdrawals" if lift else "experts and takeovers"
            raise FleetError(f"{self.folder}: {len(found)} of {len(names)} {what} have names that start with {text!r}")
        return found[0]

    def tombstones(self) -> Items:
        files = sorted((self.fleet / "tombstones").glob("*.json"))
        return Items(tombstones={path.stem: path.read_bytes() for path in files})

    def events(self) -> Items:
        """Takeovers and tombstones."""
        return Items(takeovers=corrections.told(self.folder, self.name)) | self.tombstones()

    # -- what it takes in --------------------------------------------------------------------------------------------

    def merge(self, items: Items, source: str, progress: Progress = lambda text: None) -> Merged:
        """Take in what somebody else told: corrections at once, experts when they are proved.

        Args:
            source: who told it, for the log of what was refused.
        """
        merged = Merged()
        own = self.events()
        for name, data in (items - own).takeovers.items():
            try:
                if corrections.author(name) != self.name or name not in own.takeovers:  # its own say more
                    lines = corrections.check(name, data, self.policy.card, self.policy.sha256)
                    corrections.accept(self.folder, name, lines)
                    merged.takeovers += 1
            except FleetError as error:
                self.refuse(merged, name, source, str(error))
        for stone, data in (items - own).tombstones.items():
            self._write(f"tombstones/{stone}.json", data)
            merged.tombstones += 1
        with self.history() as history:
            known = history.known()
            new = sorted(items.experts.keys() - known)
            found = unpack([items.experts[name] for name in new], self.identity.inputs, self.identity.rows)
            for start in range(0, len(new), _BATCH):
                proved = []
                for k in range(start, min(start + _BATCH, len(new))):
                    if reason := self._prover.refusal(found, k):
                        self.refuse(merged, new[k], source, reason)
                    else:
                        proved.append(k)
                    progress(f"proved {k + 1} of {len(new)} experts again")
                if proved:
                    history.add(found[np.array(proved)], FLEET)
                merged.accepted += len(proved)
        self.settle()
        return merged

    def withdraw(self, stones: Items) -> None:
        """Take in tombstones that were made here."""
        for stone, data in stones.tombstones.items():
            self._write(f"tombstones/{stone}.json", data)
        self.settle()

    def settle(self) -> None:
        """Make history and takeovers agree with the tombstones in force."""
        out = self.tombstones().out()
        corrections.settle(self.folder, self.name, out)
        if not (self.folder / HISTORY).is_file():
            return
        with self.history() as history:
            known, retired = history.known(), history.retired()
            for name in sorted((out.keys() & known) - retired.keys()):
                history.retire([name], BY_FLEET + out[name])
            back = [name for name, why in retired.items() if why.startswith(BY_FLEET) and name not in out]
            if back:
                history.restore(sorted(back), "the fleet gave it back")

    def refuse(self, merged: Merged, what: str, source: str, why: str) -> None:
        """Note, once, that something was not taken in."""
        merged.refused[what] = why
        row = {"what": what, "from": source, "why": why}
        if row not in [{key: old[key] for key in row} for old in self.refused()]:
            with open(self.fleet / "refused.jsonl", "a", encoding="utf-8") as stream:
                stream.write(json.dumps({**row, "at": time.time()}) + "\n")

    def refused(self) -> list[dict[str, str]]:
        """All that was refused so far, oldest first: what, from, why, at."""
        path = self.fleet / "refused.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            try:
                rows.append(json.loads(line))
            except ValueError:  # a process was killed while it wrote
                continue
        return rows

    # -- what it serves ----------------------------------------------------------------------------------------------

    def switch(self) -> bool:
        """Serve what the history holds: write a snapshot, try it, rename it over the one in use; False if nothing new.

        Raises:
            LawsError: the new snapshot failed its self-check; the old one is in use, again or still.
        """
        with self.history() as history:
            library = history.library({"history": HISTORY})
        current = self.folder / SNAPSHOT
        before = self._usable(current)
        if before is not None and before.ids == library.ids:
            return False
        candidate = self.folder / ".library.candidate.laws"
        library.save(candidate)
        self.self_check(candidate)
        if before is not None:
            durable.write(self.folder / PREVIOUS, current.read_bytes())
        os.replace(candidate, current)
        durable.synchronise(self.folder)
        if reason := self.heal():
            raise FleetError(f"{current}: the new snapshot failed its self-check ({reason}); rolled back")
        return True

    def heal(self) -> str | None:
        """Roll back if the snapshot in use fails its self-check; what was wrong with it, or None.

        Raises:
            FleetError: the previous one fails, too, or there is none.
        """
        current, previous = self.folder / SNAPSHOT, self.folder / PREVIOUS
        if not current.exists():
            return None
        try:
            self.self_check(current)
        except LawsError as error:
            reason = str(error)
        else:
            return None
        try:
            self.self_check(previous)
        except LawsError as error:
            raise FleetError(f"{reason}; and there is no earlier snapshot to go back to ({error})") from None
        durable.write(current, previous.read_bytes())
        return reason

    def _usable(self, path: Path) -> Library | None:
        try:
            return Library.load(path)
        except LibraryError:
            return None

    def self_check(self, path: Path) -> None:
        """Open a snapshot as the robot does, and compare its experts with the policy, both executed.

        Raises:
            LawsError: it does not open, or an expert is farther from the policy than its bound.
        """
        library, policy = open_pair(path, self.policy.path)
        CachedPolicy(library, policy)
        c = library.certificates
        formal = np.flatnonzero(c.among(FORMAL))
        if not len(formal):
            return
        rng = np.random.default_rng(int(library.digest, 16))
        index = np.resize(rng.permutation(formal), _SAMPLES)
        x = c.regions.sample(rng, index, 0.5).astype(np.float32)
        inside, _, bound = c.at(index, x)
        rows = decision_rows(policy.actions, policy.card.decision)
        values, wanted = Experts(c, policy).many(index[inside], x[inside]), policy.batch(x[inside])
        if policy.card.decision == "none":  # as it reaches the robot
            values, wanted = policy.decide(values), policy.decide(wanted)
        error = np.abs(wanted.astype(float) @ rows.T - values.astype(float))
        broken = ~(error <= bound[inside]).all(axis=1)
        if broken.any():
            raise LibraryError(f"{path}: expert {library.ids[index[inside][broken][0]]} is beyond its bound here")

    def _write(self, name: str, data: bytes) -> None:
        path = self.fleet / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            durable.write(path, data)
        except OSError as error:
            raise FleetError(f"{path}: cannot be written: {error.strerror}") from None
