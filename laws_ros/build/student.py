"""What is trained: a network, the data that it has seen, and the loop that brings them together.

Its kinds are cacheable.py, a ReLU network that is cheap to cache, and diffusion.py, a black box; train.py is the door.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from laws_ros.core.card import Card

from .workloads import Rollouts, Workload, rollouts

Teacher = Callable[[NDArray[Any]], NDArray[Any]]  # observations [N, n] to actions [N, m] *before* they saturate


@dataclass(frozen=True)
class Lessons(ABC):
    """What the recipes of all kinds say.

    Attributes:
        steps, batch, learning_rate: of gradient descent; the rate falls to zero.
        rounds, episodes: DAgger rounds after the teacher's, episodes gathered for each.
        check_episodes, parity_samples: size of the final checks.
    """

    kind: ClassVar[str]  # as `laws train --policy` has it

    steps: int
    batch: int
    learning_rate: float
    rounds: int
    episodes: int
    check_episodes: int
    parity_samples: int

    @abstractmethod
    def student(self, workload: Workload, teacher: Teacher, card: Card, seed: int) -> Student:
        """A network to be trained so; its initial weights come from torch's own generator."""


class Student(ABC):
    """DAgger (Ross et al. 2011): the teacher drives first, then the network; the teacher labels, everything is kept.

    Attributes:
        net, optimizer, schedule: what a kind sets up. device: of the net once it is trained: a GPU where there is one.
        data: [N, n] observations so far. moved: [n] standard deviations by which the parity check moves them.
    """

    seeds: ClassVar[int] = 0  # added to those of the episodes that are gathered
    net: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def __init__(self, workload: Workload, teacher: Teacher, card: Card, recipe: Lessons, seed: int) -> None:
        self.workload, self.teacher, self.card, self.recipe, self.seed = workload, teacher, card, recipe, seed
        self.rng = np.random.default_rng(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.data = np.zeros((0, len(card.observations)), np.float32)
        self.moved: NDArray[Any] = np.zeros(len(card.observations))
        self.step = 0

    @abstractmethod
    def __call__(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """The policy itself: physical observations [N, n] to physical actions [N, m]."""

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """An array, where the network is."""
        return torch.from_numpy(array).to(self.device)

    def demonstrate(self, observations: NDArray[np.float32]) -> NDArray[Any]:
        """What drives in the first round."""
        return self.teacher(observations)

    @abstractmethod
    def learn_from(self, found: Rollouts) -> None:
        """Add episodes, labelled by the teacher; the first time, fix the normalisation."""

    @abstractmethod
    def loss(self, rows: NDArray[np.intp]) -> Tensor:
        """Of one batch: these rows of the data."""

    @abstractmethod
    def progress(self) -> str:
        """A line about the last batch."""

    @abstractmethod
    def export(self, path: Path) -> None:
        """Write the policy as an ONNX graph: opset 17, float32, free batch."""

    def figures(self) -> dict[str, Any]:
        """What the manifest says of this kind alone."""
        return {}

    def run(self, driver: Teacher, episodes: int, seed: int) -> Rollouts:
        """Episodes under a policy, decided as the card says."""
        sign = {"argmax": 1.0, "argmin": -1.0}.get(self.card.decision)
        act = driver if sign is None else lambda x: np.argmax(sign * driver(x), axis=1)[:, None]
        return rollouts(self.workload, act, episodes, seed)

    def gather(self, round_: int) -> None:
        """The episodes of one round."""
        driver = self if round_ else self.demonstrate
        self.learn_from(self.run(driver, self.recipe.episodes, self.seed * 1000 + self.seeds + round_))

    def fit(self, steps: int, log: Callable[[str], None]) -> None:
        """Gradient descent on what was gathered."""
        for _ in range(steps):
            loss = self.loss(self.rng.integers(len(self.data), size=self.recipe.batch))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.step += 1
            if self.step % max(1, self.recipe.steps // 20) == 0:
                log(f"step {self.step}: {self.progress()}")
