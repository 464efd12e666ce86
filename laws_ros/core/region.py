"""Regions of observation space: boxes, balls and cylinders in arbitrary (principal) axes, as tested at run time.

A region is what the router's float64 arithmetic says it is: the observations x for which every entry of
xi = transform @ (x - center), *as computed*, lies in [-1, 1], and for which the squares of the last `round` entries sum
to at most 1. The proofs need a set of exact real vectors that surely contains it; `generators` gives that set, with the
rounding of both the test and the matrix inverse inside.

Why balls: observations spread like a Gaussian around their mean. In 17 dimensions a box that holds 99% of one reaches
14 standard deviations out in its corners, a ball 6; and linear bounds reach as far as the region does in their one
direction (docs/adr/0018-round-regions.md).
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
        round: [B] how many of the last axes form one ball; 0, the default: a box.
        inverse: [B, n, n] about the transforms' inverses, where they are at hand; how near they are is measured.
    """

    center: Array
    transform: Array
    round: NDArray[np.int32] = None  # type: ignore[assignment]  # filled in where B is known
    inverse: Array | None = None

    def __post_init__(self) -> None:
        if self.round is None:
            object.__setattr__(self, "round", np.zeros(len(self.center), np.int32))

    def __len__(self) -> int:
        return len(self.center)

    def __getitem__(self, which: Any) -> Regions:
        inverse = None if self.inverse is None else self.inverse[which]
        return Regions(self.center[which], self.transform[which], self.round[which], inverse)

    @property
    def ball(self) -> NDArray[np.bool_]:
        """[B, n]: which axes form the ball."""
        return of_ball(self.round, self.center.shape[1])

    @classmethod
    def from_axes(cls, center: Array, axes: Array, half_widths: Array, round: Any = 0) -> Regions:
        """Boxes {center + axes @ diag(half_widths) @ xi : |xi| <= 1}, whose last `round` axes form a ball.

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
        count = np.full(len(center), round, np.int32)
        transform = np.linalg.inv(axes) / width[:, :, None]
        return cls(np.array(center, dtype=float), transform, count, axes * width[:, None, :])

    def brief(self) -> Regions:
        """Nearly the same regions, in numbers that take fewer bytes to tell.

        Each row of a transform is rounded to so many bits that no point of the region moves by more than a thousandth
        of it, in the region's own coordinates; centers to float32 where that moves it by no more. Where nothing can be
        said they stay as they are. Exact powers of two (points, discrete axes) do not change.
        """
        generators, _ = self.generators()
        with np.errstate(all="ignore"):
            spread = (np.abs(self.transform) @ np.abs(generators)).sum(axis=2)
            bits = np.ceil(np.log2(1000.0 * spread))
            known = np.isfinite(bits)
            rounded = rounded_to(self.transform, np.where(known, np.clip(bits, 8, 53), 53)[..., None])
            single = self.center.astype(np.float32).astype(float)
            moved = np.abs(np.einsum("bij,bj->bi", self.transform, single - self.center)).max(axis=1)
        near = known.all(axis=1) & (moved <= 1e-3)
        return Regions(
            np.where(near[:, None], single, self.center),
            np.where(known[..., None], rounded, self.transform),
            self.round,
        )

    def coordinates(self, x: Array) -> Array:
        """xi [N, B, n] of observations x [N, n] in every region's axes (reference for the compiled router)."""
        return np.einsum("bij,nbj->nbi", self.transform, np.asarray(x, dtype=float)[:, None, :] - self.center)

    def contains(self, x: Array) -> NDArray[np.bool_]:
        """[N, B]: is observation x [N, n] in region b? A NaN is in none."""
        return within(self.coordinates(x), self.ball)

    def sample(self, rng: np.random.Generator, index: NDArray[np.intp], edge: float = 0.0) -> Array:
        """Random points [N, n] of regions `index` [N], as `scattered`."""
        xi = scattered(rng, self.ball[index], edge)
        return self.center[index] + np.linalg.solve(self.transform[index], xi[:, :, None])[..., 0]

    def generators(self) -> tuple[Array, Array]:
        """Matrices M [B, n, n] and slacks eps [B] that turn the run-time test into a set of real vectors.

        For every x that is accepted there is a zeta, |zeta|_inf <= 1 and of the last `round` entries |.|_2 <= 1, such
        that exactly x = center + M zeta and |zeta - xi_computed|_inf <= eps. eps is infinite where no such statement
        can be made (a singular or hopelessly flat region); nothing may then be certified.

        Proof. Let N be the computed inverse of T, or any other matrix, and R = I - T N, so T^-1 = N (I - R)^-1. With
        y = T (x - c) exactly, x - c = N y' where y' = (I - R)^-1 y and |y' - y| <= r / (1 - r) |y|, r = |R|_inf.
        Evaluating T (x - c) in any order errs by at most gamma_{n+2} |T| |x - c| <= gamma_{n+2} |T| |N| |y'|. So with
        e = r + gamma_{n+2} max_row |T| |N|, |y' - xi| <= 2 e |y'| <= 4 e once e <= 1/4, and |y'| <= 1 + 4 e.
        M = (1 + 4 e) N and zeta = y' / (1 + 4 e) then differ from xi by at most 8 e.
        For a ball of k axes: the computed sum of squares is at most 1, so |xi|_2 <= 1 + (k + 2) u, and
        |y' - xi|_2 <= 4 e sqrt(k); as e >= 2 (n + 3) u, taking e sqrt(k) for e covers both.
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
            inverse = _inverse(safe) if self.inverse is None else self.inverse
            spread = (np.abs(safe) @ (np.abs(inverse) @ ones)[:, :, None])[..., 0].max(axis=1)
            residual = (np.abs(np.eye(n) - safe @ inverse) @ ones).max(axis=1)
            # twice: once for evaluating the residual itself, once for the run-time test
            error = 1.01 * (residual + 2 * (n + 3) * UNIT * spread) * np.sqrt(np.maximum(self.round, 1))
            usable = finite & (error <= 1e-3)
        scale = (1.0 + 5.0 * error)[:, None, None]  # 5 instead of 4: absorbs the rounding of this very product
        return np.where(usable[:, None, None], inverse * scale, np.nan), np.where(usable, 10.0 * error, np.inf)


def of_ball(round: NDArray[np.integer[Any]], n: int) -> NDArray[np.bool_]:
    """[B, n]: the last round[b] of n axes."""
    return np.asarray(np.arange(n) >= n - np.asarray(round)[:, None])


def within(xi: Array, ball: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[...]: are coordinates xi [..., n] inside, where `ball` says which axes form the ball? A NaN is not."""
    squares = np.where(ball, xi * xi, 0.0).sum(axis=-1)
    return np.asarray((np.where(ball, 0.0, np.abs(xi)) <= 1.0).all(axis=-1) & (squares <= 1.0))


