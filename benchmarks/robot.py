"""What the benchmarks of the nodes share: simulator and controller as processes, and a node that watches and commands.

Not a benchmark itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, installed or not

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.srv import ListParameters, SetParameters
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger

from laws_ros.core.errors import LawsError
from laws_ros.core.safety import POLICY
from laws_ros.nodes.processes import Child, private_domain
from laws_ros.nodes.ros import RECORD_QOS, columns_of
from laws_ros.runtime.files import share_path

PATIENCE_S = 120.0  # who has ended is noticed at once; this is for a slow machine


class Bench:
    """A private ROS domain with a watcher; a context manager that ends everything it started."""

    def __init__(self) -> None:
        self._logs = tempfile.TemporaryDirectory(prefix="laws_bench_")
        self.folder = Path(self._logs.name)
        os.environ |= {"ROS_DOMAIN_ID": private_domain(), "ROS_LOG_DIR": self._logs.name}
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        rclpy.init()
        self.node = Node("bench")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.children: list[Child] = []
        self._clients: dict[str, Any] = {}
        self.rows: list[Any] = []  # of ~/decision, each with its time of arrival [s]
        self.names: list[str] = []
        self.node.create_subscription(Float64MultiArray, "controller/decision", self._decided, RECORD_QOS)
        self.node.create_subscription(Float64MultiArray, "simulator/episode", self._stepped, RECORD_QOS)
        self.node.create_subscription(DiagnosticArray, "/diagnostics", self._diagnosed, 10)
        self.stepped: dict[str, float] = {}
        self.told: dict[str, dict[str, str]] = {}  # of /diagnostics, the newest status of each name

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: Any) -> None:
        for child in self.children:
            child.end()
        self.node.destroy_node()
        rclpy.shutdown()
        self._logs.cleanup()

    def _decided(self, message: Float64MultiArray) -> None:
        self.names = self.names or columns_of(message)
        self.rows.append((time.monotonic(), message.data))

    def _stepped(self, message: Float64MultiArray) -> None:
        self.stepped = dict(zip(columns_of(message), message.data, strict=True))

    def _diagnosed(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self.told[status.name] = {value.key: value.value for value in status.values}

    def start(self, name: str, command: list[str] | None = None, **overrides: Any) -> Child:
        """A node with config/cartpole.yaml and overrides."""
        log = self.folder / f"{name}{len(self.children)}"
        self.children.append(Child(name, share_path("config/cartpole.yaml"), command, log=log, **overrides))
        return self.children[-1]

    def spin(self, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while (left := end - time.monotonic()) > 0:
            self.executor.spin_once(timeout_sec=left)

    def until(self, condition: Callable[[], Any], timeout_s: float = PATIENCE_S) -> bool:
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end:
                return False
            self.executor.spin_once(timeout_sec=0.005)
        return True

    def client(self, kind: Any, name: str) -> Any:
        """Of a service; what is timed asks for it beforehand.

        A server that does not know of its client yet drops the answer. Clients become known in the order in which they
        are made: an answer to the later one proves that both are.
        """
        if name not in self._clients:
            self._clients[name] = self.node.create_client(kind, name)
            later = self.node.create_client(ListParameters, f"{name.rpartition('/')[0]}/list_parameters")

            def known() -> bool:
                future = later.call_async(ListParameters.Request())
                self.executor.spin_until_future_complete(future, timeout_sec=2.0)
                return bool(future.done())

            if not self.until(lambda: self._clients[name].service_is_ready() and later.service_is_ready() and known()):
                raise LawsError(f"{name}: no such service within {PATIENCE_S:g} s")
            self.node.destroy_client(later)
        return self._clients[name]

    def call(self, kind: Any, name: str, **fields: Any) -> Any:
        future = self.client(kind, name).call_async(kind.Request(**fields))
        self.executor.spin_until_future_complete(future, timeout_sec=PATIENCE_S)
        if not future.done():
            raise LawsError(f"{name}: no answer within {PATIENCE_S:g} s")
        return future.result()

    def trigger(self, name: str) -> bool:
        return bool(self.call(Trigger, name).success)

    def set(self, node: str, **parameters: Any) -> None:
        messages = [Parameter(name, value=value).to_parameter_msg() for name, value in parameters.items()]
        for result in self.call(SetParameters, f"{node}/set_parameters", parameters=messages).results:
            assert result.successful, result.reason

    def column(self, name: str) -> int:
        return self.names.index(name)

    def reacted(self, source: int, since_s: float, timeout_s: float = PATIENCE_S) -> float | None:
        """How long after a steady time the first command of a source was decided [ms], or None."""
        done = 0

        def seen() -> bool:
            nonlocal done
            fresh, done = self.rows[done:], len(self.rows)
            region, moment = self.column("region"), self.column("time_s")
            found.extend(row[moment] for _, row in fresh if row[region] == source and row[moment] >= since_s)
            return bool(found)

        found: list[float] = []
        return 1e3 * (found[0] - since_s) if self.until(seen, timeout_s) else None

    def answering(self, timeout_s: float = PATIENCE_S) -> bool:
        """Wait until observations are answered again."""
        start = time.monotonic()

        def seen() -> bool:
            region, moment = self.column("region"), self.column("time_s")
            return any(row[region] >= POLICY and row[moment] > start for _, row in self.rows[-20:])

        return self.until(seen, timeout_s)
