"""Execution providers: the one asked for, in float32, or none. The GPUs are made up, their arithmetic is not."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from laws_ros.cli import main
from laws_ros.core.errors import ConfigError, LibraryError, ModelError
from laws_ros.runtime import doctor, providers
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.doctor import examine
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.providers import CPU, NAMES, Engine, choose

REAL = ort.InferenceSession


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 numbers with this many bits of fraction: TF32 and float16 have 10."""
    if bits == 23:
        return values
    half, keep = np.uint32(1 << (22 - bits)), np.uint32(0xFFFFFFFF << (23 - bits) & 0xFFFFFFFF)
    return ((values.astype(np.float32).view(np.uint32) + half) & keep).view(np.float32)


@dataclass
class Machine:
    """What onnxruntime is told there is. `bits`: of the fractions that a provider multiplies, 23 unless told."""

    offered: tuple[str, ...] = ("cuda",)
    loads: tuple[str, ...] = ("cuda", "tensorrt")
    bits: dict[str, int] = field(default_factory=dict)
    off: float = 0.0  # of every answer of a policy, relative
    opened: list[list[Any]] = field(default_factory=list)

    def available(self) -> list[str]:
        return [*(NAMES[name] for name in self.offered), NAMES["cpu"]]

    def session(self, model: str | bytes, options: ort.SessionOptions, providers: list[Any]) -> Any:
        if providers[0] == NAMES["cpu"]:
            return REAL(model, options, providers=providers)
        self.opened.append(providers)
        return Fake(self, model, options, [name for name, _ in providers])


class Fake:
    """A session that computes on the CPU what a GPU would: constants and observations are rounded first."""

    def __init__(self, machine: Machine, model: str | bytes, options: ort.SessionOptions, names: list[str]) -> None:
        self.machine, known = machine, {full: short for short, full in NAMES.items()}
        self.names = [name for name in names if known[name] in (*machine.loads, "cpu")]
        self.bits = machine.bits.get(known[self.names[0]], 23)
        loaded = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
        self.probe = loaded.graph.name == "probe"
        for tensor in loaded.graph.initializer:
            value = numpy_helper.to_array(tensor)
            if value.dtype == np.float32:
                tensor.CopyFrom(numpy_helper.from_array(rounded(value, self.bits), tensor.name))
        self.real = REAL(loaded.SerializeToString(), options, providers=[NAMES["cpu"]])

    def get_providers(self) -> list[str]:
        return self.names

    def run(self, outputs: Any, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        found = self.real.run(outputs, {name: rounded(value, self.bits) for name, value in feed.items()})
        return found if self.probe else [y * np.float32(1.0 + self.machine.off) for y in found]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Machine:
    made = Machine()
    monkeypatch.setattr(ort, "get_available_providers", made.available)
    monkeypatch.setattr(ort, "InferenceSession", made.session)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("NVIDIA_TF32_OVERRIDE", "CACHE_DIRECTORY", *providers._FORCED):
        monkeypatch.setenv(name, "x")  # so that it is taken back afterwards
        monkeypatch.delenv(name)
    return made


def test_engines_have_names() -> None:
    for text in ("cpu", "cuda", "cuda:tf32", "tensorrt", "tensorrt:float16"):
        assert str(Engine.of(text)) == text
    assert Engine.of("cuda:float32") == Engine("cuda") and Engine.of("cpu") == CPU
    for text in ("", "gpu", "cpu:float16", "cuda:fp16"):
        with pytest.raises(ConfigError, match="none of cpu, cuda, cuda:tf32, tensorrt, tensorrt:float16"):
            Engine.of(text)


def test_the_first_that_can_be_used_is_taken(machine: Machine) -> None:
    said: list[str] = []
    assert choose([], said.append) == choose(["cpu"], said.append) == CPU and not machine.opened
    assert choose(["tensorrt", "cuda", "cpu"], said.append) == Engine("cuda")
    assert len(said) == 1 and "tensorrt: " in said[0] and "built without TensorrtExecutionProvider" in said[0]
    machine.loads = ()  # listed, but its libraries are not there: onnxruntime goes on without
    assert choose(["cuda", "cpu"], said.append) == CPU and "does not load here" in said[-1]
    with pytest.raises(ConfigError, match=r"no execution provider can be used: tensorrt: .* cuda: "):
        choose(["tensorrt", "cuda"])


def test_float32_is_asked_for_with_everything_else_off(machine: Machine, tmp_path: Any) -> None:
    machine.offered = ("tensorrt", "cuda")
    Engine("tensorrt").session(_identity(), "x")
    (stack,) = machine.opened
    assert [name for name, _ in stack] == [NAMES[k] for k in ("tensorrt", "cuda", "cpu")]
    options = stack[0][1]
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "False"
    assert options["trt_engine_cache_enable"] == "True" and stack[1][1]["use_tf32"] == "0"
    assert os.environ["NVIDIA_TF32_OVERRIDE"] == "0"
    folder = options["trt_engine_cache_path"]
    assert folder.startswith(str(tmp_path)) and os.path.isdir(folder)
    Engine("tensorrt", "float16").session(_identity(), "x")
    loose = machine.opened[-1][0][1]
    assert loose["trt_fp16_enable"] == "True" and loose["trt_engine_cache_path"] != folder
    os.environ["ORT_TENSORRT_FP16_ENABLE"] = "1"
    with pytest.raises(ModelError, match="ORT_TENSORRT_FP16_ENABLE forces another precision"):
        Engine("tensorrt").session(_identity(), "x")


def _identity() -> bytes:
    ends = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2]) for n in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    opset = [onnx.helper.make_opsetid("", 17)]
    text: bytes = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
    return text


