from __future__ import annotations

import ast
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from laws_ros.build.verify import Executed, verify
from laws_ros.core import checker as module
from laws_ros.core.certificate import Ragged
from laws_ros.core.certify import certify
from laws_ros.core.checker import Checker, Proof
from laws_ros.core.region import Regions
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from tests.support import break_certificates, random_mlp, random_regions, save_mlp, save_model


def test_it_proves_what_was_certified(built) -> None:
    checker = Checker(built.network)
    certificates = built.library.certificates
    assert all(checker.verdict(certificates, k) == "holds" for k in range(len(certificates)))


@pytest.mark.parametrize(
    "what", ["bound_offset", "bound_weight", "expert_weight", "expert_bias", "center", "transform"]
)
def test_it_never_proves_a_false_certificate(built, what) -> None:
    """Every field is changed until sampling finds a violation; the checker must then not say "holds"."""
    rng = np.random.default_rng(0)
    certificates = built.library.certificates[:25]
    value = getattr(certificates, what)
    scale = {"bound_offset": -0.9, "center": 1.0, "transform": -0.6}.get(what, 0.2)
    if what in ("bound_offset", "transform"):
        changed = (value * (1 + scale)).astype(value.dtype)
    else:
        changed = (value + scale * rng.choice([-1, 1], size=value.shape)).astype(value.dtype)
    false = replace(certificates, **{what: changed})
    checker, proved_false = Checker(built.network), 0
    executed = Executed(built.policy, false)
    inverse = np.linalg.inv(false.transform)
    violated = 0
    for k in range(len(false)):
        xi = rng.uniform(-1, 1, (3000, 3))
        x = (false.center[k] + xi @ inverse[k].T).astype(np.float32)
        inside, error, bound = executed.compare(np.full(3000, k), x)
        if (inside & (error > bound).any(axis=1)).any():
            violated += 1
            proved_false += checker.verdict(false, k) == "holds"
    assert violated >= 5  # or the test proves nothing
    assert proved_false == 0


def test_it_proves_balls_and_not_the_boxes_around_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    path = save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 24, 24, 2], 0.7))
    policy, network = Policy(path), load_network(path)
    axes = np.linalg.qr(rng.normal(size=(16, 3, 3)))[0]
    balls = Regions.from_axes(rng.normal(size=(16, 3)), axes, rng.uniform(0.1, 0.6, (16, 3)), 3)
    checker = Checker(network)
    certificates = certify(network, balls)
    assert all(checker.verdict(certificates, k) == "holds" for k in range(16))
    boxes = replace(certificates, round=np.zeros(16, np.int32))
    executed, false = Executed(policy, boxes), 0
    for k in range(16):
        x = boxes.regions.sample(rng, np.full(500, k), 0.5).astype(np.float32)
        inside, error, bound = executed.compare(np.full(500, k), x)
        if (inside & (error > bound).any(axis=1)).any():
            false += 1
            assert checker.verdict(boxes, k) == "unknown"
    assert false >= 3  # or the test proves nothing


def test_it_touches_where_the_issuer_does(tmp_path: Path) -> None:
    """In the middle of an interval the tangent, where it is below the function, and no other line that touches there:
    certificates over wide regions rest on the issuer's line."""
    nodes = [
        helper.make_node("Mul", ["observation", "k"], ["a"]),
        helper.make_node("Sigmoid", ["a"], ["b"]),
        helper.make_node("Mul", ["observation", "b"], ["action"]),
    ]
    network = load_network(save_model(tmp_path / "p.onnx", nodes, {"k": np.array([1.702], np.float32)}, 6, 6))
    certificates = certify(network, random_regions(np.random.default_rng(10), 60, 6, 0.7))
    checker = Checker(network)
    assert all(checker.verdict(certificates, k) == "holds" for k in range(60))


def test_limits_that_the_policy_does_not_keep_are_unknown(built) -> None:
    """Within its own limits a policy that ends in a clip to [-1, 1] is what it is before that; beyond, it is not."""
    network, c = built.network, built.library.certificates[:1]
    found = certify(network, c.regions, limits=np.array([[-1.0, -1.0], [1.0, 1.0]], np.float32))
    checker = Checker(network)
    assert checker.verdict(found, 0) == "holds"
    for row in ([-1.1, -1.0, 1.0, 1.0], [-1.0, -1.0, 1.0, 2.0], [np.nan] * 4, [-1.0, 1.0], [-1.0] * 3):
        other = replace(found, floats=Ragged.of([np.array(row)], np.float32))
        assert checker.verdict(other, 0) == "unknown"


