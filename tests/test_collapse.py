"""Collapsed experts: certified bounds against ONNX Runtime, the checker, and what is rebuilt from a library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper

from laws_ros.build.folded import grow_collapsed, multiplications
from laws_ros.build.grow import grow
from laws_ros.build.verify import verify
from laws_ros.core import collapse as module
from laws_ros.core.bounds import ranges
from laws_ros.core.certificate import Certificates, Ragged
from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker
from laws_ros.core.collapse import collapse
from laws_ros.core.collapse_checker import verdict
from laws_ros.core.collapsed import KEPT, LINE, States, multiply_out, pieces
from laws_ros.core.errors import LibraryError, ModelError
from laws_ros.core.library import Library
from laws_ros.core.network import Affine, Elementwise, Network, Normalize
from laws_ros.core.region import Regions, clamped
from laws_ros.core.trie import Trie
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.experts import Experts
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import ROUNDING, Layers, denormal, random_mlp, random_regions, save_mlp, save_model

SEEDS = st.integers(0, 2**31)


def opened(path: Path) -> tuple[Policy, Network]:
    return Policy(path), load_network(path)


def mlp(
    folder: Path, sizes: list[int], activation: str = "Relu", clip: float | None = None, seed: int = 0
) -> tuple[Policy, Network]:
    return opened(save_mlp(folder / "p.onnx", random_mlp(np.random.default_rng(seed), sizes), activation, clip))


def branching(path: Path, rng: np.random.Generator) -> Path:
    """A residual block, a diagonal, two activations, and an output that sees all of it and the observation."""
    size = int(rng.integers(2, 9))
    shapes = {"w1": (size, 3), "w2": (size, size), "w3": (size, size), "w4": (2, size), "w5": (2, 3)}
    constants = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    constants |= {f"b{k}": rng.normal(size=size).astype(np.float32) for k in (1, 2, 3)}
    constants |= {"low": np.array(-0.5, np.float32), "high": np.array(0.8, np.float32)}
    constants["scale"] = rng.uniform(0.5, 2, size).astype(np.float32)

    def node(operator: str, inputs: list[str], output: str, **attributes: object) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [output], name=output, **attributes)

    smooth = str(rng.choice(["Tanh", "Elu", "Sigmoid", "Softplus", "Relu"]))
    nodes = [
        node("Gemm", ["observation", "w1", "b1"], "z1", transB=1),
        node("LeakyRelu", ["z1"], "h1", alpha=0.1),
        node("Gemm", ["h1", "w2", "b2"], "z2", transB=1),
        node("Clip", ["z2", "low", "high"], "h2"),
        node("Mul", ["h2", "scale"], "m2"),
        node("Add", ["h1", "m2"], "s"),
        node("Gemm", ["s", "w3", "b3"], "z3", transB=1),
        node(smooth, ["z3"], "h3"),
        node("Gemm", ["h3", "w4"], "u", transB=1),
        node("Gemm", ["observation", "w5"], "v", transB=1),
        node("Add", ["u", "v"], "action"),
    ]
    return save_model(path, nodes, constants, 3, 2)


def break_collapsed(
    policy: Policy, network: Network, certificates: Certificates, rng: np.random.Generator, per_region: int = 150
) -> tuple[int, int, NDArray[np.float64]]:
    """Random points, corners, and points climbed along the gradient of policy minus collapsed network, executed.

    Returns:
        observations tried inside regions, how many broke a bound (or met a NaN), and the worst error seen [E, m].
    """
    experts, n = Experts(certificates, policy), network.inputs
    inverse, ball = np.linalg.inv(certificates.transform), certificates.regions.ball
    tried = broken = 0
    worst = np.zeros(certificates.bound_offset.shape)
    for k in range(len(certificates)):
        small = multiply_out(network, States.of(certificates, k, network)).network()
        xi = rng.uniform(-1, 1, (per_region, n))
        corners = rng.random(per_region) < 0.3
        xi[corners] = np.sign(xi[corners])
        xi = clamped(xi, ball[[k]])
        climb = np.flatnonzero(rng.random(per_region) < 0.4)
        seed = np.eye(network.outputs)[rng.integers(network.outputs, size=len(climb))]
        seed *= rng.choice([-1.0, 1.0], size=(len(climb), 1))
        for step in range(6):
            x = certificates.center[k] + xi[climb] @ inverse[k].T
            with np.errstate(all="ignore"):
                gradient = network.gradient(x, seed) - small.gradient(x, seed)
            xi[climb] = clamped(xi[climb] + np.sign(gradient @ inverse[k]) / (step + 1), ball[[k]])
        x = (certificates.center[k] + xi @ inverse[k].T).astype(np.float32)
        index = np.full(per_region, k)
        inside, _, bound = certificates.at(index, x)
        error = np.abs(experts.many(index, x).astype(float) - policy.batch(x).astype(float))
        error[:, ~np.isfinite(certificates.bound_offset[k])] = 0.0
        tried += int(inside.sum())
        broken += int((inside & ~(error <= bound).all(axis=1)).sum())
        worst[k] = error[inside].max(axis=0, initial=0.0)
    return tried, broken, worst


NETWORKS = [
    ("Relu", [3, 24, 24, 2], None),
    ("Relu", [4, 32, 32, 32, 1], 0.5),
    ("LeakyRelu", [3, 16, 16, 2], 1.0),
    ("Elu", [3, 16, 16, 2], None),
    ("Selu", [3, 16, 16, 2], None),
    ("Tanh", [3, 20, 20, 2], None),
    ("Sigmoid", [3, 16, 16, 2], None),
    ("Softplus", [2, 12, 12, 1], 0.3),
]


@pytest.mark.parametrize("activation, sizes, clip", NETWORKS)
@pytest.mark.parametrize("kind", ["exact", "mixed"])
def test_bounds_survive_sampling_and_attack_and_are_proved_again(tmp_path, activation, sizes, clip, kind) -> None:
    rng = np.random.default_rng(len(sizes))
    policy, network = mlp(tmp_path, sizes, activation, clip)
    checker = Checker(network)
    for radius in (1e-4, 0.05, 0.3):
        regions = replace(random_regions(rng, 12, sizes[0], radius), round=np.tile([0, sizes[0]], 6).astype(np.int32))
        certificates = collapse(network, regions, kind, np.full(sizes[-1], 0.05))
        assert np.isfinite(certificates.bound_offset).all()
        assert (certificates.bound_offset <= 0.05).all()  # exact: rounding only, far below
        tried, broken, _ = break_collapsed(policy, network, certificates, rng)
        assert tried > 400 and broken == 0
        assert all(verdict(checker, certificates, k, 16) == "holds" for k in range(len(certificates)))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(["exact", "mixed"]), st.sampled_from([1e-3, 0.1, 0.5]))
def test_any_graph(tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str, radius: float) -> None:
    rng = np.random.default_rng(seed)
    policy, network = opened(branching(tmp_path_factory.mktemp("branching") / "p.onnx", rng))
    certificates = collapse(network, random_regions(rng, 4, 3, radius), kind, np.full(2, 0.2))
    _, broken, worst = break_collapsed(policy, network, certificates, rng, 60)
    assert broken == 0
    checker, tight = Checker(network), 0.9 * worst
    for k in range(len(certificates)):
        assert verdict(checker, certificates, k, 32) == "holds"
        if (worst[k] > 0).any():
            assert verdict(checker, replace(certificates, bound_offset=tight), k, 4) == "unknown"


@pytest.mark.parametrize("build", ROUNDING)
@pytest.mark.parametrize("kind", ["exact", "mixed"])
def test_networks_built_to_break_verifiers_that_ignore_rounding(
    tmp_path: Path, build: Callable[[np.random.Generator], Layers], kind: str
) -> None:
    broken_without = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        policy, network = opened(save_mlp(tmp_path / f"{seed}.onnx", build(rng)))
        regions = random_regions(rng, 20, 2, 1e-4)
        certificates = collapse(network, regions, kind, np.ones(1))
        tried, broken, _ = break_collapsed(policy, network, certificates, rng)
        assert tried > 0 and broken == 0
        checker = Checker(network)
        known = np.flatnonzero(np.isfinite(certificates.bound_offset[:, 0]))
        assert all(verdict(checker, certificates, int(k)) == "holds" for k in known)
        # the same test does find violations once execution is taken for exact, so it can fail
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "sum_error", lambda terms, largest, volume: 0.0 * volume)
            patch.setattr(module, "TINY32", 0.0)
            patch.setattr(module, "COURTESY", 0.0)
            broken_without += break_collapsed(policy, network, collapse(network, regions, kind, np.ones(1)), rng)[1]
    assert broken_without > 0 or build is denormal  # which only threads that flush denormals to zero would show


def test_folded_neurons_are_where_their_state_says(tmp_path) -> None:
    rng = np.random.default_rng(3)
    _, network = mlp(tmp_path, [3, 24, 24, 2], clip=0.5, seed=2)
    certificates = collapse(network, random_regions(rng, 20, 3, 0.2), "exact", np.ones(2))
    seen = set()
    for k in range(len(certificates)):
        values = network.values(certificates.regions.sample(rng, np.full(400, k), edge=0.25))
        for _, node, state, _, _ in States.of(certificates, k, network).split(network):
            z = values[node.source]
            edges = [-np.inf, *node.facts.kinks(node.parameters), np.inf]
            for piece, (low, high) in enumerate(pairwise(edges)):
                here = z[:, state == piece]
                assert ((low <= here) & (here <= high)).all()
                seen.add((node.function, piece) if here.size else None)
            moves = ((z < edges[1]) & (z > edges[1])).any(axis=0)
            assert (state[moves] == KEPT).all()
    assert seen >= {("relu", 0), ("relu", 1), ("clip", 0), ("clip", 1), ("clip", 2)}


def test_exact_equals_the_policy_in_real_arithmetic(tmp_path) -> None:
    """The matrices before rounding, in float64: equal but for float64's own rounding."""
    rng = np.random.default_rng(4)
    _, network = mlp(tmp_path, [4, 40, 40, 40, 3])
    certificates = collapse(network, random_regions(rng, 10, 4, 0.1), "exact", np.ones(3))
    for k in range(len(certificates)):
        small = multiply_out(network, States.of(certificates, k, network))
        xi = rng.uniform(-1, 1, (200, 4))
        x = certificates.center[k] + xi @ np.linalg.inv(certificates.transform[k]).T
        np.testing.assert_allclose(small.network()(x), network(x), atol=1e-12)
        assert certificates.cost[k] == small.rounded().multiplications < 0.7 * (4 * 40 + 40 * 40 + 40 * 40 + 40 * 3)


