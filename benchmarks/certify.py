"""What a certificate costs and how tight it is, beside the alternatives on the same regions.

Per policy: microseconds per region of `certify` (fit and proof) and of the independent checker; the mean certified
bound; the width of the policy's proven output range; the certified bound over the worst error that sampling and
gradient ascent find (how loose it is, at least 1); and what the formula of the paper (arXiv:2604.06228) would certify,
eps_fit + 2 Lambda C_E, with Lambda the product of the layers' spectral norms, eps_fit the expert's error at the
region's center, and C_E the distance from there to the farthest corner. Where auto_LiRPA is installed, its CROWN
bounds the same boxes.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.bounds import affine_bounds
from laws_ros.core.certificate import Certificates, decision_rows
from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.network import Affine, Elementwise, Network, Node
from laws_ros.core.region import Regions
from laws_ros.runtime.onnx_graph import load_network

Floats = NDArray[np.float64]

BATCH = 64
POLICIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "policies"  # absent outside the workplace
CHUNK = 2048  # observations of one forward or backward pass through a policy
STEPS = 10  # of gradient ascent


@dataclass(frozen=True)
class Case:
    """A policy and the axis-aligned boxes it is certified on.

    Attributes:
        spread [n]: standard deviation of the boxes' centers. radius [n]: their half-widths.
        regions, checked: how many boxes are certified, and how many of them the checker proves again.
    """

    name: str
    network: Network
    spread: Floats
    radius: Floats
    regions: int
    checked: int
    decision: str = "none"

    def boxes(self, rng: np.random.Generator) -> Regions:
        center = self.spread * rng.normal(size=(self.regions, self.network.inputs))
        axes = np.broadcast_to(np.eye(self.network.inputs), (self.regions, *[self.network.inputs] * 2))
        return Regions.from_axes(center, axes, np.broadcast_to(self.radius, center.shape))


def mlp(sizes: list[int], function: str, seed: int) -> Network:
    """Random (Glorot) weights, rounded to float32 as in a file."""
    rng = np.random.default_rng(seed)
    nodes: list[Node] = []
    for inputs, outputs in pairwise(sizes):
        weight = rng.uniform(-1, 1, (outputs, inputs)) * math.sqrt(6.0 / (inputs + outputs))
        bias = rng.uniform(-1, 1, outputs) / math.sqrt(inputs)
        if nodes:
            nodes.append(Elementwise(len(nodes), function, inputs))
        weight, bias = (k.astype(np.float32).astype(float) for k in (weight, bias))
        nodes.append(Affine((len(nodes),), (weight,), bias))
    return Network(sizes[0], tuple(nodes))


def cases(quick: bool) -> list[Case]:
    few, wide = (128, 64) if quick else (1024, 128)
    made = [
        Case("9-128-128-6 tanh", mlp([9, 128, 128, 6], "tanh", 1), np.ones(9), np.full(9, 0.15), few, 16),
        Case("17-2048-2048-6 ReLU", mlp([17, 2048, 2048, 6], "relu", 2), np.ones(17), np.full(17, 0.05), wide, 2),
        Case("4-2048-2048-1 ReLU", mlp([4, 2048, 2048, 1], "relu", 3), np.ones(4), np.full(4, 0.05), wide, 2),
    ]
    for name, file, spread, decision in (
        ("VNN-COMP cart-pole", "vnncomp_cartpole.onnx", np.array([1.0, 0.5, 0.1, 0.5]), "argmax"),
        ("ACAS Xu 1,1", "acasxu_1_1.onnx", np.full(5, 0.2), "argmin"),
    ):
        if (POLICIES / file).is_file():
            network = load_network(POLICIES / file)
            made.append(Case(name, network, spread, 0.05 * spread, few, 16, decision))
        else:
            say(f"{name}: left out, no {POLICIES / file}")
    return made


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def worst_seen(network: Network, rows: Floats, certificates: Certificates, samples: int, seed: int) -> Floats:
    """The largest |policy - expert| [E, r] found in each region, by sampling and by gradient ascent on each row."""
    rng = np.random.default_rng(seed)
    boxes = np.linalg.inv(certificates.transform)
    weight, bias = (k.astype(float) for k in (certificates.expert_weight, certificates.expert_bias))
    worst = np.zeros(bias.shape)

    def judge(index: NDArray[np.intp], xi: Floats) -> Floats:
        x = certificates.center[index] + np.einsum("nij,nj->ni", boxes[index], xi)
        error = network(x) @ rows.T - np.einsum("nri,ni->nr", weight[index], x) - bias[index]
        np.maximum.at(worst, index, np.abs(error))
        return x

    everywhere = np.repeat(np.arange(len(certificates)), samples)
    for index in np.array_split(everywhere, -(-len(everywhere) // CHUNK)):
        xi = rng.uniform(-1, 1, (len(index), network.inputs))
        corner = rng.random(len(index)) < 0.5
        xi[corner] = np.sign(xi[corner])
        judge(index, xi)
    starts = [k.ravel() for k in np.meshgrid(np.arange(len(certificates)), np.arange(len(rows)), [-1.0, 1.0])]
    for index, row, sign in zip(*(np.array_split(k, -(-len(starts[0]) // CHUNK)) for k in starts), strict=True):
        xi = rng.uniform(-1, 1, (len(index), network.inputs))
        for step in range(STEPS):
            x = judge(index, xi)
            slope = network.gradient(x, rows[row]) - weight[index, row]
            xi = np.clip(xi + sign[:, None] * np.sign(np.einsum("nij,ni->nj", boxes[index], slope)) / (step + 1), -1, 1)
        judge(index, xi)
    return worst


def formula(network: Network, rows: Floats, certificates: Certificates) -> Floats:
    """eps_fit + 2 Lambda C_E, [E, r]; for chains of functions that are nowhere steeper than 1."""
    constant = 1.0
    for index, node in enumerate(network.nodes):
        if isinstance(node, Affine):
            if node.sources != (index,):
                raise ValueError(f"node {index + 1}: the product of norms is meant for a chain")
            weight = node.weights[0]
            constant *= float(np.linalg.norm(weight, 2) if weight.ndim == 2 else np.abs(weight).max())
        elif node.function not in ("relu", "tanh"):
            raise ValueError(f"node {index + 1}: {node.function} may be steeper than 1")
    center = certificates.center
    expert = np.einsum("eri,ei->er", certificates.expert_weight.astype(float), center) + certificates.expert_bias
    fit = np.abs(network(center) @ rows.T - expert)
    # boxes along the axes: the farthest corner is at the norm of the half-widths
    radius = np.linalg.norm(np.linalg.inv(certificates.transform), axis=(1, 2))
    return np.asarray(fit + 2.0 * constant * np.linalg.norm(rows, axis=1) * radius[:, None])


def range_width(network: Network, rows: Floats, regions: Regions) -> float:
    """Mean width of the range that the affine bounds prove for the policy's own outputs."""
    bounds = affine_bounds(network, regions, rows)
    generators, _ = regions.generators()

    def ends(form: Floats, sign: float) -> Floats:
        middle = np.einsum("brn,bn->br", form[..., :-1], regions.center) + form[..., -1]
        return np.asarray(middle + sign * np.abs(form[..., :-1] @ generators).sum(axis=2))

    return float((ends(bounds.upper, 1.0) - ends(bounds.lower, -1.0)).mean())


