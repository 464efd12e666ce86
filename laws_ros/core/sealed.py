"""Files in memory that nobody can change: what snapshots are mapped from.

A file that is mapped where it lies is at the mercy of whoever may write to it: its bytes change after they were
checked, and once it is cut short the next look at it kills the process (SIGBUS). So the kernel copies it into memory
without a name (memfd) and seals that: from then on no process, this one and the administrator's included, can write to
it, cut it or take the seals off. Only then its bytes are checked, in the mapping that is used.

One copy serves all processes of a user. Whoever maps it links to it in a folder of theirs, under the sha256 that the
file promises; whoever wants the same file maps the same memory, after looking at the seals and at every byte. A link to
something else, or to nothing any more, costs a copy. Where there is no such memory, files are read.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import stat
import weakref
from pathlib import Path
from typing import BinaryIO, TypeAlias

Buffer: TypeAlias = "mmap.mmap | bytes"

LINKS = Path("/dev/shm")
LEAST = 1 << 16  # bytes; a smaller file is read, as a mapping has its price, too: two open files
_DIGEST = 32


def load(path: Path, start: int) -> tuple[Buffer, bool]:
    """A file, and whether its bytes from `start` are the sha256 of all that follow these 32.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as stream:
        if hasattr(os, "memfd_create") and os.fstat(stream.fileno()).st_size >= LEAST:
            try:
                return _mapped(stream, start)
            except (OSError, ValueError):  # not allowed here, no such memory, or nothing left to map
                stream.seek(0)
        data = stream.read()
    return data, _intact(data, start)


def _intact(data: Buffer, start: int) -> bool:
    body = memoryview(data)[start + _DIGEST :]
    return hashlib.sha256(body).digest() == data[start : start + _DIGEST]


def _mapped(stream: BinaryIO, start: int) -> tuple[mmap.mmap, bool]:
    """The same in sealed memory: that of another process, or new one."""
    size, head = os.fstat(stream.fileno()).st_size, stream.read(start + _DIGEST)
    folder, name = _links(), head[start:].hex()
    for link in folder.glob(f"{name}-*") if folder else ():
        handle = _sealed(link, size)
        if handle >= 0:
            memory = _map(handle, size)
            if memory[: len(head)] == head and _intact(memory, start):
                return _told(memory, handle, folder, name), True
            os.close(handle)
    handle = os.memfd_create("laws", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        size = 0
        while copied := os.sendfile(handle, stream.fileno(), size, 1 << 30):
            size += copied
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _seals())
    except BaseException:
        os.close(handle)
        raise
    memory = _map(handle, size)
    intact = _intact(memory, start)
    return _told(memory, handle, folder if intact else None, name), intact


def _seals() -> int:
    return fcntl.F_SEAL_SEAL | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def _sealed(link: Path, size: int) -> int:
    """The sealed memory of that size at the end of a link, open; -1 for anything else."""
    try:
        about = os.stat(link)
        if not stat.S_ISREG(about.st_mode) or about.st_size != size:
            return -1
        handle = os.open(link, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return -1
    try:
        if fcntl.fcntl(handle, fcntl.F_GET_SEALS) & _seals() == _seals() and os.fstat(handle).st_size == size:
            return handle
    except OSError:  # no such memory at all
        pass
    os.close(handle)
    return -1


def _map(handle: int, size: int) -> mmap.mmap:
    """Read-only, and all of it now: no control step waits for a page. The handle is closed if it cannot be."""
    try:
        return mmap.mmap(handle, size, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
    except BaseException:
        os.close(handle)
        raise


def _told(memory: mmap.mmap, handle: int, folder: Path | None, name: str) -> mmap.mmap:
    """The memory, with a link by which others find it for as long as it is used here."""
    link = None if folder is None else folder / f"{name}-{os.getpid()}-{handle}"
    if link is not None:
        try:
            for other in link.parent.iterdir():
                if other == link or not other.exists():  # of processes that were killed
                    other.unlink(missing_ok=True)
            link.symlink_to(f"/proc/{os.getpid()}/fd/{handle}")
        except OSError:
            link = None  # then the others make copies
    weakref.finalize(memory, _forget, handle, link)
    return memory


def _forget(handle: int, link: Path | None) -> None:
    if link is not None:
        link.unlink(missing_ok=True)
    os.close(handle)


def _links() -> Path | None:
    """This user's folder of links; None where it cannot be, or is not the user's alone."""
    folder = LINKS / f"laws-{os.geteuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = os.lstat(folder)
    except OSError:
        return None
    own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    return folder if own else None
