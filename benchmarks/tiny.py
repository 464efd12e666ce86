"""Would tiny networks trained on a region be better experts than affine ones? The certified errors of both.

Regions are a library's, drawn by their visits, and the same widened. The certified error of an expert is what the
bounds of the *difference* network say, the policy minus the expert in one graph (core.certify on it; the affine midline
of what is left is part of the expert, so no training is needed for that). Tried beside the affine expert, which is the
same without a network:

  trained      16 hidden ReLU neurons, trained by gradient descent on observations of the region
  grafted      16 hidden neurons taken over from the policy's first layer, those that bend most within the region, with
               the policy's mean slopes as their output layer; in the difference network their errors cancel
  grafted_all  all of that layer's neurons that bend there: the most that grafting can give
  mixed        an expert of that kind (core.collapse): the policy's own neurons, as few of all layers as the tolerance
               needs, lines fitted to the others; certified error in tolerances, and its cost in multiplications

    python benchmarks/tiny.py --library models/arm_sort.laws --policy models/arm_sort.onnx
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from laws_ros.build.folded import multiplications
from laws_ros.core.bounds import ranges
from laws_ros.core.certify import certify
from laws_ros.core.collapse import collapse
from laws_ros.core.library import Library
from laws_ros.core.network import Affine, Elementwise, Network
from laws_ros.core.region import Regions, scattered
from laws_ros.runtime.onnx_graph import load_network

Floats = NDArray[np.float64]
HIDDEN = 16
STEPS = 300


def minus(network: Network, source: int, nodes: Sequence[Affine | Elementwise], weight: Floats) -> Network:
    """network - weight @ node `source`, after `nodes` were added to its graph."""
    last, size = len(network.nodes), network.outputs
    difference = Affine((last, source), (np.ones(size), -weight), np.zeros(size))
    return Network(network.inputs, (*network.nodes, *nodes, difference))


def trained(xi: Floats, rest: Floats, hidden: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Weights [B, h, n], biases [B, h], output weights [B, m, h] of networks fitted to rest [B, N, m] at xi [B, N, n],
    beside an affine map that is fitted with them."""
    import torch

    torch.manual_seed(seed)
    count, _, n = xi.shape
    size = np.abs(rest).max(axis=(1, 2), keepdims=True) + 1e-30
    x, y = torch.tensor(xi), torch.tensor(rest / size)
    shapes = {"u": (count, hidden, n), "c": (count, 1, hidden), "v": (count, rest.shape[2], hidden)}
    shapes |= {"a": (count, rest.shape[2], n), "b": (count, 1, rest.shape[2])}
    scale = {"u": 0.7, "c": 0.3, "v": 0.1, "a": 0.0, "b": 0.0}
    p = {k: (scale[k] * torch.randn(shape, dtype=torch.float64)).requires_grad_() for k, shape in shapes.items()}
    optimiser = torch.optim.Adam(list(p.values()), lr=0.02)
    for step in range(STEPS):
        error = torch.relu(x @ p["u"].mT + p["c"]) @ p["v"].mT + x @ p["a"].mT + p["b"] - y
        optimiser.zero_grad()
        (error**4).mean().backward()  # the largest errors count
        optimiser.step()
        if step == STEPS * 2 // 3:
            optimiser.param_groups[0]["lr"] = 0.005
    u, c, v = (p[k].detach().numpy() for k in "ucv")
    return u, c[:, 0], v * size


def grafted(network: Network, first: int, values: Floats, low: Floats, high: Floats, most: int) -> Floats:
    """Output weights [m, neurons of the first layer]: the policy's mean slopes at their values [N, ...] in a region,
    zero but for at most `most` of those that bend there. (Least squares over a region follow the samples, not the
    policy: neurons are nearly collinear, and certified errors grow several times.)"""
    moved = [replace(n, source=n.source - first) if isinstance(n, Elementwise) else n for n in network.nodes[first:]]
    after = [replace(n, sources=tuple(k - first for k in n.sources)) if isinstance(n, Affine) else n for n in moved]
    rest, seeds = Network(values.shape[1], tuple(after)), np.eye(network.outputs)
    slope = np.stack([rest.gradient(values, np.tile(seed, (len(values), 1))).mean(axis=0) for seed in seeds])
    gap = np.where((low < 0.0) & (high > 0.0), -low * high / (high - low + 1e-300), 0.0)
    chosen = np.argsort(-(np.abs(slope) * gap).max(axis=0))[: min(most, int((gap > 0.0).sum()))]
    found = np.zeros(slope.shape)
    found[:, chosen] = slope[:, chosen]
    return found


