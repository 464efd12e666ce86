#!/usr/bin/env python3
"""From a policy to what a robot and its owner get: a library, proved again and attacked, a report, a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from laws_ros.cli import main as laws


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--policy", default="models/cartpole.onnx", help="(default %(default)s)")
    options.add_argument("--workload", default="cartpole", help="(default %(default)s)")
    options.add_argument("--out", type=Path, default=Path("example"), help="folder (default %(default)s)")
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    library, policy = str(given.out / "proved.laws"), ["--policy", given.policy]
    world = [*policy, "--workload", given.workload]
    steps, samples, shown = ("3000", "5000", "1000") if given.quick else ("100000", "1000000", "4000")

    code = (
        laws(["build", *world, "--steps", steps, "--tolerance", "5%", "--out", library])
        or laws(["verify", library, *policy, "--samples", samples, "--attack"])
        or laws(["explain", library, "--region", "0"])
        or laws(["export-vnnlib", library, *policy, "--region", "0", "--out", str(given.out / "vnnlib")])
        or laws(["report", library, *world, "--steps", shown, "--out", str(given.out / "report.html")])
        or laws(["bundle", library, *policy, "--out", str(given.out / "robot.zip")])
    )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
