"""What a snapshot costs the processes that open it: time, memory, and the control steps while a new one comes in.

The library is synthetic but true, as in benchmarks/hot_path.py; every figure is of a process of its own. `first` opens
a library as a controller does; `second` does the same beside it, as the learner, the fleet's cell or another controller
do. `takeover` is what a controller's upkeep does with a new snapshot (read, check, open beside the old one) while the
control loop goes on at 200 Hz with the old one; memory is compared with that before, `step` is the longest control step
meanwhile, `switch` the step in which the new library answers for the first time.

    python benchmarks/snapshot.py --regions 10000 100000
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from hot_path import OBSERVATIONS, inside, make_library, save_policy, say

from laws_ros.core.library import Library
from laws_ros.runtime.cached_policy import CachedPolicy

PERIOD_S = 0.005
KEPT: list[object] = []  # what a process holds for as long as it lives


def memory_mb() -> dict[str, float]:
    """Of this process: resident, and what of it is nobody else's."""
    text = Path("/proc/self/smaps_rollup").read_text()
    found = {name: int(kb) / 1024 for name, kb in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
    return {"resident": found["Rss"], "private": found["Private_Clean"] + found["Private_Dirty"]}


def peak_mb() -> float:
    """The most that was ever resident."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def opened(folder: Path, small: Path) -> dict[str, float]:
    """A library opened in this process, which has opened a small one before."""
    policy = folder / "policy.onnx"
    CachedPolicy.open(small, policy)
    before, peak = memory_mb(), peak_mb()
    start = time.perf_counter()
    library = Library.load(folder / "library.laws")
    loaded = time.perf_counter()
    cached = CachedPolicy.open(folder / "library.laws", policy)
    seconds = time.perf_counter() - loaded
    del library
    KEPT.append(cached)
    memory = {name: value - before[name] for name, value in memory_mb().items()}
    assert len(cached.library)
    return {"load_s": loaded - start, "open_s": seconds, **memory, "peak": peak_mb() - peak}


def taken_over(folder: Path) -> dict[str, float]:
    """A new snapshot while the old one answers."""
    loop = CachedPolicy.open(folder / "library.laws", folder / "policy.onnx")
    newest = loop
    x = inside(np.random.default_rng(0), loop.library.certificates, 1000)
    before, peak, seconds = memory_mb(), peak_mb(), [0.0]

    def upkeep() -> None:
        nonlocal newest
        start = time.perf_counter()
        library = Library.load(folder / "next.laws")
        library.check_policy(loop.policy.sha256, loop.policy.card, "", "")
        if library.digest != loop.library.digest:
            newest = CachedPolicy(library, loop.policy, loop.tolerance.tolist(), loop.kinds)
        seconds[0] = time.perf_counter() - start

    thread, steps, k, mine = threading.Thread(target=upkeep), [], 0, loop
    loop.library.digest  # noqa: B018  # which a controller reports when it starts
    peak = peak_mb()
    thread.start()
    while mine is loop:
        due = time.perf_counter() + PERIOD_S
        mine = newest
        start = time.perf_counter()
        mine.lookup(x[k % 1000])
        steps.append(time.perf_counter() - start)
        k += 1
        time.sleep(max(0.0, due - time.perf_counter()))
    thread.join()
    KEPT.extend([loop, newest])
    both = memory_mb()
    return {
        "seconds": seconds[0],
        "resident": both["resident"] - before["resident"],
        "private": both["private"] - before["private"],
        "peak": peak_mb() - peak,
        "step_ms": 1000 * max(steps[:-1], default=0.0),
        "switch_ms": 1000 * steps[-1],
    }


def child(*arguments: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__, *arguments], stdin=pipe, stdout=pipe, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, float]:
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise SystemExit("a measuring process has failed")
    return {name: round(value, 4) for name, value in json.loads(line).items()}


def measure(count: int, rng: np.random.Generator) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_policy(folder / "policy.onnx", rng)
        make_library(folder / "small.laws", folder / "policy.onnx", 10, rng)
        for file in ("library.laws", "next.laws"):
            say(f"certifying {count} regions of {OBSERVATIONS} observations")
            make_library(folder / file, folder / "policy.onnx", count, rng)
        first = child("--opened", name)
        result: dict[str, Any] = {
            "regions": count,
            "file_mb": round((folder / "library.laws").stat().st_size / 2**20, 1),
        }
        result["first"] = answer(first)
        second = child("--opened", name)
        result["second"] = answer(second)
        other = child("--opened", name, "--file", "next.laws")  # who made the new snapshot
        answer(other)
        result["takeover"] = answer(taking := child("--taken-over", name))
        for process in (first, second, other, taking):
            process.communicate()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regions", type=int, nargs="+", default=[10_000])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead of lines")
    parser.add_argument("--seed", type=int, default=0)
    for option in ("--opened", "--taken-over", "--file"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.opened or options.taken_over:
        folder = Path(options.opened or options.taken_over)
        if options.opened and options.file:
            KEPT.append(Library.load(folder / options.file))
            print("{}", flush=True)
        else:
            found = opened(folder, folder / "small.laws") if options.opened else taken_over(folder)
            print(json.dumps(found), flush=True)
        sys.stdin.read()  # stays, with what it holds, until it is told to go
        return
    rows = [measure(count, np.random.default_rng(options.seed)) for count in options.regions]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(f"{row['regions']} regions, {row['file_mb']} MB; memory in MB")
        for part in ("first", "second", "takeover"):
            print(f"  {part:9}" + ", ".join(f"{name} {value:.4g}" for name, value in row[part].items()))


if __name__ == "__main__":
    main()
