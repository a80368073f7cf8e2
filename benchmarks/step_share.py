"""Where a training step's time goes: encoder, classifier layer, optimiser, the rest, with the kernels and without.

    python benchmarks/step_share.py [--labels 131072] [--tokens 32] [--steps 9]

Real trainer, random documents and weights (time does not depend on what they are). The sides differ in the head's kernels
alone and take turns, a step each; their first losses must agree before any time is printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig

import records
from fanin.config import Config, load_config
from fanin.encoder import choose_precision, resolve
from fanin.memory import plan, probe
from fanin.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("encoder", "classifier layer", "optimizer", "rest")


class Clock:
    """Seconds that a trainer spends in its parts."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.spent: dict[str, float] = defaultdict(float)
        self._around(trainer.classifier, "embed", "encoder")
        self._around(trainer.classifier, "project", "encoder")
        self._around(trainer.classifier.head, "step", "classifier layer")
        self._around(trainer.optimizer, "step", "optimizer")

    def _around(self, owner: Any, name: str, part: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            began = time.perf_counter()
            result = original(*arguments, **settings)
            self.spent[part] += time.perf_counter() - began
            return result

        setattr(owner, name, call)

    def step(self, stream: Any) -> dict[str, float]:
        """Milliseconds of one step by part."""
        self.spent.clear()
        backward = torch.autograd.backward
        self._around(torch.autograd, "backward", "encoder")
        began = time.perf_counter()
        try:
            self.trainer._train_step(stream)
        finally:
            torch.autograd.backward = backward
        whole = time.perf_counter() - began
        parts = {part: 1e3 * self.spent[part] for part in PARTS[:-1]}
        return parts | {"rest": 1e3 * whole - sum(parts.values())}


def trainer_of(config: Config, labels: int, tokens: int, steps: int, folder: Path) -> Trainer:
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = plan.random_encoder(AutoConfig.from_pretrained(resolve(config.encoder.name)))
    precision = choose_precision(config.train.precision, device)
    classifier = probe.random_classifier(config, model, labels, device, precision)
    trainer = probe._trainer(config, classifier, tokens, steps, folder)
    probe._make_moments(trainer.optimizer)
    classifier.train()
    return trainer


def settings(kind: str, backend: str, group: int, intermediate: int) -> Config:
    config = load_config(ROOT / "params.yaml")
    config.head.kind, config.head.backend, config.head.group = kind, backend, group
    config.head.intermediate, config.auxiliary.enabled, config.rewiring.method = intermediate, False, "none"
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("labels", 131072), ("tokens", 32), ("steps", 9), ("intermediate", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the record")
    options = parser.parse_args()
    sides = {("dense", "torch", 1): "dense"}
    sides |= {("fixed_fan_in", b, g): f"K 32, G {g}, {b}" for g in (1, 16) for b in ("torch", "auto")}
    found = []
    with tempfile.TemporaryDirectory() as folder:
        clocks, streams, losses = {}, {}, {}
        for key in sides:
            config = settings(*key, options.intermediate)
            trainer = trainer_of(config, options.labels, options.tokens, options.steps + 2, Path(folder))
            streams[key] = trainer._stream(0)
            losses[key] = trainer._train_step(streams[key])["loss"]
            clocks[key] = Clock(trainer)
        for group in (1, 16):
            one, two = (losses["fixed_fan_in", backend, group] for backend in ("torch", "auto"))
            if abs(one - two) > 1e-4 * abs(one):
                raise SystemExit(f"the kernels differ for G {group}: loss {one} and {two}; no time is reported")
        times: dict[Any, list[dict[str, float]]] = {key: [] for key in sides}
        for number in range(options.steps + 1):
            for key, clock in clocks.items():
                taken = clock.step(streams[key])
                if number:  # the first warms up
                    times[key].append(taken)
    batch = load_config(ROOT / "params.yaml").train.batch
    for key, name in sides.items():
        medians = {part: float(np.median([taken[part] for taken in times[key]])) for part in PARTS}
        whole = [sum(taken.values()) for taken in times[key]]
        share = {part: value / sum(medians.values()) for part, value in medians.items()}
        low, median, high = np.quantile(whole, [0.1, 0.5, 0.9]).tolist()
        print(f"{name:18} {median:7.1f} ms: " + ", ".join(f"{p} {medians[p]:.1f} ({share[p]:.0%})" for p in PARTS))
        kind, backend, group = key
        record = {"head": kind, "backend": backend, "group": group, "fan_in": None if kind == "dense" else 32, "batch": batch}
        record |= {"labels": options.labels, "tokens": options.tokens, "intermediate": options.intermediate}
        record |= {"median_ms": median, "p10_ms": low, "p90_ms": high, "parts_ms": medians, "steps": options.steps}
        found.append(record)
    print(f"record in {records.add('step_share', found, options.out)}")


if __name__ == "__main__":
    main()
