#!/usr/bin/env python3
"""How much action error does the task stand, and what does a library cost that promises no more than that?"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
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
    world, library = ["--policy", given.policy, "--workload", given.workload], str(given.out / "calibrated.laws")
    tried, steps, episodes = ("2", "3000", "1") if given.quick else ("32", "100000", "20")

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = laws(["calibrate", *world, "--episodes", tried, "--json"])
    if code:
        raise SystemExit(code)
    found = json.loads(said.getvalue())
    share = f"{100 * found['tolerance']:.3g}%"
    print(f"{share} of each action's range keeps {100 * found['keep']:g}% of the return; worst: {found['adversary']}")
    code = laws(["build", *world, "--steps", steps, "--tolerance", share, "--out", library])
    raise SystemExit(code or laws(["eval", library, *world, "--episodes", episodes]))


if __name__ == "__main__":
    main()