def test_mixed_is_cheaper_and_spends_no_more_than_the_tolerance(tmp_path) -> None:
    rng = np.random.default_rng(5)
    policy, network = mlp(tmp_path, [3, 32, 32, 2], "Tanh")
    regions = random_regions(rng, 20, 3, 0.2)
    exact = collapse(network, regions, "exact", np.ones(2))
    assert (exact.cost >= 3 * 32 + 32 * 32 + 32 * 2).all()  # tanh has no linear piece
    previous = exact.cost
    for tolerance in (0.01, 0.05, 0.2):
        mixed = collapse(network, regions, "mixed", np.full(2, tolerance))
        assert (mixed.bound_offset <= tolerance).all() and (mixed.cost <= previous).all()
        assert [int((mixed.octets.row(k) == LINE).sum()) * 2 for k in range(20)] == np.diff(mixed.floats.start).tolist()
        assert break_collapsed(policy, network, mixed, rng)[1] == 0
        previous = mixed.cost
    assert np.median(mixed.cost) < 0.5 * np.median(exact.cost)


def test_the_bound_is_signed(tmp_path) -> None:
    """Folding errors that cancel behind a kept layer are not added up by magnitude."""
    line = States(np.array([LINE, LINE, KEPT], np.uint8), np.full((2, 2), [0.5, 0.25], np.float32))
    first = Affine((0,), (np.ones((2, 1)),), np.zeros(2))
    cancel = Affine((2,), (np.array([[1.0, -1.0]]),), np.zeros(1))
    network = Network(1, (first, Elementwise(1, "relu", 2), cancel, Elementwise(3, "tanh", 1)))
    regions = Regions.from_axes(np.zeros((1, 1)), np.ones((1, 1, 1)), np.ones((1, 1)))
    ends = ranges(network, regions)
    problem = module._Problem(network, [low[0] for low, _ in ends], [high[0] for _, high in ends])
    difference = module._Difference(problem, line)
    (_, row), *_ = [(i, c) for i, c in difference._backward(3, np.arange(1)) if i == 1]
    np.testing.assert_array_equal(row, [[0.5, -0.5]])
    assert 0.4 < difference.total[0] < 0.53  # two folds of 1/4 each are independent unknowns


