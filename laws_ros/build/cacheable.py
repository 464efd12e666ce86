"""The default kind of full policy: a large ReLU network that imitates its teacher and is cheap to cache.

The loss has a second part, `regularizers.certified_gap`; docs/adr/0002-cartpole-training.md says what its weights buy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laws_ros.core.card import Card

from .regularizers import certified_gap, random_boxes
from .straight import start_straight
from .student import Lessons, Student, Teacher
from .workloads import Rollouts, Workload


@dataclass(frozen=True)
class Recipe(Lessons):
    """How to train, with Adam and a cosine.

    Attributes:
        hidden: width of both hidden layers.
        jitter: half of a batch is moved by this many standard deviations, so that the network is right around the data.
        boxes, every: boxes per penalised step, and how often one comes.
        half_width: largest half-width of a box along the data's principal axes, in standard deviations.
        relaxation, rounding: weights of the two parts of the certified gap.
        straight: start from the best affine policy of every context (build/straight.py),
        room, ridge, fan_in: in that way.
    """

    kind: ClassVar[str] = "relu"

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
    room: float = 1.0
    ridge: float = 1e-3
    fan_in: int = 0
    check_episodes: int = 200
    parity_samples: int = 20000

    def student(self, workload: Workload, teacher: Teacher, card: Card, seed: int) -> CacheableStudent:
        return CacheableStudent(workload, teacher, card, self, seed)


class CacheableStudent(Student):
    """Actions are learned in units of half their range around its middle, so that limits are at -1 and 1."""

    recipe: Recipe
    net: nn.Sequential

    def __init__(self, workload: Workload, teacher: Teacher, card: Card, recipe: Recipe, seed: int) -> None:
        super().__init__(workload, teacher, card, recipe, seed)
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
        self.random = torch.Generator().manual_seed(seed)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=recipe.learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, recipe.steps)

    def __call__(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """The policy itself: physical observations [N, n] to physical actions [N, m]."""
        with torch.no_grad():
            y = self.net(self.tensor((observations - self.mean) * self.scale)).cpu().numpy()
        return (np.clip(y, np.float32(-1.0), np.float32(1.0)) if self.limited else y) * self.limit + self.middle

    def learn_from(self, found: Rollouts) -> None:
        """Add episodes; the first ones fix the normalisation, every context's spread and where training starts."""
        first = not len(self.data)
        self.data = np.concatenate([self.data, *found.observations])
        if first:
            self.mean = self.data.mean(axis=0)
            self.scale = (1.0 / self._deviations()).astype(np.float32)
            if not self.limited:
                wanted = self.teacher(self.data)
                self.middle = wanted.mean(axis=0).astype(np.float32)
                self.limit = np.maximum(wanted.std(axis=0), 1e-6).astype(np.float32)
            self._measure_contexts()
            if self.recipe.straight:
                self._start()
            self.net.to(self.device)
        self.targets = ((self.teacher(self.data) - self.middle) / self.limit).astype(np.float32)

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
        self.moved = self.spread / self.scale

    def around(self, rows: NDArray[np.intp]) -> Tensor:
        """The principal axes [N, n, d] of the contexts of some of the data."""
        here = self.data[rows][:, None, self.discrete]
        return self.axes[np.abs(here - self.contexts).sum(axis=2).argmin(axis=1)].to(self.device)

    def _start(self, most: int = 20_000) -> None:
        points = self.data[self.rng.permutation(len(self.data))[:most]]
        moves = self.rng.normal(0.0, self.recipe.jitter, points.shape).astype(np.float32)
        points = points + moves * self.spread / self.scale
        wanted = (self.teacher(points) - self.middle) / self.limit
        wanted = np.clip(wanted, -1.0, 1.0) if self.limited else wanted
        x, y = torch.from_numpy((points - self.mean) * self.scale), torch.from_numpy(wanted.astype(np.float32))
        how = self.recipe.room, self.recipe.ridge, self.recipe.fan_in
        start_straight(self.net, x, y, self.discrete, self.random, *how)

    def loss(self, rows: NDArray[np.intp]) -> Tensor:
        recipe = self.recipe
        points, wanted = self.data[rows], self.targets[rows]
        near = recipe.batch // 2
        moves = self.rng.normal(0.0, recipe.jitter, (near, points.shape[1])).astype(np.float32)
        points[:near] += moves * self.spread / self.scale
        wanted[:near] = (self.teacher(points[:near]) - self.middle) / self.limit
        x, target = self.tensor((points - self.mean) * self.scale), self.tensor(wanted)
        error = saturating_error(self.net(x), target) if self.limited else self.net(x) - target
        self._error = error.detach()
        loss = error.square().mean()
        if self.step % recipe.every == 0:
            boxes = random_boxes(self.around(rows[-recipe.boxes :]), recipe.half_width, self.random)
            gap = certified_gap(self.net, x[-recipe.boxes :], boxes)
            loss = loss + recipe.relaxation * gap.relaxation.mean() + recipe.rounding * gap.rounding.mean()
        return loss

    def progress(self) -> str:
        gaps = ", ".join(
            f"{width}: {g['relaxation']:.4f} + {g['rounding']:.4f} ({g['below_0.05']:.0%} < 0.05)"
            for width, g in self.gaps().items()
        )
        return f"rms error {self._error.square().mean().sqrt():.4f}, half-gap {gaps}"

    def figures(self) -> dict[str, Any]:
        return {"certified_half_gap": self.gaps()}

    def gaps(self, boxes: int = 64) -> dict[str, dict[str, float]]:
        """Mean certified half-gap, in units of the action's limit, of fresh boxes of fixed half-widths."""
        found = {}
        rows = np.random.default_rng(1).integers(len(self.data), size=boxes)
        x = self.tensor((self.data[rows] - self.mean) * self.scale)
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
        """Sub, Mul, Gemm, Relu, Gemm, Relu, Gemm, Clip, Mul, Add, the last ones as needed."""
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
                weight, bias = layer.weight.detach().cpu(), layer.bias.detach().cpu()
                constants |= {f"w{k}": weight.numpy(), f"b{k}": bias.numpy()}
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
