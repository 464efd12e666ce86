"""Growth from deployment: misses become experts, and experts whose traffic stops make room.

A learner runs in a process of its own, at low priority, and shares nothing with the control loop but files: it reads
misses from the history and publishes immutable snapshots, which a router takes over between two control steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.runtime.history import History
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

from .grow import grow

LEFT = 20_000  # unanswered misses that a learner remembers from round to round


@dataclass(frozen=True)
class Lesson:
    """What one round of learning did.

    Attributes:
        library: the new snapshot; None if nothing changed.
        misses: how many were waiting.
        news: those that the library of before did not answer, and what earlier rounds left.
        added, retired: experts.
    """

    library: Library | None
    misses: int
    news: int
    added: int
    retired: int


class Learner:
    """Turns the misses in a history into certified experts.

    Args:
        history: of the policy's library, open for writing.
        policy, network: the same model, for execution and for bounds.
        most_experts: beyond, those that are expected to save least time are retired.
        most_certificates: tried in one round; bounds its time.
    """

    def __init__(
        self,
        history: History,
        policy: Policy,
        network: Network,
        most_experts: int = 20_000,
        most_certificates: int = 3000,
    ) -> None:
        self.history, self.policy, self.network = history, policy, network
        self.most_experts, self.most_certificates = most_experts, most_certificates
        self.library = history.library()
        self._left = np.zeros((0, policy.observations), np.float32)

    def learn(self, now: float | None = None, progress: Callable[[str], None] = lambda text: None) -> Lesson:
        """One round: certify regions around the misses that wait, retire what is not worth its place, and forget them.

        An expert that is stored is on the disk before its misses are forgotten, so a crash costs at most double work.
        """
        at = time.time() if now is None else now
        x, _, last = self.history.misses()
        news = np.concatenate([self._left, self._unanswered(x)])
        added = self._certify(news, at, progress) if len(x) else 0
        self.history.forget_misses(last)
        retired = self._age_out(at)
        changed = added > 0 or retired > 0
        if changed:
            self.library = self.history.library()
        # What is too sparse to certify around now may not be with the next misses beside it.
        self._left = self._unanswered(news)[-LEFT:]
        return Lesson(self.library if changed else None, len(x), len(news), added, retired)

    def answered(self, hits: dict[str, int], now: float | None = None) -> None:
        """Count what the experts answered, by their ids."""
        self.history.used(hits, now)

    def _unanswered(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x[Router(self.library, self.history.tolerance).many(x) < 0]

    def _certify(self, x: NDArray[np.float32], at: float, progress: Callable[[str], None]) -> int:
        if not len(x):
            return 0
        growth = grow(
            self.policy,
            self.network,
            x,
            self.policy.batch(x),
            self.history.tolerance,
            max_certificates=self.most_certificates,
            progress=progress,
        )
        ids = self.history.add(growth.library.certificates, "learner")
        # what an expert would have answered is the first guess at what it will
        self.history.used(dict(zip(ids, growth.library.visits.tolist(), strict=True)), at)
        return len(ids)

    def _age_out(self, at: float) -> int:
        """Retire the experts with the least expected saving: recent answers times multiplications saved by each."""
        ids, certificates = self.history.experts()
        if len(ids) <= self.most_experts:
            return 0
        uses = self.history.uses()
        recent = np.array([self.history.faded(uses[name], at) if name in uses else 0.0 for name in ids])
        worth = recent * np.maximum(self.network.parameters - certificates.cost, 0)
        order = np.argsort(worth, kind="stable")
        out = [ids[k] for k in order[: len(ids) - self.most_experts]]
        self.history.retire(out, "not used enough")
        return len(out)
