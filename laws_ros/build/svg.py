"""Plots as SVG text: themed by the page they stand in, with words for those who cannot see them.

Written by hand because what is needed is small and what libraries write is not: a report must open without a network,
follow the reader's light or dark theme and the printer, and be read by a screen reader. Plotly and Vega bring megabytes
of JavaScript, matplotlib draws fixed colours without titles.

Colours are CSS variables; a shape takes the colour of its class k1 ... k4 (`COLORS`, told apart by the colour-blind) or
`quiet`. `STYLE` is what a page needs; a plot that stands alone brings it along.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# name: (light, dark); each at least 4.5 : 1 on its own `surface`
COLORS = {
    "page": ("#f5f6f8", "#12151a"),
    "surface": ("#ffffff", "#1a1f26"),
    "ink": ("#1a2028", "#e8ecf1"),
    "muted": ("#566070", "#a3aebb"),
    "rule": ("#d6dbe2", "#343d49"),
    "k1": ("#1b62b5", "#6db0ff"),
    "k2": ("#b54708", "#ffa657"),
    "k3": ("#0f766e", "#4fd1c0"),
    "k4": ("#7c3aad", "#cf9bff"),
}
_LIGHT, _DARK = (";".join(f"--{name}:{pair[k]}" for name, pair in COLORS.items()) for k in (0, 1))
THEME = (
    f":root{{color-scheme:light dark;{_LIGHT}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f"@media screen{{:root:has(#light:checked){{color-scheme:light;{_LIGHT}}}"
    f":root:has(#dark:checked){{color-scheme:dark;{_DARK}}}}}"
    "@media print{:root{color-scheme:light}}"
)
STYLE = (
    ".k1{color:var(--k1)}.k2{color:var(--k2)}.k3{color:var(--k3)}.k4{color:var(--k4)}.quiet{color:var(--muted)}"
    ".plot{font:12px system-ui,sans-serif;fill:var(--ink);max-width:100%;height:auto;display:block}"
    ".plot .axis{stroke:var(--muted)}.plot .grid{stroke:var(--rule)}.plot .tick{fill:var(--muted)}"
    ".plot .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}"
    ".plot .thin{stroke-width:1;stroke-opacity:.75}.plot .dash{stroke-dasharray:5 4}"
    ".plot .dots{fill:none;stroke:currentColor;stroke-linecap:round}"
    ".plot .area{fill:currentColor;fill-opacity:.22;stroke:currentColor;stroke-width:1.5;stroke-linejoin:round}"
    ".plot .faint{fill-opacity:.1;stroke-width:.75;stroke-opacity:.8}"
    ".plot .halo{paint-order:stroke;stroke:var(--surface);stroke-width:4px}"
    ".plot .outline{fill-opacity:.03;stroke-width:1;stroke-opacity:.7}"
)
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 30, 44  # margins, px
_LETTER = 6.6  # px, about, of the plots' font
_number = count()


@dataclass(frozen=True)
class Axis:
    """One axis: what it says, from where to where, and how it counts (`percent`: the values are shares)."""

    label: str
    low: float
    high: float
    log: bool = False
    percent: bool = False

    @classmethod
    def over(cls, label: str, values: Any, log: bool = False, percent: bool = False) -> Axis:
        """An axis that holds all values with a little room; on a logarithmic one those above zero."""
        found = np.asarray(values, float).reshape(-1)
        found = found[np.isfinite(found) & ((found > 0) | (not log))]
        low, high = (float(found.min()), float(found.max())) if len(found) else (1.0, 2.0)
        if log:
            return cls(label, low / 1.15, high * 1.15, log, percent)
        room = 0.04 * (high - low) or 0.5 * abs(high) or 1.0
        return cls(label, low - room, high + room, log, percent)

    def place(self, values: Any) -> NDArray[np.float64]:
        """Values as shares of the axis; on a logarithmic one, nothing lies below its lower end."""
        v = np.asarray(values, float)
        if not self.log:
            return (v - self.low) / (self.high - self.low)
        v = np.log(np.maximum(v, self.low))
        return np.asarray((v - math.log(self.low)) / (math.log(self.high) - math.log(self.low)))

    def ticks(self) -> list[float]:
        if self.log and self.high > 4.0 * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            few = math.log10(self.high / self.low) < 2.5
            wide = math.log10(self.high / self.low) > 9
            steps = [m * 10.0**d for d in decades if not wide or d % 2 == 0 for m in ((1, 2, 5) if few else (1,))]
        else:
            raw = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(raw))
            step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * 0.999)
            steps = [k * step for k in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [t for t in steps if self.low * (1 - 1e-12) <= t <= self.high * (1 + 1e-12) or t == 0.0 >= self.low]

    def text(self, value: float) -> str:
        return f"{100 * value:.4g}%" if self.percent else number(value)


def number(value: float) -> str:
    """Four digits at most, without an exponent where that reads well."""
    size = abs(value)
    if size == 0 or 1e-3 <= size < 1e4:
        return f"{value:.4g}"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")


def escape(text: object) -> str:
    return html.escape(str(text))


def points(xs: Any, ys: Any) -> str:
    return "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))


class Picture:
    """A frame with a title and a description for screen readers; shapes are added as SVG text."""

    def __init__(self, title: str, about: str, width: int = 680, height: int = 340) -> None:
        self.title, self.about, self.width, self.height = title, about, width, height
        self.shapes: list[str] = []

    def add(self, shape: str) -> None:
        self.shapes.append(shape)

    def text(self, x: float, y: float, text: str, css: str = "", anchor: str = "start", more: str = "") -> None:
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{css}"{more}>{escape(text)}</text>')

    def svg(self, alone: bool = False) -> str:
        """SVG text; `alone` is for a file of its own, which brings its colours along."""
        name, own = f"p{next(_number)}", ""
        if alone:
            own = f'<style>{THEME}{STYLE}</style><rect width="100%" height="100%" fill="var(--surface)"/>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-labelledby="{name}t {name}d">'
            f'<title id="{name}t">{escape(self.title)}</title><desc id="{name}d">{escape(self.about)}</desc>'
            + own
            + "".join(self.shapes)
            + "</svg>"
        )


class Chart(Picture):
    """A plot of two axes; what is drawn beyond them is cut off. Labels of what is drawn make the legend."""

    def __init__(self, title: str, about: str, x: Axis, y: Axis, width: int = 680, height: int = 340) -> None:
        super().__init__(title, about, width, height)
        self.x, self.y = x, y
        self.inner: list[str] = []
        self._legend: list[tuple[str, str, str]] = []

    def _at(self, xs: Any, ys: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self.x.place(xs) * self._size[0], (1.0 - self.y.place(ys)) * self._size[1]

    @property
    def _size(self) -> tuple[int, int]:
        return self.width - _LEFT - _RIGHT, self.height - _TOP - _BOTTOM

    def line(self, xs: Any, ys: Any, css: str, label: str = "") -> None:
        self.inner.append(f'<path class="line {css}" d="M{points(*self._at(xs, ys))}"/>')
        self._named(label, css, "line")

    def area(self, xs: Any, ys: Any, css: str, label: str = "") -> None:
        """The area between a line and the axis below it."""
        across, up = self._at(xs, ys)
        floor = self._size[1]
        path = points([across[0], *across, across[-1]], [floor, *up, floor])
        self.inner.append(f'<path class="area {css}" d="M{path}z"/>')
        self._named(label, css, "area")

    def polygon(self, xs: Any, ys: Any, css: str, title: str = "") -> None:
        words = f"<title>{escape(title)}</title>" if title else ""
        self.inner.append(f'<path class="area {css}" d="M{points(*self._at(xs, ys))}z">{words}</path>')

    def dots(self, xs: Any, ys: Any, css: str, label: str = "", size: float = 4.0, opacity: float = 0.6) -> None:
        """One path for all of them: thousands of dots stay small."""
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(*self._at(xs, ys), strict=True))
        style = f'stroke-width="{size:g}" stroke-opacity="{opacity:g}"'
        self.inner.append(f'<path class="dots {css}" {style} d="{path}"/>')
        self._named(label, css, "dots")

    def upright(self, x: float, text: str, css: str = "quiet", row: int = 0) -> None:
        """A vertical rule with words beside it."""
        at = float(self.x.place(x)) * self._size[0]
        self.inner.append(f'<path class="line thin dash {css}" d="M{at:.1f} 0V{self._size[1]}"/>')
        left = at > 0.7 * self._size[0]
        self.inner.append(
            f'<text x="{at + (-5 if left else 5):.1f}" y="{14 + 15 * row}" text-anchor="{"end" if left else "start"}" '
            f'fill="currentColor" class="{css} halo">{escape(text)}</text>'
        )

    def names(self, items: Sequence[tuple[float, float, str, str]]) -> None:
        """Words beside points, (x, y, text, class) each, moved up or down where they would cover others."""
        across, up = self._at([item[0] for item in items], [item[1] for item in items])
        taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in zip(across, up, strict=True)]
        for x, y, (_, _, text, css) in sorted(zip(across, up, items, strict=True), key=lambda each: each[1]):
            size, left = _LETTER * len(text), x > 0.7 * self._size[0]
            start = x - 12 - size if left else x + 12
            for shift in (0, 16, -16, 32, -32, 48, -48, 64, -64, 80):
                box = (start, y + shift - 8, start + size, y + shift + 6)
                free = all(box[0] > b[2] or box[2] < b[0] or box[1] > b[3] or box[3] < b[1] for b in taken)
                if free and box[1] >= 0 and box[3] <= self._size[1]:
                    break
            taken.append(box)
            end = x - 9 if left else x + 9
            if shift:
                self.inner.append(f'<path class="line thin {css}" d="M{x:.1f} {y:.1f}L{end:.1f} {y + shift:.1f}"/>')
            self.inner.append(
                f'<text x="{x + (-12 if left else 12):.1f}" y="{y + shift + 4:.1f}" fill="currentColor" '
                f'text-anchor="{"end" if left else "start"}" class="{css} halo">{escape(text)}</text>'
            )

    def _named(self, label: str, css: str, shape: str) -> None:
        if label:
            self._legend.append((label, css, shape))

    def svg(self, alone: bool = False) -> str:
        wide, high = self._size
        back: list[str] = []
        shapes, self.shapes = self.shapes, back
        for value in self.y.ticks():
            up = _TOP + (1.0 - float(self.y.place(value))) * high
            self.add(f'<path class="grid" d="M{_LEFT} {up:.1f}h{wide}"/>')
            self.text(_LEFT - 7, up + 4, self.y.text(value), "tick", "end")
        for value in self.x.ticks():
            across = _LEFT + float(self.x.place(value)) * wide
            self.add(f'<path class="axis" d="M{across:.1f} {_TOP + high}v5"/>')
            self.text(across, _TOP + high + 18, self.x.text(value), "tick", "middle")
        self.add(f'<path class="axis" d="M{_LEFT} {_TOP + high}h{wide}"/>')
        self.text(_LEFT + wide / 2, self.height - 6, self.x.label, "", "middle")
        middle = _TOP + high / 2
        self.text(14, middle, self.y.label, "", "middle", f' transform="rotate(-90 14 {middle:.1f})"')
        at = float(_LEFT)
        for label, css, shape in self._legend:
            mark = {
                "line": f'<path class="line {css}" d="M{at:.0f} 14h18"/>',
                "area": f'<rect class="area {css}" x="{at:.0f}" y="9" width="16" height="10"/>',
                "dots": f'<path class="dots {css}" stroke-width="7" d="M{at + 9:.0f} 14h0"/>',
            }[shape]
            self.add(mark)
            self.text(at + 24, 18, label)
            at += 24 + _LETTER * len(label) + 18
        self.add(f'<svg x="{_LEFT}" y="{_TOP}" width="{wide}" height="{high}">{"".join(self.inner)}</svg>')
        self.shapes = [*back, *shapes]
        text = super().svg(alone)
        self.shapes = shapes
        return text


class Cell(NamedTuple):
    """One cell of an icicle: its row, where it starts and how wide it is (shares of the root), how far it is filled
    (0 to 1, NaN: unknown), a label that is cut to the cell, and a title with all the words."""

    level: int
    left: float
    share: float
    label: str
    title: str
    fill: float


def icicle(title: str, about: str, cells: Sequence[Cell], width: int = 1000, row: int = 24) -> Picture:
    """A tree as rows of cells, the root on top, every cell as wide as its share."""
    picture = Picture(title, about, width, row * (1 + max((cell.level for cell in cells), default=0)))
    for cell in cells:
        x, y, wide = cell.left * width, cell.level * row, cell.share * width
        base = '"quiet" fill-opacity=".2"' if math.isnan(cell.fill) else '"k1" fill-opacity=".35"'
        picture.add(
            f'<g><title>{escape(cell.title)}</title><rect class={base} x="{x:.1f}" y="{y}" width="{wide:.1f}" '
            f'height="{row}" fill="currentColor" stroke="var(--surface)"/>'
        )
        if cell.fill > 0:
            high = (row - 1) * cell.fill
            picture.add(
                f'<rect class="k2" x="{x + 0.5:.1f}" y="{y + row - 0.5 - high:.1f}" width="{max(0.0, wide - 1):.1f}" '
                f'height="{high:.1f}" fill="currentColor" fill-opacity=".75"/>'
            )
        room = int((wide - 8) / _LETTER)
        if room >= 4:
            text = cell.label if len(cell.label) <= room else cell.label[: room - 1] + "\u2026"
            picture.text(x + 5, y + row / 2 + 4, text)
        picture.add("</g>")
    return picture


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str) -> str:
    """An HTML table; every column whose cells are numbers is set to the right."""
    body = [[str(cell) for cell in row] for row in rows]
    numeric = [all(c == "-" or c.lstrip("-+ ")[:1].isdigit() for c in column) for column in zip(*body, strict=True)]
    css = [' class="n"' if right else "" for right in numeric or [False] * len(head)]
    return (
        f"<table><caption>{escape(caption)}</caption><thead><tr>"
        + "".join(f'<th scope="col"{c}>{escape(cell)}</th>' for cell, c in zip(head, css, strict=True))
        + "</tr></thead><tbody>"
        + "".join(
            "<tr>" + "".join(f"<td{c}>{escape(cell)}</td>" for cell, c in zip(row, css, strict=True)) + "</tr>"
            for row in body
        )
        + "</tbody></table>"
    )
