"""Any-match routing: from an observation to the first listed region whose bound at this very observation is enough.

Plain loops over a few flat arrays, in the subset of Python that numba compiles: `runtime.routing` compiles this very
function, so there is one router, and it runs without numba too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .certificate import FORMAL, Certificates
from .trie import Trie

Floats = NDArray[np.float64]


class Tables(NamedTuple):
    """A library as the router reads it. All but the first two are the library's own arrays, not copies.

    Attributes:
        nodes: [K, 4] of every trie node its axis, threshold and two children; of a leaf -1, 0, and where its members
            begin and end. One row is half a cache line, and all that a question costs.
        members: regions listed at leaves; only those of the kinds that may answer.
        center ... round: of `Certificates`.
    """

    nodes: Floats
    members: NDArray[np.int32]
    center: Floats
    transform: Floats
    bound_weight: Floats
    bound_offset: Floats
    expert_weight: NDArray[np.float32]
    expert_bias: NDArray[np.float32]
    round: NDArray[np.int32]

    @classmethod
    def of(cls, certificates: Certificates, trie: Trie, kinds: Iterable[str] = FORMAL) -> Tables:
        """Lay a library out for the router; regions of other kinds are in no list, so they never answer.

        Raises:
            ValueError: the trie lists regions that are not there, or arrays do not fit together (compiled code would
                read past an end).
        """
        count = len(certificates)
        if trie.members.size and not 0 <= trie.members.min() <= trie.members.max() < count:
            raise ValueError(f"the trie lists region {trie.members.max()} of a library of {count}")
        listed = certificates.among(kinds)[trie.members]
        first = np.concatenate([[0], np.cumsum(listed)])[trie.first]
        leaf = trie.axis < 0
        nodes = np.stack([trie.axis, trie.threshold, trie.low, trie.high], axis=1)
        nodes[leaf] = np.stack([np.full(len(leaf), -1), np.zeros(len(leaf)), first[:-1], first[1:]], axis=1)[leaf]
        rows, n = certificates.expert_weight.shape[1:]
        shapes = {"center": (n,), "transform": (n, n), "bound_weight": (rows, n), "bound_offset": (rows,)}
        shapes |= {"expert_weight": (rows, n), "expert_bias": (rows,), "round": ()}
        types = {"expert_weight": np.float32, "expert_bias": np.float32, "round": np.int32}
        own: dict[str, NDArray[Any]] = {}
        for name, shape in shapes.items():
            own[name] = np.ascontiguousarray(getattr(certificates, name), types.get(name, float))
            if own[name].shape != (count, *shape):
                raise ValueError(f"certificates.{name} has shape {own[name].shape}, not {(count, *shape)}")
        return cls(np.ascontiguousarray(nodes, dtype=float), np.array(trie.members[listed], np.int32), **own)


def route(
    x: NDArray[np.float32],
    tolerance: Floats,
    alternatives: int,
    nodes: Floats,
    members: NDArray[np.int32],
    center: Floats,
    transform: Floats,
    bound_weight: Floats,
    bound_offset: Floats,
    expert_weight: NDArray[np.float32],
    expert_bias: NDArray[np.float32],
    round: NDArray[np.int32],
    offset: Floats,
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
        nodes ... round: Tables.
        offset, xi [n], bound [r], wins [m]: scratch space; after a hit, `bound` holds the certified bounds.

    Returns:
        The region's index, or -1 when the full policy must answer. An observation with a NaN is in no region.
    """
    node = 0
    while nodes[node, 0] >= 0.0:
        node = int(nodes[node, 2] if x[int(nodes[node, 0])] < nodes[node, 1] else nodes[node, 3])
    inputs, rows = len(xi), len(bound)
    for k in range(int(nodes[node, 2]), int(nodes[node, 3])):
        region = members[k]
        for j in range(inputs):
            offset[j] = x[j] - center[region, j]
        inside = True
        squares, box = 0.0, inputs - round[region]
        for i in range(inputs):
            total = 0.0
            for j in range(inputs):
                total += transform[region, i, j] * offset[j]
            if i >= box:
                squares += total * total
            if not (squares <= 1.0 if i >= box else abs(total) <= 1.0):
                inside = False
                break
            xi[i] = total
        if not inside:
            continue
        for r in range(rows):
            total = bound_offset[region, r]
            for i in range(inputs):
                total += bound_weight[region, r, i] * xi[i]
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
                value = np.float64(expert_bias[region, row])  # float() of a float32 stays one in compiled code
                for i in range(inputs):
                    value += np.float64(expert_weight[region, row, i]) * x[i]
                if value - bound[row] > 0.0:
                    wins[a] += 1
                elif value + bound[row] < 0.0:
                    wins[b] += 1
                row += 1
        for a in range(alternatives):
            if wins[a] == alternatives - 1:
                return int(region)
    return -1
