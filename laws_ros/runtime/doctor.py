"""What this machine has, and whether it keeps the assumptions that certificates rest on.

Certificates are statements about float32 programs run by ONNX Runtime's CPU provider (docs/soundness.md). Here the
assumptions are tried on the very machine that will run them, next to what a controller needs: clock, permissions, time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.errors import LawsError
from laws_ros.core.functions import FUNCTIONS
from laws_ros.core.network import Elementwise

from .cached_policy import CachedPolicy
from .onnx_graph import load_network
from .policy import Policy
from .sessions import session

PACKAGES = ("numpy", "onnx", "onnxruntime", "pyyaml", "numba", "mujoco", "gymnasium", "torch")
NEEDED = PACKAGES[:4]


class Finding(NamedTuple):
    """One line of the doctor's report; verdict "ok", "note" (worth knowing) or "fail" (do not run like this)."""

    verdict: str
    topic: str
    text: str


def examine(policy_path: str | Path | None = None, library_path: str | Path | None = None) -> list[Finding]:
    """Look at the machine, and at a policy and its library if they are given.

    Raises:
        LawsError: the policy or the library cannot be opened, or they do not belong together.
    """
    findings = [*_software(), *_arithmetic(), *_clock(), *_permissions()]
    if policy_path is not None:
        policy = Policy(policy_path)
        findings += [*_functions(policy), *_providers(policy)]
        if library_path is not None:
            findings += _latency(CachedPolicy.open(library_path, policy_path))
    return findings


