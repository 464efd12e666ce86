#!/usr/bin/env python3
"""From a recorded bag: what a robot saw is what a library is grown from. No simulator is needed for that.

Here the bag comes from the simulated cart-pole; a bag of a real robot goes in its place (docs/workloads.md says how its
topics are found).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from laws_ros.cli import main as laws


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--policy", default="models/cartpole.onnx", help="(default %(default)s)")
    options.add_argument("--bag", help="a bag (.mcap, .db3 or folder) of a robot; default: one is recorded")
    options.add_argument("--out", type=Path, default=Path("example"), help="folder (default %(default)s)")
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    policy, library = ["--policy", given.policy], given.out / "bag.laws"
    recorded, episodes = ("4", "1") if given.quick else ("50", "20")

    bag, code = given.bag, 0
    if bag is None:
        bag = str(given.out / "run.mcap")
        code = laws(["record", *policy, "--workload", "cartpole", "--episodes", recorded, "--out", bag])
    code = (
        code
        or laws(["build", *policy, "--workload", bag, "--tolerance", "5%", "--out", str(library)])
        or laws(["eval", str(library), *policy, "--workload", bag])  # replayed: answers and errors, but no return
        or laws(["eval", str(library), *policy, "--workload", "cartpole", "--episodes", episodes])  # driven
    )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
