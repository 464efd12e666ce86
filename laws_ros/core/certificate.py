"""Certificates of kind `linear`: an affine expert and an affine bound on its distance from the policy, per region.

This is the record that is stored, routed on and checked; `certify` makes it, `checker` proves it again. The bound is a
function of the query: with xi the query's coordinates in the region, as the router computes them,

    |policy(x) - expert(x)|_r  <=  bound_weight_r . xi + bound_offset_r

for both as executed by ONNX Runtime. For a decision (argmax, argmin) the rows are the pairwise differences of the
policy's outputs, so an expert's value that exceeds its bound decides the pair as the policy does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from .region import Regions

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Certificates:
    """E certified experts over n observations; r rows (actions, or pairs of alternatives).

    Attributes:
        center [E, n], transform [E, n, n]: the regions (core.region).
        expert_weight [E, r, n], expert_bias [E, r]: float32, in units of action per unit of observation.
        bound_weight [E, r, n], bound_offset [E, r]: float64, action units; an infinite offset means "unknown".
    """

    center: Array
    transform: Array
    expert_weight: NDArray[np.float32]
    expert_bias: NDArray[np.float32]
    bound_weight: Array
    bound_offset: Array

    def __len__(self) -> int:
        return len(self.center)

    def __getitem__(self, which: object) -> Certificates:
        return Certificates(*(getattr(self, f.name)[which] for f in fields(self)))

    @property
    def regions(self) -> Regions:
        return Regions(self.center, self.transform)

    @property
    def worst(self) -> Array:
        """The largest value [E, r] of the bound anywhere in its region."""
        return self.bound_offset + np.abs(self.bound_weight).sum(axis=2)

    def at(self, index: NDArray[np.intp], x: NDArray[np.floating]) -> tuple[NDArray[np.bool_], Array, Array]:
        """Reference for the compiled router, query k against certificate index[k].

        Returns:
            inside [N], the expert's values [N, r], the bounds [N, r].
        """
        exact = np.asarray(x, dtype=float)
        xi = np.einsum("nij,nj->ni", self.transform[index], exact - self.center[index])
        value = np.einsum("nri,ni->nr", self.expert_weight[index].astype(float), exact) + self.expert_bias[index]
        bound = np.einsum("nri,ni->nr", self.bound_weight[index], xi) + self.bound_offset[index]
        return np.asarray((np.abs(xi) <= 1.0).all(axis=1)), value, bound

    @classmethod
    def join(cls, parts: list[Certificates]) -> Certificates:
        return cls(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(cls)))


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