def test_unknown_for_what_is_not_finite(built) -> None:
    c = built.library.certificates[:1]
    for name in ("center", "transform", "bound_offset", "bound_weight", "expert_weight", "expert_bias"):
        for bad in (np.nan, np.inf):
            value = getattr(c, name).copy()
            value.flat[0] = bad
            assert Checker(built.network).verdict(replace(c, **{name: value}), 0) == "unknown"


def test_it_is_small_and_shares_no_bounding_code() -> None:
    source = Path(module.__file__).read_text()
    assert len(source.splitlines()) < 400
    imported = {n.module for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"__future__", "collections.abc", "dataclasses", "itertools", "numpy.typing", "typing"} | {
        "certificate",
        "network",
    }
    certificate = ast.parse((Path(module.__file__).parent / "certificate.py").read_text())
    assert not {n.module for n in ast.walk(certificate) if isinstance(n, ast.ImportFrom)} & {"bounds", "certify"}


def test_verification_finds_a_planted_violation(built) -> None:
    library = built.library
    found = verify(library, built.policy, built.network, 20_000, attack=True)
    assert found.violations == 0 and found.unknown == 0 and found.samples >= 20_000 and found.attacks > 0
    offset = library.certificates.bound_offset.copy()
    offset[0] *= 0.2
    planted = replace(library, certificates=replace(library.certificates, bound_offset=offset))
    found = verify(planted, built.policy, built.network, 20_000, attack=True)
    assert found.violations > 0 and not found.good and planted.ids[0] in (found.first or "")
    assert found.verdicts[0] == "violated" and set(found.verdicts[1:]) == {"holds"}


def test_the_shared_attack_breaks_a_shrunken_bound(built) -> None:
    c = built.library.certificates
    rng = np.random.default_rng(0)
    assert break_certificates(built.policy, built.network, c, rng)[1] == 0
    assert break_certificates(built.policy, built.network, replace(c, bound_offset=0.3 * c.bound_offset), rng)[1] > 0


def normalisation(form: str, offset: float, scale: float, epsilon: float, rng: np.random.Generator) -> tuple:
    """Nodes, constants and opset of a policy that normalises offset + scale * (something of order 1)."""
    make, f32, n = helper.make_node, np.float32, 24
    constants = {
        "w": scale * rng.normal(size=(2, n)),
        "b": offset + scale * rng.normal(size=n),
        **{"gain": rng.normal(size=n), "bias": rng.normal(size=n), "o": rng.normal(size=(n, 2))},
        **{"two": np.array(2.0), "epsilon": np.array(epsilon)},
    }
    nodes = {
        "fused": [make("LayerNormalization", ["x", "gain", "bias"], ["y"], epsilon=epsilon)],
        "rms": [make("RMSNormalization", ["x", "gain"], ["y"], epsilon=epsilon)],
        "decomposed": [
            make("ReduceMean", ["x"], ["m"], axes=[-1]),
            make("Sub", ["x", "m"], ["u"]),
            make("Pow", ["u", "two"], ["p"]),
            make("ReduceMean", ["p"], ["v"], axes=[-1]),
            make("Add", ["v", "epsilon"], ["e"]),
            make("Sqrt", ["e"], ["s"]),
            make("Div", ["u", "s"], ["y"]),
        ],
    }[form]
    nodes = [make("Gemm", ["observation", "w", "b"], ["x"]), *nodes, make("MatMul", ["y", "o"], ["action"])]
    return nodes, {k: v.astype(f32) for k, v in constants.items()}, 23 if form == "rms" else 17


