"""The study's plots, from records alone: a PNG each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

from fanin.evaluation import SPLITS
from fanin.files import atomic_path
from study.methods import Method
from study.tables import Row, recovery, rows

STYLES = {"trained": ("o", "#2b6cb0"), "compressed": ("D", "#b07aa1"), "rival": ("s", "#8a8a8a")}
DENSE = ("^", "#d9622b")
_LINES = 8  # curves of a convergence plot
_HEIGHTS = (-10, 4, -19, 13, -28, 22, -37, 31)  # of a name beside its mark, in points, the first that is free


def draw_all(records: Sequence[Mapping[str, Any]], methods: Mapping[str, Method], title: str, folder: Path) -> list[Path]:
    """Draw every plot that the records have something for; returns the files."""
    found = rows(records, methods)
    plots: dict[str, Callable[[], plt.Figure | None]] = {
        "bytes": lambda: _scatter(found, methods, title, "total_mib", "MiB, head and shared layers"),
        "model": lambda: _scatter(found, methods, title, "model_mib", "MiB, the whole model's file, encoder too"),
        "time": lambda: _scatter(found, methods, title, "prepared_seconds", "training, seconds (the start from data counted)"),
        "frequency": lambda: _by_frequency(found, title),
        "recovery": lambda: _recovery(found, methods, title),
        "convergence": lambda: _convergence(records, found, title),
    }
    written = []
    for name, draw in plots.items():
        figure = draw() if found else None
        if figure is not None:
            path = folder / f"{name}.png"
            with atomic_path(path) as temporary:
                figure.savefig(temporary, dpi=110, format="png", bbox_inches="tight")
            plt.close(figure)
            written.append(path)
    return written


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, quality) points that no other beats in both, from cheap to dear."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def _scatter(found: Sequence[Row], methods: Mapping[str, Method], title: str, cost: str, label: str) -> plt.Figure | None:
    """P@1 and PSP@5 against a cost, with the front of what nothing beats in both."""
    if all(row.mean(cost) is None for row in found):
        return None
    figure, axes = plt.subplots(1, 2, figsize=(12, 5))
    for axis, quality in zip(axes, ("P@1", "PSP@5"), strict=True):
        shown = [(row, x, y) for row in found if (x := row.mean(cost)) is not None and (y := row.mean(quality)) is not None]
        points = [(x, y) for _, x, y in shown]
        front = pareto(points)
        axis.step([points[i][0] for i in front], [points[i][1] for i in front], where="post", color="#cccccc", zorder=0)
        for row, x, y in shown:
            marker, colour = _style(row, methods)
            axis.errorbar(x, y, yerr=row.spread(quality), fmt=marker, color=colour, capsize=2, markersize=6)
        axis.set(xscale="log", xlabel=label, ylabel=f"{quality}, %", title=f"{title}: {quality}")
        for ticks in (axis.xaxis.set_major_formatter, axis.xaxis.set_minor_formatter):
            ticks(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(axis="x", which="both", labelsize=7)
        _name(axis, [(row.name, x, y, _style(row, methods)[1]) for row, x, y in sorted(shown, key=lambda point: point[1])])
        axis.grid(alpha=0.3)
    return figure


def _name(axis: plt.Axes, points: Sequence[tuple[str, float, float, str]]) -> None:
    """Write each (name, x, y, colour) beside its mark, above or below it where another name is in the way."""
    if not points:
        return
    middle, taken = math.sqrt(min(x for _, x, _, _ in points) * max(x for _, x, _, _ in points)), list[Bbox]()
    for name, x, y, colour in points:
        left = x > middle  # of its mark, so that it stays inside
        for height in _HEIGHTS:
            offset = (-5 if left else 5, height)
            how: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "ha": "right" if left else "left"}
            text = axis.annotate(name, (x, y), xytext=offset, color=colour, **how)
            box = text.get_window_extent()
            if height == _HEIGHTS[-1] or not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        taken.append(box)


def _by_frequency(found: Sequence[Row], title: str) -> plt.Figure:
    """The part of P@5 and PSP@5 that each third of the labels brings, stacked to the whole."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.2 + 0.28 * len(found)), sharey=True)
    names = [row.name for row in found]
    for axis, quality in zip(axes, ("P@5", "PSP@5"), strict=True):
        left = [0.0] * len(found)
        for split, colour in zip(SPLITS, ("#2b6cb0", "#7fb0dd", "#d9622b"), strict=True):
            values = [statistics.fmean(row.splits[split][quality]) for row in found]
            axis.barh(names, values, left=left, color=colour, label=split)
            left = [a + b for a, b in zip(left, values, strict=True)]
        axis.set(title=f"{title}: {quality} by label frequency", xlabel="%")
    axes[0].invert_yaxis()
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def _recovery(found: Sequence[Row], methods: Mapping[str, Method], title: str) -> plt.Figure | None:
    """How much of the hole between plain sparse and the best dense each method closes."""
    shares = {row.name: recovery(row, found, methods, "P@1") for row in found if row.kind != "rival"}
    known = {name: share for name, share in shares.items() if share is not None}
    if not known:
        return None
    figure, axis = plt.subplots(figsize=(8, 1 + 0.28 * len(known)))
    colours = [DENSE[1] if name in methods and methods[name].role == "dense" else STYLES["trained"][1] for name in known]
    axis.barh(list(known), list(known.values()), color=colours)
    axis.axvline(100, color="#888888", linewidth=0.8)
    axis.invert_yaxis()
    axis.set(title=f"{title}: share of the dense-to-sparse hole in P@1 that is closed", xlabel="%")
    return figure


def _convergence(records: Sequence[Mapping[str, Any]], found: Sequence[Row], title: str) -> plt.Figure | None:
    """P@1 on validation documents by training step, the first seed of each main method."""
    trained = [row for row in found if row.kind == "trained"]
    chosen = [row.name for row in sorted(trained, key=lambda row: (row.tier != "main", -(row.mean("P@1") or 0)))][:_LINES]
    curves = {}
    for name in chosen:
        first = next(r for r in records if r["method"] == name and "curve" in r)
        if len(first["curve"]) > 1:
            curves[name] = first["curve"]
    if not curves:
        return None
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for name, curve in curves.items():
        axis.plot([point["step"] for point in curve], [point["P@1"] for point in curve], marker=".", label=name)
    axis.set(title=f"{title}: validation P@1 while training", xlabel="step", ylabel="P@1, %")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _style(row: Row, methods: Mapping[str, Method]) -> tuple[str, str]:
    return DENSE if row.name in methods and methods[row.name].role == "dense" else STYLES[row.kind]
