"""Fitting and certifying affine experts in one step.

The expert is the midline of the policy's affine lower and upper bounds over the region, rounded to float32. Its bound
is their half-gap, plus everything that float32 execution of policy and expert and float64 execution of the router can
add (docs/soundness.md).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .bounds import HUGE32, INFLATE, NUMPY, TINY32, Backend, affine_bounds, gamma
from .certificate import Certificates, Ragged, decision_rows
from .network import Network
from .region import UNIT, Regions, swing

Array = NDArray[np.float64]

COURTESY = 1e-3
KEPT = (32 << 20) - (64 << 10)  # bytes: just below the largest size from which malloc learns


def certify(
    network: Network,
    regions: Regions,
    decision: str = "none",
    batch: int = 200,
    effort: str = "backward",
    backend: Backend = NUMPY,
    limits: NDArray[np.float32] | None = None,
    threads: int = 1,
) -> Certificates:
    """Fit and certify one affine expert per region.

    Args:
        network: the policy. regions: B of them. decision: what the actions mean (core.card.DECISIONS).
        batch: regions per matrix product; memory grows with it. (No power of two by default: in steps of such a width,
            transposing meets few sets of the caches.)
        effort, backend: what may be spent per region, and where (core.bounds).
        limits: [2, m] to which actions are cut on delivery, the policy's and the expert's alike. Where the policy ends
            in just such a cut, the certificates are about delivered actions: they bound the policy and the expert
            before it, which is not bent by it, as cutting both can only bring them nearer; or, where that is less, how
            far they can be apart afterwards, which is nothing where both are surely beyond a limit.
        threads: batches at a time, with the same result. For small policies this is what several cores are good for; in
            the products of large ones NumPy uses them itself.

    Returns:
        One certificate per region. Where nothing could be shown its bound_offset is infinite.

    Raises:
        ConfigError: regions of another number of axes than the policy reads; an unknown effort.
    """
    rows = decision_rows(network.outputs, decision)
    if limits is not None and decision == "none" and (found := network.unlimited(*limits.astype(float))):
        whole = certify(found[0], regions, decision, batch, effort, backend, threads=threads)
        weight, offset = _delivered(whole, limits.astype(float))
        limited = Ragged.of([limits.reshape(-1)] * len(whole), np.float32)
        return replace(whole, bound_weight=weight, bound_offset=offset + found[1] * INFLATE, floats=limited)
    if len(regions) == 0:
        shape = (0, len(rows), network.inputs)
        expert, bound = np.zeros(shape, np.float32), np.zeros(shape)
        return Certificates(
            regions.center, regions.transform, expert, expert[..., 0], bound, bound[..., 0], round=regions.round
        )
    # glibc hands freed memory back to the kernel at once, and every batch would fault all of it in again, a third of
    # the time, until so large a piece was freed: then it keeps that much. It is never touched, so it costs nothing.
    np.empty(KEPT, np.uint8)
    batches = (regions[k : k + batch] for k in range(0, len(regions), batch))
    with ThreadPoolExecutor(threads) as pool:
        each = pool.map if threads > 1 else map
        return Certificates.join(list(each(lambda some: _certify(network, some, rows, effort, backend), batches)))


def _certify(network: Network, regions: Regions, rows: Array, effort: str, backend: Backend) -> Certificates:
    bounds = affine_bounds(network, regions, rows, effort, backend)
    generators, eps = regions.generators()
    inputs = network.inputs
    with np.errstate(all="ignore"):
        expert32 = bounds.middle.astype(np.float32)
        expert = expert32.astype(float)
        size = np.abs(expert)
        total = size @ np.ones(inputs + 1)
        unknown = ~np.isfinite(total) | ~np.isfinite(eps)[:, None]
        # |policy - expert| <= |middle - expert| + half, both in the region's coordinates, the constants last
        gap = np.concatenate([bounds.half, bounds.middle - expert], axis=1)
        gap = _in_zeta(gap, regions.center, generators)
        half, rest = gap[:, : len(rows)], np.abs(gap[:, len(rows) :])
        weight, ones = half[..., :-1], np.ones(inputs)
        slope = np.abs(weight) @ ones
        offset = half[..., -1] + rest @ np.ones(inputs + 1)
        reach = np.concatenate([np.abs(regions.center) + np.abs(generators) @ ones, np.ones((len(regions), 1))], axis=1)
        expert_size = (size @ reach[:, :, None])[..., 0]
        size = 3.001 * expert_size + 2 * (np.abs(bounds.half) @ reach[:, :, None])[..., 0]  # with the middle, twice
        # the expert in float32, denormals rounded, flushed or taken for zero
        flushed = 2 * (inputs + 3) + total + (reach @ np.ones(inputs + 1))[:, None]
        execution = gamma(inputs + 3) * expert_size + flushed * TINY32
        arithmetic = 16 * (inputs + 4) * UNIT * size  # of this function
        routing = slope * eps[:, None]  # the router's xi against the exact one
        evaluation = 4 * (inputs + 4) * UNIT * (slope + np.abs(offset))
        offset = offset + (execution + arithmetic + routing + evaluation) * INFLATE
        # Room for another prover, whose lines and rounding differ a little, to agree.
        offset = offset + COURTESY * (slope + np.abs(offset)) + 1e-9 * size
        unknown |= ~np.isfinite(offset) | ~np.isfinite(slope) | ~(expert_size < HUGE32)
        expert32[unknown] = 0.0
    return Certificates(
        regions.center,
        regions.transform,
        expert32[..., :-1],
        expert32[..., -1],
        np.where(unknown[..., None], 0.0, weight),
        np.where(unknown, np.inf, offset),
        round=regions.round,
    )


def _in_zeta(form: Array, center: Array, generators: Array) -> Array:
    """An affine function [B, r, n + 1] of x, given in the region's coordinates."""
    form_z = form[..., :-1] @ np.concatenate([generators, center[:, :, None]], axis=2)
    form_z[..., -1] += form[..., -1]
    return form_z


