"""The report's charts, each from one stage's record. A chart is None where its record has nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fanin.reporting.plots import Axis, Chart, Series, column_chart, compact, line_chart, thin

Table = Mapping[str, Sequence[float | None]]  # a CSV's columns; None: an empty cell

MOST_POINTS = 400  # a line in 360 px shows no more
MOST_DOTS = 1600
STEP = Axis(label="step", floor=0)
FREQUENCY = Axis(label="training documents", log=True)


def per_cent(value: float) -> str:
    """A share of 0..1 as per cent."""
    return f"{100 * value:.3g}%"


def one_decimal(value: float) -> str:
    """A figure that already is in per cent."""
    return f"{value:.1f}" if value != round(value) else f"{value:.0f}"


def training(curve: Table, rates: Mapping[str, float]) -> list[Chart | None]:
    """Loss, speed, learning rates and lambda by step; curve: train_curve.csv; rates: the peak of each column `<name>_lr`."""
    steps = _thin_steps(curve)
    if not steps:
        return []
    charts = [_loss("Loss", steps, _column(curve, "loss"), 1)]
    if any(weights := _column(curve, "lambda")):
        meta = [value if weight else None for value, weight in zip(_column(curve, "meta_loss"), weights, strict=True)]
        charts.append(_loss("Loss on meta-labels", steps, meta, 4))
        series = [Series(name="λ", x=steps, y=weights, colour=4)]
        charts.append(line_chart("Weight λ of the auxiliary objective", series, STEP, Axis(label="", floor=0)))
    charts.append(_rates(steps, curve, rates))
    fast = [value or None for value in _column(curve, "documents_per_second")]  # 0: no time had passed yet
    speed = [Series(name="since the start", x=steps, y=fast, colour=3)]
    charts.append(line_chart("Training speed", speed, STEP, Axis(label="documents/s", floor=0)))
    return charts


def validation(curve: Table, zero_shot: Mapping[str, float] | None) -> Chart | None:
    """P@1, 3, 5 on the validation documents by step; `zero_shot` (the start from data) stands at step 0."""
    steps = [step for step in curve.get("step", []) if step is not None]
    series = []
    before = dict(zero_shot) if zero_shot and 0 not in steps else {}
    for colour, name in enumerate(("P@1", "P@3", "P@5"), 1):
        x, y = list(steps), list(curve.get(name, []))
        if before.get(name) is not None:
            x, y = [0.0, *x], [before[name], *y]
        if y:
            series.append(Series(name=name, x=x, y=y, colour=colour, marks=True))
    note = "Step 0: the head as the start from data leaves it, before any training." if before else ""
    axis = Axis(label="per cent", floor=0, format=one_decimal)
    return line_chart("Precision on validation documents", series, STEP, axis, note)


def _loss(title: str, steps: list[float], values: list[float | None], colour: int) -> Chart | None:
    axis, window = Axis(label="per document"), len(values) // 25
    if window < 2:
        return line_chart(title, [Series(name="loss", x=steps, y=values, colour=colour)], STEP, axis)
    series = [
        Series(name="logged", x=steps, y=values, colour=colour, faint=True),
        Series(name="running mean", x=steps, y=_running_mean(values, window), colour=colour),
    ]
    return line_chart(title, series, STEP, axis, "Thin: as logged; bold: running mean.")


def _rates(steps: list[float], curve: Table, rates: Mapping[str, float]) -> Chart | None:
    """Each rate as a share of its peak: they differ by orders of magnitude, their schedules hardly."""
    series = []
    for colour, (name, peak) in enumerate(rates.items(), 1):
        values = [None if value is None else value / peak for value in _column(curve, f"{name}_lr")] if peak else []
        if any(values):
            series.append(Series(name=name, x=steps, y=values, colour=colour, dash=colour > 1))
    if len(series) > 1 and all(_alike(one.y, series[0].y) for one in series):
        series = [Series(name="all", x=steps, y=series[0].y, colour=1)]
    note = "Peaks: " + ", ".join(f"{name} {compact(peak)}" for name, peak in rates.items()) + "."
    return line_chart("Learning rates", series, STEP, Axis(label="share of the peak", floor=0, format=per_cent), note)


def _alike(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a is b is None or (a is not None and b is not None and abs(a - b) < 1e-3) for a, b in pairs)


def label_frequency(frequency: np.ndarray) -> Chart | None:
    """Training documents a label, labels sorted from frequent to rare; frequency: [L] counts."""
    ordered = np.sort(frequency[frequency > 0])[::-1]
    if not len(ordered):
        return None
    ranks = np.unique(np.geomspace(1, len(ordered), 160).astype(np.int64))
    series = [Series(name="documents", x=ranks.astype(float).tolist(), y=ordered[ranks - 1].astype(float).tolist(), colour=1)]
    return line_chart("How often a label occurs", series, Axis(label="label, by frequency", log=True), FREQUENCY)


def fan_in_use(end: Sequence[int], start: Sequence[int] | None) -> list[Chart | None]:
    """How many index entries read each feature: sorted, with how that moved since the start, or a histogram
    where nothing did; end, start: [D'] counts."""
    now = np.asarray(end, dtype=np.int64)
    before = np.asarray(start, dtype=np.int64) if start is not None and len(start) == len(now) else now
    moved = bool((before != now).any())
    # a few features that most labels read would leave all others on the floor of a linear axis
    log = bool(max(now.max(), before.max()) > 10 * max(1, np.median(now)))
    unread = "Features that no label reads are not drawn." if log and not (now.all() and before.all()) else ""
    reads = Axis(label="labels", floor=None if log else 0, log=log)
    sorted_lines = [_sorted("at the end", now, 1)]
    if moved:
        sorted_lines.append(_sorted("at the start", before, 2, dash=True))
    even = float(now.mean())
    sorted_lines.append(Series(name="if spread evenly", x=[1.0, float(len(now))], y=[even, even], colour=6, dash=True))
    rank = Axis(label="feature, from most to least read")
    charts = [line_chart("Labels that read each feature", sorted_lines, rank, reads, unread)]
    charts.append(_moves(before, now, log, unread) if moved else _histogram(now))
    return charts


def _moves(before: np.ndarray, now: np.ndarray, log: bool, note: str) -> Chart | None:
    """A point a feature: labels that read it at the start, and at the end."""
    chosen = np.unique(np.linspace(0, len(now) - 1, min(len(now), MOST_DOTS)).round().astype(np.int64))
    x, y = before[chosen].astype(float).tolist(), now[chosen].astype(float).tolist()
    low, high = max(1.0 if log else 0.0, min(x)), max(x)
    axis = Axis(label="labels at the start", floor=None if log else 0, log=log)
    series = [
        Series(name="a feature", x=x, y=y, colour=1, dots=True),
        Series(name="unchanged", x=[low, high], y=[low, high], colour=6, dash=True),
    ]
    title = "Labels of a feature, before and after rewiring"
    return line_chart(title, series, axis, Axis(label="labels at the end", floor=axis.floor, log=log), note)


def rewiring(table: Table) -> Chart | None:
    """Share of the index entries that each rewiring exchanged."""
    steps = [step for step in table.get("step", []) if step is not None]
    share = list(table.get("share", []))
    series = [Series(name="exchanged", x=steps, y=share, colour=4, marks=len(steps) <= 40)]
    axis = Axis(label="share of index entries", floor=0, format=per_cent)
    return line_chart("Exchanged at each rewiring", series, STEP, axis) if len(steps) == len(share) else None


def memory_scale(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Chart | None:
    """Predicted peak against the number of labels; rows: `labels`, `head`, `predicted_mib` and perhaps
    `measured_peak_mib`; names: head -> its name."""
    series = []
    for colour, head in enumerate(dict.fromkeys(row["head"] for row in rows), 1):
        points = sorted((float(row["labels"]), float(row["predicted_mib"])) for row in rows if row["head"] == head)
        x, y = [point[0] for point in points], [point[1] / 1024 for point in points]
        dash = head == "dense"
        series.append(Series(name=names.get(head, head), x=x, y=y, colour=colour, marks=True, dash=dash))
    measured = [
        f"{names.get(row['head'], row['head'])} {row['measured_peak_mib'] / 1024:.3g} GiB at {compact(row['labels'])}"
        for row in rows
        if row.get("measured_peak_mib")
    ]
    note = f"Measured: {', '.join(measured)}." if measured else ""
    labels = Axis(label="labels", log=True, ticks=sorted({float(row["labels"]) for row in rows}))
    return line_chart("Predicted peak by number of labels", series, labels, Axis(label="GiB", log=True), note)


def by_frequency(
    title: str,
    categories: Sequence[tuple[str, str]],
    values: Mapping[str, Sequence[float | None]],
    intervals: Mapping[str, Sequence[tuple[float, float] | None]],
    x_label: str,
) -> Chart | None:
    """Columns of one or more metrics (per cent) over groups of labels."""
    series = [
        Series(name=name, x=range(len(categories)), y=y, colour=colour, intervals=intervals.get(name))
        for colour, (name, y) in enumerate(values.items(), 1)
    ]
    axis = Axis(label="per cent", floor=0, format=one_decimal)
    return column_chart(title, categories, series, x_label, axis)


def _sorted(name: str, counts: np.ndarray, colour: int, dash: bool = False) -> Series:
    ordered = np.sort(counts)[::-1]
    ranks = np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), MOST_POINTS)).round().astype(np.int64))
    y = ordered[ranks].astype(float).tolist()
    return Series(name=name, x=(ranks + 1).astype(float).tolist(), y=y, colour=colour, dash=dash)


