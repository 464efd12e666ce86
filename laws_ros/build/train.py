"""Train a full policy that is cheap to cache: a teacher by optimal control, imitated by a large ReLU network.

DAgger (Ross et al. 2011): the network drives, the teacher labels, everything seen is kept. The loss has a second part,
`regularizers.certified_gap`, and docs/adr/0002-cartpole-training.md says what its weights buy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from laws_ros.core.card import Card
from laws_ros.core.errors import WorkloadError
from laws_ros.runtime.files import sha256_file
from laws_ros.runtime.policy import Policy

from .regularizers import certified_gap, random_boxes
from .straight import start_straight
from .workloads import Rollouts, Workload, get, module, rollouts

Teacher = Callable[[NDArray[Any]], NDArray[Any]]


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        hidden: width of both hidden layers.
        steps, batch, learning_rate: Adam with a cosine to zero.
        rounds, episodes: DAgger rounds after the first, episodes gathered for each.
        jitter: half of a batch is moved by this many standard deviations, so that the network is right around the data.
        boxes, every: boxes per penalised step, and how often one comes.
        half_width: largest half-width of a box along the data's principal axes, in standard deviations.
        relaxation, rounding: weights of the two parts of the certified gap.
        straight: start from the best affine policy of every context (build/straight.py).
        check_episodes, parity_samples: size of the final checks.
    """

    hidden: int = 2048
    steps: int = 5000
    batch: int = 256
    learning_rate: float = 5e-4
    rounds: int = 4
    episodes: int = 64
    jitter: float = 0.3
    boxes: int = 16
    every: int = 2
    half_width: float = 3.0
    relaxation: float = 0.05
    rounding: float = 1.0
    straight: bool = False
    check_episodes: int = 200
    parity_samples: int = 20000


def train(
    workload_name: str,
    out_dir: str | Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    recipe: Recipe | None = None,
) -> dict[str, Any]:
    """Train, export and check the full policy of a workload.

    Writes NAME.onnx, NAME.yaml and the entry NAME.onnx in MANIFEST.json in `out_dir`.

    Args:
        workload_name: a workload that has a teacher.
        log: takes lines of progress.

    Returns:
        The manifest's entry.

    Raises:
        WorkloadError: unknown workload, or one without a teacher.
    """
    workload = get(workload_name)
    teacher, own_recipe = lesson(workload_name)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{workload_name.partition('?')[0]}.onnx"
    spec = workload.spec
    card = Card(spec.name, spec.observations, spec.actions, context=spec.context)
    entry = distil(workload, teacher, path, card, recipe or own_recipe, seed=seed, log=log)
    entry = {"sha256": entry.pop("sha256"), "command": f"laws train {workload_name} --seed {seed}", **entry}
    record(path, entry)
    return entry


def record(path: Path, entry: dict[str, Any]) -> None:
    """Write a model's entry into the MANIFEST.json beside it."""
    manifest = path.with_name("MANIFEST.json")
    entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
    manifest.write_text(json.dumps({**entries, path.name: entry}, indent=2) + "\n")


