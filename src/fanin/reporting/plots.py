"""Line and column charts as inline SVG.

Colours are the page's CSS variables (`--c1` to `--c6`), so that one drawing serves light and dark; sizes suit a column of
about 360 px, so that text stays readable on a phone. Every text is escaped here.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 236
TOP, RIGHT, BOTTOM = 18, 14, 38
CHARACTER = 6.8  # px of a digit at the axis' font size


def compact(value: float) -> str:
    """1500 -> '1,500', 0.00025 -> '2.5e-4', 2_812_281 -> '2.8M': short enough for an axis."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g}M" if size < 1e9 else f"{value / 1e9:.3g}B"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`floor`: the axis reaches down to it (0 for shares). `format` writes a tick's value."""

    label: str
    log: bool = False
    floor: float | None = None
    ticks: Sequence[float] | None = None  # instead of round numbers
    format: Callable[[float], str] = compact


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line (or one colour of columns): `y` aligned with `x`, None where nothing was measured."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    faint: bool = False  # raw values behind a smoothed line: thin, and left out of legend and read-out
    dash: bool = False
    marks: bool = False
    dots: bool = False  # points without a line, left out of the read-out
    intervals: Sequence[tuple[float, float] | None] | None = None  # of columns


@dataclass(frozen=True, kw_only=True)
class Chart:
    """What the template shows as one figure; `legend` holds (name, colour, line | dash | block)."""

    title: str
    svg: Markup
    legend: list[tuple[str, int, str]]
    note: str = ""
    unit: str = ""


