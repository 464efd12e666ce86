"""What a library does with traffic: what it answers, how far from the policy and how fast, and why it does not."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import FORMAL, Certificates
from laws_ros.core.library import Library
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.policy import Policy

from .evaluate import policy_rollouts
from .verify import Executed
from .workloads import Workload

Floats = NDArray[np.float64]

NEAR, AWAY = 1.1, 2.0  # half-widths from a region's centre: "just outside", "outside", beyond it "far"
EVERY = 8  # calls of the library to one of the policy alone, when both are timed


@dataclass(frozen=True)
class Traffic:
    """What the library did with a number of observations.

    Attributes:
        x [N, n]: float32. held_out: they come from fresh episodes (or a recording), else from inside the regions.
        found [N]: the region that answers each, -1 for none.
        error, bound [H, r]: of those answered, as executed and as published; formal [H]: is the bound proved?
        hit_us, miss_us, policy_us: single calls: answered; not answered and so with the policy; the policy alone.
    """

    x: NDArray[np.float32]
    held_out: bool
    found: NDArray[np.int64]
    error: Floats
    bound: Floats
    formal: NDArray[np.bool_]
    hit_us: Floats
    miss_us: Floats
    policy_us: Floats

    @property
    def hit_rate(self) -> float:
        return float((self.found >= 0).mean())

    @property
    def violations(self) -> int:
        return int((self.beyond & self.formal).sum())

    @property
    def beyond(self) -> NDArray[np.bool_]:
        """[H]: which answers exceed their bound; one of kind `statistical` may, now and then."""
        return np.asarray(~(self.error <= self.bound).all(axis=1))

    @property
    def used(self) -> Floats:
        """[H]: the largest share of its bound that an answer's error uses."""
        with np.errstate(all="ignore"):
            return np.asarray(np.where(self.error == 0.0, 0.0, self.error / self.bound).max(axis=1))


@dataclass(frozen=True)
class Miss:
    """Why an observation had to go to the policy.

    Attributes:
        row: of the traffic. reason: one of `REASONS`.
        region: the one that comes nearest. by: half-widths from its centre, or, inside it, bound over tolerance.
        blame: the sensor that is furthest out, or the action whose bound is too large.
    """

    row: int
    reason: str
    region: int
    by: float
    blame: str


REASONS = {
    "bound": "inside a region whose bound is too large there",
    "near": f"just outside: within {NEAR:g} half-widths of a region",
    "away": f"outside: within {AWAY:g} half-widths of a region",
    "far": "far from every region: new to the library",
    "nan": "not a finite observation",
}


def driven(policy: Policy, workload: Workload, steps: int, seed: int) -> NDArray[np.float32]:
    if workload.recorded is not None:
        return np.concatenate(workload.recorded)[:steps]
    episodes = math.ceil(steps / workload.spec.episode_steps)
    return np.concatenate(policy_rollouts(policy, workload, episodes, seed).observations)


def inside(library: Library, count: int, seed: int) -> NDArray[np.float32]:
    """Observations [count, n], uniform in regions drawn as often as they were used."""
    rng, c = np.random.default_rng(seed), library.certificates
    share = (library.visits + 0.5) / (library.visits + 0.5).sum()
    index = rng.choice(len(library), count, p=share)
    return np.asarray(c.regions.sample(rng, index), np.float32)


def measure(cached: CachedPolicy, x: NDArray[np.float32], held_out: bool) -> Traffic:
    clock = time.perf_counter_ns
    found = np.zeros(len(x), np.int64)
    hit: list[int] = []
    miss: list[int] = []
    alone: list[int] = []
    for k, observation in enumerate(x):
        start = clock()
        found[k] = cached.answer(observation).region
        (hit if found[k] >= 0 else miss).append(clock() - start)
        if k % EVERY == 0:
            start = clock()
            cached.fallback(observation)
            alone.append(clock() - start)
    answered = np.flatnonzero(found >= 0)
    executed = Executed(cached.policy, cached.library.certificates)
    _, error, bound = executed.compare(found[answered], x[answered], delivered=True)
    formal = cached.library.certificates.among(FORMAL)[found[answered]]
    times = (np.array(ns, float) / 1e3 for ns in (hit, miss, alone))
    return Traffic(x, held_out, found, error, bound, formal, *times)


def why(library: Library, x: NDArray[np.float32], rows: NDArray[np.intp], kinds: Sequence[str]) -> list[Miss]:
    """Why the observations x[rows] are not answered."""
    c = library.certificates
    usable = np.flatnonzero(c.among(kinds))
    c, card = c[usable], library.card
    count, n = c.center.shape
    offset = np.einsum("bij,bj->bi", c.transform, c.center)
    flat, ball, found = c.transform.reshape(count * n, n), c.regions.ball, []
    for row in rows.tolist():
        point = x[row].astype(float)
        if not np.isfinite(point).all():
            found.append(Miss(row, "nan", -1, math.nan, card.observations[int(np.argmin(np.isfinite(point)))].name))
            continue
        xi = (flat @ point).reshape(count, n) - offset
        reach = _reach(xi, ball)
        inside = np.flatnonzero(reach <= 1.0)
        if len(inside):
            k, by, blame = _looseness(c[inside], xi[inside], library)
            found.append(Miss(row, "bound", int(usable[inside[k]]), by, blame))
            continue
        k = int(reach.argmin())
        axis = int(np.abs(xi[k]).argmax())
        sensor = int(np.abs(c.transform[k, axis] * (point - c.center[k])).argmax())
        by = float(reach[k])
        reason = "near" if by <= NEAR else "away" if by <= AWAY else "far"
        found.append(Miss(row, reason, int(usable[k]), by, card.observations[sensor].name))
    return found


def _reach(xi: Floats, ball: NDArray[np.bool_]) -> Floats:
    """[B]: by which factor points with coordinates xi [B, n] lie out of their regions; at most 1 inside."""
    round_part = np.sqrt(np.where(ball, xi * xi, 0.0).sum(axis=1))
    return np.asarray(np.maximum(round_part, np.where(ball, 0.0, np.abs(xi)).max(axis=1)))


def _looseness(c: Certificates, xi: Floats, library: Library) -> tuple[int, float, str]:
    """Of regions that contain an observation: the one that comes nearest to answering, and what stops it."""
    bound = np.einsum("bri,bi->br", c.bound_weight, xi) + c.bound_offset
    if library.card.decision != "none":
        k = int(bound.max(axis=1).argmin())
        return k, math.nan, "two alternatives too close to call"
    with np.errstate(all="ignore"):
        over = bound / np.maximum(library.tolerance, 1e-300)
    k = int(over.max(axis=1).argmin())
    return k, float(over[k].max()), library.card.actions[int(over[k].argmax())].name
