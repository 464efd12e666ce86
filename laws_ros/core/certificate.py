"""Certificates: a region, a cheap expert, and how far the expert can be from the policy anywhere in the region.

This is the record that is stored, routed on and checked. The bound is a function of the query: with xi the query's
coordinates in the region, as the router computes them,

    |policy(x) - expert(x)|_r  <=  bound_weight_r . xi + bound_offset_r

for both as executed by ONNX Runtime; where `floats` of a `linear` certificate names limits, both cut to these first, as
actions are when they are delivered. For a decision (argmax, argmin) the rows are the pairwise differences of the
policy's outputs, so an expert's value that exceeds its bound decides the pair as the policy does.

Kinds say what stands behind a bound, and are never mixed up:

    linear       an affine expert between affine bounds of the policy                    core.certify
    point        the answer at one float32 observation, replayed                         core.point
    lipschitz    an affine expert: eps_fit + Lambda C_E, the paper's formula made sound  core.lipschitz
    exact        the policy with the neurons that cannot change state folded away        core.collapse
    mixed        the same with neurons that hardly bend made straight                    core.collapse
    statistical  an affine expert, tested on fresh observations; nothing is proved       core.statistical

All but the last are formal: they hold for every observation of the region.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .region import Regions, of_ball, rounded_to, swing, within

Array = NDArray[np.float64]

KINDS = ("linear", "point", "lipschitz", "exact", "mixed", "statistical")  # stored as their positions: append only
FORMAL = KINDS[:5]
COLLAPSED = ("exact", "mixed")


def kind_code(name: str) -> int:
    """The number by which a kind is stored."""
    return KINDS.index(name)


def check_kinds(names: Iterable[str]) -> tuple[str, ...]:
    """Names of kinds as a user gave them; none at all means the formal ones.

    Raises:
        ConfigError: an unknown name.
    """
    chosen = tuple(names) or FORMAL
    for name in chosen:
        if name not in KINDS:
            near = get_close_matches(str(name), KINDS, n=2, cutoff=0.4) or KINDS
            raise ConfigError(f"kinds: {name!r} is no kind of certificate; did you mean {' or '.join(near)}?")
    return chosen


@dataclass(frozen=True)
class Ragged:
    """E rows of differing length in one flat array.

    Attributes:
        values: the rows, one after the other.
        start [E + 1]: row k is values[start[k]:start[k + 1]].
    """

    values: NDArray[Any]
    start: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start) - 1

    def __getitem__(self, which: Any) -> Ragged:
        """Some of the rows: a slice, indices or a mask."""
        lengths, begin = np.diff(self.start)[which], self.start[:-1][which]
        start = _running(lengths)
        return Ragged(self.values[np.repeat(begin - start[:-1], lengths) + np.arange(start[-1])], start)

    def row(self, k: int) -> NDArray[Any]:
        return self.values[self.start[k] : self.start[k + 1]]

    @classmethod
    def of(cls, rows: Sequence[NDArray[Any]], dtype: Any) -> Ragged:
        return cls(np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype), _running([len(row) for row in rows]))

    @classmethod
    def join(cls, parts: Sequence[Ragged]) -> Ragged:
        lengths = np.concatenate([np.diff(part.start) for part in parts])
        return cls(np.concatenate([part.values for part in parts]), _running(lengths))


def _running(lengths: Any) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


_BELOW: Any = None  # a default that is filled in where the number of certificates is known


@dataclass(frozen=True)
class Certificates:
    """E certified experts over n observations; r rows (actions, or pairs of alternatives).

    Attributes:
        center [E, n], transform [E, n, n]: the regions (core.region).
        expert_weight [E, r, n], expert_bias [E, r]: float32, in units of action per unit of observation.
        bound_weight [E, r, n], bound_offset [E, r]: float64, action units; an infinite offset means "unknown".
        kind [E]: positions in KINDS; by default `linear`, which is what core.certify makes.
        cost [E]: multiplications of the expert; by default those of an affine one.
        round [E]: how many of the last axes of a region form a ball (core.region); by default none.
        floats, octets: what a kind stores beside this, float32 and uint8: `linear` the limits (all low ones, all high
            ones) to which policy and expert are cut before they are compared, if at all (core.certify); `exact` and
            `mixed` their networks, whose affine expert is zero (core.collapse), `statistical` its evidence
            (core.statistical), the others nothing.
    """

    center: Array
    transform: Array
    expert_weight: NDArray[np.float32]
    expert_bias: NDArray[np.float32]
    bound_weight: Array
    bound_offset: Array
    kind: NDArray[np.uint8] = _BELOW
    cost: NDArray[np.int64] = _BELOW
    floats: Ragged = _BELOW
    octets: Ragged = _BELOW
    round: NDArray[np.int32] = _BELOW

    def __post_init__(self) -> None:
        count = len(self.center)
        affine = prod(self.expert_weight.shape[1:])
        for name, default in (
            ("kind", np.zeros(count, np.uint8)),
            ("cost", np.full(count, affine)),
            ("floats", Ragged(np.zeros(0, np.float32), np.zeros(count + 1, np.int64))),
            ("octets", Ragged(np.zeros(0, np.uint8), np.zeros(count + 1, np.int64))),
            ("round", np.zeros(count, np.int32)),
        ):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)

    def __len__(self) -> int:
        return len(self.center)

    def __getitem__(self, which: object) -> Certificates:
        return Certificates(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def regions(self) -> Regions:
        return Regions(self.center, self.transform, self.round)

    @property
    def worst(self) -> Array:
        """The largest value [E, r] of the bound anywhere in its region."""
        return self.bound_offset + swing(self.bound_weight, of_ball(self.round, self.center.shape[1]))

    def brief(self) -> Certificates:
        """The same experts with bounds in numbers that take fewer bytes to tell, never smaller anywhere in a region.

        Slopes are rounded to 12 bits; as |xi| <= 1, offsets raised by the sum of what that changed (and a little more,
        for the rounding of evaluating them), then to the next float32, pay for it.
        """
        weight = rounded_to(self.bound_weight, 12)
        with np.errstate(all="ignore"):
            offset = self.bound_offset + np.abs(weight - self.bound_weight).sum(axis=2) * (1.0 + 1e-9)
            single = offset.astype(np.float32)
            single = np.where(single < offset, np.nextafter(single, np.float32(np.inf)), single).astype(float)
        return replace(self, bound_weight=weight, bound_offset=single)

    def among(self, kinds: Iterable[str]) -> NDArray[np.bool_]:
        """[E]: which certificates are of these kinds."""
        return np.isin(self.kind, [kind_code(name) for name in kinds])

    def at(self, index: NDArray[np.intp], x: NDArray[np.floating]) -> tuple[NDArray[np.bool_], Array, Array]:
        """Reference for the compiled router, query k against certificate index[k].

        Returns:
            inside [N], the affine expert's values [N, r], the bounds [N, r].
        """
        exact = np.asarray(x, dtype=float)
        xi = np.einsum("nij,nj->ni", self.transform[index], exact - self.center[index])
        value = np.einsum("nri,ni->nr", self.expert_weight[index].astype(float), exact) + self.expert_bias[index]
        bound = np.einsum("nri,ni->nr", self.bound_weight[index], xi) + self.bound_offset[index]
        return within(xi, of_ball(self.round[index], self.center.shape[1])), value, bound

    @classmethod
    def join(cls, parts: list[Certificates]) -> Certificates:
        """All certificates of some batches, in their order."""

        def joined(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            return Ragged.join(values) if isinstance(values[0], Ragged) else np.concatenate(values)

        return cls(*(joined(f.name) for f in fields(cls)))

    @classmethod
    def none(cls, inputs: int, rows: int) -> Certificates:
        """No certificates."""
        n, r, zero = inputs, rows, np.zeros
        single = np.float32
        return cls(
            zero((0, n)), zero((0, n, n)), zero((0, r, n), single), zero((0, r), single), zero((0, r, n)), zero((0, r))
        )


def limited(certificates: Certificates) -> NDArray[np.bool_]:
    """[E]: which certificates are about actions cut to limits, as they are delivered (core.certify)."""
    return ~certificates.among(COLLAPSED) & (np.diff(certificates.floats.start) > 0)


def decision_pairs(alternatives: int) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, in the order of a decision's rows."""
    return list(combinations(range(alternatives), 2))


def decision_rows(outputs: int, decision: str) -> Array:
    """[r, outputs]: what is certified. The outputs themselves, or y_i - y_j per pair (its negative for argmin)."""
    if decision == "none":
        return np.eye(outputs)
    sign = 1.0 if decision == "argmax" else -1.0
    rows = np.zeros((outputs * (outputs - 1) // 2, outputs))
    for k, (i, j) in enumerate(decision_pairs(outputs)):
        rows[k, i], rows[k, j] = sign, -sign
    return rows
