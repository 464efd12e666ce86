"""Trying to break a library: re-check every certificate, sample, and attack, against the programs that really run.

Formal certificates are proved again by the checker, then sampled and attacked anywhere in their regions. Statistical
ones say nothing about single observations: their arithmetic is done again, and fresh episodes, if given, are counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import COLLAPSED, FORMAL, KINDS, Certificates, decision_rows, limited
from laws_ros.core.checker import Checker
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.core.region import clamped, scattered
from laws_ros.core.statistical import Evidence, drawn, refuted
from laws_ros.runtime.experts import Experts
from laws_ros.runtime.policy import Policy

Floats = NDArray[np.float64]

CHUNK = 8192
STEPS = 12  # of projected gradient ascent
RESTARTS = 2


@dataclass
class Findings:
    """What verification saw.

    Attributes:
        verdicts: per certificate "holds", "violated" or "unknown", which never counts as holding.
        samples, attacks: observations tried in regions of formal kinds; violations: how many of them broke a bound.
        first: a description of the first violation.
        ratio: [E] certified bound at its largest over the worst error seen, per certificate; NaN where none was seen.
        fresh, exceedances: observations drawn from fresh episodes in statistical regions, at most one of each episode
            and region, and how many of them exceeded their bound.
    """

    verdicts: list[str]
    ratio: Floats
    kinds: list[str]
    samples: int = 0
    attacks: int = 0
    violations: int = 0
    first: str | None = None
    fresh: int = 0
    exceedances: int = 0

    @property
    def rechecked(self) -> int:
        return self.verdicts.count("holds")

    @property
    def unknown(self) -> int:
        return self.verdicts.count("unknown")

    @property
    def good(self) -> bool:
        """Every certificate was shown to hold and nothing was seen that contradicts one."""
        return self.rechecked == len(self.verdicts) and self.violations == 0

    @property
    def by_kind(self) -> dict[str, dict[str, int]]:
        """Verdicts counted per kind."""
        count = Counter(zip(self.kinds, self.verdicts, strict=True))
        return {
            kind: {verdict: count[kind, verdict] for verdict in ("holds", "violated", "unknown")}
            for kind in KINDS
            if kind in self.kinds
        }


class Executed:
    """Policy and experts as executed by ONNX Runtime, on many observations."""

    def __init__(self, policy: Policy, certificates: Certificates) -> None:
        self.policy, self.certificates = policy, certificates
        self.rows = decision_rows(policy.actions, policy.card.decision)
        self._experts = Experts(certificates, policy)
        self._limited = limited(certificates)

    def compare(
        self, index: NDArray[np.intp], x: NDArray[np.float32], delivered: bool = False
    ) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Query k against certificate index[k].

        Args:
            delivered: cut continuous actions to the card's limits first, as they reach the robot; where certificates
                are about delivered actions, that is done in any case.

        Returns:
            inside [N]; |policy - expert| [N, r] as executed, zero outside; the certified bound [N, r] as the router
            computes it.
        """
        inside, _, bound = self.certificates.at(index, x)
        value, policy = self._experts.many(index[inside], x[inside]), self.policy.batch(x[inside])
        if self.policy.card.decision == "none":
            cut = delivered | self._limited[index[inside], None]
            value, policy = (np.where(cut, self.policy.decide(k), k) for k in (value, policy))
        error = np.zeros(bound.shape)
        error[inside] = np.abs(policy.astype(float) @ self.rows.T - value.astype(float))
        return inside, error, bound


