"""Train a black-box policy: a diffusion policy that no verifier here can bound, the case for statistical certificates.

After Chi et al. 2023 (arXiv:2303.04137): a network denoises a chunk of future actions, conditioned on the observation
by FiLM layers (their scales multiply features, so the graph is not a chain of affine maps and bends). The schedule is
fixed (DDIM, Song et al. 2021, from one constant noise), so the policy is a function, and all of it is in the ONNX
graph. Of the chunk the first action is executed (receding horizon).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laws_ros.core.card import Card

from .student import Lessons, Student, Teacher
from .workloads import Rollouts, Workload


@dataclass(frozen=True)
class Recipe(Lessons):
    """How to train, with AdamW and a cosine.

    Attributes:
        hidden, blocks: width and number of the residual blocks.
        chunk: actions that are predicted together.
        levels: noise levels in training; `denoising`: how many of them the policy goes through.
        average: decay of the exponential average of the weights, which is what is exported.
        jitter: standard deviation, as a share of the range, of noise on the teacher's actions in half of its episodes.
    """

    kind: ClassVar[str] = "diffusion"

    hidden: int = 480
    blocks: int = 4
    chunk: int = 8
    levels: int = 100
    denoising: int = 5
    steps: int = 6000
    batch: int = 256
    learning_rate: float = 8e-4
    average: float = 0.998
    rounds: int = 2
    episodes: int = 40
    jitter: float = 0.1
    check_episodes: int = 50
    parity_samples: int = 5000

    def student(self, workload: Workload, teacher: Teacher, card: Card, seed: int) -> DiffusionStudent:
        return DiffusionStudent(workload, teacher, card, self, seed)


class _Block(nn.Module):
    """Residual block whose features the condition scales and shifts (FiLM, Perez et al. 2018)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.film = nn.Linear(hidden, 2 * hidden)
        nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).chunk(2, dim=-1)
        return features + self.second(nn.functional.silu(self.first(features) * (1.0 + scale) + shift))


