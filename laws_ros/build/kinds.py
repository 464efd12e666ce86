"""Libraries of the kinds `point` and `lipschitz`: the special cases that LAWS generalises, and its own formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import KINDS, Certificates
from laws_ros.core.library import Library
from laws_ros.core.lipschitz import certify_lipschitz
from laws_ros.core.network import Network
from laws_ros.core.point import certify_points
from laws_ros.core.trie import Trie
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

from .grow import Growth, answered

Floats = NDArray[np.float64]

BATCH = 256


def grow_points(
    policy: Policy,
    network: Network,
    observations: NDArray[np.float32],
    tolerance: Floats,
    max_regions: int = 20_000,
    progress: Callable[[str], None] = lambda text: None,
) -> Growth:
    """An exact cache: the most frequent of the observations [N, n], each with the policy's answer."""
    unique, visits = np.unique(observations, axis=0, return_counts=True)
    unique = unique[np.argsort(-visits, kind="stable")[:max_regions]]
    parts = []
    for k in range(0, len(unique), BATCH):
        x = unique[k : k + BATCH]
        parts.append(certify_points(network, x, policy.batch(x), policy.card.decision))
        progress(f"{k + len(x)} of {len(unique)} points certified")
    certificates = Certificates.join(parts)
    itself = np.arange(len(unique))
    kept = answered(certificates, itself, unique.astype(float), tolerance, policy.card.decision)
    certificates = certificates[kept]
    trie = Trie.over(certificates.regions, policy.card.context_indices)
    return finished(policy, certificates, trie, observations, tolerance, len(unique))


def by_formula(
    policy: Policy, network: Network, grown: Growth, observations: NDArray[np.float32], tolerance: Floats
) -> Growth:
    """The regions of a grown library with experts fitted to samples and certified by the formula of LAWS."""
    library = grown.library
    parts = [
        certify_lipschitz(network, library.certificates.regions[k : k + BATCH], policy.batch, policy.card.decision)
        for k in range(0, len(library), BATCH)
    ]
    if not parts:
        return grown
    certificates = Certificates.join([part.certificates for part in parts])
    kept = np.isfinite(certificates.bound_offset).all(axis=1)
    if policy.card.decision == "none":
        kept &= (certificates.bound_offset <= tolerance).all(axis=1)
    tried = grown.certificates_tried + len(library)
    return finished(policy, certificates[kept], library.trie, observations, tolerance, tried)


def finished(
    policy: Policy,
    certificates: Certificates,
    trie: Trie,
    observations: NDArray[np.float32],
    tolerance: Floats,
    tried: int,
) -> Growth:
    """A library under a trie's questions, with the visits that the observations make."""
    none = np.zeros(len(certificates), np.int64)
    trie = replace(trie, visits=np.zeros_like(trie.visits)).counted(observations)
    library = Library(policy.sha256, policy.card, tolerance, certificates, trie, none).indexed(trie)
    found = Router(library, tolerance, KINDS).many(observations)
    visits = np.bincount(found[found >= 0], minlength=len(library)).astype(np.int64)
    return Growth(replace(library, visits=visits), tried, float((found >= 0).mean()))
