"""What else could stand in front of a policy: the alternatives that `laws bench` compares with, tuned by one rule.

The rule: every knob is set on tuning episodes of its own. Of the settings whose error there nowhere exceeds the
tolerance, the one that answers most steps is taken, among equals the cheapest; if none keeps the tolerance, the one
that exceeds it least often. So every alternative gets what its idea can give at the quality that LAWS promises, as
far as tuning episodes can tell; what happens beyond them is what the benchmark measures.

All of them learn from the same observations as LAWS, hold still afterwards as its library does, and send what they do
not answer to the same policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.certificate import decision_pairs, decision_rows
from laws_ros.core.lipschitz import global_constant
from laws_ros.core.network import Network
from laws_ros.core.region import Regions
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.sessions import session

from .workloads import Workload

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Lookup = Callable[[Singles], "Singles | None"]

CELLS = 2.0 ** np.arange(1, -13, -1)  # widths tried for the exact cache, in units of the metric
WIDTHS = (16, 32, 64, 128, 256, 512)  # of the two hidden layers of distilled students
ROUTER = 32  # hidden neurons of the router
EXPERTS = (8, 32, 128, 512)  # of the mixture
STEPS, BATCH, RATE = 6000, 512, 3e-3  # of Adam, for every network here
PROBES = 512  # observations at which the policy's sensitivity is measured


@dataclass(frozen=True)
class Case:
    """What there is to learn from.

    Attributes:
        tolerance [m]: action units; of a decision, 0.5 of the distance between a right and a wrong one.
        episodes: the training observations [T, n], episode by episode.
        x [N, n], raw [N, m]: training observations and the policy's outputs. tuning_x, tuning_raw: to set knobs on.
    """

    policy: Policy
    workload: Workload
    tolerance: Floats
    episodes: list[Singles]
    x: Singles
    raw: Singles
    tuning_x: Singles
    tuning_raw: Singles
    seed: int = 0

    @property
    def discrete(self) -> bool:
        return self.policy.card.decision != "none"

    def error(self, action: NDArray[Any], other: NDArray[Any]) -> Floats:
        """[N]: distance of delivered actions [N, *], in tolerances."""
        if self.discrete:
            return np.asarray((action != other).any(axis=1) / 0.5)
        away = np.abs(np.asarray(action, float) - np.asarray(other, float)) / np.maximum(self.tolerance, 1e-300)
        return np.asarray(away.max(axis=1))

    @cached_property
    def actions(self) -> Singles:
        return self.policy.decide(self.raw)

    @cached_property
    def tuning_actions(self) -> Singles:
        return self.policy.decide(self.tuning_raw)

    @cached_property
    def spread(self) -> Floats:
        """[n]: standard deviation of every sensor; 1 where it never changes."""
        deviation = self.x.std(axis=0, dtype=float)
        return np.where(deviation > 0, deviation, 1.0)

    @cached_property
    def metrics(self) -> dict[str, Floats]:
        """[n] units to measure distances in: the sensors' spread, and what moves the action by about a tolerance."""
        rng = np.random.default_rng(self.seed)
        x = self.x[rng.choice(len(self.x), min(PROBES, len(self.x)), replace=False)]
        scale = self.raw.std(axis=0) if self.discrete else self.tolerance
        moved = np.zeros(x.shape[1])
        for j, spread in enumerate(self.spread):
            step = np.zeros(x.shape[1], np.float32)
            step[j] = 0.05 * spread
            change = np.abs(self.policy.batch(x + step).astype(float) - self.policy.batch(x - step)) / scale
            moved[j] = change.max(axis=1).mean() / (0.1 * spread)
        least = 0.01 * (moved * self.spread).max() / self.spread  # no sensor is ignored
        return {"spread": self.spread, "sensitivity": 1.0 / np.maximum(np.maximum(moved, least), 1e-300)}


@dataclass(frozen=True)
class Method:
    """Something to put in front of the policy.

    Attributes:
        lookup: the delivered action [m] at an observation [n], or None where the policy must answer.
        setting: what the tuning chose. bytes: of what it keeps.
        guaranteed: largest error it promises, in tolerances; None for no promise. promise: what kind of one.
        made_s: seconds that it took to make, tuning included.
    """

    name: str
    lookup: Lookup
    setting: str
    bytes: int
    guaranteed: float | None = None
    promise: str = "none"
    made_s: float = 0.0


