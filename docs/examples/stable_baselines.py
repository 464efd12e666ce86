#!/usr/bin/env python3
"""A Stable-Baselines3 policy with discrete actions: a hit is provably the very action that the network would take.

Needs `pip install stable-baselines3` beside `laws_ros[gym,train]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from stable_baselines3 import DQN

from laws_ros.cli import main as laws


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("example"), help="folder (default %(default)s)")
    options.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path, library = given.out / "dqn.onnx", given.out / "dqn.laws"

    model = DQN("MlpPolicy", "CartPole-v1", seed=0, device="cpu", learning_starts=200, train_freq=4)
    model.learn(1000 if given.quick else 50_000)
    values = model.policy.q_net.eval()  # one output per action; the largest decides
    torch.onnx.export(
        values, (torch.zeros(1, 4),), str(path), input_names=["observation"], output_names=["action"],
        dynamic_axes={"observation": {0: "batch"}, "action": {0: "batch"}}, dynamo=False,
    )  # fmt: skip

    steps, samples, episodes = ("1500", "2000", "2") if given.quick else ("50000", "100000", "20")
    world = ["--policy", str(path), "--workload", "gym:CartPole-v1"]
    code = (
        laws(["build", *world, "--decision", "argmax", "--steps", steps, "--max-regions", "300", "--out", str(library)])
        or laws(["verify", str(library), "--policy", str(path), "--samples", samples, "--attack"])
        or laws(["eval", str(library), *world, "--episodes", episodes])
    )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
