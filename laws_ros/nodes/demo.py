"""The main job: simulator and controller as two processes on real ROS 2 topics, watched live and checked afterwards.

The check believes nothing that the controller says about the policy: every answer it published is compared with what
the policy, run again here through ONNX Runtime, says at the very observation that was answered.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from numpy.typing import NDArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from std_msgs.msg import Float64MultiArray, UInt64

from laws_ros.build import workloads
from laws_ros.build.evaluate import check_fit, policy_rollouts
from laws_ros.core.errors import ConfigError, LibraryError
from laws_ros.core.safety import POLICY
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.files import resolve, share_path

from .processes import START_TIMEOUT_S, Child, interrupts, live_view, private_domain
from .ros import RECORD_QOS, columns_of

DECISION, EPISODE = "controller/decision", "simulator/episode"
Table = dict[str, NDArray[np.float64]]


def run(
    seconds: float = 30.0,
    library: str | None = None,
    policy: str | None = None,
    workload: str = "cartpole",
    seed: int = 0,
    json: bool = False,
) -> tuple[dict[str, Any], int]:
    """Run the demonstration, showing it live on stdout (stderr if `json`).

    Args:
        seconds: of simulated operation; Ctrl-C ends it earlier. library, policy: by default models/WORKLOAD.*.

    Returns:
        The summary, and the exit code: 0 if every answer kept its bound, else 1.

    Raises:
        LawsError: something is missing or does not fit together.
    """
    out = sys.stderr if json else sys.stdout
    policy_path = resolve(policy or f"models/{workload}.onnx")
    library_path = resolve(library or f"models/{workload}.laws")
    if not library_path.exists():
        command = f"laws build --policy {policy_path} --workload {workload} --out {library_path}"
        raise LibraryError(f"{library_path}: no such library; make it with: {command}")
    parameters = share_path(f"config/{workload}.yaml")
    if not parameters.exists():
        raise ConfigError(f"{parameters}: not found; it holds the nodes' parameters for workload {workload!r}")
    if not seconds > 0:
        raise ConfigError(f"seconds: {seconds:g} is no duration; more than 0 is needed")
    with interrupts() as interrupted, tempfile.TemporaryDirectory(prefix="laws_demo_") as logs:
        # A domain of its own: robots and other demonstrations on the network neither see nor disturb this one.
        os.environ |= {"ROS_DOMAIN_ID": private_domain(), "ROS_LOG_DIR": logs}
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
        if os.environ.get("ROS_DISTRO") == "humble":
            os.environ["ROS_LOCALHOST_ONLY"] = "1"
        recorder, nodes = Recorder(), []
        try:
            # The shipped binding is for the shipped policy only; another one's fields are named by its card.
            other: dict[str, Any] = {"binding": "", "controller_name": workload} if policy else {}
            files: dict[str, Any] = {"policy": str(policy_path), "library": str(library_path)}
            controller = Child("controller", parameters, log=Path(logs) / "controller", **files, **other)
            nodes.append(controller)
            cached = CachedPolicy.open(library_path, policy_path)
            check_fit(cached.policy, workloads.get(workload))
            domain = f"ROS_DOMAIN_ID={os.environ['ROS_DOMAIN_ID']}"
            print(f"{workload}: library {cached.library.digest}, {len(cached.library)} regions, {domain}", file=out)
            # Nothing moves until the controller's decisions are seen, so that the very first one is checked, too.
            recorder.wait_for(controller, interrupted)
            times: dict[str, Any] = {"seed": seed, "duration_s": float(seconds)}
            simulator = Child("simulator", parameters, log=Path(logs) / "simulator", **times, **other)
            nodes.append(simulator)
            with live_view(out) as show:
                while simulator.running() and not interrupted():
                    if not controller.running():
                        controller.complain()
                    recorder.spin(0.2)
                    if facts := status(recorder, cached, seconds):
                        show(facts)
            if interrupted():
                print("interrupted", file=out)
            elif simulator.process.returncode:
                simulator.complain()
            recorder.spin(0.3)
        finally:
            for node in nodes:
                node.end()
            recorder.close()
    answers, episodes = recorder.answers(), recorder.table(EPISODE)
    if not answers or not episodes:
        print("ended before the first answer", file=out)
        return {"workload": workload, "steps": 0}, 0 if interrupted() else 1
    summary = {
        "workload": workload,
        "seconds": float(episodes["time_s"][-1]),
        **summarize(answers, cached),
        **check(answers, cached),
        "held": int(episodes["held"][-1]),
        **compare_returns(episodes, cached, workload, seed),
    }
    print(sentences(summary, cached), file=out)
    return summary, 0 if summary["every_answer_kept_its_bound"] else 1


class Recorder:
    """A node that keeps every row of the controller's decisions and of the simulator's steps."""

    def __init__(self) -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, signal_handler_options=SignalHandlerOptions.NO)
        self._node = Node("laws_demo", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self._rows: dict[str, list[Any]] = {DECISION: [], EPISODE: []}
        self._names: dict[str, list[str]] = {}
        for topic in self._rows:
            self._node.create_subscription(Float64MultiArray, topic, self._keeper(topic), RECORD_QOS)
        self._heartbeats: list[UInt64] = []
        self._node.create_subscription(UInt64, "controller/heartbeat", self._heartbeats.append, 10)

    def _keeper(self, topic: str) -> Callable[[Float64MultiArray], None]:
        def keep(message: Float64MultiArray) -> None:
            self._names[topic] = columns_of(message)
            self._rows[topic].append(message.data)

        return keep

    def spin(self, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while (left := end - time.monotonic()) > 0:
            self._executor.spin_once(timeout_sec=left)

    def wait_for(self, controller: Child, interrupted: Callable[[], bool]) -> None:
        """Until every decision of the controller arrives here.

        That they are announced here does not say that the controller knows of this subscription, too. But a heartbeat
        comes from an active controller that knows of that subscription, which was announced after the decisions'.
        """
        end = time.monotonic() + START_TIMEOUT_S
        while not ((self._heartbeats and self._node.count_publishers(DECISION)) or interrupted()):
            if not controller.running() or time.monotonic() > end:
                controller.complain()
            self.spin(0.05)

    def table(self, topic: str) -> Table:
        """A topic's columns by name; those named "kind:..." together, [rows, columns], as "kind". Empty: no rows."""
        if not self._rows[topic]:
            return {}
        data, result = np.array(self._rows[topic]), {}
        kinds = [name.partition(":")[0] for name in self._names[topic]]
        for name in dict.fromkeys(kinds):
            columns = data[:, [kind == name for kind in kinds]]
            result[name] = columns if f"{name}:" in ",".join(self._names[topic]) else columns[:, 0]
        return result

    def answers(self) -> Table:
        """The controller's decisions without its reactions, which answer no observation."""
        table = self.table(DECISION)
        given = table["region"] >= POLICY if table else np.zeros(0, bool)
        return {name: column[given] for name, column in table.items()} if given.any() else {}

    def close(self) -> None:
        self._node.destroy_node()
        self._context.try_shutdown()


