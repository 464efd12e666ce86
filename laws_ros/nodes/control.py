"""The thread that a control loop runs on: it waits for messages itself, and for nothing but messages and the clock.

The subscriptions belong to a node of their own, and no executor looks after them: the thread waits on them in a wait
set, as rclpy.wait_for_message does, and takes what is there. A message therefore wakes the very thread that answers it
(docs/adr/0010 compares this with a timer and with a hand-over between threads), what rclpy's executors do around every
message is not done (docs/adr/0015), and services, parameters and diagnostics, which live on the main thread, never
stand before it in a queue.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import rclpy
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile

from .loop import ControlLoop
from .ros import SENSOR_QOS, fail, message_class

IDLE_NS = 100_000_000  # after this at most it is noticed that ROS was shut down
SWITCH_S = 2e-4  # for this long at most another thread keeps the interpreter when a message has arrived
MCL_CURRENT, MCL_FUTURE = 1, 2


class Input(NamedTuple):
    """A topic that the thread listens to, and what takes its messages."""

    topic: str
    type: str
    take: Callable[[str, Any], None]
    qos: QoSProfile = SENSOR_QOS


class ControlThread:
    """Runs a ControlLoop on messages until `stop`.

    Args:
        owner: the node that it works for; its name and namespace, and its end if the thread fails.
        inputs: in this order if several are there at once.
        heartbeat: is called every `heartbeat_s`, while the loop is alive.
        priority: SCHED_FIFO priority, 0: normal scheduling. cpus: that the thread may run on, empty: all.

    Attributes:
        turns: how often it has looked at its messages and its loop; at least ten times a second while it is alive.
    """

    def __init__(
        self,
        owner: Any,
        loop: ControlLoop,
        inputs: Sequence[Input],
        heartbeat: Callable[[], None],
        heartbeat_s: float,
        priority: int = 0,
        cpus: tuple[int, ...] = (),
    ) -> None:
        self._owner, self._loop, self._heartbeat, self._heartbeat_ns = owner, loop, heartbeat, round(1e9 * heartbeat_s)
        self._priority, self._cpus = priority, cpus
        name = f"{owner.get_name()}_loop"
        self._node = Node(
            name,
            # A remapping of the owner's name must not rename this node, too; its topics are remapped like the owner's.
            cli_args=["--ros-args", "-r", f"__node:={name}"],
            start_parameter_services=False,
            enable_rosout=False,
            # Nobody would answer for these: /clock, and from Iron on a service that describes types.
            parameter_overrides=[
                Parameter("use_sim_time", value=False),
                Parameter("start_type_description_service", value=False),
            ],
        )
        self._taken = [
            (self._node.create_subscription(message_class(i.type), i.topic, lambda _: None, i.qos), i) for i in inputs
        ]
        self._wake = self._node.create_guard_condition(lambda: None)
        self.turns = 0
        self._stopping = False
        self._switch_s = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._loop.start()
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at its loop at once."""
        self._wake.trigger()

    def stop(self) -> None:
        self._stopping = True
        if self._thread.ident is not None:
            if rclpy.ok():
                self.wake()
            self._thread.join()
        self._loop.stop()
        sys.setswitchinterval(self._switch_s)
        self._node.destroy_node()

    def _run(self) -> None:
        try:
            for warning in privileges(self._priority, self._cpus):
                self._owner.get_logger().warning(warning)
            with ExitStack() as held:
                for subscription, _ in self._taken:
                    held.enter_context(subscription.handle)
                held.enter_context(self._wake.handle)
                self._serve()
        except Exception as error:
            fail(self._owner, error)

    def _serve(self) -> None:
        loop, guard, context = self._loop, self._wake.handle, self._node.context.handle
        assert context is not None
        inputs = [(s.handle, s.handle.pointer, s.msg_type, i.topic, i.take) for s, i in self._taken]
        wait_set = rclpy_implementation.WaitSet(len(inputs), 1, 0, 0, 0, 0, context)
        beat_ns = time.monotonic_ns()
        while not self._stopping and rclpy.ok():
            self.turns += 1
            wait_set.clear_entities()
            for handle, *_ in inputs:
                wait_set.add_subscription(handle)
            wait_set.add_guard_condition(guard)
            wait_set.wait(min(max(0, min(loop.due_ns(), beat_ns) - time.monotonic_ns()), IDLE_NS))
            ready = wait_set.get_ready_entities("subscription")
            if ready:
                for handle, pointer, kind, topic, take in inputs:
                    if pointer in ready and (found := handle.take_message(kind, False)) is not None:
                        take(topic, found[0])
            loop.tick()
            if (now_ns := time.monotonic_ns()) >= beat_ns:
                self._heartbeat()
                beat_ns = max(beat_ns + self._heartbeat_ns, now_ns)


def privileges(priority: int, cpus: tuple[int, ...]) -> list[str]:
    """Give the calling thread its scheduling; returns a warning for each thing that is not permitted."""
    warnings = []
    if priority:
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
        except OSError as error:
            warnings.append(
                f"realtime.priority {priority}: {error.strerror}; the control thread runs at normal priority. Allow it "
                "with 'rtprio 99' in /etc/security/limits.conf, or docker run --ulimit rtprio=99 --cap-add SYS_NICE"
            )
    if cpus:
        try:
            os.sched_setaffinity(0, cpus)
        except OSError as error:
            warnings.append(f"realtime.cpus {list(cpus)}: {error.strerror}; the control thread runs on any")
    return warnings


def lock_memory() -> str:
    """Keep the process's memory from being paged out; returns a warning if that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(MCL_CURRENT | MCL_FUTURE):
        reason = os.strerror(ctypes.get_errno())
        return (
            f"realtime.lock_memory: {reason}; pages may be swapped out. Allow it with 'memlock unlimited' in "
            "/etc/security/limits.conf, or docker run --ulimit memlock=-1"
        )
    return ""
