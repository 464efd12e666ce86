"""The control loop without ROS: messages in, at most one command out for each, and commands when none come.

A step, once the observation is complete:
1. one that cannot be read, lies outside the card's ranges or is no news is counted, and no command comes of it;
2. while the emergency stop is latched, the configured reaction is published;
3. while an operator is in command, what they command is, within the limits, and the observation is in quarantine;
4. beyond the robot's own limits, the configured reaction is published;
5. where the library answers, outside the quarantine, and the error budget has room, its action is published;
6. otherwise the full policy is asked, on its worker; if it is late, the reaction to that is published.

The caller gives a thread: it calls `step` and `operate` for every message and `tick` when `due_ns` has come. `estop`,
`reset`, `retune` and `renew` may be called from any other one.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.errors import ObservationError
from laws_ros.core.library import Library
from laws_ros.core.observation import Assembler, Binding
from laws_ros.core.safety import (
    NEVER_NS,
    ON_DEADLINE,
    ON_ESTOP,
    ON_LIMIT,
    ON_SILENCE,
    OPERATOR,
    POLICY,
    Budget,
    Freshness,
    Governor,
    Rules,
)
from laws_ros.runtime.cached_policy import Answer, CachedPolicy
from laws_ros.runtime.quarantine import Quarantine
from laws_ros.runtime.takeovers import Correction

GC_PERIOD_NS = 1_000_000_000
# Between two steps other work takes the processor's caches: a lookup then costs ten times what it does in a row. So the
# loop looks the last observation up again this long before it expects the next, and the answer to that comes sooner.
WARM_NS = 1_500_000


class Step(NamedTuple):
    """One published command."""

    time_ns: int  # of the steady clock, when it was published
    stamp_s: float  # as in the message's header
    source: int  # the region, POLICY, or the reaction (core.safety)
    observation: NDArray[np.float32] | None  # None: a reaction without a new one
    answer: Answer | None  # None: a reaction
    command: list[float]
    lookup_us: float
    policy_us: float  # on the worker, 0 on a hit
    latency_us: float  # from the arrival of the message until the command was published, 0 without a message


class Update(NamedTuple):
    """What a loop is to answer from, from its next step on.

    Attributes:
        quarantine: made for this library from everything that was corrected so far.
        corrections: how many of this loop's own steps of takeovers that includes (`ControlLoop.corrections`).
    """

    cached: CachedPolicy
    quarantine: Quarantine
    corrections: int


def number_of(library: Library) -> float:
    """The first 12 digits of a library's digest as a number, so that a row of numbers can name its library."""
    return float(int(library.digest[:12], 16))


class Recent:
    """The newest `size` values of a quantity, in memory that does not grow."""

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