@dataclass
class Scale:
    """Maps `low`..`high` of the data to `start`..`stop` in px."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False
    ticks: list[float] = field(default_factory=list)

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(value)
        return self.start + (at - low) / ((high - low) or 1.0) * (self.stop - self.start)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 x 10^n that cover low..high from outside."""
    if not high > low:
        low, high = (low - abs(low) * 0.5, high + abs(high) * 0.5) if high else (0.0, 1.0)
    raw = (high - low) / max(1, about - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * n, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within low..high, with 2 and 5 between them where the range is short."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if math.log10(high / low) < 2 else (1,)
    stride = max(1, (last - first) // 5) if factors == (1,) else 1
    ticks = [factor * 10.0**power for power in range(first, last + 1, stride) for factor in factors]
    return [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]


def thin(values: Sequence[float | None], most: int) -> list[float | None]:
    """At most `most` values: the means of equal runs, so that a long curve keeps its level and the page stays small."""
    if len(values) <= most:
        return list(values)
    bounds = [round(i * len(values) / most) for i in range(most + 1)]
    runs = ([v for v in values[a:b] if v is not None] for a, b in itertools.pairwise(bounds))
    return [sum(run) / len(run) if run else None for run in runs]


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, note: str = "") -> Chart | None:
    """A chart of lines over a shared x axis; None where no series has a value that the axes can show."""
    shown = [_plottable(one, x.log, y.log) for one in series]
    points = [point for line in shown for run in line for point in run]
    if not points:
        return None
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    left, y_scale = _value_axis(ys, y)
    first = min(xs) if x.floor is None else min(*xs, x.floor)
    x_scale = Scale(first, max(xs), left, WIDTH - RIGHT, x.log)
    if x_scale.low == x_scale.high:  # one point: in the middle
        pad = abs(x_scale.low) * 0.5 or 1.0
        x_scale.low, x_scale.high = x_scale.low - pad, x_scale.high + pad
    ticks = x.ticks or (log_ticks if x.log else linear_ticks)(x_scale.low, x_scale.high)
    x_scale.ticks = [tick for tick in ticks if x_scale.low <= tick * 1.0001 and tick <= x_scale.high * 1.0001]
    parts = [_grid(left, y_scale, y)]
    base = HEIGHT - BOTTOM
    for tick in x_scale.ticks:
        at = x_scale(tick)
        parts.append(f'<path class="tick" d="M{at:.1f} {base}v4"/>')
        anchor, at = ("end", WIDTH - 2.0) if at > WIDTH - 20 and x.ticks else ("middle", at)
        parts.append(f'<text x="{at:.1f}" y="{base + 16}" text-anchor="{anchor}">{escape(x.format(tick))}</text>')
    parts.append(_x_label(left, x.label))
    for one, line in zip(series, shown, strict=True):
        if one.dots:
            spots = "".join(f"M{x_scale(a):.1f} {y_scale(b):.1f}h0" for run in line for a, b in run)
            parts.append(f'<path class="dots c{one.colour}" d="{spots}"/>')
            continue
        kind = "faint" if one.faint else "dash" if one.dash else "line"
        for run in line:
            path = "L".join(f"{x_scale(a):.1f} {y_scale(b):.1f}" for a, b in run)
            parts.append(f'<path class="{kind} c{one.colour}" d="M{path}"/>')
            if one.marks or len(run) == 1:
                dots = (f'<circle class="c{one.colour}" cx="{x_scale(a):.1f}" cy="{y_scale(b):.1f}" r="2.6"/>' for a, b in run)
                parts.extend(dots)
    solid = [one for one in series if not one.faint]
    legend = [(one.name, one.colour, "block" if one.dots else "dash" if one.dash else "line") for one in solid]
    lines = [] if any(one.dots for one in series) else solid
    svg = _svg(title, parts, _read_out(lines, x, y, x_scale) if lines else "")
    return Chart(title=title, svg=svg, legend=legend if len(legend) > 1 else [], note=note, unit=y.label)


def column_chart(
    title: str, categories: Sequence[tuple[str, str]], series: Sequence[Series], x_label: str, y: Axis, note: str = ""
) -> Chart | None:
    """Columns, one a category and series, with whiskers where `Series.intervals` has them.

    categories: (name, second line) a category, in the order of each series' `y`. None where nothing can be shown.
    """
    ends = [end for one in series for pair in one.intervals or [] if pair for end in pair]
    values = [value for one in series for value in one.y if value is not None]
    if not values:
        return None
    left, scale = _value_axis([*values, *ends], y)
    slot = (WIDTH - RIGHT - left) / len(categories)
    column = min(44.0, slot * 0.8 / len(series))
    named = len(series) == 1 and slot >= 40  # room for the value above the column
    base = HEIGHT - BOTTOM
    crowded = slot < CHARACTER * max(len(name) for name, _ in categories) + 2
    parts = [_grid(left, scale, y)]
    for position, (name, second) in enumerate(categories):
        middle = left + slot * (position + 0.5)
        if not crowded or position % 2 == 0:
            parts.append(f'<text x="{middle:.1f}" y="{base + 14}" text-anchor="middle">{escape(name)}</text>')
        if second and not crowded:
            parts.append(f'<text class="soft" x="{middle:.1f}" y="{base + 27}" text-anchor="middle">{escape(second)}</text>')
        for order, one in enumerate(series):
            value = one.y[position]
            if value is None:
                continue
            at = middle + (order - len(series) / 2) * column
            top = scale(value)
            tip = escape(f"{name} {second}, {one.name}: {y.format(value)}")
            parts.append(
                f'<rect class="c{one.colour}" x="{at + 1:.1f}" y="{top:.1f}" width="{column - 2:.1f}" '
                f'height="{max(0.0, base - top):.1f}"><title>{tip}</title></rect>'
            )
            pair = one.intervals[position] if one.intervals else None
            if pair:
                low, high = scale(pair[0]), scale(pair[1])
                parts.append(f'<path class="whisker" d="M{at + column / 2:.1f} {low:.1f}V{high:.1f}"/>')
                top = high
            if named:
                text = escape(y.format(value))
                parts.append(f'<text x="{at + column / 2:.1f}" y="{top - 5:.1f}" text-anchor="middle">{text}</text>')
    if not any(second for _, second in categories) or crowded:
        parts.append(_x_label(left, x_label))
    legend = [(one.name, one.colour, "block") for one in series] if len(series) > 1 else []
    return Chart(title=title, svg=_svg(title, parts, ""), legend=legend, note=note, unit=y.label)


def _plottable(one: Series, x_log: bool, y_log: bool) -> list[list[tuple[float, float]]]:
    """The series as unbroken runs of points; a value that is missing, not finite or not positive on a log axis breaks it."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in zip(one.x, one.y, strict=True):
        if b is None or not (math.isfinite(a) and math.isfinite(b)) or (x_log and a <= 0) or (y_log and b <= 0):
            runs.append([])
        else:
            runs[-1].append((a, b))
    return [run for run in runs if run]


def _value_axis(values: Sequence[float], axis: Axis) -> tuple[float, Scale]:
    """The left margin that the tick labels need, and the scale of the y axis."""
    low, high = min(values), max(values)
    if axis.log:
        low, high = _round_down(low), 1 / _round_down(1 / high)
        ticks = log_ticks(low, high if high > low else low * 10)
    else:
        ticks = linear_ticks(low if axis.floor is None else min(low, axis.floor), high)
    left = 12 + CHARACTER * max(len(axis.format(tick)) for tick in ticks)
    bounds = (low, max(high, ticks[-1])) if axis.log else (ticks[0], ticks[-1])
    return left, Scale(*bounds, HEIGHT - BOTTOM, TOP, axis.log, ticks)


def _round_down(value: float) -> float:
    """The next 1, 2 or 5 x 10^n at or below the value."""
    power = 10.0 ** math.floor(math.log10(value) + 1e-9)
    return power * max(factor for factor in (1, 2, 5) if power * factor <= value * (1 + 1e-9))


def _grid(left: float, scale: Scale, axis: Axis) -> str:
    lines = []
    for tick in scale.ticks:
        at = scale(tick)
        lines.append(f'<path class="grid" d="M{left:.1f} {at:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text x="{left - 6:.1f}" y="{at + 4:.1f}" text-anchor="end">{escape(axis.format(tick))}</text>')
    return "".join(lines)


def _x_label(left: float, label: str) -> str:
    return (
        f'<text class="soft" x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>'
    )


def _read_out(series: Sequence[Series], x: Axis, y: Axis, scale: Scale) -> str:
    """What the page's script shows under the pointer: the x positions in px, their titles, and each series' values."""
    rows: dict[float, list[str]] = {}
    for position, one in enumerate(series):
        for a, b in zip(one.x, one.y, strict=True):
            if b is not None and math.isfinite(b) and scale.low <= a <= scale.high:
                rows.setdefault(a, [""] * len(series))[position] = y.format(b)
    at = sorted(rows)
    data = {
        "x": [round(scale(a), 1) for a in at],
        "t": [f"{x.label} {x.format(a) if x.log else f'{a:,.6g}'}" for a in at],
        "s": [[one.name, one.colour] for one in series],
        "v": [rows[a] for a in at],
    }
    return json.dumps(data, separators=(",", ":"))


def _svg(title: str, parts: Sequence[str], read_out: str) -> Markup:
    data = f' data-read="{escape(read_out)}"' if read_out else ""
    body = "".join(parts)
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"{data}>{body}</svg>'
    )
