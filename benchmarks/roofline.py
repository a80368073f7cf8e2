"""Time against the floor of the very machine, one dot for each side that classifier_step.py measured there.

    python benchmarks/roofline.py [RECORD.json ...] [--out docs/roofline.png]

The floor is the larger of bytes / copy rate and multiplications / matrix-product rate, both measured in the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

import records

STYLES = {"dense": ("s", "#8a8a8a"), "bottleneck": ("D", "#b07aa1"), "1": ("o", "#d9622b"), "grouped": ("^", "#2b6cb0")}


def latest(paths: list[Path]) -> list[dict[str, Any]]:
    """The last record of each side, of those that are steps."""
    found = {}
    for path in paths:
        for record in json.loads(path.read_text()):
            if record.get("what") == "step":
                key = tuple(
                    record[k] for k in ("device", "head", "labels", "features", "batch", "fan_in", "group", "dtype", "backend")
                )
                found[key] = record
    return list(found.values())


def draw(rows: list[dict[str, Any]], title: str, axes: Any) -> None:
    seen = set()
    for row in rows:
        kind = row["head"] if row["head"] != "fixed_fan_in" else "1" if row["group"] == 1 else "grouped"
        marker, colour = STYLES[kind]
        label = {"1": "fixed fan-in, G = 1", "grouped": "fixed fan-in, groups"}.get(kind, kind)
        plain = row["backend"] == "torch" and row["head"] == "fixed_fan_in"
        axes.errorbar(
            row["floor_ms"],
            row["median_ms"],
            yerr=[[row["median_ms"] - row["p10_ms"]], [row["p90_ms"] - row["median_ms"]]],
            fmt=marker,
            color=colour,
            markerfacecolor="white" if plain else colour,
            markersize=6,
            label=None if plain or label in seen else label,
        )
        if not plain:
            seen.add(label)
    low = min(row["floor_ms"] for row in rows) / 1.6
    high = max(max(row["floor_ms"], row["median_ms"]) for row in rows) * 1.6
    for factor, style in ((1, "-"), (2, "--"), (8, ":")):
        axes.plot([low, high], [factor * low, factor * high], style, color="#444444", linewidth=0.9, zorder=0)
        axes.annotate(
            f"{factor} x" if factor > 1 else "floor", (low, factor * low), (5, 6), fontsize=8, textcoords="offset points"
        )
    axes.set(xscale="log", yscale="log", xlabel="floor (ms)", ylabel="one training step of the layer (ms)", title=title)
    axes.set_xlim(low, max(row["floor_ms"] for row in rows) * 1.6)
    axes.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", nargs="*", type=Path, default=sorted(records.RESULTS.glob("classifier_step-*.json")))
    parser.add_argument("--out", type=Path, default=records.RESULTS.parents[1] / "docs/roofline.png")
    options = parser.parse_args()
    rows = latest(options.records)
    if not rows:
        raise SystemExit("no record of a step was found; run benchmarks/classifier_step.py first")
    devices = sorted({row["device"] for row in rows})
    figure, places = plt.subplots(1, len(devices), figsize=(6.4 * len(devices), 5), squeeze=False)
    for device, axes in zip(devices, places[0], strict=True):
        draw([row for row in rows if row["device"] == device], device, axes)
    figure.tight_layout()
    figure.savefig(options.out, dpi=130)
    print(f"{len(rows)} sides on {len(devices)} device(s): {options.out}")


if __name__ == "__main__":
    main()
