"""The thread that a control loop runs on: it waits for messages itself, and for nothing but messages and the clock.

The subscriptions belong to a node and an executor of their own. A message therefore wakes the very thread that answers
it (docs/adr/0010 compares this with a timer and with a hand-over between threads), and services, parameters and
diagnostics, which live on the main thread, never stand before it in a queue.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import rclpy
from rclpy.executors import ExternalShutdownException, ShutdownException, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter

from .loop import ControlLoop
from .ros import SENSOR_QOS, fail, message_class

IDLE_S = 0.1
SWITCH_S = 2e-4  # for this long at most another thread keeps the interpreter when a message has arrived
MCL_CURRENT, MCL_FUTURE = 1, 2


class ControlThread:
    """Runs a ControlLoop on messages of its binding's topics until `stop`.

    Args:
        owner: the node that it works for; its name and namespace, and its end if the thread fails.
        heartbeat: is called every `heartbeat_s`, while the loop is alive.
        priority: SCHED_FIFO priority, 0: normal scheduling. cpus: that the thread may run on, empty: all.
    """

    def __init__(
        self,
        owner: Any,
        loop: ControlLoop,
        topics: dict[str, str],
        heartbeat: Callable[[], None],
        heartbeat_s: float,
        priority: int = 0,
        cpus: tuple[int, ...] = (),
    ) -> None:
        self._owner, self._loop, self._heartbeat, self._heartbeat_s = owner, loop, heartbeat, heartbeat_s
        self._priority, self._cpus = priority, cpus
        name = f"{owner.get_name()}_loop"
        self._node = Node(
            name,
            # A remapping of the owner's name must not rename this node, too; its topics are remapped like the owner's.
            cli_args=["--ros-args", "-r", f"__node:={name}"],
            start_parameter_services=False,
            enable_rosout=False,
            parameter_overrides=[Parameter("use_sim_time", value=False)],  # /clock would wake the loop
        )
        for topic, kind in topics.items():
            self._node.create_subscription(
                message_class(kind), topic, lambda message, topic=topic: loop.step(topic, message), SENSOR_QOS
            )
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._stopping = False
        self._switch_s = sys.getswitchinterval()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    @property
    def topics(self) -> str:
        """The resolved names of what it listens to."""
        return ", ".join(sorted(s.topic_name for s in self._node.subscriptions))

    def start(self) -> None:
        sys.setswitchinterval(SWITCH_S)
        self._loop.start()
        self._thread.start()

    def wake(self) -> None:
        """Have the thread look at its loop at once."""
        self._executor.wake()

    def stop(self) -> None:
        self._stopping = True
        if self._thread.ident is not None:
            if rclpy.ok():
                self.wake()
            self._thread.join()
        self._loop.stop()
        sys.setswitchinterval(self._switch_s)
        self._executor.shutdown(timeout_sec=0)
        self._node.destroy_node()

    def _run(self) -> None:
        try:
            for warning in privileges(self._priority, self._cpus):
                self._owner.get_logger().warning(warning)
            beat_s = time.monotonic()
            while not self._stopping:
                due_s = min(self._loop.due_ns() / 1e9, beat_s)
                self._executor.spin_once(timeout_sec=max(0.0, due_s - time.monotonic()))
                self._loop.tick()
                if time.monotonic() >= beat_s:
                    self._heartbeat()
                    beat_s = max(beat_s + self._heartbeat_s, time.monotonic())
        except (ExternalShutdownException, ShutdownException):
            pass
        except Exception as error:
            fail(self._owner, error)


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
