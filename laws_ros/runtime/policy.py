"""The full policy in ONNX Runtime, as the graph stands in its file, in float32 unless another engine is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from laws_ros.core.card import Card
from laws_ros.core.errors import CardError, ModelError

from .context_cache import ContextCache
from .files import load_card, sha256_file
from .onnx_graph import load_model
from .providers import AGREEMENT, CPU, PROBES, Engine, disagreement
from .sessions import session

Floats = NDArray[np.float32]


class Policy:
    """A policy file with its card.

    Attributes:
        card: the card beside the file, or x0, x1, ... where there is none.
        sha256: of the file; libraries are bound to it.
        observations, actions: lengths n and m of its vectors.
        engine: what runs it: providers.CPU, or a GPU that was shown to compute the same.
        context_cache: runs it cut in two where its card names a context that the graph encodes apart from the rest
            (on the CPU only).
    """

    def __init__(self, path: str | Path, threads: int = 1, decision: str | None = None, engine: Engine = CPU) -> None:
        """Open a policy.

        Args:
            decision: what the card should say of it; needed only for a policy without a card.

        Raises:
            ModelError: missing, damaged, or not a float32 policy with one input and one output; or the engine does not
                load, or calls itself float32 and answers otherwise than float32 programs can.
            CardError: the card does not fit the model, or says another decision.
        """
        self.path, self._threads, self.engine = Path(path), threads, engine
        model = load_model(self.path)
        self.sha256 = sha256_file(self.path)
        self.session = engine.session(str(self.path), str(self.path), threads)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelError(f"{self.path}: {len(inputs)} inputs and {len(outputs)} outputs, one of each is needed")
        for tensor in (inputs[0], outputs[0]):
            if tensor.type != "tensor(float)":
                raise ModelError(f"{self.path}: {tensor.name} is {tensor.type}; only float32 policies can be used")
        self._input, self._output = inputs[0].name, outputs[0].name
        rest = inputs[0].shape[1:] if len(inputs[0].shape) > 1 else inputs[0].shape
        if not all(isinstance(d, int) for d in rest):
            raise ModelError(f"{self.path}: input {self._input} has shape {inputs[0].shape}; only batch may be free")
        self.shape = (1, *rest) if len(inputs[0].shape) > 1 else tuple(rest)
        self.observations = int(np.prod(rest))
        self.context_cache: ContextCache | None = None
        self.actions = int(self(np.zeros(self.observations, np.float32)).size)
        card_path = self.path.with_suffix(".yaml")
        self.has_card = card_path.is_file()
        if self.has_card:
            self.card = load_card(self.path)
            if decision is not None and decision != self.card.decision:
                raise CardError(f"{card_path}: decision: {self.card.decision!r}, but {decision!r} was asked for")
        else:
            self.card = Card.plain(self.path.stem, self.observations, self.actions, decision or "none")
        for kind, count in (("observations", self.observations), ("actions", self.actions)):
            if len(getattr(self.card, kind)) != count:
                raise CardError(
                    f"{card_path}: {len(getattr(self.card, kind))} {kind}, but {self.path.name} has {count}"
                )
        self._batch_session = self._open_batch(model, threads)
        self.context_cache = self._open_context(threads) if self.card.context and engine == CPU else None
        if engine != CPU and engine.precision == "float32" and not (far := self.disagreement()) <= AGREEMENT:
            raise ModelError(
                f"{self.path}: {engine} answers {far:.0f} times further from the CPU than float32's last bits explain "
                f"(at most {AGREEMENT:.0f}): certificates do not hold there"
            )

    def __call__(self, observation: Floats) -> Floats:
        """The action [m] at one observation [n]."""
        feed = {self._input: np.ascontiguousarray(observation, np.float32).reshape(self.shape)}
        outputs = self.session.run([self._output], feed) if self.context_cache is None else self.context_cache(feed)
        result: Floats = outputs[0].reshape(-1)
        return result

    def batch(self, observations: Floats) -> Floats:
        """Actions [N, m] at observations [N, n], in one call where the model allows it."""
        observations = np.ascontiguousarray(observations, np.float32)
        if self._batch_session is None or len(observations) == 0:
            return np.array([self(x) for x in observations], np.float32).reshape(-1, self.actions)
        parts = [
            self._batch_session.run([self._output], {self._input: part.reshape(-1, *self.shape[1:])})[0]
            for part in np.array_split(observations, -(-len(observations) // 4096))
        ]
        return np.concatenate(parts).reshape(-1, self.actions)

    def decide(self, output: Floats) -> Floats:
        """Raw outputs [..., m] as actions: [..., m] within the card's limits, or the index [..., 1] of the best."""
        if self.card.decision == "none":
            low, high = self.card.limits
            return np.minimum(np.maximum(output, low), high)
        best = output.argmax(-1) if self.card.decision == "argmax" else output.argmin(-1)
        return np.asarray(best, np.float32)[..., None]

    def probes(self, count: int = PROBES) -> Floats:
        """Observations [count, n] to compare engines at: uniform between the card's limits, at most 3 from 0."""
        low, high = np.maximum(self.card.low, -3.0), np.minimum(self.card.high, 3.0)
        return np.random.default_rng(0).uniform(low, high, (count, self.observations)).astype(np.float32)

    def disagreement(self) -> float:
        """From the program that certificates speak of (providers.disagreement)."""
        run = session(str(self.path), str(self.path), self._threads).run

        def certified(x: Floats) -> Floats:
            return np.asarray(run([self._output], {self._input: x.reshape(self.shape)})[0].reshape(-1))

        return disagreement(self, certified, self.probes())

    def without_last_clip(self) -> Callable[[Floats], Floats]:
        """Raw outputs [N, m] for observations [N, n], without the graph's last Clip; `batch` where that cannot be."""
        model = load_model(self.path)
        clips = [node for node in model.graph.node if node.op_type == "Clip"]
        if not clips or self._batch_session is not self.session:
            return self.batch
        source, target = clips[-1].input[0], clips[-1].output[0]
        model.graph.node.remove(clips[-1])
        for node in model.graph.node:
            node.input[:] = [source if name == target else name for name in node.input]
        output = model.graph.output[0]
        output.name = source if output.name == target else output.name
        run = session(model.SerializeToString(), str(self.path), self._threads).run
        return lambda x: np.asarray(run([output.name], {self._input: x.reshape(-1, *self.shape[1:])})[0])

    def _open_context(self, threads: int) -> ContextCache | None:
        """The graph cut in two where it encodes the card's context apart from the rest; None where it does not."""
        try:
            return ContextCache(self.path, self.card.context_indices, threads=threads)
        except ModelError:
            return None

    def _open_batch(self, model: onnx.ModelProto, threads: int) -> ort.InferenceSession | None:
        """A session with a free batch axis; many exporters fix it to 1. None where that changes what it computes."""
        if isinstance(self.session.get_inputs()[0].shape[0], str):  # a GPU's is for one observation at a time
            return self.session if self.engine == CPU else session(str(self.path), str(self.path), threads)
        if len(self.session.get_inputs()[0].shape) < 2:
            return None
        for value in (*model.graph.input, *model.graph.output):
            if value.name in (self._input, self._output):
                value.type.tensor_type.shape.dim[0].dim_param = "batch"
        del model.graph.value_info[:]
        probe = np.linspace(-1, 1, 3 * self.observations, dtype=np.float32).reshape(3, *self.shape[1:])
        try:
            candidate = session(model.SerializeToString(), str(self.path), threads)
            got = candidate.run([self._output], {self._input: probe})[0].reshape(3, -1)
        except Exception:  # a fixed Reshape, say: then one call per observation
            return None
        want = np.array([self(x.reshape(-1)) for x in probe])
        return candidate if got.shape == want.shape and np.allclose(got, want, rtol=1e-3, atol=1e-4) else None
