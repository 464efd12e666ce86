"""How much history a policy needs that sees positions only: a window of frames of the cart-pole without velocities.

Its network (random tanh features, linear readout by least squares) imitates the cart-pole's policy from the positions
of the last frames alone; then build/history_length.py measures which of them it really uses.

    python benchmarks/history_length.py --frames 16
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from laws_ros.build import workloads
from laws_ros.build.evaluate import policy_rollouts
from laws_ros.build.history_length import history_length
from laws_ros.runtime.files import resolve
from laws_ros.runtime.policy import Policy

FEATURES = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--distortion", type=float, default=0.5, help="N, of a range of 20 N (default 0.5)")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    teacher = Policy(resolve("models/cartpole.onnx"))
    runs = policy_rollouts(teacher, workloads.get("cartpole"), options.episodes, options.seed)
    windows, wanted, k = [], [], options.frames
    for x, y in zip(runs.observations, runs.actions, strict=True):
        places = np.stack([x[j : len(x) - k + 1 + j, :2] for j in range(k)], axis=1)
        windows.append(places.reshape(len(places), -1))
        wanted.append(y[k - 1 :])
    seen, answers = np.concatenate(windows), np.concatenate(wanted)
    rng = np.random.default_rng(options.seed)
    weight = rng.normal(size=(2 * k, FEATURES)) / seen.std(axis=0)[:, None] / np.sqrt(8 * k)
    bias = rng.normal(size=FEATURES)
    features = np.tanh(seen @ weight + bias)
    readout = np.linalg.solve(features.T @ features + 1e-3 * np.eye(FEATURES), features.T @ answers)
    constants = {"w": weight, "b": bias, "r": readout}
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["observation", "w", "b"], ["z"]),
            helper.make_node("Tanh", ["z"], ["h"]),
            helper.make_node("MatMul", ["h", "r"], ["action"]),
        ],
        "student",
        [helper.make_tensor_value_info("observation", TensorProto.FLOAT, ["batch", 2 * k])],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "student.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
        student = Policy(path)
        found = history_length(student, windows, k, np.array([options.distortion]))
        rms = float(np.sqrt(np.mean((student.batch(seen) - answers) ** 2)))
    if options.json:
        print(json.dumps(asdict(found) | {"rms_from_the_teacher": rms}))
        return
    print(f"rms from the cart-pole's policy {rms:.2f} N; {found.observations} observations; in targets:")
    print("| frames | mean distortion | 99% | what the next older frame adds |\n| --- | --- | --- | --- |")
    rows = zip(found.distortion, found.distortion_99, [*found.sensitivity, 0.0], strict=True)
    for frames, (mean, most, adds) in enumerate(rows, start=1):
        print(f"| {frames} | {mean:.3f} | {most:.3f} | {adds:.3f} |")
    for law in found.laws:
        print(f"{law.name}: rate {law.rate:.3f}, AIC {law.aic:.1f}")
    print(f"window {found.window} of {found.frames}; clear which law: {found.decided}")


if __name__ == "__main__":
    main()
