"""Long runs in parts: interrupted ones go on where they stopped, and several machines share one.

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
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laws_ros import __version__

from .workloads import Rollouts, Workload, rollouts

PART = 64  # episodes


def rollouts_in_parts(
    workload: Workload,
    policy: Callable[[NDArray[np.float32]], NDArray[Any]],
    episodes: int,
    seed: int,
    folder: Path,
    identity: str,
    *,
    part: int = PART,
    progress: Callable[[int, int], None] = lambda done, steps: None,
) -> Rollouts:
    """`rollouts`, kept in a folder part by part; returns all episodes, whoever ran them.

    Args:
        identity: of the policy, such as its file's sha256; parts of another one are left alone.
        part: episodes in a part; all workers must say the same.
    """
    folder.mkdir(parents=True, exist_ok=True)
    spec = workload.spec
    key = json.dumps([__version__, spec.name, spec.period_s, spec.episode_steps, identity, seed])
    stem = hashlib.sha256(key.encode()).hexdigest()[:16]
    paths = {k: folder / f"{stem}-{k}-{min(part, episodes - k)}.npz" for k in range(0, episodes, part)}
    found: dict[int, Rollouts] = {}
    done = steps = 0
    for first in random.SystemRandom().sample(list(paths), len(paths)):
        count, path = min(part, episodes - first), paths[first]
        kept = _load(path)
        if kept is None:
            kept = rollouts(workload, policy, count, seed, first=first, progress=_after(done, steps, progress))
            _save(path, kept)
        found[first] = kept
        done, steps = done + count, steps + sum(len(r) for r in kept.rewards)
        progress(done, steps)
    ordered = [found[first] for first in sorted(found)]
    return Rollouts(*(list(chain.from_iterable(column)) for column in zip(*ordered, strict=True)))


def _after(done: int, steps: int, progress: Callable[[int, int], None]) -> Callable[[int, int], None]:
    return lambda more_done, more_steps: progress(done + more_done, steps + more_steps)


def _save(path: Path, found: Rollouts) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with os.fdopen(handle, "wb") as stream:
        lengths = [len(r) for r in found.rewards]
        np.savez(stream, np.array(lengths), *(np.concatenate(column) for column in found))
    os.replace(temporary, path)


def _load(path: Path) -> Rollouts | None:
    """A part, or None where there is none or the file is damaged."""
    try:
        with np.load(path) as file:
            lengths, *columns = (file[name] for name in file.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    cuts = np.cumsum(lengths)[:-1]
    return Rollouts(*(np.split(column, cuts) for column in columns))
