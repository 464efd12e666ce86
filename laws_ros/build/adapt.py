"""Make a finished policy cacheable: distil it into a network of the same interface that was trained to be.

The policy is the teacher of `train.distil` (DAgger, with the penalty on the certified gap), the new file takes its
input's and output's names and its card. What it costs and what it buys stands side by side: both returns, in the same
episodes, and the share of held-out observations that a library of the same budget answers for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.compose
from numpy.typing import NDArray
from onnx import helper

from laws_ros.core.card import Card
from laws_ros.core.errors import LawsError, ModelError
from laws_ros.runtime.files import sha256_file
from laws_ros.runtime.onnx_graph import load_network
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

from .evaluate import check_fit, observed
from .grow import grow
from .workloads import Workload


@dataclass(frozen=True)
class Coverage:
    """Share of held-out observations answered by a library of a given budget, or why there is none."""

    answered: float | None
    regions: int
    certificates: int
    reason: str = ""


@dataclass(frozen=True)
class Adaptation:
    """A policy and what became of it; `training` is what `train.distil` says (size, parity, returns)."""

    return_policy: float
    return_adapted: float
    coverage_policy: Coverage
    coverage_adapted: Coverage
    training: dict[str, Any]


def adapt(
    policy: Policy,
    workload: Workload,
    out: Path,
    tolerance: NDArray[np.float64],
    recipe: dict[str, Any],
    *,
    steps: int = 50_000,
    max_regions: int = 2000,
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Adaptation:
    """Distil a policy for a workload, write it with its card, and compare.

    Args:
        out: the ONNX file to write; its card goes beside it.
        tolerance: [m] for both libraries, as for `laws build`.
        recipe: fields of cacheable.Recipe that differ from their defaults.
        steps, max_regions: observations and budget of the libraries that are compared.

    Raises:
        WorkloadError: the policy does not fit the workload.
        ModelError: `out` is the policy's own file.
    """
    from .cacheable import Recipe
    from .train import distil

    check_fit(policy, workload)
    if out.exists() and out.samefile(policy.path):
        raise ModelError(f"{out}: is the policy itself; name another file")
    spec, card = workload.spec, policy.card
    if not policy.has_card:  # its channels are then the workload's, but the decision is the policy's own
        card = Card(card.name, spec.observations, spec.actions, card.decision, spec.context)
    draft = out.with_name(f".{out.stem}.{os.getpid()}.onnx")
    try:
        training = distil(workload, policy.batch, draft, card, Recipe(**recipe), seed=seed, log=progress)
        _renamed(draft, policy)
        training["sha256"] = sha256_file(draft)
        os.replace(draft, out)
        os.replace(draft.with_suffix(".yaml"), out.with_suffix(".yaml"))
    finally:
        for path in (draft, draft.with_suffix(".yaml")):
            path.unlink(missing_ok=True)
    adapted = Policy(out)
    before, after = (_coverage(p, workload, tolerance, steps, max_regions, seed, progress) for p in (policy, adapted))
    return Adaptation(training["teacher_return"], training["policy_return"], before, after, training)


def _renamed(path: Path, policy: Policy) -> None:
    """Give a network from observations [N, n] to actions [N, m] the input and output of a policy."""
    source = onnx.load(str(policy.path), load_external_data=False).graph
    given = next(i for i in source.input if i.name not in {c.name for c in source.initializer})
    model = onnx.compose.add_prefix(onnx.load(str(path)), "adapted_")
    graph = model.graph
    names = {graph.input[0].name: given.name, graph.output[0].name: source.output[0].name}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    graph.input[0].name, graph.output[0].name = names.values()
    shape = [d.dim_value for d in given.type.tensor_type.shape.dim]
    if len(shape) > 2:
        graph.node[0].input[0] = "adapted_flat"
        graph.node.insert(0, helper.make_node("Flatten", [given.name], ["adapted_flat"], "adapted_flatten", axis=1))
        dims = graph.input[0].type.tensor_type.shape.dim
        del dims[1:]
        for size in shape[1:]:
            dims.add().dim_value = size
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(path))


def _coverage(
    policy: Policy,
    workload: Workload,
    tolerance: NDArray[np.float64],
    steps: int,
    max_regions: int,
    seed: int,
    progress: Callable[[str], None],
) -> Coverage:
    try:
        network = load_network(policy.path)
    except LawsError as error:
        return Coverage(None, 0, 0, str(error))
    progress(f"a library for {policy.path.name}")
    seen, held = observed(policy, workload, steps, (seed, seed + 1_000_003))
    x, y = np.concatenate(seen.observations), np.concatenate(seen.actions)
    growth = grow(policy, network, x, y, tolerance, max_regions, progress=progress)
    regions = len(growth.library)
    found = Router(growth.library, tolerance).many(np.concatenate(held.observations)) if regions else np.array([-1])
    return Coverage(float((found >= 0).mean()), regions, growth.certificates_tried)