def measure(library: Library, network: Network, regions: Regions, effort: str, seed: int) -> dict[str, float]:
    """Medians over regions: `bent` neurons of the first layer; `affine`, its certified error, and `seen` and
    `trained_seen`, the largest sampled ones, in tolerances; the others' certified errors over the affine expert's."""
    rng, n = np.random.default_rng(seed), network.inputs
    index = np.repeat(np.arange(len(regions)), 1000)
    xi = scattered(rng, regions.ball[index], 0.7).reshape(len(regions), -1, n)
    x = regions.center[:, None] + xi @ np.linalg.inv(regions.transform).transpose(0, 2, 1)
    values = [network.values(part) for part in x]
    basis = np.concatenate([xi, np.ones((*xi.shape[:2], 1))], axis=2)
    y = np.stack([v[-1] for v in values])
    rest = np.stack([k - b @ np.linalg.lstsq(b, k, rcond=None)[0] for k, b in zip(y, basis, strict=True)])
    first = next(k for k, node in enumerate(network.nodes, start=1) if isinstance(node, Elementwise))
    low, high = ranges(network, regions)[network.nodes[first - 1].sources[0]]

    def certified(difference: Network, some: Regions) -> Floats:
        return np.asarray((certify(difference, some, effort=effort).worst / library.tolerance).max(axis=1))

    affine = certified(network, regions)
    result = {
        "bent": float(np.median(((low < 0.0) & (high > 0.0)).sum(axis=1))),
        "seen": float(np.median((np.abs(rest).max(axis=1) / library.tolerance).max(axis=1))),
        "affine": float(np.median(affine)),
    }
    last, seen = len(network.nodes), list[float]()
    ratio: dict[str, list[float]] = {"trained": [], "grafted": [], "grafted_all": []}
    for k, (u, c, v) in enumerate(zip(*trained(xi, rest, HIDDEN, seed), strict=True)):
        turned = u @ regions.transform[k]
        inner: list[Affine | Elementwise] = [Affine((0,), (turned,), c - turned @ regions.center[k])]
        inner.append(Elementwise(last + 1, "relu", HIDDEN))
        tried = {"trained": minus(network, last + 2, inner, v)}
        for name, most in (("grafted", HIDDEN), ("grafted_all", 10**6)):
            tried[name] = minus(network, first, [], grafted(network, first, values[k][first], low[k], high[k], most))
        for name, difference in tried.items():
            ratio[name].append(float(certified(difference, regions[k : k + 1])[0] / affine[k]))
        left = np.maximum(xi[k] @ u.T + c, 0.0) @ v.T
        beside = rest[k] - left
        beside = beside - basis[k] @ np.linalg.lstsq(basis[k], beside, rcond=None)[0]
        seen.append(float((np.abs(beside).max(axis=0) / library.tolerance).max()))
    result |= {name: float(np.median(value)) for name, value in ratio.items()}
    result["trained_seen"] = float(np.median(seen))
    mixed = collapse(network, regions, "mixed", library.tolerance)
    result["mixed"] = float(np.median((mixed.bound_offset / library.tolerance).max(axis=1)))
    result |= {"mixed_cost": float(np.median(mixed.cost)), "policy_cost": float(multiplications(network))}
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", required=True)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--regions", type=int, default=6)
    parser.add_argument("--wider", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--effort", default="backward")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    library, network = Library.load(options.library), load_network(options.policy)
    low, high = (limit.astype(float) for limit in library.card.limits)
    delivered = network.unlimited(low, high)
    network = delivered[0] if delivered else network
    rng, share = np.random.default_rng(options.seed), library.visits / library.visits.sum()
    some = library.certificates.regions[rng.choice(len(library), options.regions, p=share)]
    for factor in options.wider:
        wider = Regions(some.center, some.transform / factor, some.round)
        found = measure(library, network, wider, options.effort, options.seed)
        print(json.dumps({"wider": factor, **found}), flush=True)


if __name__ == "__main__":
    main()
