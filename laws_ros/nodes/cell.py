"""The cell: a lifecycle node beside a robot's learner that shares experts with the robots around it, store or no store.

Topics, the same for all robots with one policy (POLICY: 12 digits of its identity):
    /laws/cell/pPOLICY/have (std_msgs/UInt8MultiArray) in and out, transient local: what a robot has
    /laws/cell/pPOLICY/chunks (std_msgs/UInt8MultiArray) in and out: experts and corrections that somebody lacks
    /diagnostics (diagnostic_msgs/DiagnosticArray) out, once a second
Files, in the folder `state` (runtime/takeovers.py): the history, snapshots, which the controller takes over, and the
robot's membership in its fleet (`laws fleet join`).

What is said and what is believed is in fleet/cell.py. Like the learner, the node cannot hold the controller up.
"""

from __future__ import annotations

import os
import time
from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rclpy.clock import Clock, ClockType
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from std_msgs.msg import UInt8MultiArray

from laws_ros.core.errors import ConfigError, FleetError
from laws_ros.fleet.cell import MOST_WAITING, Cell, Said
from laws_ros.fleet.robot import Robot

from . import notify
from .ros import AUTOSTART, Declared, Managed, fail, one_line, run
from .upkeep import state_folder

PARAMETERS = (
    Declared("state", "", "folder shared with controller and learner, one per namespace; a member of a fleet"),
    Declared("round_s", 2.0, "time between the beginnings of rounds of listening and telling [s]", 0.1, 3600.0),
    Declared("keys_s", 3600.0, "time between attempts to read the fleet's robots from the store [s]", 1.0, 1e7),
    Declared("nice", 10, "lower priority of the process by this", 0, 19),
    AUTOSTART,
)
HAVE_QOS = QoSProfile(
    depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL
)  # who comes later hears it, too
CHUNK_QOS = QoSProfile(depth=MOST_WAITING, reliability=ReliabilityPolicy.RELIABLE)


class Node(Managed):
    """See the module's docstring and PARAMETERS."""

    def __init__(self) -> None:
        super().__init__("cell", PARAMETERS)
        self._work: ThreadPoolExecutor | None = None  # a thread for rounds, one for the store, which may not answer
        self._cell: Cell | None = None
        self._ends: list[Any] = []  # publishers of what it has and of chunks, and subscriptions
        self._round: Future[Said] | None = None
        self._keys: Future[Any] | None = None
        self._begun_s = self._asked_s = 0.0
        self._facts: dict[str, Any] = {}
        self.create_timer(0.1, self._tick, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self.create_timer(1.0, self._tell, clock=Clock(clock_type=ClockType.STEADY_TIME))

    def configure(self, p: dict[str, Any]) -> None:
        folder = state_folder(self, p["state"])
        if folder is None:
            raise ConfigError(f"node {self.get_fully_qualified_name()}: parameter 'state' is not set")
        os.nice(max(0, p["nice"] - os.nice(0)))
        self._values, self._work = p, ThreadPoolExecutor(2, "cell")
        self._cell = Cell(Robot(folder))
        self.get_logger().info(f"configured: {self._cell.robot.name} of {len(self._cell.keys)} robots, {folder}")

    def activate(self) -> None:
        assert self._cell is not None
        have, chunks = f"{self._cell.topic}/have", f"{self._cell.topic}/chunks"
        self._begun_s = self._asked_s = -1e9
        self._facts = {"experts": 0, "refused": 0, "said": 0, "heard": 0}
        self._ends = [
            self.create_publisher(UInt8MultiArray, have, HAVE_QOS),
            self.create_publisher(UInt8MultiArray, chunks, CHUNK_QOS),
            self.create_subscription(UInt8MultiArray, have, self._hear, HAVE_QOS),
            self.create_subscription(UInt8MultiArray, chunks, self._hear, CHUNK_QOS),
        ]

    def stop(self) -> None:
        for publisher in self._ends[:2]:
            self.destroy_publisher(publisher)
        for subscription in self._ends[2:]:
            self.destroy_subscription(subscription)
        self._ends = []

    def release(self) -> None:
        self.stop()
        if self._work is not None:
            self._work.shutdown(wait=False, cancel_futures=True)
            if self._round is not None:
                self._round.exception()  # a merge is finished; what the store says is not waited for
        self._work = self._cell = self._round = self._keys = None

    # ------------------------------------------------------------------------------------------- what it does

    def _hear(self, message: UInt8MultiArray) -> None:
        if self._cell is not None:
            self._cell.hear(bytes(message.data))
            self._facts["heard"] += 1

    def _tick(self) -> None:
        if self._cell is None or self._work is None or not self._ends:
            return
        now, cell = time.monotonic(), self._cell
        if self._round is not None and self._round.done():
            done, self._round = self._round, None
            self._take(done)
        if self._round is None and now - self._begun_s >= self._values["round_s"]:
            self._begun_s, self._round = now, self._work.submit(cell.round)
        if self._keys is not None and self._keys.done():
            done_keys, self._keys = self._keys, None
            if (error := done_keys.exception()) is None:
                cell.keys = done_keys.result()
            else:
                self.get_logger().warning(f"the fleet's robots as before: {one_line(error)}")
        if self._keys is None and now - self._asked_s >= self._values["keys_s"]:
            self._asked_s, self._keys = now, self._work.submit(cell.robot.peers)

    def _take(self, done: Future[Said]) -> None:
        try:
            said = done.result()
        except FleetError as error:  # `laws fleet pull` is at work there, say: the next round goes on
            self.get_logger().warning(f"a round failed: {one_line(error)}", throttle_duration_sec=60.0)
            return
        except Exception as error:
            fail(self, error)
            return
        messages = [(0, said.have)] if said.have else []
        for end, data in [*messages, *((1, chunk) for chunk in said.chunks)]:
            self._ends[end].publish(UInt8MultiArray(data=array("B", data)))
            self._facts["said"] += 1
        merged = said.merged
        self._facts["experts"] += merged.accepted
        self._facts["refused"] += len(merged.refused)
        if merged.accepted or merged.takeovers or merged.tombstones:
            self.get_logger().info(
                f"{merged.accepted} experts of others proved and taken in, {merged.takeovers} takeovers, "
                f"{merged.tombstones} withdrawals"
            )

    def _tell(self) -> None:
        cell = self._cell
        facts: dict[str, Any] = {"state": "unconfigured"}
        if cell is not None:
            present = ", ".join(cell.present) or "nobody"
            facts = {"state": "active" if self._ends else "inactive", "robot": cell.robot.name, "hears": present}
            facts |= self._facts
        self.report("cell", facts)
        notify.tell(notify.ALIVE)


def main() -> int:
    return run(Node)
