"""The fault table: what is broken, what the stack did, and after how many milliseconds; then a check of the recording.

    python benchmarks/faults.py [--json] [--bag FOLDER]

Simulator and controller run as on a robot. Every fault is injected while the robot moves; the time runs from the moment
before the injecting call until the moment the controller decided on the reaction (both on the machine's steady clock).
At the end every node is ended by SIGINT and by SIGTERM, at work, and the time runs until its process is gone.
Afterwards the bag is read again: every command in it must be a number within the binding's limits, and no two decided
one after the other may differ by more than the rate limit allows. Exit code 1 if anything of that fails.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from robot import PATIENCE_S, Bench  # beside this file
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import Trigger

from laws_ros.core.safety import ON_DEADLINE, ON_ESTOP, ON_LIMIT, ON_SILENCE, ON_TIMEOUT, OPERATOR
from laws_ros.nodes.record import BagRecorder
from laws_ros.nodes.ros import COMMAND_QOS, set_data
from laws_ros.runtime.files import share_path

LIMIT_N, RATE_N_PER_S, PERIOD_S = 8.0, 500.0, 0.01
COMMANDS = "slider_effort_controller/commands"


def run(bench: Bench, bag: Path) -> list[tuple[str, str, float | None]]:
    """The table's rows: fault, reaction, milliseconds (None: the reaction did not come)."""
    data = yaml.safe_load(share_path("config/cartpole.binding.yaml").read_text())
    data["action"]["channels"][0] |= {"low": -LIMIT_N, "high": LIMIT_N, "rate_per_s": RATE_N_PER_S}
    data["observation"][0] |= {"low": -1.0, "high": 1.0}
    binding = bench.folder / "binding.yaml"
    binding.write_text(yaml.safe_dump(data))
    controller = bench.start(
        "controller",
        binding=str(binding),
        freeze_timeout_s=0.1,
        on_timeout="ramp_down",
        ramp_down_s=0.2,
    )
    recorder = BagRecorder(
        bench.node,
        bag,
        {
            "joint_states": "sensor_msgs/msg/JointState",
            COMMANDS: "std_msgs/msg/Float64MultiArray",
            "controller/decision": "std_msgs/msg/Float64MultiArray",
            "controller/heartbeat": "std_msgs/msg/UInt64",
            "/diagnostics": "diagnostic_msgs/msg/DiagnosticArray",
        },
    )
    simulator = bench.start("simulator", binding=str(binding), command_timeout_s=0.2)
    if not bench.until(lambda: len(bench.rows) > 100):
        (controller if not controller.running() else simulator).complain()
    bench.client(Trigger, "controller/estop")
    bench.set("simulator", fault="")
    rows: list[tuple[str, str, float | None]] = []

    def broken(fault: str, what: str, source: int, reaction: str) -> None:
        began = time.monotonic()
        bench.set("simulator", fault=fault)
        rows.append((what, reaction, bench.reacted(source, began)))
        bench.spin(0.3)
        bench.set("simulator", fault="")
        bench.answering()
        bench.trigger("simulator/reset")
        bench.spin(0.3)

    broken("freeze", "sensor freeze", ON_TIMEOUT, "refused after 100 ms without change, ramp down after 100 ms more")
    broken("nan hinge.velocity", "a NaN in every observation", ON_TIMEOUT, "refused, ramp down after 100 ms")
    broken("drop 1", "observations lost", ON_TIMEOUT, "ramp down after 100 ms")
    broken("delay 0.4", "observations 400 ms late", ON_TIMEOUT, "ramp down after 100 ms")
    broken("clock 1", "stamps 1 s back", ON_TIMEOUT, "refused, ramp down after 100 ms, then the new clock is taken")

    bench.set("controller", tolerance=[1e-9])  # every step a miss
    bench.spin(0.2)
    bench.set("controller", **{"fault.policy_stall_s": 1.0})
    bench.rows.clear()
    bench.reacted(ON_DEADLINE, time.monotonic())
    bench.spin(0.5)
    late = [row[bench.column("latency_us")] for _, row in bench.rows if row[bench.column("region")] == ON_DEADLINE]
    # From the observation on, since each of them asks the policy; the slowest of 50.
    rows.append(("policy stalls for 1 s", "hold at the deadline of 10 ms", max(late) / 1e3 if late else None))
    began = time.monotonic()
    bench.trigger("controller/estop")
    rows.append(("emergency stop while the policy stalls", "zero, latched", bench.reacted(ON_ESTOP, began)))
    bench.set("controller", **{"fault.policy_stall_s": 0.0})
    bench.spin(0.5)
    last = bench.rows[-1][1][bench.column("region")]
    rows.append(("(half a second later)", "still latched", 0.0 if last == ON_ESTOP else None))
    bench.set("controller", tolerance=[0.5])
    bench.trigger("controller/estop_reset")
    bench.answering()
    began = time.monotonic()
    bench.trigger("controller/estop")
    rows.append(("emergency stop", "zero, latched", bench.reacted(ON_ESTOP, began)))
    bench.trigger("controller/estop_reset")
    bench.trigger("simulator/reset")
    bench.answering()

    broken("extreme slider.position", "cart beyond its limit of 1 m", ON_LIMIT, "zero at once")

    operator = bench.node.create_publisher(Float64MultiArray, "laws/intervention", COMMAND_QOS)
    command = set_data(Float64MultiArray(), [2.5 * LIMIT_N])

    def say(message: Float64MultiArray, heard: Callable[[], bool]) -> None:
        """Until it is heard: what is said before two processes know each other is lost."""
        end = time.monotonic() + PATIENCE_S
        operator.publish(message)
        while not heard() and time.monotonic() < end:
            operator.publish(message)

    began = time.monotonic()
    say(command, lambda: bench.reacted(OPERATOR, began, 0.2) is not None)
    say(Float64MultiArray(), lambda: bench.answering(0.2))
    began = time.monotonic()
    operator.publish(command)
    rows.append((f"an operator commands {2.5 * LIMIT_N:g} N", "theirs, within 8 N", bench.reacted(OPERATOR, began)))
    rows.append(("the operator falls silent", "zero after 500 ms", bench.reacted(ON_SILENCE, began)))
    say(Float64MultiArray(), lambda: bench.answering(0.2))
    bench.trigger("simulator/reset")
    bench.spin(0.3)

    began = time.monotonic()
    rival = bench.node.create_publisher(Float64MultiArray, COMMANDS, COMMAND_QOS)
    bench.until(lambda: bench.rows and time.monotonic() - bench.rows[-1][0] > 0.5, 10.0)
    silent = bench.rows[-1][0] - began
    rows.append(("a second publisher of commands", "logged, deactivated", 1e3 * silent if silent < 9.0 else None))
    bench.node.destroy_publisher(rival)
    bench.spin(0.5)

    controller.end()
    second = bench.start("controller", binding=str(binding))
    bench.answering()
    bench.spin(1.0)  # it drives
    before = bench.stepped["let_go"]
    began = time.monotonic()
    second.process.kill()
    gone = bench.until(lambda: bench.stepped["let_go"] > before, 10.0)
    rows.append(
        ("controller killed", "the robot lets go after 200 ms", 1e3 * (time.monotonic() - began) if gone else None)
    )
    bench.start("controller", binding=str(binding), on_timeout="zero")
    bench.answering()
    began = time.monotonic()
    simulator.process.kill()
    rows.append(("robot killed", "zero after 100 ms", bench.reacted(ON_TIMEOUT, began)))
    recorder.close()
    return rows + [row for number in (signal.SIGINT, signal.SIGTERM) for row in exits(bench, number)]