def run(case: Case, samples: int, seed: int) -> dict[str, Any]:
    regions, rows = case.boxes(np.random.default_rng(seed)), decision_rows(case.network.outputs, case.decision)
    say(f"{case.name}: certifying {len(regions)} regions")
    certify(case.network, regions[:BATCH], case.decision)  # what is made once per policy is not counted
    parts, spent = [], []
    for k in range(0, len(regions), BATCH):
        before = time.perf_counter()
        parts.append(certify(case.network, regions[k : k + BATCH], case.decision, BATCH))
        spent.append((time.perf_counter() - before) / len(parts[-1]))
    certificates = Certificates.join(parts)
    known = np.isfinite(certificates.bound_offset).all(axis=1)
    say(f"{case.name}: checking {case.checked} of them")
    checker = Checker(case.network, case.decision)
    before = time.perf_counter()
    holds = sum(checker.verdict(certificates, k) == "holds" for k in range(case.checked))
    checked = (time.perf_counter() - before) / case.checked
    tried = certificates[known][:BATCH]
    say(f"{case.name}: attacking {len(tried)} of them")
    ratio = tried.worst / worst_seen(case.network, rows, tried, samples, seed + 1)
    return {
        "policy": case.name,
        "certify_us": round(1e6 * float(np.median(spent)), 1),
        "bound": float(certificates.worst[known].mean()),
        "formula": float(formula(case.network, rows, certificates)[known].mean()),
        "range_width": range_width(case.network, rows, regions[:BATCH]),
        "bound_over_worst_seen": float(np.median(ratio)),
        "unknown": int((~known).sum()),
        "checker_us": round(1e6 * checked, 1),
        "checked": case.checked,
        "holds": holds,
    }


