"""What may reach the actuators. No clock and no I/O: every call is told the time, in ns of a steady clock.

Laws, each for any sequence of calls, exactly and with rounding included (tests/test_safety.py):
1. every command lies within its limits;
2. two successive commands differ by at most rate_per_s times one control period;
3. the bounds that a budget has paid in any window of t seconds sum to at most capacity + drain_per_s * t, per action;
4. from `estop` until `reset` every command is the configured reaction, whatever else is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, ObservationError

Floats = NDArray[np.float64]
REACTIONS = ("hold", "zero", "safe_pose", "ramp_down")
# What a command comes from, beside the regions 0, 1, ... of the library.
POLICY, ON_DEADLINE, ON_TIMEOUT, ON_LIMIT, ON_ESTOP, ON_SILENCE, OPERATOR = range(-1, -8, -1)
SOURCES = {POLICY: "policy", ON_DEADLINE: "deadline", ON_TIMEOUT: "timeout", ON_LIMIT: "limit", ON_ESTOP: "estop"}
SOURCES |= {ON_SILENCE: "silence", OPERATOR: "operator"}
RESUME = "policy"  # on_silence may be this, beside the reactions
NEVER_NS = 2**62
BELOW = 1.0 - 2.0**-50  # makes a product of floats, with its roundings, no larger than the exact one


@dataclass(frozen=True)
class Limits:
    """Of the commands [m], in the units in which they are published.

    Attributes:
        low, high: no command is published outside.
        rate_per_s: largest change of a command, per second; infinite where there is no limit.
        safe: the command of the reaction `safe_pose`, and where `ramp_down` ends.
    """

    low: Floats
    high: Floats
    rate_per_s: Floats
    safe: Floats

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, np.array(getattr(self, field.name), dtype=float))
        for k, (low, high, rate, safe) in enumerate(zip(self.low, self.high, self.rate_per_s, self.safe, strict=True)):
            if not low <= safe <= high:
                raise ConfigError(f"limits of command {k}: safe {safe:g} is not within [{low:g}, {high:g}]")
            if not rate > 0:
                raise ConfigError(f"limits of command {k}: rate_per_s {rate:g} is not above 0")


@dataclass(frozen=True)
class Rules:
    """How a controller reacts; the nodes' parameters of the same names.

    Attributes:
        period_ns: one control period.
        on_deadline, on_timeout, on_limit, on_estop: one of REACTIONS, for an answer that is late, observations that
            fail to come, a joint beyond its limits, and the emergency stop.
        on_silence: for an operator who has taken over and falls silent without handing back; RESUME: as if they had.
        silence_ns: this long without a word of theirs is silence.
        observation_timeout_ns: without a usable observation for this long, `on_timeout`.
        ramp_down_ns: how long `ramp_down` takes.
    """

    period_ns: int
    observation_timeout_ns: int
    on_deadline: str = "hold"
    on_timeout: str = "hold"
    on_limit: str = "hold"
    on_estop: str = "zero"
    ramp_down_ns: int = 500_000_000
    on_silence: str = "hold"
    silence_ns: int = 500_000_000

    def __post_init__(self) -> None:
        for name in ("on_deadline", "on_timeout", "on_limit", "on_estop", "on_silence"):
            known = (*REACTIONS, RESUME) if name == "on_silence" else REACTIONS
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")

    def reaction(self, cause: int) -> str:
        name: str = getattr(self, f"on_{SOURCES[cause]}")
        return name


class Governor:
    """Turns answers, their absence, an operator's commands and emergencies into commands that keep the laws above.

    Who counts, in this order: the emergency stop, the operator, the robot's limits and silent sensors, the answers.

    `estop` and `reset` may be called from any thread; everything else belongs to the control thread.

    Attributes:
        last: the last command [m], or None before `begin`: nothing is commanded before the first observation.
        observed_ns: to be set whenever a usable observation has arrived.
        cause: the reaction in force (one of SOURCES), OPERATOR, or POLICY while answers are published.
        operator: the newest command [m] of an operator who has taken over, else None.
        stopped: why the emergency stop is latched, else "".
        counts: how often each reaction began.
    """

    def __init__(self, limits: Limits, rules: Rules, now_ns: int) -> None:
        self.rules = rules
        self.last: list[float] | None = None
        self.cause = POLICY
        self.stopped = ""
        self.counts = dict.fromkeys(list(SOURCES)[1:], 0)
        # Plain floats: for a handful of commands that is faster than NumPy, above all with cold caches.
        step = limits.rate_per_s * (rules.period_ns / 1e9) * BELOW
        self._limits = list(zip(limits.low.tolist(), limits.high.tolist(), step.tolist(), strict=True))
        self._safe: list[float] = limits.safe.tolist()
        self.observed_ns = now_ns
        self.operator: list[float] | None = None
        self._spoken_ns = now_ns
        self._began_ns = self._published_ns = now_ns
        self._from = self._safe

    def estop(self, reason: str) -> None:
        """Latch the emergency stop."""
        self.stopped = self.stopped or reason

    def reset(self) -> None:
        """Release it: the next usable observation is answered again."""
        self.stopped = ""

    def take_over(self, command: Sequence[float], now_ns: int) -> None:
        """An operator commands [m]; until `hand_back` no answer is published.

        Raises:
            ObservationError: no usable number; who was in command still is.
        """
        if not all(map(math.isfinite, command)):
            raise ObservationError(f"the operator's command {list(command)} is not finite")
        self.operator, self._spoken_ns = list(command), now_ns

    def hand_back(self) -> None:
        """The operator lets go."""
        self.operator = None

    def operate(self, now_ns: int) -> list[float] | None:
        """The command [m] while an operator is in command, or None."""
        if self.operator is None:
            return None
        if self.stopped:
            return self.react(ON_ESTOP, now_ns)
        if now_ns - self._spoken_ns > self.rules.silence_ns:
            if self.rules.on_silence != RESUME:
                return self.react(ON_SILENCE, now_ns)
            self.hand_back()
            return None
        if self.cause != OPERATOR:
            self.cause = OPERATOR
            self.counts[OPERATOR] += 1
        return self._publish(self.operator, now_ns)

    def begin(self, standing: Sequence[float]) -> None:
        """The first usable observation is there.

        Args:
            standing: [m] the command that the robot's present state corresponds to; the first command starts there,
                so that a position-controlled robot does not leap.
        """
        self.last = [min(max(float(v), low), high) for v, (low, high, _) in zip(standing, self._limits, strict=True)]

    def answer(self, wanted: Sequence[float], now_ns: int) -> list[float]:
        """The command [m] for an answer.

        Raises:
            ObservationError: no usable number; nothing is published.
        """
        if self.stopped:
            return self.react(ON_ESTOP, now_ns)
        if not all(map(math.isfinite, wanted)):
            raise ObservationError(f"command {list(wanted)} is not finite")
        self.cause = POLICY
        return self._publish(wanted, now_ns)

    def react(self, cause: int, now_ns: int) -> list[float]:
        """The command [m] of a reaction, which begins now unless it is in force already."""
        assert self.last is not None
        if self.stopped:
            cause = ON_ESTOP
        if cause != self.cause:
            self.cause, self._began_ns, self._from = cause, now_ns, self.last
            self.counts[cause] += 1
        kind = self.rules.reaction(cause)
        if kind == "hold":
            return self._publish(self.last, now_ns)
        if kind == "zero":
            return self._publish([0.0] * len(self.last), now_ns)
        passed = 1.0
        if kind == "ramp_down":
            passed = min(1.0, (now_ns - self._began_ns + self.rules.period_ns) / max(1, self.rules.ramp_down_ns))
        return self._publish([a + passed * (b - a) for a, b in zip(self._from, self._safe, strict=True)], now_ns)

    def due_ns(self) -> int:
        """When `tick` next has something to do, if nothing else happens."""
        if self.last is None:
            return NEVER_NS
        if self.stopped and self.cause != ON_ESTOP:
            return 0
        silent_ns, period_ns = self.observed_ns + self.rules.observation_timeout_ns, self.rules.period_ns
        if self.cause in (ON_ESTOP, ON_TIMEOUT):
            return self._published_ns + period_ns
        return max(silent_ns, self._published_ns + period_ns) if self.operator is not None else silent_ns

    def tick(self, now_ns: int) -> list[float] | None:
        """The command [m] that must be published although no observation has arrived, or None."""
        if now_ns < self.due_ns():
            return None
        if self.stopped:
            return self.react(ON_ESTOP, now_ns)
        if now_ns - self.observed_ns < self.rules.observation_timeout_ns:  # only just released
            return None
        command = self.operate(now_ns)
        return self.react(ON_TIMEOUT, now_ns) if command is None else command

    def _publish(self, wanted: Sequence[float], now_ns: int) -> list[float]:
        assert self.last is not None
        command = []
        for value, last, (low, high, step) in zip(wanted, self.last, self._limits, strict=True):
            if step != math.inf:
                # One float towards `last`, so that the difference is within the step even after rounding.
                low = max(low, math.nextafter(last - step, last))
                high = min(high, math.nextafter(last + step, last))
            command.append(low if value < low else high if value > high else value)
        self._published_ns, self.last = now_ns, command
        return command


class Budget:
    """A leaky bucket of certified error, one level per action; see law 3.

    Attributes:
        level: [m] action units; what has been paid and not drained yet, rounded up.
    """

    def __init__(self, capacity: Sequence[float], drain_per_s: Sequence[float], actions: int, now_ns: int) -> None:
        """Raises ConfigError unless there is one number for all actions or one each, finite and not negative."""
        self.capacity = _per_action("budget.capacity", capacity, actions)
        self._drain = _per_action("budget.drain_per_s", drain_per_s, actions) * BELOW
        self.level = np.zeros(actions)
        self._now_ns = now_ns

    def pay(self, bound: Floats, now_ns: int) -> bool:
        """Take the bounds [m] of an answer into account, if they fit; False: the policy has to answer."""
        passed_ns = max(0, now_ns - self._now_ns)
        self._now_ns += passed_ns
        drained = self._drain * (passed_ns / 1e9)
        rest = np.maximum(np.nextafter(self.level - drained, math.inf), 0.0)
        self.level = np.where((drained > 0.0) & (self.level > 0.0), rest, self.level)
        level = np.where(bound == 0.0, self.level, np.nextafter(self.level + bound, math.inf))
        if not (level <= self.capacity).all():  # a NaN does not fit
            return False
        self.level = level
        return True


class Freshness:
    """Refuses observations that only look like news: repeated, out of order, or delayed on the way.

    Args:
        timeout_ns: a stamp before the last one is out of order, until nothing else has come for this long: then the
            clock was set back, and counts from there.
        freeze_ns: values that have not changed for this long come from a frozen sensor; 0: they may stand still.
        delay_ns: an observation that took this much longer than the fastest one is too old; 0: not checked. The two
            clocks need not agree, only run at the same rate.
    """

    DRIFT = 1e-4  # by which the two clocks' rates may differ

    def __init__(self, timeout_ns: int, freeze_ns: int = 0, delay_ns: int = 0) -> None:
        self._timeout_ns, self._freeze_ns, self._delay_ns = timeout_ns, freeze_ns, delay_ns
        self._stamp_ns = self._accepted_ns = self._changed_ns = 0
        self._values: Any = None
        self._offset_ns: float | None = None  # of the fastest observation

    def check(self, stamp_ns: int, values: NDArray[Any], now_ns: int) -> None:
        """Raise ObservationError unless this is news.

        Args:
            stamp_ns: of the message, 0 if it has none.
            values: the observation vector.
        """
        if self._freeze_ns:
            data = values.tobytes()
            if data != self._values:
                self._values, self._changed_ns = data, now_ns
            elif now_ns - self._changed_ns > self._freeze_ns:
                raise ObservationError(
                    f"the values have not changed for {(now_ns - self._changed_ns) / 1e9:.3f} s: a frozen sensor"
                )
        if stamp_ns:
            if stamp_ns < self._stamp_ns:
                if now_ns - self._accepted_ns < self._timeout_ns:
                    raise ObservationError(
                        f"its stamp lies {(self._stamp_ns - stamp_ns) / 1e9:.6f} s before the last one's: out of "
                        "order, or a clock that was set back"
                    )
                self._offset_ns = None
            if self._delay_ns:
                offset = float(now_ns - stamp_ns)
                if self._offset_ns is not None:
                    fastest = self._offset_ns + self.DRIFT * (now_ns - self._accepted_ns)
                    if offset - fastest > self._delay_ns:
                        raise ObservationError(
                            f"it is {(offset - fastest) / 1e9:.3f} s older than the fastest one was: delayed on the way"
                        )
                    offset = min(offset, fastest)
                self._offset_ns = offset
            self._stamp_ns = stamp_ns
        self._accepted_ns = now_ns


def _per_action(name: str, value: Sequence[float], actions: int) -> Floats:
    numbers = np.array(value, dtype=float).reshape(-1)
    if numbers.size not in (1, actions):
        raise ConfigError(f"{name} {numbers.tolist()}: {numbers.size} values for {actions} actions")
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise ConfigError(f"{name} {numbers.tolist()}: finite values of at least 0 are needed, in action units")
    return np.array(np.broadcast_to(numbers, actions))
