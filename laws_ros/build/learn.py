"""Growth from deployment: misses become experts, experts whose traffic stops make room, and come back with it.

A learner runs in a process of its own, at low priority, and shares nothing with the control loop but files: it reads
misses from the history and publishes immutable snapshots, which a router takes over between two control steps.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from laws_ros.core import durable
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.core.retention import expected_savings, retained, sizes
from laws_ros.runtime.history import History
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router
from laws_ros.runtime.takeovers import Takeover, quarantine_of

from .grow import grow

LEFT = 20_000  # unanswered misses that a learner remembers from round to round,
SEEN = 50_000  # and all misses, for lessons over all of them
MORE = 0.5  # when as many are new as this share of what the last such lesson saw, there is another one
WHOLE = 4  # such a lesson may try so many times the certificates of another
EVICTED = "not used enough"  # why an expert was retired that may come back by itself
CORRECTED = "an operator took over there"  # why one was retired until a review releases it


@dataclass(frozen=True)
class Lesson:
    """What one round of learning did.

    Attributes:
        library: the new snapshot; None if nothing changed.
        misses: how many were waiting.
        news: those that the library of before did not answer, and what earlier rounds left.
        added, retired: experts; `restored`: had been retired for lack of use, and answer misses again.
    """

    library: Library | None
    misses: int
    news: int
    added: int
    retired: int
    restored: int


class Learner:
    """Turns the misses in a history into certified experts.

    A round has few observations of each kind, and a box around few of them is too small for the next ones. So whenever
    all misses that are remembered have become half as many more, there is a lesson over all of them; as their sizes
    grow like a power, all of these are the work of three builds. The other lessons are over the new misses and those
    that nobody answers yet.

    Args:
        history: of the policy's library, open for writing.
        policy, network: the same model, for execution and for bounds.
        most_experts, most_bytes: beyond, those that are expected to save least time are retired (core.retention).
        most_certificates: tried in one round, up to WHOLE times as many over everything; bounds its time.
        memory: a file for the misses that are remembered from round to round, where each round is a process of its own
            (the fleet's desk); if it is damaged or not of this policy they are forgotten, which `learn` tells.
    """

    def __init__(
        self,
        history: History,
        policy: Policy,
        network: Network,
        most_experts: int = 20_000,
        most_certificates: int = 3000,
        most_bytes: int | None = None,
        memory: Path | None = None,
    ) -> None:
        self.history, self.policy, self.network = history, policy, network
        self.most_experts, self.most_bytes, self.most_certificates = most_experts, most_bytes, most_certificates
        self.library, self._evicted = history.library(), history.library(retired=EVICTED)
        self._left = self._seen = np.zeros((0, policy.observations), np.float32)
        self._learnt, self._since = 0, 0  # misses in the last lesson over everything, and since then
        self._quarantine = quarantine_of([], policy.observations)
        self._memory = memory
        self._forgot = self._recall()

    def learn(self, now: float | None = None, progress: Callable[[str], None] = lambda text: None) -> Lesson:
        """One round: certify regions around the misses that wait, retire what is not worth its place, and forget them.

        An expert that is stored is on the disk before its misses are forgotten, so a crash costs at most double work.
        """
        if self._forgot:
            progress(self._forgot)
            self._forgot = ""
        at = time.time() if now is None else now
        x, _, last = self.history.misses()
        fresh = self._unanswered(x)
        news = np.concatenate([self._left, fresh])
        restored = self._bring_back(news, at)
        if restored:
            fresh, self._left = self._unanswered(fresh), self._unanswered(self._left)
        missing = np.concatenate([self._left, fresh])
        added = self._teach(fresh, missing, at, progress) if len(fresh) else 0
        # What is too sparse to certify around now may not be with the next misses beside it.
        self._left = self._unanswered(missing)[-LEFT:]
        self._remember()
        self.history.forget_misses(last)
        retired = self._age_out(at)
        changed = added > 0 or retired > 0 or restored > 0
        return Lesson(self.library if changed else None, len(x), len(news), added, retired, restored)

    def _remember(self) -> None:
        if self._memory is None:
            return
        data, counts = io.BytesIO(), np.array([self._learnt, self._since])
        np.savez(data, policy=np.array(self.policy.sha256), left=self._left, seen=self._seen, counts=counts)
        try:
            durable.write(self._memory, data.getvalue())
        except OSError as error:
            raise LibraryError(f"{self._memory}: cannot be written: {error.strerror}") from None

    def _recall(self) -> str:
        """Read the memory; what to tell if it is there and cannot be used, so that lessons begin anew."""
        if self._memory is None:
            return ""
        try:
            with np.load(self._memory) as file:
                if str(file["policy"]) != self.policy.sha256:
                    return f"{self._memory}: misses of another policy; lessons begin anew"
                left, seen, counts = (file[name] for name in ("left", "seen", "counts"))
                self._left, self._seen, (self._learnt, self._since) = left, seen, counts.tolist()
        except FileNotFoundError:
            return ""
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            return f"{self._memory}: damaged ({error}); lessons begin anew"
        return ""

    def publish(self, path: Path) -> Library:
        """Write the library as a snapshot, and go on in its memory, which is that of everyone who opens it."""
        self.library.save(path)
        self.library = Library.load(path)
        return self.library

    def answered(self, hits: dict[str, int], now: float | None = None) -> None:
        """Count what the experts answered, by their ids."""
        self.history.used(hits, now)

    def obey(self, takeovers: list[Takeover]) -> bool:
        """Keep out of the library what operators corrected and no review has released; whether that changed it.

        Nothing is certified again in these volumes (runtime.quarantine), and every expert whose region contains a
        corrected observation is retired, and restored when that observation is released.
        """
        self._quarantine = quarantine_of(takeovers, self.policy.observations)
        ids, certificates = self.history.experts()
        out = np.flatnonzero(self._quarantine.holding(certificates.regions))
        self.history.retire([ids[k] for k in out], CORRECTED)
        ids, certificates = self.history.experts(CORRECTED)
        back = np.flatnonzero(~self._quarantine.holding(certificates.regions))
        self.history.restore([ids[k] for k in back], "released")
        if len(out) or len(back):
            self.library = self.history.library()
        return len(out) > 0 or len(back) > 0

    def _unanswered(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        missed = x[Router(self.library, self.history.tolerance).many(x) < 0]
        return missed[~self._quarantine.many(missed)]

    def _teach(
        self,
        fresh: NDArray[np.float32],
        missing: NDArray[np.float32],
        at: float,
        progress: Callable[[str], None],
    ) -> int:
        """A lesson over everything if it is time for one, else over what is missing; how many experts it added."""
        self._seen, self._since = np.concatenate([self._seen, fresh])[-SEEN:], self._since + len(fresh)
        most, material = self.most_certificates, missing
        if self._since < MORE * self._learnt:
            most = min(most, max(64, len(fresh)))
        else:
            material = self._seen[~self._quarantine.many(self._seen)]
            most = max(most, min(WHOLE * most, len(material) // 2))
            self._learnt, self._since = len(self._seen), 0
        growth = grow(
            self.policy,
            self.network,
            material,
            self.policy.batch(material),
            self.history.tolerance,
            max_certificates=most,
            progress=progress,
            keep_out=None if self._quarantine.empty else self._quarantine.touching,
        )
        ids = self.history.add(growth.library.certificates, "learner")
        # what an expert would have answered of the new misses is the first guess at what it will
        found = Router(growth.library, self.history.tolerance).many(fresh)
        hits = np.bincount(found[found >= 0], minlength=len(ids))
        self.history.used(dict(zip(ids, hits.tolist(), strict=True)), at)
        self.library = self.history.library()
        return len(ids)

    def _bring_back(self, x: NDArray[np.float32], at: float) -> int:
        """Restore the evicted experts that answer some of these observations: cheaper than to certify again."""
        if not len(self._evicted) or not len(x):
            return 0
        found = Router(self._evicted, self.history.tolerance).many(x)
        index, hits = np.unique(found[found >= 0], return_counts=True)
        if not len(index):
            return 0
        index, hits = (
            part[~self._quarantine.touching(self._evicted.certificates.regions[index])] for part in (index, hits)
        )
        ids = [self._evicted.ids[k] for k in index]
        self.history.restore(ids, "its traffic came back")
        self.history.used(dict(zip(ids, hits.tolist(), strict=True)), at)
        self.library, self._evicted = self.history.library(), self.history.library(retired=EVICTED)
        return len(ids)

    def _age_out(self, at: float) -> int:
        """Retire the experts that the budget has no room for; they stay in the history."""
        ids, certificates = self.library.ids, self.library.certificates
        size = sizes(certificates)
        if len(ids) <= self.most_experts and (self.most_bytes is None or size.sum() <= self.most_bytes):
            return 0
        uses = self.history.uses()
        recent = np.array([self.history.faded(uses[name], at) if name in uses else 0.0 for name in ids])
        savings = expected_savings(recent, certificates.cost, self.network.parameters)
        kept = retained(savings, size, self.most_experts, self.most_bytes)
        out = [ids[k] for k in np.flatnonzero(~kept)]
        self.history.retire(out, EVICTED)
        self.library, self._evicted = self.history.library(), self.history.library(retired=EVICTED)
        return len(out)
