"""The context operator cache: the same answers bit for bit, with the context's part computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from laws_ros.core.errors import ModelError
from laws_ros.runtime.context_cache import ContextCache
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.sessions import session

GOAL, STATE, HIDDEN = 5, 4, 32


def build(path: Path, inputs: dict[str, list], nodes: list, constants: dict[str, np.ndarray], outputs: int) -> Path:
    graph = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("action", TensorProto.FLOAT, ["batch", outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path


def weights(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"e0": (GOAL, HIDDEN), "e1": (HIDDEN, HIDDEN), "g0": (STATE, HIDDEN), "h0": (2 * HIDDEN, 3)}
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


BODY = [  # film-like: the context's code multiplies and joins the state's features, at two depths
    helper.make_node("MatMul", ["goal", "e0"], ["c0"]),
    helper.make_node("Tanh", ["c0"], ["c1"]),
    helper.make_node("MatMul", ["c1", "e1"], ["c2"]),
    helper.make_node("Sigmoid", ["c2"], ["gate"]),
    helper.make_node("MatMul", ["state", "g0"], ["s0"]),
    helper.make_node("Mul", ["s0", "gate"], ["s1"]),
    helper.make_node("Concat", ["s1", "c1"], ["s2"], axis=1),
    helper.make_node("MatMul", ["s2", "h0"], ["action"]),
]


def two_inputs(path: Path, seed: int = 0) -> Path:
    return build(path, {"state": ["batch", STATE], "goal": ["batch", GOAL]}, BODY, weights(seed), 3)


def flat(path: Path, seed: int = 0) -> Path:
    """One observation vector, normalised as a whole, of which columns 4 to 8 are the goal."""
    front = [
        helper.make_node("Sub", ["observation", "mean"], ["centred"]),
        helper.make_node("Mul", ["centred", "scale"], ["x"]),
        helper.make_node("Slice", ["x", "zero", "four", "one"], ["state"]),
        helper.make_node("Gather", ["x", "where"], ["goal"], axis=1),
    ]
    n = STATE + GOAL
    rng = np.random.default_rng(seed + 1)
    constants = weights(seed) | {
        "mean": rng.normal(size=n).astype(np.float32),
        "scale": rng.uniform(0.5, 2, n).astype(np.float32),
        "zero": np.array([0], np.int64),
        "four": np.array([STATE], np.int64),
        "one": np.array([1], np.int64),
        "where": np.arange(STATE, n, dtype=np.int64),
    }
    return build(path, {"observation": ["batch", n]}, front + BODY, constants, 3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), order=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_answers_are_those_of_the_whole_graph_bit_for_bit(tmp_path_factory, seed, order):
    folder = tmp_path_factory.mktemp("context")
    rng = np.random.default_rng(seed)
    goals = rng.normal(size=(5, GOAL)).astype(np.float32)
    whole_two = session(str(two_inputs(folder / "two.onnx", seed)), "two")
    whole_flat = session(str(flat(folder / "flat.onnx", seed)), "flat")
    two = ContextCache(folder / "two.onnx", ["goal"], capacity=3)
    one = ContextCache(folder / "flat.onnx", list(range(STATE, STATE + GOAL)), capacity=3)
    for k in order:
        state = rng.normal(size=STATE).astype(np.float32)
        feed = {"state": state[None], "goal": goals[k][None]}
        assert two(feed)[0].tobytes() == whole_two.run(None, feed)[0].tobytes()
        feed = {"observation": np.concatenate([state, goals[k]])[None]}
        assert one(feed)[0].tobytes() == whole_flat.run(None, feed)[0].tobytes()
    for cache in (two, one):
        assert cache.computed + cache.replayed == len(order)
        assert cache.computed >= len(set(order))
        assert len(set(order)) > 3 or cache.computed == len(set(order))  # nothing that fits is computed twice


def test_the_cut_takes_all_that_the_context_alone_decides(tmp_path):
    cache = ContextCache(two_inputs(tmp_path / "p.onnx"), ["goal"])
    assert cache.tensors == ["gate", "c1"]
    cache = ContextCache(flat(tmp_path / "q.onnx"), range(STATE, STATE + GOAL))
    assert cache.tensors == ["gate", "c1"]


def test_a_context_that_differs_in_one_bit_is_another(tmp_path):
    path = two_inputs(tmp_path / "p.onnx")
    cache, whole = ContextCache(path, ["goal"]), session(str(path), "p")
    goal = np.zeros((1, GOAL), np.float32)
    for step in range(3):
        goal[0, 2] = np.nextafter(goal[0, 2], np.float32(1)) if step else -0.0
        feed = {"state": np.ones((1, STATE), np.float32), "goal": goal}
        assert cache(feed)[0].tobytes() == whole.run(None, feed)[0].tobytes()
    assert cache.computed == 3


def test_an_encoder_that_sees_one_column_more_is_not_cached(tmp_path):
    path = flat(tmp_path / "p.onnx")
    with pytest.raises(ModelError, match="nothing is computed from"):
        ContextCache(path, range(STATE + 1, STATE + GOAL))


def test_random_numbers_are_never_replayed(tmp_path):
    nodes = [
        helper.make_node("RandomNormalLike", ["goal"], ["noise"]),
        helper.make_node("Add", ["goal", "noise"], ["noisy"]),
        helper.make_node("MatMul", ["noisy", "e0"], ["c0"]),
        helper.make_node("MatMul", ["state", "g0"], ["s0"]),
        helper.make_node("Add", ["s0", "c0"], ["action"]),
    ]
    constants = {k: v for k, v in weights(0).items() if k in ("e0", "g0")}
    path = build(tmp_path / "p.onnx", {"state": ["batch", STATE], "goal": ["batch", GOAL]}, nodes, constants, HIDDEN)
    with pytest.raises(ModelError, match="nothing to cache"):
        ContextCache(path, ["goal"])


@pytest.mark.parametrize(
    ("context", "message"), [(["gaol"], "no input 'gaol'"), ([99], "columns of the only input"), ([], "name inputs")]
)
def test_a_wrong_context_is_one_clear_line(tmp_path, context, message):
    path = flat(tmp_path / "p.onnx")
    with pytest.raises(ModelError, match=message) as error:
        ContextCache(path, context)
    assert "\n" not in str(error.value)


def test_a_policy_whose_card_names_a_context_uses_the_cut_by_itself(tmp_path):
    path = flat(tmp_path / "p.onnx")
    card = {
        "name": "reach",
        "observations": [{"name": f"x{k}"} for k in range(STATE)] + [{"name": f"goal{k}"} for k in range(GOAL)],
        "actions": [{"name": f"u{k}"} for k in range(3)],
        "context": [f"goal{k}" for k in range(GOAL)],
    }
    plain = Policy(path)  # a policy without a card has no context
    path.with_suffix(".yaml").write_text(yaml.safe_dump(card))
    cut = Policy(path)
    rng = np.random.default_rng(0)
    goal = rng.normal(size=GOAL).astype(np.float32)
    for _ in range(10):
        x = np.concatenate([rng.normal(size=STATE).astype(np.float32), goal])
        assert cut(x).tobytes() == plain(x).tobytes()
    assert plain.context_cache is None
    assert cut.context_cache is not None
    assert (cut.context_cache.computed, cut.context_cache.replayed) == (1, 9)
