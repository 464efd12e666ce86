"""Kind `point`: what the policy answered at one observation, replayed when that very observation comes again.

With zero radius and a constant expert a library is an exact cache. The replayed action is what ONNX Runtime computed
once; on another day, with another number of threads or in a batch, the same program may sum in another order. So the
bound is not zero: it is what the order of summation can change at this observation, on both sides.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .bounds import TINY32
from .certificate import Certificates, decision_rows, kind_code
from .certify import certify
from .network import Network
from .region import Regions

COURTESY = 1.02  # room for another prover: all of this bound is rounding, and two analyses of that differ by percents


def point_regions(x: NDArray[np.float32]) -> Regions:
    """Cubes that hold one float32 vector each, of x [N, n].

    The half-width is half of the smallest gap between any entry and its float32 neighbours, a power of two. So the
    router's test is exact: xi is zero at x itself, and at least 2 in some entry at every other float32 vector (-0.0 and
    0.0 are one number). One width for all axes keeps the transform perfectly conditioned.
    """
    gaps = [np.abs(np.nextafter(x, np.float32(end)).astype(float) - x) for end in (-np.inf, np.inf)]
    width = 0.5 * np.minimum(*gaps).min(axis=1)
    return Regions(x.astype(float), np.eye(x.shape[1]) / width[:, None, None])


def certify_points(
    network: Network, x: NDArray[np.float32], actions: NDArray[np.float32], decision: str = "none"
) -> Certificates:
    """Certificates that replay actions [N, m] at finite observations x [N, n].

    Args:
        actions: raw outputs of the policy at x as executed by ONNX Runtime.

    Returns:
        N certificates. With l the affine expert of core.certify and b its bound there, any execution of the policy
        lies within b of l(x), hence within b + |l(x) - action| of the action.
    """
    rows = decision_rows(network.outputs, decision)
    found = certify(network, point_regions(x), decision)
    answer = actions.astype(float) @ rows.T
    replayed = answer.astype(np.float32)
    line = np.einsum("eri,ei->er", found.expert_weight.astype(float), found.center) + found.expert_bias
    size = np.einsum("eri,ei->er", np.abs(found.expert_weight.astype(float)), np.abs(found.center))
    slack = 1e-14 * (x.shape[1] + 4) * (size + np.abs(line) + np.abs(replayed)) + TINY32  # of these lines; a denormal
    with np.errstate(invalid="ignore"):
        offset = (found.worst + np.abs(line - replayed) + slack) * COURTESY
    known = np.isfinite(offset) & np.isfinite(replayed)
    return replace(
        found,
        expert_weight=np.zeros_like(found.expert_weight),
        expert_bias=np.where(known, replayed, np.float32(0)),
        bound_weight=np.zeros_like(found.bound_weight),
        bound_offset=np.where(known, offset, np.inf),
        kind=np.full(len(x), kind_code("point"), np.uint8),
        cost=np.zeros(len(x), np.int64),
    )
