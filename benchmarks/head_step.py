"""One training step of the head alone: fixed fan-in against dense, on this machine's GPU or else its CPU.

    python benchmarks/head_step.py [--labels 131072] [--features 384] [--batch 64] [--steps 15]

Before any time is printed, the sparse step is checked against dense arithmetic in float64 on a small head. Steps of all
sides alternate. Needs torch and numpy alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import records
from fanin.heads import Dense, FixedFanIn, Head
from fanin.kernels.reference import expand
from fanin.objectives import Positives


def positives(labels: int, batch: int, device: str) -> Positives:
    """Three labels a document."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(labels, generator=generator)[:3] for _ in range(batch)]).reshape(-1)
    order = drawn.argsort(stable=True)
    return Positives(drawn[order].to(device), (order // 3).to(device))


def check(device: str, group: int) -> float:
    """The largest difference of dx from dense float64 arithmetic, over its largest value."""
    head = FixedFanIn(3000, 96, 16, group).to(device)
    x = torch.randn(8, 96, device=device)
    y = positives(3000, 8, device)
    weight = torch.zeros(3000, 96, dtype=torch.float64, device=device)
    weight.scatter_(1, expand(head.index, 3000, group), head.weight.double())
    g = torch.sigmoid(x.double() @ weight.t() + head.bias.double())
    g[y.documents, y.labels] -= 1
    expected = g @ weight
    dx, _ = head.step(x, y, lr=0.1)
    return ((dx.double() - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("labels", 131072), ("features", 384), ("batch", 64), ("steps", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the record")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    labels, features, batch = options.labels, options.features, options.batch
    for group in (1, 16):
        error = check(device, group)
        if not error < 1e-4:
            raise SystemExit(f"the sparse step is off by {error:.1e} for group {group}; no time is reported")
    heads: dict[tuple[str, int | None, int | None], Head] = {
        ("dense", None, None): Dense(labels, features),
        ("fixed_fan_in", 32, 1): FixedFanIn(labels, features, 32, 1),
        ("fixed_fan_in", 32, 16): FixedFanIn(labels, features, 32, 16),
    }
    x, y = torch.randn(batch, features, device=device), positives(labels, batch, device)
    times: dict[tuple[str, int | None, int | None], list[float]] = {key: [] for key in heads}
    for head in heads.values():
        head.to(device).prepare_training(0.9)
    for number in range(options.steps + 3):  # the first three warm up
        for key, head in heads.items():
            if device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            head.step(x, y, lr=0.01, momentum=0.9)
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                times[key].append(1e3 * (time.perf_counter() - began))
    found = []
    for (kind, fan_in, group), taken in times.items():
        low, median, high = np.quantile(taken, [0.1, 0.5, 0.9]).tolist()
        print(f"{kind:13} K {fan_in or features:4} G {group or 1:3}: {median:8.2f} ms (p10 {low:.2f}, p90 {high:.2f})")
        record = {"head": kind, "labels": labels, "features": features, "batch": batch, "fan_in": fan_in, "group": group}
        record |= {"dtype": "float32", "backend": "bag", "median_ms": median, "p10_ms": low, "p90_ms": high}
        found.append(record)
    print(f"record in {records.add('head_step', found, options.out)}")


if __name__ == "__main__":
    main()