def test_the_checker_says_unknown_for_what_is_false(tmp_path) -> None:
    rng = np.random.default_rng(6)
    policy, network = mlp(tmp_path, [3, 24, 24, 2])
    checker = Checker(network)
    regions = random_regions(rng, 12, 3, 0.2)
    certificates = collapse(network, regions, "mixed", np.full(2, 0.05))
    worst = break_collapsed(policy, network, certificates, rng, 600)[2]
    shrunk = replace(certificates, bound_offset=0.9 * worst)
    assert all(verdict(checker, shrunk, k) == "unknown" for k in range(12) if worst[k].min() > 0)
    flipped_false = 0
    for k in range(12):  # neurons folded onto the wrong piece: whatever breaks the bound must not be proved
        code = certificates.octets.row(k)
        for neuron in rng.permutation(np.flatnonzero(code != LINE))[:4]:
            values = certificates.octets.values.copy()
            values[certificates.octets.start[k] + neuron] = 1 if code[neuron] == 0 else 0
            flipped = replace(certificates, octets=Ragged(values, certificates.octets.start))
            if break_collapsed(policy, network, flipped[k : k + 1], rng, 200)[1]:
                flipped_false += 1
                assert verdict(checker, flipped, k, 8) == "unknown"
    assert flipped_false > 10
    for name in ("bound_offset", "bound_weight", "center", "transform"):
        for bad in (np.nan, np.inf):
            value = getattr(certificates, name).copy()
            value[0].flat[0] = bad
            assert verdict(checker, replace(certificates, **{name: value}), 0) == "unknown"
    assert verdict(Checker(network, "argmax"), certificates, 0) == "unknown"


