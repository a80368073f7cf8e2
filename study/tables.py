"""Tables of the records: means over runs, what a method costs, how much of the dense-to-sparse hole it closes."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fanin.evaluation import SPLITS
from fanin.files import atomic_path
from study.methods import Method
from study.records import FIGURES

SHOWN = ("P@1", "P@3", "P@5", "PSP@1", "PSP@5", "nDCG@5")
ABSENT = "-"
RECOVERED = ("P@1", "P@5", "PSP@5")


class Row(NamedTuple):
    """A method over its runs, of different seeds or commits. values: figure -> one a run, in the order of their seeds; splits
    likewise by name."""

    name: str
    about: str
    kind: str
    tier: str
    runs: int
    values: dict[str, list[float]]
    splits: dict[str, dict[str, list[float]]]

    def mean(self, figure: str) -> float | None:
        found = self.values.get(figure)
        return statistics.fmean(found) if found else None

    def spread(self, figure: str) -> float | None:
        """Standard deviation over runs; None for a single one."""
        found = self.values.get(figure, [])
        return statistics.stdev(found) if len(found) > 1 else None


def rows(records: Iterable[Mapping[str, Any]], methods: Mapping[str, Method]) -> list[Row]:
    """One row a method that has figures, in the table's order; methods that the table no longer has come last."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        if "unavailable" not in record:
            grouped.setdefault(record["method"], []).append(record)
    order = {name: number for number, name in enumerate(methods)}
    found = []
    for name in sorted(grouped, key=lambda name: order.get(name, len(order))):
        own = grouped[name]
        numbers = [key for key, value in own[0].items() if isinstance(value, int | float) and not isinstance(value, bool)]
        values = {key: [record[key] for record in own if key in record] for key in numbers}
        if own[0]["kind"] != "rival":
            values["total_mib"] = [record["head_mib"] + record["shared_mib"] for record in own]
        timed = [record for record in own if "train_seconds" in record]
        values["prepared_seconds"] = [record["train_seconds"] + record.get("prepare_seconds", 0) for record in timed]
        splits = {
            split: {key: [record[split][key] for record in own if key in record[split]] for key in own[0][split]}
            for split in SPLITS
        }
        first = own[0]
        about = methods[name].about if name in methods else first["about"]
        found.append(Row(name, about, first["kind"], first.get("tier", "main"), len(own), values, splits))
    return found


def ends(found: Sequence[Row], methods: Mapping[str, Method], figure: str) -> tuple[float, float] | None:
    """The hole's two ends: the floor's mean, the best dense method's mean; None while either is missing."""
    of_role = {
        role: [row.mean(figure) for row in found if row.name in methods and methods[row.name].role == role]
        for role in ("floor", "dense")
    }
    floor, dense = ([value for value in of_role[role] if value is not None] for role in ("floor", "dense"))
    if not floor or not dense or max(dense) <= min(floor):
        return None
    return min(floor), max(dense)


def recovery(row: Row, found: Sequence[Row], methods: Mapping[str, Method], figure: str) -> float | None:
    """The share of the hole between plain sparse and the best dense, trained for as many steps, that the method closes, in per
    cent."""
    steps = row.mean("steps")
    alike = [other for other in found if None in (steps, other.mean("steps")) or other.mean("steps") == steps]
    hole, value = ends(alike, methods, figure), row.mean(figure)
    return None if hole is None or value is None else 100 * (value - hole[0]) / (hole[1] - hole[0])


def results(records: Sequence[Mapping[str, Any]], methods: Mapping[str, Method]) -> str:
    """The tables of accuracy, cost and label frequency, and what the methods' names stand for, as Markdown."""
    found = rows(records, methods)
    blocks = ["No records yet."]
    if found:
        names = "\n".join(f"- `{row.name}`: {row.about}" for row in found)
        blocks = [quality_table(found, methods), names, cost_table(found), frequency_table(found)]
    absent = [
        f"- {record['about']}: not available here ({record['unavailable']})" for record in records if "unavailable" in record
    ]
    return "\n\n".join([*blocks, *(["\n".join(absent)] if absent else [])])


def quality_table(found: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """Accuracy over runs, with the share of the hole that is closed."""
    header = ["method", "runs", *SHOWN, *(f"hole closed, {figure}" for figure in RECOVERED)]
    body = []
    for row in found:
        cells = [_with_spread(row, figure) for figure in SHOWN]
        # a linear model on TF-IDF is no point between the two ends
        closed = [None if row.kind == "rival" else recovery(row, found, methods, figure) for figure in RECOVERED]
        body.append(
            [f"`{row.name}`", str(row.runs), *cells, *(ABSENT if share is None else f"{share:.0f} %" for share in closed)]
        )
    return markdown(header, body)


def cost_table(found: Sequence[Row]) -> str:
    """What each method takes: bytes of the head as stored and beside the dense layer's, shared layers, the whole model's
    file, time, memory."""
    header = ["method", "head MiB", "shared MiB", "of the dense layer", "with shared", "model file MiB"]
    header += ["train s", "with the start's s", "peak MiB"]
    body = []
    for row in found:
        head, shared, dense = (row.mean(f"{part}_mib") for part in ("head", "shared", "dense"))
        size = [ABSENT] * 4
        if head is not None and shared is not None and dense is not None:
            size = [f"{head:.2f}", f"{shared:.2f}", f"{head / dense:.3f}", f"{(head + shared) / dense:.3f}"]
        others = [row.mean(key) for key in ("model_mib", "train_seconds", "prepared_seconds", "peak_mib")]
        body.append([f"`{row.name}`", *size, *(ABSENT if value is None else f"{value:.0f}" for value in others)])
    return markdown(header, body)


def frequency_table(found: Sequence[Row]) -> str:
    """The parts of P@5 and PSP@5 that head, torso and tail labels bring (they add up to the whole), and their recall@5."""
    figures = ("P@5", "PSP@5", "recall@5")
    header = ["method", *(f"{figure} {split}" for figure in figures for split in SPLITS)]
    body = []
    for row in found:
        values = [row.splits[split].get(figure) for figure in figures for split in SPLITS]
        body.append([f"`{row.name}`", *(ABSENT if not value else f"{statistics.fmean(value):.1f}" for value in values)])
    return markdown(header, body)


def markdown(header: Sequence[str], body: Sequence[Sequence[str]], text: int = 1) -> str:
    """A Markdown table whose columns line up in plain text too: the first `text` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i < text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < text else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *(line(row) for row in body)])


def write_csv(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line a record, for a spreadsheet."""
    columns = ["method", "kind", "seed", *FIGURES, "head_mib", "shared_mib", "dense_mib", "model_mib"]
    columns += ["train_seconds", "prepare_seconds", "rank_seconds", "peak_mib", "commit"]
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(record for record in records if "unavailable" not in record)


def _with_spread(row: Row, figure: str) -> str:
    mean, spread = row.mean(figure), row.spread(figure)
    if mean is None:
        return ABSENT
    return f"{mean:.2f}" if spread is None else f"{mean:.2f} ± {spread:.2f}"
