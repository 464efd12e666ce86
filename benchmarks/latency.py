"""What the controller adds to a message's way through a node: it against an echo node, alternately, in one run.

    python benchmarks/latency.py [--rates 100 200] [--blocks 8] [--seconds 2] [--json]

A robot (this process) publishes joint states on a steady clock and takes the commands that come back, from an echo
node (a subscription, a publisher, nothing between) in one block and from the controller in the next; message types and
QoS are the same. Reported: observation message out to command message in; and the jitter of the commands' period, by
its standard deviation and by the 99th percentile of |period - nominal|, medians over blocks. `added_p50` compares the
medians of neighbouring blocks and takes the median of that: a slow phase of the machine then hits both.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, installed or not

CARTPOLE = ("slider", "hinge")


def echo() -> int:
    """The node to compare with."""
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node
    from sensor_msgs.msg import JointState
    from std_msgs.msg import Float64MultiArray

    from laws_ros.nodes.ros import COMMAND_QOS, SENSOR_QOS, set_data

    rclpy.init()
    node = Node("echo")
    out = node.create_publisher(Float64MultiArray, "echo/commands", COMMAND_QOS)
    message = Float64MultiArray()
    node.create_subscription(
        JointState, "echo/joint_states", lambda m: out.publish(set_data(message, m.position[:1])), SENSOR_QOS
    )
    executor = SingleThreadedExecutor()
    executor.add_node(node)
    try:
        executor.spin()
    except BaseException:  # told to end
        return 0
    return 0


class Robot:
    """Publishes observations at a steady rate and notes when the commands come back."""

    def __init__(self) -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor
        from rclpy.node import Node
        from sensor_msgs.msg import JointState
        from std_msgs.msg import Float64MultiArray

        from laws_ros.nodes.ros import COMMAND_QOS, SENSOR_QOS

        rclpy.init()
        self.node, self.kind = Node("robot"), JointState
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.arrivals: dict[str, list[int]] = {}
        self.out = {}
        for name, topic, commands in (
            ("echo", "echo/joint_states", "echo/commands"),
            ("controller", "joint_states", "slider_effort_controller/commands"),
        ):
            self.out[name] = self.node.create_publisher(JointState, topic, SENSOR_QOS)
            self.arrivals[name] = []
            self.node.create_subscription(
                Float64MultiArray, commands, lambda _, n=name: self.arrivals[n].append(time.monotonic_ns()), COMMAND_QOS
            )
        self.random = np.random.default_rng(0)

    def block(self, name: str, rate_hz: float, seconds: float) -> dict[str, Any]:
        """Latencies [us] and intervals between commands [us] of one block."""
        period_ns = round(1e9 / rate_hz)
        sent: list[int] = []
        self.arrivals[name].clear()
        due = time.monotonic_ns()
        for _ in range(round(seconds * rate_hz)):
            due += period_ns
            while (left := due - time.monotonic_ns()) > 300_000:
                self.executor.spin_once(timeout_sec=(left - 200_000) / 1e9)
            while time.monotonic_ns() < due:
                pass
            x = self.random.normal(0.0, 0.02, 4).tolist()
            message = self.kind(name=CARTPOLE, position=x[:2], velocity=x[2:])
            message.header.stamp.sec, message.header.stamp.nanosec = divmod(due, 10**9)
            sent.append(time.monotonic_ns())
            self.out[name].publish(message)
        end = time.monotonic() + 0.1
        while time.monotonic() < end:
            self.executor.spin_once(timeout_sec=0.02)
        # Every command belongs to the newest observation before it: a period is longer than a way through.
        arrivals, sent_at = np.array(self.arrivals[name]), np.array(sent)
        if not len(arrivals):
            return {"latency": np.zeros(0), "interval": np.zeros(0), "sent": len(sent)}
        k = np.searchsorted(sent_at, arrivals, side="right") - 1
        return {"latency": (arrivals - sent_at[k]) / 1e3, "interval": np.diff(arrivals) / 1e3, "sent": len(sent)}


def measure(rates: list[float], blocks: int, seconds: float) -> dict[str, Any]:
    """Run everything; see the module."""
    from laws_ros.nodes.processes import Child, private_domain
    from laws_ros.runtime.files import share_path

    result: dict[str, Any] = {}
    parameters, settings = share_path("config/cartpole.yaml"), {"observation_timeout_s": 60.0}
    with tempfile.TemporaryDirectory(prefix="laws_latency_") as logs:
        os.environ |= {"ROS_DOMAIN_ID": private_domain(), "ROS_LOG_DIR": logs}
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        for rate in rates:
            children = [
                Child("controller", parameters, log=Path(logs) / "controller", **{**settings, "rate_hz": float(rate)}),
                Child("echo", parameters, [sys.executable, __file__, "--echo"], log=Path(logs) / "echo"),
            ]
            robot = Robot()
            try:
                while not all(robot.block(name, rate, 0.2)["latency"].size for name in robot.out):
                    for child in children:
                        if not child.running():
                            child.complain()
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in robot.out}
                for k in range(blocks):
                    for name in (list(robot.out), list(robot.out)[::-1])[k % 2]:
                        found[name].append(robot.block(name, rate, seconds))
            finally:
                for child in children:
                    child.end()
                import rclpy

                robot.node.destroy_node()
                rclpy.shutdown()
            medians = {name: np.array([np.median(b["latency"]) for b in found[name]]) for name in found}
            row = {}
            for name, parts in found.items():
                latency = np.concatenate([b["latency"] for b in parts])
                row[name] = {
                    "p50_us": float(np.percentile(latency, 50)),
                    "p99_us": float(np.percentile(latency, 99)),
                    "best_block_p50_us": float(medians[name].min()),
                    "period_std_us": float(np.median([b["interval"].std() for b in parts])),
                    "period_p99_us": float(
                        np.median([np.percentile(np.abs(b["interval"] - 1e6 / rate), 99) for b in parts])
                    ),
                    "answered": len(latency) / sum(b["sent"] for b in parts),
                }
            added = medians["controller"] - medians["echo"]
            row["jitter_ratio"] = row["controller"]["period_std_us"] / row["echo"]["period_std_us"]
            row["jitter_p99_ratio"] = row["controller"]["period_p99_us"] / row["echo"]["period_p99_us"]
            row["added_p50_us"] = float(np.median(added))
            row["added_p50"] = float(np.median(added / medians["echo"]))
            row["added_best_blocks"] = float(medians["controller"].min() / medians["echo"].min() - 1.0)
            result[f"{rate:g} Hz"] = row
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[100.0, 200.0], help="Hz")
    parser.add_argument("--blocks", type=int, default=8, help="of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one block")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--echo", action="store_true", help=argparse.SUPPRESS)
    options, _ = parser.parse_known_args()
    if options.echo:
        return echo()
    result = measure(options.rates, options.blocks, options.seconds)
    if options.json:
        print(json.dumps(result))
        return 0
    for rate, row in result.items():
        for name in ("echo", "controller"):
            r = row[name]
            print(
                f"{rate:>7} {name:<10} p50 {r['p50_us']:6.0f} us  p99 {r['p99_us']:6.0f} us  period std "
                f"{r['period_std_us']:5.0f} us, p99 of |period - nominal| {r['period_p99_us']:5.0f} us  "
                f"answered {r['answered']:.1%}"
            )
        print(
            f"{rate:>7} added at p50: {row['added_p50_us']:.0f} us, {row['added_p50']:.1%} (best blocks: "
            f"{row['added_best_blocks']:.1%}); jitter over the echo's: std {row['jitter_ratio']:.2f}, "
            f"p99 {row['jitter_p99_ratio']:.2f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
