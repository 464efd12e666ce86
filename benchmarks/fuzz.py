"""Random networks of all activations, sizes and scales, with and without normalisation, certified with all efforts over
random regions, attacked through ONNX Runtime.

Prints how many observations were tried and how many broke a bound; exits with 1 if any did. A violation is a bug in the
bounds, and its seed reproduces it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_mlp, random_regions, save_mlp

ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "Elu", "Selu", "Softplus", "LeakyRelu", "Erf", "Gelu", "Mish", "HardSwish"]
EFFORTS = ["backward", "backward", "backward", "interval", "forward", "optimised", "split:3", "split:8"]


def attack(seed: int, path: Path) -> tuple[int, int, int, int]:
    """One random network: observations tried, violations, certificates checked, and left unknown by the checker."""
    rng = np.random.default_rng(seed)
    inputs, depth = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    sizes = [inputs, *(int(rng.integers(1, 40)) for _ in range(depth)), int(rng.integers(1, 5))]
    layers = random_mlp(rng, sizes, 10 ** rng.uniform(-1, 1.5))
    if rng.random() < 0.3:  # layers of very different scale
        layers = [(w * 10 ** rng.uniform(-4, 4), b * 10 ** rng.uniform(-4, 4)) for w, b in layers]
    clip = None if rng.random() < 0.5 else float(10 ** rng.uniform(-1, 1))
    normalize = None if rng.random() < 0.8 else float(10 ** rng.uniform(-6, -2))
    save_mlp(path, layers, str(rng.choice(ACTIVATIONS)), clip, normalize, opset=20)
    network, policy = load_network(path), Policy(path)
    regions = random_regions(rng, 20, inputs, 10 ** rng.uniform(-5, 1), 10 ** rng.uniform(-2, 2))
    certificates = certify(network, regions, effort=str(rng.choice(EFFORTS)))
    certificates = certificates[np.isfinite(certificates.bound_offset).all(axis=1)]
    if len(certificates) == 0:
        return 0, 0, 0, 0
    tried, broken = break_certificates(policy, network, certificates, rng, 100)
    checker, checked = Checker(network), min(2, len(certificates))
    unknown = sum(checker.verdict(certificates, k, splits=8) != "holds" for k in range(checked))
    return tried, broken, checked, unknown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the next ones count up")
    options = parser.parse_args()
    total, networks, start = np.zeros(4, np.int64), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - start < options.seconds:
            found = attack(options.seed + networks, Path(folder) / "p.onnx")
            if found[1]:
                print(f"seed {options.seed + networks}: {found[1]} violations", file=sys.stderr)
            total += found
            networks += 1
    print(
        f"{networks} networks, {total[0]} observations tried, {total[1]} violations; "
        f"checker: {total[2] - total[3]} of {total[2]} certificates proved again, the rest unknown"
    )
    return 1 if total[1] else 0


if __name__ == "__main__":
    sys.exit(main())
