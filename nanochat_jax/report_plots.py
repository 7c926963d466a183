"""Line charts as SVG text: small, crisp at any size, and in the reader's colours, light or dark.

Written out by hand instead of by a plotting library: a chart here is a few polylines on a frame,
and only so can one and the same picture follow the page's colours, print well and be the same bytes
every time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 256
LEFT, RIGHT, TOP, BOTTOM = 48, 388, 54, 220  # edges of the frame in it
MAX_POINTS = 400  # of a line; more are thinned to the lowest and highest of each bucket
CLIPPED_FRAC = 0.03  # of the points, at the start, that the vertical axis need not hold
MAX_MARKERS = 40  # lines with more points than this have no dots on them

CHART_CSS = """
.chart text { font: 12px system-ui, sans-serif; fill: var(--muted, #5b6472); }
.chart .title { font-weight: 600; font-size: 13.5px; fill: var(--text, #1c2430); }
.chart .grid { stroke: var(--line, #dfe3ea); }
.chart polyline { fill: none; stroke-linejoin: round; }
.chart .raw { stroke: var(--raw, #b9c9e6); stroke-width: 1; }
.chart .main { stroke: var(--main, #2456c7); stroke-width: 2; }
.chart .half { stroke: var(--main, #2456c7); stroke-width: 2; stroke-opacity: .62; }
.chart .pale { stroke: var(--main, #2456c7); stroke-width: 2; stroke-opacity: .35; }
.chart .thin { stroke: var(--main, #2456c7); stroke-width: 1; }
.chart .ref { stroke: var(--ref, #b4590a); stroke-width: 1.5; stroke-dasharray: 5 4; }
.chart circle { fill: var(--main, #2456c7); stroke: none; }
.chart circle.half { fill-opacity: .62; }
.chart circle.pale { fill-opacity: .35; }
"""
# For a file of its own, which no page lends its colours.
STANDALONE_CSS = """
@media (prefers-color-scheme: dark) { .chart { --muted: #9aa6b8; --text: #e6eaf2; --line: #2b3442;
  --raw: #40557d; --main: #82a8ff; --ref: #f0a45c; } }
"""


@dataclass(frozen=True)
class Line:
    label: str
    points: Sequence[tuple[float, float]]  # (step, value), by step; not finite ones are left out
    style: str = "main"  # main | half | pale (of one family) | raw (in the background) | thin


@dataclass(frozen=True)
class Chart:
    name: str  # of its file, without the ending
    title: str
    lines: Sequence[Line]
    reference: tuple[str, float] | None = None  # a dashed level to compare with
    from_zero: bool = False  # the vertical axis starts at 0, or below
    clip_start: bool = False  # let the first points, often far off, leave the frame

    def svg(self, standalone: bool = False) -> str:
        """The chart as an <svg> element; standalone: as a file, with its own colours."""
        lines = [(line, _thin(_finite(line.points))) for line in self.lines]
        x_high = max((x for _, points in lines for x, _ in points), default=1) or 1
        y_low, y_high = self._value_range([points for _, points in lines])

        def x_at(x: float) -> str:
            return f"{LEFT + (RIGHT - LEFT) * x / x_high:.1f}"

        def y_at(y: float) -> str:
            return f"{BOTTOM - (BOTTOM - TOP) * (y - y_low) / (y_high - y_low):.1f}"

        out = [_label(LEFT, 18, self.title, "start", "title")]
        out += _legend([(line.label, line.style) for line in self.lines], self.reference)
        for y, label in _ticks(y_low, y_high, 5):
            out.append(f'<path class="grid" d="M{LEFT} {y_at(y)}H{RIGHT}"/>')
            out.append(_label(LEFT - 7, float(y_at(y)) + 4, label, "end"))
        out += [_label(x_at(x), BOTTOM + 17, label, "middle") for x, label in _ticks(0, x_high, 5)]
        out.append(_label(RIGHT, HEIGHT - 4, "step", "end"))
        clip = f"clip-{escape(self.name)}"
        frame = f'x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"'
        out.append(f'<clipPath id="{clip}"><rect {frame}/></clipPath><g clip-path="url(#{clip})">')
        if self.reference:
            out.append(f'<path class="ref" d="M{LEFT} {y_at(self.reference[1])}H{RIGHT}"/>')
        dots = []
        for line, points in lines:
            path = " ".join(f"{x_at(x)},{y_at(y)}" for x, y in points)
            out.append(f'<polyline class="{line.style}" points="{path}"/>')
            if line.style in ("main", "half", "pale") and len(points) <= MAX_MARKERS:
                dots += [
                    f'<circle class="{line.style}" cx="{x_at(x)}" cy="{y_at(y)}" r="3">'
                    f"<title>step {x:,.0f}: {y:.4g}</title></circle>"
                    for x, y in points
                    if y_low <= y <= y_high
                ]
        style = f"<style>{CHART_CSS}{STANDALONE_CSS}</style>" if standalone else ""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" aria-label="{escape(self.title)}">{style}{"".join(out)}</g>'
            f"{''.join(dots)}</svg>"
        )

    def _value_range(self, lines: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
        """Bottom and top of the vertical axis: all values that count, some air, the reference."""
        values = [0.0] if self.from_zero or not any(lines) else []
        for points in lines:
            clipped = math.ceil(CLIPPED_FRAC * len(points))
            is_clipped = self.clip_start and len(points) >= 6
            values += [y for _, y in points[clipped if is_clipped else 0 :]]
        low, high = min(values), max(values)
        if self.reference:
            low, high = min(low, self.reference[1]), max(high, self.reference[1])
        air = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
        return low if self.from_zero else low - air, high + air


def _label(x: float | str, y: float, text: str, anchor: str, css: str = "label") -> str:
    return f'<text class="{css}" x="{x}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _legend(lines: list[tuple[str, str]], reference: tuple[str, float] | None) -> list[str]:
    """A row of short strokes and names under the title."""
    entries = lines + ([(f"{reference[0]} {reference[1]:.3f}", "ref")] if reference else [])
    out, x = [], float(LEFT)
    for label, style in entries if len(entries) > 1 else []:
        out.append(f'<polyline class="{style}" points="{x:.0f},36 {x + 20:.0f},36"/>')
        out.append(_label(x + 26, 40, label, "start"))
        x += 26 + 6.6 * len(label) + 18
    return out


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(y)]


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """At most MAX_POINTS that keep a noisy line's band: lowest and highest of each bucket."""
    if len(points) <= MAX_POINTS:
        return points
    kept = {0, len(points) - 1}
    buckets = MAX_POINTS // 2 - 1
    for bucket in range(buckets):
        span = range(bucket * len(points) // buckets, (bucket + 1) * len(points) // buckets)
        kept |= {min(span, key=lambda i: points[i][1]), max(span, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def _ticks(low: float, high: float, wanted: int) -> list[tuple[float, str]]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, with labels."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, _tick_label(i * step, step)) for i in range(first, last + 1)]


def _tick_label(value: float, step: float) -> str:
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.6g}{suffix}"
    decimals = max(0, -math.floor(math.log10(step)))
    return f"{value:.{decimals}f}"