def normalised(folder: Path, form: str, offset: float, scale: float, epsilon: float) -> tuple[int, int, float]:
    """Small regions of three such policies: how many the checker knows, violations, and the widest enclosure."""
    known, broken, widest = 0, 0, 0.0
    for seed, radius in product(range(3), (1e-6, 1e-3, 1e-1)):
        rng = np.random.default_rng(seed)
        nodes, constants, opset = normalisation(form, offset, scale, epsilon, rng)
        path = save_model(folder / "p.onnx", nodes, constants, 2, 2, opset)
        network, center = load_network(path), rng.normal(size=2)
        region = Regions.from_axes(center[None], np.eye(2)[None], np.full((1, 2), radius))
        checker, last = Checker(network), len(network.nodes)
        x = (center + radius * rng.uniform(-1, 1, (400, 2))).astype(np.float32)
        x = x[region.contains(x)[:, 0]]
        assert len(x) > 100
        with np.errstate(all="ignore"):
            box, blur = module._enclose(region.transform[0])
            proof = Proof(checker, center, box, blur, {}, np.zeros(2), np.ones(2), np.zeros(2, bool))
            (w, c), (v, d) = proof.above(last, np.eye(2)), proof.above(last, -np.eye(2))
            high, low = x @ w.T + c, x @ v.T + d
        if np.isfinite(high).all() and np.isfinite(low).all():
            known += 1
            y = Policy(path).batch(x).astype(float)
            broken += int(((y > high) | (y < -low) | np.isnan(y)).sum())
            widest = max(widest, float((high + low).max()))
    return known, broken, widest


SCALES = [(0, 1), (1e3, 1), (30, 1e-3), (0, 1e-19), (0, 1e-38), (1e-30, 1e-36), (1e15, 1e10), (1e30, 1e28)]


@pytest.mark.parametrize("form", ["fused", "decomposed", "rms"])
def test_normalisations_are_enclosed_as_executed(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A common offset whose squares cancel, denormals, near overflow, no epsilon, one that is lost beside the rest."""
    found = {(o, s, e): normalised(tmp_path, form, o, s, e) for o, s in SCALES for e in (0.0, 1e-12, 1e-5)}
    assert sum(broken for _, broken, _ in found.values()) == 0
    assert found[0, 1, 1e-5][0] == found[0, 1e-38, 1e-5][0] == 9  # the ordinary, and what epsilon outweighs
    assert found[1e30, 1e28, 1e-5][0] == 0  # squares overflow
    assert found[0, 1e-38, 0.0][0] == 0  # 0 / 0
    if form == "fused":  # one pass: mean(x^2) - mean(x)^2 cancels, and nothing is known of it
        assert found[1e3, 1, 1e-5][0] == found[30, 1e-3, 1e-5][0] == 0
    monkeypatch.setattr(module, "_rounding", lambda terms, unit: 0.0)
    monkeypatch.setattr(module, "_U32", 0.0)
    assert normalised(tmp_path, form, 1e3, 1, 1e-5)[1] > 0  # or the test proves nothing


@pytest.mark.parametrize("activation", ["Relu", "LeakyRelu", "Tanh"])
def test_lines_of_a_larger_region_are_sound_whatever_they_are(activation: str, tmp_path: Path) -> None:
    """Slopes from elsewhere are used only where any slope is below the function, and only such."""
    rng, turned = np.random.default_rng(9), 0
    path = save_mlp(tmp_path / "p.onnx", random_mlp(rng, [3, 24, 24, 2], 1.5), activation)
    network, policy = load_network(path), Policy(path)
    checker, last, none = Checker(network), len(network.nodes), np.zeros(3, bool)
    for _ in range(20):
        center, radius = rng.normal(size=3), rng.uniform(0.01, 1.0)
        root = {k: rng.choice([-3.0, 0.0, 0.3, 1.0, 7.0], n.size) for k, n in enumerate(network.nodes, start=1)}
        box, blur = module._enclose(np.eye(3) / radius)
        proof = Proof(checker, center, box, blur, root, np.zeros(3), np.ones(3), none)
        x = (center + 0.999 * radius * rng.uniform(-1, 1, (300, 3))).astype(np.float32)
        y = policy.batch(x).astype(float)
        found = [proof.above(last, sign * np.eye(2), lines) for lines in (0, 1) for sign in (1.0, -1.0)]
        for k, (weight, constant) in enumerate(found):
            assert ((y if k % 2 == 0 else -y) <= x @ weight.T + constant).all()
        turned += int((found[0][0] != found[2][0]).any())
    assert turned == (0 if activation == "Tanh" else 20)
