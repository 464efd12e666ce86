"""The probabilistic trie: keys from the sensors, walked to the regions that may contain an observation.

A key's symbols answer questions about one sensor each: first the discrete context (station, mode), until it is known,
then successive refinement of the continuous observations ("pole angle < 0.03 rad?"). Every region is listed at every
leaf whose cell it can touch, so a walk to one leaf sees all regions that contain the observation: routing is any-match
over the *set* of regions, whatever order they came in, and adding a region never takes an answer away.

Edges carry visit counts; probabilities are their Krichevsky-Trofimov estimates (arXiv:2604.06228).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from .region import Regions, swing

LEAF = -1
THRESHOLDS = 15  # tried on every axis, when questions are made from a set of regions
MOST = 0.9  # of the regions may be left on either side of a question


@dataclass(frozen=True)
class Trie:
    """A trie of K nodes in flat arrays, node 0 the root; what the compiled router walks.

    Attributes:
        axis [K]: the observation that the node asks about, or LEAF.
        threshold [K]: x[axis] < threshold goes to `low`, else to `high`.
        low, high [K]: child nodes.
        visits [K]: observations that passed the node.
        first [K + 1], members: leaf k lists the regions members[first[k]:first[k + 1]], preferred ones first.
    """

    axis: NDArray[np.int32]
    threshold: NDArray[np.float64]
    low: NDArray[np.int32]
    high: NDArray[np.int32]
    visits: NDArray[np.int64]
    first: NDArray[np.int64]
    members: NDArray[np.int32]

    @classmethod
    def root(cls) -> Trie:
        """A trie of one leaf."""
        none = np.array([LEAF], np.int32)
        return cls(none, np.zeros(1), none, none, np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros(0, np.int32))

    @property
    def leaves(self) -> int:
        return int((self.axis == LEAF).sum())

    def edge_probability(self, node: int, high: bool) -> float:
        """KT estimate of going to a child of `node`: (visits of the child + 1/2) / (visits of both + 1)."""
        low_visits, high_visits = (int(self.visits[k[node]]) for k in (self.low, self.high))
        return ((high_visits if high else low_visits) + 0.5) / (low_visits + high_visits + 1.0)

    def probabilities(self) -> NDArray[np.float64]:
        """[K]: the probability of reaching each node, the product of its edges'."""
        result = np.ones(len(self.axis))
        for node in range(len(self.axis)):  # children always come after their parent
            if self.axis[node] != LEAF:
                for child, high in ((self.low[node], False), (self.high[node], True)):
                    result[child] = result[node] * self.edge_probability(node, high)
        return result

    def key(self, x: Sequence[float] | NDArray[np.floating]) -> list[tuple[int, bool]]:
        """The key of an observation: per node on its way, (node, went to `high`); the leaf is `leaf(x)`."""
        node, path = 0, []
        while self.axis[node] != LEAF:
            high = not x[self.axis[node]] < self.threshold[node]
            path.append((node, high))
            node = int((self.high if high else self.low)[node])
        return path

    def leaf(self, x: Sequence[float] | NDArray[np.floating]) -> int:
        path = self.key(x)
        return int((self.high if path[-1][1] else self.low)[path[-1][0]]) if path else 0

    @classmethod
    def over(cls, regions: Regions, context: Sequence[int] = (), leaf: int = 8) -> Trie:
        """Questions that tell a set of regions apart; they depend on the set only, not on its order or history.

        Args:
            context: discrete observations, asked about first.
            leaf: a node that lists no more regions than this is not split further.

        Returns:
            A trie without members; `with_regions` lists them.
        """
        low, high = _reach(regions)
        splitter = Splitter()
        stack = [(0, np.flatnonzero(np.isfinite(low).all(axis=1) & np.isfinite(high).all(axis=1)))]
        while stack:
            node, here = stack.pop()
            choice = _division(regions.center[here], low[here], high[here], context, leaf)
            if choice is not None:
                axis, threshold = choice
                below, above = splitter.split(node, axis, threshold)
                stack += [(below, here[low[here, axis] < threshold]), (above, here[high[here, axis] >= threshold])]
        return splitter.trie()

    def with_regions(self, regions: Regions, preference: NDArray[np.intp]) -> Trie:
        """The same questions and counts with new lists of members.

        Args:
            regions: all regions; member indices refer to them.
            preference: [E] a permutation of region indices, preferred first; fixes the order within every leaf, so
                that the answer does not depend on the order in which regions were made.
        """
        low, high = _reach(regions)
        usable = np.asarray(np.isfinite(low).all(axis=1) & np.isfinite(high).all(axis=1))
        lists: list[NDArray[np.intp]] = [np.zeros(0, np.intp)] * len(self.axis)
        stack = [(0, preference[usable[preference]])]
        while stack:
            node, here = stack.pop()
            if self.axis[node] == LEAF:
                lists[node] = here
                continue
            axis, threshold = self.axis[node], self.threshold[node]
            stack.append((int(self.low[node]), here[low[here, axis] < threshold]))
            stack.append((int(self.high[node]), here[high[here, axis] >= threshold]))
        first = np.concatenate([[0], np.cumsum([len(k) for k in lists])]).astype(np.int64)
        return Trie(
            self.axis, self.threshold, self.low, self.high, self.visits, first, np.concatenate(lists).astype(np.int32)
        )

    def counted(self, x: NDArray[np.floating]) -> Trie:
        """The same trie with visit counts of observations x [N, n] added."""
        visits = self.visits.copy()
        stack = [(0, np.arange(len(x)))]
        while stack:
            node, here = stack.pop()
            visits[node] += len(here)
            if self.axis[node] != LEAF and len(here):
                low = x[here, self.axis[node]] < self.threshold[node]
                stack += [(int(self.low[node]), here[low]), (int(self.high[node]), here[~low])]
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Trie(**{**values, "visits": visits})


