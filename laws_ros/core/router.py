"""Any-match routing: from an observation to the first listed region whose bound at this very observation is enough.

Plain loops over a few flat arrays, in the subset of Python that numba compiles: `runtime.routing` compiles this very
function, so there is one router, and it runs without numba too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .certificate import FORMAL, Certificates
from .trie import Trie

Floats = NDArray[np.float64]


class Tables(NamedTuple):
    """A library as the router reads it: few arrays, because every argument of a compiled call costs time.

    Attributes:
        nodes: [K, 4] per trie node its axis (negative at a leaf), its two children, and where its members start.
        threshold: [K + 1]; one more, as in `nodes`, so that a leaf's members end where the next node's start.
        members: regions listed at leaves; only those of the kinds that may answer.
        records: [E, *] per region center, transform, and per row bound offset and weight, expert bias and weight.
    """

    nodes: NDArray[np.int64]
    threshold: Floats
    members: NDArray[np.int32]
    records: Floats

    @classmethod
    def of(cls, certificates: Certificates, trie: Trie, kinds: Iterable[str] = FORMAL) -> Tables:
        """Lay a library out for the router; regions of other kinds are in no list, so they never answer.

        Raises:
            ValueError: the trie lists regions that are not there (compiled code would read past the end).
        """
        c, count = certificates, len(certificates)
        if trie.members.size and not 0 <= trie.members.min() <= trie.members.max() < count:
            raise ValueError(f"the trie lists region {trie.members.max()} of a library of {count}")
        rows = np.concatenate(
            [c.bound_offset[..., None], c.bound_weight, c.expert_bias[..., None], c.expert_weight], axis=2, dtype=float
        )
        listed = certificates.among(kinds)[trie.members]
        parts = [k.reshape(count, int(np.prod(k.shape[1:]))) for k in (c.center, c.transform, rows)]
        nodes = np.full((len(trie.first), 4), -1, np.int64)
        nodes[:-1, :3] = np.stack([trie.axis, trie.low, trie.high], axis=1)
        nodes[:, 3] = np.concatenate([[0], np.cumsum(listed)])[trie.first]
        return cls(
            nodes,
            np.append(trie.threshold, 0.0),
            np.array(trie.members[listed], np.int32),
            np.ascontiguousarray(np.concatenate(parts, axis=1)),
        )


def route(
    x: NDArray[np.float32],
    tolerance: Floats,
    alternatives: int,
    nodes: NDArray[np.int64],
    threshold: Floats,
    members: NDArray[np.int32],
    records: Floats,
    xi: Floats,
    bound: Floats,
    wins: NDArray[np.int64],
) -> int:
    """Walk the trie and return the index of the region that answers, or -1.

    Args:
        x: [n] the observation. All arithmetic on it is float64.
        tolerance: [r] largest bound accepted per action; unused for decisions.
        alternatives: 0 for continuous actions; for a decision the number of outputs. A region then answers only if
            one alternative provably beats all others, that is if each of its pairwise differences (rows in the order
            of certificate.decision_pairs) exceeds its bound; `wins` holds the number of pairs each alternative won.
        nodes ... records: Tables.
        xi [n], bound [r], wins [m]: scratch space; after a hit, `bound` holds the certified bounds.

    Returns:
        The region's index, or -1 when the full policy must answer. An observation with a NaN is in no region.
    """
    node = 0
    while nodes[node, 0] >= 0:
        node = nodes[node, 1] if x[nodes[node, 0]] < threshold[node] else nodes[node, 2]
    inputs, rows = len(xi), len(bound)
    for k in range(nodes[node, 3], nodes[node + 1, 3]):
        region = members[k]
        record = records[region]
        inside = True
        for i in range(inputs):
            total = 0.0
            for j in range(inputs):
                total += record[inputs + i * inputs + j] * (x[j] - record[j])
            if not abs(total) <= 1.0:
                inside = False
                break
            xi[i] = total
        if not inside:
            continue
        width = 2 * inputs + 2
        start = inputs + inputs * inputs
        for r in range(rows):
            total = record[start + r * width]
            for i in range(inputs):
                total += record[start + r * width + 1 + i] * xi[i]
            bound[r] = total
            if alternatives == 0 and not total <= tolerance[r]:
                inside = False
                break
        if not inside:
            continue
        if alternatives == 0:
            return int(region)
        for a in range(alternatives):
            wins[a] = 0
        row = 0
        for a in range(alternatives):
            for b in range(a + 1, alternatives):
                at = start + row * width + inputs + 1
                value = record[at]
                for i in range(inputs):
                    value += record[at + 1 + i] * x[i]
                if value - bound[row] > 0.0:
                    wins[a] += 1
                elif value + bound[row] < 0.0:
                    wins[b] += 1
                row += 1
        for a in range(alternatives):
            if wins[a] == alternatives - 1:
                return int(region)
    return -1