@dataclass(frozen=True)
class _Choice:
    """One setting, and how it did on the tuning episodes: share of steps answered, errors of the answers."""

    hit_rate: float
    error: Floats
    cost: float
    make: Callable[[], Method]

    @property
    def good(self) -> bool:
        return float(self.error.max(initial=0.0)) <= 1.0

    @property
    def merit(self) -> tuple[float, float, float]:
        if self.good:
            return 1.0, self.hit_rate, -self.cost
        return 0.0, -float((self.error > 1.0).mean()), -float(self.error.max())


def _best(choices: Iterable[_Choice]) -> Method:
    """The rule at the top; of what is tried only the best is kept in memory."""
    return max(choices, key=lambda c: c.merit).make()


def full_policy(case: Case) -> Method:
    return Method("full policy", lambda x: None, "", 0, 0.0, "is the policy")


# -- replaying answers ---------------------------------------------------------------------------------------------


def exact_cache(case: Case) -> Method:
    """Answers by hashed, quantised observations: the first answer seen in a cell is replayed there."""
    rows = list(case.actions)

    def choices() -> Iterator[_Choice]:
        for metric, unit in case.metrics.items():
            for width in CELLS:
                inverse = (1.0 / (width * unit)).astype(np.float32)
                table: dict[bytes, Singles] = {}
                for key, action in zip(_cells(case.x, inverse), rows, strict=True):
                    table.setdefault(key.tobytes(), action)
                found = [table.get(key.tobytes()) for key in _cells(case.tuning_x, inverse)]
                hit = np.array([f is not None for f in found])
                answers = np.array([f for f in found if f is not None]).reshape(-1, case.actions.shape[1])
                error = case.error(answers, case.tuning_actions[hit])
                setting = f"cells of {width:g} {metric}, {len(table)} entries"
                yield _Choice(float(hit.mean()), error, len(table), partial(_cache, inverse, table, setting))

    return _best(choices())


def _cells(x: Singles, inverse: Singles) -> NDArray[np.int32]:
    return np.floor(x * inverse).astype(np.int32)


def _cache(inverse: Singles, table: dict[bytes, Singles], setting: str) -> Method:
    def lookup(x: Singles) -> Singles | None:
        return table.get(np.floor(x * inverse).astype(np.int32).tobytes())

    key, action = next(iter(table.items()))
    size = sys.getsizeof(table) + len(table) * (sys.getsizeof(key) + action.nbytes)
    return Method("exact cache", lookup, setting, size)


def nearest_neighbour(case: Case) -> Method:
    """The answer of the nearest observation seen, if it is near enough (the idea of ActionCache and FlashVLA)."""
    from scipy.spatial import cKDTree

    choices = []
    for metric, unit in case.metrics.items():
        tree = cKDTree(case.x / unit)
        distance, index = tree.query(case.tuning_x / unit)
        error = case.error(case.actions[index], case.tuning_actions)
        radius = _largest_within(distance, error)
        hit = distance <= radius
        setting = f"within {radius:.3g} of a {metric}, {len(case.x)} answers"
        choices.append(
            _Choice(
                float(hit.mean()),
                error[hit],
                radius,
                partial(_nearest, case, "nearest neighbour", tree, unit, np.full(len(case.x), radius), setting),
            )
        )
    return _best(choices)


def _largest_within(score: Floats, error: Floats) -> float:
    """The largest score up to which no error exceeds the tolerance."""
    bad = score[error > 1.0]
    limit = bad.min(initial=np.inf)
    return float(score[score < limit].max(initial=0.0))


def _nearest(case: Case, name: str, tree: Any, unit: Floats, radius: Floats, setting: str, *promise: Any) -> Method:
    inverse, actions, most, radii = 1.0 / unit, case.actions, float(radius.max()), radius.tolist()

    def lookup(x: Singles) -> Singles | None:
        distance, index = tree.query(x * inverse, distance_upper_bound=most * (1 + 1e-12))
        if index < len(actions) and distance <= radii[index]:
            return actions[index]
        return None

    return Method(name, lookup, setting, 2 * tree.data.nbytes + actions.nbytes, *promise)


