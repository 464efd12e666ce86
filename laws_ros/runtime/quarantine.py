"""Where a human corrected the robot, the library does not answer until someone has reviewed it.

A takeover leaves two things behind: the observations at which the operator was in command, and the regions of the
library that contain one of them, as volumes. The laws, for every observation x (tests/test_takeovers.py):

1. in a volume the library does not answer, whatever regions it has or gets;
2. a region that contains a corrected observation is a volume, in every library that is ever used with this quarantine.

So nothing that was corrected is answered from the library again, in no snapshot, and nor is anything else in the
regions in which it happened. Volumes are tested with the router's own arithmetic.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.library import Library
from laws_ros.core.region import Regions, swing

try:
    from numba import njit
except ImportError:  # the same functions run uncompiled

    def njit(**_):  # type: ignore[no-untyped-def,no-redef]
        return lambda function: function


APART = 1.0 + 1e-6  # of the extents, so that rounding never makes touching volumes look apart


@njit(cache=True, nogil=True)
def _inside(x, center, transform, round):  # type: ignore[no-untyped-def]  # numba infers the types
    squares, box = 0.0, len(x) - round
    for i in range(len(x)):
        total = 0.0
        for j in range(len(x)):
            total += transform[i, j] * (x[j] - center[j])
        if i >= box:
            squares += total * total
        if not (squares <= 1.0 if i >= box else abs(total) <= 1.0):
            return False
    return True


@njit(cache=True, nogil=True)
def _covered(x, center, transform, round, count):  # type: ignore[no-untyped-def]
    for k in range(count):  # noqa: SIM110  # numba compiles no generators
        if _inside(x, center[k], transform[k], round[k]):
            return True
    return False


@njit(cache=True, nogil=True)
def _matched(xs, center, transform, round, of_x, of_region):  # type: ignore[no-untyped-def]
    for k in range(len(xs)):
        for r in range(len(center)):
            if not (of_x[k] and of_region[r]) and _inside(xs[k], center[r], transform[r], round[r]):
                of_x[k] = of_region[r] = True


@njit(cache=True, nogil=True)
def _containing(x, axis, threshold, low, high, first, members, center, transform, round, found):  # type: ignore[no-untyped-def]
    node = 0
    while axis[node] >= 0:
        node = low[node] if x[axis[node]] < threshold[node] else high[node]
    count = 0
    for k in range(first[node], first[node + 1]):
        r = members[k]
        if _inside(x, center[r], transform[r], round[r]):
            found[count] = r
            count += 1
    return count


class Quarantine:
    """Volumes in which the library of one control loop does not answer. Not for several threads at once.

    Args:
        inputs: n, the length of an observation.
        points: [N, n] corrected observations, and volumes: the regions in which that happened, as takeovers left them.
        library: in use; every region of it that contains a point is a volume, too.

    Attributes:
        count: volumes.
    """

    def __init__(
        self,
        inputs: int,
        points: NDArray[np.float32] | None = None,
        volumes: Regions | None = None,
        library: Library | None = None,
    ) -> None:
        self.inputs, self.count, self._library = inputs, 0, library
        self._volumes = Regions(np.zeros((64, inputs)), np.zeros((64, inputs, inputs)))
        self._known: set[bytes] = set()
        self._points: list[NDArray[np.float32]] = []
        for k in range(0 if volumes is None else len(volumes)):
            assert volumes is not None
            self._add(volumes[k : k + 1])
        nowhere = np.zeros(inputs, np.float32)
        self.covers(nowhere)  # compiles before control starts
        if library is not None:
            self._containing(nowhere)
        for x in () if points is None else np.asarray(points, np.float32):
            self.correct(x)

    def covers(self, x: NDArray[np.float32]) -> bool:
        """Whether observation [n] lies in a volume."""
        v = self._volumes
        return bool(_covered(x, v.center, v.transform, v.round, self.count))

    def many(self, x: NDArray[np.float32]) -> NDArray[np.bool_]:
        """The same for observations [N, n]."""
        return self._match(x, self.volumes)[0]

    def correct(self, x: NDArray[np.float32]) -> list[int]:
        """A human corrects what happens at observation [n]; returns the library's regions that contain it."""
        self._points.append(np.array(x, np.float32))
        if self._library is None:
            return []
        regions, found = self._library.certificates.regions, self._containing(self._points[-1])
        for k in found:
            self._add(regions[k : k + 1])
        return found

    @property
    def empty(self) -> bool:
        """Whether nothing was corrected."""
        return not self.count and not self._points

    @property
    def points(self) -> NDArray[np.float32]:
        """[N, n] the corrected observations."""
        return np.array(self._points, np.float32).reshape(-1, self.inputs)

    @property
    def volumes(self) -> Regions:
        """All of them."""
        return self._volumes[: self.count]

    def holding(self, regions: Regions) -> NDArray[np.bool_]:
        """[B]: which regions contain a corrected observation."""
        return self._match(self.points, regions)[1]

    def touching(self, regions: Regions) -> NDArray[np.bool_]:
        """[B]: which regions contain a corrected observation, or may have something in common with a volume.

        Two convex sets have nothing in common if along some direction their extents do not meet; tried are the axes of
        both, and for each the direction in which the other's centre lies, in its own metric. What is not shown to be
        apart counts as touching.
        """
        clear = np.ones(len(regions), dtype=bool)
        with np.errstate(all="ignore"):  # what has no generators is not shown to be apart
            own, volumes = regions.generators()[0], self.volumes
            metrics = [np.einsum("bij,bik->bjk", r.transform, r.transform) for r in (regions, volumes)]
            for k, edges in enumerate(volumes.generators()[0]):
                away = regions.center - volumes.center[k]
                towards = [away @ metrics[1][k], np.einsum("bij,bj->bi", metrics[0], away)]
                axes = np.broadcast_to(volumes.transform[k], regions.transform.shape)
                directions = np.concatenate([axes, regions.transform, np.stack(towards, axis=1)], axis=1)
                distance = np.abs(np.einsum("bdi,bi->bd", directions, away))
                reach = swing(directions @ own, regions.ball) + swing(directions @ edges, volumes.ball[k : k + 1])
                clear &= (distance > APART * reach).any(axis=1)
        return ~clear | self.holding(regions)

    def _match(self, x: NDArray[np.float32], regions: Regions) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Of observations [N, n] which lie in any of some regions, and which regions contain any of them."""
        of_x, of_region = np.zeros(len(x), dtype=bool), np.zeros(len(regions), dtype=bool)
        arrays = regions.center, regions.transform, regions.round
        _matched(np.ascontiguousarray(x, np.float32), *arrays, of_x, of_region)
        return of_x, of_region

    def _containing(self, x: NDArray[np.float32]) -> list[int]:
        """All regions of the library that contain observation [n]; the trie lists each at every leaf it touches."""
        assert self._library is not None
        t, c = self._library.trie, self._library.certificates
        found = np.empty(len(t.members), np.int32)
        where = t.axis, t.threshold, t.low, t.high, t.first, t.members
        return found[: _containing(x, *where, c.center, c.transform, c.round, found)].tolist()  # type: ignore[no-any-return]

    def _add(self, region: Regions) -> None:
        key = b"".join(part.tobytes() for part in (region.center, region.transform, region.round))
        if key in self._known:
            return
        self._known.add(key)
        v = self._volumes
        if self.count == len(v):
            v = self._volumes = Regions(
                *(np.concatenate([part, np.zeros_like(part)]) for part in (v.center, v.transform, v.round))
            )
        for name in ("center", "transform", "round"):
            getattr(v, name)[self.count] = getattr(region, name)[0]
        self.count += 1
