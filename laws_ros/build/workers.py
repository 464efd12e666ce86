"""Who does the work of a build: this process, or the machines of a Ray cluster; the result is the same.

One process decides, and hands out work that depends on nothing but what it is given: a range of episodes, a batch of
regions. Items are cut in the same way whoever works on them, and answers are taken in order, so neither the number of
workers nor which of them fails can be seen in the result. (Other processors may round otherwise in the last bit; bounds
hold on either, since they allow for any order of summation.) docs/adr/0023-cluster-and-cell.md
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, TypeVar

from laws_ros import __version__
from laws_ros.core.errors import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")

ENGINES = ("local", "ray")
AHEAD = 2  # items per worker that are handed out before the first answer is taken
RETRIES = 16  # of one item, on another worker each time its worker is lost


class Workers(Protocol):
    """Those who do the work; `count` of them."""

    count: int

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """work(item) for each, in the order of the items, which are taken as there is somebody to work on them.

        Args:
            work: a callable object that pickle can send; it is sent once, as long as it is the same object.
        """

    def together(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        """What jobs answer that do not depend on each other, and use `map` while they are at it."""


class _Here:
    count = 1

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        return map(work, items)

    def together(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        return [job() for job in jobs]


HERE: Workers = _Here()


@contextmanager
def hired(engine: str) -> Iterator[Workers]:
    """The workers of an engine, as long as they are needed.

    Ray's are those of the cluster that RAY_ADDRESS names or that runs on this machine; else one is started here, with
    a worker per core, and ended.

    Raises:
        ConfigError: no such engine, or the cluster does not answer. ModuleNotFoundError: Ray is not installed.
    """
    if engine == "local":
        yield HERE
        return
    if engine != "ray":
        raise ConfigError(f"engine {engine!r}: one of {', '.join(ENGINES)} is needed")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    own = not ray.is_initialized()
    address = _address() if own else None
    try:
        if own:
            ray.init(address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        yield _Ray()
    except (ray.exceptions.RayError, ConnectionError) as error:
        where = os.environ.get("RAY_ADDRESS", "started here")
        raise ConfigError(f"Ray cluster ({where}): {str(error).splitlines()[0]}") from None
    finally:
        if own:
            ray.shutdown()


def _address() -> str | None:
    """Which cluster Ray is to find: None for the one that it would look for, as long as that answers.

    Ray waits for minutes for one that does not, and one that was killed on this machine has left its address behind.

    Raises:
        ConfigError: RAY_ADDRESS does not answer.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named:
        if named not in ("auto", "local") and not _answers(named):
            raise ConfigError(f"Ray cluster ({named}): does not answer; is RAY_ADDRESS right?")
        return None
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        left = Path(folder, "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return None if _answers(left) else "local"


def _answers(address: str) -> bool:
    host, _, port = address.rpartition("//")[2].rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10.0):
            return True
    except (OSError, ValueError):
        return False


class _Ray:
    def __init__(self) -> None:
        import ray

        self.count = max(1, int(ray.cluster_resources().get("CPU", 1)))
        self._task = ray.remote(num_cpus=1, max_retries=RETRIES)(_work)
        self._sending = Lock()
        self._sent: dict[int, tuple[Any, Any]] = {}  # what was sent, kept so that its id stays its own, and Ray's name

    def together(self, jobs: Sequence[Callable[[], Result]]) -> list[Result]:
        with ThreadPoolExecutor(max(1, len(jobs))) as pool:  # which wait for workers, mostly
            return list(pool.map(lambda job: job(), jobs))

    def map(self, work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        import ray

        with self._sending:
            if id(work) not in self._sent:
                self._sent[id(work)] = work, ray.put(work)
        # in a list, Ray hands on the name, not the object
        name = [self._sent[id(work)][1]]
        waiting: deque[Any] = deque()
        for item in items:
            waiting.append(self._task.remote(__version__, name, item))
            if len(waiting) >= AHEAD * self.count:
                yield _answer(waiting.popleft())
        while waiting:
            yield _answer(waiting.popleft())


def _answer(waited: Any) -> Any:
    import ray

    try:
        return ray.get(waited)
    except ray.exceptions.RayTaskError as error:  # what the work itself raised, as it would have been raised here
        raise error.cause from None


_KEPT: dict[str, Any] = {}  # by a worker process, from item to item


def _work(version: str, name: list[Any], item: Any) -> Any:
    """What a worker process does with an item."""
    if version != __version__:
        raise ConfigError(f"a worker of the cluster has laws_ros {__version__}, this is {version}; install one on all")
    import ray

    key = name[0].hex()
    if key not in _KEPT:
        while len(_KEPT) > 1:  # episodes and certificates at most
            _KEPT.pop(next(iter(_KEPT)))
        _KEPT[key] = ray.get(name[0])
    return _KEPT[key](item)
