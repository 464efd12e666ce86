from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.core import library as module
from laws_ros.core import sealed
from laws_ros.core.certificate import KINDS, Certificates, Ragged, kind_code, limited
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import BEFORE_KINDS, MAGIC, Library

_arrays = Library._arrays


def test_a_library_comes_back_as_it_was_saved(built, tmp_path) -> None:
    path = tmp_path / "x.laws"
    built.library.save(path)
    found = Library.load(path)
    for name, array in built.library._arrays().items():
        np.testing.assert_array_equal(found._arrays()[name], array)
    assert found.card == built.library.card and found.digest == built.library.digest and found.ids == built.library.ids


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_changed_or_missing_byte_is_refused(built, tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("bits") / "x.laws"
    built.library.save(path)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(bytes(content))
    least = data.draw(st.sampled_from([0, 1 << 40]))  # mapped or read
    with pytest.raises(LibraryError, match=r"x\.laws") as caught, mock.patch.object(sealed, "LEAST", least):
        Library.load(path)
    assert "\n" not in str(caught.value)


def test_a_hash_does_not_make_an_inconsistent_trie_good(built, tmp_path) -> None:
    trie = built.library.trie
    loop = trie.low.copy()
    loop[0] = 0  # its own child: a walk would never end
    bad = [
        replace(trie, low=loop),
        replace(trie, members=trie.members + len(built.library)),
        replace(trie, axis=trie.axis + 9),
        replace(trie, first=trie.first[::-1].copy()),
        replace(trie, threshold=trie.threshold[:-1]),
    ]
    for k, broken in enumerate(bad):
        replace(built.library, trie=broken).save(tmp_path / f"{k}.laws")
        with pytest.raises(LibraryError, match="trie"):
            Library.load(tmp_path / f"{k}.laws")
    c = built.library.certificates
    replace(built.library, certificates=replace(c, bound_offset=c.bound_offset[:, :1])).save(tmp_path / "c.laws")
    with pytest.raises(LibraryError, match="bound_offset"):
        Library.load(tmp_path / "c.laws")
    replace(built.library, precision="float16").save(tmp_path / "p.laws")
    with pytest.raises(LibraryError, match="float16"):
        Library.load(tmp_path / "p.laws")


def test_missing_and_foreign_files(tmp_path) -> None:
    with pytest.raises(LibraryError, match="absent"):
        Library.load(tmp_path / "absent.laws")
    (tmp_path / "text.laws").write_text("hello, this is not a library")
    with pytest.raises(LibraryError, match="not a LAWS library"):
        Library.load(tmp_path / "text.laws")
    body = b"later format"
    (tmp_path / "new.laws").write_bytes(MAGIC[:7] + b"9" + hashlib.sha256(body).digest() + body)
    with pytest.raises(LibraryError, match="format"):
        Library.load(tmp_path / "new.laws")


def test_kinds_that_this_program_does_not_know_are_refused(built, tmp_path, monkeypatch) -> None:
    """What a later program may write: another kind, another array, another payload."""
    c = built.library.certificates

    def refused(library: Library) -> str:
        library.save(tmp_path / "x.laws")
        with pytest.raises(LibraryError, match=r"x\.laws") as caught:
            Library.load(tmp_path / "x.laws")
        return str(caught.value)

    def changed(**fields: object) -> Library:
        return replace(built.library, certificates=replace(c, **fields))

    kind = c.kind.copy()
    kind[3] = len(KINDS)
    assert f"kind number {len(KINDS)}" in refused(changed(kind=kind))
    kind[3] = kind_code("exact")
    assert "no neuron states" in refused(changed(kind=kind))
    kind[3] = kind_code("statistical")
    assert "evidence" in refused(changed(kind=kind))
    assert "kind has shape" in refused(changed(kind=kind[1:]))
    assert "floats is inconsistent" in refused(changed(floats=Ragged(np.ones(3, np.float32), c.floats.start)))
    assert "octets is inconsistent" in refused(changed(octets=Ragged(c.octets.values, c.octets.start[1:])))
    monkeypatch.setattr(Library, "_arrays", lambda self: _arrays(self) | {"signature": np.zeros(3)})
    assert "signature, which this program does not know" in refused(built.library)
    monkeypatch.setattr(Library, "_arrays", lambda self: {k: v for k, v in _arrays(self).items() if "cost" not in k})
    assert "certificates.cost' is missing" in refused(built.library)


def test_a_library_from_before_kinds_is_all_linear(built, tmp_path, monkeypatch) -> None:
    path = tmp_path / "old.laws"
    later = ("kind", "cost", "floats", "octets", "round")
    plain = replace(built.library.certificates, **dict.fromkeys(later))  # as they are by default
    library = replace(built.library, certificates=plain)
    before = {k: v for k, v in _arrays(library).items() if k.split(".")[1:2] and k.split(".")[1] not in later}
    rest = {"tolerance": library.tolerance, "visits": library.visits}
    monkeypatch.setattr(Library, "_arrays", lambda self: before | rest)
    monkeypatch.setattr(module, "MAGIC", BEFORE_KINDS)
    library.save(path)
    monkeypatch.undo()
    found = Library.load(path)
    assert found.ids == library.ids and {KINDS[k] for k in found.certificates.kind} == {"linear"}


def test_certificates_for_other_limits_than_the_cards_are_refused(built, tmp_path) -> None:
    limits = built.library.card.limits.ravel()
    for row, fine in ((limits, True), (1.5 * limits, False), (limits[:2], False)):
        count = len(built.library)
        certificates = replace(built.library.certificates, floats=Ragged.of([row] * count, np.float32))
        path = tmp_path / "l.laws"
        replace(built.library, certificates=certificates).save(path)
        if fine:
            assert limited(Library.load(path).certificates).all()
            continue
        with pytest.raises(LibraryError, match="certified for other limits of the actions than the card's"):
            Library.load(path)


def test_a_failed_write_leaves_the_old_library(built, tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.laws"
    built.library.save(path)
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LibraryError, match="No space left"):
        replace(built.library, notes={"new": True}).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.laws"]
    with pytest.raises(LibraryError, match="cannot be written"):
        built.library.save(tmp_path / "no" / "folder.laws")


REWRITER = """
import sys
from laws_ros.core.library import Library
libraries = [Library.load(path) for path in sys.argv[2:]]
print("writes", flush=True)
while True:
    for library in libraries:
        library.save(sys.argv[1])
"""


def test_killing_the_writer_of_a_snapshot_leaves_an_old_or_a_new_one(built, tmp_path) -> None:
    small = replace(built.library, notes={"small": True}).indexed(built.library.trie)
    for name, library in (("a.laws", built.library), ("b.laws", small), ("x.laws", small)):
        library.save(tmp_path / name)
    rng = np.random.default_rng(0)
    for _ in range(4):
        command = [sys.executable, "-c", REWRITER, *(str(tmp_path / name) for name in ("x.laws", "a.laws", "b.laws"))]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "writes\n"
        time.sleep(rng.uniform(0.0, 0.2))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert Library.load(tmp_path / "x.laws").digest in (built.library.digest, small.digest)


def test_another_policy_or_card_is_refused_with_the_difference(built) -> None:
    library, card = built.library, built.policy.card
    with pytest.raises(LibraryError, match="sha256"):
        library.check_policy("0" * 64, card, "l.laws", "p.onnx")
    swapped = replace(card, observations=(card.observations[1], card.observations[0], card.observations[2]))
    with pytest.raises(LibraryError, match=r"observations\[0\].name: 'a.position' against 'b.position'"):
        library.check_policy(library.policy_sha256, swapped, "l.laws", "p.onnx")
    library.check_policy(library.policy_sha256, card, "l.laws", "p.onnx")


def test_entropy_and_the_size_that_it_predicts(built) -> None:
    count = len(built.library)
    even = replace(built.library, visits=np.full(count, 1000))
    assert even.entropy == pytest.approx(np.log2(count)) and even.predicted(np.e) == pytest.approx(count)
    one = replace(built.library, visits=np.where(np.arange(count) == 0, 10**9, 0))
    assert 0 < one.entropy < 0.01 and one.predicted(1.0) == 0.0 < one.predicted(100.0) < 5.0
    none = replace(built.library, certificates=built.library.certificates[:0], visits=np.zeros(0, np.int64))
    assert none.entropy == 0.0


def test_ids_name_content_not_position(built) -> None:
    order = np.random.default_rng(0).permutation(len(built.library))
    shuffled = replace(built.library, certificates=built.library.certificates[order])
    assert shuffled.ids == [built.library.ids[k] for k in order]
    for field in fields(Certificates):
        changed = getattr(built.library.certificates, field.name)
        if isinstance(changed, Ragged):
            rows = [changed.row(k) for k in range(1, len(changed))]
            changed = Ragged.of([np.append(changed.row(0), 1), *rows], changed.values.dtype)
        else:
            changed = changed.copy()
            changed.flat[0] = np.nextafter(changed.flat[0], np.inf) if changed.dtype.kind == "f" else 5
        other = replace(built.library, certificates=replace(built.library.certificates, **{field.name: changed}))
        assert other.ids[0] != built.library.ids[0] and other.ids[1:] == built.library.ids[1:]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8), st.data())
def test_ragged_rows_are_those_of_a_list(lengths: list[int], data) -> None:
    rng = np.random.default_rng(len(lengths))
    rows = [rng.normal(size=k).astype(np.float32) for k in lengths]
    ragged = Ragged.of(rows, np.float32)
    which = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=6)) if rows else []
    mask = rng.random(len(rows)) < 0.5
    for found, want in (
        (ragged, rows),
        (ragged[np.array(which, np.intp)], [rows[k] for k in which]),
        (ragged[mask], [row for row, chosen in zip(rows, mask, strict=True) if chosen]),
        (ragged[1:3], rows[1:3]),
        (Ragged.join([ragged, ragged[1:]]), rows + rows[1:]),
    ):
        assert len(found) == len(want)
        for k, row in enumerate(want):
            np.testing.assert_array_equal(found.row(k), row)
