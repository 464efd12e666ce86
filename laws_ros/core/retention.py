"""Which experts are worth their place: those that are expected to save most time per byte.

What an expert saves is the chance that it answers the next observation, times what the policy costs more than it does.
The chance is the Krichevsky-Trofimov estimate from how often each expert answered, where old answers count less (halved
per half-life): with an endless half-life the order is that of counts (LFU), with a short one that of last use (LRU),
and between them lies what fits the traffic's drift (Lee et al. 2001, LRFU). Divided by bytes it is the greedy rule of
the knapsack problem, at most one expert's saving below what any choice could be expected to save.
"""

from __future__ import annotations

from dataclasses import fields

import numpy as np
from numpy.typing import NDArray

from .certificate import COLLAPSED, Certificates, Ragged

Floats = NDArray[np.float64]


def sizes(certificates: Certificates) -> NDArray[np.int64]:
    """[E]: bytes of each expert where it is used: its part of a snapshot, and its weights in ONNX Runtime."""
    c = certificates
    arrays = [getattr(c, f.name) for f in fields(c)]
    fixed = sum(a.itemsize * int(np.prod(a.shape[1:])) for a in arrays if not isinstance(a, Ragged))
    ragged = sum(a.values.itemsize * np.diff(a.start) for a in arrays if isinstance(a, Ragged))
    affine = c.expert_weight[0].size + c.expert_bias[0].size if len(c) else 0
    weights = 4 * np.where(c.among(COLLAPSED), c.cost, affine)  # a multiplication needs a weight
    return np.asarray(fixed + ragged + weights, np.int64)


def expected_savings(answers: Floats, cost: NDArray[np.int64], policy_cost: float) -> Floats:
    """[E]: multiplications that each expert is expected to save at the next observation.

    Args:
        answers: [E] how often it answered, with old answers counting less.
        cost: [E] its multiplications; policy_cost: those of the policy.
    """
    probability = (answers + 0.5) / (answers.sum() + 0.5 * len(answers) + 0.5)  # the last half: none of them answers
    return np.asarray(probability * np.maximum(policy_cost - cost, 0.0))


def retained(
    savings: Floats, size: NDArray[np.int64], most: int | None = None, most_bytes: int | None = None
) -> NDArray[np.bool_]:
    """[E]: which experts stay within a budget; earlier ones win a tie.

    Args:
        savings: [E] what each is expected to save; size: [E] its bytes.
        most, most_bytes: that stay at most, experts and bytes; None: as many as there are.
    """
    kept = np.zeros(len(savings), dtype=bool)
    count, room = len(savings) if most is None else most, np.inf if most_bytes is None else most_bytes
    for k in np.argsort(-savings / (size if most_bytes is not None else 1.0), kind="stable"):
        if count > 0 and size[k] <= room:  # a smaller one may still fit
            kept[k] = True
            count, room = count - 1, room - size[k]
    return kept
