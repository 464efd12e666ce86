"""The history: nothing acknowledged is ever lost, and nothing damaged is ever believed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laws_ros.cli import main
from laws_ros.core.card import Card
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import Library
from laws_ros.core.record import pack, unpack
from laws_ros.core.trie import Trie
from laws_ros.runtime.history import History, recover, timeline
from laws_ros.runtime.routing import Router


def opened(path: Path, built, **changes) -> History:
    given_ = {"policy_sha256": built.policy.sha256, "card": built.policy.card, "tolerance": built.library.tolerance}
    return History(path, **{**given_, **changes})


def test_experts_come_back_as_they_were(built, tmp_path) -> None:
    certificates = built.library.certificates
    with opened(tmp_path / "h.db", built) as history:
        ids = history.add(certificates, "test")
        assert ids == built.library.ids
    with opened(tmp_path / "h.db", built) as history:
        found, back = history.experts()
        assert found == sorted(ids)
        order = np.argsort(ids)
        assert [pack(back, k) for k in range(len(back))] == [pack(certificates, k) for k in order]


def test_a_snapshot_answers_as_the_library_it_came_from(built, tmp_path) -> None:
    with opened(tmp_path / "h.db", built) as history:
        history.add(built.library.certificates)
        snapshot = history.library()
    x = built.observations.astype(float)
    tolerance = built.library.tolerance
    mine, theirs = Router(snapshot, tolerance).many(x), Router(built.library, tolerance).many(x)
    assert [snapshot.ids[k] if k >= 0 else "" for k in mine] == [built.library.ids[k] if k >= 0 else "" for k in theirs]


def test_the_questions_made_from_the_regions_tell_them_apart_as_well_as_the_grown_ones(built) -> None:
    library, x = built.library, built.observations[:500].astype(float)
    made = library.indexed(Trie.over(library.certificates.regions))

    def listed(trie: Trie) -> float:
        """Regions tested for an observation."""
        leaves = [trie.leaf(row) for row in x]
        return float(np.mean([trie.first[k + 1] - trie.first[k] for k in leaves]))

    assert listed(made.trie) < 1.3 * listed(library.trie) < 0.5 * len(library)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_order_and_any_repetition_give_the_same_library(built, tmp_path_factory, data) -> None:
    certificates = built.library.certificates[:40]
    order = data.draw(st.permutations(range(len(certificates))))
    again = data.draw(st.lists(st.integers(0, len(certificates) - 1), max_size=10))
    folder = tmp_path_factory.mktemp("order")
    with opened(folder / "a.db", built) as a, opened(folder / "b.db", built) as b:
        a.add(certificates)
        for k in [*order, *again]:
            b.add(certificates[k : k + 1])
        assert a.library().digest == b.library().digest


def test_retired_experts_stay_out_until_they_are_restored(built, tmp_path) -> None:
    with opened(tmp_path / "h.db", built) as history:
        ids = history.add(built.library.certificates)
        history.retire(ids[:3], "a human took over")
        history.add(built.library.certificates)  # they do not come back by being certified again
        assert set(history.experts()[0]) == set(ids[3:])
        assert history.retired() == dict.fromkeys(ids[:3], "a human took over")
        history.restore(ids[:1], "reviewed")
        assert set(history.experts()[0]) == {ids[0], *ids[3:]}


def test_the_timeline_tells_what_became_of_the_experts_also_while_a_learner_writes(built, tmp_path) -> None:
    path = tmp_path / "h.db"
    before = time.time()
    with opened(path, built) as history:
        ids = history.add(built.library.certificates[:4])
        history.retire(ids[1:3], "test")
        history.restore(ids[2:3], "test")
        later = history.add(built.library.certificates[4:6])
        found = timeline(path)
    wanted = [("added", name) for name in ids] + [("retired", name) for name in ids[1:3]]
    wanted += [("restored", ids[2])] + [("added", name) for name in later]
    assert [(m.event, m.id) for m in found] == wanted
    assert before - 1.0 <= min(m.at for m in found) and max(m.at for m in found) <= time.time() + 1.0
    assert timeline(path) == found
    with pytest.raises(LibraryError, match="no such history"):
        timeline(tmp_path / "none.db")


def test_uses_add_up(built, tmp_path) -> None:
    with opened(tmp_path / "h.db", built, half_life_s=5.0) as history:
        ids = history.add(built.library.certificates)
        history.used({ids[0]: 3, ids[1]: 1}, now=10.0)
        history.used({ids[0]: 2}, now=5.0)  # heard of late: a half-life ago when the first was counted
        assert history.uses() == {ids[0]: (5, 4.0, 10.0), ids[1]: (1, 1.0, 10.0)}
        assert history.faded(history.uses()[ids[0]], 20.0) == 1.0
        library = history.library()
        assert library.visits[library.ids.index(ids[0])] == 5


def test_misses_wait_in_their_order_and_the_oldest_are_dropped_and_counted(built, tmp_path) -> None:
    x, y = built.observations[:50], built.policy.batch(built.observations[:50])
    with opened(tmp_path / "h.db", built, most_misses=30) as history:
        history.add_misses(x[:20], y[:20])
        history.add_misses(x[20:], y[20:])
        found_x, found_y, last = history.misses()
        np.testing.assert_array_equal(found_x, x[20:])
        np.testing.assert_array_equal(found_y, y[20:])
        assert history.dropped_misses == 20
        history.add_misses(x[:1], y[:1])
        history.forget_misses(last)
        np.testing.assert_array_equal(history.misses()[0], x[:1])


@pytest.mark.parametrize("what", ["policy", "card", "precision"])
def test_a_history_of_something_else_is_refused(built, tmp_path, what) -> None:
    opened(tmp_path / "h.db", built).close()
    other = {
        "policy": {"policy_sha256": "0" * 64},
        "card": {"card": Card.plain("x", 3, 2)},
        "precision": {"precision": "float16"},
    }[what]
    with pytest.raises(LibraryError, match=r"h\.db") as caught:
        opened(tmp_path / "h.db", built, **other)
    assert "\n" not in str(caught.value)
    opened(tmp_path / "h.db", built).close()  # and the lock is free again


def test_one_writer_at_a_time(built, tmp_path) -> None:
    with opened(tmp_path / "h.db", built), pytest.raises(LibraryError, match=f"process {os.getpid()} writes"):
        opened(tmp_path / "h.db", built)


WRITER = """
import sys
import numpy as np
from laws_ros.core.library import Library
from laws_ros.runtime.history import History
library = Library.load(sys.argv[2])
history = History(sys.argv[1], library.policy_sha256, library.card, library.tolerance)
x = np.zeros((7, 3), np.float32)
for k in range(len(library)):
    print(*history.add(library.certificates[k : k + 1]), flush=True)
    history.add_misses(x + k, np.zeros((7, 2), np.float32))
    print("miss", k, flush=True)
