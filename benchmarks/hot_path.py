"""What a hit costs: from an observation to a certified action, in process, on one core.

The library is synthetic but true: 10,000 certified regions of a 17-32-6 ReLU policy. Beside the whole hit stand the
router alone and the raw ONNX Runtime call that no hit can be faster than, measured alternately in the same run. "hot"
is a tight loop over observations in random regions; "cold" sweeps the caches before every call, as other work does
between two steps of a real control loop. Routing time against the library's size uses regions of 4 observations, so
that a million of them fit into memory.

    python benchmarks/hot_path.py --plot docs/hot-path.png
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.card import Card
from laws_ros.core.certificate import Certificates
from laws_ros.core.certify import certify
from laws_ros.core.library import Library
from laws_ros.core.region import Regions
from laws_ros.core.trie import Splitter, Trie
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.experts import experts_model
from laws_ros.runtime.files import sha256_file
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import session
from laws_ros.runtime.routing import Router

Floats = NDArray[np.float64]

OBSERVATIONS, HIDDEN, ACTIONS = 17, 32, 6
RADIUS = 0.02  # half-width of a region, where observations are spread with standard deviation 1
SWEEP_BYTES = 64 * 2**20  # twice the largest last-level cache of a small robot computer or server
SMALL = 4  # observations of the libraries that routing time is measured on against size


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def median_trie(x: Floats, most: int = 1) -> Trie:
    """Median splits along the widest axis, until at most `most` of the points x [N, n] are left in a leaf."""
    splitter = Splitter()
    stack = [(0, np.arange(len(x)))]
    while stack:
        node, here = stack.pop()
        if len(here) <= most:
            continue
        axis = int(np.ptp(x[here], axis=0).argmax())
        order = here[x[here, axis].argsort()]
        half = len(here) // 2
        threshold = 0.5 * (x[order[half - 1], axis] + x[order[half], axis])
        low, high = splitter.split(node, axis, float(threshold))
        stack += [(low, order[:half]), (high, order[half:])]
    return splitter.trie()


def inside(rng: np.random.Generator, certificates: Certificates, count: int) -> NDArray[np.float32]:
    """[count, n] observations in random regions."""
    index = rng.integers(len(certificates), size=count)
    xi = rng.uniform(-0.9, 0.9, certificates.center[index].shape)
    axes = np.linalg.inv(certificates.transform[index])
    return (certificates.center[index] + np.einsum("nij,nj->ni", axes, xi)).astype(np.float32)


def save_policy(path: Path, rng: np.random.Generator) -> None:
    """A random ReLU policy."""
    constants = {
        "w0": rng.normal(size=(OBSERVATIONS, HIDDEN)) / math.sqrt(OBSERVATIONS),
        "b0": 0.3 * rng.normal(size=HIDDEN),
        "w1": rng.normal(size=(HIDDEN, ACTIONS)) / math.sqrt(HIDDEN),
        "b1": 0.3 * rng.normal(size=ACTIONS),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["observation", "w0", "b0"], ["z"]),
            helper.make_node("Relu", ["z"], ["a"]),
            helper.make_node("Gemm", ["a", "w1", "b1"], ["action"]),
        ],
        "policy",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", OBSERVATIONS])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", ACTIONS])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))


def make_library(path: Path, policy_path: Path, count: int, rng: np.random.Generator) -> None:
    """Certify `count` boxes in random axes and save them under a trie of median splits."""
    axes = np.linalg.qr(rng.normal(size=(count, OBSERVATIONS, OBSERVATIONS)))[0]
    widths = RADIUS * rng.uniform(0.3, 1.0, (count, OBSERVATIONS))
    regions = Regions.from_axes(rng.normal(size=(count, OBSERVATIONS)), axes, widths)
    certificates = certify(load_network(policy_path), regions)
    tolerance = np.full(ACTIONS, certificates.worst.max())
    card = Card.plain("policy", OBSERVATIONS, ACTIONS)
    library = Library(sha256_file(policy_path), card, tolerance, certificates, Trie.root(), np.ones(count, np.int64))
    library.indexed(median_trie(certificates.center)).save(path)


class Raw:
    """ONNX Runtime with IO binding on a library's experts model, and nothing around it."""

    def __init__(self, certificates: Certificates) -> None:
        rows, inputs = certificates.expert_weight.shape[1:]
        self.session = session(experts_model(certificates).SerializeToString(), "experts")
        self.index, self.action = np.zeros(1, np.int64), np.zeros((1, rows, 1), np.float32)
        self.observation = np.ones((1, inputs + 1, 1), np.float32)
        self.binding = self.session.io_binding()
        for name, array in (("index", self.index), ("observation", self.observation)):
            self.binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        self.binding.bind_output("action", "cpu", 0, np.float32, self.action.shape, self.action.ctypes.data)

    def __call__(self, _: NDArray[np.float32]) -> None:
        self.session.run_with_iobinding(self.binding)