class Worker:
    """Runs the policy in a thread of its own, so that a late one holds nobody up; only the newest question counts."""

    def __init__(self, policy: Callable[[NDArray[np.float32]], Answer]) -> None:
        self._policy = policy
        self._condition = threading.Condition()
        self._question: NDArray[np.float32] | None = None
        self._result: tuple[Answer | Exception, float] | None = None
        self._ticket = 0
        self._stopping = self._interrupted = False
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)
        self._thread.start()

    def ask(self, observation: NDArray[np.float32], timeout_s: float) -> tuple[Answer, float] | None:
        """The policy's answer and how long it took [us], or None if it is late or interrupted.

        Raises:
            Exception: whatever the policy raises.
        """
        with self._condition:
            self._ticket += 1
            self._question, self._result, self._interrupted = observation, None, False
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._result is not None or self._interrupted, timeout_s)
            result, self._question = self._result, None
            self._ticket += 1  # what comes later answers nobody
        if result is None:
            return None
        answer, took_us = result
        if isinstance(answer, Exception):
            raise answer
        return answer, took_us

    def interrupt(self) -> None:
        """Let a waiting `ask` return at once."""
        with self._condition:
            self._interrupted = True
            self._condition.notify_all()

    def stop(self) -> None:
        """End the thread; one that is stuck in the policy ends with the process."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self._thread.join(timeout=0.2)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._question is not None or self._stopping)
                if self._stopping:
                    return
                question, self._question, ticket = self._question, None, self._ticket
            assert question is not None
            began_ns = time.monotonic_ns()
            answer: Answer | Exception
            try:
                answer = self._policy(question)
            except Exception as error:
                answer = error
            took_us = (time.monotonic_ns() - began_ns) / 1e3
            with self._condition:
                if ticket == self._ticket:
                    self._result = answer, took_us
                    self._condition.notify_all()


class ControlLoop:
    """See the module; between `start` and `stop` it also governs the process's garbage collection.

    Args:
        cached: the policy and its library.
        binding: checked against them.
        rules: the reactions and their times.
        publish: sends a command [m] to the actuators.
        record: is given every published command, after it went out.
        deadline_ns: a command later than this after its message's arrival is a missed deadline.
        freeze_ns, delay_ns: see core.safety.Freshness.
        budget: of certified error; None: unlimited.
        quarantine: where the library does not answer; made for it.
        corrected: is given every step of a takeover, and None when the operator has let go.

    Attributes:
        cached: what it answers from now.
        number: of its library, see `number_of`.
        corrections: steps of takeovers so far.
        stall_s: a fault for tests and training: the policy takes this much longer.
    """

    def __init__(
        self,
        cached: CachedPolicy,
        binding: Binding,
        rules: Rules,
        publish: Callable[[list[float]], None],
        record: Callable[[Step], None],
        deadline_ns: int,
        freeze_ns: int = 0,
        delay_ns: int = 0,
        budget: Budget | None = None,
        quarantine: Quarantine | None = None,
        corrected: Callable[[Correction | None], None] = lambda correction: None,
    ) -> None:
        self.cached, self._binding, self._publish, self._record = cached, binding, publish, record
        self.quarantine = quarantine or Quarantine(len(cached.card.observations), library=cached.library)
        self._corrected, self.corrections = corrected, 0
        self._operated: list[float] | None = None  # the operator's newest action, while one is in command
        self._update: Update | None = None  # to be used from the next step on
        self._deadline_ns, self.budget = deadline_ns, budget
        self.assembler = Assembler(binding, cached.card)
        self._fresh = Freshness(rules.observation_timeout_ns, freeze_ns, delay_ns)
        self.governor = Governor(binding.limits, rules, time.monotonic_ns())
        self._worker: Worker | None = None
        self.stall_s = 0.0
        self._tolerance: list[float] | None = None  # likewise
        self._collected_ns = self._arrived_ns = 0
        self._warm_ns = NEVER_NS  # when the next observation is almost there
        self._observation: NDArray[np.float32] | None = None
        self._period_ns = rules.period_ns
        self._bound = np.zeros(len(binding.action))  # of the last answer
        self._region = POLICY
        self.hits = self.misses = self.deadline_misses = self.rejected = self.budget_refusals = self.handovers = 0
        self.quarantined = self.updates = self.dropped_updates = 0
        self.number = number_of(cached.library)
        self.rejection = ""  # why the latest rejected message was rejected
        self.beyond = ""  # which limit of the robot was exceeded last
        self.handover_bound = np.zeros(len(binding.action))
        self.hit_us, self.policy_us, self.latency_us, self.margin = Recent(), Recent(), Recent(), Recent()

    def start(self) -> None:
        self._worker = Worker(self._ask)
        # Garbage is collected right after a step, when the next is a period away (see `_collect`), not wherever an
        # allocation falls; what was there before is left alone, which keeps it short.
        gc.collect()
        gc.freeze()
        gc.disable()

    def stop(self) -> None:
        gc.enable()
        gc.unfreeze()
        if self._worker is not None:
            self._worker.stop()
        self.governor.hand_back()
        self._let_go()

    # ------------------------------------------------------------------------------------------- from any thread

    def estop(self, reason: str) -> None:
        """Latch the emergency stop; the caller wakes the control thread afterwards."""
        self.governor.estop(reason)
        if self._worker is not None:
            self._worker.interrupt()

    def reset(self) -> None:
        self.governor.reset()

    def retune(self, tolerance: list[float]) -> None:
        """Answer within other tolerances [m] from the next step on."""
        self._tolerance = tolerance

    def renew(self, update: Update) -> None:
        """Answer from another library from the next step on, or within another quarantine.

        It is dropped if anything was corrected since it was made: then it does not know of that.
        """
        self._update = update

    # ------------------------------------------------------------------------------------------- control thread

    def due_ns(self) -> int:
        """When `tick` has to be called next."""
        return min(self.governor.due_ns(), self._warm_ns)

    def tick(self) -> None:
        """Do what is due without an observation."""
        now_ns = time.monotonic_ns()
        if now_ns >= self._warm_ns and self._observation is not None:
            self._warm_ns = NEVER_NS
            self.cached.lookup(self._observation)
        if now_ns < self.governor.due_ns():
            return
        command = self.governor.tick(now_ns)
        self._let_go()
        if command is not None:
            self._publish(command)
            self._record(Step(now_ns, 0.0, self.governor.cause, None, None, command, 0.0, 0.0, 0.0))
            self._collect(now_ns)

    def operate(self, topic: str, message: Any) -> None:
        """Take one message of an operator: a command, or an empty one, which hands back."""
        try:
            if self._binding.is_empty(message):
                self.governor.hand_back()
                self._let_go()
                return
            action = self._binding.read_action(message).tolist()
            self.governor.take_over(self._binding.command(action), time.monotonic_ns())
            self._operated = action
        except ObservationError as error:
            self.rejection = f"{topic}: {error}"
            self.rejected += 1

    def step(self, topic: str, message: Any) -> None:
        """Take one message; if it completes an observation, answer it at once."""
        arrived_ns = time.monotonic_ns()
        governor = self.governor
        try:
            if not self.assembler.take(topic, message, arrived_ns):
                return
            observation = self.assembler.observation(arrived_ns)
            stamp_ns = self.assembler.stamp_ns
            self._fresh.check(stamp_ns, observation, arrived_ns)
            if governor.last is None:
                governor.begin(self._binding.standing(observation))
            interval_ns, self._arrived_ns = arrived_ns - self._arrived_ns, arrived_ns
            regular = 2 * WARM_NS < interval_ns < 2 * self._period_ns
            self._observation, self._warm_ns = observation, arrived_ns + interval_ns - WARM_NS if regular else NEVER_NS
            source, answer, lookup_us, policy_us = POLICY, None, 0.0, 0.0
            command = governor.operate(arrived_ns)
            if command is None:
                source, answer, lookup_us, policy_us = self._decide(observation, arrived_ns)
                if answer is None:
                    command = governor.react(source, time.monotonic_ns())
                else:
                    command = governor.answer(self._binding.command(answer.action.tolist()), time.monotonic_ns())
            governor.observed_ns = arrived_ns
        except ObservationError as error:
            self.rejection = f"{topic}: {error}"
            self.rejected += 1
            return
        self._publish(command)
        published_ns = time.monotonic_ns()
        latency_us = (published_ns - arrived_ns) / 1e3
        self.latency_us.add(latency_us)
        self.deadline_misses += published_ns - arrived_ns > self._deadline_ns or source == ON_DEADLINE
        if governor.cause != POLICY:  # the emergency stop may have come meanwhile
            source, answer = governor.cause, None
            if source == OPERATOR and self._operated is not None:
                self.corrections += 1
                regions = self.quarantine.correct(observation)
                self._corrected(Correction(published_ns, observation, self._operated, command, regions))
        self._let_go()
        if answer is not None:
            self._count(answer, lookup_us, policy_us)
        self._record(
            Step(arrived_ns, stamp_ns / 1e9, source, observation, answer, command, lookup_us, policy_us, latency_us)
        )
        self._collect(published_ns)

    def _decide(self, observation: NDArray[np.float32], arrived_ns: int) -> tuple[int, Answer | None, float, float]:
        """The source, the answer or None, and the times of looking up and of the policy [us]."""
        assert self._worker is not None
        if self.governor.stopped:
            return ON_ESTOP, None, 0.0, 0.0
        if beyond := self.assembler.beyond(observation):
            self.beyond = beyond
            return ON_LIMIT, None, 0.0, 0.0
        if self._update is not None:
            self._renew(self._update)
        if self._tolerance is not None:
            self.cached.set_tolerance(self._tolerance)
            self._tolerance = None
        began_ns = time.monotonic_ns()
        answer = self.cached.lookup(observation)
        if answer is not None and self.quarantine.count and self.quarantine.covers(observation):
            self.quarantined += 1
            answer = None
        looked_ns = time.monotonic_ns()
        lookup_us = (looked_ns - began_ns) / 1e3
        if answer is not None and self.budget is not None and not self.budget.pay(answer.bound, looked_ns):
            self.budget_refusals += 1
            answer = None
        if answer is not None:
            return answer.region, answer, lookup_us, 0.0
        found = self._worker.ask(observation, max(0.0, (self._deadline_ns - (looked_ns - arrived_ns)) / 1e9))
        if found is None:
            return ON_DEADLINE, None, lookup_us, 0.0
        return POLICY, found[0], lookup_us, found[1]

    def _ask(self, observation: NDArray[np.float32]) -> Answer:
        if self.stall_s:
            time.sleep(self.stall_s)
        return self.cached.fallback(observation)

    @property
    def operator(self) -> str:
        """Who is in command, for people."""
        if self._operated is None:
            return "no"
        return "silent" if self.governor.cause == ON_SILENCE else "in command"

    def _renew(self, update: Update) -> None:
        self._update = None
        if update.corrections == self.corrections:
            update.cached.set_tolerance(self.cached.tolerance.tolist())
            self.cached, self.quarantine = update.cached, update.quarantine
            self.number = number_of(update.cached.library)
            self.updates += 1
        else:
            self.dropped_updates += 1

    def _let_go(self) -> None:
        """Tell, once, that the operator is not in command any more."""
        if self._operated is not None and self.governor.operator is None:
            self._operated = None
            self._corrected(None)

    def _count(self, answer: Answer, lookup_us: float, policy_us: float) -> None:
        if answer.region < 0:
            self.misses += 1
            self.policy_us.add(policy_us)
        else:
            self.hits += 1
            self.hit_us.add(lookup_us)
            if len(tolerance := self.cached.tolerance):
                self.margin.add(float((answer.bound / np.maximum(tolerance, 1e-300)).max()))
        if (answer.region < 0) != (self._region < 0) and self.hits + self.misses > 1:
            # Between two answers the command moves by what the policy itself moves, and at most both bounds more.
            self.handovers += 1
            np.maximum(self.handover_bound, self._bound + answer.bound, out=self.handover_bound)
        self._region, self._bound = answer.region, answer.bound

    def _collect(self, now_ns: int) -> None:
        if now_ns - self._collected_ns > GC_PERIOD_NS:
            gc.collect()
            self._collected_ns = now_ns