def percentiles(values: NDArray[np.float64]) -> dict[str, float | None]:
    if not len(values):
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return {"p50": round(p50, 1), "p99": round(p99, 1)}


def summarize(answers: Table, cached: CachedPolicy) -> dict[str, Any]:
    """What the controller reports about its answers."""
    hit: NDArray[np.bool_] = answers["region"] >= 0
    return {
        "steps": len(hit),
        "hit_rate": float(hit.mean()),
        "regions": len(cached.library),
        "regions_used": len(np.unique(answers["region"][hit])),
        "tolerance": cached.tolerance.tolist(),
        "hit_us": percentiles(answers["lookup_us"][hit]),
        "policy_us": percentiles(answers["policy_us"][~hit]),
        "latency_us": percentiles(answers["latency_us"]),
        "deadline_misses": int(answers["deadline_misses"][-1]),
    }


def check(answers: Table, cached: CachedPolicy) -> dict[str, Any]:
    """Compare every answer with the policy's own: |action - policy(observation)| <= bound <= tolerance, without slack.

    A bound covers the policy in any order of summation, so hits may be checked in batches. An answer of the policy
    itself has the bound 0 and is repeated exactly as it was made.
    """
    hit = answers["region"] >= 0
    observations = answers["observation"].astype(np.float32)
    action, bound = answers["action"], answers["bound"]
    own = np.empty_like(action)
    own[hit] = cached.policy.decide(cached.policy.batch(observations[hit]))
    own[~hit] = np.array([cached.fallback(x).action for x in observations[~hit]]).reshape(-1, action.shape[1])
    error = np.abs(action - own)
    kept = np.all(error <= bound, axis=1)
    if "tolerance" in answers:
        kept &= np.all(bound <= answers["tolerance"], axis=1)
    unrecorded = int(answers["step"][-1]) - len(kept)
    return {
        "violations": int((~kept).sum()),
        "unrecorded": unrecorded,
        "largest_error": error.max(axis=0).tolist(),
        "largest_bound": bound.max(axis=0).tolist(),
        "worst_error_over_bound": float((error[hit] / np.maximum(bound[hit], 1e-300)).max()) if hit.any() else None,
        "every_answer_kept_its_bound": bool(kept.all()) and unrecorded == 0,
    }


