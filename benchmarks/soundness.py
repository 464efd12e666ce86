"""Does any formal certificate break? Ten million samples and 100,000 attacks over libraries of every formal kind.

The libraries are the committed ones (models/*.laws), those named with --library, one grown here from a few episodes for
every other policy in models/ that can be certified (`laws build` makes a better one), random boxes of public
verification networks (VNN-COMP, where their files are at hand), and random networks of several activations and depths,
each certified by every formal kind that fits it. Samples are uniform or near corners; attacks climb the error by
projected gradient (collapsed experts: by random steps). Policies and experts run in ONNX Runtime, float32. The
statistical kind promises nothing about single observations, so it has no place here (`laws verify --workload` measures
it).

Work is done in rounds; the case that has had least time is next, so that fast ones get most samples and slow ones some.
After every round the counts are written to --state: an interrupted run goes on there. Exit code 1 on any violation.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from laws_ros.build import workloads
from laws_ros.build.evaluate import observed
from laws_ros.build.grow import grow
from laws_ros.build.verify import verify
from laws_ros.cli import parse_tolerance
from laws_ros.core.certificate import FORMAL, Certificates
from laws_ros.core.certify import certify
from laws_ros.core.collapse import collapse
from laws_ros.core.errors import ModelError
from laws_ros.core.library import Library
from laws_ros.core.lipschitz import certify_lipschitz, formula, global_constant, slopes
from laws_ros.core.network import Network
from laws_ros.core.point import certify_points
from laws_ros.core.region import Regions
from laws_ros.core.trie import Trie
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data" / "policies"  # absent outside the workplace
CHUNK = 20_000  # samples of a round
REGIONS = 64  # of a network that has no library
GROWN = 20_000, 300, 4_000  # of a library grown here: observations, regions and certificates tried, at most


@dataclass(frozen=True)
class Case:
    """A policy and a way to make its library."""

    name: str
    policy: Callable[[Path], Policy]
    library: Callable[[Policy, Network], Library]


def stored(path: Path, policy: Path) -> Case:
    return Case(path.name, lambda folder: Policy(policy), lambda p, n: Library.load(path))


def grown(policy: Path) -> Case:
    """A library of a policy for the workload of its card's name."""

    def library(policy: Policy, network: Network) -> Library:
        workload = workloads.get(policy.card.name)
        say(f"{policy.path.name}: growing a library")
        steps, regions, certificates = GROWN
        seen, _ = observed(policy, workload, steps, (0, 1))
        tolerance = parse_tolerance(None, policy, workload)
        x, y = np.concatenate(seen.observations), np.concatenate(seen.actions)
        return grow(policy, network, x, y, tolerance, regions, certificates).library

    return Case(f"{policy.stem}, grown here", lambda folder: Policy(policy), library)


def networks() -> Iterator[tuple[str, str, Callable[[Path], Policy], float]]:
    """Name, decision, how to open it, and the half-width of its regions."""
    for name, file, decision, radius in (
        ("VNN-COMP cart-pole", "vnncomp_cartpole.onnx", "argmax", 0.05),
        ("ACAS Xu 1,1", "acasxu_1_1.onnx", "argmin", 0.02),
    ):
        if (SHARED / file).is_file():
            yield name, decision, lambda folder, f=file, d=decision: Policy(SHARED / f, decision=d), radius
        else:
            say(f"{name}: left out, no {SHARED / file}")
    for k, (activation, sizes, gain, radius) in enumerate(
        (
            ("Relu", [4, 32, 32, 2], 1.5, 0.3),
            ("Relu", [17, 64, 64, 6], 1.0, 0.1),
            ("Relu", [3, 24, 24, 24, 24, 2], 2.0, 0.2),
            ("Tanh", [4, 32, 32, 2], 1.5, 0.3),
            ("Tanh", [9, 64, 64, 6], 1.0, 0.1),
            ("Sigmoid", [5, 32, 32, 3], 4.0, 0.2),
            ("Elu", [4, 32, 32, 2], 1.5, 0.2),
            ("Softplus", [4, 32, 2], 1.5, 0.2),
        )
    ):
        name = f"{'-'.join(map(str, sizes))} {activation.lower()}"
        yield name, "none", lambda folder, a=(activation, sizes, gain, k): random_policy(folder, *a), radius