def distil(
    workload: Workload,
    teacher: Teacher,
    path: Path,
    card: Card,
    recipe: Recipe,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Bring a teacher into a network that is cheap to cache; writes the network to `path` and its card beside it.

    Args:
        teacher: observations [N, n] to actions [N, m] before they saturate, or to what a decision is made from.
        card: what goes beside the network. Actions with limits are learned between them and clipped to them; without,
            as they are.

    Returns:
        Size, parity, certified half-gaps, and both returns.
    """
    started = time.monotonic()

    def progress(line: str) -> None:
        log(f"{time.monotonic() - started:6.0f} s {line}")

    torch.manual_seed(seed)
    student = _Student(workload, teacher, card, recipe, seed)
    for round_ in range(recipe.rounds + 1):
        student.gather(teacher if round_ == 0 else student, seed=seed * 1000 + round_)
        student.fit(recipe.steps // (recipe.rounds + 1), progress)
    student.export(path)
    write_card(path.with_suffix(".yaml"), card)
    policy = Policy(path)
    progress(f"wrote {path}; checking")
    entry: dict[str, Any] = {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "parameters": sum(p.numel() for p in student.net.parameters()),
        "recipe": asdict(recipe),
        "parity": _parity(student, policy),
        "certified_half_gap": student.gaps(),
        **returns(student.run, teacher, policy, recipe.check_episodes, seed=seed * 1000 + 999),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    progress(f"return {entry['policy_return']} (teacher {entry['teacher_return']})")
    return entry


class _Student:
    """The network, its data, and the loop that brings them together.

    Actions are learned in units of half their range around its middle, so that limits are at -1 and 1.
    """

    def __init__(self, workload: Workload, teacher: Teacher, card: Card, recipe: Recipe, seed: int) -> None:
        self.workload, self.teacher, self.card, self.recipe = workload, teacher, card, recipe
        limits = np.array([[c.low, c.high] for c in card.actions])
        self.limited = card.decision == "none" and bool(np.isfinite(limits).all())
        if self.limited:
            self.middle, self.limit = (
                limits.mean(axis=1).astype(np.float32),
                (0.5 * np.ptp(limits, axis=1)).astype("f4"),
            )
        inputs, outputs, hidden = len(card.observations), len(card.actions), recipe.hidden
        self.discrete = list(card.context_indices)
        self.net = nn.Sequential(
            nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
        )
        self.rng = np.random.default_rng(seed)
        self.random = torch.Generator().manual_seed(seed)
        self.data = np.zeros((0, inputs), np.float32)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.steps)
        self.step = 0

    def __call__(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """The policy itself: physical observations [N, n] to physical actions [N, m]."""
        with torch.no_grad():
            y = self.net(torch.from_numpy((observations - self.mean) * self.scale)).numpy()
        return (np.clip(y, np.float32(-1.0), np.float32(1.0)) if self.limited else y) * self.limit + self.middle

    def run(self, driver: Teacher, episodes: int, seed: int) -> Rollouts:
        """Episodes under a policy, decided as the card says."""
        sign = {"argmax": 1.0, "argmin": -1.0}.get(self.card.decision)
        act = driver if sign is None else lambda x: np.argmax(sign * driver(x), axis=1)[:, None]
        return rollouts(self.workload, act, episodes, seed)

    def gather(self, driver: Teacher, seed: int) -> None:
        """Add one round of episodes; the first round fixes the normalisation and every context's spread."""
        found = self.run(driver, self.recipe.episodes, seed)
        self.data = np.concatenate([self.data, *found.observations])
        if self.step == 0:
            self.mean = self.data.mean(axis=0)
            self.scale = (1.0 / self._deviations()).astype(np.float32)
            if not self.limited:
                wanted = self.teacher(self.data)
                self.middle = wanted.mean(axis=0).astype(np.float32)
                self.limit = np.maximum(wanted.std(axis=0), 1e-6).astype(np.float32)
            self._measure_contexts()

    def _deviations(self) -> NDArray[np.float64]:
        """[n]: what every observation is divided by. Channels of one unit share theirs: a joint that hardly moves would
        else have its sensor's noise magnified, and the network would bend along it."""
        deviation = self.data.std(axis=0, dtype=float)
        units = np.array([channel.unit for channel in self.card.observations])
        for unit in set(units) - {""}:
            deviation[units == unit] = np.sqrt((deviation[units == unit] ** 2).mean())
        return np.where(deviation > 0.0, deviation, 1.0)

    def _measure_contexts(self) -> None:
        """Scaled principal axes of the data of every context (what a context fixes has none), and their mean spread."""
        x = (self.data - self.mean) * self.scale
        self.contexts, of = np.unique(self.data[:, self.discrete], axis=0, return_inverse=True)
        fixed = len(self.discrete)  # the first principal axes, without variance
        self.axes = torch.zeros(len(self.contexts), x.shape[1], x.shape[1] - fixed)
        pooled = np.zeros(x.shape[1])
        for k in range(len(self.contexts)):
            covariance = np.cov(x[of.ravel() == k], rowvar=False, bias=True)
            variances, axes = np.linalg.eigh(covariance)
            scaled = axes * np.sqrt(variances.clip(min=0.0))
            self.axes[k] = torch.from_numpy(scaled[:, fixed:].astype(np.float32))
            pooled += np.diag(covariance) * np.mean(of == k)
        self.spread = np.sqrt(pooled).astype(np.float32)

    def around(self, rows: NDArray[np.intp]) -> Tensor:
        """The principal axes [N, n, d] of the contexts of some of the data."""
        here = self.data[rows][:, None, self.discrete]
        return self.axes[np.abs(here - self.contexts).sum(axis=2).argmin(axis=1)]

    def _start(self, most: int = 20_000) -> None:
        points = self.data[self.rng.permutation(len(self.data))[:most]]
        moves = self.rng.normal(0.0, self.recipe.jitter, points.shape).astype(np.float32)
        points = points + moves * self.spread / self.scale
        wanted = (self.teacher(points) - self.middle) / self.limit
        wanted = np.clip(wanted, -1.0, 1.0) if self.limited else wanted
        x, y = torch.from_numpy((points - self.mean) * self.scale), torch.from_numpy(wanted.astype(np.float32))
        start_straight(self.net, x, y, self.discrete, self.random)

    def fit(self, steps: int, log: Callable[[str], None]) -> None:
        recipe = self.recipe
        if recipe.straight and self.step == 0:
            self._start()
        targets = ((self.teacher(self.data) - self.middle) / self.limit).astype(np.float32)
        for _ in range(steps):
            rows = self.rng.integers(len(self.data), size=recipe.batch)
            points, wanted = self.data[rows], targets[rows]
            near = recipe.batch // 2
            moves = self.rng.normal(0.0, recipe.jitter, (near, points.shape[1])).astype(np.float32)
            points[:near] += moves * self.spread / self.scale
            wanted[:near] = (self.teacher(points[:near]) - self.middle) / self.limit
            x, target = torch.from_numpy((points - self.mean) * self.scale), torch.from_numpy(wanted)
            error = saturating_error(self.net(x), target) if self.limited else self.net(x) - target
            loss = error.square().mean()
            if self.step % recipe.every == 0:
                boxes = random_boxes(self.around(rows[-recipe.boxes :]), recipe.half_width, self.random)
                gap = certified_gap(self.net, x[-recipe.boxes :], boxes)
                loss = loss + recipe.relaxation * gap.relaxation.mean() + recipe.rounding * gap.rounding.mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            if self.step % max(1, recipe.steps // 20) == 0:
                log(f"step {self.step}: rms error {error.detach().square().mean().sqrt():.4f}, {_summary(self.gaps())}")

    def gaps(self, boxes: int = 64) -> dict[str, dict[str, float]]:
        """Mean certified half-gap, in units of the action's limit, of fresh boxes of fixed half-widths."""
        found = {}
        rows = np.random.default_rng(1).integers(len(self.data), size=boxes)
        x = torch.from_numpy((self.data[rows] - self.mean) * self.scale)
        for width in (0.1, 0.25, 0.5, 1.0):
            with torch.no_grad():
                gap = certified_gap(self.net, x, self.around(rows) * width)
            found[f"{width:g} std"] = {
                "relaxation": round(float(gap.relaxation.mean()), 5),
                "rounding": round(float(gap.rounding.mean()), 5),
                "below_0.05": round(float((gap.total.amax(1) < 0.05).float().mean()), 3),
            }
        return found

    def export(self, path: Path) -> None:
        """Write the policy as an ONNX graph (opset 17, float32): Sub, Mul, Gemm, Relu, Gemm, Relu, Gemm, Clip, Mul,
        Add, the last ones as needed."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        constants = {"mean": self.mean, "scale": self.scale, "limit": self.limit}
        if self.limited:
            constants |= {"minus_one": np.float32(-1.0), "one": np.float32(1.0)}
        if self.middle.any():
            constants |= {"middle": self.middle}
        nodes = [helper.make_node("Sub", ["observation", "mean"], ["centered"], "center")]
        nodes += [helper.make_node("Mul", ["centered", "scale"], ["h0"], "normalize")]
        for k, layer in enumerate(self.net):
            if isinstance(layer, nn.Linear):
                constants |= {f"w{k}": layer.weight.detach().numpy(), f"b{k}": layer.bias.detach().numpy()}
                nodes += [helper.make_node("Gemm", [f"h{k}", f"w{k}", f"b{k}"], [f"h{k + 1}"], f"linear{k}", transB=1)]
            else:
                nodes += [helper.make_node("Relu", [f"h{k}"], [f"h{k + 1}"], f"relu{k}")]
        last = f"h{len(self.net)}"
        if self.limited:
            nodes += [helper.make_node("Clip", [last, "minus_one", "one"], ["unit_action"], "saturate")]
            last = "unit_action"
        scaled = "scaled" if self.middle.any() else "action"
        nodes += [helper.make_node("Mul", [last, "limit"], [scaled], "to_physical_units")]
        if self.middle.any():
            nodes += [helper.make_node("Add", [scaled, "middle"], ["action"], "around_middle")]
        graph = helper.make_graph(
            nodes,
            self.card.name,
            [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", self.data.shape[1]])],
            [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", len(self.limit)])],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        )
        # IR version 8 goes with opset 17 and is read by every onnxruntime that we support.
        opset = [helper.make_opsetid("", 17)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="laws_ros")
        onnx.checker.check_model(model, full_check=True)
        onnx.save(model, str(path))


def saturating_error(output: Tensor, target: Tensor) -> Tensor:
    """Error of clip(output) against clip(target) at +-1, one-sided where the target is beyond: there more is right too.

    Unlike the error of the clipped values it has a gradient wherever it is not zero, and it leaves the network free to
    go on straight where the graph's Clip will bend.
    """
    error = output - target
    error = torch.where(target >= 1.0, (output - 1.0).clamp(max=0.0), error)
    return torch.where(target <= -1.0, (output + 1.0).clamp(min=0.0), error)


def _summary(gaps: dict[str, dict[str, float]]) -> str:
    return "half-gap " + ", ".join(
        f"{width}: {g['relaxation']:.4f} + {g['rounding']:.4f} ({g['below_0.05']:.0%} < 0.05)"
        for width, g in gaps.items()
    )


def lesson(workload_name: str) -> tuple[Teacher, Recipe]:
    """A workload's teacher and its recipe: its module's `teacher()`, and `RECIPE` where it differs from the default.

    A teacher maps observations [N, n] to actions [N, m], *before* they saturate.
    """
    lesson = module(workload_name)
    if not hasattr(lesson, "teacher"):
        raise WorkloadError(f"workload {workload_name!r} has no teacher to train from")
    return lesson.teacher(), Recipe(**getattr(lesson, "RECIPE", {}))


def write_card(path: Path, card: Card) -> None:
    text = yaml.safe_dump(card.to_dict(), sort_keys=False)
    title = f"# What {path.stem}.onnx observes and commands, in order. A library is bound to this card."
    path.write_text(f"{title}\n{text}")


def _parity(student: _Student, policy: Policy) -> dict[str, Any]:
    """Largest difference between torch and ONNX Runtime on observations that were seen, and on ones moved far off."""
    rng = np.random.default_rng(2)
    seen = student.data[rng.integers(len(student.data), size=student.recipe.parity_samples)]
    seen[::2] += (rng.normal(0.0, 1.0, seen[::2].shape) * student.spread / student.scale).astype(np.float32)
    difference = np.abs(policy.batch(seen).astype(float) - student(seen))
    return {"observations": len(seen), "worst_action_difference": float(difference.max())}


def returns(
    run: Callable[[Teacher, int, int], Rollouts], teacher: Teacher, policy: Policy, episodes: int, seed: int
) -> dict[str, Any]:
    """Mean returns of teacher and policy over the same episodes, run by run(driver, episodes, seed)."""
    of_teacher = run(teacher, episodes, seed).returns
    of_policy = run(policy.batch, episodes, seed).returns
    return {
        "check_episodes": episodes,
        "teacher_return": round(float(of_teacher.mean()), 2),
        "policy_return": round(float(of_policy.mean()), 2),
        "policy_over_teacher": round(float(of_policy.mean() / of_teacher.mean()), 4),
        "paired_standard_error": round(float((of_policy - of_teacher).std() / np.sqrt(episodes)), 2),
    }