def global_formula(case: Case, network: Network) -> Method:
    """The paper's bound with the global Lipschitz constant, around every observation seen.

    The expert is the answer there, so eps_fit is zero and 2 Lambda C_E, with the distance to the observation as radius,
    is the whole bound: the most that the formula can give. For a decision it must not exceed the winner's margin.
    """
    from scipy.spatial import cKDTree

    decision, outputs = case.policy.card.decision, case.policy.actions
    promise = 0.0 if case.discrete else 1.0, "proved, up to rounding"
    choices = []
    for metric, unit in case.metrics.items():
        region = Regions.from_axes(np.zeros((1, len(unit))), np.eye(len(unit))[None], unit[None])
        constant = global_constant(network, region, decision)[0]
        if case.discrete:
            margin = np.abs(case.raw.astype(float) @ decision_rows(outputs, decision).T) / (2.0 * constant)
            pairs, best = np.array(decision_pairs(outputs)), case.actions[:, :1]
            radius = np.where((pairs[None] == best[:, :, None]).any(axis=2), margin, np.inf).min(axis=1)
        else:
            radius = np.full(len(case.x), float((case.tolerance / (2.0 * constant)).min()))
        tree = cKDTree(case.x / unit)
        distance, index = tree.query(case.tuning_x / unit)
        hit = distance <= radius[index]
        setting = f"constant {constant.max():.3g} per {metric}, radius at most {radius.max():.3g}"
        choices.append(
            _Choice(
                float(hit.mean()),
                np.zeros(0),
                0.0,
                partial(_nearest, case, "formula, global constant", tree, unit, radius, setting, *promise),
            )
        )
    return _best(choices)


# -- learned stand-ins (torch) -------------------------------------------------------------------------------------