def test_rebuilt_bit_by_bit_from_a_stored_library(tmp_path) -> None:
    rng = np.random.default_rng(7)
    policy, network = mlp(tmp_path, [3, 24, 24, 2])
    certificates = collapse(network, random_regions(rng, 10, 3, 0.2), "mixed", np.full(2, 0.05))
    trie = Trie.root().with_regions(certificates.regions, np.arange(10))
    library = Library(policy.sha256, policy.card, np.full(2, 0.05), certificates, trie, np.zeros(10, np.int64))
    library.save(tmp_path / "l.laws")
    stored = Library.load(tmp_path / "l.laws").certificates
    for k in range(10):
        a, b = (multiply_out(network, States.of(c, k, network)).rounded() for c in (certificates, stored))
        assert all((p == q).all() for p, q in zip(a.matrices, b.matrices, strict=True))
    x = rng.normal(size=(10, 3)).astype(np.float32)
    index = np.arange(10)
    assert (Experts(stored, policy).many(index, x) == Experts(certificates, policy).many(index, x)).all()


def test_affine_and_collapsed_experts_in_one_library(tmp_path) -> None:
    rng = np.random.default_rng(8)
    policy, network = mlp(tmp_path, [3, 24, 24, 2], clip=1.0)
    regions = random_regions(rng, 9, 3, 0.05)
    parts = [certify(network, regions[:3]), *(collapse(network, regions[3:6], "exact", np.ones(2)),)]
    parts.append(collapse(network, regions[6:], "mixed", np.full(2, 0.05)))
    certificates = Certificates.join(parts)
    experts = Experts(certificates, policy)
    x = (regions.center + 0.0).astype(np.float32)
    order = rng.permutation(9)
    values = experts.many(order, x[order])
    assert (np.abs(values - policy.batch(x[order])) <= certificates.worst[order]).all()
    for _ in range(2):  # the buffers are used again
        for k in order:
            np.testing.assert_allclose(experts(int(k), x[k]), values[list(order).index(k)], atol=1e-5)


def test_a_point_and_an_overflow(tmp_path) -> None:
    _, network = mlp(tmp_path, [3, 16, 16, 2])
    center = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32).astype(float)
    points = Regions.from_axes(center, np.stack([np.eye(3)] * 5), np.zeros((5, 3)))
    point = collapse(network, points, "exact", np.ones(2))
    assert (point.cost <= 2 * (1 + 3)).all() and (point.worst < 1e-4).all()  # an affine map
    layers = [(np.full((4, 2), 1e30), np.zeros(4)), (np.full((1, 4), 1e30), np.zeros(1))]
    network = load_network(save_mlp(tmp_path / "q.onnx", layers))
    regions = Regions.from_axes(np.ones((2, 2)), np.stack([np.eye(2)] * 2), np.ones((2, 2)))
    regions = Regions(regions.center, np.stack([regions.transform[0], np.full((2, 2), np.nan)]))
    found = collapse(network, regions, "exact", np.ones(1))
    assert np.isinf(found.bound_offset).all()
    assert verdict(Checker(network), found, 0) == verdict(Checker(network), found, 1) == "unknown"