def verify(
    library: Library,
    policy: Policy,
    network: Network | None,
    samples: int,
    attack: bool,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
    fresh: Sequence[NDArray[np.float32]] = (),
    recheck: bool = True,
) -> Findings:
    """Re-check every certificate of a library; sample and (if asked) attack those of formal kinds.

    Args:
        network: the policy's; needed for formal kinds only.
        samples: observations, spread over all regions: half of them uniform, half near corners.
        attack: also climb the error by projected gradient, from several starts in every region.
        fresh: observations [T, n] of each of some episodes that the library has not seen, for statistical kinds.
        recheck: False leaves the checker out; what is not violated is then unknown.
    """
    certificates = library.certificates
    kinds = [KINDS[code] for code in certificates.kind]
    findings = Findings(["unknown"] * len(library), np.full(len(library), np.nan), kinds)
    if len(library) == 0:
        return findings
    formal = np.flatnonzero(certificates.among(FORMAL))
    executed = Executed(policy, certificates)
    if len(formal) and network is not None:
        if recheck:
            _recheck(findings, certificates, formal, network, library.card.decision, progress)
        hunt = _Hunt(findings, library, executed, network, formal, np.random.default_rng(seed), progress)
        hunt.sample(samples)
        if attack:
            hunt.attack()
        hunt.conclude()
    for k in np.flatnonzero(certificates.among(["statistical"])).tolist():
        evidence = Evidence.read(certificates.octets.row(k))
        findings.verdicts[k] = "holds" if evidence.holds else "unknown"
        if len(fresh):
            x = drawn(certificates.regions[[k]], fresh, evidence.stay, np.random.default_rng([seed, k]))
            inside, error, bound = executed.compare(np.full(len(x), k), x, delivered=True)
            count, exceeded = int(inside.sum()), int((inside & ~(error <= bound).all(axis=1)).sum())
            findings.fresh += count
            findings.exceedances += exceeded
            if refuted(exceeded, count, evidence.delta, evidence.beta):
                findings.verdicts[k] = "violated"
                findings.first = findings.first or (
                    f"region {library.ids[k]}: {exceeded} of {count} observations, one per fresh episode, "
                    f"exceed its bound, at most {100 * evidence.delta:g}% was claimed"
                )
    return findings


def _recheck(
    findings: Findings,
    certificates: Certificates,
    formal: NDArray[np.intp],
    network: Network,
    decision: str,
    progress: Callable[[str], None],
) -> None:
    checker = Checker(network, decision)
    for done, k in enumerate(formal.tolist()):
        if findings.kinds[k] in COLLAPSED:
            from laws_ros.core.collapse_checker import verdict

            findings.verdicts[k] = verdict(checker, certificates, k)
        else:
            findings.verdicts[k] = checker.verdict(certificates, k)
        if done % 16 == 0:
            progress(f"re-checked {done + 1} of {len(formal)} certificates")


