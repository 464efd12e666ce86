"""The world of the ACAS Xu networks: geometry, and that advisories matter in it."""

from __future__ import annotations

import numpy as np
import pytest

from laws_ros.build import encounter, workloads
from laws_ros.core.errors import WorkloadError


def in_units(x: np.ndarray) -> np.ndarray:
    """Distance ft, bearing and heading rad, speeds ft/s."""
    return x.astype(float) * encounter.RANGE + encounter.MEAN


def test_both_fly_straight_where_nobody_turns(monkeypatch):
    monkeypatch.setattr(encounter, "NOISE", np.zeros(5))
    monkeypatch.setattr(encounter, "DRIFT", 0.0)
    simulation = encounter.Encounter()
    for seed in range(20):
        seen = [in_units(simulation.reset(seed))]
        while len(seen) < 30:
            step = simulation.step(0)
            seen.append(in_units(step.observation))
            if step.terminated:
                break
        distance, bearing, heading, own, other = np.array(seen).T
        assert np.ptp(own) < 1e-3 and np.ptp(other) < 1e-3 and np.ptp(np.unwrap(heading)) < 1e-5
        shown = distance < 60_000  # further away than the network can be told is shown as the furthest
        place = (distance * np.exp(1j * bearing))[shown]
        assert simulation.time == len(seen) - 1
        if len(place) > 2 and not step.terminated:
            velocity = other[0] * np.exp(1j * heading[0]) - own[0]
            np.testing.assert_allclose(np.diff(place), velocity, atol=0.1)


@pytest.mark.parametrize(("advisory", "rate"), list(enumerate((0.0, 1.5, -1.5, 3.0, -3.0))))
def test_advisories_turn_the_own_aircraft(monkeypatch, advisory, rate):
    monkeypatch.setattr(encounter, "NOISE", np.zeros(5))
    monkeypatch.setattr(encounter, "DRIFT", 0.0)
    simulation = encounter.Encounter()
    before = in_units(simulation.reset(3))[2]
    after = in_units(simulation.step(advisory).observation)[2]
    turned = np.degrees((before - after + np.pi) % (2 * np.pi) - np.pi)  # the intruder's heading turns the other way
    assert turned == pytest.approx(rate, abs=1e-3)


def test_one_in_five_collides_without_advisories():
    found = workloads.rollouts(workloads.get("encounter"), lambda x: np.zeros((len(x), 1)), 100, 0)
    assert (found.returns < 99.5).sum() == 19
    simulation = encounter.Encounter()
    simulation.reset(0)
    with pytest.raises(WorkloadError, match="no index from 0 to 4"):
        simulation.step(5)