def _reach(regions: Regions) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[E, n]: the least and the greatest value of every observation in every region, rounded outward."""
    generators, _ = regions.generators()
    reach = np.nextafter(swing(generators, regions.ball) * (1 + 1e-12), np.inf)
    return np.nextafter(regions.center - reach, -np.inf), np.nextafter(regions.center + reach, np.inf)


def _division(
    center: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    context: Sequence[int],
    leaf: int,
) -> tuple[int, float] | None:
    """The question (axis, threshold) after which the fewest regions are left to test; None if none pays.

    Observations are thought to be where the regions' centers are. All is counted in whole numbers, so that the order of
    the regions changes nothing.
    """
    count = len(center)
    if count <= leaf:
        return None
    for axis in context:  # between two values of a discrete observation
        values = np.unique(np.round(center[:, axis]))
        if len(values) > 1:
            return axis, float(values[len(values) // 2] - 0.5)
    ends = np.sort(np.concatenate([low, high]), axis=0)  # between two of them, no other threshold does better
    threshold = ends[np.linspace(0, 2 * count - 1, THRESHOLDS + 2).astype(int)[1:-1]]
    below = (center < threshold[:, None]).sum(axis=1)
    lower: NDArray[np.int64] = (low < threshold[:, None]).sum(axis=1)
    upper: NDArray[np.int64] = (high >= threshold[:, None]).sum(axis=1)
    left = lower * below + upper * (count - below)
    # a side that keeps nearly all of them would only lengthen the walk, and the lists
    left[np.maximum(lower, upper) > MOST * count] = count * count
    k, axis = divmod(int(np.argmin(left)), left.shape[1])
    return (axis, float(threshold[k, axis])) if left[k, axis] < count * count else None


class Splitter:
    """A trie under construction: leaves are split one by one."""

    def __init__(self) -> None:
        self.axis, self.threshold, self.low, self.high, self.visits = [LEAF], [0.0], [LEAF], [LEAF], [0]

    def split(self, node: int, axis: int, threshold: float) -> tuple[int, int]:
        """Turn a leaf into a question x[axis] < threshold; returns its low and high child."""
        children = len(self.axis), len(self.axis) + 1
        self.axis[node], self.threshold[node] = axis, threshold
        self.low[node], self.high[node] = children
        for values, blank in (
            (self.axis, LEAF),
            (self.threshold, 0.0),
            (self.low, LEAF),
            (self.high, LEAF),
            (self.visits, 0),
        ):
            values += [blank, blank]
        return children

    def trie(self) -> Trie:
        count = len(self.axis)
        return Trie(
            np.array(self.axis, np.int32),
            np.array(self.threshold),
            np.array(self.low, np.int32),
            np.array(self.high, np.int32),
            np.array(self.visits, np.int64),
            np.zeros(count + 1, np.int64),
            np.zeros(0, np.int32),
        )
