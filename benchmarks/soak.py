"""Endurance: simulator and controller for minutes or hours, with an emergency stop every ten seconds.

    python benchmarks/soak.py [--minutes 2] [--max-growth-mb 2] [--learner] [--json]

Once a second the resident memory, threads and open files of all processes are read, and the statistics of the
controller's answers are taken. Exit code 1 if memory grew by more than allowed between the first quarter's end and the
run's end, a thread or file was left behind, an emergency stop was missed or not released, a decision was lost
(`step` has a gap), observations had queued up (more than MOST_UNDER_WAY are answered once the robot pauses), or a
process ended. A machine that is slow fails nothing of this: it makes late answers and the reactions to them, which are
only counted. One hour: --minutes 60.

With --learner the controller takes over what a learner beside it makes of its misses, of at most MOST_EXPERTS experts,
since a larger library is no leak. The learner's own memory follows the lesson that it happens to be at, and may have
grown by LEARNER_MB.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from robot import PATIENCE_S, Bench  # beside this file
from std_srvs.srv import SetBool, Trigger

from laws_ros.core.safety import ON_ESTOP, ON_TIMEOUT, POLICY, SOURCES

ESTOP_EVERY_S = 10.0
LEARNER_MB = 64.0
MOST_EXPERTS = 600
MOST_UNDER_WAY = 3  # one that the robot is about to send, one on its way, one in the loop


def footprint(pid: int) -> tuple[float, int, int]:
    """Resident memory [MB], threads and open files of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "Threads"))}
    return int(values["VmRSS"]) / 1024.0, int(values["Threads"]), len(os.listdir(f"/proc/{pid}/fd"))


def run(minutes: float, max_growth_mb: float, learner: bool) -> tuple[dict[str, Any], bool]:
    """The figures, and whether all is well."""
    with Bench() as bench:
        state = {"state": str(bench.folder / "state")} if learner else {}
        budget = {"budget.capacity": [20.0], "budget.drain_per_s": [100.0]}
        nodes = {"controller": bench.start("controller", **budget, **state)}
        nodes["simulator"] = bench.start("simulator", seed=1, start_timeout_s=PATIENCE_S)
        if learner:
            nodes["learner"] = bench.start("learner", most_experts=MOST_EXPERTS, **state)
        if not bench.until(lambda: len(bench.rows) > 100):
            for child in nodes.values():
                child.complain()
        for service in ("controller/estop", "controller/estop_reset"):
            bench.client(Trigger, service)
        seen: dict[str, list[tuple[float, int, int]]] = {name: [] for name in nodes}
        stops: list[float] = []
        missed = lost = answers = hits = 0
        reactions: Counter[int] = Counter()
        step: float | None = None
        latency: list[float] = []
        begun = shown = time.monotonic()
        next_stop = begun + ESTOP_EVERY_S / 2
        while (now := time.monotonic()) < begun + 60.0 * minutes:
            bench.spin(1.0)
            for name, child in nodes.items():
                if not child.running():
                    child.complain()
                seen[name].append(footprint(child.process.pid))
            rows, bench.rows = bench.rows, []
            table = np.array([row for _, row in rows]).reshape(len(rows), -1)
            for row in table:
                region, count = row[bench.column("region")], row[bench.column("step")]
                if region < POLICY:
                    reactions[int(region)] += 1
                    continue
                lost += 0 if step is None else int(count - step - 1)
                step = count
                answers += 1
                hits += int(region >= 0)
                latency.append(row[bench.column("latency_us")])
            latency = latency[-10_000:]
            if now >= next_stop:
                next_stop = now + ESTOP_EVERY_S
                began = time.monotonic()
                bench.trigger("controller/estop")
                took = bench.reacted(ON_ESTOP, began)
                missed += took is None
                if took is not None:
                    stops.append(took)
                bench.trigger("controller/estop_reset")
                missed += not bench.answering()
            if now - shown > 30.0:
                shown = now
                memory = ", ".join(f"{name} {values[-1][0]:.1f} MB" for name, values in seen.items())
                print(f"soak {(now - begun) / 60:.1f} min: {answers} answers, {memory}", file=sys.stderr, flush=True)
        bench.call(SetBool, "simulator/pause", data=True)
        paused = time.monotonic()
        drained = bench.reacted(ON_TIMEOUT, paused) is not None
        region, moment = bench.column("region"), bench.column("time_s")
        queued = sum(bool(row[region] >= POLICY and row[moment] > paused) for _, row in bench.rows)
        result: dict[str, Any] = {
            "minutes": minutes,
            "answers": answers,
            "answered_after_pause": queued,
            "reactions": {SOURCES[source]: count for source, count in reactions.items()},
            "hit_rate": hits / max(1, answers),
            "lost_decisions": lost,
            "estops": len(stops),
            "estops_missed": missed,
            "estop_ms": {"p50": float(np.median(stops)), "max": max(stops)} if stops else {},
            "latency_us": dict(zip(("p50", "p99"), np.percentile(latency, (50, 99)).tolist(), strict=True)),
        }
        good = drained and missed == lost == 0 and queued <= MOST_UNDER_WAY
        if learner:
            told = bench.told["/learner: learner"]
            result["learned"] = {name: int(told[name]) for name in ("rounds", "added", "retired", "dropped", "waiting")}
            result["learned"]["taken_over"] = int(bench.told["/controller: control loop"]["updates"])
        for name, values in seen.items():
            first = values[len(values) // 4]
            # The median of the last tenth: a single garbage collection is not a trend.
            last = [float(np.median(column)) for column in zip(*values[-max(1, len(values) // 10) :], strict=True)]
            result[name] = {
                "rss_mb": last[0],
                "growth_mb": last[0] - first[0],
                "threads": last[1] - first[1],
                "open_files": last[2] - first[2],
            }
            allowed = LEARNER_MB if name == "learner" else max_growth_mb
            good = good and last[0] - first[0] <= allowed and last[1] <= first[1] and last[2] <= first[2]
    return result, good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--max-growth-mb", type=float, default=2.0)
    parser.add_argument("--learner", action="store_true", help="with a learner beside the controller")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result, good = run(options.minutes, options.max_growth_mb, options.learner)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))
    print("all well" if good else "NOT well", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
