"""Files that are there whole or not at all, at whatever instant a process is killed or the power fails."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


def write(path: Path, *parts: Any) -> None:
    """Write a file beside its target, synchronise it, and rename it over the target.

    Args:
        parts: bytes, or arrays of them.

    Raises:
        OSError: no such folder, no permission, or the disk is full; an older file stays as it was.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    synchronise(path.parent)


def synchronise(folder: Path) -> None:
    """Bring to the disk what was renamed within a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
