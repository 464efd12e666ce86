"""Random networks of all activations, sizes and scales, with and without normalisation, certified with all efforts over
random regions, some of them about delivered actions, attacked through ONNX Runtime; and the checker, asked to prove
claims just below errors that were seen.

Prints how many observations were tried, how many broke a bound, and how many false claims were proved; exits with 1 if
any. Either is a bug, and its seed reproduces it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from laws_ros.build.verify import Executed
from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_mlp, random_regions, save_mlp

ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "Elu", "Selu", "Softplus", "LeakyRelu", "Erf", "Gelu", "Mish", "HardSwish"]
EFFORTS = ["backward", "backward", "backward", "interval", "forward", "optimised", "split:3", "split:8"]


def attack(seed: int, path: Path) -> tuple[int, int, int, int, int, int]:
    """One random network: observations tried, violations, certificates checked, and left unknown by the checker; false
    claims made, and proved."""
    rng = np.random.default_rng(seed)
    inputs, depth = int(rng.integers(1, 8)), int(rng.integers(1, 5))
    sizes = [inputs, *(int(rng.integers(1, 40)) for _ in range(depth)), int(rng.integers(1, 5))]
    layers = random_mlp(rng, sizes, 10 ** rng.uniform(-1, 1.5))
    if rng.random() < 0.3:  # layers of very different scale
        layers = [(w * 10 ** rng.uniform(-4, 4), b * 10 ** rng.uniform(-4, 4)) for w, b in layers]
    clip = None if rng.random() < 0.5 else float(10 ** rng.uniform(-1, 1))
    normalize = None if rng.random() < 0.8 else float(10 ** rng.uniform(-6, -2))
    save_mlp(path, layers, str(rng.choice(ACTIVATIONS)), clip, normalize, opset=20)
    path.with_suffix(".yaml").unlink(missing_ok=True)
    if clip is not None and rng.random() < 0.5:
        ends = {"low": -clip, "high": clip}
        names = {"observations": inputs, "actions": sizes[-1]}
        card = {
            k: [{"name": f"{k[0]}{i}", **(ends if k == "actions" else {})} for i in range(n)] for k, n in names.items()
        }
        path.with_suffix(".yaml").write_text(yaml.safe_dump({"name": "p", **card}))
    network, policy = load_network(path), Policy(path)
    regions = random_regions(rng, 20, inputs, 10 ** rng.uniform(-5, 1), 10 ** rng.uniform(-2, 2))
    certificates = certify(network, regions, effort=str(rng.choice(EFFORTS)), limits=policy.card.limits)
    certificates = certificates[np.isfinite(certificates.bound_offset).all(axis=1)]
    if len(certificates) == 0:
        return 0, 0, 0, 0, 0, 0
    tried, broken = break_certificates(policy, network, certificates, rng, 100)
    checker, checked = Checker(network), min(2, len(certificates))
    unknown = sum(checker.verdict(certificates, k, splits=8) != "holds" for k in range(checked))
    index = np.repeat(np.arange(checked), 300)
    x = certificates.regions.sample(rng, index, 0.5).astype(np.float32)
    inside, error, _ = Executed(policy, certificates).compare(index, x)
    seen = np.zeros(certificates.bound_offset.shape)
    np.maximum.at(seen, index[inside], error[inside])
    claims = replace(certificates, bound_weight=0.0 * certificates.bound_weight, bound_offset=0.999 * seen)
    false = np.flatnonzero((seen > 0.0).any(axis=1))
    proved = sum(checker.verdict(claims, k, splits=8) == "holds" for k in false.tolist())
    return tried, broken, checked, unknown, len(false), proved


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the next ones count up")
    options = parser.parse_args()
    total, networks, start = np.zeros(6, np.int64), 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() - start < options.seconds:
            found = attack(options.seed + networks, Path(folder) / "p.onnx")
            if found[1] or found[5]:
                where = f"seed {options.seed + networks}"
                print(f"{where}: {found[1]} violations, {found[5]} false claims proved", file=sys.stderr)
            total += found
            networks += 1
    print(
        f"{networks} networks, {total[0]} observations tried, {total[1]} violations; "
        f"checker: {total[2] - total[3]} of {total[2]} certificates proved again, the rest unknown; "
        f"{total[5]} of {total[4]} false claims"
    )
    return 1 if total[1] or total[5] else 0


if __name__ == "__main__":
    sys.exit(main())
