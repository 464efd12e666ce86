"""`laws report`: one HTML file about a library, for the people who must trust it.

It opens without a network and without a script: the page's own security policy forbids both. Every plot has a title
and a description for screen readers, what matters in it also stands in words or in a table, and folded parts open with
the keyboard. What was measured is measured again for the report, on episodes that the library has not seen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from laws_ros import __version__
from laws_ros.core.certificate import KINDS, check_kinds
from laws_ros.core.errors import LibraryError
from laws_ros.core.library import Library
from laws_ros.core.trie import LEAF
from laws_ros.runtime.cached_policy import CachedPolicy
from laws_ros.runtime.explain import Law, explain
from laws_ros.runtime.history import Moment
from laws_ros.runtime.policy import Policy
from laws_ros.runtime.routing import Router

from .grow import wins
from .svg import STYLE, THEME, Axis, Cell, Chart, Picture, escape, icicle, number, table
from .traffic import REASONS, Traffic, driven, inside, measure, why
from .workloads import Workload

Floats = NDArray[np.float64]

SHARES = np.geomspace(0.05, 4.0, 45)  # of the library's tolerance, at which coverage is measured
DOTS = 1500  # of a plot, at most
CORNERS = 48  # of a region's outline
OUTLINES = 40  # regions drawn, at most
NARROWEST = 1 / 400  # of the trie's width: a thinner cell is not drawn
DEPTH = 16  # rows of the trie drawn, at most
LAWS = 40  # spelled out
MISSES = 600  # explained, at most
EXAMPLES = 12


def report(
    library: Library,
    policy: Policy | None = None,
    workload: Workload | None = None,
    *,
    steps: int = 4000,
    seed: int = 0,
    kinds: Sequence[str] = (),
    moments: Sequence[Moment] = (),
    title: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> str:
    """The report as HTML text.

    Args:
        policy: the library's; without it nothing is executed and only what the library holds is shown.
        workload: driven by the policy for about `steps` control steps; without it, observations are drawn from inside
            the regions, which shows bounds and times but not what is answered.
        kinds: of certificates that may answer (core.certificate); none: the formal ones.
        moments: of a learner's history (runtime.history.timeline).

    Raises:
        LibraryError: the library is empty, or holds no experts of these kinds.
    """
    if not len(library):
        raise LibraryError("the library holds no experts, so there is nothing to report; `laws build` grows one")
    held = {KINDS[k] for k in library.certificates.kind}
    if held.isdisjoint(check_kinds(kinds)):
        raise LibraryError(f"the library holds experts of kind {', '.join(sorted(held))} only; name them with --kinds")
    traffic = None
    if policy is not None:
        progress("observations are being gathered")
        x = inside(library, steps, seed) if workload is None else driven(policy, workload, steps, seed)
        progress(f"{len(x)} observations are being answered and timed")
        traffic = measure(CachedPolicy(library, policy, kinds=kinds), x, workload is not None)
    page = _Page(library, traffic, kinds, moments)
    sections = [
        page.coverage(),
        page.errors(),
        page.fallbacks(),
        page.latency(),
        page.trie(),
        page.plane(),
        page.growth(),
        page.laws(),
        page.limits(),
    ]
    return page.html(title or library.card.name, sections)


class _Page:
    """The sections of the report, each as HTML."""

    def __init__(
        self, library: Library, traffic: Traffic | None, kinds: Sequence[str], moments: Sequence[Moment]
    ) -> None:
        self.library, self.traffic, self.moments = library, traffic, moments
        self.kinds = check_kinds(kinds)
        self.discrete = library.card.decision != "none"
        self.real = traffic if traffic is not None and traffic.held_out else None

    # -- the page --------------------------------------------------------------------------------------------------

    def html(self, title: str, sections: list[tuple[str, str, str]]) -> str:
        links = "".join(f'<a href="#{name}">{escape(head)}</a>' for name, head, _ in sections)
        body = "".join(
            f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{escape(head)}</h2>{text}</section>'
            for name, head, text in sections
        )
        themes = "".join(
            f'<label><input type="radio" name="theme" id="{name}"{checked}> {name}</label>'
            for name, checked in (("system", " checked"), ("light", ""), ("dark", ""))
        )
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{escape(title)}: library report</title><style>{THEME}{STYLE}{_CSS}</style></head><body>"
            '<a class="skip" href="#main">Skip to the figures</a>'
            f"<header><div><h1>{escape(title)}</h1><p>{self._identity()}</p></div>"
            f'<fieldset class="themes"><legend>Colours</legend>{themes}</fieldset></header>'
            f'<nav aria-label="Sections">{links}</nav><main id="main">{self._tiles()}{body}</main>'
            f"<footer>laws_ros {escape(__version__)}. This file is complete: it loads nothing and runs no script."
            "</footer></body></html>\n"
        )

    def _identity(self) -> str:
        library, notes = self.library, self.library.notes
        made = f"grown on {escape(notes['workload'])}" if "workload" in notes else "grown"
        if "train_observations" in notes:
            made += f" from {notes['train_observations']:,} observations, seed {notes.get('seed', '-')}"
        return (
            f"Library <code>{library.digest}</code> for the policy <code>{library.policy_sha256[:12]}</code> "
            f"({library.precision}), card {escape(library.card.name)} with "
            f"{_count(len(library.card.observations), 'sensor')} and "
            f"{_count(len(library.card.actions), 'alternative' if self.discrete else 'action')}; {made}."
        )

    def _tiles(self) -> str:
        t, tiles = self.traffic, []
        if self.real is not None:
            tiles.append((f"{100 * self.real.hit_rate:.1f}%", "answered", f"of {len(self.real.x):,} held-out steps"))
        if t is not None and len(t.bound):
            seen = f"{len(t.bound):,} answers, {t.beyond.sum()} beyond their bound"
            tiles.append((f"{t.used.max():.3f}", "worst error / bound", seen))
        if self.real is not None:
            mean, alone = (
                float(np.concatenate([self.real.hit_us, self.real.miss_us]).mean()),
                self.real.policy_us.mean(),
            )
            times = f"mean {number(mean)} us, policy {number(float(alone))} us"
            tiles.append((f"{alone / mean:.1f} x", "cheaper step", times))
        promise = "every answer is the policy's own" if self.discrete else "largest certified action error"
        tiles.append((self._tolerance(), "tolerance", promise))
        counts = Counter(KINDS[k] for k in self.library.certificates.kind)
        tiles.append((f"{len(self.library):,}", "experts", ", ".join(f"{v:,} {k}" for k, v in counts.items())))
        return (
            '<div class="tiles">'
            + "".join(
                f"<div><b>{escape(value)}</b><span>{escape(name)}</span><small>{escape(more)}</small></div>"
                for value, name, more in tiles
            )
            + "</div>"
        )

    def _tolerance(self) -> str:
        if self.discrete:
            return self.library.card.decision
        values = sorted(
            {(float(v), c.unit) for v, c in zip(self.library.tolerance, self.library.card.actions, strict=True)}
        )
        return ", ".join(f"{number(v)} {unit}".strip() for v, unit in values[:2]) + (" ..." if len(values) > 2 else "")

    @staticmethod
    def _missing(what: str) -> str:
        return f'<p class="absent">Not in this report: {escape(what)}</p>'

    # -- sections: (id, heading, HTML) -----------------------------------------------------------------------------

    def coverage(self) -> tuple[str, str, str]:
        head = "coverage", "Coverage against tolerance"
        if self.real is None:
            return *head, self._missing("needs the policy and a workload to drive (--policy, --workload).")
        if self.discrete:
            return *head, self._decided()
        router = Router(self.library, self.library.tolerance, self.kinds)
        shares = []
        for share in SHARES:
            router.set_tolerance(share * self.library.tolerance)
            shares.append(float((router.many(self.real.x) >= 0).mean()))
        chart = Chart(
            "Share of held-out steps answered, against the tolerance",
            f"Rises from {shares[0]:.1%} at {SHARES[0]:g} of the library's tolerance to {self.real.hit_rate:.1%} at "
            f"the tolerance itself and {shares[-1]:.1%} at {SHARES[-1]:g} times it.",
            Axis("tolerance, in units of the one that the library was built for", SHARES[0], SHARES[-1], log=True),
            Axis("steps answered", 0.0, 1.0, percent=True),
        )
        chart.area(SHARES, shares, "k1", "held-out steps whose bound is within the tolerance")
        chart.upright(1.0, f"built for {self._tolerance()}: {self.real.hit_rate:.1%}", row=3)
        rows = [
            (f"{number(s)}", f"{100 * float(np.interp(np.log(s), np.log(SHARES), shares)):.1f}%")
            for s in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
        ]
        return *head, _figure(
            chart,
            "A tighter demand is answered by fewer experts; the tolerance can be changed while the robot runs, and no "
            "certificate has to be made again. Beyond 1 the curve shows what a library grown for 1 happens to hold.",
            table(("tolerance", "answered"), rows, "Coverage at some tolerances"),
        )  # fmt: skip

    def _decided(self) -> str:
        assert self.real is not None
        chosen = self._chosen
        rows = []
        for k, alternative in enumerate(self.library.card.actions):
            here = chosen == k
            share = float((self.real.found[here] >= 0).mean()) if here.any() else math.nan
            rows.append((alternative.name, f"{here.sum()}", f"{100 * share:.1f}%" if here.any() else "-"))
        about = "A decision is answered only where it is provably the policy's own, so there is no tolerance to trade."
        return f"<p>{about}</p>" + table(("decision answered", "steps", "region found"), rows, "Answers by decision")

    @property
    def _chosen(self) -> NDArray[np.int64]:
        """[N] the alternative that the answering region decides for; -1 where none answers."""
        assert self.real is not None
        chosen = np.full(len(self.real.x), -1)
        hit = np.flatnonzero(self.real.found >= 0)
        _, value, bound = self.library.certificates.at(self.real.found[hit], self.real.x[hit])
        chosen[hit] = wins(value, bound).argmax(axis=1)
        return chosen

    def errors(self) -> tuple[str, str, str]:
        head = "bounds", "Bounds against errors seen"
        t = self.traffic
        if t is None or not len(t.bound):
            return *head, self._missing("needs the policy, and answers to compare with it.")
        scale = np.ones(t.bound.shape[1]) if self.discrete else np.maximum(self.library.tolerance, 1e-300)
        error, bound = (t.error / scale).reshape(-1), (t.bound / scale).reshape(-1)
        keep = np.linspace(0, len(bound) - 1, min(DOTS, len(bound))).astype(int)
        order = np.argsort(-error / np.maximum(bound, 1e-300), kind="stable")
        keep = np.union1d(keep, order[:100])  # the closest calls are all shown
        error, bound = error[keep], bound[keep]
        low = max(float(np.quantile(error[error > 0], 0.02)) if (error > 0).any() else 1e-6, 1e-7)
        unit = "difference of two outputs" if self.discrete else "of the tolerance"
        x = Axis.over(f"certified bound at the observation ({unit})", bound, log=True)
        y = Axis(f"error seen ({unit})", min(low, x.low), x.high, log=True)
        above = int((t.error > t.bound).sum())
        chart = Chart(
            "Error of every answer against its certified bound",
            f"{len(keep)} of {t.error.size} errors; {above} lie above the line where error equals bound. The largest "
            f"is {t.used.max():.3f} of its bound.",
            x,
            y,
            height=400,
        )
        ends = np.array([x.low, x.high])
        chart.area(ends, ends, "quiet faint")
        chart.dots(np.array(bound), error, "k1", "an answer's error, as executed", 3.5, 0.5)
        chart.line(ends, ends, "k2", "error = bound: a dot above it would refute the certificate")
        where = "held-out steps" if t.held_out else "observations drawn from inside the regions"
        rows = [(f"{100 * q:g}%", f"{np.quantile(t.used, q):.4f}") for q in (0.5, 0.9, 0.99, 1.0)]
        beyond = (
            f" {(t.beyond & ~t.formal).sum()} answers of kind statistical lie beyond theirs."
            if (~t.formal).any()
            else ""
        )
        return *head, _figure(
            chart,
            f"Both programs were executed in float32 at {len(t.bound):,} {where}: <b>{t.violations} violations</b> of "
            f"proved bounds.{beyond} "
            "Dots at the lower edge are errors too small for the axis.",
            table(("of the answers", "error over bound, at most"), rows, "How much of its bound an error uses"),
        )  # fmt: skip

    def fallbacks(self) -> tuple[str, str, str]:
        head = "fallbacks", "What fell back, and why"
        if self.real is None:
            return *head, self._missing("needs the policy and a workload to drive (--policy, --workload).")
        x, missed = self.real.x, np.flatnonzero(self.real.found < 0)
        if not len(missed):
            return *head, f"<p>Nothing did: all {len(x):,} held-out steps were answered.</p>"
        rows = missed[np.linspace(0, len(missed) - 1, min(MISSES, len(missed))).astype(int)]
        found = why(self.library, x, rows, self.kinds)
        counts = Counter(m.reason for m in found)
        lines = []
        for reason, words in REASONS.items():
            blamed = Counter(m.blame for m in found if m.reason == reason).most_common(3)
            share = counts[reason] / len(found)
            if counts[reason]:
                names = ", ".join(f"{name} ({100 * c / counts[reason]:.0f}%)" for name, c in blamed)
                lines.append((words, f"{100 * share:.1f}%", f"{100 * share * len(missed) / len(x):.2f}%", names))
        outside = np.array([m.by for m in found if m.reason in ("near", "away", "far")])
        text = (
            f"<p>{len(missed):,} of {len(x):,} held-out steps ({100 * len(missed) / len(x):.2f}%) went to the policy"
            + (f"; {len(found)} of them, evenly spread, were examined" if len(found) < len(missed) else "")
            + ".</p>"
            + table(
                ("why", "of the misses", "of all steps", "most often because of"), lines, "Reasons for falling back"
            )
        )
        if len(outside) > 1:
            by, rank = np.sort(outside), np.arange(1, len(outside) + 1)
            chart = Chart(
                "How far outside the nearest region the misses lie",
                f"Half of them lie within {number(float(np.median(by)))} half-widths of a region's centre; at 1 they "
                "would be inside.",
                Axis(
                    "distance from the nearest region's centre, in its half-widths",
                    1.0,
                    max(1.5, float(by[-1])),
                    log=True,
                ),
                Axis("of the misses outside", 0.0, 1.0, percent=True),
                height=260,
            )
            chart.area(by, rank / len(by), "k2", "misses that are at most so far out")
            text += _figure(
                chart, "A steep start means that slightly larger regions, or a little more data, would help."
            )
        ids = self.library.ids
        examples = [
            (m.row, REASONS[m.reason].partition(":")[0], "-" if m.region < 0 else ids[m.region], number(m.by), m.blame,
             ", ".join(number(float(v)) for v in x[m.row]))
            for m in sorted(found, key=lambda m: m.row)[:: max(1, len(found) // EXAMPLES)][:EXAMPLES]
        ]  # fmt: skip
        inner = table(("step", "why", "nearest expert", "by", "because of", "observation"), examples, "Some of them")
        return *head, text + f"{_folded('Some of these steps', inner)}"

    def latency(self) -> tuple[str, str, str]:
        head = "latency", "Latency"
        t = self.traffic
        if t is None or not len(t.hit_us):
            return *head, self._missing("needs the policy, and answers to time.")
        groups = [("answered by an expert", "k1", t.hit_us), ("fell back: lookup, then the policy", "k2", t.miss_us)]
        groups += [("the policy alone", "k3", t.policy_us)]
        groups = [g for g in groups if len(g[2]) > 1]
        every = np.concatenate([g[2] for g in groups])
        x = Axis.over("one call, microseconds", np.minimum(every, np.quantile(every, 0.999) * 2), log=True)
        edges = np.geomspace(x.low, x.high, 70)
        heights = [np.histogram(g[2], edges)[0] / len(g[2]) for g in groups]
        chart = Chart(
            "Histogram of latencies",
            "; ".join(f"{name}: median {number(float(np.median(v)))} us" for name, _, v in groups) + ".",
            x,
            Axis("of the calls", 0.0, 1.05 * max(float(h.max()) for h in heights), percent=True),
        )
        for (name, css, _), h in zip(groups, heights, strict=True):
            chart.area(np.repeat(edges, 2)[1:-1], np.repeat(h, 2), css, name)
        rows = [
            (name, f"{len(v):,}", *(number(float(q)) for q in (v.mean(), *np.quantile(v, [0.5, 0.99]), v.max())))
            for name, _, v in groups
        ]
        return *head, _figure(
            chart,
            "Timed in this very process, one thread, calls of the policy alone strewn between the others. A control "
            "loop that sleeps between its steps finds colder caches and is slower, both with and without the library.",
            table(("what", "calls", "mean us", "p50 us", "p99 us", "worst us"), rows, "Latency, microseconds"),
            "below",
        )

    def trie(self) -> tuple[str, str, str]:
        library, trie = self.library, self.library.trie
        probability, names = trie.probabilities(), [c.name for c in library.card.observations]
        missed = np.zeros(len(trie.axis))
        if self.real is not None:
            passed = trie.counted(self.real.x).visits - trie.visits
            hit = trie.counted(self.real.x[self.real.found >= 0]).visits - trie.visits
            missed = np.where(passed > 0, 1.0 - hit / np.maximum(passed, 1), np.nan)
        cells, stack, deepest = [], [(0, 0, 0.0, "every observation")], 0
        while stack:
            node, level, left, words = stack.pop()
            share, rate = float(probability[node]), float(missed[node])
            deepest = max(deepest, level)
            if share >= NARROWEST and level < DEPTH:
                listed = int(trie.first[node + 1] - trie.first[node])
                kind = f"leaf that lists {_count(listed, 'region')}" if trie.axis[node] == LEAF else "asks on"
                note = "" if self.real is None else "; not visited" if math.isnan(rate) else f"; {rate:.1%} fell back"
                cells.append(Cell(level, left, share, words, f"{words}: probability {share:.4f}; {kind}{note}", rate))
            if trie.axis[node] != LEAF:
                name, cut = names[trie.axis[node]], number(float(trie.threshold[node]))
                low, high = int(trie.low[node]), int(trie.high[node])
                stack.append((low, level + 1, left, f"{name} < {cut}"))
                stack.append((high, level + 1, left + float(probability[low]), f"{name} \u2265 {cut}"))
        leaves = probability[trie.axis == LEAF]
        entropy = float(-(leaves[leaves > 0] * np.log2(leaves[leaves > 0])).sum())
        picture = icicle(
            "The trie, every cell as wide as its probability",
            f"{trie.leaves} leaves, {deepest} questions deep; the leaves' entropy is {entropy:.1f} bits.",
            cells,
        )
        shade = "Orange rises in a cell as far as its held-out steps fell back; grey cells had none. "
        rows = [
            (c.level, c.label, f"{100 * c.share:.1f}%", "-" if math.isnan(c.fill) else f"{100 * (1 - c.fill):.1f}%")
            for c in sorted(cells, key=lambda c: (c.level, c.left))
            if c.level < 5
        ]
        return (
            "trie",
            "The trie and its probabilities",
            _figure(
                picture,
                f"A key from the sensors walks from the top down; {trie.leaves:,} leaves, {entropy:.1f} bits, as if "
                f"{2**entropy:,.0f} of them were equally likely. {shade * (self.real is not None)}"
                f"Drawn are the {len(cells):,} of {len(trie.axis):,} nodes that are reached with at least "
                f"{NARROWEST:.2%}, {DEPTH} levels at most.",
                _folded(
                    "The first levels as a table",
                    table(("level", "question", "probability", "answered"), rows, "Of the trie"),
                ),
                "below",
            ),
        )

    def plane(self) -> tuple[str, str, str]:
        library, c, card = self.library, self.library.certificates, self.library.card
        names = [o.name for o in card.observations]
        if self.real is not None:
            of, cloud = "the held-out steps", self.real.x.astype(float)
            weight: NDArray[np.floating] = np.ones(len(cloud))
        else:
            of, cloud, weight = "the regions' centres", c.center, library.visits + 0.5
        mean = np.average(cloud, axis=0, weights=weight)
        spread = np.sqrt(np.average((cloud - mean) ** 2, axis=0, weights=weight))
        std = np.where(spread > 0, spread, 1.0)
        z = (cloud - mean) / std
        values, vectors = np.linalg.eigh((z * weight[:, None]).T @ z / weight.sum())
        if len(names) == 1:
            values, vectors = np.array([0.0, *values]), np.array([[0.0, 1.0]])
        axes, share = vectors[:, [-1, -2]], values[[-1, -2]] / max(values.sum(), 1e-300)
        axes = axes * np.where(axes[np.abs(axes).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)

        def label(k: int) -> str:
            largest = [j for j in np.argsort(-np.abs(axes[:, k]))[:3] if abs(axes[j, k]) > 0.15]
            terms = " ".join(f"{axes[j, k]:+.2f} {names[j]}" for j in largest)
            return f"{terms}  ({100 * share[k]:.0f}% of the variance)"

        cloud2 = z @ axes
        reach = np.quantile(cloud2, [0.002, 0.998], axis=0)
        room = 0.12 * (reach[1] - reach[0]) + 1e-9
        chart = Chart(
            "Regions and traffic over the principal plane",
            f"The plane in which {of} spread most ({100 * share.sum():.0f}% of their variance), with the outlines of "
            "the most used regions.",
            Axis(label(0), reach[0, 0] - room[0], reach[1, 0] + room[0]),
            Axis(label(1), reach[0, 1] - room[1], reach[1, 1] + room[1]),
            width=1000,
            height=560,
        )
        generators, _ = c.regions.generators()
        used = [
            k
            for k in np.argsort(-library.visits, kind="stable")[:OUTLINES].tolist()
            if np.isfinite(generators[k]).all()
        ]
        for k in reversed(used):
            outline = _outline((c.center[k] - mean) / std @ axes, (generators[k].T / std) @ axes, c.regions.ball[k])
            chart.polygon(
                outline[:, 0], outline[:, 1], "k4 outline", f"law {library.ids[k]}: answered {library.visits[k]}"
            )
        text = f"Outlined: the {len(used)} most used of {len(library):,} regions. "
        if self.real is not None:
            hit = self.real.found >= 0
            for which, css, name, size in ((hit, "k1", "answered", 3.0), (~hit, "k2", "fell back", 5.0)):
                here = np.flatnonzero(which)
                here = here[np.linspace(0, len(here) - 1, min(DOTS, len(here))).astype(int)]
                if len(here):
                    chart.dots(cloud2[here, 0], cloud2[here, 1], css, f"{name} ({which.sum():,})", size, 0.75)
        text += "In standard deviations. Regions that overlap in this picture can be apart in the other directions."
        return "plane", "Regions over the principal plane", _figure(chart, text, css="below")

    def growth(self) -> tuple[str, str, str]:
        head, library = ("growth", "Growth"), self.library
        order = np.argsort(-library.visits, kind="stable")
        count = np.arange(1, len(library) + 1)
        seen = max(int(library.notes.get("train_observations", library.visits.sum())), int(library.visits.sum()), 1)
        ranks = {"observations that it was grown from": (np.cumsum(library.visits[order]) / seen, "k4 dash")}
        if self.real is not None:
            # Lists are in the order of use, so that the region which answers is the most used one that can.
            first = library.trie.with_regions(library.certificates.regions, order)
            found = Router(replace(library, trie=first), library.tolerance, self.kinds).many(self.real.x)
            rank = np.empty(len(library), np.int64)
            rank[order] = np.arange(len(library))
            hits = np.bincount(rank[found[found >= 0]], minlength=len(library))
            ranks["held-out steps"] = (np.cumsum(hits) / len(self.real.x), "k1")
        chart = Chart(
            "Share answered by the most used experts",
            "; ".join(f"{name}: {values[-1]:.1%} with all {len(library)}" for name, (values, _) in ranks.items()) + ".",
            Axis("experts kept, the most used first", 1.0, max(2.0, float(len(library))), log=True),
            Axis("answered", 0.0, 1.0, percent=True),
        )
        thin = np.unique(np.geomspace(1, len(library), 200).astype(int)) - 1
        for name, (values, css) in ranks.items():
            chart.line(count[thin], values[thin], css, name)
        values = list(ranks.values())[-1][0]
        rows = [
            (f"{100 * share:g}%", f"{int(np.searchsorted(values, share * values[-1])) + 1:,}")
            for share in (0.5, 0.8, 0.9, 0.99, 1)
        ]
        notes = library.notes
        told = [
            (
                name.replace("_", " "),
                number(float(notes[name])) if isinstance(notes[name], (int, float)) else str(notes[name]),
            )
            for name in notes
        ]
        text = (
            "Every expert that is added can only add answers. A curve that still climbs at its right end asks for more "
            "data; a flat one is done."
        )
        extra = table(("of what the library answers", "needs so many experts"), rows, "Experts needed")
        if told:
            extra += _folded(
                "How the library was built", table(("noted at the build", "value"), told, "Noted at the build")
            )
        return *head, _figure(chart, text, extra) + (self._over_time() if self.moments else "")

    def _over_time(self) -> str:
        """Of a learner's history: how many experts were in the library."""
        begun, counts = min(m.at for m in self.moments), []
        there: set[str] = set()
        for moment in self.moments:
            (there.discard if moment.event == "retired" else there.add)(moment.id)
            counts.append(len(there))
        hours = np.maximum.accumulate([(m.at - begun) / 3600.0 for m in self.moments])
        happened = Counter(m.event for m in self.moments)
        chart = Chart(
            "Experts in the library over time",
            f"From {counts[0]} to {counts[-1]} experts in {number(float(hours[-1]))} hours of learning.",
            Axis("hours since the first expert", 0.0, max(float(hours[-1]), 1e-3)),
            Axis("experts", 0.0, 1.05 * max(counts)),
            height=260,
        )
        thin = np.unique(np.linspace(0, len(counts) - 1, 400).astype(int))
        chart.line(np.repeat(hours[thin], 2)[1:], np.repeat(np.array(counts)[thin], 2)[:-1], "k1", "experts")
        events = ", ".join(f"{count:,} {event}" for event, count in happened.items())
        return _figure(chart, f"From the learner's history: {events}; {counts[-1]:,} in the library now.")

    def laws(self) -> tuple[str, str, str]:
        library = self.library
        order = np.argsort(-library.visits, kind="stable")[:LAWS].tolist()
        found = explain(library, order)
        share = library.visits[order].sum() / max(1, library.visits.sum())
        text = (
            f"<p>The {len(found)} most used of {len(library):,}; they gave {100 * share:.0f}% of all answers while the "
            "library was grown. <code>laws explain</code> prints any of them.</p>"
        )
        return "laws", "The laws, in words", text + "".join(_law(k + 1, law) for k, law in enumerate(found))

    def limits(self) -> tuple[str, str, str]:
        statistical = bool(self.library.certificates.among(["statistical"]).any())
        items = [
            "Certified, for every answer of a formal kind: the expert's action differs from the policy's by at most "
            "the published bound in every component, both as ONNX Runtime executes them in float32 on a CPU."
            if not self.discrete
            else "Certified, for every answer of a formal kind: the decision is the policy's own, both as ONNX Runtime "
            "executes them in float32 on a CPU.",
            "Not certified: that the policy is good, or that small action errors stay harmless in closed loop; "
            "<code>laws eval</code> measures the return.",
            "Not certified: other precisions or runtimes.",
            "What was seen here (errors, times, answers) is a measurement on this machine and these episodes; the "
            "certificates do not rest on it. <code>laws verify</code> proves every certificate again.",
        ]
        if statistical:
            items.append("Kind statistical: nothing is proved; a share of the traffic exceeds its bound.")
        return "limits", "What this says, and what it does not", f"<ul>{''.join(f'<li>{i}</li>' for i in items)}</ul>"


