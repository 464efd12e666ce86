"""The router of `core.router`, compiled where numba is installed, over one library's tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core import router
from laws_ros.core.certificate import FORMAL
from laws_ros.core.library import Library
from laws_ros.core.router import Tables

try:
    from numba import njit
except ImportError:  # the same functions run uncompiled, some hundred times slower
    _route = router.route
else:
    _route = njit(cache=True, nogil=True)(router.route)


def _route_many(xs, found, *rest):  # type: ignore[no-untyped-def]  # numba infers the types
    for k in range(len(xs)):
        found[k] = _route(xs[k], *rest)


if _route is not router.route:
    _route_many = njit(nogil=True)(_route_many)


class Router:
    """Finds the region that answers an observation; not thread-safe, because it writes into its own scratch space.

    Attributes:
        observation: float32 [n], the last one routed.
        bound: [r] after a hit on a continuous library, the certified bounds at the query, action units.
        wins: [m] after a hit on a decision library, pairs won by each alternative; the largest is the decision.
    """

    def __init__(self, library: Library, tolerance: NDArray[np.float64], kinds: Iterable[str] = FORMAL) -> None:
        card = library.card
        rows, discrete = library.certificates.bound_offset.shape[1], card.decision != "none"
        self.observation = np.zeros(len(card.observations), np.float32)
        self.bound, self.wins = np.zeros(rows), np.zeros(len(card.actions), np.int64)
        self._arguments: tuple[Any, ...] = (
            np.zeros(rows) if discrete else np.array(tolerance, dtype=float),
            len(card.actions) if discrete else 0,
            *Tables.of(library.certificates, library.trie, kinds),
            np.zeros(len(card.observations)),
            self.bound,
            self.wins,
        )
        self(self.observation)  # compiles before control starts

    def __call__(self, observation: NDArray[Any]) -> int:
        """The index of the region that answers observation [n], or -1."""
        self.observation[:] = observation
        region: int = _route(self.observation, *self._arguments)
        return region

    def set_tolerance(self, tolerance: NDArray[np.float64]) -> None:
        """Other tolerances [r] from the next observation on; nothing is rebuilt. Without effect on a decision."""
        self._arguments[0][:] = tolerance if len(tolerance) else 0.0

    def many(self, observations: NDArray[Any]) -> NDArray[np.int64]:
        """The same for observations [N, n]."""
        found = np.empty(len(observations), np.int64)
        _route_many(np.ascontiguousarray(observations, dtype=np.float32), found, *self._arguments)
        return found