def quantiles(nanoseconds: list[int]) -> dict[str, float]:
    p50, p99 = np.percentile(nanoseconds, [50, 99]) / 1000.0
    return {"p50_us": round(float(p50), 3), "p99_us": round(float(p99), 3)}


def measure(cached: CachedPolicy, calls: int, cold_calls: int, rng: np.random.Generator) -> dict[str, Any]:
    """Hit, router and raw call, in turns; `hot` and `cold`."""
    certificates = cached.library.certificates
    raw = Raw(certificates)
    queries = [x for x in inside(rng, certificates, 4096) if cached.lookup(x) is not None]
    experts = rng.integers(len(certificates), size=len(queries)).tolist()
    clock = time.perf_counter_ns
    result: dict[str, Any] = {"hits_of_4096_queries": len(queries)}
    sweep = np.zeros(SWEEP_BYTES // 8)
    for query in queries:  # so that whatever is made once is there
        cached.lookup(query)
    gc.collect()
    blocks, resident = sys.getallocatedblocks(), resident_mb()
    for k in range(calls):
        cached.lookup(queries[k % len(queries)])
    result["grown"] = {
        "calls": calls,
        "python_blocks": sys.getallocatedblocks() - blocks,
        "resident_mb": round(resident_mb() - resident, 2),
    }
    for name, count, block in (("hot", calls, 1000), ("cold", cold_calls, 1)):
        say(f"{name}: {count} calls of each")
        spent: dict[str, list[int]] = {"hit": [], "router": [], "onnxruntime": []}
        for start in range(0, count, block):
            for what, call in (("hit", cached.lookup), ("router", cached.router), ("onnxruntime", raw)):
                for k in range(start, start + block):
                    query, raw.index[0] = queries[k % len(queries)], experts[k % len(queries)]
                    if name == "cold":
                        sweep += 1.0
                    before = clock()
                    call(query)
                    spent[what].append(clock() - before)
        found = {what: quantiles(values) for what, values in spent.items()}
        found["allowed"] = {key: round(2 * value + 4, 3) for key, value in found["onnxruntime"].items()}
        result[name] = found
    result["clock_us"] = quantiles([-clock() + clock() for _ in range(10_000)])["p50_us"]  # is in all of the above
    return result


def resident_mb() -> float:
    """Memory of this process that is in RAM, mapped snapshots included; NaN where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text().split()
    except OSError:
        return math.nan
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def tables_mb(cached: CachedPolicy) -> dict[str, float]:
    """What a hit reads: the router's arrays (most of them the library's own) and the experts' weights."""
    certificates = cached.library.certificates
    router = sum(a.nbytes for a in cached.router.tables)
    experts = certificates.expert_weight.nbytes + certificates.expert_bias.nbytes
    return {"router_mb": round(router / 2**20, 1), "experts_mb": round(experts / 2**20, 1)}


