"""The study in one table: each sparse method beside the dense one trained as long, seed by seed, and beside Bonsai."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from study.methods import Method
from study.tables import ABSENT, markdown

SHOWN = ("P@1", "P@3", "P@5", "PSP@5")
COMPARED = ("P@1", "P@5", "PSP@5")
RIVAL = "bonsai"

Record = Mapping[str, Any]


class Pair(NamedTuple):
    """Two runs that differ in the method alone: one device, one commit, one seed."""

    sparse: Record
    dense: Record


def pairs(files: Iterable[Sequence[Record]], method: Method) -> list[Pair]:
    """The runs of `method`, each with that of `method.against` by the same device, commit and seed, by device and seed.

    files: a corpus' records, one list a device. Runs without such a partner are left out.
    """
    found = []
    for records in files:
        usable = [record for record in records if "unavailable" not in record]
        dense = {(r["commit"], r["seed"]): r for r in usable if r["method"] == method.against}
        own = sorted((r for r in usable if r["method"] == method.name), key=lambda r: r["seed"])
        found += [Pair(r, dense[r["commit"], r["seed"]]) for r in own if (r["commit"], r["seed"]) in dense]
    return found


def summary(corpora: Mapping[str, Sequence[Sequence[Record]]], methods: Mapping[str, Method]) -> str:
    """The table, as Markdown. corpora: title -> its records, one list a device."""
    header = ["corpus", "method", "steps", "runs", "bytes", "with shared", *SHOWN]
    header += [f"{figure} of dense" for figure in COMPARED]
    no_shares = [ABSENT] * len(COMPARED)
    body = []
    for title, files in corpora.items():
        for method in methods.values():
            for steps, found in _by_steps(pairs(files, method) if method.against else []):
                runs, (sparse, dense) = str(len(found)), zip(*found, strict=True)
                shares = [_spread([100 * p.sparse[f] / p.dense[f] for p in found], 1) + " %" for f in COMPARED]
                body.append([title, f"`{method.name}`", steps, runs, *_bytes(sparse), *_figures(sparse), *shares])
                body.append([title, f"`{method.against}`", steps, runs, *_bytes(dense), *_figures(dense), *no_shares])
        rival = [r for records in files for r in records if r["method"] == RIVAL and "unavailable" not in r]
        if rival:
            body.append([title, f"`{RIVAL}`", ABSENT, str(len(rival)), ABSENT, ABSENT, *_figures(rival), *no_shares])
    return markdown(header, body, text=2) if body else "No records yet."


def _by_steps(found: Sequence[Pair]) -> list[tuple[str, list[Pair]]]:
    """Pairs by the steps that they trained for: a corpus' preset may have changed between them."""
    steps = sorted({pair.sparse["steps"] for pair in found})
    return [(f"{own:,}", [pair for pair in found if pair.sparse["steps"] == own]) for own in steps]


def _figures(records: Sequence[Record]) -> list[str]:
    return [_spread([record[figure] for record in records], 2) for figure in SHOWN]


def _bytes(records: Sequence[Record]) -> list[str]:
    """The head's bytes, and those with shared layers, as shares of the dense layer's of the same type."""
    head, shared, dense = (statistics.fmean(r[f"{part}_mib"] for r in records) for part in ("head", "shared", "dense"))
    return [f"{head / dense:.3f}", f"{(head + shared) / dense:.3f}"]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