class Learned:
    """Networks trained on a case; made once, for they share students."""

    def __init__(self, case: Case, progress: Callable[[str], None] = lambda text: None) -> None:
        import torch

        self.torch, self.case, self.progress = torch, case, progress
        self.mean, self.scale = case.x.mean(axis=0, dtype=float), case.spread
        self.unit = case.raw.std(axis=0, dtype=float) + 1e-9 if case.discrete else case.tolerance
        target = case.raw if case.discrete else case.actions
        self.offset = target.mean(axis=0, dtype=float)
        self.z, self.tuning_z = (self._tensor((x - self.mean) / self.scale) for x in (case.x, case.tuning_x))
        self.target = self._tensor((target - self.offset) / self.unit)
        self._trained: dict[int, tuple[Any, Floats]] = {}

    def _tensor(self, values: Any) -> Any:
        return self.torch.as_tensor(np.asarray(values, np.float32))

    def _fit(self, module: Any, loss: Callable[[Any], Any], rate: float = RATE) -> None:
        """Adam with a cosine schedule; `loss` takes the rows of a batch."""
        torch, draws = self.torch, self.torch.Generator().manual_seed(self.case.seed)
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(torch.randint(len(self.z), (BATCH,), generator=draws)).backward()
            optimizer.step()
            schedule.step()

    def _mlp(self, *sizes: int) -> Any:
        nn, layers = self.torch.nn, []
        for inner, outer in pairwise(sizes[:-1]):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))

    def _students(self) -> Iterator[tuple[int, Any, Floats]]:
        """(width, network, errors while tuning) of students, the widest of which keeps the tolerance if any does."""
        for width in WIDTHS:
            if width not in self._trained:
                self.torch.manual_seed(self.case.seed)
                module = self._mlp(self.z.shape[1], width, width, self.target.shape[1])
                self._fit(module, partial(self._missed, module))
                self._trained[width] = module, self._errors(module, self.tuning_z, self.case.tuning_actions)
                self.progress(f"a student of width {width} is trained")
            yield width, *self._trained[width]
            if float(self._trained[width][1].max()) <= 1.0:
                return

    def _missed(self, module: Any, rows: Any) -> Any:
        return (module(self.z[rows]) - self.target[rows]).square().mean()

    def _delivered(self, output: Any) -> Singles:
        """Standardised outputs as the actions that reach the robot."""
        raw = output.detach().numpy() * self.unit + self.offset
        return self.case.policy.decide(raw.astype(np.float32))

    def _errors(self, module: Any, z: Any, actions: Singles) -> Floats:
        with self.torch.no_grad():
            return self.case.error(self._delivered(module(z)), actions)

    def student(self) -> Method:
        """A single small network in place of the policy; the smallest that keeps the tolerance."""
        return _best(
            _Choice(1.0, error, width, partial(self._student_method, width, module))
            for width, module, error in self._students()
        )

    def _student_method(self, width: int, module: Any) -> Method:
        run, size = _Runner.of([self._layers(module)], len(self.mean))
        decide = self.case.policy.decide
        return Method("distilled student", lambda x: decide(run(x)[0]), f"2 x {width}", size)

    def router(self) -> Method:
        """A student where a learned router expects it to be good enough, else the policy (CITER, RouteLLM).

        The router learns to tell the training observations at which the student keeps the tolerance; the threshold is
        set on the tuning episodes.
        """
        torch, choices = self.torch, []
        for width, module, error in self._students():
            good = self._tensor(self._errors(module, self.z, self.case.actions) <= 1.0)
            torch.manual_seed(self.case.seed)
            judge = self._mlp(self.z.shape[1], ROUTER, 1)
            balance = ((1 - good).sum() + 1) / (good.sum() + 1)
            self._fit(judge, partial(self._judged, judge, good, torch.nn.BCEWithLogitsLoss(pos_weight=balance)))
            with torch.no_grad():
                doubt = -judge(self.tuning_z)[:, 0].numpy().astype(float)
            limit = _largest_within(doubt - doubt.min(), error) + doubt.min()
            hit = doubt <= limit if (error > 1.0).any() else np.ones(len(doubt), bool)
            limit = limit if (error > 1.0).any() else np.inf
            choices.append(
                _Choice(
                    float(hit.mean()),
                    error[hit],
                    width,
                    partial(self._routed, width, module, judge, -limit),
                )
            )
            self.progress(f"a router for the student of width {width} is trained")
        return _best(choices)

    def _judged(self, judge: Any, good: Any, loss: Any, rows: Any) -> Any:
        return loss(judge(self.z[rows])[:, 0], good[rows])

    def _routed(self, width: int, module: Any, judge: Any, threshold: float) -> Method:
        run, size = _Runner.of([self._layers(module), self._layers(judge, False)], len(self.mean))
        decide = self.case.policy.decide

        def lookup(x: Singles) -> Singles | None:
            output, score = run(x)
            return decide(output) if score[0] >= threshold else None

        return Method("learned router", lookup, f"a student of 2 x {width} above a score of {threshold:.3g}", size)

    def _layers(self, module: Any, scaled: bool = True) -> list[tuple[Singles, Singles]]:
        """(weight, bias) of every layer, with what standardises observations and outputs folded in."""
        layers = [
            (k.weight.detach().numpy().astype(float), k.bias.detach().numpy().astype(float))
            for k in module
            if hasattr(k, "weight")
        ]
        weight, bias = layers[0]
        layers[0] = weight / self.scale, bias - weight @ (self.mean / self.scale)
        if scaled:
            weight, bias = layers[-1]
            layers[-1] = weight * self.unit[:, None], bias * self.unit + self.offset
        return [(w.astype(np.float32), b.astype(np.float32)) for w, b in layers]

    def mixture(self) -> Method:
        """K affine experts and a gate, trained together (Jacobs et al. 1991); the likeliest expert answers."""
        from scipy.cluster.vq import kmeans2

        torch, choices = self.torch, []
        for experts in EXPERTS:
            z = self.z.numpy().astype(float)
            centers = kmeans2(z[:20_000], experts, minit="++", rng=self.case.seed)[0]
            with torch.no_grad():
                gate = torch.nn.Linear(z.shape[1], experts)
                gate.weight.copy_(self._tensor(4.0 * centers))
                gate.bias.copy_(self._tensor(-2.0 * (centers**2).sum(axis=1)))
                expert = torch.nn.Linear(z.shape[1], experts * self.target.shape[1])
                whole = np.linalg.lstsq(np.c_[z, np.ones(len(z))], self.target.numpy(), rcond=1e-9)[0].T
                expert.weight.copy_(self._tensor(np.tile(whole[:, :-1], (experts, 1))))
                expert.bias.copy_(self._tensor(np.tile(whole[:, -1], experts)))
            both = torch.nn.ModuleList([gate, expert])

            self._fit(both, partial(self._divided, gate, expert))
            parts = self._gated(gate, expert, experts)
            answers = np.stack([_top(x, *parts) for x in self.case.tuning_x])
            error = self.case.error(self.case.policy.decide(answers), self.case.tuning_actions)
            choices.append(_Choice(1.0, error, experts, partial(self._mixed, experts, parts)))
            self.progress(f"a mixture of {experts} experts is trained")
            if choices[-1].good:
                break
        return _best(choices)

    def _divided(self, gate: Any, expert: Any, rows: Any) -> Any:
        """What the experts' answers miss, weighted by how likely the gate finds each."""
        likely = gate(self.z[rows]).softmax(dim=1)
        answers = expert(self.z[rows]).reshape(*likely.shape, -1)
        return (likely * (answers - self.target[rows][:, None]).square().mean(dim=2)).sum(dim=1).mean()

    def _gated(self, gate: Any, expert: Any, experts: int) -> tuple[Singles, Singles]:
        """Gate [K, n + 1] and experts [K, m, n + 1], over (x, 1) in the sensors' own units."""
        (gate_weight, gate_bias), (weight, bias) = (self._layers([k], False)[0] for k in (gate, expert))
        gates = np.c_[gate_weight, gate_bias]
        answers = np.c_[weight, bias].reshape(experts, -1, weight.shape[1] + 1) * self.unit[:, None]
        answers[:, :, -1] += self.offset
        return gates, answers.astype(np.float32)

    def _mixed(self, experts: int, parts: tuple[Singles, Singles]) -> Method:
        decide = self.case.policy.decide
        size = sum(part.nbytes for part in parts)
        return Method("mixture of experts", lambda x: decide(_top(x, *parts)), f"{experts} affine experts", size)