def test_what_does_not_belong_together_is_refused(tmp_path) -> None:
    rng = np.random.default_rng(9)
    policy, network = mlp(tmp_path, [3, 16, 16, 2], "Elu")
    certificates = collapse(network, random_regions(rng, 2, 3, 0.1), "exact", np.ones(2))
    other = load_network(save_mlp(tmp_path / "other.onnx", random_mlp(rng, [3, 16, 20, 2])))
    with pytest.raises(LibraryError, match="32 neuron states, the policy has 36 neurons"):
        States.of(certificates, 0, other)
    wrong = certificates.octets.values.copy()
    wrong[0] = 0  # an elu has no linear piece on the left
    with pytest.raises(LibraryError, match="no such linear piece"):
        Experts(replace(certificates, octets=Ragged(wrong, certificates.octets.start)), policy)
    wrong[0] = LINE
    with pytest.raises(LibraryError, match="0 numbers for the lines of 1 neurons"):
        Experts(replace(certificates, octets=Ragged(wrong, certificates.octets.start)), policy)
    normalized = Network(3, (*network.nodes, Normalize(len(network.nodes), 2, 1e-5, len(network.nodes))))
    with pytest.raises(ModelError, match="cannot be folded"):
        collapse(normalized, random_regions(rng, 1, 3, 0.1), "exact", np.ones(2))


@pytest.mark.parametrize("function, parameters", [("clip", (-0.7, 1.3)), ("hardswish", ()), ("leakyrelu", (0.1,))])
def test_pieces_are_what_the_function_is_between_its_kinks(function: str, parameters: tuple[float, ...]) -> None:
    node = Elementwise(0, function, 1, parameters)
    kinks = node.facts.kinks(parameters)
    edges = [kinks[0] - 5.0, *kinks, kinks[-1] + 5.0]
    found = pieces(node)
    assert len(found) == len(kinks) + 1
    for (slope, offset), (low, high) in zip(found, pairwise(edges), strict=True):
        z = np.linspace(low, high, 50)
        assert np.isnan(slope) or np.allclose(node(z), slope * z + offset, atol=1e-15)


@pytest.mark.parametrize("kind", ["exact", "mixed"])
def test_a_grown_library_answers_within_its_bounds_and_budget(tmp_path, kind) -> None:
    """A plain random policy, its experts at most half as expensive, through the router, as a control loop calls it."""
    rng = np.random.default_rng(10)
    policy, network = mlp(tmp_path, [3, 32, 32, 2])
    tolerance = np.full(2, 0.1)
    x = (0.6 * rng.normal(size=(1600, 3))).astype(np.float32)
    seen, fresh = x[:1200], x[1200:]
    grown = grow_collapsed(policy, network, seen, tolerance, kind, share=0.5, max_certificates=200)
    certificates = grown.library.certificates
    assert (certificates.cost <= 0.5 * multiplications(network)).all()
    cached = CachedPolicy(grown.library, policy)
    hits = 0
    for observation in fresh:
        answer = cached.lookup(observation)
        if answer is not None:
            hits += 1
            assert answer.kind == kind
            assert (np.abs(answer.action - policy(observation)) <= answer.bound).all() and (answer.bound <= 0.1).all()
    assert abs(hits / len(fresh) - grown.train_coverage) < 0.15 and hits > 0.4 * len(fresh)
    found = verify(grown.library, policy, network, 1000, attack=True)
    assert found.good and found.by_kind == {kind: {"holds": len(grown.library), "violated": 0, "unknown": 0}}
    near = np.concatenate([seen[:300], 0.02 * seen[:300]])  # half of them where the policy hardly bends
    affine = grow(policy, network, near[300:], policy.batch(near[300:]), tolerance, max_certificates=64)
    both = grow_collapsed(policy, network, near, tolerance, kind, 0.5, max_certificates=64, base=affine)
    assert both.train_coverage >= 0.45 and set(both.library.certificates.kind) == {0, certificates.kind[0]}
