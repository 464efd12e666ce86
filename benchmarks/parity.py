"""What must be the same on every kind of processor: run it on both and compare the lines but the first.

    python benchmarks/parity.py [--library models/cartpole.laws] [--policy models/cartpole.onnx]

A library's digest, what the compiled router answers to 20,000 observations (which region, and the bound to the last
bit), and the independent checker's verdict on some certificates. It needs neither ONNX Runtime nor ROS, so it also runs
under qemu-user (docs/jetson.md); what ONNX Runtime computes is what `laws doctor` looks at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys

import numpy as np

from laws_ros.core.checker import Checker
from laws_ros.core.library import Library
from laws_ros.runtime.files import resolve
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.routing import Router

QUERIES = 20_000
BEYOND = 1.02  # observations are drawn in regions and moved out by this factor, so that some are near an edge
CHECKED = 4  # certificates


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="models/cartpole.laws", help="(default %(default)s)")
    parser.add_argument("--policy", default="models/cartpole.onnx", help="(default %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    library = Library.load(resolve(options.library))
    certificates, rng = library.certificates, np.random.default_rng(0)
    inside = certificates.regions.sample(rng, rng.integers(len(certificates), size=QUERIES))
    x = (BEYOND * inside).astype(np.float32)
    router = Router(library, library.tolerance)
    found, bounds = np.zeros(QUERIES, np.int64), np.zeros((QUERIES, len(library.tolerance)))
    for k, row in enumerate(x):
        found[k] = router(row)
        bounds[k] = router.bound if found[k] >= 0 else 0.0
    checker = Checker(load_network(resolve(options.policy)), library.card.decision)
    result = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}, NumPy {np.__version__}",
        "library": library.digest,
        "queries": digest(x),
        "answered": float((found >= 0).mean()),
        "regions": digest(found),
        "bounds": digest(bounds),
        "verdicts": [checker.verdict(certificates, k) for k in range(min(CHECKED, len(certificates)))],
    }
    print(json.dumps(result) if options.json else "\n".join(f"{name:9} {value}" for name, value in result.items()))
    return 0 if set(result["verdicts"]) == {"holds"} else 1


if __name__ == "__main__":
    sys.exit(main())
