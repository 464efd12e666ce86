"""Laws in words: where a region lies, what its expert answers and how far it can be off, in sensor names and units."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from laws_ros.core.card import Channel
from laws_ros.core.certificate import COLLAPSED, KINDS, decision_pairs
from laws_ros.core.library import Library
from laws_ros.core.statistical import Evidence


@dataclass(frozen=True)
class Law:
    """One region in words and numbers.

    Attributes:
        key: what the questions on the way to it add up to, as "-0.1 <= hinge.position < 0.03 rad".
        box: per observation, the interval that encloses the region, with its unit.
        expert: one formula per action (per pair of alternatives for a decision).
        kind: what stands behind the bound (core.certificate.KINDS). standing: the same in words.
        bound: per action, largest error at the region's centre and at its worst point, action units; certified, except
            for kind `statistical`.
        probability: expected share of queries that it answers (KT estimate from visits).
        hits: training observations that it answers.
    """

    id: str
    region: int
    kind: str
    standing: str
    key: list[str]
    box: list[dict[str, Any]]
    expert: list[str]
    bound: list[dict[str, Any]]
    probability: float
    hits: int

    def text(self) -> str:
        lines = [f"law {self.id}   answers {100 * self.probability:.2f}% of queries ({self.hits} seen)"]
        lines.append("  key:    " + (" and ".join(self.key) or "everything"))
        lines += [f"  where:  {b['low']:.4g} <= {b['name']} <= {b['high']:.4g} {b['unit']}".rstrip() for b in self.box]
        lines += [f"  answer: {law}" for law in self.expert]
        lines.append(f"  kind:   {self.kind}: {self.standing}")
        lines += [
            f"  within: {b['at_center']:.3g} central, {b['worst']:.3g} at worst, of {b['name']} {b['unit']}".rstrip()
            for b in self.bound
        ]
        return "\n".join(lines)


_STANDING = {
    "linear": "proved for every observation here, by affine bounds",
    "point": "proved for this one observation: its answer, replayed",
    "lipschitz": "proved for every observation here, by samples and the largest slope between them",
    "exact": "proved for every observation here: neurons that cannot change state are folded away",
    "mixed": "proved for every observation here: neurons that hardly bend are made straight",
}


def _tested(e: Evidence) -> str:
    drawn = "one per fresh episode" if e.episodes == e.samples else f"from {e.episodes} fresh episodes"
    return (
        f"tested, nothing is proved: {e.exceedances} of {e.samples} observations, {drawn}, were further off; so with "
        f"confidence 1 - {e.beta:.2g} at most {e.delta:.2%} of the traffic here is"
    )


def explain(library: Library, regions: list[int]) -> list[Law]:
    """The laws of the given regions (indices)."""
    card, c = library.card, library.certificates
    generators, _ = c.regions.generators()
    if card.decision == "none":
        names = [(a.name, a.unit) for a in card.actions]
    else:
        names = [
            (
                f"{card.actions[i].name} - {card.actions[j].name}"
                if card.decision == "argmax"
                else f"{card.actions[j].name} - {card.actions[i].name}",
                "",
            )
            for i, j in decision_pairs(len(card.actions))
        ]
    total = int(library.visits.sum())
    laws = []
    for k in regions:
        kind = KINDS[c.kind[k]]
        reach = np.abs(generators[k]).sum(axis=1)
        key = _key(library, c.center[k])
        laws.append(
            Law(
                id=library.ids[k],
                region=int(k),
                kind=kind,
                standing=_STANDING.get(kind) or _tested(Evidence.read(c.octets.row(k))),
                key=key,
                box=[
                    {"name": o.name, "unit": o.unit, "low": float(mid - r), "high": float(mid + r)}
                    for o, mid, r in zip(card.observations, c.center[k], reach, strict=True)
                ],
                expert=[
                    f"{name} = the policy with {int(c.cost[k])} multiplications left"
                    if kind in COLLAPSED
                    else _formula(name, unit, card.observations, c.expert_weight[k, r], float(c.expert_bias[k, r]))
                    for r, (name, unit) in enumerate(names)
                ],
                bound=[
                    {
                        "name": name,
                        "unit": unit,
                        "at_center": float(c.bound_offset[k, r]),
                        "worst": float(c.worst[k, r]),
                    }
                    for r, (name, unit) in enumerate(names)
                ],
                probability=(int(library.visits[k]) + 0.5) / (total + 0.5 * (len(library) + 1)),
                hits=int(library.visits[k]),
            )
        )
    return laws


def _key(library: Library, x: np.ndarray) -> list[str]:
    """The questions on the way to an observation's leaf; of several about one sensor, what they add up to."""
    trie = library.trie
    limits: dict[int, list[float]] = {}
    for node, high in trie.key(x):
        pair = limits.setdefault(int(trie.axis[node]), [-math.inf, math.inf])
        if high:
            pair[0] = max(pair[0], float(trie.threshold[node]))
        else:
            pair[1] = min(pair[1], float(trie.threshold[node]))
    words = []
    for axis, (least, most) in limits.items():
        channel = library.card.observations[axis]
        left = f"{least:.4g} <= " if least > -math.inf else ""
        right = f" < {most:.4g}" if most < math.inf else ""
        words.append(f"{left}{channel.name}{right} {channel.unit}".rstrip())
    return words


def _formula(name: str, unit: str, observations: tuple[Channel, ...], weights: np.ndarray, bias: float) -> str:
    terms = "".join(
        f" {'-' if w < 0 else '+'} {abs(w):.4g} {o.name}" for w, o in zip(weights, observations, strict=True) if w
    )
    left = f"{name} [{unit}]" if unit else name
    return f"{left} = {bias:.4g}{terms}"