def routing_against_size(sizes: list[int], seed: int) -> list[dict[str, float]]:
    """Mean time of a routed observation in libraries of more and more regions (no Python in between)."""
    rows = []
    for count in sizes:
        say(f"routing among {count} regions")
        rng = np.random.default_rng(seed)
        center = rng.normal(size=(count, SMALL))
        half = 0.1 * count ** (-1.0 / SMALL)  # of the spacing of neighbours
        # y = sum(x) is its own affine expert everywhere, so any small bound is true
        certificates = Certificates(
            center=center,
            transform=np.broadcast_to(np.eye(SMALL) / half, (count, SMALL, SMALL)),
            expert_weight=np.ones((count, 1, SMALL), np.float32),
            expert_bias=np.zeros((count, 1), np.float32),
            bound_weight=np.zeros((count, 1, SMALL)),
            bound_offset=np.full((count, 1), 1e-5),
        )
        trie = median_trie(center).with_regions(certificates.regions, np.arange(count))
        library = Library("", Card.plain("sum", SMALL, 1), np.ones(1), certificates, trie, np.zeros(count, int))
        router = Router(library, library.tolerance)
        queries = inside(rng, certificates, 100_000)
        router.many(queries[:1])  # compiles
        few = queries[:500]
        listed = np.diff(trie.first)[[trie.leaf(x) for x in few]]
        rows.append(
            {
                "regions": count,
                "questions": round(float(np.mean([len(trie.key(x)) for x in few])), 1),
                "listed": round(float(listed.mean()), 1),
                "few_us": round(per_query(router, np.tile(few[:50], (len(queries) // 50, 1))), 3),
                "random_us": round(per_query(router, queries), 3),
            }
        )
    return rows


def per_query(router: Router, queries: NDArray[np.float32]) -> float:
    """Microseconds of CPU time (other jobs' turns are not ours), the best of five runs."""
    best = math.inf
    for _ in range(5):
        before = time.process_time()
        found = router.many(queries)
        best = min(best, (time.process_time() - before) / len(queries) * 1e6)
        if not (found >= 0).all():
            raise AssertionError("an observation inside a region was not answered")
    return best


def plot(rows: list[dict[str, float]], path: str) -> None:
    """Routing time against the logarithm of the library's size."""
    import matplotlib.pyplot as plt

    regions = [row["regions"] for row in rows]
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.semilogx(regions, [row["few_us"] for row in rows], "o-", label="50 observations over and over")
    axes.semilogx(regions, [row["random_us"] for row in rows], "s--", label="random observations: caches miss")
    axes.set(xlabel="regions in the library", ylabel="routing an observation, us", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    say(f"drew {path}")


def markdown(result: dict[str, Any]) -> str:
    what = ("hit", "allowed", "router", "onnxruntime")
    lines = ["| us | hit p50 | p99 | 2 x ONNX Runtime + 4, p50 | p99 | router p50 | p99 | ONNX Runtime p50 | p99 |"]
    lines.append("|" + " --- |" * 9)
    for name in ("hot", "cold"):
        cells = [f"{result[name][k][q]:.2f}" for k in what for q in ("p50_us", "p99_us")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    grown = result["grown"]
    lines += ["", "{calls} hits left {python_blocks} Python blocks and {resident_mb} MB behind".format(**grown)]
    lines += ["", "| regions | questions | listed at the leaf | us, 50 queries over and over | us, random queries |"]
    lines.append("|" + " --- |" * 5)
    lines += ["| " + " | ".join(str(v) for v in row.values()) + " |" for row in result["routing"]]
    memory = ", ".join(f"{k} {v}" for k, v in result["memory"].items())
    shape = f"{result['regions']} regions, {OBSERVATIONS} observations, {ACTIONS} actions"
    return "\n".join([f"{shape}; {memory}", "", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout; the tables go to stderr")
    parser.add_argument("--quick", action="store_true", help="1,000 regions, few calls, no library of a million")
    parser.add_argument("--plot", help="draw routing time against the library's size to this file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    count = 1000 if arguments.quick else 10_000
    with tempfile.TemporaryDirectory() as folder:
        policy_path, library_path = Path(folder) / "policy.onnx", Path(folder) / "library.laws"
        save_policy(policy_path, rng)
        make_library(library_path, policy_path, 10, rng)
        CachedPolicy.open(library_path, policy_path)  # so that code and runtimes are loaded before memory is measured
        say(f"certifying {count} regions")
        make_library(library_path, policy_path, count, rng)
        gc.collect()
        before = resident_mb()
        cached = CachedPolicy.open(library_path, policy_path)
    gc.collect()
    memory = {**tables_mb(cached), "resident_mb": round(resident_mb() - before, 1)}
    trie = cached.library.trie
    calls, cold_calls = (5000, 100) if arguments.quick else (100_000, 1000)
    sizes = [10**k for k in range(2, 6 if arguments.quick else 7)]
    result = {
        "regions": count,
        "listed_per_leaf": round(len(trie.members) / trie.leaves, 2),
        "memory": memory,
        **measure(cached, calls, cold_calls, rng),
        "routing": routing_against_size(sizes, arguments.seed),
    }
    if arguments.plot:
        plot(result["routing"], arguments.plot)
    if arguments.json:
        print(json.dumps(result))
    print(markdown(result), file=sys.stderr if arguments.json else sys.stdout)


if __name__ == "__main__":
    main()
