"""Long runs in parts: interrupted ones go on where they stopped, several machines share one, and so do workers.

Episode k of a workload is a function of (seed, k) and the policy, so a part, a range of episodes, can be run anywhere
and at any time. Parts are files in a folder, named after everything that they depend on; a worker runs the parts that
are not there yet, beginning at a random one, and reads the others. Two workers that run the same part by chance write
the same episodes. Nothing is locked, so nothing has to be cleaned up after a crash.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros import __version__
from laws_ros.runtime.policy import Policy

from . import workloads
from .workers import HERE, Workers
from .workloads import Rollouts, Workload, rollouts

PART = 64  # episodes, at most


class Deciding:
    """A policy's actions [N, m] at observations [N, n], for rollouts here or in another process."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.policy.decide(self.policy.batch(x))

    def __reduce__(self) -> tuple[Any, ...]:
        files = {path.name: path.read_bytes() for path in (self.policy.path, self.policy.path.with_suffix(".yaml"))
                 if path.is_file()}  # fmt: skip
        return _deciding, (self.policy.path.name, files, self.policy.card.decision)


def _deciding(name: str, files: dict[str, bytes], decision: str) -> Deciding:
    with tempfile.TemporaryDirectory() as folder:
        for file, data in files.items():
            Path(folder, file).write_bytes(data)
        return Deciding(Policy(Path(folder, name), decision=decision))


class _Drive:
    """Runs (first, count) episodes."""

    def __init__(self, workload: Workload, policy: Callable[..., NDArray[Any]], seed: int, threads: int | None) -> None:
        self.workload, self.policy, self.seed, self.threads = workload, policy, seed, threads
        self.progress: Callable[[int, int], None] = lambda done, steps: None

    def __call__(self, part: tuple[int, int]) -> Rollouts:
        first, count = part
        return rollouts(
            self.workload, self.policy, count, self.seed, first=first, threads=self.threads, progress=self.progress
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _driven, (self.workload.spec.name, self.policy, self.seed)


def _driven(workload: str, policy: Callable[..., NDArray[Any]], seed: int) -> _Drive:
    return _Drive(workloads.get(workload), policy, seed, threads=1)  # one worker, one core


def rollouts_in_parts(
    workload: Workload,
    policy: Callable[[NDArray[np.float32]], NDArray[Any]],
    episodes: int,
    seed: int,
    folder: Path | None,
    identity: str,
    *,
    part: int = PART,
    workers: Workers = HERE,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Rollouts:
    """`rollouts`, part by part; returns all episodes, whoever ran them.

    Args:
        policy: `Deciding`, if workers are in other processes.
        folder: where parts are kept; None for nowhere.
        identity: of the policy, such as its file's sha256; parts of another one are left alone.
        part: episodes in a part; all that share a folder must say the same.
    """
    spec = workload.spec
    key = json.dumps([__version__, spec.name, spec.period_s, spec.episode_steps, identity, seed])
    stem = hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    parts = [(first, min(part, episodes - first)) for first in range(0, episodes, part)]
    found: dict[int, Rollouts] = {}
    running: list[tuple[int, int]] = []
    done = steps = 0

    def path(of: tuple[int, int]) -> Path | None:
        return None if folder is None else folder / f"{stem}-{of[0]}-{of[1]}.npz"

    def finish(of: tuple[int, int], kept: Rollouts) -> None:
        nonlocal done, steps
        found[of[0]] = kept
        done, steps = done + of[1], steps + sum(len(r) for r in kept.rewards)
        progress(done, steps)

    def missing() -> Iterator[tuple[int, int]]:
        """Looks when somebody is there to run a part, as another machine may have run it in the meantime."""
        for some in random.SystemRandom().sample(parts, len(parts)):
            if (kept := _load(path(some))) is not None:
                finish(some, kept)
            else:
                running.append(some)
                yield some

    drive = _Drive(workload, policy, seed, None)
    drive.progress = lambda more_done, more_steps: progress(done + more_done, steps + more_steps)
    for kept in workers.map(drive, missing()):
        some = running.pop(0)
        _save(path(some), kept)
        finish(some, kept)
    ordered = [found[first] for first in sorted(found)]
    return Rollouts(*(list(chain.from_iterable(column)) for column in zip(*ordered, strict=True)))


def _save(path: Path | None, found: Rollouts) -> None:
    if path is None:
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as stream:
        lengths = [len(r) for r in found.rewards]
        np.savez(stream, np.array(lengths), *(np.concatenate(column) for column in found))
    os.replace(temporary, path)


def _load(path: Path | None) -> Rollouts | None:
    """A part, or None where there is none or the file is damaged."""
    if path is None:
        return None
    try:
        with np.load(path) as file:
            lengths, *columns = (file[name] for name in file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    cuts = np.cumsum(lengths)[:-1]
    return Rollouts(*(np.split(column, cuts) for column in columns))
