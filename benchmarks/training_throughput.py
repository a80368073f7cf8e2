"""Training documents a second: the project's step against the plain way to write it in torch.

    python benchmarks/training_throughput.py [--steps 12]

The rival is the same model on the same documents: every batch padded to tokens.max_length, all logits [B, L] at once,
the loss and every gradient by autograd, SGD for the head by torch.optim. Both take the same precision for the encoder.
Before any time is printed, one batch goes through both, and loss and the embedding's gradient must agree. Steps of both
sides alternate; the median over steps is reported. Needs data/tokens (make train, or dvc repro tokens).
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import records
from fanin.config import load_config
from fanin.data.batches import Batch, Batches
from fanin.data.tokens import TokenSet
from fanin.encoder import choose_precision
from fanin.files import read_json
from fanin.model import Classifier
from fanin.optim import adamw

ROOT = Path(__file__).resolve().parents[1]
TOKENS = ROOT / "data/tokens"
HEAD_LR = 0.05


class Ours:
    """A training step as fanin.trainer takes it."""

    def __init__(self, classifier: Classifier, lr: float) -> None:
        self.classifier = classifier
        classifier.head.prepare_training(0.9)
        self.optimizer = adamw([(classifier.encoder, lr), (classifier.intermediate, lr)], 0.01)

    def step(self, batch: Batch) -> tuple[float, Tensor]:
        embedding = self.classifier.embed(batch.ids, batch.mask)
        embedding.retain_grad()
        features = self.classifier.project(embedding)
        dx, loss = self.classifier.head.step(features.detach(), batch.positives, lr=HEAD_LR, momentum=0.9, want_loss=True)
        features.backward(dx)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), embedding.grad


class Plain:
    """Padded to the maximum, autograd through all logits."""

    def __init__(self, classifier: Classifier, lr: float, length: int) -> None:
        self.classifier, self.length = classifier, length
        head = classifier.head
        self.weight, self.bias = nn.Parameter(head.weight.clone()), nn.Parameter(head.bias.clone())
        self.index = head.index.to(torch.int64)
        self.optimizer = adamw([(classifier.encoder, lr), (classifier.intermediate, lr)], 0.01)
        self.head_optimizer = torch.optim.SGD([self.weight, self.bias], lr=HEAD_LR, momentum=0.9)

    def step(self, batch: Batch) -> tuple[float, Tensor]:
        missing = self.length - batch.ids.shape[1]
        ids, mask = F.pad(batch.ids, (0, missing)), F.pad(batch.mask, (0, missing))
        embedding = self.classifier.embed(ids, mask)
        embedding.retain_grad()
        features = self.classifier.project(embedding)
        z = F.embedding_bag(self.index, features.t().contiguous(), per_sample_weights=self.weight, mode="sum").t() + self.bias
        y = torch.zeros_like(z)
        y[batch.positives.documents, batch.positives.labels] = 1
        loss = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
        loss.backward()
        gradient = embedding.grad
        for optimizer in (self.optimizer, self.head_optimizer):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="timed steps a side")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the record")
    arguments = parser.parse_args()
    config = load_config(ROOT / "params.yaml")
    config.head.kind, config.head.group = "fixed_fan_in", 1
    about = read_json(TOKENS / "tokens.json")
    tokens = TokenSet.open(TOKENS / "train.arrow")
    batches = Batches(tokens, np.arange(len(tokens)), config.train.batch, 0, about["pad_id"]).epoch(0)
    precision = choose_precision(config.train.precision, torch.device("cpu"))

    models = [Classifier.build(config, about["labels"]) for _ in range(2)]
    for model in models:
        model.precision = precision
        model.eval()  # the model's own dropout draws other numbers for other padding; everything else is as in training
    sides = {"fanin": Ours(models[0], 1e-5), "plain": Plain(models[1], 1e-5, config.tokens.max_length)}
    batch = next(batches)
    (loss, gradient), (plain_loss, plain_gradient) = (side.step(batch) for side in sides.values())
    tolerance = 2e-2 if precision == torch.bfloat16 else 1e-4
    error = ((gradient - plain_gradient).norm() / plain_gradient.norm()).item()
    if abs(loss - plain_loss) > tolerance * plain_loss or error > 5 * tolerance:
        raise SystemExit(f"the two sides differ: loss {loss} and {plain_loss}, gradient by {error:.2%}; no time is reported")
    print(f"same step: loss {loss:.1f} and {plain_loss:.1f}, gradients differ by {error:.1e} of their norm")

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.steps):
        batch = next(batches)
        for name, side in sides.items():
            began = time.perf_counter()
            side.step(batch)
            seconds[name].append(time.perf_counter() - began)
    found = []
    for name, times in seconds.items():
        low, median, high = np.quantile(times, [0.1, 0.5, 0.9])
        rate = config.train.batch / statistics.mean(times)
        print(f"{name:6} {1e3 * median:8.1f} ms a step (p10 {1e3 * low:.1f}, p90 {1e3 * high:.1f}), {rate:.1f} documents/s")
        found.append(
            {
                "side": name,
                "labels": about["labels"],
                "features": config.head.intermediate,
                "fan_in": config.head.fan_in,
                "batch": config.train.batch,
                "max_length": config.tokens.max_length,
                "precision": str(precision).removeprefix("torch."),
                "median_ms": 1e3 * median,
                "p10_ms": 1e3 * low,
                "p90_ms": 1e3 * high,
                "documents_per_second": rate,
                "steps": arguments.steps,
            }
        )
    print(f"ratio {found[0]['documents_per_second'] / found[1]['documents_per_second']:.2f}")
    print(f"record in {records.add('training_throughput', found, arguments.out)}")


if __name__ == "__main__":
    main()
