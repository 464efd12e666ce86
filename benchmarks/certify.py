"""What a certificate costs and how tight it is, beside the alternatives on the same regions.

Per policy: microseconds per region of `certify` (fit and proof) and of the independent checker; the mean certified
bound; the width of the policy's proven output range; the certified bound over the worst error that sampling and
gradient ascent find (how loose it is, at least 1); and what the formula of the paper (arXiv:2604.06228) would certify,
eps_fit + 2 Lambda C_E, with Lambda the product of the layers' spectral norms, eps_fit the expert's error at the
region's center, and C_E the distance from there to the farthest corner.

Of libraries (models/*.laws, or those named with --library): the looseness of their certificates as they are, and of
the same regions certified with other efforts. A region's bound is that of its row with the largest one, in tolerances,
and so is its worst error.

Where auto_LiRPA can be imported (pip install auto_LiRPA, or its folder on PYTHONPATH), its CROWN bounds the first
policy's boxes, too: in turn with `certify` and with its bounds alone, on as many threads, so that their ratio means
something on a busy machine, by wall and by CPU time. OMP_NUM_THREADS=1 measures one thread.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # cores get batches of their own

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.bounds import affine_bounds
from laws_ros.core.certificate import Certificates, decision_rows, limited
from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.library import Library
from laws_ros.core.lipschitz import global_constant
from laws_ros.core.network import Affine, Elementwise, Network, Node
from laws_ros.core.region import Regions, clamped, scattered
from laws_ros.runtime.onnx_graph import load_network

Floats = NDArray[np.float64]

BATCH = 64
POLICIES = Path(__file__).resolve().parents[2] / "shared" / "data" / "policies"  # absent outside the workplace
CHUNK = 2048  # observations of one forward or backward pass through a policy
STEPS, JUMPS = 10, (0, 4, 4)  # of gradient ascent: steps, and how many of them, of each start, lead to the edge
MODELS = Path(__file__).resolve().parents[1] / "models"
THREADS = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
TURNS, ON_END = 24, 4  # of auto_LiRPA and `certify`: turns, batches in a turn
BATCHES = (64, 128, 200, 256, 400)  # and their sizes


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


def worst_seen(
    network: Network, rows: Floats, certificates: Certificates, samples: int, seed: int, limits: Floats | None = None
) -> Floats:
    """The largest |policy - expert| [E, r] found in each region, by sampling and by gradient ascent on each row.

    Args:
        limits: [2, m] to which both are cut first; the ascent does not see them.
    """
    rng = np.random.default_rng(seed)
    boxes, ball = np.linalg.inv(certificates.transform), certificates.regions.ball
    weight, bias = (k.astype(float) for k in (certificates.expert_weight, certificates.expert_bias))
    worst = np.zeros(bias.shape)

    def judge(index: NDArray[np.intp], xi: Floats) -> Floats:
        x = certificates.center[index] + np.einsum("nij,nj->ni", boxes[index], xi)
        policy, expert = network(x) @ rows.T, np.einsum("nri,ni->nr", weight[index], x) + bias[index]
        if limits is not None:
            policy, expert = np.clip(policy, *limits), np.clip(expert, *limits)
        np.maximum.at(worst, index, np.abs(policy - expert))
        return x

    everywhere = np.repeat(np.arange(len(certificates)), samples)
    for index in np.array_split(everywhere, -(-len(everywhere) // CHUNK)):
        judge(index, scattered(rng, ball[index], 0.5))
    starts = [k.ravel() for k in np.meshgrid(np.arange(len(certificates)), np.arange(len(rows)), [-1.0, 1.0])]
    batches = list(zip(*(np.array_split(k, -(-len(starts[0]) // CHUNK)) for k in starts), strict=True))
    for jumps, (index, row, sign) in product(JUMPS, batches):
        xi = scattered(rng, ball[index])
        for step in range(STEPS):
            x = judge(index, xi)
            steepest = sign[:, None] * (network.gradient(x, rows[row]) - weight[index, row])
            slope = np.einsum("nij,ni->nj", boxes[index], steepest)
            size = np.sqrt(np.where(ball[index], slope * slope, 0.0).sum(axis=1, keepdims=True))
            along = np.where(ball[index], slope / np.maximum(size, 1e-300), np.sign(slope))
            # errors tend to be largest at edges: there, where it is farthest along the gradient
            xi = along if step < jumps else clamped(xi + along / (step - jumps + 1), ball[index])
        judge(index, xi)
    return worst


def formula(network: Network, rows: Floats, certificates: Certificates, decision: str) -> Floats:
    """eps_fit + 2 Lambda C_E, [E, r]."""
    n, center = network.inputs, certificates.center
    constant = global_constant(network, Regions(center[:1], np.eye(n)[None]), decision)
    expert = np.einsum("eri,ei->er", certificates.expert_weight.astype(float), center) + certificates.expert_bias
    fit = np.abs(network(center) @ rows.T - expert)
    # the axes are orthogonal: the farthest point is a corner of the box, at the end of the ball's longest axis
    half, ball = np.linalg.norm(np.linalg.inv(certificates.transform), axis=1), certificates.regions.ball
    radius = np.hypot(np.linalg.norm(np.where(ball, 0.0, half), axis=1), np.where(ball, half, 0.0).max(axis=1))
    return np.asarray(fit + 2.0 * constant * radius[:, None])


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
    for k in range(0, len(regions), BATCH * THREADS):
        before = time.perf_counter()
        parts.append(certify(case.network, regions[k : k + BATCH * THREADS], case.decision, BATCH, threads=THREADS))
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
        "formula": float(formula(case.network, rows, certificates, case.decision)[known].mean()),
        "range_width": range_width(case.network, rows, regions[:BATCH]),
        "bound_over_worst_seen": float(np.median(ratio)),
        "unknown": int((~known).sum()),
        "checker_us": round(1e6 * checked, 1),
        "checked": case.checked,
        "holds": holds,
    }


def _bounds(network: Network, regions: Regions, rows: Floats, batch: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        parts = [regions[k : k + batch] for k in range(0, len(regions), batch)]
        list(pool.map(lambda part: affine_bounds(network, part, rows), parts))


def _on_end(tool: Callable[[], Any]) -> list[Any]:
    return [tool() for _ in range(ON_END)]


def auto_lirpa(case: Case, seed: int) -> dict[str, float] | str:
    """CROWN of auto_LiRPA on a case's first boxes, float64, in turn with `certify` and `affine_bounds` on the same
    boxes; each in its best one of several sizes of a batch, of which a few are computed on end. Torch uses its threads
    within a batch, `certify` one for each."""
    try:
        import torch
        from auto_LiRPA import BoundedModule, BoundedTensor
        from auto_LiRPA.perturbations import PerturbationLpNorm
    except ImportError as error:
        return f"not measured: {error}"
    torch.set_num_threads(THREADS)
    torch.set_default_dtype(torch.float64)  # its tables of tangents follow the default
    layers: list[Any] = []
    for node in case.network.nodes:
        if isinstance(node, Affine):
            layers.append(torch.nn.Linear(node.weights[0].shape[1], node.size))
            layers[-1].weight.data[:], layers[-1].bias.data[:] = map(torch.from_numpy, (node.weights[0], node.bias))
        elif isinstance(node, Elementwise):
            layers.append({"tanh": torch.nn.Tanh, "relu": torch.nn.ReLU}[node.function]())
    boxes, sequential = case.boxes(np.random.default_rng(seed)), torch.nn.Sequential(*layers)
    rows = decision_rows(case.network.outputs, case.decision)
    spent: dict[str, list[Floats]] = {}  # per tool and size of a batch, us a region: of wall and of CPU time
    for count in BATCHES:
        regions = boxes[:count]
        center = torch.from_numpy(regions.center)
        model = BoundedModule(sequential, center)
        radius = torch.from_numpy(np.broadcast_to(case.radius, center.shape).copy())
        box = BoundedTensor(center, PerturbationLpNorm(x_L=center - radius, x_U=center + radius))
        crown = partial(model.compute_bounds, x=(box,), method="CROWN")
        many = regions[np.tile(np.arange(count), ON_END * THREADS)]
        tools: dict[str, Callable[[], Any]] = {
            "theirs": partial(_on_end, crown),
            "ours": partial(certify, case.network, many, case.decision, count, threads=THREADS),
            "bounds": partial(_bounds, case.network, many, rows, count),
        }
        sizes = {"theirs": ON_END * count, "ours": len(many), "bounds": len(many)}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in tools}
        for _ in range(TURNS):
            for name, tool in tools.items():
                wall, cpu = time.perf_counter(), time.process_time()
                tool()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        for name in tools:
            spent.setdefault(name, []).append(1e6 * np.array(times[name]).T / sizes[name])
    least, median, cpu_least = (
        {k: float(min(of(t[clock]) for t in v)) for k, v in spent.items()}
        for of, clock in ((np.min, 0), (np.median, 0), (np.min, 1))
    )
    low, high = tools["theirs"]()[-1]
    return {
        "threads": THREADS,
        **{f"{name}_us": value for name, value in least.items()},
        **{f"{name}_median_us": value for name, value in median.items()},
        **{f"{name}_cpu_us": value for name, value in cpu_least.items()},
        "cpu_ratio": cpu_least["theirs"] / cpu_least["ours"],
        "ratio": least["theirs"] / least["ours"],
        "ratio_of_medians": median["theirs"] / median["ours"],
        "bounds_ratio": least["theirs"] / least["bounds"],
        "bounds_ratio_of_medians": median["theirs"] / median["bounds"],
        "their_width": float((high - low).detach().mean()),
        "our_width": range_width(case.network, rows, regions),
    }


def library(path: Path, policy: Path, efforts: list[str], count: int, seed: int) -> list[dict[str, Any]]:
    """How loose a library's affine certificates are, as they are and by other efforts, on up to `count` of them."""
    found = Library.load(path)
    network, decision = load_network(policy), found.card.decision
    rows = decision_rows(network.outputs, decision)
    affine = np.flatnonzero(found.certificates.among(["linear"]))
    certificates = found.certificates[affine[:: -(-len(affine) // count)]]
    tolerance = found.tolerance if decision == "none" else np.ones(len(rows))
    limits = found.card.limits.astype(float) if limited(certificates).any() else None
    before = network.unlimited(*limits) if limits is not None else None
    free = before[0] if before else network  # certificates about delivered actions know the policy before its clip
    result = []
    for effort in [f"as built ({found.notes.get('effort', 'backward')})", *efforts]:
        say(f"{path.name}: {len(certificates)} of {len(affine)} regions, {effort}")
        start = time.perf_counter()
        if effort in efforts:
            cut = None if limits is None else found.card.limits
            certificates = certify(network, certificates.regions, decision, BATCH, effort, limits=cut)
        spent = (time.perf_counter() - start) / len(certificates)
        seen = worst_seen(free, rows, certificates, 64, seed, limits)
        bound = (certificates.worst / tolerance).max(axis=1)
        result.append(
            {
                "library": path.name,
                "regions": len(certificates),
                "effort": effort,
                "certify_us": round(1e6 * spent, 1) if effort in efforts else None,
                "bound": float(np.median(bound)),
                "formula": float(np.median((formula(free, rows, certificates, decision) / tolerance).max(axis=1))),
                "bound_over_worst_seen": float(np.median(bound / (seen / tolerance).max(axis=1))),
            }
        )
    return result


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


def memory(count: int) -> dict[str, Any]:
    """Peak memory while `count` regions of a policy of 4 million parameters are certified, and kept.

    Returns:
        peak_mib: after one batch, and after each quarter; growth_kib: of a region after the first quarter, of which
        certificate_kib are the certificate itself; at_100000_mib: what that makes of 100,000 regions, of which the join
        into one library takes a second copy.
    """

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0

    case = Case("17-2048-2048-6 ReLU", mlp([17, 2048, 2048, 6], "relu", 2), np.ones(17), np.full(17, 0.05), count, 0)
    regions, kept = case.boxes(np.random.default_rng(0)), []
    certify(case.network, regions[: 2 * BATCH])
    peaks = [peak()]
    for part in np.array_split(np.arange(count), 4):
        kept.append(certify(case.network, regions[part]))
        peaks.append(peak())
        say(f"{part[-1] + 1} of {count} regions, peak {peaks[-1]:.0f} MiB")
    arrays = [v for k in kept for v in vars(k).values() if isinstance(v, np.ndarray)]
    each = sum(a.nbytes for a in arrays) / count / 1024.0
    growth = 1024.0 * (peaks[-1] - peaks[1]) / (0.75 * count)
    return {
        "regions": count,
        "peak_mib": [round(k, 1) for k in peaks],
        "growth_kib": growth,
        "certificate_kib": each,
        "at_100000_mib": peaks[-1] + (max(growth, each) * (100_000 - count) + each * 100_000) / 1024.0,
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
    lines += [
        "",
        "| library | regions | effort | certify, us | bound, tolerances | paper's formula | bound / worst seen |",
        "|" + " --- |" * 7,
    ]
    for row in result["libraries"]:
        lines.append(
            f"| {row['library']} | {row['regions']} | {row['effort']} | {row['certify_us'] or '-'} "
            f"| {row['bound']:.3g} | {row['formula']:.3g} | {row['bound_over_worst_seen']:.2f} |"
        )
    other = result["auto_lirpa"]
    if isinstance(other, dict):
        other = (
            "{theirs_us:.0f} us a region (median {theirs_median_us:.0f}); `certify` {ours_us:.0f} "
            "({ours_median_us:.0f}), {ratio:.1f} times as fast (medians: {ratio_of_medians:.1f}); its bounds alone "
            "{bounds_us:.0f} ({bounds_median_us:.0f}), {bounds_ratio:.1f} times ({bounds_ratio_of_medians:.1f}); "
            "CPU time {theirs_cpu_us:.0f} and {ours_cpu_us:.0f}, {cpu_ratio:.1f} times; "
            "threads: {threads}; range width {their_width:.5f}, ours {our_width:.5f}"
        ).format(**other)
    lines += ["", "| policy | effort | certify, us | bound | bound / worst seen |", "|" + " --- |" * 5]
    for row in result["efforts"]:
        lines.append(
            f"| {row['policy']} | {row['effort']} | {row['certify_us']:.0f} | {row['bound']:.3g} "
            f"| {row['bound_over_worst_seen']:.2f} |"
        )
    return "\n".join([*lines, "", f"auto_LiRPA's CROWN on the first policy: {other}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the table goes to stderr")
    parser.add_argument("--quick", action="store_true", help="fewer regions and samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--library",
        nargs=2,
        type=Path,
        action="append",
        metavar=("LIB", "POLICY"),
        help="only how loose this library is (default: all measurements, with the libraries in models/)",
    )
    parser.add_argument("--regions", type=int, default=128, help="of each library, at most (default 128)")
    parser.add_argument("--memory", type=int, metavar="N", help="only the peak memory of certifying N regions")
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(memory(arguments.memory)))
        return
    shipped = [(path, path.with_suffix(".onnx")) for path in sorted(MODELS.glob("*.laws"))]
    todo = [] if arguments.library else cases(arguments.quick)
    rows = [run(case, 32 if arguments.quick else 256, arguments.seed) for case in todo]
    result = {"policies": rows, "auto_lirpa": auto_lirpa(todo[0], arguments.seed) if todo else "not measured"}
    result["efforts"] = [e for case in todo if case.checked > 2 for e in efforts(case, 8, arguments.seed)]
    result["libraries"] = [
        row
        for path, policy in arguments.library or shipped
        for row in library(path, policy, ["backward", "split:4"], arguments.regions, arguments.seed + 1)
    ]
    if arguments.json:
        print(json.dumps(result))
    print(markdown(result), file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    main()