def _delivered(certificates: Certificates, limits: Array) -> tuple[Array, Array]:
    """Bounds (weight, offset) of affine certificates about actions cut to limits [2, m]: the given ones, or how far
    apart policy and expert can be when both are cut, as both are known within a range.

    The policy is within its bound of the expert, so its range is that of expert + bound and expert - bound.
    """
    weight, offset = certificates.bound_weight, certificates.bound_offset
    regions, inputs = certificates.regions, certificates.center.shape[1]
    generators, _ = regions.generators()
    expert = np.concatenate([certificates.expert_weight, certificates.expert_bias[..., None]], axis=2).astype(float)
    reach = np.abs(regions.center) + np.abs(generators) @ np.ones(inputs)
    size = np.einsum("bri,bi->br", np.abs(expert[..., :-1]), reach) + np.abs(expert[..., -1])
    with np.errstate(all="ignore"):
        slope = _in_zeta(expert, regions.center, generators)
        constant, slope = slope[..., -1], slope[..., :-1]
        high, low = (sign * swing(slope, regions.ball) for sign in (1.0, -1.0))
        up, down = (sign * (swing(slope + sign * weight, regions.ball) + offset) for sign in (1.0, -1.0))
        # what float32 adds to the expert, as in `_certify`; and room for another prover
        flushed = 2 * (inputs + 3) + np.abs(expert).sum(axis=2) + reach.sum(axis=1)[:, None]
        room = COURTESY * (up - down) + gamma(inputs + 3) * size + flushed * TINY32
        ends = [constant + k + s * room for k, s in ((up, 1.0), (down, -1.0), (high, 1.0), (low, -1.0))]
        up, down, high, low = (np.clip(k, *limits) for k in ends)
        apart = np.maximum(up - low, high - down) + 1e-9 * size  # far more than this function's own rounding
        less = np.isfinite(offset) & (apart <= offset)
    return np.where(less[..., None], 0.0, weight), np.where(less, apart, offset)
