from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from laws_ros.core.card import Card
from laws_ros.core.errors import CardError, ObservationError
from laws_ros.runtime.policy import Policy
from tests.conftest import CARD


def card(**changes: object) -> Card:
    return Card.from_dict({**yaml.safe_load(CARD), **changes}, "c.yaml")


def test_it_comes_back_from_its_own_dictionary() -> None:
    assert Card.from_dict(card().to_dict(), "x") == card()
    unlimited = Card.plain("p", 3, 2, "argmax")
    assert Card.from_dict(unlimited.to_dict(), "x") == unlimited


def test_what_a_card_states_as_vectors() -> None:
    one = card()
    assert one.low.tolist() == [-5.0] * 3 and one.high.tolist() == [5.0] * 3
    assert one.action_range.tolist() == [2.0, 2.0]
    assert np.isinf(Card.plain("p", 3, 2, "none").action_range).all()
    with pytest.raises(CardError, match=r"c.yaml: a card is a mapping, found list"):
        Card.from_dict([], "c.yaml")
    assert one.difference(replace(one, actions=one.actions[:1])) == "2 actions against 1"
    assert one.difference(one) == "no difference"


def test_the_digest_binds_order_units_and_ranges_but_not_the_name() -> None:
    one = card()
    a, b, c = one.observations
    assert replace(one, name="other").digest == one.digest
    for other in (
        replace(one, observations=(b, a, c)),
        replace(one, observations=(replace(a, unit="deg"), b, c)),
        replace(one, observations=(replace(a, high=4.0), b, c)),
        replace(one, decision="argmax"),
        replace(one, context=("a.position",)),
    ):
        assert other.digest != one.digest
        assert one.difference(other) != "no difference"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"speed": 1}, r"c.yaml: unknown key 'speed'"),
        ({"observations": []}, "observations: a list"),
        ({"observations": [{"name": "a", "units": "rad"}]}, r"observations\[0\]: unknown key 'units'"),
        ({"observations": [{"name": "a", "low": "x"}]}, r"observations\[0\].low: a number is needed, found 'x'"),
        ({"observations": [{"name": "a", "low": 2, "high": 1}]}, "low 2 is not below high 1"),
        ({"observations": [{"name": "a"}, {"name": "a"}]}, "'a' stands twice"),
        ({"observations": [{"unit": "m"}]}, r"observations\[0\].name"),
        ({"actions": "none"}, "actions: a list"),
        ({"decision": "argmaximum"}, "decision: 'argmaximum' is none of"),
        ({"context": ["station"]}, "context: 'station' is not one of"),
        ({"context": "a.position"}, "context: a list of observation names is needed, found 'a.position'"),
        ({"actions": ["effort"]}, r"actions\[0\]: a mapping with name, unit, low, high is needed, found 'effort'"),
    ],
)
def test_a_malformed_card_is_refused_by_field_and_value(changes, message) -> None:
    with pytest.raises(CardError, match=message) as caught:
        card(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value, message",
    [
        ([0.0, 0.0, np.nan], "a.velocity = nan rad/s is not a number"),
        ([0.0, 5.1, 0.0], r"b.position = 5.1 m is outside \[-5, 5\]"),
        ([0.0, 0.0, -np.inf], "a.velocity"),
        ([0.0, 0.0], "shape"),
    ],
)
def test_bad_observations_are_named(value, message) -> None:
    with pytest.raises(ObservationError, match=message):
        card().check(np.array(value, np.float32))
    card().check(np.array([5.0, -5.0, 0.0], np.float32))


def test_a_card_that_does_not_fit_its_policy_is_refused(built, tmp_path) -> None:
    path = tmp_path / "small.onnx"
    path.write_bytes(built.path.read_bytes())
    short = yaml.safe_load(CARD)
    del short["observations"][0]
    path.with_suffix(".yaml").write_text(yaml.safe_dump(short))
    with pytest.raises(CardError, match=r"2 observations, but small\.onnx has 3"):
        Policy(path)
    path.with_suffix(".yaml").write_text(CARD)
    with pytest.raises(CardError, match="decision: 'none', but 'argmax' was asked for"):
        Policy(path, decision="argmax")