def _top(x: Singles, gates: Singles, answers: Singles) -> Singles:
    extended = np.append(x, np.float32(1.0))
    result: Singles = answers[(gates @ extended).argmax()] @ extended
    return result


class _Runner:
    """Networks side by side in one ONNX Runtime session with bound buffers, as the library's experts have."""

    def __init__(self, model: bytes, inputs: int, outputs: list[int]) -> None:
        self._session = session(model, "a stand-in")
        self._x, self._y = np.zeros((1, inputs), np.float32), [np.zeros((1, k), np.float32) for k in outputs]
        self._binding = self._session.io_binding()
        self._binding.bind_input("x", "cpu", 0, np.float32, self._x.shape, self._x.ctypes.data)
        for k, y in enumerate(self._y):
            self._binding.bind_output(f"y{k}", "cpu", 0, np.float32, y.shape, y.ctypes.data)

    def __call__(self, x: Singles) -> list[Singles]:
        self._x[0] = x
        self._session.run_with_iobinding(self._binding)
        return [y[0] for y in self._y]

    @classmethod
    def of(cls, networks: list[list[tuple[Singles, Singles]]], inputs: int) -> tuple[_Runner, int]:
        """A runner of ReLU networks, and the size of their model file."""
        nodes, constants, ends = [], [], []
        for k, layers in enumerate(networks):
            name = "x"
            for j, (weight, bias) in enumerate(layers):
                last = j == len(layers) - 1
                constants += [numpy_helper.from_array(weight, f"w{k}.{j}"), numpy_helper.from_array(bias, f"b{k}.{j}")]
                out = f"y{k}" if last else f"z{k}.{j}"
                nodes.append(helper.make_node("Gemm", [name, f"w{k}.{j}", f"b{k}.{j}"], [out], transB=1))
                name = out
                if not last:
                    nodes.append(helper.make_node("Relu", [name], [f"a{k}.{j}"]))
                    name = f"a{k}.{j}"
            ends.append(helper.make_tensor_value_info(f"y{k}", TensorProto.FLOAT, [1, len(layers[-1][1])]))
        start = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, inputs])
        model: onnx.ModelProto = helper.make_model(
            helper.make_graph(nodes, "stand-in", [start], ends, constants), opset_imports=[helper.make_opsetid("", 17)]
        )
        model.ir_version = 8
        text = model.SerializeToString()
        return cls(text, inputs, [len(layers[-1][1]) for layers in networks]), len(text)
