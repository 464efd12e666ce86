"""Trying to break a library: re-check every certificate, sample, and attack, against the programs that really run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import Certificates, decision_rows
from laws_ros.core.checker import Checker
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.runtime.experts import experts_model
from laws_ros.runtime.policy import Policy, session

Floats = NDArray[np.float64]

CHUNK = 8192
STEPS = 12  # of projected gradient ascent
RESTARTS = 2


@dataclass
class Findings:
    """What verification saw.

    Attributes:
        rechecked: certificates proved again by the checker; unknown: those it could not prove.
        samples, attacks: observations tried; violations: how many of them broke a bound.
        first: a description of the first violation.
        ratio: [E] certified bound at its largest over the worst error seen, per certificate; NaN where none was seen.
    """

    rechecked: int
    unknown: int
    samples: int
    attacks: int
    violations: int
    first: str | None
    ratio: Floats


class Executed:
    """Policy and experts as executed by ONNX Runtime, on many observations."""

    def __init__(self, policy: Policy, certificates: Certificates) -> None:
        self.policy, self.certificates = policy, certificates
        self.rows = decision_rows(policy.actions, policy.card.decision)
        self._experts = session(experts_model(certificates).SerializeToString(), "experts", threads=2)

    def compare(self, index: NDArray[np.intp], x: NDArray[np.float32]) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Query k against certificate index[k].

        Returns:
            inside [N]; |policy - expert| [N, r] as executed; the certified bound [N, r] as the router computes it.
        """
        inside, _, bound = self.certificates.at(index, x)
        extended = np.concatenate([x, np.ones((len(x), 1), np.float32)], axis=1)[:, :, None]
        value = self._experts.run(["action"], {"index": index.astype(np.int64), "observation": extended})[0]
        policy = self.policy.batch(x).astype(float) @ self.rows.T
        return inside, np.abs(policy - value[:, :, 0].astype(float)), bound


def verify(
    library: Library,
    policy: Policy,
    network: Network,
    samples: int,
    attack: bool,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Findings:
    """Re-check, sample and (if asked) attack every certificate of a library.

    Args:
        samples: observations, spread over all regions: half of them uniform, half near corners.
        attack: also climb the error by projected gradient, from several starts in every region.
    """
    certificates = library.certificates
    checker = Checker(network, library.card.decision)
    rechecked = 0
    for k in range(len(library)):
        rechecked += checker.verdict(certificates, k) == "holds"
        if k % 16 == 0:
            progress(f"re-checked {k + 1} of {len(library)} certificates")
    findings = Findings(rechecked, len(library) - rechecked, 0, 0, 0, None, np.full(len(library), np.nan))
    if len(library) == 0:
        return findings
    executed = Executed(policy, certificates)
    worst = np.zeros(certificates.bound_offset.shape)
    rng = np.random.default_rng(seed)
    inverse = np.linalg.inv(certificates.transform)
    n = network.inputs

    def place(index: NDArray[np.intp], xi: Floats) -> NDArray[np.float32]:
        return (certificates.center[index] + np.einsum("nij,nj->ni", inverse[index], xi)).astype(np.float32)

    def judge(index: NDArray[np.intp], x: NDArray[np.float32]) -> int:
        inside, error, bound = executed.compare(index, x)
        np.maximum.at(worst, index[inside], error[inside])
        broken = inside & (error > bound).any(axis=1)
        findings.violations += int(broken.sum())
        if findings.first is None and broken.any():
            k = int(np.argmax(broken))
            findings.first = (
                f"region {library.ids[index[k]]}: at observation {x[k].tolist()} the error is {error[k].tolist()}, "
                f"certified was {bound[k].tolist()}"
            )
        return int(inside.sum())

    tries = 0
    while findings.samples < samples and tries < 4 * samples + CHUNK:  # rounding to float32 throws some out of a region
        index = (np.arange(tries, tries + min(CHUNK, samples - findings.samples)) % len(library)).astype(np.intp)
        tries += len(index)
        xi = rng.uniform(-1.0, 1.0, (len(index), n))
        corner = rng.random(len(index)) < 0.5
        xi[corner] = np.sign(xi[corner]) * (1.0 - 1e-6)
        findings.samples += judge(index, place(index, xi))
        progress(f"sampled {findings.samples} observations, {findings.violations} violations")
    if attack:
        everyone = np.arange(len(library), dtype=np.intp)
        for _ in range(RESTARTS):
            for start in range(0, len(library), 512):
                index = everyone[start : start + 512]
                for sign in (1.0, -1.0):
                    xi = rng.uniform(-1.0, 1.0, (len(index), n))
                    row = rng.integers(len(executed.rows), size=len(index))
                    for step in range(STEPS):
                        x = place(index, xi)
                        # ascend sign * (policy - expert) - bound, along its gradient in the region's own axes
                        grad_x = network.gradient(x.astype(float), executed.rows[row])
                        grad_x = grad_x - certificates.expert_weight[index, row]
                        slope = sign * np.einsum("nij,ni->nj", inverse[index], grad_x)
                        slope = slope - certificates.bound_weight[index, row]
                        xi = np.clip(xi + np.sign(slope) * 2.0 / (step + 2), -1.0 + 1e-6, 1.0 - 1e-6)
                    findings.attacks += judge(index, place(index, xi))
                progress(f"attacked {findings.attacks} times, {findings.violations} violations")
    with np.errstate(all="ignore"):
        ratio = certificates.worst / worst
    findings.ratio = np.where(worst.max(axis=1) > 0, np.where(worst > 0, ratio, np.inf).min(axis=1), np.nan)
    return findings