def compare_returns(episodes: Table, cached: CachedPolicy, workload: str, seed: int) -> dict[str, Any]:
    """The simulator's return against the policy alone, offline, in the same episodes; the last one may be cut short."""
    last = {int(k): i for i, k in enumerate(episodes["episode"])}
    alone = policy_rollouts(cached.policy, workloads.get(workload), max(last) + 1, seed)
    return_policy = 0.0
    for episode, row in last.items():
        ended = bool(episodes["ended"][row])
        return_policy += float(alone.rewards[episode][: None if ended else int(episodes["step"][row])].sum())
    return {
        "episodes": len(last),
        "return_cached": float(sum(episodes["return"][row] for row in last.values())),
        "return_policy": return_policy,
    }


def sentences(s: dict[str, Any], cached: CachedPolicy) -> str:
    """The summary for people."""

    def us(key: str) -> str:
        return "none" if s[key]["p50"] is None else f"{s[key]['p50']:.0f} / {s[key]['p99']:.0f} us"

    units = [c.unit for c in cached.card.actions]
    errors, bounds = (
        ", ".join(f"{v:.3g} {u}".strip() for v, u in zip(s[key], units, strict=False))
        for key in ("largest_error", "largest_bound")
    )
    verdict = f"YES: all {s['steps']} answers kept their bound"
    if not s["every_answer_kept_its_bound"]:
        verdict = (
            f"NO: of {s['steps']} answers {s['violations']} broke their bound, {s['unrecorded']} were not recorded"
        )
    ratio = s["return_cached"] / s["return_policy"] if s["return_policy"] else float("nan")
    return "\n".join(
        [
            f"{s['steps']} answers in {s['seconds']:.1f} s, {s['hit_rate']:.2%} of them from the library "
            f"({s['regions_used']} of its {s['regions']} regions), the rest by the policy",
            f"latency p50 / p99: hit {us('hit_us')}, policy {us('policy_us')}, message in to command out "
            f"{us('latency_us')}; {s['deadline_misses']} deadlines missed, {s['held']} ticks without a command",
            f"return {s['return_cached']:.1f} in {s['episodes']} episodes, of the policy alone "
            f"{s['return_policy']:.1f} ({ratio:.2%})",
            f"{verdict} (largest error {errors}, largest bound {bounds})",
        ]
    )


def status(recorder: Recorder, cached: CachedPolicy, seconds: float) -> dict[str, str]:
    """The newest answer and the statistics so far, for the live view."""
    answers, episodes = recorder.answers(), recorder.table(EPISODE)
    if not answers or not episodes:
        return {}
    s = summarize(answers, cached)
    region = int(answers["region"][-1])
    unit = cached.card.actions[0].unit

    def vector(name: str) -> str:
        return " ".join(f"{v:.3g}" for v in answers[name][-1]) + f" {unit}" if name in answers else "exact"

    def us(name: str) -> str:
        return "none" if s[name]["p50"] is None else f"{s[name]['p50']:.0f} / {s[name]['p99']:.0f} us"

    return {
        "time": f"{episodes['time_s'][-1]:.1f} of {seconds:g} s",
        "source": "the policy" if region < 0 else f"region {cached.library.ids[region]}",
        "bound": vector("bound"),
        "tolerance": vector("tolerance"),
        "hits": f"{s['hit_rate']:.1%}",
        "hit p50 / p99": us("hit_us"),
        "policy p50 / p99": us("policy_us"),
        "deadline misses": str(s["deadline_misses"]),
        "return": f"{episodes['return'][-1]:.1f}, episode {int(episodes['episode'][-1])}",
    }