def exits(bench: Bench, number: signal.Signals) -> list[tuple[str, str, float | None]]:
    """How long each node, at work, takes to end after a signal: with code 0, and without a word of an error."""
    for child in bench.children:
        child.end()
    state = {"state": str(bench.folder / "state")}
    bench.told.clear()
    nodes = [bench.start("learner", **state), bench.start("controller", **state), bench.start("simulator")]
    assert bench.answering()
    assert bench.until(lambda: bench.told.get("/learner: learner", {}).get("hits", "0") != "0")
    rows: list[tuple[str, str, float | None]] = []
    for child in nodes:
        began = time.monotonic()
        child.process.send_signal(number)
        code = child.process.wait(timeout=PATIENCE_S)
        took = 1e3 * (time.monotonic() - began)
        said = child.log.read_text() if child.log else ""
        clean = code == 0 and "Traceback" not in said and "rror" not in said
        rows.append((f"{number.name} to the {child.name}", "exit code 0", took if clean else None))
    return rows


def check(bag: Path) -> dict[str, Any]:
    """What the recording says about every command."""
    from rosbags.highlevel import AnyReader

    sent: list[float] = []
    decided: list[tuple[float, float]] = []
    with AnyReader([bag]) as reader:
        for connection, _, raw in reader.messages():
            if connection.topic.endswith("/commands"):
                sent += reader.deserialize(raw, connection.msgtype).data.tolist()
            elif connection.topic.endswith("/decision"):
                message = reader.deserialize(raw, connection.msgtype)
                names = message.layout.dim[0].label.split(",")
                row = dict(zip(names, message.data.tolist(), strict=True))
                decided.append((row["time_s"], row["command:slider.effort"]))
    commands = np.array(sent + [command for _, command in decided])
    # Neighbours in a bag are neighbours in time unless a message was lost: then more periods lie between them.
    steps = [abs(b - a) / max(1, round((u - t) / PERIOD_S)) for (t, a), (u, b) in pairwise(decided)]
    return {
        "commands": len(sent),
        "decisions": len(decided),
        "largest_command": float(np.abs(commands).max()),
        "largest_step": max(steps),
        "outside_limits": int((~(np.abs(commands) <= LIMIT_N)).sum()),
        "outside_rate": int(sum(not step <= RATE_N_PER_S * PERIOD_S for step in steps)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bag", type=Path, help="where to keep the recording (a new folder); default: nowhere")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with Bench() as bench:
        bag = options.bag or bench.folder / "faults"
        rows = run(bench, bag)
        found = check(bag)
    good = all(ms is not None and math.isfinite(ms) for _, _, ms in rows)
    good = good and found["outside_limits"] == found["outside_rate"] == 0
    if options.json:
        print(json.dumps({"faults": [dict(zip(("fault", "reaction", "ms"), r, strict=True)) for r in rows], **found}))
        return 0 if good else 1
    print(f"| {'fault':<40} | {'reaction':<70} | ms |\n| --- | --- | --- |")
    for what, reaction, ms in rows:
        print(f"| {what:<40} | {reaction:<70} | {'MISSING' if ms is None else f'{ms:.0f}'} |")
    print(
        f"\nfrom the bag: {found['commands']} commands and {found['decisions']} decisions, largest "
        f"{found['largest_command']:.3f} N of {LIMIT_N:g}, largest step {found['largest_step']:.3f} N "
        f"of {RATE_N_PER_S * PERIOD_S:g}; outside limits: {found['outside_limits']}, "
        f"beyond the rate: {found['outside_rate']}"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
