"""Regions of observation space: boxes in arbitrary (principal) axes, as they are tested at run time.

A region is what the router's float64 arithmetic says it is: the observations x for which every entry of
xi = transform @ (x - center), *as computed*, lies in [-1, 1]. The proofs need a set of exact real vectors that
surely contains it; `generators` gives that set, with the rounding of both the test and the matrix inverse inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

UNIT = 2.0**-53  # unit roundoff of float64


@dataclass(frozen=True)
class Regions:
    """A batch of B regions of n observations.

    Attributes:
        center: [B, n]
        transform: [B, n, n], rows are axes divided by half-widths.
    """

    center: Array
    transform: Array

    def __len__(self) -> int:
        return len(self.center)

    def __getitem__(self, which: Any) -> Regions:
        return Regions(self.center[which], self.transform[which])

    @classmethod
    def from_axes(cls, center: Array, axes: Array, half_widths: Array) -> Regions:
        """Boxes {center + axes @ diag(half_widths) @ xi : |xi| <= 1}.

        Args:
            center: [B, n]; axes: [B, n, n], columns are the box's edges' directions (invertible, any length);
            half_widths: [B, n], at least zero. An axis of zero (or relatively tiny) width is widened to 1e-6 of the
            widest, or to 1e-9 of the region's distance from the origin, so that the transform stays finite: far
            below the resolution of a float32 observation for a point, and harmless for a flat box, because a
            certificate covers the widened box.
        """
        floor = np.maximum(
            1e-6 * half_widths.max(axis=1, keepdims=True), 1e-9 * (1.0 + np.abs(center).max(axis=1, keepdims=True))
        )
        width = np.maximum(half_widths, floor)
        return cls(np.array(center, dtype=float), np.linalg.inv(axes) / width[:, :, None])

    def coordinates(self, x: Array) -> Array:
        """xi [N, B, n] of observations x [N, n] in every region's axes (reference for the compiled router)."""
        return np.einsum("bij,nbj->nbi", self.transform, np.asarray(x, dtype=float)[:, None, :] - self.center)

    def contains(self, x: Array) -> NDArray[np.bool_]:
        """[N, B]: is observation x [N, n] in region b? A NaN is in none."""
        return np.asarray((np.abs(self.coordinates(x)) <= 1.0).all(axis=2))

    def generators(self) -> tuple[Array, Array]:
        """Matrices M [B, n, n] and slacks eps [B] that turn the run-time test into a set of real vectors.

        For every x with |xi_computed| <= 1 there is a zeta, |zeta|_inf <= 1, such that exactly x = center + M zeta
        and |zeta - xi_computed|_inf <= eps. eps is infinite where no such statement can be made (a singular or
        hopelessly flat region); nothing may then be certified.

        Proof. Let N be the computed inverse of T and R = I - T N, so T^-1 = N (I - R)^-1. With y = T (x - c) exactly,
        x - c = N y' where y' = (I - R)^-1 y and |y' - y| <= r / (1 - r) |y|, r = |R|_inf. Evaluating T (x - c) in any
        order errs by at most gamma_{n+2} |T| |x - c| <= gamma_{n+2} |T| |N| |y'|. So with
        e = r + gamma_{n+2} max_row |T| |N|, |y' - xi| <= 2 e |y'| <= 4 e once e <= 1/4, and |y'| <= 1 + 4 e.
        M = (1 + 4 e) N and zeta = y' / (1 + 4 e) then differ from xi by at most 8 e.
        """
        return self._generators

    @cached_property
    def _generators(self) -> tuple[Array, Array]:
        n = self.center.shape[1]
        ones = np.ones(n)
        with np.errstate(all="ignore"):
            sums: Array = self.transform @ ones + self.center
            finite = np.asarray(np.isfinite(sums).all(axis=1))
            safe = self.transform if finite.all() else np.where(finite[:, None, None], self.transform, np.eye(n))
            inverse = _inverse(safe)
            spread = (np.abs(safe) @ (np.abs(inverse) @ ones)[:, :, None])[..., 0].max(axis=1)
            residual = (np.abs(np.eye(n) - safe @ inverse) @ ones).max(axis=1)
            # twice: once for evaluating the residual itself, once for the run-time test
            error = 1.01 * (residual + 2 * (n + 3) * UNIT * spread)
            usable = finite & (error <= 1e-3)
        scale = (1.0 + 5.0 * error)[:, None, None]  # 5 instead of 4: absorbs the rounding of this very product
        return np.where(usable[:, None, None], inverse * scale, np.nan), np.where(usable, 10.0 * error, np.inf)


def _inverse(matrices: Array) -> Array:
    """Of each matrix [B, n, n]; NaN where there is none."""
    try:
        return np.asarray(np.linalg.inv(matrices))
    except np.linalg.LinAlgError:  # one of them is singular
        if len(matrices) == 1:
            return np.full_like(matrices, np.nan)
        half = len(matrices) // 2
        return np.concatenate([_inverse(matrices[:half]), _inverse(matrices[half:])])
