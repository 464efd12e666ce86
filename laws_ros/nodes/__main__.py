"""`python -m laws_ros.nodes NAME` runs a node; signals end it cleanly even while its imports are under way."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NoReturn

from . import exits

NODES = ("cell", "controller", "learner", "simulator")


def main(name: str) -> NoReturn:
    """Run the node and end the process with its exit code."""
    exits.install()
    if name in ("cell", "learner"):  # it shall not take every core, and libraries read this when they are loaded
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    code: int = import_module(f"laws_ros.nodes.{name}").main()
    # Taking the interpreter down as well would cost hundreds of milliseconds (seconds on a busy machine), and signals
    # would be fatal again meanwhile.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in NODES:
        sys.exit(f"usage: python -m laws_ros.nodes {'|'.join(NODES)} [--ros-args ...]")
    main(sys.argv.pop(1))
