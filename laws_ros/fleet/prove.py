"""Nothing foreign is trusted: every expert that arrives is proved again, here, for the policy file that runs here.

A signature says who sent an expert, not that it is true; the checker (core.checker, core.collapse_checker) says that it
is true, whoever sent it. Collapsed experts arrive as region and neuron states, and the matrices that are proved are
multiplied out from this machine's own policy file. Statistical certificates cannot be proved by anyone: they count
exceedances in the traffic that one robot saw, so they stay with the robot that made them.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from laws_ros.core.certificate import COLLAPSED, FORMAL, KINDS, Certificates
from laws_ros.core.checker import Checker
from laws_ros.core.collapse_checker import verdict
from laws_ros.core.collapsed import States, multiply_out
from laws_ros.core.errors import LawsError
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy


class Prover:
    """Proves experts of one policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @cached_property
    def _checker(self) -> Checker:
        return Checker(load_network(self.policy.path), self.policy.card.decision)

    def refusal(self, certificates: Certificates, k: int) -> str | None:
        """Why expert k may not be used, None if it was proved."""
        kind = KINDS[certificates.kind[k]]
        if kind not in FORMAL:
            return f"kind {kind}: it speaks of one robot's traffic, and nothing in it can be proved elsewhere"
        if reason := self._dishonest(certificates, k, kind):
            return reason
        prove = verdict if kind in COLLAPSED else Checker.verdict
        with np.errstate(all="ignore"):
            return None if prove(self._checker, certificates, k) == "holds" else f"kind {kind}: not proved"

    def _dishonest(self, c: Certificates, k: int, kind: str) -> str | None:
        """What the bound does not depend on, and would mislead: a cost that puts it before others, spare bytes."""
        rows, inputs = c.expert_weight.shape[1:]
        if not 0 <= c.round[k] <= inputs:
            return f"a ball of {c.round[k]} axes, there are {inputs}"
        cost = 0 if kind == "point" else rows * inputs
        if kind in COLLAPSED:
            try:
                network = self._checker.network
                cost = multiply_out(network, States.of(c, k, network)).rounded().multiplications
            except LawsError as error:
                return str(error)
            if c.expert_weight[k].any() or c.expert_bias[k].any():
                return f"kind {kind} with an affine expert"
        elif len(c.octets.row(k)):
            return f"kind {kind} with a network"
        elif len(limits := c.floats.row(k)) and (
            # cut to limits of its own choice, an expert may agree with the policy and still mean nothing
            self.policy.card.decision != "none" or not np.array_equal(limits, self.policy.card.limits.ravel())
        ):
            return "about actions cut to other limits than the card's"
        return None if c.cost[k] == cost else f"its cost is {cost} multiplications, it claims {c.cost[k]}"
