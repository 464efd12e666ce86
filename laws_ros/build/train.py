"""Train a full policy: a workload's teacher, brought into a large network, exported, checked and recorded.

A Gymnasium environment has no teacher of its own; a linear one is searched for first (linear_search.py).
What kind of network is the recipe's choice: `cacheable.Recipe` (the default) or `diffusion.Recipe`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from laws_ros.core.card import Card
from laws_ros.core.errors import WorkloadError
from laws_ros.runtime.files import sha256_file
from laws_ros.runtime.policy import Policy

from . import diffusion
from .cacheable import Recipe
from .linear_search import Search, linear_teacher
from .student import Lessons, Student, Teacher
from .workloads import Workload, get, module

# What a Gymnasium environment gets: a network of the size that its own users give it.
GYM_RECIPE = Recipe(hidden=256, steps=3000, rounds=1, episodes=32, straight=True, check_episodes=100)


def _relu(workload_name: str) -> Recipe:
    lesson = module(workload_name)
    return Recipe(**getattr(lesson, "RECIPE", {})) if lesson else GYM_RECIPE


KINDS: dict[str, Callable[[str], Lessons]] = {"relu": _relu, "diffusion": lambda workload_name: diffusion.Recipe()}


def train(
    workload_name: str,
    out_dir: str | Path,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
    recipe: Lessons | None = None,
    search: Search | None = None,
) -> dict[str, Any]:
    """Train, export and check a full policy of a workload.

    Writes NAME.onnx (of a kind other than relu NAME_KIND.onnx), its card and its entry in MANIFEST.json in `out_dir`.

    Args:
        workload_name: a workload that has a teacher, or `gym:ENV_ID`.
        log: takes lines of progress.
        recipe: default the workload's own for a relu network.
        search: for the teacher of a Gymnasium environment.

    Returns:
        The manifest's entry.

    Raises:
        WorkloadError: unknown workload, or one without a teacher.
    """
    workload, lesson = get(workload_name), module(workload_name)
    if lesson and not hasattr(lesson, "teacher"):
        raise WorkloadError(f"workload {workload_name!r} has no teacher to train from")
    recipe, search = recipe or KINDS["relu"](workload_name), search or Search()
    teacher = lesson.teacher() if lesson else linear_teacher(workload, search, seed, log)
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    name, which = workload_name.partition("?")[0].rpartition(":")[2].replace("/", "_"), ""
    if recipe.kind != "relu":
        name, which = f"{name}_{recipe.kind}", f" --policy {recipe.kind}"
    path, spec = out / f"{name}.onnx", workload.spec
    card = Card(spec.name, spec.observations, spec.actions, context=spec.context)
    entry = distil(workload, teacher, path, card, recipe, seed=seed, log=log)
    command = f"laws train {workload_name}{which} --seed {seed}"
    entry = {"sha256": entry.pop("sha256"), "command": command, **entry}
    if not lesson:
        entry["search"] = asdict(search)
    manifest = out / "MANIFEST.json"
    entries = json.loads(manifest.read_text()) if manifest.is_file() else {}
    manifest.write_text(json.dumps({**entries, path.name: entry}, indent=2) + "\n")
    return entry


def distil(
    workload: Workload,
    teacher: Teacher,
    path: Path,
    card: Card,
    recipe: Lessons,
    *,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Bring a teacher into a network; writes the network to `path` and its card beside it.

    Args:
        teacher: observations [N, n] to actions [N, m] before they saturate, or to what a decision is made from.
        card: what goes beside the network. Actions with limits are learned between them and clipped to them; without,
            as they are.

    Returns:
        Size, parity, what the kind of network has to say, and both returns.
    """
    started = time.monotonic()

    def progress(line: str) -> None:
        log(f"{time.monotonic() - started:6.0f} s {line}")

    torch.manual_seed(seed)
    student = recipe.student(workload, teacher, card, seed)
    for round_ in range(recipe.rounds + 1):
        student.gather(round_)
        student.fit(recipe.steps // (recipe.rounds + 1), progress)
    student.export(path)
    _write_card(path.with_suffix(".yaml"), card)
    policy = Policy(path)
    progress(f"wrote {path}; checking")
    entry: dict[str, Any] = {
        "sha256": sha256_file(path),
        "bytes": path.stat().st_size,
        "parameters": sum(p.numel() for p in student.net.parameters()),
        "recipe": asdict(recipe),
        "parity": _parity(student, policy),
        **student.figures(),
        **_returns(student, policy, seed * 1000 + 999),
        "seconds": round(time.monotonic() - started),
        "torch": torch.__version__,
    }
    progress(f"return {entry['policy_return']} (teacher {entry['teacher_return']})")
    return entry


def _write_card(path: Path, card: Card) -> None:
    text = yaml.safe_dump(card.to_dict(), sort_keys=False)
    title = f"# What {path.stem}.onnx observes and commands, in order. A library is bound to this card."
    path.write_text(f"{title}\n{text}")


def _parity(student: Student, policy: Policy) -> dict[str, Any]:
    """Largest difference between torch and ONNX Runtime on observations that were seen, half of them moved off."""
    rng = np.random.default_rng(2)
    seen = student.data[rng.integers(len(student.data), size=student.recipe.parity_samples)]
    seen[::2] += (rng.normal(0.0, 1.0, seen[::2].shape) * student.moved).astype(np.float32)
    difference = np.abs(policy.batch(seen).astype(float) - student(seen))
    return {"observations": len(seen), "worst_action_difference": float(difference.max())}


def _returns(student: Student, policy: Policy, seed: int) -> dict[str, Any]:
    """Mean returns of teacher and policy over the same episodes."""
    episodes = student.recipe.check_episodes
    of_teacher, of_policy = (student.run(driver, episodes, seed).returns for driver in (student.teacher, policy.batch))
    return {
        "check_episodes": episodes,
        "teacher_return": round(float(of_teacher.mean()), 2),
        "policy_return": round(float(of_policy.mean()), 2),
        "policy_over_teacher": round(float(of_policy.mean() / of_teacher.mean()), 4),
        "paired_standard_error": round(float((of_policy - of_teacher).std() / np.sqrt(episodes)), 2),
    }
