"""`laws top`: what the controllers on the network say of themselves, live, from /diagnostics."""

from __future__ import annotations

import sys
import time
from typing import Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions

from .processes import interrupts, live_view

SUFFIX = ": control loop"
LEVELS = {DiagnosticStatus.OK: "ok", DiagnosticStatus.WARN: "WARNING", DiagnosticStatus.ERROR: "ERROR"}
STALE_S = 3.0
PERIOD_S = 1.2  # in which every controller has reported once


def run(once: bool = False, timeout_s: float = 10.0) -> dict[str, dict[str, str]]:
    """Watch until interrupted (`once`: for a period after the first report), or nobody reports for the timeout.

    Returns:
        Of every controller by its name what it last said; empty if there was none.
    """
    context = rclpy.Context()
    rclpy.init(context=context, signal_handler_options=SignalHandlerOptions.NO)
    node = Node("laws_top", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    found: dict[str, dict[str, str]] = {}
    heard: dict[str, float] = {}

    def listen(message: DiagnosticArray) -> None:
        for status in message.status:
            if status.name.endswith(SUFFIX):
                name = status.name.removesuffix(SUFFIX)
                heard[name] = time.monotonic()
                facts = {value.key: value.value for value in status.values}
                found[name] = {"level": LEVELS.get(status.level, "stale"), "message": status.message, **facts}

    node.create_subscription(DiagnosticArray, "/diagnostics", listen, 10)
    begun, end = time.monotonic(), float("inf")
    try:
        with live_view(sys.stdout) as show, interrupts() as interrupted:
            while not interrupted() and time.monotonic() < min(end, max([begun, *heard.values()]) + timeout_s):
                executor.spin_once(timeout_sec=0.2)
                if found and once:
                    end = min(end, time.monotonic() + PERIOD_S)
                elif found:
                    show({name: line(facts, time.monotonic() - heard[name]) for name, facts in found.items()})
    finally:
        node.destroy_node()
        context.try_shutdown()
    return found


def line(facts: dict[str, Any], age_s: float = 0.0) -> str:
    """One controller in a line or two."""
    if age_s > STALE_S:
        return f"SILENT for {age_s:.0f} s, was {facts['level']}"

    def us(name: str) -> str:
        return " / ".join(f"{float(facts[f'{name}_{rank}']):.0f}" for rank in ("p50", "p99"))

    if facts.get("state") != "active":
        return f"{facts['level']} {facts['message']}"
    try:
        rate = f"{float(facts['hit_rate']):.1%}"
    except ValueError:
        rate = facts["hit_rate"]
    return (
        f"{facts['level']} | hits {rate} | {facts['hits']} + {facts['misses']} answers | hit {us('hit_us')} us, "
        f"latency {us('latency_us')} us, policy {us('policy_us')} us | deadlines missed {facts['deadline_misses']} | "
        f"e-stop {facts['estop']} | library {facts['library']}"
        + (f"\n{facts['message']}" if facts["level"] != "ok" else "")
    )
