"""Sound affine bounds of a policy *as executed in float32* over regions, batched over regions: the one door.

Method: linear bound propagation (CROWN: Zhang et al. 2018, arXiv:1811.00866; LiRPA: Xu et al. 2020, arXiv:2002.12920),
with the rounding of policy and bounds inside (core.propagate). What may be spent is chosen by `effort`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError
from .network import Network
from .propagate import HUGE32, NUMPY, TINY32, UNIT32, Backend, Cut, Relaxed, gamma
from .region import UNIT, Regions, swing
from .relax import INFLATE

__all__ = [
    "HUGE32",
    "INFLATE",
    "NUMPY",
    "TINY32",
    "UNIT32",
    "AffineBounds",
    "Backend",
    "affine_bounds",
    "gamma",
    "parts_of",
    "ranges",
]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class AffineBounds:
    """(middle - half)(x) <= (rows @ policy output as executed) <= (middle + half)(x) everywhere in a region.

    Attributes:
        middle, half: [B, r, n + 1] coefficients in the *observation* x; the last column is the constant.
    """

    middle: Array
    half: Array

    @property
    def lower(self) -> Array:
        return self.middle - self.half

    @property
    def upper(self) -> Array:
        return self.middle + self.half


def affine_bounds(
    network: Network,
    regions: Regions,
    rows: Array | None = None,
    effort: str = "backward",
    backend: Backend = NUMPY,
) -> AffineBounds:
    """Affine bounds over regions of combinations of the policy's outputs as executed in float32.

    Args:
        network: the policy.
        regions: B of them.
        rows: [r, outputs] combinations to bound; the outputs themselves if None.
        effort: what may be spent, from cheap and loose to dear and tight:
            "interval": ranges only, the bounds are constants; two matrix-vector products per layer.
            "forward": affine functions of the region's coordinates through all layers.
            "backward": also back from the output, and from every small layer behind more than one layer of bends.
            "optimised": and the lines' free slopes chosen per region and row by descent (alpha-CROWN: Xu et al. 2021,
            arXiv:2011.13824, in closed form, with the ranges of all layers as they are).
            "split:N": "backward" on up to N parts of each region, halved where it is worst.

    Returns:
        AffineBounds; NaN or infinite where nothing could be shown (which callers must treat as unknown).

    Raises:
        ConfigError: regions of another number of axes than the policy reads; an unknown effort.
    """
    if regions.center.shape[1] != network.inputs:
        raise ConfigError(
            f"regions of {regions.center.shape[1]} axes for a policy that reads {network.inputs} observations: "
            "make them from observations of this policy"
        )
    rows = np.eye(network.outputs) if rows is None else rows
    generators, _ = regions.generators()
    parts = parts_of(effort)
    with np.errstate(all="ignore"):
        if parts > 1:
            return _split(network, regions, rows, parts, backend)
        relaxed = Relaxed(network, regions.center, generators, effort, backend, regions.ball)
        if effort in ("interval", "forward"):
            found = relaxed.forward(rows, regions.transform)
        elif effort == "optimised":
            found = relaxed.optimised(rows)
        else:
            found = relaxed.backward(len(network.nodes), relaxed.array(rows[None]))
        middle, tilt, constant, half = (backend.host(k) for k in found)
    return AffineBounds(
        np.concatenate([middle, constant[..., None]], axis=2), np.concatenate([tilt, half[..., None]], axis=2)
    )


def parts_of(effort: str) -> int:
    """How many parts an effort may split a region into.

    Raises:
        ConfigError: an unknown effort.
    """
    if effort in ("interval", "forward", "backward", "optimised"):
        return 1
    name, _, number = effort.partition(":")
    if name == "split" and number.isdecimal() and int(number) > 0:
        return int(number)
    raise ConfigError(f"effort {effort!r}: choose interval, forward, backward, optimised, or split:N (N parts)")


def ranges(network: Network, regions: Regions) -> list[tuple[Array, Array]]:
    """The range (low, high), each [B, size], of every node as executed in float32: index 0 the observation, i + 1
    `network.nodes[i]`. Infinite where it was not needed (the output's, say) or NaN where nothing could be shown."""
    generators, _ = regions.generators()
    with np.errstate(all="ignore"):
        known = Relaxed(network, regions.center, generators, ball=regions.ball).known
    return [(np.ascontiguousarray(k.low.T), np.ascontiguousarray(k.high.T)) for k in known]


def _split(network: Network, regions: Regions, rows: Array, parts: int, backend: Backend) -> AffineBounds:
    """Bounds of the whole from bounds of parts.

    Parts are boxes in zeta, halved again and again where the bound is worst, along the axis that bends most. What was
    halved of a ball is a box from then on, and the rest of it a ball as large as it can be beside that. The lines
    of the whole have the slopes of the undivided region's or the mean of the parts', apart as those are or parallel:
    whichever leaves less. Their offsets are what the worst part needs.
    """
    generators, _ = regions.generators()
    count, n = regions.center.shape
    reach = np.abs(regions.center) + np.abs(generators) @ np.ones(n)
    # a part's center is rounded: in zeta by less than this, since |M^-1 e| <= 1.01 max |T| |e|
    blur = 8 * (n + 4) * UNIT * (np.abs(regions.transform) @ reach[:, :, None])[..., 0].max(axis=1)
    blur = blur * np.sqrt(np.maximum(regions.round, 1))  # as a 2-norm
    region, middle, width = np.arange(count), np.zeros((count, n)), np.ones((count, n))
    found: list[Array] = []
    root: tuple[Array, Array] | None = None
    best: list[Array] = []  # slopes of the middle and of half the gap, offsets below and above, largest gap
    new = region
    while True:
        center = regions.center[region[new]] + (generators[region[new]] @ middle[new][:, :, None])[..., 0]
        # the squares of a ball's coordinates sum to at most 1: what a part's halved axes leave of that
        ball = regions.ball[region[new]]
        whole = ball & (width[new] == 1.0)
        taken = np.where(ball, np.maximum(np.abs(middle[new]) - width[new], 0.0), 0.0)
        taken = (taken * taken).sum(axis=1, keepdims=True)
        rest = np.sqrt(np.maximum(1.0 - (1.0 - 1e-12) * taken, 0.0))
        away = taken > 1.0 + 1e-9  # outside the ball
        extent = np.where(whole, rest, width[new]) + blur[region[new], None]
        box = generators[region[new]] * extent[:, None, :]
        cut = Cut(middle[new] * ball, ball / extent, np.where(away[:, 0], 1e30, blur[region[new]]))
        relaxed = Relaxed(network, center, box, "backward", backend, whole, cut if ball.any() else None, lean=True)
        bent = np.zeros((len(new), n))
        lines = relaxed.backward(len(relaxed.known) - 1, relaxed.array(rows[None]), bent)
        latest = [center, box, *(backend.host(k) for k in lines), whole.astype(float), *vars(cut).values(), away, bent]
        grown = len(region) - len(found[0]) if found else 0
        found = [np.concatenate([k, np.zeros((grown, *k.shape[1:]))]) for k in found] or latest
        for old, value in zip(found, latest, strict=True):
            old[new] = value
        root = root or (found[2].copy(), found[3].copy())
        share = np.prod(width, axis=1)[:, None, None]
        mean = np.zeros_like(root[0]), np.zeros_like(root[0])
        for total, part in zip(mean, found[2:4], strict=True):
            np.add.at(total, region, share * part)
        now, ends = _lines(regions, generators, region, found, root if len(region) == count else (*root, *mean))
        best = best or now
        best = _narrower(now, best)[0]  # lines of parts need not be below those of the whole
        size = np.bincount(region, minlength=count)
        if size.max() >= parts:
            break
        # the worse half of each region's parts is halved
        low, high = now[2:4]
        between = 0.5 * (low + high)[region]
        score = np.maximum(ends[1] - between, between - ends[0]) / (high - low).max(axis=1)[region, None]
        rank = np.empty(len(region), dtype=int)
        start = np.cumsum(size) - size
        rank[np.lexsort((-score.max(axis=1), region))] = np.arange(len(region)) - np.repeat(start, size)
        some = np.flatnonzero(rank < np.minimum(np.maximum(size // 2, 1), parts - size)[region])
        half = np.where(np.arange(n) == found[-1][some].argmax(axis=1)[:, None], 0.5, 1.0) * width[some]
        shift = width[some] - half
        new = np.concatenate([some, np.arange(len(region), len(region) + len(some))])
        region, width = np.concatenate([region, region[some]]), np.concatenate([width, half])
        middle = np.concatenate([middle, middle[some] + shift])
        width[some], middle[some] = half, middle[some] - shift
    slope, tilt, low, high, _ = best
    constant, half = 0.5 * (low + high), (0.5 * (high - low)) + 4 * UNIT * (np.abs(low) + np.abs(high))
    return AffineBounds(
        np.concatenate([slope, constant[..., None]], axis=2), np.concatenate([tilt, half[..., None]], axis=2)
    )


def _lines(
    regions: Regions, generators: Array, region: NDArray[np.intp], found: list[Array], slopes: tuple[Array, ...]
) -> tuple[list[Array], list[Array]]:
    """Of lines with these slopes (pairs: of the middle and of half the gap, which may also be constant) those whose gap
    is least where it is largest; and what every part needs beside them."""
    best: list[Array] = []
    ends: list[Array] = []
    for middle, half in zip(slopes[::2], slopes[1::2], strict=True):
        for tilt in (np.zeros_like(half), half):
            low, high, rest = _offsets(middle, tilt, region, found)
            gap = high - low + 2.0 * (_at(tilt, regions.center) + swing(tilt @ generators, regions.ball))
            now = [middle, tilt, low, high, gap]
            if not best:
                best, ends = now, rest
                continue
            best, less = _narrower(now, best)
            ends = [np.where(less[region], k, b) for k, b in zip(rest, ends, strict=True)]
    return best, ends


def _narrower(new: list[Array], old: list[Array]) -> tuple[list[Array], NDArray[np.bool_]]:
    """The lines with the smaller gap, which comes last in both, and where those are the new ones."""
    less = (new[-1] < old[-1]) | np.isnan(old[-1])
    return [np.where(less[..., None] if k.ndim > 2 else less, k, o) for k, o in zip(new, old, strict=True)], less


def _offsets(
    slope: Array, slant: Array, region: NDArray[np.intp], found: list[Array]
) -> tuple[Array, Array, list[Array]]:
    """The largest `low` and least `high` [B, r] with (slope - slant) x + low and (slope + slant) x + high around the
    bounds of every part in that part; and what each part needs."""
    center, box, middle, tilt, constant, half, whole, *cut, away, _ = found
    n = center.shape[1]
    reach = np.abs(center) + np.abs(box) @ np.ones(n)
    ends = []
    for sign in (-1.0, 1.0):
        rest = middle + sign * tilt - (slope + sign * slant)[region]
        slopes = sign * rest @ box
        moved = swing(slopes, whole > 0.0)
        if cut[1].any():
            moved = np.minimum(moved, Cut(*cut).reach(np, slopes.transpose(1, 2, 0)).T)
        size = _at(np.abs(middle) + np.abs(tilt) + (np.abs(slope) + np.abs(slant))[region], reach)
        pad = 16 * (n + 8) * UNIT * (size + np.abs(constant) + np.abs(half))
        end = _at(rest, center) + constant + sign * (half + moved + pad)
        ends.append(np.where(away, -sign * np.inf, end))
    low, high = np.full(slope.shape[:2], np.inf), np.full(slope.shape[:2], -np.inf)
    np.minimum.at(low, region, ends[0])
    np.maximum.at(high, region, ends[1])
    return low, high, ends


def _at(weight: Array, x: Array) -> Array:
    """weight [B, r, n] @ x [B, n]: [B, r]."""
    return np.asarray((weight @ x[:, :, None])[..., 0])
