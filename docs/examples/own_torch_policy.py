#!/usr/bin/env python3
"""A torch policy of one's own: trained so that it is cheap to cache, exported, described, certified, driven.

The teacher here is an optimal controller of the cart-pole; yours may be anything that gives actions. The network is
small: what it shows is the way, not the speed (a lookup costs as much as such a network).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from laws_ros.build import cartpole
from laws_ros.build.regularizers import Cacheability
from laws_ros.cli import main as laws

CARD = """\
name: own
observations:
- {name: slider.position, unit: m, low: -2.0, high: 2.0}
- {name: hinge.position, unit: rad, low: -1.6, high: 1.6}
- {name: slider.velocity, unit: m/s, low: -10.0, high: 10.0}
- {name: hinge.velocity, unit: rad/s, low: -30.0, high: 30.0}
actions:
- {name: slider.effort, unit: N, low: -10.0, high: 10.0}
"""
SPREAD = torch.tensor([0.4, 0.15, 0.7, 1.0])  # of the states it is trained on
FORCE = 10.0  # N


class Policy(nn.Module):
    """Normalisation and limits are inside, so they are inside the certificate."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", 1.0 / SPREAD)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return (FORCE * self.net(observation * self.scale)).clamp(-FORCE, FORCE)


def train(steps: int) -> Policy:
    torch.manual_seed(0)
    states = torch.randn(20_000, 4) * SPREAD
    wanted = torch.as_tensor(cartpole.teacher()(states.numpy()).clip(-FORCE, FORCE) / FORCE, dtype=torch.float32)
    net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    inputs, penalty = states / SPREAD, Cacheability(torch.randn(2000, 4))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(states), (256,))
        answer = net(inputs[rows]).clamp(-1.2, 1.2)
        loss = (answer - wanted[rows]).square().mean() + penalty(net, inputs[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Policy(net).eval()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("example"), help="folder (default %(default)s)")
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path, library = given.out / "own.onnx", given.out / "own.laws"

    policy = train(800 if given.quick else 6000)
    torch.onnx.export(
        policy, (torch.zeros(1, 4),), str(path), input_names=["observation"], output_names=["action"],
        dynamic_axes={"observation": {0: "batch"}, "action": {0: "batch"}}, dynamo=False,
    )  # fmt: skip
    path.with_suffix(".yaml").write_text(CARD)

    steps, episodes = ("5000", "1") if given.quick else ("100000", "20")
    world = ["--policy", str(path), "--workload", "cartpole"]
    code = laws(["build", *world, "--steps", steps, "--tolerance", "5%", "--out", str(library)])
    raise SystemExit(code or laws(["eval", str(library), *world, "--episodes", episodes]))


if __name__ == "__main__":
    main()
