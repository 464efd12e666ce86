"""The report: complete, readable without a network by people and machines, and right in what it says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from laws_ros.build import svg
from laws_ros.build.report import report
from laws_ros.build.traffic import why
from laws_ros.build.workloads import Workload, WorkloadSpec
from laws_ros.cli import main
from laws_ros.core.certificate import FORMAL, Certificates
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import Library
from laws_ros.core.trie import Trie
from laws_ros.runtime.history import History
from laws_ros.runtime.routing import Router
from tests.support import random_mlp, save_mlp

VOID = {"meta", "input", "link", "br", "img", "hr"}
SECTIONS = ("coverage", "bounds", "fallbacks", "latency", "trie", "plane", "growth", "laws", "limits")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """A page's elements, and whatever is not well formed about it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []  # tag, attributes, parent
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), self.open[-1] if self.open else ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), self.open[-1]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]


def recorded(card, x: np.ndarray) -> Workload:
    spec = WorkloadSpec("a recording", card.observations, card.actions, False, 0.01, len(x))
    return Workload(spec, lambda: None, recorded=(x,))  # type: ignore[arg-type,return-value]


@pytest.fixture(scope="module")
def fresh(built) -> np.ndarray:
    """Observations as those that the library was grown from, some far away, one that is none."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(600, 3)) * [0.5, 0.3, 1.0]).astype(np.float32)
    x[:20] *= 8.0
    x[20] = np.nan
    return x


@pytest.fixture(scope="module")
def text(built, fresh) -> str:
    finite = np.delete(fresh, 20, axis=0)
    return report(built.library, built.policy, recorded(built.policy.card, finite), title="<small> & co")


def test_it_needs_nothing_from_outside(text):
    page = Page(text)
    assert not [tag for tag, _, _ in page.elements if tag in ("script", "link", "img", "iframe", "object", "base")]
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "onload", "onclick"), (tag, name)
            assert name != "href" or (value or "").startswith("#"), (tag, value)
            assert "url(" not in (value or ""), (tag, name, value)
    assert "@import" not in text and "url(" not in text and "javascript:" not in text
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert len(text) < 500_000


def test_it_can_be_read_without_eyes_and_without_a_mouse(text):
    page = Page(text)
    assert page.all("html")[0]["lang"] == "en" and "<title>&lt;small&gt; &amp; co: library report</title>" in text
    ids = Counter(a["id"] for _, a, _ in page.elements if a.get("id"))
    assert max(ids.values()) == 1
    for tag, attributes, _ in page.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert ids[name] == 1, (tag, name)
        assert attributes.get("href", "#main") in {"#main", *(f"#{name}" for name in SECTIONS)}
    pictures = [a for a in page.all("svg") if a.get("role") == "img"]
    assert len(pictures) >= 6 and all(len((a["aria-labelledby"] or "").split()) == 2 for a in pictures)
    described = re.findall(r"<desc [^>]*>([^<]+)</desc>", text)
    assert len(described) == len(pictures) and all(len(words) > 40 for words in described)
    assert [a["id"] for a in page.all("section")] == list(SECTIONS)
    assert len(page.all("h1")) == 1 and len(page.all("h2")) == len(SECTIONS)
    assert all(a["scope"] == "col" for a in page.all("th")) and len(page.all("caption")) == len(
        page.all("table")
    ) == text.count("<caption>") - text.count("<caption></caption>")
    assert [parent for tag, _, parent in page.elements if tag == "summary"] == ["details"] * len(page.all("details"))
    assert all(parent == "label" for tag, _, parent in page.elements if tag == "input")


def luminance(colour: str) -> float:
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_and_lines_stand_out(theme):
    for name, least in (("ink", 7.0), ("muted", 4.5), ("k1", 4.5), ("k2", 4.5), ("k3", 4.5), ("k4", 4.5)):
        for ground in ("surface", "page"):
            a, b = sorted(luminance(svg.COLORS[c][theme]) for c in (name, ground))
            assert (b + 0.05) / (a + 0.05) >= least, (name, ground)


def test_its_figures_are_those_of_the_library(built, fresh, text):
    finite = np.delete(fresh, 20, axis=0)
    hit = Router(built.library, built.library.tolerance).many(finite) >= 0
    assert 0.3 < hit.mean() < 0.99  # so that both kinds of answers are in it
    assert f"<b>{100 * hit.mean():.1f}%</b><span>answered</span>" in text
    assert f"{(~hit).sum():,} of {len(finite):,} held-out steps" in text
    assert (
        "<b>0 violations</b>" in text and f"answered ({hit.sum():,})" in text and f"fell back ({(~hit).sum()})" in text
    )
    for law in np.argsort(-built.library.visits, kind="stable")[:40]:
        assert built.library.ids[law] in text
    assert "a.position" in text and "rad/s" in text and built.library.digest in text


def test_every_miss_has_a_reason_that_is_true(built, fresh):
    library = replace(built.library, tolerance=0.2 * built.library.tolerance)
    missed = np.flatnonzero(Router(library, library.tolerance).many(fresh) < 0)
    found = why(library, fresh, missed, FORMAL)
    assert [m.row for m in found] == missed.tolist()
    inside = library.certificates.regions.contains(np.nan_to_num(fresh, nan=1e9))
    names = [c.name for c in library.card.observations]
    for miss in found:
        if miss.row == 20:
            assert miss.reason == "nan" and miss.blame == names[0]
        elif miss.reason == "bound":
            k = np.array([miss.region])
            within, _, bound = library.certificates.at(k, fresh[miss.row : miss.row + 1])
            assert within[0] and miss.by == pytest.approx((bound[0] / library.tolerance).max()) and miss.by > 1
            assert inside[miss.row].any() and miss.blame in [c.name for c in library.card.actions]
        else:
            assert not inside[miss.row].any() and miss.by > 1 and miss.blame in names
            regions = library.certificates.regions[[miss.region]]
            shrunk = regions.center + (fresh[miss.row] - regions.center) / miss.by
            assert regions.contains(regions.center + 0.999 * (shrunk - regions.center))  # just inside, this far out,
            assert not regions.contains(regions.center + 1.001 * (shrunk - regions.center))  # and just outside
            assert (miss.reason == "near") == (miss.by <= 1.1) and (miss.reason == "far") == (miss.by > 2.0)
    assert {"bound", "near", "far", "nan"} <= {m.reason for m in found}


def test_what_is_missing_is_said(built):
    alone = report(built.library)
    assert alone.count("Not in this report: needs the policy") == 4 and Page(alone)
    sampled = report(built.library, built.policy, steps=300)
    assert sampled.count("Not in this report: ") == 2 and "drawn from inside the regions" in sampled and Page(sampled)


def test_growth_over_time_is_what_the_history_says(built, tmp_path, capsys):
    library, path, out = built.library, tmp_path / "h.db", tmp_path / "r.html"
    with History(path, library.policy_sha256, library.card, library.tolerance) as history:
        ids = history.add(library.certificates[:10])
        history.retire(ids[:4], "unused")
        history.restore(ids[:1], "seen again")
    library.save(tmp_path / "small.laws")
    arguments = ["report", str(tmp_path / "small.laws"), "-o", str(out), "--history"]
    assert main([*arguments, str(path)]) == 0
    text = out.read_text()
    assert Page(text) and "10 added, 4 retired, 1 restored; 7 in the library now" in text
    assert main([*arguments, str(tmp_path / "no.db")]) == 2 and "no.db" in capsys.readouterr().err


def test_a_decision_has_no_tolerance(tmp_path, capsys):
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'laws_ros[gym]'")
    policy = save_mlp(tmp_path / "p.onnx", random_mlp(np.random.default_rng(1), [4, 12, 2]))
    gym, library, out = "gym:CartPole-v1", str(tmp_path / "p.laws"), tmp_path / "r.html"
    build = ["build", "--policy", str(policy), "--workload", gym, "--decision", "argmax", "--steps", "600"]
    assert main([*build, "--max-regions", "60", "--out", library]) == 0
    capsys.readouterr()
    assert main(["report", library, "-o", str(out), "--steps", "300", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["paths"] == [str(out)] and printed["bytes"] == out.stat().st_size
    text = out.read_text()
    assert Page(text) and "no tolerance to trade" in text and "the policy&#x27;s own" in text


def test_a_library_of_ten_thousand_stays_small(built):
    rng, c = np.random.default_rng(0), built.library.certificates
    which = np.arange(10_000) % len(c)
    spread = np.array([20.0, 20.0, 40.0])
    center = c.center[which] + rng.normal(size=(10_000, 3)) * spread
    many = replace(c[which], center=center)
    library = replace(built.library, certificates=many, visits=rng.integers(0, 1000, 10_000))
    x = np.r_[center[::10] + 0.01, rng.normal(size=(3000, 3)) * spread].astype(np.float32)
    replayed = recorded(built.policy.card, x)
    text = report(library.indexed(Trie.over(many.regions)), built.policy, replayed, kinds=["linear"])
    assert 100_000 < len(text) < 1_000_000 and Page(text) and "of 4,000 held-out steps" in text


def test_bad_input_is_one_line(built, tmp_path, capsys):
    empty = tmp_path / "empty.laws"
    policy, tolerance = built.policy, built.library.tolerance
    hollow = Library(policy.sha256, policy.card, tolerance, Certificates.none(3, 2), Trie.root(), np.zeros(0, np.int64))
    hollow.save(empty)
    with pytest.raises(LibraryError, match="holds no experts"):
        report(hollow)
    with pytest.raises(LibraryError, match="of kind linear only; name them"):
        report(built.library, kinds=["statistical"])
    built.library.save(tmp_path / "small.laws")
    for arguments, words in (
        ((str(empty), "-o", str(tmp_path / "r.html")), "holds no experts"),
        ((str(tmp_path / "absent.laws"), "-o", str(tmp_path / "r.html")), "absent.laws"),
        ((str(tmp_path / "small.laws"), "-o", str(tmp_path / "no" / "r.html")), "does not exist"),
        ((str(tmp_path / "small.laws"), "-o", str(tmp_path / "r.html"), "--kinds", "linera"), "did you mean linear"),
    ):
        assert main(["report", *arguments]) == 2
        streams = capsys.readouterr()
        assert words in streams.err and len(streams.err.strip().splitlines()) == 1 and streams.out == ""


def browse(page: Path, folder: Path) -> tuple[list[str], list[str], Path]:
    """What a browser's console says of a page, what the page asks of the network, and a picture of it."""
    log, picture = folder / "net.json", folder / f"{page.stem}.png"
    found = subprocess.run(
        [
            *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"),
            *(
                "--disable-extensions",
                "--disable-sync",
                "--host-resolver-rules=MAP * ~NOTFOUND",
                "--window-size=1100,2400",
            ),
            *("--enable-logging=stderr", "--log-level=0", f"--user-data-dir={folder / 'profile'}"),
            *(f"--log-net-log={log}", f"--screenshot={picture}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert found.returncode == 0 and picture.is_file(), found.stderr
    record = json.loads(log.read_text())
    start = record["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    # The browser itself asks for updates; those requests have no page behind them.
    asked = [
        event["params"]["url"]
        for event in record["events"]
        if event["type"] == start and event["params"].get("initiator", "not an origin") != "not an origin"
    ]
    return [line for line in found.stderr.splitlines() if "CONSOLE" in line], asked, picture


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to open the report with: apt-get install chromium")
def test_a_browser_draws_it_and_asks_for_nothing(text, tmp_path):
    page, bad = tmp_path / "report.html", tmp_path / "bad.html"
    page.write_text(text)
    console, asked, picture = browse(page, tmp_path)
    assert console == [] and asked == []
    image = pytest.importorskip("PIL.Image", reason="pictures need Pillow: pip install 'laws_ros[plot]'")
    with image.open(picture) as shown:
        colours = dict((rgb[:3], count) for count, rgb in shown.getcolors(1 << 24))
    surface, line = (tuple(int(svg.COLORS[name][0][k : k + 2], 16) for k in (1, 3, 5)) for name in ("surface", "k1"))
    assert colours[surface] > 200_000 and colours[line] > 500  # it was laid out, and its plots have lines
    bad.write_text('<title>x</title><img src="http://example.invalid/a.png"><script>console.error("no")</script>')
    console, asked, _ = browse(bad, tmp_path)
    assert len(console) == 1 and asked == ["http://example.invalid/a.png"]  # such things would have been seen
