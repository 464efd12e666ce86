"""The claims of LAWS (arXiv:2605.04069) that can be measured in a minute: do they hold, and under which condition?

Monotone hit rate, self-certification, Lipschitz constants by depth, and the exact cache as a special case. Growth,
acquisition and the fleet have benchmarks of their own (growth.py, eviction.py, fleet.py), mixtures a test
(tests/test_router.py); docs/claims.md puts all of them side by side.

    python benchmarks/claims.py --plot docs/claims-depth.svg
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.build.kinds import grow_points
from laws_ros.build.svg import Axis, Chart
from laws_ros.core.library import Library
from laws_ros.core.lipschitz import formula, global_constant, slopes
from laws_ros.core.network import Network
from laws_ros.core.region import Regions
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.files import resolve
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

Floats = NDArray[np.float64]

DEPTHS = (1, 2, 3, 4, 6, 8, 10, 12)  # hidden layers
WIDTH, INPUTS, OUTPUTS = 64, 9, 4
RADIUS = 0.05  # half-width of a region, of inputs spread with standard deviation 1
REGIONS = 48  # per network
SEEN = 30  # samples that a robot might have in a region
TRIALS = 2000  # observations tried in each


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def network(folder: Path, depth: int, activation: str, seed: int) -> tuple[Policy, Network]:
    """A random network of `depth` hidden layers, scaled so that signals neither grow nor fade (He, Glorot)."""
    rng, sizes, layers = np.random.default_rng([seed, depth]), [INPUTS, *[WIDTH] * depth, OUTPUTS], []
    for k, (inner, outer) in enumerate(pairwise(sizes)):
        gain = np.sqrt(2.0) if activation == "Relu" and k else 1.0
        layers.append((gain * rng.normal(size=(outer, inner)) / np.sqrt(inner), 0.1 * rng.normal(size=outer)))
    return opened(folder / f"{activation}{depth}.onnx", layers, activation)


def switch(folder: Path) -> tuple[Policy, Network]:
    """A policy that switches near the edge of regions around zero: each output goes from 0 to 1 within a hundredth."""
    edge, ramp = 0.97 * RADIUS, 0.01 * RADIUS
    first = np.zeros((2, INPUTS))
    first[:, 0] = 1.0
    second = np.tile([1.0 / ramp, -1.0 / ramp], (OUTPUTS, 1))
    return opened(
        folder / "switch.onnx", [(first, np.array([-edge, -edge - ramp])), (second, np.zeros(OUTPUTS))], "Relu"
    )


def opened(path: Path, layers: list[tuple[Floats, Floats]], activation: str) -> tuple[Policy, Network]:
    nodes, constants, name = [], [], "observation"
    for k, (weight, bias) in enumerate(layers):
        constants += [numpy_helper.from_array(v.astype(np.float32), n) for v, n in ((weight, f"w{k}"), (bias, f"b{k}"))]
        last = k == len(layers) - 1
        nodes.append(helper.make_node("Gemm", [name, f"w{k}", f"b{k}"], ["action" if last else f"z{k}"], transB=1))
        if not last:
            nodes.append(helper.make_node(activation, [f"z{k}"], [f"a{k}"]))
        name = f"a{k}"
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])]
        for name, size in (("observation", INPUTS), ("action", OUTPUTS))
    ]
    graph = helper.make_graph(nodes, "policy", *ends, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return Policy(path), load_network(path)


def boxes(seed: int) -> Regions:
    rng = np.random.default_rng(seed)
    widths = np.full((REGIONS, INPUTS), RADIUS)
    return Regions.from_axes(rng.normal(size=(REGIONS, INPUTS)), np.tile(np.eye(INPUTS), (REGIONS, 1, 1)), widths)


def steepest(net: Network, regions: Regions, xi: Floats) -> Floats:
    """[B]: the largest norm of an output's gradient in a region's coordinates, over sampled xi [B, S, n]."""
    edges = np.linalg.inv(regions.transform)
    x = regions.center[:, None] + np.einsum("bij,bsj->bsi", edges, xi)
    found = np.zeros(len(regions))
    for row in np.eye(OUTPUTS):
        seed = np.tile(row, (x.shape[0] * x.shape[1], 1))
        gradient = net.gradient(x.reshape(-1, INPUTS), seed).reshape(x.shape)
        found = np.maximum(found, np.linalg.norm(np.einsum("bsi,bij->bsj", gradient, edges), axis=2).max(axis=1))
    return found


def by_depth(seed: int) -> list[dict[str, Any]]:
    """Lipschitz constants over small regions: product of norms, certified there, and the steepest slope sampled."""
    rows, regions = [], boxes(seed)
    xi = np.random.default_rng(seed + 1).uniform(-1, 1, (REGIONS, 200, INPUTS))
    with tempfile.TemporaryDirectory() as folder:
        for activation in ("Relu", "Tanh"):
            for depth in DEPTHS:
                _, net = network(Path(folder), depth, activation, seed)
                say(f"{activation}, {depth} hidden layers")
                local = np.linalg.norm(slopes(net, regions).local, axis=2).max(axis=1)
                sampled = steepest(net, regions, xi)
                whole = global_constant(net, regions[[0]]).max()
                assert (sampled <= local).all()  # certified means certified
                rows.append(
                    {
                        "activation": activation,
                        "depth": depth,
                        "global": float(whole),
                        "local": float(np.median(local)),
                        "sampled": float(np.median(sampled)),
                    }
                )
    return rows


def growth_of(rows: list[dict[str, Any]], what: str) -> dict[str, float]:
    """How a constant grows with depth: the better of c exp(a d) and c d^p, by what each leaves unexplained."""
    depth, value = np.array([r["depth"] for r in rows], float), np.log([r[what] for r in rows])
    result = {}
    for name, axis in (("per_layer", depth), ("power", np.log(depth))):
        line = np.polyfit(axis, value, 1)
        rest = value - np.polyval(line, axis)
        result[name] = float(np.exp(line[0]) if name == "per_layer" else line[0])
        result[f"{name}_unexplained"] = float((rest**2).sum() / max(((value - value.mean()) ** 2).sum(), 1e-300))
    return result


def self_certification(seed: int) -> list[dict[str, Any]]:
    """eps_fit + 2 Lambda C_E with constants that are proved, and with constants estimated from what was seen."""
    rows, around = [], boxes(seed)
    rng = np.random.default_rng(seed + 2)
    seen, tried = rng.uniform(-1, 1, (REGIONS, SEEN, INPUTS)), rng.uniform(-1, 1, (REGIONS, TRIALS, INPUTS))
    edges = np.linalg.inv(around.transform)
    corner = 2.0 * np.sqrt(INPUTS)  # nowhere in a region is a sample further away than this
    with tempfile.TemporaryDirectory() as folder:
        for activation, depth in (("Relu", 2), ("Tanh", 2), ("Relu", 6), ("switch", 1)):
            made = activation == "switch"
            policy, net = switch(Path(folder)) if made else network(Path(folder), depth, activation, seed)
            regions = replace(around, center=around.center * (np.arange(INPUTS) > 0)) if made else around
            proved = global_constant(net, regions)
            local = np.linalg.norm(slopes(net, regions).local, axis=2)
            broken = {"estimated": 0, "local": 0, "global": 0}
            bounds: dict[str, list[float]] = {name: [] for name in broken}
            for b in range(REGIONS):
                x, far = (
                    (regions.center[b] + xi[b] @ edges[b].T).astype(np.float32) for xi in (seen, tried)
                )  # fmt: skip
                y, other = policy.batch(x).astype(float), policy.batch(far).astype(float)
                z = np.c_[seen[b], np.ones(SEEN)]
                fit = np.linalg.lstsq(z, y, rcond=None)[0]
                eps = np.abs(y - z @ fit).max(axis=0)
                error = np.abs(other - np.c_[tried[b], np.ones(TRIALS)] @ fit)
                apart = np.linalg.norm(seen[b][:, None] - seen[b], axis=2) + 1e9 * np.eye(SEEN)
                pairs = np.abs(y[:, None] - y).max(axis=2) / apart
                own = np.linalg.norm(fit[:-1], axis=0)  # the expert's slope; the paper takes the policy's for both
                for name, constant, radius in (
                    # what can be read off the samples: the steepest pair, and how far each is from its neighbour
                    ("estimated", np.full(OUTPUTS, pairs.max()), apart.min(axis=1).max()),
                    ("local", 0.5 * (local[b] + own), corner),
                    ("global", 0.5 * (proved[b] + own), corner),
                ):
                    bound = formula(eps, constant, np.float64(radius))
                    broken[name] += int((error > bound).any(axis=1).sum())
                    bounds[name].append(float(bound.max()))
            rows.append(
                {
                    "activation": activation,
                    "depth": depth,
                    "tried": REGIONS * TRIALS,
                    **{f"{name}_broken": count for name, count in broken.items()},
                    **{f"{name}_bound": float(np.median(values)) for name, values in bounds.items()},
                }
            )
    return rows


def monotone(library: Library, policy: Policy, seed: int) -> dict[str, Any]:
    """Libraries that grow expert by expert in a random order: does any observation lose its answer?"""
    rng, c = np.random.default_rng(seed), library.certificates
    index = rng.integers(len(c), size=20_000)
    edges = np.linalg.inv(c.transform[index])
    x = (c.center[index] + np.einsum("nij,nj->ni", edges, rng.uniform(-1.1, 1.1, c.center[index].shape))).astype(
        np.float32
    )
    order = rng.permutation(len(c))
    sizes = np.unique(np.geomspace(1, len(c), 12).astype(int))
    before, lost, rates = np.zeros(len(x), bool), 0, []
    for size in sizes:
        some = np.sort(order[:size])
        trie = library.trie.with_regions(c.regions[some], np.arange(size))
        part = replace(library, certificates=c[some], visits=library.visits[some], trie=trie)
        hit = Router(part, library.tolerance).many(x) >= 0
        lost += int((before & ~hit).sum())
        before = hit
        rates.append(float(hit.mean()))
    return {"experts": sizes.tolist(), "hit_rate": rates, "observations": len(x), "lost": lost}


def exact_cache(folder: Path, seed: int) -> dict[str, Any]:
    """A library of points against a dictionary of answers, on traffic that repeats itself."""
    policy, net = network(folder, 2, "Relu", seed)
    rng = np.random.default_rng(seed)
    known = rng.normal(size=(200, INPUTS)).astype(np.float32)
    traffic = known[rng.integers(200, size=3000)]
    traffic[::3] = rng.normal(size=traffic[::3].shape)  # a third is new
    library = grow_points(policy, net, known, np.full(OUTPUTS, 1e-3)).library
    table = {x.tobytes(): policy(x) for x in known}
    cached = CachedPolicy(library, policy)
    same = hits = 0
    for x in traffic:
        answer, direct = cached.lookup(x), table.get(x.tobytes())
        hits += direct is not None
        same += (answer is None) == (direct is None) and (direct is None or bool((answer.action == direct).all()))
    return {"queries": len(traffic), "hits": hits, "same_as_the_dictionary": same}


def plot(rows: list[dict[str, Any]]) -> str:
    every = [[r["global"], r["local"], r["sampled"]] for r in rows]
    chart = Chart(
        "Lipschitz constants by depth",
        "Product of the layers' norms, certified over small regions, and sampled there, for random ReLU and tanh "
        "networks of 1 to 12 hidden layers.",
        Axis("hidden layers", 1, max(DEPTHS)),
        Axis.over("constant over a region of half-width 0.05", every, log=True),
        width=980,
    )
    for what, css, words in (
        ("global", "k2", "product of norms"),
        ("local", "k1", "certified"),
        ("sampled", "k3", "sampled"),
    ):
        for activation, dash in (("Relu", ""), ("Tanh", " dash")):
            here = [r for r in rows if r["activation"] == activation]
            label = f"{words}, {'ReLU' if activation == 'Relu' else 'tanh'}"
            chart.line([r["depth"] for r in here], [r[what] for r in here], css + dash, label)
    return chart.svg(alone=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", default="models/cartpole.laws", help="for the hit rate (default %(default)s)")
    parser.add_argument("--policy", default="models/cartpole.onnx")
    parser.add_argument("--plot", help="write the constants by depth to this SVG file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    depths = by_depth(options.seed)
    library, policy = Library.load(resolve(options.library)), Policy(resolve(options.policy))
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "monotone": monotone(library, policy, options.seed),
            "self_certification": self_certification(options.seed),
            "lipschitz_by_depth": depths,
            "lipschitz_growth": {
                f"{activation} {what}": growth_of([r for r in depths if r["activation"] == activation], what)
                for activation in ("Relu", "Tanh")
                for what in ("global", "local", "sampled")
            },
            "exact_cache": exact_cache(Path(folder), options.seed),
        }
    if options.plot:
        Path(options.plot).write_text(plot(depths), encoding="utf-8")
    if options.json:
        print(json.dumps(result))
    else:
        report(result)
    cache = result["exact_cache"]
    holds = (
        all(r["local_broken"] + r["global_broken"] == 0 for r in result["self_certification"]),
        result["monotone"]["lost"] == 0,
        cache["same_as_the_dictionary"] == cache["queries"],
    )
    return 0 if all(holds) else 1


def report(result: dict[str, Any]) -> None:
    m, cache = result["monotone"], result["exact_cache"]
    print(f"hit rate, {m['experts'][0]} to {m['experts'][-1]} experts in a random order: "
          f"{', '.join(f'{100 * r:.1f}%' for r in m['hit_rate'])}; {m['lost']} answers lost")  # fmt: skip
    print(
        "\n| network | bound broken, constants estimated | local | global | median bound: estimated | local | global |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for r in result["self_certification"]:
        print(
            f"| {r['activation']}, {r['depth']} hidden | {r['estimated_broken']} of {r['tried']} | "
            f"{r['local_broken']} | {r['global_broken']} | {r['estimated_bound']:.3g} | {r['local_bound']:.3g} | "
            f"{r['global_bound']:.3g} |"
        )
    print(
        "\n| activation | hidden layers | product of norms | certified | sampled |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for r in result["lipschitz_by_depth"]:
        print(f"| {r['activation']} | {r['depth']} | {r['global']:.3g} | {r['local']:.3g} | {r['sampled']:.3g} |")
    for name, g in result["lipschitz_growth"].items():
        print(
            f"{name}: times {g['per_layer']:.2f} per layer (leaves {g['per_layer_unexplained']:.1%} unexplained), or "
            f"depth to the power {g['power']:.2f} (leaves {g['power_unexplained']:.1%})"
        )
    print(f"\nexact cache: {cache['same_as_the_dictionary']} of {cache['queries']} answers as the dictionary's")


if __name__ == "__main__":
    sys.exit(main())
