"""Two aircraft meet: what the ACAS Xu networks of VNN-COMP are for (Katz et al., CAV 2017, arXiv:1702.01135).

Both keep their speed and height. The intruder turns slowly; the own aircraft turns as the policy advises, once a
second: clear of conflict, weak left, weak right, strong left, strong right. Observations are the network's inputs,
normalised as its authors do; sensors are noisy. One second without a near mid-air collision (500 ft) earns 1.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.card import Channel

from .workloads import Parameter, Step, Workload, WorkloadSpec, index_action

TURN = tuple(math.radians(rate) for rate in (0.0, 1.5, -1.5, 3.0, -3.0))  # rad/s, left is positive
# Of the inputs distance (ft), bearing of the intruder (rad), its heading (rad), own speed and its speed (ft/s):
LOW = np.array([0.0, -math.pi, -math.pi, 100.0, 0.0])
HIGH = np.array([60760.0, math.pi, math.pi, 1200.0, 1200.0])
MEAN = np.array([19791.091, 0.0, 0.0, 650.0, 600.0])
RANGE = np.array([60261.0, 2 * math.pi, 2 * math.pi, 1100.0, 1200.0])
NOISE = np.array([50.0, 0.003, 0.01, 2.0, 5.0])  # standard deviations, in the same units
MISS_FT = 1500.0  # standard deviation of how far they would pass each other if nobody turned
CLOSEST_S = (20.0, 70.0)  # after so long
DRIFT = math.radians(0.5)  # rad/s, standard deviation of the intruder's turn
COLLISION_FT = 500.0

_NAMES = ("rho", "theta", "psi", "v_own", "v_int")
SPEC = WorkloadSpec(
    name="encounter",
    observations=tuple(
        Channel(name, "", float(low), float(high))
        for name, low, high in zip(
            _NAMES,
            np.nextafter((LOW - MEAN) / RANGE, -1).astype(np.float32),
            np.nextafter((HIGH - MEAN) / RANGE, 1).astype(np.float32),
            strict=True,
        )
    ),
    actions=tuple(
        Channel(name) for name in ("clear_of_conflict", "weak_left", "weak_right", "strong_left", "strong_right")
    ),
    discrete=True,
    period_s=1.0,
    episode_steps=100,
)


class Encounter:
    """One encounter at a time."""

    def reset(self, seed: int) -> NDArray[np.float32]:
        self._rng = rng = np.random.default_rng(seed)
        self.time = 0.0
        self.speed = rng.uniform(LOW[3:], HIGH[3:])
        heading = rng.uniform(-math.pi, math.pi)
        self.heading = np.array([0.0, heading])  # own, intruder's
        self._drift = DRIFT * rng.normal()
        # Where they would be when closest, and back from there in straight lines.
        until, side = rng.uniform(*CLOSEST_S), rng.uniform(-math.pi, math.pi)
        apart = MISS_FT * rng.normal() * np.array([math.cos(side), math.sin(side)])
        velocity = self.speed[1] * _along(heading) - self.speed[0] * _along(0.0)
        self._apart = apart - until * velocity  # from own aircraft to intruder, ft
        return self._observe()

    def step(self, action: object) -> Step:
        index = index_action(SPEC, action)
        for _ in range(4):
            self.heading += 0.25 * np.array([TURN[index], self._drift])
            own, intruder = (v * _along(h) for v, h in zip(self.speed, self.heading, strict=True))
            self._apart = self._apart + 0.25 * (intruder - own)
            if math.hypot(*self._apart) < COLLISION_FT:
                self.time += SPEC.period_s
                return Step(self._observe(), 0.0, True)
        self.time += SPEC.period_s
        return Step(self._observe(), 1.0, False)

    def close(self) -> None:
        pass

    def _observe(self) -> NDArray[np.float32]:
        bearing = math.atan2(self._apart[1], self._apart[0]) - self.heading[0]
        seen = np.array([math.hypot(*self._apart), bearing, self.heading[1] - self.heading[0], *self.speed])
        seen += NOISE * self._rng.normal(size=len(NOISE))
        seen[1:3] = (seen[1:3] + math.pi) % (2 * math.pi) - math.pi
        return np.asarray((np.clip(seen, LOW, HIGH) - MEAN) / RANGE, np.float32)


def _along(heading: float) -> NDArray[np.float64]:
    return np.array([math.cos(heading), math.sin(heading)])


PARAMETERS: dict[str, Parameter] = {}


def workload() -> Workload:
    """The encounters; they have no parameters."""
    return Workload(SPEC, Encounter)


WORKLOAD = workload()