class DiffusionNet(nn.Module):
    """Observation to action, through `denoising` passes of the denoiser; actions are in units of their limit.

    Args:
        values: [n] lists of the values of discrete observations, None for continuous ones.
    """

    noise: Tensor
    mean: Tensor
    scale: Tensor
    limit: Tensor
    keep: Tensor

    def __init__(self, values: list[list[float] | None], limit: NDArray[np.float32], recipe: Recipe) -> None:
        super().__init__()
        self.recipe, hidden = recipe, recipe.hidden
        self.values = [(k, v) for k, v in enumerate(values) if v is not None]
        continuous = [k for k, v in enumerate(values) if v is None]
        self.width = recipe.chunk * len(limit)
        inputs = len(continuous) + sum(len(v) for _, v in self.values)
        self.encoder = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.level = nn.Sequential(nn.Linear(32, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.enter = nn.Linear(self.width, hidden)
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(recipe.blocks))
        self.leave = nn.Linear(hidden, self.width)
        self.register_buffer("keep", torch.tensor(continuous))
        self.register_buffer("mean", torch.zeros(len(continuous)))
        self.register_buffer("scale", torch.ones(len(continuous)))
        self.register_buffer("limit", torch.from_numpy(limit))
        self.register_buffer("noise", torch.randn(1, self.width))

    def condition(self, observations: Tensor) -> Tensor:
        """What the denoiser is told of observations [N, n]: discrete ones one-hot, by nearest value."""
        parts = [(observations[:, self.keep] - self.mean) * self.scale]
        for column, values in self.values:
            gap = observations[:, column : column + 1] - torch.tensor(values, device=observations.device)
            parts.append((gap.abs() < 0.5).float())
        return self.encoder(torch.cat(parts, dim=1))

    def clean(self, noisy: Tensor, level: Tensor, condition: Tensor) -> Tensor:
        """The denoiser's guess [N, chunk m] at the actions behind noisy ones, at levels [N, 1] in (0, 1]."""
        waves = level * (2.0 ** torch.arange(16, device=level.device)) * 0.5
        told = condition + self.level(torch.cat([torch.sin(waves), torch.cos(waves)], dim=1))
        features = self.enter(noisy)
        for block in self.blocks:
            features = block(features, told)
        return self.leave(features)

    def forward(self, observations: Tensor) -> Tensor:
        """Physical observations [N, n] to physical actions [N, m]."""
        condition = self.condition(observations)
        noisy = self.noise + torch.zeros_like(condition[:, :1])
        for k in range(self.recipe.denoising, 0, -1):
            here, following = (signal(j / self.recipe.denoising) for j in (k, k - 1))
            level = torch.full_like(noisy[:, :1], k / self.recipe.denoising)
            guess = self.clean(noisy, level, condition).clamp(-1.0, 1.0)
            noise = (noisy - here * guess) / (1.0 - here**2) ** 0.5
            noisy = following * guess + (1.0 - following**2) ** 0.5 * noise
        return noisy[:, : len(self.limit)].clamp(-1.0, 1.0) * self.limit


def signal(level: float) -> float:
    """How much of the clean actions is left at a noise level in [0, 1] (cosine schedule, Nichol & Dhariwal 2021)."""
    return float(np.cos(0.5 * np.pi * 0.99 * level))


class DiffusionStudent(Student):
    """Actions are in units of their limit; what is exported is the average of the weights."""

    seeds = 500
    recipe: Recipe
    net: DiffusionNet

    def __init__(self, workload: Workload, teacher: Teacher, card: Card, recipe: Recipe, seed: int) -> None:
        super().__init__(workload, teacher, card, recipe, seed)
        self.limit = np.array([c.high for c in card.actions], np.float32)
        values = [
            [float(v) for v in range(int(c.low), int(c.high) + 1)] if c.name in card.context else None
            for c in card.observations
        ]
        self.net = DiffusionNet(values, self.limit, recipe).to(self.device)
        self.averaged = copy.deepcopy(self.net)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.learning_rate, total_steps=recipe.steps + 1, pct_start=0.05
        )
        self.optimizer.register_step_pre_hook(self._clip)
        self.optimizer.register_step_post_hook(self._average)
        self.chunks = np.zeros((0, self.net.width), np.float32)

    def __call__(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """The policy itself: physical observations [N, n] to physical actions [N, m]."""
        with torch.no_grad():
            answer: NDArray[np.float32] = self.averaged(self.tensor(observations)).cpu().numpy()
        return answer

    def demonstrate(self, observations: NDArray[np.float32]) -> NDArray[Any]:
        """The teacher, half of the lanes with disturbed actions."""
        noise = self.rng.normal(0.0, self.recipe.jitter, (len(observations), len(self.limit)))
        noise[::2] = 0.0
        return self.teacher(observations) + noise * self.limit

    def learn_from(self, found: Rollouts) -> None:
        first = not len(self.data)
        for observations in found.observations:
            wanted = np.clip(self.teacher(observations) / self.limit, -1.0, 1.0).astype(np.float32)
            ahead = np.minimum(np.arange(len(wanted))[:, None] + np.arange(self.recipe.chunk), len(wanted) - 1)
            self.data = np.concatenate([self.data, observations])
            self.chunks = np.concatenate([self.chunks, wanted[ahead].reshape(len(wanted), -1)])
        if first:
            moving = torch.from_numpy(self.data)[:, self.net.keep.cpu()]
            for net in (self.net, self.averaged):
                net.mean.copy_(moving.mean(0))
                net.scale.copy_(1.0 / moving.std(0))

    def loss(self, rows: NDArray[np.intp]) -> Tensor:
        recipe = self.recipe
        x, clean = self.tensor(self.data[rows]), self.tensor(self.chunks[rows])
        level = self.tensor(self.rng.integers(1, recipe.levels + 1, (recipe.batch, 1)) / recipe.levels).float()
        kept = torch.cos(0.5 * torch.pi * 0.99 * level)
        noisy = kept * clean + (1.0 - kept**2).sqrt() * torch.randn_like(clean)
        loss = (self.net.clean(noisy, level, self.net.condition(x)) - clean).square().mean()
        self._last = rows, loss.item()
        return loss

    def progress(self) -> str:
        rows, loss = self._last
        error = np.abs(self(self.data[rows]) / self.limit - self.chunks[rows, : len(self.limit)])
        return f"loss {loss:.5f}, first action's mean error {error.mean():.4f}"

    def _clip(self, *_: object) -> None:
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)

    def _average(self, *_: object) -> None:
        """Exponential average of the weights, at first the plain mean."""
        share = max(1.0 - self.recipe.average, 1.0 / (self.step + 1))
        with torch.no_grad():
            for mine, theirs in zip(self.averaged.parameters(), self.net.parameters(), strict=True):
                mine.lerp_(theirs, share)

    def export(self, path: Path) -> None:
        """The whole denoising schedule as one graph."""
        self.averaged.eval()
        torch.onnx.export(
            copy.deepcopy(self.averaged).cpu(),
            (torch.from_numpy(self.data[:2]),),
            str(path),
            input_names=["observation"],
            output_names=["action"],
            dynamic_axes={"observation": {0: "batch"}, "action": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