@pytest.mark.parametrize("bits", [7, 10, 22])
def test_what_rounds_more_than_float32_is_passed_over(machine: Machine, bits: int) -> None:
    machine.bits["cuda"] = bits  # whatever it was told
    said: list[str] = []
    assert choose(["cuda", "cpu"], said.append) == CPU
    assert "it does not compute in float32" in said[0]
    assert choose(["cuda:tf32"]) == Engine("cuda", "tf32")  # by that name it is what it says


def test_a_policy_runs_where_it_answers_the_same(machine: Machine, built: Any) -> None:
    here, there = Policy(built.path), Policy(built.path, engine=choose(["cuda"]))
    x = here.probes()
    assert there.engine == Engine("cuda") and there.disagreement() == 0.0
    assert np.array_equal(np.array([there(row) for row in x]), np.array([here(row) for row in x]))
    assert np.array_equal(there.batch(x), here.batch(x))
    machine.off = 2.0**-23  # a last bit
    assert Policy(built.path, engine=Engine("cuda")).disagreement() < 2.0
    machine.off = 1e-3
    with pytest.raises(ModelError, match="certificates do not hold there"):
        Policy(built.path, engine=Engine("cuda"))
    machine.off, machine.bits["cuda"] = 0.0, 10
    with pytest.raises(ModelError, match="certificates do not hold there"):
        Policy(built.path, engine=Engine("cuda"))


def test_a_float32_library_is_refused_for_any_other_precision(machine: Machine, built: Any, tmp_path: Any) -> None:
    machine.offered, machine.bits = ("cuda", "tensorrt"), {"cuda": 10, "tensorrt": 10}
    path = tmp_path / "x.laws"
    built.library.save(path)
    for engine in (Engine("cuda", "tf32"), Engine("tensorrt", "float16")):
        with pytest.raises(LibraryError, match=f"certified for float32, but .* runs on {engine} in {engine.precision}"):
            CachedPolicy.open(path, built.path, engine=engine)
    machine.bits = {}
    cached, plain = (CachedPolicy.open(path, built.path, engine=engine) for engine in (Engine("cuda"), CPU))
    x = built.library.certificates.center[0].astype(np.float32)
    assert np.array_equal(cached.answer(x).action, plain.answer(x).action)


def test_the_controller_takes_its_parameter(machine: Machine, built: Any, tmp_path: Any) -> None:
    pytest.importorskip("rclpy", reason="ROS 2 is missing: source its setup.bash or pip install -e '.[ros]'")
    from laws_ros.nodes.upkeep import open_cached

    built.library.save(tmp_path / "x.laws")
    p = {"policy": str(built.path), "library": str(tmp_path / "x.laws"), "tolerance": [], "certificates.kinds": []}

    class Log:
        said: list[str] = []  # noqa: RUF012

        def warning(self, text: str) -> None:
            self.said.append(text)

    assert open_cached(p | {"providers": []}, None, Log()).policy.engine == CPU
    assert open_cached(p | {"providers": ["cuda", "cpu"]}, None, Log()).policy.engine == Engine("cuda")
    assert Log.said == []
    with pytest.raises(LibraryError, match="another program"):
        open_cached(p | {"providers": ["cuda:tf32"]}, None, Log())
    machine.bits["cuda"] = 10
    assert open_cached(p | {"providers": ["cuda", "cpu"]}, None, Log()).policy.engine == CPU
    assert "passed over" in Log.said[0]


def test_the_doctor_says_which_are_covered(
    machine: Machine, built: Any, tmp_path: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_arithmetic", "_clock", "_functions", "_latency"):
        monkeypatch.setattr(doctor, name, lambda *given: [])
    machine.offered, machine.off = ("cuda", "tensorrt"), 2.0**-23
    found = {f.topic: f for f in examine(built.path)}
    for engine in ("cuda", "tensorrt"):
        assert found[f"on {engine}"].verdict == "ok" and "% of the certified rounding" in found[f"on {engine}"].text
    assert found["on cpu"].verdict == "ok" and "from exact arithmetic" in found["on cpu"].text
    assert found["on tensorrt:float16"].verdict == "note" and "do not cover it" in found["on tensorrt:float16"].text
    machine.off = 0.5
    found = {f.topic: f for f in examine(built.path, providers=["cpu"])}
    assert found["on cuda"].verdict == "note" and "certificates do not hold there" in found["on cuda"].text
    path = tmp_path / "x.laws"
    built.library.save(path)
    both = ["--policy", str(built.path), "--library", str(path)]
    assert main(["doctor", *both, "--providers", "cuda,cpu"]) == 1  # it loads, so a robot would take it
    assert "fail on cuda" in capsys.readouterr().out
    machine.bits["cuda"] = 10
    assert main(["doctor", *both, "--providers", "cuda,cpu"]) == 0  # it is seen through, and passed over
    assert main(["doctor", "--providers", "cuda"]) == 1
    assert "fail providers" in capsys.readouterr().out
    assert main(["doctor", "--providers", "gpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
