"""Nodes as child processes, and the live view of a terminal: what the demonstration, `laws up` and `laws top` share."""

from __future__ import annotations

import ctypes
import fcntl
import json as json_format
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TextIO

from laws_ros.core.errors import LawsError

START_TIMEOUT_S = 120.0  # who has ended is noticed at once; this is for a slow machine
DOMAINS = range(1, 101)  # whose ports are free on every system
_domain: tuple[str, int] | None = None


def private_domain() -> str:
    """A ROS_DOMAIN_ID that no other program of this package on this machine has, for as long as this process lives."""
    global _domain
    if _domain is None:
        folder = Path("/tmp") / f"laws_domains_{os.getuid()}"  # whatever TMPDIR is: one for the machine
        folder.mkdir(exist_ok=True)
        for k in range(len(DOMAINS)):
            domain = DOMAINS[(os.getpid() + k) % len(DOMAINS)]
            handle = os.open(folder / str(domain), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                continue
            _domain = str(domain), handle
            break
        else:
            raise LawsError(f"{folder}: all ROS domains from {DOMAINS[0]} to {DOMAINS[-1]} are in use")
    return _domain[0]


class Child:
    """A node in a process of its own, which ends with this process, however that ends.

    Args:
        name: of the node. parameters: its file. overrides: parameters over those of the file.
        command: what to run instead of the node.
        namespace: of the node and its topics.
        log: where its output goes; None: where this process's does.
    """

    def __init__(
        self,
        name: str,
        parameters: Path,
        command: Sequence[str] | None = None,
        *,
        namespace: str = "",
        log: Path | None = None,
        **overrides: Any,
    ) -> None:
        self.name, self.log = name, log
        program = command or [sys.executable, "-m", "laws_ros.nodes", name]
        command = [*program, "--ros-args", "--params-file", str(parameters)]
        if namespace:
            command += ["-r", f"__ns:=/{namespace.strip('/')}"]
        for key, value in overrides.items():
            command += ["-p", f"{key}:={json_format.dumps(value)}"]
        libc = ctypes.CDLL(None)
        with open(log or os.devnull, "wb") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out if log else None,
                stderr=out if log else None,
                start_new_session=True,  # Ctrl-C is ours to pass on
                preexec_fn=lambda: libc.prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def complain(self) -> NoReturn:
        """Raises LawsError with the last thing that the node said."""
        lines = (self.log.read_text(errors="replace").strip().splitlines() if self.log else []) or ["it said nothing"]
        code = self.process.poll()
        state = f"did not come up within {START_TIMEOUT_S:g} s" if code is None else f"ended with code {code}"
        raise LawsError(f"the {self.name} {state}: {lines[-1]}")

    def end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=3.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come: a note and no exception, which could fall into the writing of a bag or become
    another one inside the conversion of a message."""
    come = False

    def note(*_: object) -> None:
        nonlocal come
        come = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def live_view(out: TextIO) -> Iterator[Callable[[dict[str, str]], None]]:
    """Shows a status: a table that is redrawn in a terminal, else a line a second."""
    if out.isatty():
        from rich.console import Console
        from rich.live import Live
        from rich.table import Table as RichTable

        def draw(facts: dict[str, str]) -> None:
            table = RichTable(show_header=False)
            for name, fact in facts.items():
                table.add_row(name, fact)
            live.update(table, refresh=True)

        with Live(console=Console(file=out), auto_refresh=False) as live:
            yield draw
        return

    shown = 0.0

    def write(facts: dict[str, str]) -> None:
        nonlocal shown
        if time.monotonic() - shown >= 1.0:
            shown = time.monotonic()
            print(" | ".join(f"{name} {fact}" for name, fact in facts.items()), file=out, flush=True)

    yield write
