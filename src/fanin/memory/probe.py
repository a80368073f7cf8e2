"""A training step's measured peak, in a process that does nothing else.

The step is the trainer's own (`Trainer.run`) on a random encoder, a random head and random documents of the full length.
What is exact: the bytes of weights, indices and optimiser state (their tensors), the activations (autograd's saved
tensors), the peaks. What is a difference: buffers, the peak less all that.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig

from fanin.config import Config
from fanin.encoder import Encoder, load_description, load_tokenizer
from fanin.heads import FixedFanIn
from fanin.memory.peaks import Peaks, current, pin_allocator, release_allocator, trim_allocator
from fanin.memory.shapes import random_encoder
from fanin.model import Classifier
from fanin.trainer import Trainer

_LABELS_A_DOCUMENT = 3


class RandomTokens:
    """As much of a TokenSet as training reads: `documents` random ones of T tokens, every eighth one token shorter."""

    def __init__(self, documents: int, tokens: int, vocabulary: int, labels: int, seed: int) -> None:
        self.lengths = np.full(documents, tokens, np.int32)
        self.lengths[::8] = max(tokens - 1, 1)  # padding, as every real batch has it
        self._vocabulary, self._labels, self._seed = vocabulary, labels, seed

    def __len__(self) -> int:
        return len(self.lengths)

    def ids(self, rows: np.ndarray) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed, int(rows[0])])
        return [rng.integers(0, self._vocabulary, self.lengths[row]) for row in rows]

    def labels(self, rows: np.ndarray) -> list[np.ndarray]:
        rng = np.random.default_rng([self._seed + 1, int(rows[0])])
        return [np.unique(rng.integers(0, self._labels, _LABELS_A_DOCUMENT)).astype(np.int32) for _ in rows]


def measure(
    config: Config,
    labels: int,
    tokens: int,
    steps: int,
    device: torch.device,
    precision: torch.dtype,
    *,
    thorough: bool = True,
    allocator: bool = False,
) -> dict[str, Any]:
    """Run `steps` training steps of micro-batches [train.batch, tokens] and return bytes.

    Keys: memory_plan.PARTS and peak; phase, the one in which the peak came, and phases, the peak of each; saved, the
    encoder's saved tensors (`thorough`; else null, and their part in buffers); reserved (CUDA, else null); allocator, what
    glibc keeps beyond the peak in a step more (on a CPU, if asked for; else null). With `steps` 0 the baseline alone.
    Only of use in a fresh process.
    """
    tokenizer = load_tokenizer(config.encoder.name, tokens)  # part of the baseline, as training holds it too
    pinned = device.type == "cpu" and pin_allocator()
    _warm_up(config, device, precision)
    baseline = current(device)
    if not steps:
        return {"baseline": baseline}

    shape = load_description(config.encoder.name)
    classifier = random_classifier(config, random_encoder(shape), labels, device, precision, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(config, classifier, tokens, steps, Path(folder))
        _make_moments(trainer.optimizer)
        head = classifier.head_bytes()
        peaks = Peaks(device)
        peaks.watch(trainer)
        peaks.begin("before")
        trainer.run()
        peaks.enter("after")
        phase = max(peaks.highest, key=lambda name: peaks.highest[name])
        peak, phases = peaks.highest[phase], dict(peaks.highest)
        kept = None
        if allocator and pinned:
            release_allocator()
            classifier.prepare_training()
            peaks.begin("before")
            trainer.total += 1
            trainer.run()
            kept = max(max(peaks.highest.values()) - peak, 0)
    saved = saved_bytes(classifier, trainer) if thorough else 0
    sizes = {
        "baseline": baseline,
        "encoder": _bytes(p for module in (classifier.encoder, classifier.intermediate) if module for p in module.parameters()),
        "encoder_optimizer": _bytes(t for state in trainer.optimizer.state.values() for t in state.values() if t.ndim),
        "activations": saved if phase in ("forward", "head", "backward", "all") else 0,
        "head_weights": head["weights"] + head["bias"],
        "indices": head["indices"],
        "head_optimizer": head["optimizer"],
    }
    sizes["buffers"] = peak - sum(sizes.values())
    reserved = peaks.reserved if device.type == "cuda" else None
    found = {"peak": peak, "phase": phase, "phases": phases, "saved": saved or None, "reserved": reserved, "allocator": kept}
    return {**sizes, **found}


def random_classifier(
    config: Config, model: nn.Module, labels: int, device: torch.device, precision: torch.dtype, tokenizer: Any = None
) -> Classifier:
    """A classifier as `config` describes it, around `model`, with any weights and indices; built without a label corpus."""
    settings = config.encoder
    encoder = Encoder(model, tokenizer, settings.pooling, settings.layers, settings.dropout)
    order = np.arange(labels, dtype=np.int32) if config.head.ordered else None
    with torch.device("meta"):  # drawing random indices for millions of labels would take minutes
        classifier = Classifier.build(config, labels, order, encoder)
    classifier.precision = precision
    if classifier.intermediate is not None:
        classifier.intermediate.to_empty(device=device).reset_parameters()
    if classifier.lexical is not None:
        lexical = classifier.lexical.to_empty(device=device)
        torch.nn.init.ones_(lexical.idf)
        if lexical.profiles is not None:
            _spread(lexical.profiles.index, lexical.words)
            torch.nn.init.ones_(lexical.profiles.weight)
    classifier.head.to_empty(device=device)
    for _, head in classifier.head.parts():
        for name, buffer in head.named_buffers():
            if isinstance(head, FixedFanIn) and name == "index":
                inner = head.inner_fan_in
                _spread(buffer[:, :inner], head.inner)
                _spread(buffer[:, inner:], head.width - head.inner, head.inner)
            else:
                buffer.fill_(-1.0) if name == "bias" else _scatter(buffer)
    return classifier.to(device)


def saved_bytes(classifier: Classifier, trainer: Trainer) -> int:
    """Bytes of the storages that autograd keeps of one forward pass, weights not counted."""
    batch = next(trainer.batches.epoch(0)).to(classifier.device)
    own = {t.untyped_storage().data_ptr() for t in (*classifier.parameters(), *classifier.buffers())}
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the storage stays alive, so that no address comes twice

    classifier.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = classifier.features(batch.ids, batch.mask)
    del features
    return sum(sizes.values())


def _scatter(weight: Tensor) -> None:
    """Fill `weight` with random numbers, in chunks and by way of float32: float8 has no generator of its own."""
    for start in range(0, len(weight), 2**16):
        part = weight[start : start + 2**16]
        part.copy_(torch.empty(part.shape, device=part.device).uniform_(-0.1, 0.1))


def _spread(index: Tensor, width: int, first_feature: int = 0) -> None:
    """Fill index [R, K] with distinct ascending features from `first_feature` on, other ones from row to row."""
    rows, fan_in = index.shape
    if not fan_in:
        return
    first = torch.arange(fan_in, device=index.device) * width // fan_in
    for start in range(0, rows, 2**16):
        shift = torch.arange(start, min(start + 2**16, rows), device=index.device) % max(width // fan_in, 1)
        index[start : start + len(shift)] = (first_feature + first + shift[:, None]).to(index.dtype)


def _trainer(config: Config, classifier: Classifier, tokens: int, steps: int, folder: Path) -> Trainer:
    """A trainer that takes `steps` steps on random documents and rewires after each, if at all."""
    labels, train = classifier.head.labels, config.train
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(
            train, epochs=1.0, max_steps=steps, warmup=1, log_every=1, validate_every=0, checkpoint_every=0, encoder_lr=1e-6
        ),
        rewiring=dataclasses.replace(config.rewiring, interval=1, end_fraction=1.0),
        auxiliary=dataclasses.replace(config.auxiliary, cutoff=1.0),
    )
    rows = train.batch * train.accumulation * steps
    vocabulary = classifier.encoder.model.get_input_embeddings().weight.shape[0]
    documents = RandomTokens(rows, tokens, vocabulary, labels, config.seed)
    return Trainer(
        config,
        classifier,
        documents,  # type: ignore[arg-type]
        np.arange(rows),
        np.empty(0, np.int64),
        pad_id=0,
        meta=np.arange(labels) % config.clusters.meta_labels,
        checkpoints=folder,
    )


def _make_moments(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimiser make its state, as its first step does, so that every step that follows is like the later ones."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _warm_up(config: Config, device: torch.device, precision: torch.dtype) -> None:
    """Train a tiny classifier, so that what the libraries load at their first use is in the baseline."""
    head = dataclasses.replace(
        config.head,
        fan_in=4,
        lexical=min(config.head.lexical, 1),
        bottleneck=4,
        intermediate=min(config.head.intermediate, 64),
    )
    tiny = dataclasses.replace(config, head=head, train=dataclasses.replace(config.train, batch=4, accumulation=1))
    depth = config.encoder.layers if config.encoder.pooling == "cls_layers" else 1
    model = random_encoder(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=2,
            num_hidden_layers=depth,
            max_position_embeddings=16,
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        _trainer(tiny, random_classifier(tiny, model, 64, device, precision), 8, 2, Path(folder)).run()
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim_allocator()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
