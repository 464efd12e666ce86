"""How a library grows with what it sees: experts against observations, for workloads of three entropies.

The paper's claim is O(2^H log N) experts after N observations, H being the workload's entropy. Here the sorting arm
draws its bins by Zipf laws of three exponents. An observation that no expert brought in so far answers brings in one
that does, out of a grown library (as in build/learn.py, with certificates made beforehand); H is the entropy of which
expert answers. Two laws are fitted to the curve, a power of N and a straight line in log N.

    python benchmarks/growth.py --library LIB --plot docs/growth.png
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from eviction import able
from numpy.typing import NDArray

from laws_ros.build import workloads
from laws_ros.build.evaluate import policy_rollouts
from laws_ros.core.library import Library
from laws_ros.runtime.files import resolve
from laws_ros.runtime.policy import Policy

EXPONENTS = (0.0, 1.5, 4.0)
FROM = 1000  # observations; the fit leaves the first ones out


def grown(table: NDArray[np.intp], experts: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """When experts were brought in, and who answered what could be answered, for requests in their order.

    Args:
        table: [N, W] per request the experts that answer it, filled up with `experts`.
    """
    known, came, by = np.zeros(experts + 1, dtype=bool), [], []
    for k, choices in enumerate(table):
        if choices[0] == experts:
            continue
        have = known[choices]
        if not have.any():
            known[choices[0]] = True
            came.append(k)
        by.append(choices[int(have.argmax())])
    return np.array(came), np.array(by)


def fits(came: NDArray[np.intp], count: int, entropy: float) -> dict[str, float]:
    """Exponent of the power law, slope per factor e of the logarithm, and the share of variance each explains; and the
    largest share of 2^H ln N that the library ever had."""
    n = np.unique(np.geomspace(FROM, count, 60).astype(int))
    size = np.searchsorted(came, n).astype(float)
    (power, offset), (slope, level) = np.polyfit(np.log(n), np.log(size), 1), np.polyfit(np.log(n), size, 1)
    spread = ((size - size.mean()) ** 2).sum()
    of_power = 1.0 - ((size - np.exp(offset) * n**power) ** 2).sum() / spread
    of_logarithm = 1.0 - ((size - slope * np.log(n) - level) ** 2).sum() / spread
    share = float((size / (2.0**entropy * np.log(n))).max())
    found = {"power": float(power), "power_r2": float(of_power), "slope": float(slope), "log_r2": float(of_logarithm)}
    return found | {"most_of_bound": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="models/arm_sort.onnx")
    parser.add_argument("--library", required=True, help="of that policy, from as many observations as possible")
    parser.add_argument("--episodes", type=int, default=30, help="of 40 s per exponent (default 30)")
    parser.add_argument("--seed", type=int, default=21)
    parser.add_argument("--plot", help="draw the curves to this file")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    policy, library = Policy(resolve(options.policy)), Library.load(resolve(options.library))
    library.check_policy(policy.sha256, policy.card, options.library, options.policy)
    rows: list[dict[str, Any]] = []
    for exponent in EXPONENTS:
        workload = workloads.get(f"arm_sort?zipf={exponent:g}")
        x = np.concatenate(policy_rollouts(policy, workload, options.episodes, options.seed).observations)
        came, by = grown(able(library, x), len(library))
        share = np.bincount(by) / len(by)
        entropy = float(-(share[share > 0] * np.log2(share[share > 0])).sum())
        row = {"zipf": exponent, "observations": len(x), "answerable": len(by) / len(x), "experts": len(came)}
        row |= {"entropy_bits": entropy, "bound": 2.0**entropy * float(np.log(len(x))), **fits(came, len(x), entropy)}
        rows.append(row | {"came": came.tolist()})
        print(json.dumps(row), file=sys.stderr, flush=True)
    if options.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
        for row in rows:
            label = f"Zipf {row['zipf']:g}: H = {row['entropy_bits']:.2f} bits"
            (line,) = axes.step(row["came"], np.arange(1, 1 + row["experts"]), where="post", label=label)
            n = np.geomspace(FROM, row["observations"], 50)
            axes.plot(n, 2.0 ** row["entropy_bits"] * np.log(n), ":", color=line.get_color())
        axes.set(xscale="log", yscale="log", xlim=(10, None))
        axes.set(xlabel="observations N", ylabel="experts (dotted: 2^H ln N)")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(options.plot, dpi=120)
    if options.json:
        print(json.dumps(rows))
        return
    heads = ["Zipf", "H, bits", "experts", "2^H ln N", "at most", "as a power of N", "R2", "per factor e of N", "R2"]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for row in rows:
        cells = [f"{row['zipf']:g}", f"{row['entropy_bits']:.2f}", str(row["experts"]), f"{row['bound']:.0f}"]
        cells += [f"{100 * row['most_of_bound']:.0f}%", f"{row['power']:.2f}", f"{row['power_r2']:.3f}"]
        cells += [f"{row['slope']:.0f}", f"{row['log_r2']:.3f}"]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
