"""Fitting and certifying affine experts in one step.

The expert is the midline of the policy's affine lower and upper bounds over the region, rounded to float32. Its bound
is their half-gap, plus everything that float32 execution of policy and expert and float64 execution of the router can
add (docs/soundness.md).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bounds import HUGE32, INFLATE, TINY32, affine_bounds, gamma
from .certificate import Certificates, decision_rows
from .network import Network
from .region import UNIT, Regions

Array = NDArray[np.float64]

COURTESY = 1e-3


def certify(network: Network, regions: Regions, decision: str = "none", batch: int = 64) -> Certificates:
    """Fit and certify one affine expert per region.

    Args:
        network: the policy. regions: B of them. decision: what the actions mean (core.card.DECISIONS).
        batch: regions per matrix product; memory grows with it.

    Returns:
        One certificate per region. Where nothing could be shown its bound_offset is infinite.
    """
    rows = decision_rows(network.outputs, decision)
    parts = [_certify(network, regions[k : k + batch], rows) for k in range(0, len(regions), batch)]
    return Certificates.join(parts)


def _certify(network: Network, regions: Regions, rows: Array) -> Certificates:
    bounds = affine_bounds(network, regions, rows)
    generators, eps = regions.generators()
    inputs = network.inputs
    with np.errstate(all="ignore"):
        middle = (0.5 * (bounds.lower + bounds.upper)).astype(np.float32)
        unknown = ~np.isfinite(middle).all(axis=2) | ~np.isfinite(eps)[:, None]
        middle = np.where(unknown[..., None], np.float32(0), middle)
        expert = middle.astype(float)
        reach = np.abs(regions.center) + np.abs(generators).sum(axis=2)

        def residual(difference: Array) -> tuple[Array, Array]:
            """Coefficients in zeta [B, r, n] and constant [B, r] of an affine function given in x."""
            weight = difference[..., :-1]
            return weight @ generators, np.einsum("brn,bn->br", weight, regions.center) + difference[..., -1]

        up, up_constant = residual(bounds.upper - expert)
        down, down_constant = residual(expert - bounds.lower)
        # max(a, b) = (a + b) / 2 + |a - b| / 2, and |a - b| over the region is at most the sum of its coefficients
        weight = 0.5 * (up + down)
        offset = 0.5 * (up_constant + down_constant)
        offset = offset + 0.5 * (np.abs(up_constant - down_constant) + np.abs(up - down).sum(axis=2))
        size = np.zeros_like(offset)
        for form in (bounds.lower, bounds.upper, expert):
            size = size + np.einsum("brn,bn->br", np.abs(form[..., :-1]), reach) + np.abs(form[..., -1])
        expert_size = np.einsum("brn,bn->br", np.abs(expert[..., :-1]), reach) + np.abs(expert[..., -1])
        # the expert in float32, denormals rounded, flushed or taken for zero
        flushed = 2 * (inputs + 3) + np.abs(expert).sum(axis=2) + reach.sum(axis=1)[:, None]
        execution = gamma(inputs + 3) * expert_size + flushed * TINY32
        arithmetic = 16 * (inputs + 4) * UNIT * size  # of this function
        routing = np.abs(weight).sum(axis=2) * eps[:, None]  # the router's xi against the exact one
        evaluation = 4 * (inputs + 4) * UNIT * (np.abs(weight).sum(axis=2) + np.abs(offset))
        offset = offset + (execution + arithmetic + routing + evaluation) * INFLATE
        # Room for another prover, whose lines and rounding differ a little, to agree.
        offset = offset + COURTESY * (np.abs(weight).sum(axis=2) + np.abs(offset)) + 1e-9 * size
        unknown |= ~np.isfinite(offset) | ~np.isfinite(weight).all(axis=2) | ~(expert_size < HUGE32)
    return Certificates(
        regions.center,
        regions.transform,
        middle[..., :-1],
        middle[..., -1],
        np.where(unknown[..., None], 0.0, weight),
        np.where(unknown, np.inf, offset),
    )
