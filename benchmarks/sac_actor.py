"""A policy that nobody trained for being cached: the actor of a plain Stable-Baselines3 SAC, as ONNX.

    python benchmarks/sac_actor.py --out actor.onnx --seconds 2400            # trains one on HalfCheetah-v5
    python benchmarks/sac_actor.py --out actor.onnx --state policy.pth        # or takes a saved policy's weights

`policy.pth` is the file of that name inside a zip that `SAC.save` wrote, for example of DLR-RM/rl-trained-agents.
Needs torch, and stable-baselines3 for training. The actor is the mean action: Gemm, Relu, Gemm, Relu, Gemm, Tanh.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

LAYERS = (("actor.latent_pi.0", "Relu"), ("actor.latent_pi.2", "Relu"), ("actor.mu", "Tanh"))


def train(env_id: str, seconds: float, seed: int) -> dict[str, NDArray[Any]]:
    """Stable-Baselines3's defaults for that long; the policy's state."""
    import gymnasium
    import torch
    from stable_baselines3 import SAC
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        def __init__(self) -> None:
            super().__init__()
            self.end, self.total = time.monotonic() + seconds, 0.0

        def _on_step(self) -> bool:
            self.total += float(self.locals["rewards"][0])
            if self.locals["dones"][0]:
                print(f"step {self.num_timesteps}: return {self.total:.0f}", file=sys.stderr, flush=True)
                self.total = 0.0
            return time.monotonic() < self.end

    torch.set_num_threads(1)
    model = SAC("MlpPolicy", gymnasium.make(env_id), seed=seed, device="cpu", learning_starts=5000)
    model.learn(10**9, callback=Clock())
    return {name: value.numpy() for name, value in model.policy.state_dict().items()}


def load(path: str) -> dict[str, NDArray[Any]]:
    """The state of a saved policy."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: value.numpy() for name, value in state.items()}


def export(state: dict[str, NDArray[Any]], path: str | Path) -> None:
    """Write the actor of an SAC policy's state as ONNX."""
    nodes, constants, source = [], [], "observation"
    for k, (name, function) in enumerate(LAYERS):
        for part in ("weight", "bias"):
            value = state[f"{name}.{part}"].astype(np.float32)
            constants.append(numpy_helper.from_array(value, f"{part}{k}"))
        nodes.append(helper.make_node("Gemm", [source, f"weight{k}", f"bias{k}"], [f"z{k}"], transB=1, name=f"gemm{k}"))
        source = f"h{k}" if k + 1 < len(LAYERS) else "action"
        nodes.append(helper.make_node(function, [f"z{k}"], [source], name=f"function{k}"))
    inputs, outputs = state[f"{LAYERS[0][0]}.weight"].shape[1], state[f"{LAYERS[-1][0]}.weight"].shape[0]
    graph = helper.make_graph(
        nodes,
        "actor",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", inputs])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", outputs])],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    onnx.save(model, str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--state", help="policy.pth of a saved SAC policy; trains one if not given")
    parser.add_argument("--env", default="HalfCheetah-v5")
    parser.add_argument("--seconds", type=float, default=2400.0, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    state = load(options.state) if options.state else train(options.env, options.seconds, options.seed)
    export(state, options.out)


if __name__ == "__main__":
    main()
