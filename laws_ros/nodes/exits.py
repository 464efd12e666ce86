"""SIGINT and SIGTERM end a node with code 0 and without a traceback, from its first line on. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

_EARLY, _RUNNING, _ENDING = range(3)
_state = _EARLY


def install() -> None:
    """Until `running`, a signal ends the process at once: there is nothing yet that would have to be taken down."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)
    sys.unraisablehook = _swallowed


def running() -> None:
    """From now on the first signal raises KeyboardInterrupt in the main thread (and rclpy shuts its context down)."""
    global _state
    _state = _RUNNING


def ending() -> None:
    """From now on signals are ignored: the process is on its way out."""
    global _state
    _state = _ENDING


def told() -> bool:
    """Whether the process is on its way out; before `ending` was called, that a signal has come."""
    return _state == _ENDING


def check() -> None:
    """Raise the KeyboardInterrupt of a signal again, if something has swallowed it or made another error of it."""
    if told():
        raise KeyboardInterrupt


def _handle(number: int, frame: Any) -> None:
    if _state == _EARLY:
        os._exit(0)
    if _state == _RUNNING:
        ending()
        raise KeyboardInterrupt


def _swallowed(what: Any) -> None:
    """An interrupt that came in a callback of C code or in a finaliser, where nothing can be raised, is not lost:
    rclpy has shut its context down as well, and the next thing that needs it ends the node."""
    if not (told() and issubclass(what.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(what)
