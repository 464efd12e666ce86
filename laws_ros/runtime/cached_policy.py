"""The library in front of the policy: what a control loop calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import COLLAPSED, KINDS, check_kinds
from laws_ros.core.errors import ConfigError, LibraryError, ObservationError
from laws_ros.core.library import Library

from .experts import Experts
from .policy import Policy
from .providers import CPU, Engine
from .routing import Router


class Answer(NamedTuple):
    """An action, who gave it, and how far it can be from the policy's.

    Attributes:
        action: float32 [m] within the card's limits; a decision: float32 [1], the index.
        region: index of the region that answered, -1 for the full policy.
        bound: [m] certified |action - policy(observation)|, action units; zeros for the policy and for decisions.
        kind: of the certificate (core.certificate.KINDS); "policy" for the full policy.
    """

    action: NDArray[np.float32]
    region: int
    bound: NDArray[np.float64]
    kind: str


class CachedPolicy:
    """Answers from certified experts where their bound at the query is within tolerance, else from the policy.

    Actions are clipped to the card's limits. Clipping both the expert's and the policy's answer never increases their
    distance, so bounds hold for what is returned. Not thread-safe: one control loop each.

    Attributes:
        library, policy, card: what it was opened with.
        tolerance: [m] action units; per action.
        kinds: of the certificates that may answer.
    """

    def __init__(
        self,
        library: Library,
        policy: Policy,
        tolerance: Sequence[float] | None = None,
        kinds: Iterable[str] | None = None,
    ) -> None:
        """Raises ConfigError for a tolerance of the wrong length, negative or NaN, or a kind that does not exist;
        LibraryError where the policy runs in another precision than the library was certified for.

        Args:
            tolerance: one for all actions or one each, action units; the library's own if None.
            kinds: of certificates that may answer; None or none at all: the formal ones (core.certificate.FORMAL).
        """
        if library.precision != policy.engine.precision:
            raise LibraryError(
                f"certified for {library.precision}, but {policy.path.name} runs on {policy.engine} in "
                f"{policy.engine.precision}, which is another program; name a provider without a precision"
            )
        self.library, self.policy, self.card = library, policy, policy.card
        self.tolerance = check_tolerance(library.tolerance if tolerance is None else tolerance, policy)
        self._low, self._high = self.card.limits
        self._none = np.zeros(policy.actions if self.card.decision == "none" else 1)
        self.kinds = check_kinds(kinds or ())
        self.router = Router(library, self.tolerance, self.kinds)
        self._kind = [KINDS[code] for code in library.certificates.kind]
        self._experts, self._beyond = None, [False] * len(library)
        if self.card.decision == "none" and len(library):
            self._experts, self._beyond = Experts(library.certificates, policy, self.router), self._may_leave_limits()

    @classmethod
    def open(
        cls,
        library_path: str | Path,
        policy_path: str | Path,
        *,
        tolerance: Sequence[float] | None = None,
        kinds: Iterable[str] | None = None,
        engine: Engine = CPU,
    ) -> CachedPolicy:
        """Open a policy and its library; arguments as above. The policy runs on `engine`, experts on the CPU.

        Raises:
            LawsError: either file is missing or damaged, they do not belong together, or an argument is wrong.
        """
        return cls(*open_pair(library_path, policy_path, engine=engine), tolerance, kinds)

    def set_tolerance(self, tolerance: Sequence[float]) -> None:
        """Other tolerances from the next observation on; cheap, so it may happen between two control steps.

        Raises:
            ConfigError: wrong length, a NaN, negative or infinite; the old ones stay.
        """
        self.tolerance = check_tolerance(tolerance, self.policy)
        self.router.set_tolerance(self.tolerance)

    def lookup(self, observation: NDArray[np.float32]) -> Answer | None:
        """The cheapest certified answer at observation [n], or None where only the policy may answer."""
        region = self.router(observation)
        if region < 0:
            return None
        if self._experts is None:
            return Answer(np.array([self.router.wins.argmax()], np.float32), region, self._none, self._kind[region])
        action = self._experts.routed(region).copy()
        if self._beyond[region]:
            np.minimum(np.maximum(action, self._low, out=action), self._high, out=action)
        return Answer(action, region, self.router.bound.copy(), self._kind[region])

    def fallback(self, observation: NDArray[np.float32]) -> Answer:
        """The full policy's answer at observation [n].

        Raises:
            ObservationError: the policy's output there is not finite; no action can be made of it.
        """
        output = self.policy(observation)
        if not np.isfinite(output).all():
            raise ObservationError(f"the policy answers {output.tolist()} at {observation.tolist()}: not finite")
        return Answer(self.policy.decide(output), -1, self._none, "policy")

    def answer(self, observation: NDArray[np.float32]) -> Answer:
        """The certified answer if there is one, else the policy's."""
        return self.lookup(observation) or self.fallback(observation)

    def _may_leave_limits(self) -> list[bool]:
        """Per expert: does its answer have to be cut to the card's limits somewhere in its region?"""
        every = self.library.certificates
        flags: list[bool] = []
        for start in range(0, len(every), 1024):  # all axes at once would double a large library's memory
            certificates = every[start : start + 1024]
            generators, _ = certificates.regions.generators()
            weight = certificates.expert_weight.astype(float)
            middle = np.einsum("eri,ei->er", weight, certificates.center) + certificates.expert_bias
            swing = np.abs(weight @ generators).sum(axis=2) + 1e-5 * (1.0 + np.abs(middle))
            within = ((middle - swing >= self._low) & (middle + swing <= self._high)).all(axis=1)
            flags += (~within | certificates.among(COLLAPSED)).tolist()
        return flags


def open_pair(
    library_path: str | Path, policy_path: str | Path, threads: int = 1, engine: Engine = CPU
) -> tuple[Library, Policy]:
    """A library and the policy it was made for; a policy without a card takes the library's.

    Raises:
        LawsError: either file is missing or damaged, or they do not belong together.
    """
    policy = Policy(policy_path, threads, engine=engine)
    library = Library.load(library_path)
    if not policy.has_card and len(library.card.observations) == policy.observations:
        policy.card = library.card
    library.check_policy(policy.sha256, policy.card, str(library_path), str(policy_path))
    return library, policy


def check_tolerance(value: Sequence[float] | NDArray[np.float64], policy: Policy) -> NDArray[np.float64]:
    """A tolerance per action from one number for all or a list.

    Raises:
        ConfigError: wrong length, a NaN, negative or infinite.
    """
    if policy.card.decision != "none":
        return np.zeros(0)
    tolerance = np.array(value, dtype=float).reshape(-1)
    if tolerance.size not in (1, policy.actions):
        raise ConfigError(
            f"tolerance {tolerance.tolist()}: {tolerance.size} values for {policy.actions} actions; give one for all "
            "or one each"
        )
    if not (np.isfinite(tolerance) & (tolerance >= 0)).all():
        raise ConfigError(f"tolerance {tolerance.tolist()}: finite values of at least 0 are needed, in action units")
    return np.array(np.broadcast_to(tolerance, policy.actions))