def random_policy(folder: Path, activation: str, sizes: list[int], gain: float, seed: int) -> Policy:
    """Normal weights, as an ONNX file."""
    rng, nodes, constants, name = np.random.default_rng(seed), [], [], "observation"
    for k, (inputs, outputs) in enumerate(pairwise(sizes)):
        last = k == len(sizes) - 2
        weight, bias = gain * rng.normal(size=(outputs, inputs)) / np.sqrt(inputs), 0.3 * rng.normal(size=outputs)
        constants += [numpy_helper.from_array(v.astype(np.float32), f"{n}{k}") for n, v in (("w", weight), ("b", bias))]
        out = "action" if last else f"z{k}"
        nodes.append(helper.make_node("Gemm", [name, f"w{k}", f"b{k}"], [out], transB=1))
        if not last:
            nodes.append(helper.make_node(activation, [out], [f"a{k}"]))
        name = f"a{k}"
    ends = (("observation", sizes[0]), ("action", sizes[-1]))
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", size]) for n, size in ends]
    graph = helper.make_graph(nodes, "policy", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path = folder / f"{seed}-{activation}.onnx"
    onnx.save(model, str(path))
    return Policy(path)


def boxes(network: Network, radius: float, seed: int) -> Regions:
    """Boxes in random axes, some flat in some."""
    rng, n = np.random.default_rng(seed), network.inputs
    axes, _ = np.linalg.qr(rng.normal(size=(REGIONS, n, n)))
    widths = radius * rng.uniform(0.1, 1.0, (REGIONS, n)) * (rng.random((REGIONS, n)) > 0.05)
    return Regions.from_axes(0.5 * rng.normal(size=(REGIONS, n)), axes, widths)


def made(kind: str, decision: str, radius: float, seed: int) -> Callable[[Policy, Network], Library]:
    def library(policy: Policy, network: Network) -> Library:
        regions = boxes(network, radius, seed)
        if kind == "linear":
            found = certify(network, regions, decision)
        elif kind == "lipschitz":
            found = certify_lipschitz(network, regions, policy.batch, decision).certificates
        elif kind == "point":
            x = regions.center.astype(np.float32)
            found = certify_points(network, x, policy.batch(x), decision)
        else:
            found = collapse(network, regions, kind, np.full(network.outputs, 0.05))
        known: Certificates = found[np.isfinite(found.bound_offset).all(axis=1)]
        visits = np.zeros(len(known), np.int64)
        return Library(policy.sha256, policy.card, np.zeros(network.outputs), known, Trie.root(), visits)

    return library


def cases(libraries: list[tuple[Path, Path]]) -> list[Case]:
    libraries = [(path, path.with_suffix(".onnx")) for path in sorted((ROOT / "models").glob("*.laws"))] + libraries
    found = [stored(*pair) for pair in libraries]
    for path in sorted((ROOT / "models").glob("*.onnx")):
        if path.resolve() not in [known.resolve() for _, known in libraries]:
            try:
                load_network(path)
            except ModelError as error:
                say(f"{path.name}: left out, nothing can be proved about it ({error})")
            else:
                found.append(grown(path))
    for seed, (name, decision, policy, radius) in enumerate(networks()):
        for kind in FORMAL:
            if decision == "none" or kind not in ("exact", "mixed"):
                found.append(Case(f"{name}, {kind}", policy, made(kind, decision, radius, seed)))
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(todo: list[Case], samples: int, attacks: int, state: Path | None) -> list[dict[str, Any]]:
    """Rounds until all cases together have had so many samples and attacks."""
    rows: dict[str, dict[str, Any]] = {}
    if state is not None and state.is_file():
        rows = json.loads(state.read_text())
        say(f"{state}: going on after {sum(r['samples'] for r in rows.values())} samples")
    with tempfile.TemporaryDirectory() as folder:
        ready = []
        for case in todo:
            policy = case.policy(Path(folder))
            network = load_network(policy.path)
            library = case.library(policy, network)
            if not len(library):
                say(f"{case.name}: nothing could be certified")
                continue
            row = rows.setdefault(case.name, {"library": library.digest, "rounds": 0, "seconds": 0.0, "tightest": None})
            if row["library"] != library.digest:
                raise SystemExit(f"{state}: {case.name} is another library by now; delete the file to start again")
            for key in ("samples", "attacks", "violations"):
                row.setdefault(key, 0)
            row["certificates"] = len(library)
            ready.append((row, case, policy, network, library))
        shown = time.monotonic()
        while (lacking := sum(r["samples"] for r in rows.values()) < samples) or sum(
            r["attacks"] for r in rows.values()
        ) < attacks:
            row, case, policy, network, library = min(ready, key=lambda entry: entry[0]["seconds"])
            before = time.monotonic()
            found = verify(
                library, policy, network, CHUNK if lacking else 0, True, seed=row["rounds"] + 1, recheck=False
            )
            row["seconds"] += time.monotonic() - before
            row["rounds"] += 1
            for key in ("samples", "attacks", "violations"):
                row[key] += getattr(found, key)
            seen = found.ratio[~np.isnan(found.ratio)]
            if len(seen):
                row["tightest"] = min(k for k in (float(seen.min()), row["tightest"]) if k is not None)
            if found.first:
                say(f"{case.name}: {found.first}")
            if state is not None:
                state.write_text(json.dumps(rows))
            if time.monotonic() - shown > 5:
                shown = time.monotonic()
                total = {k: sum(r[k] for r in rows.values()) for k in ("samples", "attacks", "violations")}
                say(f"{total['samples']} samples, {total['attacks']} attacks, {total['violations']} violations")
    return [{"case": case.name, **row} for row, case, *_ in ready]


def formula_table() -> str:
    """Median bounds of the kinds linear and lipschitz, and of the paper's formula with local and global constants."""
    lines = ["| regions | linear | lipschitz | formula, local | formula, global | eps_fit |", "|" + " --- |" * 6]
    with tempfile.TemporaryDirectory() as folder:
        for seed, (name, decision, open_policy, radius) in enumerate(networks()):
            policy = open_policy(Path(folder))
            network = load_network(policy.path)
            for scale in (1.0, 0.25):
                regions = boxes(network, scale * radius, seed)
                linear = certify(network, regions, decision).worst
                found = certify_lipschitz(network, regions, policy.batch, decision)
                own, fit = found.certificates.worst, found.eps_fit
                local = np.einsum("brn,bn->br", slopes(network, regions, decision).local, found.covering)
                everywhere = global_constant(network, regions, decision)
                values = (
                    *(linear, own, formula(fit, local, np.ones(1))),
                    *(formula(fit, everywhere, np.linalg.norm(found.covering, axis=1)[:, None]), fit),
                )
                known = np.isfinite(linear + own).all(axis=1)
                medians = " | ".join(f"{np.median(v[known]):.3g}" for v in values)
                lines.append(f"| {name}, half-width {scale * radius:g} | {medians} |")
    return "\n".join(lines)


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| library | certificates | samples | attacks | violations | smallest bound / worst error seen |",
        "|" + " --- |" * 6,
    ]
    total = {"case": "all", "tightest": min((r["tightest"] for r in rows if r["tightest"] is not None), default=None)}
    total |= {k: sum(r[k] for r in rows) for k in ("certificates", "samples", "attacks", "violations")}
    for row in [*rows, total]:
        lines.append(
            f"| {row['case']} | {row['certificates']} | {row['samples']} | {row['attacks']} | {row['violations']} "
            f"| {'no error seen' if row['tightest'] is None else format(row['tightest'], '.3f')} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the table goes to stderr")
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--attacks", type=int, default=100_000)
    parser.add_argument(
        "--library", nargs=2, type=Path, action="append", default=[], metavar=("LIB", "POLICY"), help="one more library"
    )
    parser.add_argument("--state", type=Path, help="file of counts; an interrupted run goes on there")
    parser.add_argument(
        "--formula", action="store_true", help="instead: what the paper's formula certifies, beside ours"
    )
    arguments = parser.parse_args()
    if arguments.formula:
        print(formula_table())
        return 0
    todo = cases([(path, policy) for path, policy in arguments.library])
    rows = run(todo, arguments.samples, arguments.attacks, arguments.state)
    if arguments.json:
        print(json.dumps({"cases": rows}))
    print(markdown(rows), file=sys.stderr if arguments.json else sys.stdout)
    return 1 if any(row["violations"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
