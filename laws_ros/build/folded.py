"""Growing a library of collapsed experts, where affine ones fail: policies that nobody trained for being cached.

Most-visited observations first: the policy is collapsed over a ball in their whitened principal axes that holds most of
them. Where what is left is cheap enough and within tolerance, the ball is widened until it no longer is; otherwise the
observations are halved across their longest axis and both halves try again.

Why balls: a neuron keeps its state where its argument, about linear in the observation, keeps its sign, and over a ball
that reaches as far as the ball does in *one* direction; over a box that holds as many observations, into a corner.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import Certificates
from laws_ros.core.collapse import collapse
from laws_ros.core.library import Library
from laws_ros.core.network import Affine, Network
from laws_ros.core.region import Regions
from laws_ros.core.trie import Trie
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

from .grow import Growth
from .kinds import finished

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

BATCH = 32
HELD = 0.6  # share of the observations that a ball holds: the farthest make it large
MARGIN = 1.05  # it is a little larger than that
FLATTEST = 0.2  # of the ball's longest axis: never thinner than this or the observations' typical spacing
WIDEN = (2.0, 1.5, 1.25, 1.1)
FEWEST = 3
SHARE = 0.25


def multiplications(network: Network) -> int:
    """Of one evaluation of the policy."""
    return sum(weight.size for node in network.nodes if isinstance(node, Affine) for weight in node.weights)


def grow_collapsed(
    policy: Policy,
    network: Network,
    observations: NDArray[np.float32],
    tolerance: Floats,
    kind: str = "exact",
    share: float = SHARE,
    max_regions: int = 20_000,
    max_certificates: int = 60_000,
    progress: Callable[[str], None] = lambda text: None,
    base: Growth | None = None,
) -> Growth:
    """Build a library of collapsed experts for the distribution of the given observations.

    Args:
        policy, network: the same model, for execution and for bounds; continuous actions only.
        observations: [N, n] visited ones; duplicates count as visits.
        tolerance: [m] largest certified action error, action units.
        kind: "exact" or "mixed".
        share: largest cost of an expert, as a share of the policy's multiplications.
        max_regions, max_certificates: the budget.
        base: a library of other experts; only observations that it leaves open are worked on, and its experts stay.

    Returns:
        Growth; train_coverage is the share of `observations` that the library answers.

    Raises:
        ModelError: the policy cannot be collapsed.
    """
    x = observations.astype(float)
    budget = share * multiplications(network)
    spread = x.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    kept: list[Certificates] = [base.library.certificates] if base else []
    before, tried = base.certificates_tried if base else 0, 0
    waiting = np.ones(len(x), dtype=bool)  # observations that no kept region answers

    def close(certificates: Certificates) -> None:
        trie = Trie.over(certificates.regions)
        none = np.zeros(len(certificates), np.int64)
        library = Library(policy.sha256, policy.card, tolerance, certificates, trie, none).indexed(trie)
        here = np.flatnonzero(waiting)
        waiting[here[Router(library, tolerance).many(x[here]) >= 0]] = False

    def certify(center: Floats, axes: Floats, widths: Floats) -> tuple[Certificates, NDArray[np.bool_]]:
        nonlocal tried
        tried += len(center)
        found = collapse(network, Regions.from_axes(center, axes, widths, x.shape[1]).brief(), kind, tolerance).brief()
        return found, (found.cost <= budget) & (found.bound_offset <= tolerance).all(axis=1)

    if base:
        close(base.library.certificates)
    heap = [(-len(part), k, part) for k, part in enumerate(_contexts(x, policy.card.context_indices))]
    heapq.heapify(heap)
    pushed = len(heap)
    while heap and tried < max_certificates and sum(len(part) for part in kept) < max_regions:
        nodes: list[Indices] = []
        while heap and len(nodes) < BATCH:
            points = heapq.heappop(heap)[2]
            points = points[waiting[points]]
            if len(points) >= FEWEST:
                nodes.append(points)
        if not nodes:
            break
        balls = [_ball(x[points] / scale) for points in nodes]
        center, axes, widths = (np.array(part) for part in zip(*balls, strict=True))
        center, axes = center * scale, scale[:, None] * axes
        certificates, good = certify(center, axes, widths)
        for factor in WIDEN if good.any() else ():
            wider, better = certify(center[good], axes[good], factor * widths[good])
            here = np.flatnonzero(good)[better]
            widths[here] *= factor
            certificates = _replaced(certificates, here, wider[better])
        if good.any():
            kept.append(certificates[good])
            close(kept[-1])
        for points, fits in zip(nodes, good, strict=True):
            for part in [points] if fits else _halves(x[points] / scale, points):
                heapq.heappush(heap, (-len(part), pushed, part))
                pushed += 1
        progress(
            f"{sum(len(part) for part in kept)} regions, {tried} certificates tried, "
            f"{100 * (1 - waiting.mean()):.1f}% of observations covered"
        )
    certificates = Certificates.join(kept) if kept else Certificates.none(network.inputs, network.outputs)
    trie = Trie.over(certificates.regions, policy.card.context_indices)
    grown = finished(policy, certificates[:max_regions], trie, observations, tolerance, before + tried)
    # a region that cheaper ones answer for is not worth its place
    used = grown.library.visits > 0
    certificates = grown.library.certificates[used]
    trie = Trie.over(certificates.regions, policy.card.context_indices)
    return finished(policy, certificates, trie, observations, tolerance, before + tried)


def _contexts(x: Floats, axes: list[int] | tuple[int, ...]) -> list[Indices]:
    """Observations apart by the values of the discrete ones."""
    if not len(axes):
        return [np.arange(len(x))]
    group = np.unique(x[:, list(axes)], axis=0, return_inverse=True)[1].reshape(-1)
    return [np.flatnonzero(group == k) for k in range(group.max() + 1)]


def _ball(points: Floats) -> tuple[Floats, Floats, Floats]:
    """Center, axes and half-widths of a ball around most of the points [N, n], in their whitened principal axes."""
    n = points.shape[1]
    mean = points.mean(axis=0)
    # a few points do not show all axes; a little of the identity keeps the rest apart
    values, vectors = np.linalg.eigh((points - mean).T @ (points - mean) / len(points) + 1e-9 * np.eye(n))
    spread = np.sqrt(values)
    spacing = spread.max() / max(2.0, len(points) ** (1.0 / n))  # between sparse points lies more of the same
    spread = np.maximum(spread, min(spacing, FLATTEST * spread.max()))
    far = np.linalg.norm((points - mean) @ vectors / spread, axis=1)
    return mean, vectors, MARGIN * np.quantile(far, HELD) * spread


def _halves(points: Floats, indices: Indices) -> list[Indices]:
    """Two halves across the longest principal axis; none where the points are all the same."""
    mean = points.mean(axis=0)
    values, vectors = np.linalg.eigh((points - mean).T @ (points - mean))
    along = (points - mean) @ vectors[:, -1]
    low = along < np.median(along)
    return [indices[low], indices[~low]] if low.any() and values[-1] > 0 else []


def _replaced(certificates: Certificates, where: Indices, by: Certificates) -> Certificates:
    if not len(where):
        return certificates
    order = np.arange(len(certificates))
    order[where] = len(certificates) + np.arange(len(by))
    return Certificates.join([certificates, by])[order]