def clamped(xi: Array, ball: NDArray[np.bool_]) -> Array:
    """Coordinates [N, n] moved inside, by a millionth more than needed: rounding then seldom throws them out."""
    boxed = np.clip(xi, -1.0 + 1e-6, 1.0 - 1e-6)
    far = np.sqrt(np.where(ball, xi * xi, 0.0).sum(axis=1, keepdims=True))
    return np.asarray(np.where(ball, xi / np.maximum(far / (1.0 - 1e-6), 1.0), boxed))


def scattered(rng: np.random.Generator, ball: NDArray[np.bool_], edge: float = 0.0) -> Array:
    """Random coordinates [N, n] inside: uniform, or for a share `edge` of them at corners of the box and on the surface
    of the ball."""
    xi, away = rng.uniform(-1.0, 1.0, ball.shape), rng.normal(size=ball.shape) * ball
    away /= np.maximum(np.sqrt((away * away).sum(axis=1, keepdims=True)), 1e-300)
    size = rng.random((len(ball), 1)) ** (1.0 / np.maximum(ball.sum(axis=1, keepdims=True), 1))
    outer = rng.random((len(ball), 1)) < edge
    return clamped(np.where(ball, away * np.where(outer, 1.0, size), np.where(outer, np.sign(xi), xi)), ball)


def swing(slope: Array, ball: NDArray[np.bool_]) -> Array:
    """[B, r]: the largest value of slope [B, r, n] @ zeta up to a few roundings: the 1-norm over the box's axes and the
    2-norm over the ball's. `ball` [B, n]."""
    boxed = np.where(ball[:, None], 0.0, np.abs(slope)).sum(axis=2)
    return np.asarray(boxed + np.sqrt(np.where(ball[:, None], slope * slope, 0.0).sum(axis=2)))


def rounded_to(values: Array, bits: Any) -> Array:
    """To the nearest numbers with so many significant bits, at most 53."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, np.asarray(bits, int))), exponent - np.asarray(bits, int))


def _inverse(matrices: Array) -> Array:
    """Of each matrix [B, n, n]; NaN where there is none."""
    try:
        return np.asarray(np.linalg.inv(matrices))
    except np.linalg.LinAlgError:  # one of them is singular
        if len(matrices) == 1:
            return np.full_like(matrices, np.nan)
        half = len(matrices) // 2
        return np.concatenate([_inverse(matrices[:half]), _inverse(matrices[half:])])
