"""`laws bench`: LAWS and the alternatives on one workload, one policy, the same episodes, in one run on one machine.

Everything learns from the same observations; knobs are set on tuning episodes (build.baselines says by what rule); the
table is measured on held-out ones. Every method drives the same seeded episodes, one episode after the other by turns,
so that a machine's moods meet all of them. After that each of their actions is compared with the policy's at the very
observation.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros.core.certificate import FORMAL
from laws_ros.core.errors import ConfigError, ModelError, WorkloadError
from laws_ros.core.library import Library
from laws_ros.core.network import Network
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy

from . import baselines
from .baselines import Case, Method
from .evaluate import observed
from .grow import grow
from .statistical import grow_statistical, trial
from .svg import Axis, Chart, number
from .workloads import Workload, episode_seed

# name on the command line -> what it is called in the table
METHODS = {
    "policy": "full policy",
    "cache": "exact cache",
    "nearest": "nearest neighbour",
    "student": "distilled student",
    "mixture": "mixture of experts",
    "router": "learned router",
    "formula": "formula, global constant",
    "formal": "LAWS, formal",
    "statistical": "LAWS, statistical",
}
WARM_UP = 20  # calls of every method before any is timed
GAP = 1_000_003  # between the seeds of training, tuning, trial and held-out episodes
EQUAL = 1.1  # mean steps that differ by less are equally fast
FLOOR = 0.05  # of a tolerance: smaller errors are drawn there


@dataclass(frozen=True)
class Row:
    """One method on the held-out episodes.

    Attributes:
        step_us: one whole control step, the policy's share in it included: mean, p50, p99.
        worst_error: the largest distance from the policy's action, in tolerances; beyond: share of steps above 1.
        guaranteed: what no error can exceed, in tolerances; None if nothing is promised. promise: by what.
        bytes: kept beside the policy. made_s: seconds to make it, from the same observations.
    """

    method: str
    setting: str
    hit_rate: float
    step_us: dict[str, float]
    speedup: float
    worst_error: float
    beyond: float
    guaranteed: float | None
    promise: str
    mean_return: float
    bytes: int
    made_s: float


@dataclass(frozen=True)
class Comparison:
    """The table, what it was measured on, and what was left out and why."""

    workload: str
    policy: str
    tolerance: list[float]
    train_observations: int
    tuning_observations: int
    episodes: int
    seed: int
    rows: list[Row]
    skipped: dict[str, str]

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"verdicts": verdicts(self)}


@dataclass(frozen=True)
class Budget:
    """How much is learned from and measured; `fresh_episodes`, `delta` and `beta` are for the statistical kind
    (build.statistical). library: of formal kinds, grown from observations of the same seed; None: one is grown."""

    steps: int = 100_000
    episodes: int = 10
    seed: int = 0
    max_regions: int = 20_000
    fresh_episodes: int | None = None
    library: Library | None = None
    delta: float = 0.05
    beta: float = 1e-6


def bench(
    policy: Policy,
    workload: Workload,
    tolerance: NDArray[np.float64],
    budget: Budget,
    methods: Sequence[str] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Make the methods and measure them.

    Args:
        tolerance: [m] action units; ignored for decisions.
        methods: names of METHODS; none: all of them. The policy alone is always measured.

    Raises:
        ConfigError: an unknown method. WorkloadError: a recording, which nobody can drive.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ConfigError(f"methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    if workload.recorded is not None:
        raise WorkloadError(f"{workload.spec.name}: is a recording; a benchmark needs a workload that can be driven")
    wanted = [name for name in METHODS if name in methods or name == "policy" or not methods]
    seen, tuning = observed(policy, workload, budget.steps, (budget.seed, budget.seed + GAP))
    progress(f"{sum(map(len, seen.observations))} observations to learn from")
    (x, raw), (tuning_x, tuning_raw) = (
        (x, policy.batch(x)) for x in (np.concatenate(r.observations) for r in (seen, tuning))
    )
    case = Case(policy, workload, tolerance, seen.observations, x, raw, tuning_x, tuning_raw, budget.seed)
    made, skipped = _make(case, wanted, budget, progress)
    rows = _measure(case, made, budget.episodes, budget.seed + 3 * GAP, progress)
    return Comparison(
        workload.spec.name,
        policy.path.name,
        [float(v) for v in tolerance],
        len(x),
        len(tuning_x),
        budget.episodes,
        budget.seed,
        rows,
        skipped,
    )


def _make(
    case: Case, wanted: Sequence[str], budget: Budget, progress: Callable[[str], None]
) -> tuple[list[Method], dict[str, str]]:
    """Every method that can be made here, and why the others cannot."""
    learned: list[baselines.Learned] = []

    def network() -> Network:
        return load_network(case.policy.path)

    def networks() -> baselines.Learned:
        if not learned:
            learned.append(baselines.Learned(case, progress))
        return learned[0]

    makers: dict[str, Callable[[], Method]] = {
        "policy": lambda: baselines.full_policy(case),
        "cache": lambda: baselines.exact_cache(case),
        "nearest": lambda: baselines.nearest_neighbour(case),
        "student": lambda: networks().student(),
        "mixture": lambda: networks().mixture(),
        "router": lambda: networks().router(),
        "formula": lambda: baselines.global_formula(case, network()),
        "formal": lambda: _formal(case, network(), budget, progress),
        "statistical": lambda: _statistical(case, budget, progress),
    }
    made, skipped = [], {}
    for name in wanted:
        progress(f"making: {METHODS[name]}")
        start = time.monotonic()
        try:
            method = makers[name]()
        except ModuleNotFoundError as error:
            skipped[METHODS[name]] = f"the Python package {error.name} is not installed"
        except ModelError as error:
            skipped[METHODS[name]] = f"nothing can be proved about this policy: {error}"
        else:
            made.append(replace(method, made_s=round(time.monotonic() - start, 2)))
    return made, skipped


def _formal(case: Case, network: Network, budget: Budget, progress: Callable[[str], None]) -> Method:
    library = budget.library
    if library is None:
        limits = case.tolerance, budget.max_regions
        library = grow(case.policy, network, case.x, case.actions, *limits, progress=progress).library
    made = _laws("LAWS, formal", case, library, FORMAL, 0.0 if case.discrete else 1.0, "proved, as executed")
    return made if budget.library is None else replace(made, setting=f"{made.setting}, as given")


def _statistical(case: Case, budget: Budget, progress: Callable[[str], None]) -> Method:
    policy, workload, seed = case.policy, case.workload, budget.seed + 2 * GAP
    fresh = trial(policy, workload, budget.delta, budget.beta, seed, episodes=budget.fresh_episodes, progress=progress)
    growth = grow_statistical(
        policy, case.episodes, fresh, case.tolerance, budget.max_regions, progress
    )  # fmt: skip
    promise = f"for all but {budget.delta:g} of the traffic, tested"
    bound = 0.0 if case.discrete else 1.0
    return _laws("LAWS, statistical", case, growth.library, ("statistical",), bound, promise)


def _laws(name: str, case: Case, library: Library, kinds: Sequence[str], guaranteed: float, promise: str) -> Method:
    cached = CachedPolicy(library, case.policy, None if case.discrete else case.tolerance.tolist(), kinds)

    def lookup(x: NDArray[np.float32]) -> NDArray[np.float32] | None:
        answer = cached.lookup(x)
        return None if answer is None else answer.action

    with tempfile.TemporaryDirectory() as folder:
        stored = Path(folder) / "library"
        library.save(stored)
        size = stored.stat().st_size
    return Method(name, lookup, f"{len(library)} regions", size, guaranteed, promise)


def _measure(case: Case, methods: list[Method], episodes: int, seed: int, progress: Callable[[str], None]) -> list[Row]:
    """All methods drive the same episodes, by turns."""
    policy, discrete, clock = case.policy, case.discrete, time.perf_counter_ns
    spec, count = case.workload.spec, len(methods)
    times: list[list[int]] = [[] for _ in methods]
    observations: list[list[NDArray[np.float32]]] = [[] for _ in methods]
    actions: list[list[NDArray[np.float32]]] = [[] for _ in methods]
    hits, earned = [0] * count, [[0.0] * episodes for _ in methods]
    simulations = [case.workload.simulation() for _ in methods]
    for method in methods:
        for x in case.tuning_x[:WARM_UP]:
            method.lookup(x)
            policy.decide(policy(x))
    for episode in range(episodes):
        for k in ((np.arange(count) + episode) % count).tolist():
            lookup, simulation = methods[k].lookup, simulations[k]
            x = simulation.reset(episode_seed(seed, episode))
            for _ in range(spec.episode_steps):
                start = clock()
                action = lookup(x)
                hit = action is not None
                if action is None:
                    action = policy.decide(policy(x))
                times[k].append(clock() - start)
                hits[k] += hit
                observations[k].append(x)
                actions[k].append(np.array(action))
                x, reward, terminated = simulation.step(int(action[0]) if discrete else action)
                earned[k][episode] += reward
                if terminated:
                    break
        progress(f"episode {episode + 1} of {episodes}, {count} methods each")
    for simulation in simulations:
        simulation.close()
    base = float(np.mean(times[[m.name for m in methods].index("full policy")]))
    rows = []
    for k, method in enumerate(methods):
        error = case.error(np.array(actions[k]), policy.decide(policy.batch(np.array(observations[k]))))
        spent = np.array(times[k], float) / 1e3
        rows.append(
            Row(
                method.name,
                method.setting,
                hits[k] / len(spent),
                {"mean": float(spent.mean()), **{f"p{q}": float(np.percentile(spent, q)) for q in (50, 99)}},
                base / 1e3 / float(spent.mean()),
                float(error.max()),
                float((error > 1.0).mean()),
                method.guaranteed,
                method.promise,
                float(np.mean(earned[k])),
                method.bytes,
                method.made_s,
            )
        )
    return rows


def verdicts(found: Comparison) -> list[str]:
    """What the table says about the formal library, in words: where it leads, and who beats it at what."""
    ours, others = (
        next((r for r in found.rows if r.method == METHODS["formal"]), None),
        [r for r in found.rows if r.method not in (METHODS["formal"], METHODS["policy"])],
    )
    best = next(r for r in found.rows if r.method == METHODS["policy"])
    if ours is None or ours.guaranteed is None:
        return []

    def words(r: Row) -> str:
        kept = f"at worst {r.worst_error:.3g} tolerances, {r.beyond:.2%} of the steps beyond"
        return f"{r.method} ({ours.step_us['mean'] / r.step_us['mean']:.2g} times as fast; {kept})"

    def listed(rows: list[Row], otherwise: str) -> str:
        return "; ".join(map(words, rows)) or otherwise

    proved = [r for r in others if r.promise.startswith("proved") and (r.guaranteed or 0.0) <= ours.guaranteed]
    step = ours.step_us["mean"]
    faster = [r for r in others if r.step_us["mean"] <= step / EQUAL]
    exact = [r for r in others if r.step_us["mean"] <= step * EQUAL and r.worst_error < ours.worst_error]
    return [
        f"A mean step of {ours.method} is {ours.speedup:.1f} times cheaper than the policy's; it keeps "
        f"{ours.mean_return / best.mean_return:.2%} of the return.",
        "Proved as much and faster: " + listed([r for r in proved if r in faster], "none") + ".",
        "As fast or faster, and nearer to the policy: " + listed(exact, "none") + ".",
        "Faster, without that proof: " + listed([r for r in faster if r not in proved], "none") + ".",
    ]


_HEAD: tuple[str, ...] = ("method", "hit rate", "mean step", "p99", "speed-up", "worst error seen", "steps beyond")
_HEAD += ("guaranteed", "return", "bytes", "made in", "setting")


def markdown(found: Comparison) -> str:
    """The table, with what it was measured on above and what is missing below."""
    best = next((r.mean_return for r in found.rows if r.method == "full policy"), math.nan)
    lines = [
        f"Workload `{found.workload}`, policy `{found.policy}`, {found.train_observations:,} observations to learn "
        f"from, {found.tuning_observations:,} to set knobs on, {found.episodes} held-out episodes (seed {found.seed}). "
        f"Errors are in tolerances ({', '.join(map(number, found.tolerance)) or 'a wrong decision counts as 2'}).",
        "",
        f"| {' | '.join(_HEAD)} |",
        "| --- |" + " ---: |" * 6 + " --- |" + " ---: |" * 3 + " --- |",
    ]
    for r in found.rows:
        promise = "none" if r.guaranteed is None else f"{r.guaranteed:g} ({r.promise})"
        kept = f"{r.mean_return:.2f} ({100 * r.mean_return / best:.2f}%)"
        cells = (
            *(r.method, f"{100 * r.hit_rate:.1f}%", f"{r.step_us['mean']:.1f} us", f"{r.step_us['p99']:.0f} us"),
            *(f"{r.speedup:.1f}", f"{r.worst_error:.3g}", f"{100 * r.beyond:.2f}%", promise, kept),
            *(_size(r.bytes), f"{r.made_s:.0f} s", r.setting),
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {text}" for text in verdicts(found))]
    lines += [f"\nNot measured: {name}: {reason}." for name, reason in found.skipped.items()]
    return "\n".join(lines) + "\n"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def plot(found: Comparison) -> str:
    """A picture of the table as SVG text: what a step costs against the worst error seen."""
    shown = [r for r in found.rows if r.method != "full policy"]
    policy = next(r for r in found.rows if r.method == "full policy")
    errors = np.array([max(r.worst_error, FLOOR) for r in shown] + [1.0])
    steps = np.array([r.step_us["mean"] for r in found.rows])
    chart = Chart(
        f"{found.workload}: mean control step against the worst action error seen",
        "; ".join(f"{r.method}: {r.step_us['mean']:.1f} us, {r.worst_error:.2g} tolerances" for r in found.rows) + ".",
        Axis("mean control step, microseconds, misses included", steps.min() / 1.6, steps.max() * 1.8, log=True),
        Axis("worst error seen, in tolerances", errors.min() / 2.0, errors.max() * 2.0, log=True),
        width=820,
        height=440,
    )
    names: list[tuple[float, float, str, str]] = []
    chart.line([chart.x.low, chart.x.high], [1.0, 1.0], "quiet dash", "the tolerance")
    chart.upright(policy.step_us["mean"], f"the policy alone, {number(policy.step_us['mean'])} us")
    for label, css, some in (
        ("proved", "k1", [r for r in shown if r.promise.startswith("proved")]),
        ("tested on fresh episodes", "k3", [r for r in shown if r.promise.endswith("tested")]),
        ("no promise", "k2", [r for r in shown if r.guaranteed is None]),
    ):
        if some:
            at = [r.step_us["mean"] for r in some], [max(r.worst_error, FLOOR) for r in some]
            chart.dots(*at, css, label, 10.0, 0.9)
            names += [(x, y, f"{r.method}, {100 * r.hit_rate:.0f}%", css) for r, x, y in zip(some, *at, strict=True)]
    chart.names(names)
    return chart.svg(alone=True)