def _outline(center: Floats, generators: Floats, ball: NDArray[np.bool_]) -> Floats:
    """[*, 2]: the corners of a region seen from the side: {center + sum_k t_k generators_k}, |t_k| <= 1 for the axes of
    the box, the 2-norm of t for those of the ball. Per direction, the point that lies furthest that way."""
    angle = np.linspace(0.0, 2 * np.pi, CORNERS, endpoint=False)
    along = np.stack([np.cos(angle), np.sin(angle)], axis=1) @ generators.T
    length = np.sqrt(np.where(ball, along**2, 0.0).sum(axis=1, keepdims=True))
    return np.asarray(center + np.where(ball, along / np.maximum(length, 1e-300), np.sign(along)) @ generators)


def _figure(picture: Picture, text: str, extra: str = "", css: str = "beside") -> str:
    """A picture with its words, and what belongs to both, beside it (or below: `css` "below")."""
    return (
        f'<div class="{css}"><figure>{picture.svg()}</figure><div class="words"><p>{text}</p>'
        f'<div class="wide">{extra}</div></div></div>'
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _folded(summary: str, inner: str) -> str:
    return f'<details><summary>{summary}</summary><div class="wide">{inner}</div></details>'


def _law(rank: int, law: Law) -> str:
    more = f" and {len(law.expert) - 1} more" if len(law.expert) > 1 else ""
    box = table(
        ("sensor", "from", "to", "unit"),
        [(b["name"], number(b["low"]), number(b["high"]), b["unit"]) for b in law.box],
        "Where: the box that encloses the region",
    )
    bound = table(
        ("answer", "bound at the centre", "at worst", "unit"),
        [(b["name"], number(b["at_center"]), number(b["worst"]), b["unit"]) for b in law.bound],
        "Within",
    )
    return (
        f'<details class="law"><summary><b>{rank}.</b> <code>{law.id}</code> {100 * law.probability:.2f}% of queries: '
        f"<span>{escape(law.expert[0])}{more}</span></summary>"
        f"<p>Key: {escape(' and '.join(law.key) or 'everything')}</p>"
        f"<ul>{''.join(f'<li><code>{escape(e)}</code></li>' for e in law.expert)}</ul>"
        f"<p>{escape(law.kind)}: {escape(law.standing)}. It answered {law.hits:,} observations.</p>"
        f'<div class="pair">{box}{bound}</div></details>'
    )


_CSS = (
    "*{box-sizing:border-box}html{scroll-behavior:smooth}"
    "body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,sans-serif}"
    "header,nav,main,footer{max-width:1060px;margin:0 auto;padding:0 20px}"
    "header{display:flex;gap:24px;justify-content:space-between;align-items:flex-start;padding-top:28px}"
    "h1{margin:0;font-size:1.75rem;line-height:1.2}h2{margin:0 0 10px;font-size:1.2rem}"
    "header p,footer,.words>p,small,.absent{color:var(--muted)}header p{margin:.4em 0 0;max-width:46em}"
    ".themes{border:1px solid var(--rule);border-radius:8px;padding:2px 10px 6px;font-size:.85rem;white-space:nowrap}"
    ".themes legend{color:var(--muted);padding:0 4px}.themes label{margin-right:8px}"
    "nav{display:flex;flex-wrap:wrap;gap:4px 16px;padding-top:14px;padding-bottom:6px;font-size:.92rem}"
    "a{color:var(--k1)}:is(a,summary,input):focus-visible{outline:3px solid var(--k1);outline-offset:2px}"
    ".skip{position:absolute;left:-999px}.skip:focus{left:20px;top:6px;background:var(--surface);padding:4px 8px}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:14px 0}"
    ".tiles>div,section{background:var(--surface);border:1px solid var(--rule);border-radius:10px}"
    ".tiles>div{padding:12px 14px;display:flex;flex-direction:column}"
    ".tiles b{font-size:1.6rem;line-height:1.25;font-variant-numeric:tabular-nums}.tiles small{font-size:.82rem}"
    "section{padding:18px 20px;margin:0 0 16px;break-inside:avoid}"
    "figure{margin:0;min-width:0}.words{font-size:.94rem;max-width:52em;min-width:0}.words>p{margin:8px 0}"
    ".beside{display:grid;grid-template-columns:minmax(0,680px) minmax(0,1fr);gap:8px 24px}"
    "code{font:0.88em ui-monospace,'DejaVu Sans Mono',monospace;overflow-wrap:anywhere}"
    "details{margin-top:10px}summary{cursor:pointer}.law{border-top:1px solid var(--rule);padding-top:8px}"
    ".law summary span{font:0.85em ui-monospace,'DejaVu Sans Mono',monospace}"
    ".law:not([open]) summary{white-space:nowrap;overflow:hidden;text-overflow:ellipsis}"
    "table{border-collapse:collapse;margin:10px 0;font-size:.9rem;font-variant-numeric:tabular-nums}"
    "caption{text-align:left;color:var(--muted);padding-bottom:4px}"
    "th,td{text-align:left;padding:3px 14px 3px 0;border-bottom:1px solid var(--rule);vertical-align:top}"
    "th{font-weight:600}.n{text-align:right}.wide{overflow-x:auto}.pair{display:flex;flex-wrap:wrap;gap:4px 32px}"
    "footer{padding-top:4px;padding-bottom:30px;font-size:.88rem}"
    "@media print{body{background:none;font-size:10.5pt}nav,.themes,.skip{display:none}"
    ".beside{grid-template-columns:minmax(0,3fr) minmax(0,2fr)}section{padding:10px 12px}"
    "section,.tiles>div{border-color:#bbb}.law{break-inside:avoid}@page{margin:14mm}}"
    "@media screen and (max-width:900px){header{flex-direction:column}.beside{display:block}}"
    "@media(prefers-reduced-motion){html{scroll-behavior:auto}}"
)
