"""Which of ONNX Runtime's execution providers runs the policy, in which precision, and how that is made sure.

A float32 certificate speaks of the graph as it stands in IEEE float32, sums in any order (docs/soundness.md). On a GPU
that is not what one gets by default: CUDA multiplies in TF32 (10 bits of fraction instead of 23), TensorRT in TF32 or
float16, convolutions are replaced by transforms. So an engine is opened with all of that off, and then has to show it:

1. *Exactness.* A matrix product with one factor per sum moves 24-bit numbers through the engine. In float32, whatever
   the order of summation, they arrive bit for bit; in TF32, float16 or bfloat16 they cannot.
2. *Agreement.* The policy itself answers probes; it may differ from the certified program by what float32's last bits
   can do there, and TF32's are 8,192 times larger (`Policy`; `laws doctor` compares with the certified rounding, too).

What is not float32 has another precision by name, and a library is refused for any but its own (`CachedPolicy`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.errors import ConfigError, ModelError

from .sessions import session, settings

Floats = NDArray[np.float32]

NAMES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
PRECISIONS = {"cpu": ("float32",), "cuda": ("float32", "tf32"), "tensorrt": ("float32", "float16")}
AGREEMENT = 64.0  # `disagreement`, at most: CPUs show 0.5 to 1 against exact arithmetic, TF32 from 1,000 (ADR 24)
PROBES = 32  # observations at which an engine is compared
_WIDTH = 256  # of the product that shows exactness: wide enough for a GPU's matrix units
_FORCED = ("ORT_TENSORRT_FP16_ENABLE", "ORT_TENSORRT_BF16_ENABLE", "ORT_TENSORRT_INT8_ENABLE")


@dataclass(frozen=True)
class Engine:
    """What runs a policy: "cpu", "cuda" or "tensorrt", in "float32" or what else `PRECISIONS` lists for it."""

    provider: str = "cpu"
    precision: str = "float32"

    def __str__(self) -> str:
        return self.provider if self.precision == "float32" else f"{self.provider}:{self.precision}"

    @classmethod
    def of(cls, text: str) -> Engine:
        """An engine by name: "cpu", "cuda", "cuda:tf32", "tensorrt", "tensorrt:float16".

        Raises:
            ConfigError: there is no such engine.
        """
        provider, _, precision = text.partition(":")
        engine = cls(provider, precision or "float32")
        if engine.precision not in PRECISIONS.get(provider, ()):
            known = ", ".join(str(cls(p, precision)) for p, many in PRECISIONS.items() for precision in many)
            raise ConfigError(f"execution provider {text!r}: none of {known}")
        return engine

    def session(self, model: str | bytes, where: str, threads: int = 1) -> ort.InferenceSession:
        """A session of this engine, without graph rewriting by ONNX Runtime.

        TensorRT builds its engine at the first call, which can take minutes, and keeps it in `cache_folder` for the
        next start.

        Raises:
            ModelError: the engine does not load on this machine, or cannot load the model.
        """
        if self.provider == "cpu":
            return session(model, where, threads)
        if NAMES[self.provider] not in ort.get_available_providers():
            raise ModelError(f"{self}: this onnxruntime ({ort.__version__}) was built without {NAMES[self.provider]}")
        if self.precision == "float32":
            if forced := [name for name in _FORCED if os.environ.get(name, "0") != "0"]:
                raise ModelError(f"{self}: the environment variable {forced[0]} forces another precision; unset it")
            os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # the only way for TensorRT; read when CUDA's libraries load
        try:
            found = ort.InferenceSession(model, settings(threads), providers=self._providers())
        except Exception as error:  # onnxruntime raises its own kinds
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{where}: ONNX Runtime cannot load it on {self}: {reason}") from None
        if found.get_providers()[0] != NAMES[self.provider]:  # it went on without, and said so on stderr only
            raise ModelError(f"{self}: {NAMES[self.provider]} does not load here; its libraries or the GPU are missing")
        return found

    def _providers(self) -> list[tuple[str, dict[str, Any]]]:
        """This provider, and behind it the next one for nodes that it does not take."""
        cuda = {"use_tf32": str(int(self.precision == "tf32")), "cudnn_conv_algo_search": "DEFAULT"}  # no Winograd
        stack: list[tuple[str, dict[str, Any]]] = [(NAMES["cuda"], cuda), (NAMES["cpu"], {})]
        if self.provider == "tensorrt":
            folder = cache_folder(self)
            folder.mkdir(parents=True, exist_ok=True)
            options = {
                "trt_fp16_enable": str(self.precision == "float16"),
                "trt_int8_enable": "False",
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(folder),
            }
            stack.insert(0, (NAMES["tensorrt"], options))
        return stack


CPU = Engine()


def cache_folder(engine: Engine) -> Path:
    """Where built engines are kept: apart by precision, which their names do not tell, and by ONNX Runtime's version.

    systemd's CACHE_DIRECTORY, else XDG_CACHE_HOME, else ~/.cache.
    """
    base = os.environ.get("CACHE_DIRECTORY") or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "laws_ros" / "engines" / f"{engine.provider}-{engine.precision}-{ort.__version__}"


def choose(names: Sequence[str], log: Callable[[str], None] = lambda text: None) -> Engine:
    """The first of these engines that loads here and computes in the precision of its name; "cpu" always does.

    Args:
        log: takes one line for every engine that was passed over, and why.

    Raises:
        ConfigError: an unknown name, or none of them can be used.
    """
    engines, reasons = [Engine.of(name) for name in names or ["cpu"]], []
    for engine in engines:
        try:
            check_exact(engine)
        except ModelError as error:
            reasons.append(str(error))
            log(f"execution provider passed over: {error}")
        else:
            return engine
    raise ConfigError(f"no execution provider can be used: {'; '.join(reasons)}")


def check_exact(engine: Engine) -> None:
    """Try an engine: it loads, and if its name says float32, 24-bit numbers pass through its products unchanged.

    Raises:
        ModelError: it does not load, or rounds what float32 does not.
    """
    rng = np.random.default_rng(0)
    full = (1.0 + rng.integers(1, 2**23, _WIDTH) * 2.0**-23).astype(np.float32)  # all bits of the fraction in use
    even = np.arange(_WIDTH) % 2 == 0
    x, factor = np.where(even, full, 1.0).astype(np.float32), np.where(even, 1.0, full).astype(np.float32)
    order = rng.permutation(_WIDTH)
    weight = np.zeros((_WIDTH, _WIDTH), np.float32)
    weight[order, np.arange(_WIDTH)] = factor[order]
    start, end = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, _WIDTH]) for name in ("x", "y"))
    product, weights = helper.make_node("MatMul", ["x", "w"], ["y"]), numpy_helper.from_array(weight, "w")
    graph = helper.make_graph([product], "probe", [start], [end], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    run = engine.session(model.SerializeToString(), "a matrix product", 1).run
    try:
        y = run(None, {"x": x[None]})[0][0]
    except Exception as error:  # onnxruntime raises its own kinds
        raise ModelError(f"{engine}: fails at a matrix product: {str(error).strip().splitlines()[0]}") from None
    if engine.precision == "float32" and not np.array_equal(y, full[order]):
        lost = float(np.abs(y / full[order] - 1.0).max())
        raise ModelError(f"{engine}: rounds float32 numbers by {lost:.1e}: it does not compute in float32")


def disagreement(run: Callable[[Floats], Floats], certified: Callable[[Floats], Floats], x: Floats) -> float:
    """How far a program is from the certified one, in units of what float32's last bits do; rms over probes x [N, n].

    The unit is what moving every entry of the observation by one unit in its last place does to the certified answer,
    and the answer's own last place. Programs in float32 differ by some of it, in TF32 or float16 by thousands.
    """
    rng = np.random.default_rng(0)
    moved = np.nextafter(x, np.where(rng.random(x.shape) < 0.5, -np.inf, np.inf).astype(np.float32))
    here, there = (np.array([certified(row) for row in rows], float) for rows in (x, moved))
    other = np.array([run(row) for row in x], float)
    if not np.isfinite(here).all():
        raise ModelError("the policy's answers to probes are not finite")
    unit = rms(there - here) + 2.0**-24 * rms(here)
    return rms(other - here) / max(unit, float(np.finfo(np.float32).tiny))


def rms(values: NDArray[np.floating]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=float))))
