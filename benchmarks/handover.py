"""Hand-over between expert and policy: how far the action steps at a switch, against what the certificates allow.

    python benchmarks/handover.py [--seconds 60] [--tolerance 0.1] [--bag FOLDER] [--plot docs/handover.png] [--json]

From a bag of a run (by default one that is made now: simulator and controller over ROS, with a tolerance tight enough
that the library and the policy take turns). At a switch the action moves by what the policy itself moves between the
two observations, and beyond that by at most the two answers' certified bounds, of which the policy's own is 0. So the
step that switching adds is measured with the policy run again on the recorded observations,

    added = |(action_k - action_(k-1)) - (policy(x_k) - policy(x_(k-1)))|  <=  bound_(k-1) + bound_k,

and compared without slack. Exit code 1 if one is larger.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from robot import Bench  # beside this file

from laws_ros.nodes.record import BagRecorder
from laws_ros.runtime.files import resolve
from laws_ros.runtime.policy import Policy

ARRAY, DECISION = "std_msgs/msg/Float64MultiArray", "controller/decision"


def record(seconds: float, tolerance: float, bag: Path) -> None:
    """Run the cart-pole and keep its decisions."""
    with Bench() as bench:
        recorder = BagRecorder(bench.node, bag, {DECISION: ARRAY})
        nodes = [bench.start("controller", tolerance=[tolerance]), bench.start("simulator", seed=3)]
        if not bench.until(lambda: len(bench.rows) > 10):
            (nodes[1] if nodes[0].running() else nodes[0]).complain()
        bench.spin(seconds)
        recorder.close()


def read(bag: Path) -> dict[str, np.ndarray]:
    """The recorded answers, in order: columns by name."""
    from rosbags.highlevel import AnyReader

    rows: list[list[float]] = []
    names: list[str] = []
    with AnyReader([bag]) as reader:
        wanted = [c for c in reader.connections if c.topic.endswith(DECISION)]
        for connection, _, raw in reader.messages(wanted):
            message: Any = reader.deserialize(raw, connection.msgtype)
            names = message.layout.dim[0].label.split(",")
            rows.append(message.data.tolist())
    if not rows:
        sys.exit(f"{bag}: no message on ~/decision")
    table = np.array(rows)
    table = table[table[:, names.index("region")] >= -1]  # answers; reactions have none
    kinds = [name.partition(":")[0] for name in names]
    picked = ("action", "bound", "observation")
    return {kind: table[:, [k == kind for k in kinds]] for kind in picked} | {
        name: table[:, names.index(name)] for name in ("step", "time_s", "region")
    }


def measure(answers: dict[str, np.ndarray], policy: Policy) -> dict[str, np.ndarray]:
    """Of every pair of neighbours in one run: the step added, what is certified, and whether a switch lies between."""
    own = np.array([policy.decide(policy(x)) for x in answers["observation"].astype(np.float32)], dtype=float)
    added = np.abs(np.diff(answers["action"] - own, axis=0))
    allowed = np.nextafter(answers["bound"][1:] + answers["bound"][:-1], np.inf)  # no smaller than the exact sum
    neighbours = np.diff(answers["step"]) == 1
    return {
        "added": added[neighbours],
        "allowed": allowed[neighbours],
        "switch": (np.diff(answers["region"] < 0) != 0)[neighbours],
        "step": np.abs(np.diff(answers["action"], axis=0))[neighbours],
        "policy_step": np.abs(np.diff(own, axis=0))[neighbours],
    }


def plot(answers: dict[str, np.ndarray], found: dict[str, np.ndarray], policy: Policy, out: Path) -> None:
    """Two pictures side by side: a few seconds of the run, and every switch against its bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    name, unit = policy.card.actions[0].name, policy.card.actions[0].unit
    switches = np.flatnonzero(found["switch"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2))
    middle = int(switches[len(switches) // 2])
    shown = slice(max(0, middle - 100), middle + 100)
    t, action = answers["time_s"][shown] - answers["time_s"][shown][0], answers["action"][shown, 0]
    bound, hit = answers["bound"][shown, 0], answers["region"][shown] >= 0
    left.fill_between(t, action - bound, action + bound, step="mid", alpha=0.3, label="certified: the policy is within")
    left.plot(t[hit], action[hit], ".", ms=4, label="expert")
    left.plot(t[~hit], action[~hit], ".", ms=4, color="tab:red", label="policy")
    left.set(xlabel="time [s]", ylabel=f"{name} [{unit}]", title="answers and their bounds")
    left.legend()
    x, y = found["allowed"][switches, 0], found["added"][switches, 0]
    least = max(1e-5, 0.5 * float(x[x > 0].min(initial=1.0)))  # what is smaller, is drawn here
    right.plot(x, np.maximum(y, least / 100), ".", ms=4, label=f"{len(switches)} switches")
    ends = np.array([least, x.max()])
    right.plot(ends, ends, "k-", lw=1, label="certified")
    right.set(xscale="log", yscale="log", xlabel=f"certified: sum of the two bounds [{unit}]")
    right.set(ylabel=f"step that switching added [{unit}]", title="at every switch")
    right.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--tolerance", type=float, default=0.1, help="N (default 0.1)")
    parser.add_argument("--bag", type=Path, help="a run that was recorded (`laws up --record`)")
    parser.add_argument("--policy", default="models/cartpole.onnx", help="that answered in it")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    policy = Policy(resolve(options.policy))
    if options.bag is not None:
        answers = read(options.bag)
    else:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="laws_handover_") as folder:
            record(options.seconds, options.tolerance, Path(folder) / "bag")
            answers = read(Path(folder) / "bag")
    found = measure(answers, policy)
    switch, unit = found["switch"], policy.card.actions[0].unit
    if not switch.any():
        sys.exit("no switch between expert and policy in this run: choose a smaller --tolerance")
    beyond = int((found["added"] > found["allowed"]).any(axis=1).sum())
    result = {
        "answers": len(answers["region"]),
        "hit_rate": float((answers["region"] >= 0).mean()),
        "switches": int(switch.sum()),
        "largest_added": float(found["added"][switch].max()),
        "largest_certified": float(found["allowed"][switch].max()),
        "largest_step_at_switches": float(found["step"][switch].max()),
        "largest_step_of_the_policy_there": float(found["policy_step"][switch].max()),
        "largest_step_elsewhere": float(found["step"][~switch].max()) if (~switch).any() else 0.0,
        "beyond": beyond,
    }
    if options.plot is not None:
        plot(answers, found, policy, options.plot)
    text = (
        f"{result['answers']} answers, {result['hit_rate']:.1%} of them by experts, {result['switches']} switches\n"
        f"switching added at most {result['largest_added']:.4f} {unit}, certified {result['largest_certified']:.4f}\n"
        f"largest step at a switch {result['largest_step_at_switches']:.3f} {unit}, of the policy alone "
        f"{result['largest_step_of_the_policy_there']:.3f}, without a switch {result['largest_step_elsewhere']:.3f}\n"
        f"{beyond} steps beyond what is certified"
    )
    print(json.dumps(result) if options.json else text)
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
