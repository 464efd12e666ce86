from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from laws_ros.core import sealed
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import MAGIC, Library

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no memory that can be sealed on this system")
START = len(MAGIC)


@pytest.fixture
def path(built, tmp_path, monkeypatch) -> Path:
    """A library's file, with a folder of links of its own, so that what is linked is this test's."""
    monkeypatch.setattr(sealed, "LEAST", 0)
    monkeypatch.setattr(sealed, "LINKS", tmp_path)
    built.library.save(tmp_path / "x.laws")
    return tmp_path / "x.laws"


def links(path: Path) -> list[Path]:
    return sorted((path.parent / f"laws-{os.geteuid()}").iterdir())


def child(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A process that has loaded the library argv[1] as `library`, with links in its folder."""
    head = (
        "import os, sys; from pathlib import Path; from laws_ros.core import sealed; "
        "from laws_ros.core.library import Library; path = Path(sys.argv[1]); sealed.LEAST = 0; "
        "sealed.LINKS = path.parent; library = Library.load(path)\n"
    )
    command = [sys.executable, "-c", head + script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


HOLD = "print('holds', flush=True); sys.stdin.read()"
"""Waits, with the library, until it is told to go."""


def test_cutting_and_overwriting_the_file_later_change_no_answer_and_kill_nobody(path) -> None:
    script = """
import numpy as np
from laws_ros.runtime.routing import Router
router, x = Router(library, library.tolerance), library.certificates.center.astype(np.float32)
before = {name: array.tobytes() for name, array in library._arrays().items()}, router.many(x).tolist()
def same():
    now = {name: array.tobytes() for name, array in library._arrays().items()}, router.many(x).tolist()
    return now == before and max(now[1]) >= 0
with open(path, "r+b") as stream:
    stream.write(bytes(path.stat().st_size))
print(same())
os.truncate(path, 100)
print(same())
os.truncate(path, 0)
print(same())
"""
    process = child(script, path)
    assert process.communicate()[0].split() == ["True"] * 3
    assert process.returncode == 0
    with pytest.raises(LibraryError, match=r"x\.laws"):
        Library.load(path)


def test_nobody_can_write_to_the_memory_cut_it_or_take_its_seals_off(path) -> None:
    library = Library.load(path)
    assert not library.certificates.center.flags.writeable
    (link,) = links(path)
    handle = os.open(link, os.O_RDWR)
    try:
        for forbidden in (
            lambda: os.write(handle, b"x"),
            lambda: os.ftruncate(handle, 0),
            lambda: os.truncate(link, 10**9),
            lambda: fcntl.fcntl(handle, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        ):
            with pytest.raises(PermissionError):
                forbidden()
        assert os.pread(handle, 1 << 30, 0) == path.read_bytes()
    finally:
        os.close(handle)


def test_processes_share_one_memory_for_as_long_as_any_of_them_lives(path) -> None:
    first = child(HOLD, path)
    assert first.stdout.readline() == "holds\n"
    inode = os.stat(links(path)[0]).st_ino
    library = Library.load(path)
    assert {os.stat(link).st_ino for link in links(path)} == {inode} and len(links(path)) == 2
    first.send_signal(signal.SIGKILL)
    first.wait()
    third = child(HOLD, path)  # finds this process's, and takes the link of the dead one away
    assert third.stdout.readline() == "holds\n"
    assert {os.stat(link).st_ino for link in links(path)} == {inode} and len(links(path)) == 2
    third.communicate()
    assert len(links(path)) == 1
    del library
    assert links(path) == []


@pytest.mark.parametrize("other", ["nothing", "another library", "not sealed", "half sealed", "a file", "a pipe"])
def test_a_link_to_something_else_costs_a_copy_and_is_not_believed(built, path, other) -> None:
    data = path.read_bytes()
    lie = path.parent / f"laws-{os.geteuid()}" / f"{data[START : START + 32].hex()}-1-1"
    lie.parent.mkdir(mode=0o700)
    if other == "nothing":
        lie.symlink_to("/proc/1/fd/no such")
    elif other == "a file":
        lie.write_bytes(data)
    elif other == "a pipe":
        os.mkfifo(lie)
    else:
        handle = os.memfd_create("lie", os.MFD_ALLOW_SEALING)
        content = bytearray(data)
        content[-1000] ^= other == "another library"
        os.write(handle, content)
        seals = {"another library": sealed._seals(), "half sealed": fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW}
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, seals.get(other, 0))
        lie.symlink_to(f"/proc/{os.getpid()}/fd/{handle}")
    found = Library.load(path)
    assert found.digest == built.library.digest
    (own,) = [link for link in links(path) if link != lie]
    assert os.stat(own).st_ino != (os.stat(lie).st_ino if lie.exists() else 0)
    if other not in ("nothing", "a file", "a pipe"):
        os.close(handle)


def test_a_damaged_file_is_refused_and_no_other_process_is_told_of_it(path) -> None:
    with open(path, "r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"x")
    with pytest.raises(LibraryError, match="damaged"):
        Library.load(path)
    assert links(path) == []


@pytest.mark.parametrize("why", ["no memory", "no room", "a folder of others", "small"])
def test_where_memory_cannot_be_sealed_or_shared_the_file_is_read(built, path, monkeypatch, why) -> None:
    def refused(*_: object) -> int:
        raise OSError(38, "not here")

    if why == "a folder of others":
        (path.parent / f"laws-{os.geteuid()}").mkdir(mode=0o755)
        (path.parent / f"laws-{os.geteuid()}").chmod(0o777)
    elif why == "small":
        monkeypatch.setattr(sealed, "LEAST", 1 << 40)
    else:
        monkeypatch.setattr(os, "memfd_create" if why == "no memory" else "sendfile", refused)
    opened = len(os.listdir("/proc/self/fd"))
    found = Library.load(path)
    assert found.digest == built.library.digest
    np.testing.assert_array_equal(found.certificates.bound_weight, built.library.certificates.bound_weight)
    if why != "a folder of others":
        assert len(os.listdir("/proc/self/fd")) == opened
    assert not any(path.parent.glob("laws-*/*"))


def test_opening_again_and_again_leaves_nothing_behind(path) -> None:
    Library.load(path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Library.load(path)
    assert len(os.listdir("/proc/self/fd")) == before and links(path) == []
