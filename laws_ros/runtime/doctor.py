"""What this machine has, and whether it keeps the assumptions that certificates rest on.

Certificates are statements about float32 programs run by ONNX Runtime's CPU provider (docs/soundness.md). Here the
assumptions are tried on the very machine that will run them, next to what a controller needs: clock, permissions, time.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.certificate import decision_rows
from laws_ros.core.errors import ConfigError, LawsError
from laws_ros.core.functions import FUNCTIONS
from laws_ros.core.network import Elementwise
from laws_ros.core.point import certify_points

from .cached_policy import CachedPolicy
from .onnx_graph import load_network
from .policy import Policy
from .providers import CPU, Engine, check_exact, choose, disagreement
from .sessions import session

PACKAGES = ("numpy", "onnx", "onnxruntime", "pyyaml", "numba", "mujoco", "gymnasium", "torch")
NEEDED = PACKAGES[:4]
ENGINES = ("cuda", "tensorrt", "tensorrt:float16")  # tried beside the CPU
LOCKED = 64 << 20  # bytes


class Finding(NamedTuple):
    """One line of the doctor's report; verdict "ok", "note" (worth knowing) or "fail" (do not run like this)."""

    verdict: str
    topic: str
    text: str


def examine(
    policy_path: str | Path | None = None, library_path: str | Path | None = None, providers: Sequence[str] = ()
) -> list[Finding]:
    """Look at the machine, and at a policy and its library if they are given.

    Args:
        providers: the controller's parameter: the policy has to run on the first of these that can be used.

    Raises:
        LawsError: the policy or the library cannot be opened, or they do not belong together; no such provider.
    """
    wanted = [Engine.of(name) for name in providers]
    findings, engine = [*_software(), *_arithmetic(), *_clock(), *_permissions()], CPU
    try:
        engine = choose(providers)
    except ConfigError as error:
        findings.append(Finding("fail", "providers", str(error)))
    policy = Policy(policy_path) if policy_path is not None else None
    if policy is not None:
        findings += _functions(policy)
    findings += _engines(policy, wanted, engine)
    if library_path is not None and policy_path is not None and "fail" not in {f.verdict for f in findings}:
        findings += _latency(CachedPolicy.open(library_path, policy_path, engine=engine))
    return findings


def _software() -> list[Finding]:
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    found = [Finding("ok", "machine", machine)]
    for name in PACKAGES:
        try:  # a Jetson's ONNX Runtime is of another name: onnxruntime-gpu
            version = ort.__version__ if name == "onnxruntime" else importlib.metadata.version(name)
            found.append(Finding("ok", name, version))
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


def _engines(policy: Policy | None, wanted: Sequence[Engine], chosen: Engine) -> list[Finding]:
    """What runs the policy: which engines really load, and how far each is from the certified program.

    Certificates allow every float32 execution; `certify_points` says how far two of them can be apart at an
    observation. The CPU is compared with exact arithmetic, every other engine with the CPU.
    """
    found, allowed = [], None
    if policy is not None:
        x = policy.probes()
        answers = np.array([policy(row) for row in x])
        text = "float32, without graph rewriting"
        share, rows = 0.0, decision_rows(policy.actions, policy.card.decision)
        with contextlib.suppress(LawsError):  # it cannot be bounded; _functions has said so
            network = load_network(policy.path)
            allowed = certify_points(network, x, answers, policy.card.decision).bound_offset
            share = _share(answers, network(x.astype(float)), rows, allowed)
            text += f"; {share:.2%} of the certified rounding from exact arithmetic"
        found.append(Finding("ok" if share <= 1.0 else "fail", "on cpu", text))
    for engine in dict.fromkeys([*wanted, *map(Engine.of, ENGINES)]):
        if engine == CPU:
            continue
        bad = "fail" if engine == chosen else "note"  # nobody needs the others
        try:
            check_exact(engine)
            if policy is None:
                found.append(Finding("ok", f"on {engine}", "loads, and multiplies as its name says"))
                continue
            other = Policy(policy.path, decision=policy.card.decision, engine=engine)
            got = np.array([other(row) for row in x])
        except LawsError as error:
            found.append(Finding(bad, f"on {engine}", str(error).removeprefix(f"{engine}: ")))
            continue
        p50, p99 = _timed(list(np.repeat(x, 8, axis=0)), other)
        text = f"loads; {p50:.0f} us (median), {p99:.0f} us (p99); from the CPU "
        text += f"{disagreement(other, policy, x):.3g} times what float32's last bits do"
        share = 0.0
        if allowed is not None:
            share = _share(got, answers, rows, allowed)
            text += f", {share:.2%} of the certified rounding"
        good = engine.precision == "float32" and share <= 1.0
        text += "" if good else "; certificates made for float32 do not cover it, and the controller refuses it"
        found.append(Finding("ok" if good else bad, f"on {engine}", text))
    return found


def _share(got: NDArray, want: NDArray, rows: NDArray, allowed: NDArray) -> float:
    """The largest difference of two executions [N, m], as a share of what is allowed [N, r]; inf where unknown."""
    with np.errstate(all="ignore"):
        share = np.abs((got.astype(float) - want) @ rows.T) / allowed
    return float(np.where(np.isfinite(allowed), share, np.inf).max())


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
    """Tried, not looked up: root in a container may lack either."""
    now = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        os.sched_setscheduler(0, *now)
        found = [Finding("ok", "SCHED_FIFO", "permitted")]
    except OSError:
        missing = "not permitted: set rtprio in /etc/security/limits.d for real-time control"
        found = [Finding("note", "SCHED_FIFO", missing)]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit in (resource.RLIM_INFINITY, -1) or _locks():
        return [*found, Finding("ok", "memory locking", "permitted")]
    missing = f"limited to {limit / 1e6:.3g} MB: set memlock in /etc/security/limits.d"
    return [*found, Finding("note", "memory locking", missing)]


def _locks() -> bool:
    """Can more memory be locked than any limit that a distribution sets by default?"""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(-1, LOCKED) as memory:
        place = (ctypes.c_char * LOCKED).from_buffer(memory)
        locked = bool(libc.mlock(place, ctypes.c_size_t(LOCKED)) == 0)
        if locked:
            libc.munlock(place, ctypes.c_size_t(LOCKED))
        del place
    return locked


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
