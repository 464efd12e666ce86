"""Training end to end in small, and the penalty against what it stands for."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs PyTorch: `make torch` adds it")
for module in ("mujoco", "scipy"):
    pytest.importorskip(module, reason=f"training needs {module}: `make torch` adds it")

from laws_ros.build import workloads  # noqa: E402
from laws_ros.build.cacheable import Recipe, saturating_error  # noqa: E402
from laws_ros.build.cartpole import SPEC, teacher  # noqa: E402
from laws_ros.build.linear_search import Search, linear_teacher  # noqa: E402
from laws_ros.build.regularizers import certified_gap, random_boxes  # noqa: E402
from laws_ros.build.train import KINDS, train  # noqa: E402
from laws_ros.core.card import Card  # noqa: E402
from laws_ros.core.certify import certify  # noqa: E402
from laws_ros.core.errors import WorkloadError  # noqa: E402
from laws_ros.core.region import Regions  # noqa: E402
from laws_ros.runtime.files import load_card, sha256_file, share_path  # noqa: E402
from laws_ros.runtime.onnx_graph import load_network  # noqa: E402
from laws_ros.runtime.policy import Policy  # noqa: E402
from tests.support import random_mlp, save_mlp  # noqa: E402

TINY = Recipe(hidden=64, steps=300, rounds=1, episodes=4, learning_rate=3e-3, check_episodes=4, parity_samples=1000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out, lines = tmp_path_factory.mktemp("trained"), []
    entry = train("cartpole", out, seed=3, log=lines.append, recipe=TINY)
    return out, entry, lines


def test_tiny_training_balances_and_exports(trained):
    out, entry, lines = trained
    path = out / "cartpole.onnx"
    assert json.loads((out / "MANIFEST.json").read_text()) == {"cartpole.onnx": entry}
    assert entry["sha256"] == sha256_file(path)
    assert entry["parameters"] == 64 * 4 + 64 + 64 * 64 + 64 + 64 + 1
    assert entry["parity"]["worst_action_difference"] < 1e-4  # of 10 N
    assert entry["policy_over_teacher"] > 0.9
    assert any("half-gap" in line for line in lines)
    card = load_card(path)
    assert (card.observations, card.actions, card.decision) == (SPEC.observations, SPEC.actions, "none")
    far = Policy(path).batch(np.array([[1.5, 0.5, 2.0, 2.0], [-1.5, -0.5, -2.0, -2.0]], np.float32))
    assert np.array_equal(far, [[10.0], [-10.0]])  # saturates exactly


def test_exported_graph_can_be_bounded(trained):
    network = load_network(trained[0] / "cartpole.onnx")
    policy = Policy(trained[0] / "cartpole.onnx")
    x = np.random.default_rng(0).normal(0.0, 0.1, (500, 4)).astype(np.float32)
    assert np.abs(network(x) - policy.batch(x)).max() < 1e-4


def test_manifest_keeps_other_entries(trained, tmp_path):
    (tmp_path / "MANIFEST.json").write_text('{"other.onnx": {"sha256": "0"}}')
    train(
        "cartpole",
        tmp_path,
        log=lambda line: None,
        recipe=Recipe(hidden=8, steps=2, rounds=0, episodes=1, check_episodes=1, parity_samples=10),
    )
    assert sorted(json.loads((tmp_path / "MANIFEST.json").read_text())) == ["cartpole.onnx", "other.onnx"]


@pytest.mark.parametrize(
    ("workload", "parameters"),
    [
        ("cartpole", 4_000_000),
        ("arm_sort", 4_000_000),
        ("quadruped_walk", 1_000_000),
        ("gym:HalfCheetah-v5", 70_000),
    ],
)
def test_shipped_model_is_the_one_in_the_manifest(workload, parameters):
    name = workload.removeprefix("gym:")
    entry = json.loads(share_path("models/MANIFEST.json").read_text())[f"{name}.onnx"]
    path = share_path(f"models/{name}.onnx")
    assert sha256_file(path) == entry["sha256"]
    assert entry["parameters"] >= parameters
    assert path.stat().st_size < 20_000_000
    recipe = asdict(KINDS["relu"](workload))
    assert {**asdict(Recipe()), **entry["recipe"]} == recipe  # the command in the manifest makes this model
    assert entry.get("search") == (None if workloads.module(workload) else asdict(Search()))
    assert entry["policy_over_teacher"] >= 0.99
    if name != workload:
        pytest.importorskip("gymnasium", reason="needs Gymnasium: pip install 'laws_ros[gym]'")
    card, spec = load_card(path), workloads.get(workload).spec
    assert (card.observations, card.actions, card.context) == (spec.observations, spec.actions, spec.context)


def test_contexts_have_boxes_of_their_own(tmp_path):
    recipe = Recipe(hidden=16, steps=2, rounds=0, episodes=1, check_episodes=1, parity_samples=10)
    workload, lines = workloads.get("arm_sort"), []
    card = Card("arm", workload.spec.observations, workload.spec.actions, context=("station", "phase"))
    student = recipe.student(workload, workloads.module("arm_sort").teacher(), card, 0)
    student.gather(0)
    student.fit(2, lines.append)
    assert {tuple(c) for c in student.contexts} >= {(0, 0), (0, 1), (0, 2), (0, 3), (1, 4), (1, 5)}
    axes = student.axes.numpy()
    assert axes.shape == (len(student.contexts), 19, 17)
    assert not axes[:, 17:].any()
    assert not student.spread[17:].any()  # no jitter there either
    here = next(k for k, c in enumerate(student.contexts) if tuple(c) == (0, 2))
    rows = np.flatnonzero((student.data[:, 17:] == (0, 2)).all(axis=1))
    assert np.array_equal(student.around(rows[:3]).numpy(), axes[[here] * 3])
    # the joints share one scale, so that a joint that hardly moves is not magnified
    assert len(set(student.scale[:7])) == 1
    assert student.data[:, 2].std() < 0.2 * student.data[:, 0].std()


def test_a_step_of_training_is_done_where_the_network_is():
    """There is no GPU here; "meta" is a device, too, and torch refuses to mix two."""
    card = Card("cart-pole", SPEC.observations, SPEC.actions)
    student = TINY.student(workloads.get("cartpole"), teacher(), card, 0)
    student.gather(0)
    student.device = torch.device("meta")
    student.net.to(student.device)
    loss = student.loss(np.arange(TINY.batch) % len(student.data))
    loss.backward()
    student.optimizer.step()
    assert loss.device == student.device and all(p.grad.device == student.device for p in student.net.parameters())
    with pytest.raises(RuntimeError, match="device"):
        student.net(torch.zeros(1, 4))


def test_workload_without_teacher(tmp_path):
    pytest.importorskip("gymnasium", reason="needs Gymnasium: pip install 'laws_ros[gym]'")
    for name in ("encounter", "gym:CartPole-v1"):
        with pytest.raises(WorkloadError, match="no teacher"):
            train(name, tmp_path)


def test_an_environment_gets_a_linear_teacher_that_is_searched_for(tmp_path):
    pytest.importorskip("gymnasium", reason="needs Gymnasium: pip install 'laws_ros[gym]'")
    search, lines = Search(iterations=8, directions=8, best=8, length=200, every=4, episodes=2), []
    recipe = Recipe(hidden=16, steps=20, rounds=0, episodes=2, straight=True, check_episodes=2, parity_samples=100)
    entry = train("gym:InvertedPendulum-v5", tmp_path, recipe=recipe, search=search, log=lines.append)
    returns = [float(re.match(r"search \d+: return ([-\d.]+)", line)[1]) for line in lines if "search" in line]
    assert len(returns) == 2 and entry["teacher_return"] > 20.0  # of 1000; without any control it falls within 10
    assert entry["search"] == asdict(search) and entry["command"] == "laws train gym:InvertedPendulum-v5 --seed 0"
    assert Policy(tmp_path / "InvertedPendulum-v5.onnx").card.name == "gym:InvertedPendulum-v5"
    workload = workloads.get("gym:InvertedPendulum-v5")
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    one, two, other = (linear_teacher(workload, replace(search, iterations=1), seed)(x) for seed in (0, 0, 1))
    assert np.array_equal(one, two) and not np.array_equal(one, other)


def test_teacher_survives_pushes():
    found = workloads.rollouts(workloads.get("cartpole"), teacher(), episodes=8, seed=0)
    assert all(len(r) == SPEC.episode_steps for r in found.rewards)
    assert found.returns.mean() > 600
    saturated = np.abs(np.concatenate(found.actions)) >= 10.0
    assert 0.001 < saturated.mean() < 0.2  # the workload asks for all of the actuator now and then


def mlp(rng, sizes):
    """The same random ReLU network as layers and as float64 torch."""
    layers = random_mlp(rng, sizes)
    modules = []
    for weight, bias in layers:
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0]).double()
        linear.weight.data, linear.bias.data = (torch.tensor(v.astype(np.float32)).double() for v in (weight, bias))
        modules += [linear, torch.nn.ReLU()]
    return layers, torch.nn.Sequential(*modules[:-1])


@pytest.mark.parametrize("sizes", [[4, 64, 64, 1], [3, 32, 32, 32, 2], [5, 40, 2]])
@pytest.mark.parametrize("radius", [0.03, 0.3, 2.0])
def test_penalty_bounds_every_sampled_gap(sizes, radius):
    rng = np.random.default_rng(len(sizes))
    _, net = mlp(rng, sizes)
    n, boxes = sizes[0], 40
    centers = torch.tensor(rng.normal(size=(boxes, n)))
    generators = torch.tensor(radius * rng.uniform(-1, 1, (boxes, n, n)) / n)
    gap = certified_gap(net, centers, generators)
    with torch.no_grad():
        zeta = torch.tensor(rng.choice([-1.0, 1.0], (boxes, 2000, n)))
        zeta[:, ::2] *= torch.tensor(rng.uniform(0, 1, (boxes, 1000, n)))
        moves = zeta @ generators.transpose(1, 2)
        bend = net(centers[:, None] + moves) + net(centers[:, None] - moves) - 2 * net(centers[:, None])
        # an affine function within e of f at three points in line, evenly spaced, shows that f bends by at most 4 e
        sampled = bend.abs().amax(dim=1) / 4
    assert (sampled > 0.0).any()
    assert (gap.relaxation >= sampled - 1e-12).all()  # the sampling's own float64 rounding
    assert (gap.rounding > 0.0).all()


def test_penalty_follows_the_certifiers_bound(tmp_path):
    rng = np.random.default_rng(1)
    layers, net = mlp(rng, [4, 48, 48, 1])
    network = load_network(save_mlp(tmp_path / "p.onnx", layers))
    centers, axes = rng.normal(size=(30, 4)), np.linalg.qr(rng.normal(size=(30, 4, 4)))[0]
    widths = rng.uniform(0.01, 0.2, (30, 4))
    certified = certify(network, Regions.from_axes(centers, axes, widths)).worst[:, 0]
    with torch.no_grad():
        gap = certified_gap(net, torch.tensor(centers), torch.tensor(axes * widths[:, None, :]))
    ratio = gap.total[:, 0].numpy() / certified  # the certifier may choose other slopes for a bent ReLU
    assert 0.9 < np.median(ratio) < 1.2
    assert (ratio > 0.5).all()
    assert (ratio < 2.0).all()


def test_penalty_has_gradients_in_every_layer_and_falls_under_them():
    _, net = mlp(np.random.default_rng(2), [4, 32, 32, 1])
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(64, 4, generator=generator).double()
    boxes = random_boxes(torch.eye(4).double().expand(64, 4, 4), 0.3, generator)
    assert (boxes.abs().amax(dim=(1, 2)) <= 0.3).all()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    history = []
    for _ in range(100):
        loss = certified_gap(net, centers, boxes).total.mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in list(net.parameters())[:-1])
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.5 * history[0]


def test_other_layers_are_refused():
    linear, relu, tanh = torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Tanh()
    for net in ([linear, tanh, linear], [linear, relu]):
        with pytest.raises(TypeError, match="certified_gap needs"):
            certified_gap(torch.nn.Sequential(*net), torch.zeros(1, 2), torch.zeros(1, 2, 2))


def test_saturating_error():
    target = torch.tensor([0.3, 1.5, 1.5, 1.5, -2.0, -2.0])
    output = torch.tensor([0.5, 0.8, 1.0, 7.0, -0.9, -3.0])
    assert torch.allclose(saturating_error(output, target), torch.tensor([0.2, -0.2, 0.0, 0.0, 0.1, 0.0]))