def _software() -> list[Finding]:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    found = [Finding("ok", "machine", machine)]
    for name in PACKAGES:
        try:
            found.append(Finding("ok", name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            missing = f"not installed; pip install {name}"
            found.append(Finding("fail" if name in NEEDED else "note", name, missing))
    if importlib.util.find_spec("rclpy") is None:
        found.append(Finding("note", "ROS 2", "rclpy cannot be imported: source ROS's setup file, or pip install it"))
    else:
        where = f"ROS_DISTRO {os.environ.get('ROS_DISTRO', 'not set')}, domain {os.environ.get('ROS_DOMAIN_ID', '0')}"
        found.append(Finding("ok", "ROS 2", f"rclpy is there; {where}"))
    return found


def _run(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[np.float32]], x: NDArray[np.float32]) -> NDArray:
    """A little graph from x to y, run as policies are."""
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    result: NDArray = session(model.SerializeToString(), "probe").run(None, {"x": x})[0]
    return result


def _arithmetic() -> list[Finding]:
    """Matrix products of any size err by at most gamma_n, and Relu does not round."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for inputs in (3, 17, 256, 2048):
        weight = (rng.normal(size=(64, inputs)) * 10.0 ** rng.uniform(-6, 6, (64, inputs))).astype(np.float32)
        x = (rng.normal(size=(1, inputs)) * 10.0 ** rng.uniform(-3, 3, inputs)).astype(np.float32)
        got = _run([helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)], {"w": weight}, x)[0]
        terms = weight.astype(float) * x.astype(float)
        allowed = inputs * 2.0**-24 / (1 - inputs * 2.0**-24) * np.abs(terms).sum(axis=1)
        worst = max(worst, float((np.abs(got - terms.sum(axis=1)) / allowed).max()))
    text = f"float32 sums err by {worst:.1%} of what certificates allow"
    return [Finding("ok" if worst <= 1.0 else "fail", "arithmetic", text)]


def _functions(policy: Policy) -> list[Finding]:
    """The policy's elementwise functions err by no more than core.functions states."""
    try:
        nodes = load_network(policy.path).nodes
    except LawsError as error:
        return [Finding("note", "certificates", f"only statistical ones are possible: {error}")]
    x = np.linspace(-30.0, 30.0, 600_001, dtype=np.float32)
    operators = {"tanh": "Tanh", "sigmoid": "Sigmoid", "erf": "Erf", "softplus": "Softplus", "relu": "Relu"}
    found = []
    for name in sorted({n.function for n in nodes if isinstance(n, Elementwise)} & set(operators)):
        got = _run([helper.make_node(operators[name], ["x"], ["y"])], {}, x)
        absolute, relative = FUNCTIONS[name].execution(())
        allowed = absolute + relative * np.abs(x.astype(float)) + 2.0**-126
        share = float((np.abs(got - FUNCTIONS[name].value(x.astype(float), ())) / allowed).max())
        text = f"errs by {share:.1%} of what certificates allow"
        found.append(Finding("ok" if share <= 1.0 else "fail", f"{name}", text))
    return found


def _providers(policy: Policy) -> list[Finding]:
    """Which execution providers really load this policy, and how far each is from the certified one."""
    rng = np.random.default_rng(0)
    low = np.maximum(policy.card.low, -3.0)
    high = np.minimum(policy.card.high, 3.0)
    x = rng.uniform(low, high, (64, policy.observations)).astype(np.float32)
    want = np.array([policy(row) for row in x])
    found = []
    for name in ort.get_available_providers():
        if name in ("CPUExecutionProvider", "AzureExecutionProvider"):  # the certified one; and a remote service
            continue
        options = ort.SessionOptions()
        options.log_severity_level = 4
        try:
            other = ort.InferenceSession(str(policy.path), options, providers=[name])
            if other.get_providers()[0] != name:
                found.append(Finding("note", name, "offered, but does not load on this machine"))
                continue
            feed = other.get_inputs()[0].name
            got = np.array([other.run(None, {feed: row.reshape(policy.shape)})[0].reshape(-1) for row in x])
        except Exception as error:  # every provider raises its own kinds
            found.append(Finding("note", name, f"offered, but cannot run this policy: {str(error).splitlines()[0]}"))
            continue
        text = f"loads; differs from the CPU by up to {np.abs(got - want).max():.2g}. Certificates do not cover it"
        found.append(Finding("note", name, text))
    return [Finding("ok", "CPUExecutionProvider", "float32, without graph rewriting: what certificates cover"), *found]


def _clock() -> list[Finding]:
    """How late a sleeping thread wakes."""
    late = []
    for _ in range(300):
        start = time.monotonic()
        time.sleep(0.001)
        late.append(1e6 * (time.monotonic() - start - 0.001))
    p50, p99 = np.percentile(late, [50, 99])
    text = f"a thread that sleeps 1 ms wakes {p50:.0f} us late (median), {p99:.0f} us (p99)"
    return [Finding("ok" if p99 < 2000 else "note", "clock", text)]


def _permissions() -> list[Finding]:
    rtprio = resource.getrlimit(getattr(resource, "RLIMIT_RTPRIO", resource.RLIMIT_CORE))[0]
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    allowed = os.geteuid() == 0 or rtprio > 0
    unlimited = os.geteuid() == 0 or memlock in (resource.RLIM_INFINITY, -1)
    return [
        Finding("ok", "SCHED_FIFO", "permitted")
        if allowed
        else Finding("note", "SCHED_FIFO", "not permitted: set rtprio in /etc/security/limits.d for real-time control"),
        Finding("ok", "memory locking", "permitted")
        if unlimited
        else Finding("note", "memory locking", f"limited to {memlock} bytes: set memlock in /etc/security/limits.d"),
    ]


def _latency(cached: CachedPolicy) -> list[Finding]:
    certificates = cached.library.certificates
    found = []
    if len(certificates):
        some = np.random.default_rng(0).integers(len(certificates), size=2000)
        centers = certificates.center[some].astype(np.float32)
        hits = _timed([x for x in centers if cached.lookup(x) is not None], cached.lookup)
        found.append(Finding("ok", "a hit", f"{hits[0]:.1f} us (median), {hits[1]:.1f} us (p99)"))
    x = np.zeros((200, cached.policy.observations), np.float32)
    misses = _timed(list(x), cached.fallback)
    return [*found, Finding("ok", "the policy", f"{misses[0]:.1f} us (median), {misses[1]:.1f} us (p99)")]


def _timed(queries: list[NDArray[np.float32]], call: object) -> tuple[float, float]:
    times = []
    for x in queries:
        start = time.perf_counter_ns()
        call(x)  # type: ignore[operator]
        times.append((time.perf_counter_ns() - start) / 1000)
    return (float(np.percentile(times, 50)), float(np.percentile(times, 99))) if times else (np.nan, np.nan)
