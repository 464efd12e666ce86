"""The learner: a lifecycle node beside a controller that turns what the policy had to answer into certified experts.

Topics, relative to the node's namespace:
    controller/decision (std_msgs/Float64MultiArray) in: what missed, and which experts answered
    /diagnostics (diagnostic_msgs/DiagnosticArray) out, once a second
Files, in the folder `state` (runtime/takeovers.py): the history, and snapshots, which the controller takes over. What
operators corrected and no review has released is kept out of both.

Nothing that happens here can hold the controller up: it has its own process, of low priority, hears the decisions
without having to confirm them, and may be stopped, killed and started again at any time. What it had stored is on the
disk; what it had not comes again as misses.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rclpy.clock import Clock, ClockType
from rclpy.parameter import Parameter
from std_msgs.msg import Float64MultiArray

from laws_ros.build.learn import Learner, Lesson
from laws_ros.core.errors import ConfigError, LawsError
from laws_ros.core.library import Library
from laws_ros.core.safety import POLICY
from laws_ros.runtime import takeovers
from laws_ros.runtime.cached_policy import check_tolerance, open_pair
from laws_ros.runtime.files import resolve
from laws_ros.runtime.history import History
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.takeovers import HISTORY, SNAPSHOT

from . import notify
from .loop import number_of
from .ros import AUTOSTART, HEARD_QOS, Declared, Managed, fail, run
from .upkeep import state_folder

PARAMETERS = (
    Declared("policy", "", "the policy's ONNX file, its card beside it; the controller's"),
    Declared("library", "", "what a new history begins with; empty: with nothing"),
    Declared("state", "", "folder shared with the controller and `laws library`, one per namespace"),
    Declared("tolerance", Parameter.Type.DOUBLE_ARRAY, "what a new history certifies for; empty: the library's"),
    Declared("decisions", "controller/decision", "the controller's topic"),
    Declared("certify", True, "false: only keep what missed, for the desk of a large fleet to learn from"),
    Declared("round_s", 10.0, "time between the beginnings of rounds of learning, if there is news [s]", 0.1, 86400.0),
    Declared("most_misses", 100_000, "that wait; older ones are dropped", 100, 10_000_000),
    Declared("most_experts", 20_000, "beyond, those that save least are retired", 1, 10_000_000),
    Declared("most_bytes", 0, "of memory for experts, likewise; 0: any", 0, 2**40),
    Declared("half_life_s", 604800.0, "an answer so old counts half when room is short [s]", 1.0, 1e9),
    Declared("most_certificates", 3000, "tried in a round; bounds its time", 1, 1_000_000),
    Declared("nice", 10, "lower priority of the process by this", 0, 19),
    AUTOSTART,
)
M_MMAP_THRESHOLD = -3  # of malloc.h
KNOWN = 8  # snapshots whose experts' answers are still counted


class Told(NamedTuple):
    """What the decisions since the last round said."""

    misses: list[tuple[NDArray[np.float32], NDArray[np.float32]]]  # observation, the policy's action
    uses: Counter[tuple[float, int]]  # (number of the library, region) -> answers


class Node(Managed):
    """See the module's docstring and PARAMETERS."""

    def __init__(self) -> None:
        super().__init__("learner", PARAMETERS)
        self._work: ThreadPoolExecutor | None = None  # whose one thread has the history
        self._learner: Learner | None = None
        self._listening: Any = None
        self._begun_s, self._columns = 0.0, 0
        self._label: str | None = None  # of the newest decision
        self._foreign: set[str] = set()  # labels of messages that are none
        self._told = Told([], Counter())
        self._future: Future[Lesson | None] | None = None
        self._facts: dict[str, Any] = {}
        self.create_timer(1.0, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))

    # ------------------------------------------------------------------------------------------- lifecycle

    def configure(self, p: dict[str, Any]) -> None:
        for name in ("policy", "state"):
            if not p[name]:
                raise ConfigError(f"node {self.get_fully_qualified_name()}: parameter {name!r} is not set")
        folder = state_folder(self, p["state"])
        assert folder is not None
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"state: {folder} cannot be made: {error.strerror}") from None
        os.nice(max(0, p["nice"] - os.nice(0)))
        self._values, self._folder, self._ids = p, folder, dict[float, list[str]]()
        self._work = ThreadPoolExecutor(1, "learner")
        self._work.submit(self._open, p).result()
        assert self._learner is not None
        library = self._published
        self.get_logger().info(f"configured: {folder}: {len(library)} regions for {library.card.name}")

    def activate(self) -> None:
        self._begun_s = time.monotonic()
        self._told = Told([], Counter())
        self._facts = dict.fromkeys(("rounds", "added", "retired", "restored", "misses", "hits", "dropped"), 0)
        topic = self._values["decisions"]
        self._listening = self.create_subscription(Float64MultiArray, topic, self._hear, HEARD_QOS)

    def stop(self) -> None:
        if self._listening is not None:
            self.destroy_subscription(self._listening)
            self._listening = None

    def release(self) -> None:
        self.stop()
        if self._work is not None:
            learner, self._learner = self._learner, None
            if learner is not None:
                self._work.submit(learner.history.close)
            self._work.shutdown()
            self._work = self._future = None

    # ------------------------------------------------------------------------------------------- what it hears

    def _hear(self, message: Float64MultiArray) -> None:
        label = message.layout.dim[0].label if message.layout.dim else ""
        if label != self._label:
            self._label, names, learner = label, label.split(","), self._learner
            kinds = [name.partition(":")[0] for name in names]
            self._x, self._action = (
                [k for k, kind in enumerate(kinds) if kind == w] for w in ("observation", "action")
            )
            self._columns = 0
            if learner is not None and {"region", "library"} <= set(names):
                found = [names[k].partition(":")[2] for k in self._x]
                if found == [c.name for c in learner.policy.card.observations]:
                    self._columns = len(names)
                    self._region, self._library = names.index("region"), names.index("library")
            if not self._columns and label not in self._foreign:
                self._foreign.add(label)
                self.get_logger().error(f"{self._values['decisions']}: {label!r} are no decisions of this policy's")
        if len(message.data) != self._columns or not self._columns:
            return
        data = np.array(message.data)
        region = int(data[self._region])
        if region >= 0:
            self._told.uses[float(data[self._library]), region] += 1
            self._facts["hits"] += 1
        elif region == POLICY:
            self._told.misses.append((data[self._x].astype(np.float32), data[self._action].astype(np.float32)))
            self._facts["misses"] += 1
            if len(self._told.misses) > self._values["most_misses"]:
                del self._told.misses[0]
                self._facts["dropped"] += 1

    def _tick(self) -> None:
        """Once a second: take what a round has brought, begin the next one, and tell how things are."""
        active = self._listening is not None
        if self._future is not None and self._future.done():
            self._take(self._future)
            self._future = None
        due = active and time.monotonic() - self._begun_s >= self._values["round_s"]
        if due and self._future is None and self._work is not None:
            told, self._told = self._told, Told([], Counter())
            self._begun_s = time.monotonic()
            self._future = self._work.submit(self._round, told)
        self._tell(active)
        notify.tell(notify.ALIVE)

    def _take(self, future: Future[Lesson | None]) -> None:
        try:
            lesson = future.result()
        except LawsError as error:
            self.get_logger().error(f"a round of learning failed: {error}")
            return
        except Exception as error:
            fail(self, error)
            return
        self._facts["rounds"] += 1
        if lesson is not None:
            for name in ("added", "retired", "restored"):
                self._facts[name] += getattr(lesson, name)
            if lesson.library is not None:
                self.get_logger().info(
                    f"library {self._published.digest}: {len(self._published)} regions; from {lesson.misses} misses "
                    f"{lesson.added} added, {lesson.retired} retired, {lesson.restored} restored"
                )

    def _tell(self, active: bool) -> None:
        learner = self._learner
        facts: dict[str, Any] = {"state": "unconfigured"}
        if learner is not None:
            answered = self._facts.get("hits", 0) + self._facts.get("misses", 0)
            facts = {
                "state": "active" if active else "inactive",
                "library": self._published.digest,
                "regions": len(self._published),
                "waiting": len(self._told.misses),
                "learning": "yes" if self._future is not None else "no",
                **self._facts,
                "hit_rate": self._facts["hits"] / answered if answered else "none yet",
            }  # fmt: skip
        self.report("learner", facts, learner.library.card.name if learner is not None else "")

    # ------------------------------------------------------------------------------------------- its own thread

    def _open(self, p: dict[str, Any]) -> None:
        path, library = resolve(p["policy"]), None
        if p["library"]:
            library, policy = open_pair(resolve(p["library"]), path)
        else:
            policy = Policy(path)
        network = load_network(path)
        new = not (self._folder / HISTORY).exists()
        tolerance = list(p["tolerance"]) or (library.tolerance.tolist() if library is not None else [])
        if new and not tolerance and policy.card.decision == "none":
            raise ConfigError("parameter 'tolerance' is not set; without a 'library' it is what is certified for")
        limits = check_tolerance(tolerance or [0.0], policy).tolist()
        budgets = {"most_misses": p["most_misses"], "half_life_s": p["half_life_s"]}
        history = History(self._folder / HISTORY, policy.sha256, policy.card, limits, **budgets)
        try:
            if library is not None:
                self._know(library)
                if not history.known():
                    ids = history.add(library.certificates, "offline")
                    history.used(dict(zip(ids, library.visits.tolist(), strict=True)))
            self._learner = Learner(
                history, policy, network, p["most_experts"], p["most_certificates"], p["most_bytes"] or None
            )
            self._seen = takeovers.signature(self._folder)[1:]
            self._takeovers = takeovers.read(self._folder, policy.card)
            self._learner.obey(self._takeovers)
            self._publish()
        except BaseException:
            self._learner = None
            history.close()
            raise

    def _round(self, told: Told) -> Lesson | None:
        """Store what was told, learn from it, and publish a snapshot if that changed the library; None: no news."""
        learner = self._learner
        assert learner is not None
        counts: Counter[str] = Counter()
        for (number, region), count in told.uses.items():
            if number in self._ids:
                counts[self._ids[number][region]] += count
        if counts:
            learner.answered(counts)
        if told.misses:
            x, actions = (np.array(part, np.float32) for part in zip(*told.misses, strict=True))
            decided = learner.policy.card.decision != "none"  # then the decisions hold an index
            learner.history.add_misses(x, learner.policy.batch(x) if decided else actions)
        seen, found, changed = takeovers.signature(self._folder)[1:], self._takeovers, False
        if seen != self._seen:
            found = self._takeovers = takeovers.read(self._folder, learner.policy.card)
            changed, self._seen = learner.obey(found), seen
        lesson = learner.learn() if told.misses and self._values["certify"] else None
        if lesson is not None and lesson.library is not None:
            learner.obey(found)  # what others have added meanwhile
            changed = True
        if changed:
            self._publish()
        return lesson

    def _publish(self) -> None:
        assert self._learner is not None
        self._know(self._learner.library)
        self._published = self._learner.publish(self._folder / SNAPSHOT)

    def _know(self, library: Library) -> None:
        self._ids[number_of(library)] = library.ids
        while len(self._ids) > KNOWN:
            del self._ids[next(iter(self._ids))]


def main() -> int:
    # Arrays of a round go back to the system after it; by default glibc soon keeps those of up to 32 MB for itself.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    return run(Node)