def auto_lirpa(case: Case, seed: int) -> dict[str, float] | str:
    """CROWN of auto_LiRPA on the first batch of a case's boxes, float64."""
    try:
        import torch
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.perturbations import PerturbationLpNorm
    except ImportError:
        return "not installed"
    torch.set_default_dtype(torch.float64)  # its tables of tangents follow the default
    layers: list[Any] = []
    for node in case.network.nodes:
        if isinstance(node, Affine):
            layers.append(torch.nn.Linear(node.weights[0].shape[1], node.size))
            layers[-1].weight.data[:], layers[-1].bias.data[:] = map(torch.from_numpy, (node.weights[0], node.bias))
        else:
            layers.append({"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[node.function]())
    center = torch.from_numpy(case.boxes(np.random.default_rng(seed)).center[:BATCH])
    model = BoundedModule(torch.nn.Sequential(*layers), center)
    radius = torch.from_numpy(np.broadcast_to(case.radius, center.shape).copy())
    box = BoundedTensor(center, PerturbationLpNorm(x_L=center - radius, x_U=center + radius))
    spent = []
    for _ in range(20):
        before = time.perf_counter()
        low, high = model.compute_bounds(x=(box,), method="CROWN")
        spent.append((time.perf_counter() - before) / BATCH)
    return {
        "certify_us": round(1e6 * float(np.median(spent[2:])), 1),
        "range_width": float((high - low).detach().mean()),
    }


def efforts(case: Case, count: int, seed: int) -> list[dict[str, Any]]:
    """What each effort costs and how tight it is, on the first of a case's boxes."""
    rows = decision_rows(case.network.outputs, case.decision)
    regions = case.boxes(np.random.default_rng(seed))[:count]
    found = []
    for effort in ("interval", "forward", "backward", "optimised", "split:2", "split:4", "split:16"):
        say(f"{case.name}: effort {effort}")
        before = time.perf_counter()
        certificates = certify(case.network, regions, case.decision, effort=effort)
        spent = (time.perf_counter() - before) / len(regions)
        seen = worst_seen(case.network, rows, certificates, 64, seed + 1)
        found.append(
            {
                "policy": case.name,
                "effort": effort,
                "certify_us": round(1e6 * spent, 1),
                "bound": float(np.median(certificates.worst)),
                "bound_over_worst_seen": float(np.median(certificates.worst / seen)),
            }
        )
    return found


def memory(count: int) -> dict[str, float]:
    """Peak memory of certifying `count` regions of a policy of 4 million parameters, and what 100,000 would take: one
    batch does not outlive its certificates, so all that grows is the certificates, twice while they are joined."""

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0

    case = Case("17-2048-2048-6 ReLU", mlp([17, 2048, 2048, 6], "relu", 2), np.ones(17), np.full(17, 0.05), count, 0)
    regions = case.boxes(np.random.default_rng(0))
    certify(case.network, regions[:BATCH])
    one_batch = peak()
    certificates = certify(case.network, regions)
    arrays = [v for v in vars(certificates).values() if isinstance(v, np.ndarray)]
    each = (sum(a.nbytes for a in arrays) + regions.center.nbytes + regions.transform.nbytes) / count / 2**20
    return {
        "regions": count,
        "one_batch_mib": one_batch,
        "peak_mib": peak(),
        "per_certificate_mib": each,
        "at_100000_mib": one_batch + 2 * each * 100_000,
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| policy | certify, us | checker, us | bound | paper's formula | range width | bound / worst seen | holds |",
        "|" + " --- |" * 8,
    ]
    for row in result["policies"]:
        lines.append(
            f"| {row['policy']} | {row['certify_us']:.0f} | {row['checker_us']:.0f} | {row['bound']:.3g} "
            f"| {row['formula']:.3g} | {row['range_width']:.3f} | {row['bound_over_worst_seen']:.2f} "
            f"| {row['holds']} of {row['checked']} |"
        )
    other = result["auto_lirpa"]
    if isinstance(other, dict):
        other = f"{other['certify_us']:.0f} us, range width {other['range_width']:.3f}"
    lines += ["", "| policy | effort | certify, us | bound | bound / worst seen |", "|" + " --- |" * 5]
    for row in result["efforts"]:
        lines.append(
            f"| {row['policy']} | {row['effort']} | {row['certify_us']:.0f} | {row['bound']:.3g} "
            f"| {row['bound_over_worst_seen']:.2f} |"
        )
    return "\n".join([*lines, "", f"auto_LiRPA's CROWN on {result['policies'][0]['policy']}: {other}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the table goes to stderr")
    parser.add_argument("--quick", action="store_true", help="fewer regions and samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=int, metavar="N", help="only the peak memory of certifying N regions")
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(arguments.memory)))
        return
    todo = cases(arguments.quick)
    rows = [run(case, 32 if arguments.quick else 256, arguments.seed) for case in todo]
    result = {"policies": rows, "auto_lirpa": auto_lirpa(todo[0], arguments.seed)}
    result["efforts"] = [e for case in todo if case.checked > 2 for e in efforts(case, 8, arguments.seed)]
    if arguments.json:
        print(json.dumps(result))
    print(markdown(result), file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    main()
