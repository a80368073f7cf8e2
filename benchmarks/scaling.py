"""What one to 64 GPUs can train, as the memory plan says: the tables of docs/scaling.md.

    python benchmarks/scaling.py [--memory 80GiB] [--out FOLDER]

Nothing is built and no GPU is needed: every figure is planned, and the record says so (`kind`). A rank holds its share of the
labels and of the batch's documents; the encoder is BERT-base's shape at batch 128 of 128 tokens, with activation checkpointing
and bf16 moments. Beside the memory stands the least time that the layer's
step can take on a device that copies so many bytes a second (--bandwidth): weights, indices and momentum read and written once.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig

import records
from fanin.config import Config, Encoder, Head, Rewiring, Train
from fanin.files import write_json
from fanin.memory.__main__ import size
from fanin.memory.fits import FIRST_USE
from fanin.memory.job import MIB, Job
from fanin.memory.plan import head_bytes
from fanin.memory.shapes import EncoderShape

FEATURES = 768
SETTINGS = {
    "fp32, G 1, momentum": Head(kind="fixed_fan_in", fan_in=32, intermediate=0, dtype="fp32"),
    "bf16, G 1": Head(kind="fixed_fan_in", fan_in=32, intermediate=0, dtype="bf16"),
    "bf16, G 64": Head(kind="fixed_fan_in", fan_in=32, group=64, intermediate=0, dtype="bf16"),
    "fp8, G 64": Head(kind="fixed_fan_in", fan_in=32, group=64, intermediate=0, dtype="fp8"),
    "dense fp32, momentum": Head(kind="dense", intermediate=0),
}
LABELS = (2_812_281, 10_000_000, 100_000_000, 1_000_000_000)
RANKS = (1, 8, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=size, default=80 * 1024 * MIB, help="of one GPU (default 80GiB)")
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes a second that it copies (default 4.3e12)")
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args()
    shape = EncoderShape.of(BertConfig(), None)
    found = [record(shape, name, labels, ranks, options) for name in SETTINGS for labels in LABELS for ranks in RANKS]
    for labels in LABELS:
        print(f"\n| {labels:,} labels, GiB a GPU | " + " | ".join(f"{ranks} GPU{'s' * (ranks > 1)}" for ranks in RANKS) + " |")
        print("|---" * (len(RANKS) + 1) + "|")
        for name in SETTINGS:
            own = [one for one in found if (one["settings"], one["labels"]) == (name, labels)]
            cells = [f"{one['predicted_mib'] / 1024:,.1f}{'' if one['fits'] else ' (does not fit)'}" for one in own]
            print(f"| {name} | " + " | ".join(cells) + " |")
    largest = {name: most(shape, name, options) for name in SETTINGS}
    print(
        f"\n| the most labels that {options.memory / 1024 / MIB:.0f} GiB take | 1 GPU | 8 GPUs | 64 GPUs |\n|---|---|---|---|"
    )
    for name, counts in largest.items():
        print(f"| {name} | " + " | ".join(f"{count / 1e6:,.0f} M" for count in counts) + " |")
    write_json(options.out / "scaling-planned.json", [one | records.provenance() | {"device": "none"} for one in found])


def job(shape: EncoderShape, name: str, labels: int, ranks: int) -> Job:
    head = replace(SETTINGS[name])
    momentum = 0.9 if "momentum" in name else 0.0
    rewiring = Rewiring(method="none" if head.kind == "dense" else "set")
    train = Train(batch=128, momentum=momentum, encoder_moments="bf16")
    config = Config(encoder=Encoder(checkpointing=True), head=head, train=train, rewiring=rewiring)
    cuda = torch.device("cuda")
    return Job(config=config, shape=shape, labels=labels, tokens=128, device=cuda, precision=torch.bfloat16, ranks=ranks)


def record(shape: EncoderShape, name: str, labels: int, ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    planned = job(shape, name, labels, ranks)
    plan = planned.plan(FIRST_USE["cuda"])
    head, momentum = planned.config.head, planned.config.train.momentum > 0
    own = head_bytes(head, -(-labels // ranks), FEATURES, momentum=momentum)
    moved = 2 * (own["weights"] + own["optimizer"] + own["bias"]) + own["indices"]
    return {
        "kind": "planned",
        "settings": name,
        "head": head.kind,
        "labels": labels,
        "ranks": ranks,
        "features": FEATURES,
        "batch": 128,
        "tokens": 128,
        "fan_in": head.fan_in if head.kind != "dense" else None,
        "group": head.group,
        "dtype": head.dtype,
        "encoder": "bert-base",
        "predicted_mib": round(plan.need / MIB, 1),
        "phase": plan.phase,
        "fits": plan.need <= options.memory,
        "traffic_ms": round(1e3 * moved / options.bandwidth, 3),
    }


def most(shape: EncoderShape, name: str, options: argparse.Namespace) -> list[int]:
    """The most labels, in whole millions, for each number of GPUs; label numbers end at 2^31."""
    counts = []
    for ranks in RANKS:
        low, high = 0, 2**31 // 10**6
        while low < high:
            middle = (low + high + 1) // 2
            fits = job(shape, name, middle * 10**6, ranks).plan(FIRST_USE["cuda"]).need <= options.memory
            low, high = (middle, high) if fits else (low, middle - 1)
        counts.append(low * 10**6)
    return counts


if __name__ == "__main__":
    main()
