"""What a controller shares with its robot's folder of state, on a thread of its own, beside the control loop.

Out go takeovers, line by line while they last (runtime/takeovers.py). In come the learner's snapshots and what reviews
have released; the loop takes them over between two steps. Whatever is refused is one line in the log, and what was in
use stays in use.
"""

from __future__ import annotations

import queue
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from laws_ros.core.certificate import Certificates, decision_rows
from laws_ros.core.errors import ConfigError, LawsError
from laws_ros.core.library import Library
from laws_ros.core.trie import Trie
from laws_ros.runtime import takeovers
from laws_ros.runtime.cached_policy import CachedPolicy, check_tolerance
from laws_ros.runtime.files import resolve
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.providers import choose
from laws_ros.runtime.takeovers import SNAPSHOT, Correction

from .loop import ControlLoop, Update

POLL_S = 1.0


def state_folder(node: Any, text: str) -> Path | None:
    """The folder that the parameter `state` means, one for each namespace; None where nothing is kept."""
    return Path(text).expanduser() / node.get_namespace().strip("/") if text else None


def open_cached(p: dict[str, Any], folder: Path | None, log: Any) -> CachedPolicy:
    """The policy of the parameters behind the newest library that there is: the snapshot, `library`, or an empty one.

    Raises:
        LawsError: a file is missing or damaged, they do not belong together, or an argument is wrong.
    """
    options: dict[str, Any] = {
        "tolerance": list(p["tolerance"]) or None,
        "kinds": list(p["certificates.kinds"]) or None,
    }
    engine = choose(list(p["providers"]), log.warning)
    path, snapshot = resolve(p["policy"]), folder / SNAPSHOT if folder is not None else None
    if snapshot is not None and snapshot.is_file():
        try:
            return CachedPolicy.open(snapshot, path, engine=engine, **options)
        except LawsError as error:
            if not p["library"]:
                raise
            log.error(f"snapshot refused: {error}; beginning with {p['library']}")
    if p["library"]:
        return CachedPolicy.open(resolve(p["library"]), path, engine=engine, **options)
    policy = Policy(path, engine=engine)
    if options["tolerance"] is None and policy.card.decision == "none":
        raise ConfigError("parameter 'tolerance' is not set; without a 'library' it is what the learner certifies for")
    return CachedPolicy(empty(policy, options["tolerance"]), policy, **options)


def empty(policy: Policy, tolerance: list[float] | None) -> Library:
    """A library that answers nothing."""
    card = policy.card
    none = Certificates.none(len(card.observations), len(decision_rows(len(card.actions), card.decision)))
    limits = check_tolerance(tolerance or [0.0], policy)
    return Library(policy.sha256, card, limits, none, Trie.root(), np.zeros(0, np.int64))