@dataclass
class _Hunt:
    """The search for an observation that breaks a bound."""

    findings: Findings
    library: Library
    executed: Executed
    network: Network
    formal: NDArray[np.intp]
    rng: np.random.Generator
    progress: Callable[[str], None]
    inverse: Floats = field(init=False)
    ball: NDArray[np.bool_] = field(init=False)
    most: Floats = field(init=False)
    worst: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.inverse = np.asarray(np.linalg.inv(self.library.certificates.transform), float)
        regions = self.library.certificates.regions
        self.ball = regions.ball
        # rounding an observation to float32 moves it by so much in its region's coordinates
        reach = np.abs(regions.center) + np.abs(self.inverse).sum(axis=2)
        margin = 1e-6 + 1.01 * 2.0**-24 * (np.abs(regions.transform) @ reach[:, :, None])[..., 0]
        within = np.where(self.ball, margin, 0.0)
        margin = np.where(self.ball, np.sqrt((within**2).sum(axis=1, keepdims=True)), margin)
        self.most = np.maximum(1.0 - margin, 0.0)
        self.worst = np.zeros(self.library.certificates.bound_offset.shape)

    def _place(self, index: NDArray[np.intp], xi: Floats) -> NDArray[np.float32]:
        moved = np.einsum("nij,nj->ni", self.inverse[index], xi)
        return np.asarray(self.library.certificates.center[index] + moved, np.float32)

    def _judge(self, index: NDArray[np.intp], x: NDArray[np.float32]) -> tuple[int, Floats]:
        """How many of the observations were inside, and by how much every error falls short of its bound."""
        inside, error, bound = self.executed.compare(index, x)
        np.maximum.at(self.worst, index[inside], error[inside])
        broken = inside & ~(error <= bound).all(axis=1)
        self.findings.violations += int(broken.sum())
        for k in np.unique(index[broken]).tolist():
            self.findings.verdicts[k] = "violated"
        if self.findings.first is None and broken.any():
            k = int(np.argmax(broken))
            self.findings.first = (
                f"region {self.library.ids[index[k]]}: at observation {x[k].tolist()} the error is "
                f"{error[k].tolist()}, certified was {bound[k].tolist()}"
            )
        return int(inside.sum()), np.where(inside[:, None], error - bound, -np.inf)

    def sample(self, samples: int) -> None:
        findings, tries = self.findings, 0
        while findings.samples < samples and tries < 4 * samples + CHUNK:  # rounding throws some out of their region
            count = min(CHUNK, samples - findings.samples)
            index = self.formal[np.arange(tries, tries + count) % len(self.formal)]
            tries += count
            xi = self.most[index] * scattered(self.rng, self.ball[index], 0.5)
            findings.samples += self._judge(index, self._place(index, xi))[0]
            self.progress(f"sampled {findings.samples} observations, {findings.violations} violations")

    def attack(self) -> None:
        collapsed = self.library.certificates.among(COLLAPSED)
        for _ in range(RESTARTS):
            for start in range(0, len(self.formal), 512):
                index = self.formal[start : start + 512]
                for climb, here in (
                    (self._gradient, index[~collapsed[index]]),
                    (self._random, index[collapsed[index]]),
                ):
                    for sign in (1.0, -1.0) if len(here) else ():
                        xi = self.most[here] * scattered(self.rng, self.ball[here])
                        self.findings.attacks += self._judge(here, self._place(here, climb(here, xi, sign)))[0]
                self.progress(f"attacked {self.findings.attacks} times, {self.findings.violations} violations")

    def _gradient(self, index: NDArray[np.intp], xi: Floats, sign: float) -> Floats:
        """Ascend sign * (policy - affine expert) - bound of a random row, along its gradient in the region's axes."""
        c, rows = self.library.certificates, self.executed.rows
        row = self.rng.integers(len(rows), size=len(index))
        for step in range(STEPS):
            x = self._place(index, xi)
            grad_x = self.network.gradient(x.astype(float), rows[row]) - c.expert_weight[index, row]
            slope = sign * np.einsum("nij,ni->nj", self.inverse[index], grad_x) - c.bound_weight[index, row]
            xi = self._clamped(xi + self._along(index, slope) * 2.0 / (step + 2), index)
        return xi

    def _clamped(self, xi: Floats, index: NDArray[np.intp]) -> Floats:
        """Moved so far inside that rounding to float32 does not throw them out."""
        most = self.most[index]
        return most * clamped(np.divide(xi, most, out=np.zeros_like(xi), where=most > 0.0), self.ball[index])

    def _along(self, index: NDArray[np.intp], slope: Floats) -> Floats:
        """The point of a box or ball of size 1 that is farthest along a slope."""
        size = np.sqrt(np.where(self.ball[index], slope * slope, 0.0).sum(axis=1, keepdims=True))
        return np.where(self.ball[index], slope / np.maximum(size, 1e-300), np.sign(slope))

    def _random(self, index: NDArray[np.intp], xi: Floats, sign: float) -> Floats:
        """Random steps, kept where the error of the worst row grows: for experts whose gradient is not at hand."""
        best = self._judge(index, self._place(index, xi))[1].max(axis=1)
        for step in range(STEPS):
            move = self.rng.choice([-1.0, 0.0, 1.0], xi.shape) * 2.0 / (step + 2)
            tried = self._clamped(xi + move, index)
            height = self._judge(index, self._place(index, tried))[1].max(axis=1)
            xi = np.where((height > best)[:, None], tried, xi)
            best = np.maximum(best, height)
        return xi

    def conclude(self) -> None:
        worst = self.worst
        with np.errstate(all="ignore"):
            ratio = self.library.certificates.worst / worst
        self.findings.ratio = np.where(worst.max(axis=1) > 0, np.where(worst > 0, ratio, np.inf).min(axis=1), np.nan)
