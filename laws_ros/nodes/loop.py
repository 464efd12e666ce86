"""The control loop without ROS: one message in, at most one action out.

A step, in order:
1. a message that cannot be read or fails the card's check, or for which the policy's output is not finite, is counted,
   and no action comes of it;
2. where the library answers, its action is published;
3. otherwise the full policy answers, and its action is published.

It runs in the thread that receives the message: waking another one cost 0.2 ms at the median (docs/adr/0003).
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import ObservationError
from laws_ros.runtime.cached_policy import Answer, CachedPolicy

REACTIONS = ("hold", "zero")
GC_PERIOD_S = 1.0


class Step(NamedTuple):
    """One answered observation."""

    stamp_s: float  # as in the message's header
    observation: NDArray[np.float32]
    answer: Answer
    lookup_us: float
    policy_us: float  # 0 on a hit
    latency_us: float  # from the arrival of the message until the command was published


class Recent:
    """The newest `size` values of a latency, in memory that does not grow."""

    def __init__(self, size: int = 2048) -> None:
        self._values = np.empty(size)
        self._count = 0

    def add(self, value: float) -> None:
        self._values[self._count % len(self._values)] = value
        self._count += 1

    def percentiles(self, *ranks: float) -> list[float]:
        """Percentiles of what is kept, NaN where nothing is."""
        kept = self._values[: self._count]
        return np.percentile(kept, ranks).tolist() if len(kept) else [float("nan")] * len(ranks)


class ControlLoop:
    """Answers observations; between `start` and `stop` it also governs the process's garbage collection.

    Args:
        cached: the policy and its library.
        read: turns a message into an observation vector [n], raising ObservationError.
        publish: sends a command [m] to the actuators.
        record: is given every answered step, after its command has been published.
        rate_hz: a command later than one period after its message's arrival is a missed deadline.
        on_timeout: "hold" repeats the last command, "zero" sends zeros, or the card's nearest limits.
    """

    def __init__(
        self,
        cached: CachedPolicy,
        read: Callable[[Any], NDArray[np.float32]],
        publish: Callable[[NDArray[np.floating]], None],
        record: Callable[[Step], None],
        rate_hz: float,
        on_timeout: str,
    ) -> None:
        self._cached, self._read, self._publish, self._record = cached, read, publish, record
        self._deadline_us = 1e6 / rate_hz
        low, high = ([getattr(c, limit) for c in cached.card.actions] for limit in ("low", "high"))
        self._on_timeout = np.clip(np.zeros(len(low)), low, high) if on_timeout == "zero" else None
        self._last: NDArray[np.floating] | None = None
        self._collected_s = 0.0
        self.hits = self.misses = self.deadline_misses = self.rejected = self.timeouts = 0
        self.rejection = ""  # why the latest rejected message was rejected
        self.stale = False
        self.hit_us, self.policy_us, self.latency_us = Recent(), Recent(), Recent()

    def start(self) -> None:
        # Garbage is collected right after a step, when the next is a period away (see `step`), not wherever an
        # allocation falls; what was there before is left alone, which keeps it short.
        gc.collect()
        gc.freeze()
        gc.disable()

    def stop(self) -> None:
        gc.enable()
        gc.unfreeze()

    def step(self, message: Any) -> bool:
        """Answer one message at once; False if it holds no usable observation."""
        arrived_ns = time.perf_counter_ns()
        try:
            observation = self._read(message)
            self._cached.card.check(observation)
            began_ns = time.perf_counter_ns()
            answer = self._cached.lookup(observation)
            looked_ns = decided_ns = time.perf_counter_ns()
            if answer is None:
                answer = self._cached.fallback(observation)
                decided_ns = time.perf_counter_ns()
        except ObservationError as error:
            self.rejection = str(error)
            self.rejected += 1
            return False
        self._publish(answer.action)
        published_ns = time.perf_counter_ns()
        self._last, self.stale = answer.action, False
        lookup_us, policy_us = (looked_ns - began_ns) / 1e3, (decided_ns - looked_ns) / 1e3
        latency_us = (published_ns - arrived_ns) / 1e3
        if policy_us:
            self.misses += 1
            self.policy_us.add(policy_us)
        else:
            self.hits += 1
            self.hit_us.add(lookup_us)
        self.latency_us.add(latency_us)
        self.deadline_misses += latency_us > self._deadline_us
        stamp = message.header.stamp
        self._record(Step(stamp.sec + stamp.nanosec * 1e-9, observation, answer, lookup_us, policy_us, latency_us))
        if published_ns * 1e-9 - self._collected_s > GC_PERIOD_S:
            gc.collect()
            self._collected_s = published_ns * 1e-9
        return True

    def time_out(self) -> None:
        """No usable observation for too long: publish the reaction, unless nothing has been answered yet."""
        self.timeouts += not self.stale
        self.stale = True
        if self._last is not None:
            self._publish(self._last if self._on_timeout is None else self._on_timeout)