class Upkeep:
    """See the module; runs from `start` to `stop`.

    Args:
        owner: the controller's node, for its name and log.
        folder: of the robot's state; None: takeovers are remembered by the loop alone.
    """

    def __init__(self, owner: Any, loop: ControlLoop, folder: Path | None) -> None:
        self._owner, self._loop, self._folder = owner, loop, folder
        self._seen: tuple[Any, ...] = ()  # of the folder; everything is read again at first
        self._inbox: queue.SimpleQueue[tuple[Correction | None, Library] | None] = queue.SimpleQueue()
        self._cached = self._newest = loop.cached  # in use when last looked at; last offered
        self._kept, self._dropped = 0, 0  # corrections on the disk; offers dropped
        self._log: takeovers.Log | None = None
        self._waiting: list[tuple[Correction, Library]] = []  # not on the disk yet
        self._observations: list[Any] = []
        self._complained = self._operated = self._closing = False
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def corrected(self, correction: Correction | None) -> None:
        """For the control thread: a step of a takeover, or its end."""
        self._inbox.put((correction, self._loop.cached.library))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Once the loop has stopped: what it said is on the disk when this returns."""
        self._closing = True
        if self._thread.ident is not None:
            self._inbox.put(None)
            self._thread.join()

    def _run(self) -> None:
        going_on = True
        while going_on:
            items = self._items()
            going_on = None not in items
            try:
                self._serve([item for item in items if item is not None])
            except Exception:  # must not end: it is who keeps what a human corrected
                self._owner.get_logger().fatal(traceback.format_exc())

    def _items(self) -> list[tuple[Correction | None, Library] | None]:
        """Everything that waits, or nothing after POLL_S."""
        items: list[tuple[Correction | None, Library] | None] = []
        try:
            items.append(self._inbox.get(timeout=POLL_S))
            while not self._inbox.empty():
                items.append(self._inbox.get())
        except queue.Empty:
            pass
        return items

    def _serve(self, items: list[tuple[Correction | None, Library]]) -> None:
        for correction, library in items:
            if correction is not None:
                self._begin()
                self._waiting.append((correction, library))
                self._observations.append(correction.observation)
            else:
                self._write()
                self._end()
        self._write()
        if self._loop.cached is not self._cached:
            before, self._cached = self._cached, self._loop.cached
            old, new = before.library, self._cached.library
            if new is not old:
                self._info(f"library {old.digest} -> {new.digest}: {len(old)} -> {len(new)} regions")
        if self._folder is not None and not self._operated and not self._waiting:
            self._look(self._folder)

    # ------------------------------------------------------------------------------------------- takeovers go out

    def _begin(self) -> None:
        if not self._operated:
            self._operated = True
            kept = "until it is reviewed" if self._folder is not None else "until this process ends: set 'state'"
            self._owner.get_logger().warning(
                f"the operator takes over; the library does not answer again where that happens, {kept}"
            )

    def _write(self) -> None:
        if self._folder is None or not self._waiting:
            self._waiting.clear()
            return
        policy = self._loop.cached.policy
        try:
            if self._log is None:
                name = self._owner.get_fully_qualified_name()
                self._log = takeovers.Log(self._folder, name, policy.card, policy.sha256)
            while self._waiting:
                library = self._waiting[0][1]
                part = [c for c, of in self._waiting if of is library]
                self._log.add(part, library)
                self._kept += len(part)
                self._waiting = [pair for pair in self._waiting if pair[1] is not library]
            self._complained = False
        except LawsError as error:
            if not self._complained:
                self._complained = True
                self._owner.get_logger().error(f"takeover not kept, trying again: {error}")

    def _end(self) -> None:
        count, volumes = len(self._observations), self._loop.quarantine.count
        name = "" if self._log is None else f"takeover {self._log.id}: "
        if self._log is not None and not self._waiting and not self._closing:  # the answers can be had later, too
            try:
                own = Policy(self._loop.cached.policy.path)  # the loop's is not for two threads
                own.card = self._loop.cached.card
                self._log.end(own.decide(own.batch(np.array(self._observations, np.float32))))
            except LawsError as error:
                self._owner.get_logger().error(f"takeover {self._log.id}: the policy's answers are not kept: {error}")
        if not self._waiting:
            self._log = None
        self._info(f"{name}the operator has handed back after {count} steps; {volumes} regions are in quarantine")
        self._operated, self._observations = False, []

    # ------------------------------------------------------------------------------------------- news comes in

    def _look(self, folder: Path) -> None:
        """Offer the loop what has changed, together with everything that it said was corrected.

        What it corrects meanwhile is not among `_kept`, so that it drops the offer, and gets another one.
        """
        loop, log = self._loop, self._owner.get_logger()
        if loop.dropped_updates != self._dropped:
            self._seen, self._dropped = (), loop.dropped_updates
        seen = takeovers.signature(folder)
        if seen == self._seen:
            return
        snapshot_changed = self._seen[:1] != seen[:1]
        self._seen = seen
        if snapshot_changed and (folder / SNAPSHOT).is_file():
            policy, now = self._newest.policy, self._newest.library
            try:
                library = Library.load(folder / SNAPSHOT)
                library.check_policy(policy.sha256, policy.card, str(folder / SNAPSHOT), str(policy.path))
                if library.digest != now.digest:
                    tolerance = self._newest.tolerance.tolist() or None
                    self._newest = CachedPolicy(library, policy, tolerance, self._newest.kinds)
            except LawsError as error:
                log.error(f"snapshot refused: {error}; library {now.digest} stays")
        card = self._newest.card
        try:
            quarantine = takeovers.quarantine_of(
                takeovers.read(folder, card), len(card.observations), self._newest.library
            )
        except LawsError as error:
            log.error(f"takeovers refused: {error}; library and quarantine stay as they are")
            return
        loop.renew(Update(self._newest, quarantine, self._kept))

    def _info(self, text: str) -> None:
        self._owner.get_logger().info(text)