"""


def test_killing_the_writer_at_any_instant_loses_nothing_acknowledged(built, tmp_path) -> None:
    built.library.save(tmp_path / "x.laws")
    rng = np.random.default_rng(0)
    for attempt in range(6):
        path = tmp_path / f"{attempt}.db"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(tmp_path / "x.laws")], stdout=subprocess.PIPE, text=True
        )
        lines = [writer.stdout.readline()]  # it is writing now
        time.sleep(rng.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        lines += writer.stdout.read().splitlines(keepends=True)
        writer.wait()
        said = [line.split() for line in lines if line.endswith("\n")]
        with opened(path, built) as history:
            ids, _ = history.experts()
            assert {words[0] for words in said if words[0] != "miss"} <= set(ids)
            x, _, _ = history.misses()
            acknowledged = sum(7 for words in said if words[0] == "miss")
            assert len(x) % 7 == 0 and acknowledged <= len(x) <= acknowledged + 7  # whole batches only
            history.library()


def test_a_full_disk_is_one_clear_line_and_costs_nothing_that_was_stored(built, tmp_path) -> None:
    with opened(tmp_path / "h.db", built) as history:
        ids = history.add(built.library.certificates[:5])
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        quiet = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        size = max((tmp_path / name).stat().st_size for name in ("h.db", "h.db-wal"))
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1, hard))
            with pytest.raises(LibraryError, match=r"h\.db: .*nothing of this step was stored") as caught:
                history.add_misses(np.zeros((60000, 3), np.float32), np.zeros((60000, 2), np.float32))
            assert "\n" not in str(caught.value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, quiet)
        assert set(history.experts()[0]) == set(ids)
        assert len(history.misses()[0]) == 0
        history.add_misses(np.zeros((6, 3), np.float32), np.zeros((6, 2), np.float32))  # and it goes on
        assert len(history.misses()[0]) == 6


def filled(path: Path, built) -> list[str]:
    with opened(path, built) as history:
        ids = history.add(built.library.certificates[:60])
        history.retire(ids[:2], "test")
        history.add_misses(built.observations[:20], built.policy.batch(built.observations[:20]))
        history._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return ids


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_or_missing_end_is_ever_believed(built, tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("damage") / "h.db"
    ids = filled(path, built)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(1, len(content) - 1)) :]
    path.write_bytes(bytes(content))
    records = {name: pack(built.library.certificates, k) for k, name in enumerate(ids)}

    def believed(file: Path) -> None:
        with opened(file, built) as history:
            found, certificates = history.experts()
            assert all(pack(certificates, k) == records[name] for k, name in enumerate(found))
            history.library()

    with contextlib.suppress(LibraryError):  # refused: as good
        believed(path)
    with contextlib.suppress(LibraryError):  # what bound it to its policy was hit
        recover(path, path.with_name("out.db"))
        believed(path.with_name("out.db"))


def test_recovery_saves_all_but_what_was_hit(built, tmp_path) -> None:
    path = tmp_path / "h.db"
    ids = filled(path, built)
    content = bytearray(path.read_bytes())
    content[0:65536] = bytes(65536)  # SQLite's header and schema: it cannot open this file any more
    path.write_bytes(bytes(content))
    with pytest.raises((LibraryError, sqlite3.DatabaseError), match="damaged"):
        opened(path, built)
    counts = recover(path, tmp_path / "new.db")
    assert counts.experts == 60 and counts.events == 2 and counts.misses == 20
    with opened(tmp_path / "new.db", built) as history:
        assert set(history.experts()[0]) == set(ids[2:])
    with pytest.raises(LibraryError, match="exists already"):
        recover(path, tmp_path / "new.db")


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_malformed_record_is_refused(built, data) -> None:
    record = pack(built.library.certificates, data.draw(st.integers(0, 5)))
    n, r = built.library.certificates.expert_weight.shape[:0:-1]
    with pytest.raises(LibraryError):
        unpack([record[: data.draw(st.integers(0, len(record) - 1))]], n, r)
    with pytest.raises(LibraryError):
        unpack([record + data.draw(st.binary(min_size=1, max_size=9))], n, r)
    with pytest.raises(LibraryError):
        unpack([record], n + 1, r)


def test_snapshots_and_recovery_from_the_command_line(built, tmp_path, capsys) -> None:
    ids = filled(tmp_path / "h.db", built)
    assert main(["library", "snapshot", str(tmp_path / "h.db"), "--out", str(tmp_path / "x.laws"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["regions"] == len(ids) - 2 == len(Library.load(tmp_path / "x.laws"))
    assert main(["library", "recover", str(tmp_path / "h.db"), "--out", str(tmp_path / "new.db"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["experts"] == len(ids)
    assert main(["library", "snapshot", str(tmp_path / "none.db"), "--out", str(tmp_path / "y.laws")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
