"""The router of `core.router`, compiled where numba is installed, over one library's tables.

The compiled router takes one number, the address of a row of addresses and sizes: numba looks at every array that it
is given, which for all of them takes longer than a short walk.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core import router
from laws_ros.core.certificate import FORMAL
from laws_ros.core.library import Library
from laws_ros.core.router import Tables

FRAME = 24  # numbers in a frame: 8 sizes and 16 addresses

try:
    from numba import carray, njit
    from numba.core import cgutils, types
    from numba.extending import intrinsic
except ImportError:  # the same function runs uncompiled, some hundred times slower
    _framed = None
else:
    _route = njit(cache=True)(router.route)

    def _pointer(context, address):  # type: ignore[no-untyped-def]
        def cast(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], cgutils.voidptr_t)

        return types.voidptr(address), cast

    _at: Any = intrinsic(_pointer)

    def _compiled(version):  # type: ignore[no-untyped-def]
        """`route` for the observations of a frame (see Router._frame); returns the last one's region.

        The version, of route's source, is part of the key under which numba keeps this function on the disk; otherwise
        it would keep the old route when only that other file has changed.
        """

        @njit(cache=True)
        def framed(address):  # type: ignore[no-untyped-def]
            frame = carray(_at(address), (FRAME,), np.int64)
            alternatives, count, n, r, m, nodes, members, regions = frame[:8]
            a = frame[8:]
            x, found = carray(_at(a[0]), (count, n), np.float32), carray(_at(a[1]), (count,), np.int64)
            for k in range(count):
                found[k] = _route(
                    x[k],
                    carray(_at(a[2]), (r,), np.float64),
                    alternatives,
                    carray(_at(a[3]), (nodes, 4), np.float64),
                    carray(_at(a[4]), (members,), np.int32),
                    carray(_at(a[5]), (regions, n), np.float64),
                    carray(_at(a[6]), (regions, n, n), np.float64),
                    carray(_at(a[7]), (regions, r, n), np.float64),
                    carray(_at(a[8]), (regions, r), np.float64),
                    carray(_at(a[9]), (regions, r, n), np.float32),
                    carray(_at(a[10]), (regions, r), np.float32),
                    carray(_at(a[11]), (regions,), np.int32),
                    carray(_at(a[12]), (n,), np.float64),
                    carray(_at(a[13]), (n,), np.float64),
                    carray(_at(a[14]), (r,), np.float64),
                    carray(_at(a[15]), (m,), np.int64),
                )
            return found[count - 1] if version else -1

        return framed

    _framed = _compiled(zlib.crc32(Path(router.__file__).read_bytes()) | 1)


class Router:
    """Finds the region that answers an observation; not thread-safe, because it writes into its own scratch space.

    Attributes:
        extended: float32 [n + 1], the last observation routed, and a 1 (which multiplies an affine expert's bias).
        observation: its first n entries.
        tables: of the library.
        region: int64 [1], what answered it, or -1.
        bound: [r] after a hit on a continuous library, the certified bounds at the query, action units.
        wins: [m] after a hit on a decision library, pairs won by each alternative; the largest is the decision.
    """

    def __init__(self, library: Library, tolerance: NDArray[np.float64], kinds: Iterable[str] = FORMAL) -> None:
        card = library.card
        n, rows, discrete = len(card.observations), library.certificates.bound_offset.shape[1], card.decision != "none"
        self.extended, self.region = np.ones(n + 1, np.float32), np.full(1, -1)
        self.observation = self.extended[:n]
        self.bound, self.wins = np.zeros(rows), np.zeros(len(card.actions), np.int64)
        self.tables = Tables.of(library.certificates, library.trie, kinds)
        self._arguments: tuple[Any, ...] = (
            np.zeros(rows) if discrete else np.array(np.broadcast_to(tolerance, rows), dtype=float),
            len(card.actions) if discrete else 0,
            *self.tables,
            np.zeros(n),
            np.zeros(n),
            self.bound,
            self.wins,
        )
        self._one = self._frame(self.observation[None], self.region)
        self._address: int = self._one.ctypes.data
        self(self.observation)  # compiles before control starts

    def __call__(self, observation: NDArray[Any]) -> int:
        """The index of the region that answers observation [n], or -1."""
        self.observation[:] = observation
        region: int = _framed(self._address) if _framed else self._plain(self.observation[None], self.region)
        return region

    def set_tolerance(self, tolerance: NDArray[np.float64]) -> None:
        """Other tolerances [r] from the next observation on; nothing is rebuilt. Without effect on a decision."""
        self._arguments[0][:] = tolerance if len(tolerance) else 0.0

    def many(self, observations: NDArray[Any]) -> NDArray[np.int64]:
        """The same for observations [N, n]."""
        x = np.ascontiguousarray(observations, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != len(self.observation):  # compiled code would read past the end
            raise ValueError(f"observations of shape {x.shape}; [N, {len(self.observation)}] is needed")
        found = np.empty(len(x), np.int64)
        if len(x):
            frame = self._frame(x, found)
            _framed(frame.ctypes.data) if _framed else self._plain(x, found)
        return found

    def _frame(self, x: NDArray[np.float32], found: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sizes and addresses for routing x [N, n] into found [N]; good for as long as they and this router live."""
        arrays: list[Any] = [x, found, *(a for a in self._arguments if isinstance(a, np.ndarray))]
        _, alternatives, nodes, members, center, *_ = self._arguments
        sizes = [alternatives, *x.shape, len(self.bound), len(self.wins), len(nodes), len(members), len(center)]
        return np.array([*sizes, *(a.ctypes.data for a in arrays)], np.int64)

    def _plain(self, x: NDArray[np.float32], found: NDArray[np.int64]) -> int:
        for k, row in enumerate(x):
            found[k] = router.route(row, *self._arguments)
        return int(found[-1])
