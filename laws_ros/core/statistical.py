"""Evidence of kind `statistical`: a bound that was tested, not proved.

Of n observations drawn independently from what a policy meets in a region, k exceeded the expert's bound. Then with
confidence 1 - beta at most the fraction p of that region's traffic exceeds it, where p solves P(Binomial(n, p) <= k) =
beta: the one-sided limit of Clopper and Pearson (Biometrika 26, 1934), exact for every n and k. It speaks about the
traffic that was sampled and about no single observation, so it is never called formal.

Observations of one episode resemble each other, so an episode gives a region one draw at most (`drawn`). An episode
counts by the time that it spends in the region, up to `stay` observations, and all of that time alike: it is taken with
probability min(visits, stay) / stay, and then one of its visits at random. Draws of different episodes are independent,
whatever those of one have in common, and regions share episodes without harm: the union bound asks for no independence.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .region import Regions

_RECORD = struct.Struct("<ddqqq32sq")
_BEFORE_STAYS = _RECORD.size - 8  # bytes of older records, which end before `stay`


@dataclass(frozen=True)
class Evidence:
    """What was seen when a region was tested.

    Attributes:
        delta: the fraction of the region's traffic that may exceed the bound.
        beta: the probability of having been that unlucky, already divided by the number of regions that were tested
            together (union bound), so that all statements of a library hold at once with the build's confidence.
        samples: fresh observations inside the region. exceedances: how many of them exceeded the bound in some row.
        episodes: how many episodes they come from; where that is not one each, they show nothing.
        source: sha256 of what produced them (workload, policy, seed, number of episodes).
        stay: observations up to which an episode's time in the region counts; 0 in records older than this: every
            observation of the traffic counted alike.
    """

    delta: float
    beta: float
    samples: int
    exceedances: int
    episodes: int
    source: bytes
    stay: int = 0

    @property
    def limit(self) -> float:
        """The largest exceedance fraction that the samples leave possible at confidence 1 - beta."""
        return upper_limit(self.exceedances, self.samples, self.beta)

    @property
    def holds(self) -> bool:
        return self.samples == self.episodes and self.limit <= self.delta

    def record(self) -> NDArray[np.uint8]:
        """As stored with a certificate."""
        fields = self.delta, self.beta, self.samples, self.exceedances, self.episodes, self.source, self.stay
        return np.frombuffer(_RECORD.pack(*fields), np.uint8)

    @classmethod
    def read(cls, record: NDArray[np.uint8]) -> Evidence:
        return cls(*_RECORD.unpack(record.tobytes().ljust(_RECORD.size, b"\0")))

    @classmethod
    def inconsistency(cls, record: NDArray[np.uint8]) -> str | None:
        """What is wrong with a record, if anything."""
        if len(record) not in (_RECORD.size, _BEFORE_STAYS):
            return f"its evidence has {len(record)} bytes, {_RECORD.size} are needed"
        e = cls.read(record)
        fractions = 0 < e.delta < 1 and 0 < e.beta < 1
        counts = 0 <= e.exceedances <= e.samples and 1 <= e.episodes <= e.samples
        return None if fractions and counts and e.stay >= 0 else f"its evidence says nothing ({e})"


def samples_needed(delta: float, beta: float) -> int:
    """The least number of samples that can show a fraction of delta: that of no exceedance at all."""
    return math.ceil(math.log(beta) / math.log1p(-delta))


def log_tail(k: int, n: int, p: float) -> float:
    """log P(Binomial(n, p) <= k), 0 < p < 1, good to 1e-7 for n up to ten million."""
    odds, term = math.log(p) - math.log1p(-p), n * math.log1p(-p)
    terms = [term]
    for i in range(k):
        term += odds + math.log(n - i) - math.log(i + 1)
        terms.append(term)
    peak = max(terms)
    return peak + math.log(math.fsum(math.exp(t - peak) for t in terms))


def upper_limit(k: int, n: int, beta: float) -> float:
    """Clopper and Pearson's upper limit for a fraction of which k in n were seen, at confidence 1 - beta.

    Bisection on the logarithm of the binomial tail, aimed a little below beta; the upper end of the last interval is
    returned: the result errs on the safe side.
    """
    if k >= n:
        return 1.0
    low, high = k / n, 1.0
    while high - low > 1e-12:
        middle = 0.5 * (low + high)
        low, high = (middle, high) if log_tail(k, n, middle) > math.log(beta) - 1e-6 else (low, middle)
    return high


def refuted(k: int, n: int, delta: float, beta: float) -> bool:
    """Do k exceedances in n samples refute, at confidence 1 - beta, that the fraction is at most delta?"""
    return k > 0 and -math.expm1(min(0.0, log_tail(k - 1, n, delta))) <= beta


def drawn(
    regions: Regions, episodes: Sequence[NDArray[np.float32]], stay: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """At most one observation in a region (a batch of one) from each of some episodes [T, n]: float32 [N, n].

    Args:
        stay: as in Evidence; 0 for the longest episode's length.
    """
    x = np.concatenate([np.zeros((0, regions.center.shape[1]), np.float32), *episodes])
    stay = stay or max(map(len, episodes), default=1)
    inside = visits(regions, x)
    owner = np.repeat(np.arange(len(episodes)), [len(e) for e in episodes])[inside]
    count = np.bincount(owner, minlength=len(episodes))
    taken, which = rng.random((2, len(episodes)))  # also for episodes without visits, so that nothing depends on them
    chosen = np.flatnonzero(taken * stay < count)
    first = np.cumsum(count) - count
    return np.asarray(x[inside[first[chosen] + (which[chosen] * count[chosen]).astype(np.intp)]])


def visits(regions: Regions, x: NDArray[np.floating]) -> NDArray[np.intp]:
    """Which of the observations [N, n] are in a region (a batch of one), as the router has it."""
    near = np.abs((x.astype(float) - regions.center[0]) @ regions.transform[0].T) <= 1.0 + 1e-6
    some = np.flatnonzero(near.all(axis=1))  # a matrix product, and then the router's own arithmetic for these
    return some[regions.contains(x[some].astype(float))[:, 0]]
