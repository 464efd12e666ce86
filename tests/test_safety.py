"""The laws of core/safety.py, for any sequence of calls, in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laws_ros.core.errors import ConfigError, ObservationError
from laws_ros.core.safety import (
    NEVER_NS,
    ON_DEADLINE,
    ON_ESTOP,
    ON_LIMIT,
    ON_SILENCE,
    ON_TIMEOUT,
    OPERATOR,
    POLICY,
    REACTIONS,
    Budget,
    Freshness,
    Governor,
    Limits,
    Rules,
)

MS = 1_000_000
PERIOD = 10 * MS
small = st.floats(0, 1e3, allow_subnormal=False)
anything = st.floats(allow_nan=True, allow_infinity=True)


def exact(values) -> list[Fraction]:
    return [Fraction(float(v)) for v in values]


@given(
    st.lists(st.tuples(small, small, st.integers(0, 10**10)), min_size=1, max_size=30),
    small,
    small,
    small,
    small,
)
def test_the_sum_of_paid_bounds_over_any_window_is_certified(steps, cap0, cap1, drain0, drain1) -> None:
    budget = Budget([cap0, cap1], [drain0, drain1], 2, now_ns=5)
    now, paid = 5, []
    for a, b, wait in steps:
        now += wait
        if budget.pay(np.array([a, b]), now):
            paid.append((now, exact([a, b])))
    for i in range(len(paid)):
        for j in range(i, len(paid)):
            window = Fraction(paid[j][0] - paid[i][0], 10**9)
            for k, (cap, drain) in enumerate(((cap0, drain0), (cap1, drain1))):
                assert sum(p[1][k] for p in paid[i : j + 1]) <= Fraction(cap) + Fraction(drain) * window


def test_a_budget_refuses_until_it_has_drained() -> None:
    budget = Budget([1.0], [0.5], 2, now_ns=0)
    assert budget.pay(np.array([0.4, 0.0]), 0)
    assert budget.pay(np.array([0.5, 0.1]), 0)
    before = budget.level
    assert not budget.pay(np.array([0.2, 0.0]), 0)
    assert (budget.level == before).all()  # a refusal costs nothing
    assert not budget.pay(np.array([0.2, 0.0]), -(10**12))  # nor does a clock that goes backwards give anything
    assert budget.pay(np.array([0.2, 0.0]), 400 * MS)
    assert budget.pay(np.zeros(2), 400 * MS)
    assert not budget.pay(np.array([np.nan, 0.0]), 10**15)


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [-1.0], [float("nan")], [float("inf")], []])
def test_bad_budgets(values: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"budget\.capacity"):
        Budget(values, [1.0], 2, 0)
    with pytest.raises(ConfigError, match=r"budget\.drain_per_s"):
        Budget([1.0], values, 2, 0)


@st.composite
def limits(draw) -> Limits:
    low, high = sorted((draw(st.floats(-1e3, 1e3)), draw(st.floats(-1e3, 1e3))))
    rate = draw(st.floats(1e-3, 1e6) | st.just(float("inf")))
    safe = draw(st.floats(low, high) if low < high else st.just(low))  # -0.0 and 0.0 are one number in any order
    return Limits([low], [high], [rate], [safe])


calls = st.lists(
    st.tuples(
        st.sampled_from(["answer", "react", "tick", "observed", "estop", "reset"]), anything, st.integers(0, 10**9)
    ),
    max_size=40,
)


@given(limits(), calls, st.tuples(*[st.sampled_from(REACTIONS)] * 4), anything)
def test_no_sequence_of_calls_leaves_the_limits(limit: Limits, calls, reactions, standing) -> None:
    governor = Governor(limit, Rules(PERIOD, 100 * MS, *reactions), 0)
    governor.begin([0.0 if np.isnan(standing) else standing])
    last, now = governor.last, 0
    for k, (call, value, wait) in enumerate(calls):
        now += wait
        command = None
        if call == "answer":
            try:
                command = governor.answer([value], now)
            except ObservationError:
                assert not np.isfinite(value)
        elif call == "react":
            command = governor.react((ON_DEADLINE, ON_TIMEOUT, ON_LIMIT)[k % 3], now)
        elif call == "tick":
            command = governor.tick(now)
        elif call == "observed":
            governor.observed_ns = now
        elif call == "estop":
            governor.estop("test")
        else:
            governor.reset()
        if command is None:
            continue
        assert limit.low[0] <= command[0] <= limit.high[0]
        if np.isfinite(limit.rate_per_s[0]):
            moved = abs(Fraction(float(command[0])) - Fraction(float(last[0])))
            assert moved <= Fraction(float(limit.rate_per_s[0])) * Fraction(PERIOD, 10**9)
        if governor.stopped:
            assert governor.cause == ON_ESTOP
        last = command


def governor(now: int = 0, **changes) -> Governor:
    limit = Limits([-10.0, -10.0], [10.0, 10.0], [np.inf, 100.0], [1.0, 2.0])
    made = Governor(limit, Rules(**{"period_ns": PERIOD, "observation_timeout_ns": 100 * MS, **changes}), now)
    made.begin([0.0, 0.0])
    return made


@pytest.mark.parametrize(
    ("kind", "first", "late"),
    [
        ("hold", [8.0, 1.0], [8.0, 1.0]),
        ("zero", [0.0, 0.0], [0.0, 0.0]),
        ("safe_pose", [1.0, 2.0], [1.0, 2.0]),  # the second joint moves by at most 1 a period
        ("ramp_down", [7.3, 1.1], [1.0, 2.0]),
    ],
)
@pytest.mark.parametrize(("cause", "name"), [(ON_DEADLINE, "on_deadline"), (ON_LIMIT, "on_limit")])
def test_reactions(kind: str, first: list[float], late: list[float], cause: int, name: str) -> None:
    g = governor(**{name: kind, "ramp_down_ns": 100 * MS})
    assert g.answer([8.0, 5.0], PERIOD) == pytest.approx([8.0, 1.0])
    assert g.react(cause, 2 * PERIOD) == pytest.approx(first)
    for k in range(3, 13):
        command = g.react(cause, k * PERIOD)
    assert command == pytest.approx(late)
    assert g.counts[cause] == 1
    assert g.answer([8.0, 2.5], 14 * PERIOD)[0] == 8.0
    assert g.cause == POLICY


def test_estop_latches_until_reset() -> None:
    g = governor(on_estop="zero")
    g.answer([8.0, 0.0], PERIOD)
    assert g.due_ns() == 100 * MS
    g.estop("button")
    g.estop("again")
    assert g.stopped == "button"
    assert g.due_ns() <= PERIOD  # at once
    assert g.tick(PERIOD + 1) == [0.0, 0.0]
    assert g.tick(PERIOD + 2) is None
    assert g.tick(2 * PERIOD + 1) == [0.0, 0.0]
    g.observed_ns = 3 * PERIOD
    assert g.answer([8.0, 0.0], 3 * PERIOD) == [0.0, 0.0]
    assert g.react(ON_DEADLINE, 4 * PERIOD) == [0.0, 0.0]
    g.reset()
    assert g.tick(5 * PERIOD) is None
    assert g.answer([8.0, 0.0], 5 * PERIOD) == [8.0, 0.0]
    assert g.counts[ON_ESTOP] == 1


@pytest.mark.parametrize("on_silence", ["zero", "policy"])
def test_an_operator_counts_before_the_answers_and_after_the_emergency_stop(on_silence: str) -> None:
    g = governor(on_silence=on_silence, silence_ns=30 * MS, on_estop="zero")
    assert g.operate(0) is None
    for wrong in (float("nan"), float("inf")):
        with pytest.raises(ObservationError, match="not finite"):
            g.take_over([wrong, 0.0], PERIOD)
    assert g.operate(PERIOD) is None  # who spoke no number has taken over nothing
    g.take_over([5.0, 20.0], PERIOD)
    assert g.operate(PERIOD) == [5.0, pytest.approx(1.0)]  # within the robot's limits
    assert g.cause == OPERATOR
    assert g.due_ns() == 100 * MS  # sensors may not fall silent meanwhile
    g.take_over([6.0, 0.0], 2 * PERIOD)
    assert g.operate(2 * PERIOD) == [6.0, pytest.approx(0.0)]
    assert g.counts[OPERATOR] == 1
    g.estop("button")
    assert g.operate(3 * PERIOD) == [0.0, pytest.approx(0.0)]
    assert g.cause == ON_ESTOP
    g.reset()
    assert g.operate(4 * PERIOD) == [6.0, pytest.approx(0.0)]
    silent = 2 * PERIOD + 30 * MS + 1
    if on_silence == "policy":
        assert g.operate(silent) is None
        assert g.operator is None
    else:
        assert g.operate(silent) == [0.0, pytest.approx(0.0)]
        assert g.cause == ON_SILENCE and g.operator is not None
        g.hand_back()
        assert g.operate(silent) is None
    assert g.answer([3.0, 0.0], silent)[0] == 3.0
    with pytest.raises(ObservationError, match="not finite"):
        g.answer([float("nan"), 0.0], silent)


def test_observation_timeout_repeats_until_an_observation_comes() -> None:
    g = governor(on_timeout="safe_pose")
    assert g.tick(100 * MS - 1) is None
    assert g.tick(100 * MS) == pytest.approx([1.0, 1.0])
    assert g.tick(105 * MS) is None
    assert g.tick(110 * MS) == pytest.approx([1.0, 2.0])
    g.observed_ns = 111 * MS
    g.answer([0.0, 0.0], 111 * MS)
    assert g.due_ns() == 211 * MS
    assert g.counts[ON_TIMEOUT] == 1


def test_nothing_is_commanded_before_the_first_observation() -> None:
    g = Governor(Limits([-1], [1], [np.inf], [0]), Rules(PERIOD, 100 * MS), 0)
    assert g.due_ns() == NEVER_NS
    assert g.tick(10**12) is None
    g.estop("early")
    assert g.tick(10**12) is None


def test_the_first_command_starts_where_the_robot_stands() -> None:
    g = Governor(Limits([-3], [3], [10.0], [0]), Rules(PERIOD, 100 * MS), 0)
    g.begin([2.0])
    assert g.answer([-3.0], 1) == pytest.approx([1.9])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Limits([1.0], [0.0], [1.0], [0.5]), "safe 0.5"),
        (lambda: Limits([0.0], [1.0], [1.0], [2.0]), "safe 2"),
        (lambda: Limits([0.0], [1.0], [0.0], [0.5]), "rate_per_s 0"),
        (lambda: Limits([0.0], [1.0], [float("nan")], [0.5]), "rate_per_s nan"),
        (lambda: Rules(1, 1, on_deadline="panic"), "on_deadline: 'panic' is none of hold"),
    ],
)
def test_bad_rules(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_freshness_of_order_and_clock() -> None:
    fresh = Freshness(100 * MS)
    x = np.zeros(2, np.float32)
    fresh.check(1000 * MS, x, 0)
    fresh.check(1000 * MS, x, 10 * MS)  # repeated: allowed, unless freeze_ns says otherwise
    with pytest.raises(ObservationError, match=r"0\.500000 s before"):
        fresh.check(500 * MS, x, 20 * MS)
    fresh.check(1010 * MS, x, 30 * MS)
    with pytest.raises(ObservationError, match="set back"):
        fresh.check(10 * MS, x, 129 * MS)
    fresh.check(20 * MS, x, 130 * MS)  # nothing else has come for the timeout
    fresh.check(30 * MS, x, 140 * MS)
    fresh.check(0, x, 150 * MS)  # a message without a stamp


def test_freshness_of_values() -> None:
    fresh = Freshness(100 * MS, freeze_ns=50 * MS)
    x = np.zeros(2, np.float32)
    fresh.check(0, x, 0)
    fresh.check(0, x, 50 * MS)
    with pytest.raises(ObservationError, match=r"0\.051 s: a frozen sensor"):
        fresh.check(0, x, 51 * MS)
    fresh.check(0, x + 1, 52 * MS)
    fresh.check(0, x, 100 * MS)


def test_freshness_of_delay() -> None:
    fresh = Freshness(10**9, delay_ns=50 * MS)
    x = np.zeros(1, np.float32)
    for k in range(1, 100):
        fresh.check(k * PERIOD, x, 10**12 + k * PERIOD + (k % 7) * MS)  # clocks that do not agree, jitter of 6 ms
    with pytest.raises(ObservationError, match=r"0\.060 s older"):
        fresh.check(100 * PERIOD, x, 10**12 + 106 * PERIOD)
    fresh.check(101 * PERIOD, x, 10**12 + 101 * PERIOD + 40 * MS)
