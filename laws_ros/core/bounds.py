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
from .propagate import HUGE32, NUMPY, TINY32, UNIT32, Backend, Relaxed, gamma
from .region import UNIT, Regions
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
            "split:N": "backward" on up to N parts of each region, halved where it is worst. `half` is then constant.

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
    parts = _parts(effort)
    with np.errstate(all="ignore"):
        if parts > 1:
            return _split(network, regions, rows, parts, backend)
        relaxed = Relaxed(network, regions.center, generators, effort, backend)
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


def _parts(effort: str) -> int:
    """How many parts an effort may split a region into."""
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
        known = Relaxed(network, regions.center, generators).known
    return [(np.ascontiguousarray(k.low.T), np.ascontiguousarray(k.high.T)) for k in known]


def _split(network: Network, regions: Regions, rows: Array, parts: int, backend: Backend) -> AffineBounds:
    """Bounds of the whole from bounds of parts.

    Parts are boxes in zeta, halved again and again where the bound is worst, along the axis that bends most. The slope
    of the whole is that of the undivided region or the mean of the parts' slopes, whichever needs less; the offsets are
    what the worst part needs.
    """
    generators, _ = regions.generators()
    count, n = regions.center.shape
    reach = np.abs(regions.center) + np.abs(generators) @ np.ones(n)
    # a part's center is rounded: in zeta by less than this, since |M^-1 e| <= 1.01 max |T| |e|
    blur = 8 * (n + 4) * UNIT * (np.abs(regions.transform) @ reach[:, :, None])[..., 0].max(axis=1)
    region, middle, width = np.arange(count), np.zeros((count, n)), np.ones((count, n))
    found: list[Array] = []
    root = np.zeros((count, len(rows), n))
    best: tuple[Array, ...] | None = None
    new = region
    while True:
        center = regions.center[region[new]] + (generators[region[new]] @ middle[new][:, :, None])[..., 0]
        box = generators[region[new]] * (width[new] + blur[region[new], None])[:, None, :]
        relaxed = Relaxed(network, center, box, "backward", backend)
        bent = np.zeros((len(new), n))
        slope, *rest = (
            backend.host(k) for k in relaxed.backward(len(relaxed.known) - 1, relaxed.array(rows[None]), bent)
        )
        latest = [center, box, slope, *rest, bent]
        root = root if found else slope
        grown = len(region) - len(found[0]) if found else 0
        found = [np.concatenate([k, np.zeros((grown, *k.shape[1:]))]) for k in found] or latest
        for old, value in zip(found, latest, strict=True):
            old[new] = value
        mean = np.zeros_like(root)
        np.add.at(mean, region, np.prod(width, axis=1)[:, None, None] * found[2])
        (low, high, ends), other = (_offsets(slopes, region, found) for slopes in (root, mean))
        better = other[1] - other[0] < high - low
        if better.any():
            low, high = np.where(better, other[0], low), np.where(better, other[1], high)
            root = np.where(better[..., None], mean, root)
            ends = [np.where(better[region], b, a) for a, b in zip(ends, other[2], strict=True)]
        if best is None:
            best = low, high, root
        else:  # lines of parts need not be below those of the whole
            narrower = ~(high - low >= best[1] - best[0])  # also where nothing was known
            pairs = zip((low, high, root), best, (narrower, narrower, narrower[..., None]), strict=True)
            best = tuple(np.where(which, now, before) for now, before, which in pairs)
        size = np.bincount(region, minlength=count)
        if size.max() >= parts:
            break
        # the worse half of each region's parts is halved
        wide = (high - low).max(axis=1)
        between = 0.5 * (low + high)[region]
        score = np.maximum(ends[1] - between, between - ends[0])
        score = (score / wide[region, None]).max(axis=1)
        rank = np.empty(len(region), dtype=int)
        rank[np.lexsort((-score, region))] = np.arange(len(region)) - np.repeat(np.cumsum(size) - size, size)
        some = np.flatnonzero(rank < np.minimum(np.maximum(size // 2, 1), parts - size)[region])
        half = np.where(np.arange(n) == found[-1][some].argmax(axis=1)[:, None], 0.5, 1.0) * width[some]
        shift = width[some] - half
        new = np.concatenate([some, np.arange(len(region), len(region) + len(some))])
        region, width = np.concatenate([region, region[some]]), np.concatenate([width, half])
        middle = np.concatenate([middle, middle[some] + shift])
        width[some], middle[some] = half, middle[some] - shift
    low, high, root = best
    pad = 4 * UNIT * (np.abs(low) + np.abs(high))
    constant, half = 0.5 * (low + high), 0.5 * (high - low) + pad
    return AffineBounds(
        np.concatenate([root, constant[..., None]], axis=2),
        np.concatenate([np.zeros_like(root), half[..., None]], axis=2),
    )


def _offsets(slopes: Array, region: NDArray[np.intp], found: list[Array]) -> tuple[Array, Array, list[Array]]:
    """The range [B, r] of what the parts' bounds leave beside functions with the given slopes, and each part's."""
    center, box, middle, tilt, constant, half, _ = found
    n = center.shape[1]
    reach = (np.abs(center) + np.abs(box) @ np.ones(n))[:, :, None]
    ends = []
    for sign in (-1.0, 1.0):
        rest = middle + sign * tilt - slopes[region]
        swing = np.abs(rest @ box) @ np.ones(n)
        size = (np.abs(middle) + np.abs(tilt) + np.abs(slopes[region])) @ reach
        pad = 16 * (n + 8) * UNIT * (size[..., 0] + np.abs(constant) + np.abs(half))
        ends.append((rest @ center[:, :, None])[..., 0] + constant + sign * (half + swing + pad))
    low, high = np.full(slopes.shape[:2], np.inf), np.full(slopes.shape[:2], -np.inf)
    np.minimum.at(low, region, ends[0])
    np.maximum.at(high, region, ends[1])
    return low, high, ends