def _histogram(counts: np.ndarray) -> Chart | None:
    top = int(counts.max()) + 1
    bins = min(12, top)
    width = math.ceil(top / bins)
    edges = np.arange(0, width * bins + 1, width)
    heights = np.histogram(counts, edges)[0].astype(float).tolist()
    series = [Series(name="features", x=range(bins), y=heights, colour=1)]
    categories = [(compact(float(edge)), "") for edge in edges[:-1]]
    label = f"labels that read it, from (steps of {width:,})"
    return column_chart("Features by how many labels read them", categories, series, label, Axis(label="features", floor=0))


def _thin_steps(curve: Table) -> list[float]:
    return [step for step in thin(list(curve.get("step", [])), MOST_POINTS) if step is not None]


def _column(curve: Table, name: str) -> list[float | None]:
    values = list(curve.get(name, [])) or [None] * len(curve.get("step", []))
    return thin(values, MOST_POINTS)


def _running_mean(values: Sequence[float | None], window: int) -> list[float | None]:
    """The mean of about `window` values around each one (fewer at the ends); None stays None."""
    means: list[float | None] = []
    for position, value in enumerate(values):
        near = [v for v in values[max(0, position - window // 2) : position + window // 2 + 1] if v is not None]
        means.append(None if value is None else sum(near) / len(near))
    return means
