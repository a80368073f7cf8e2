"""What a training step will hold in memory, predicted from shapes alone.

Nothing is allocated. The arithmetic follows the step as the trainer makes
it, phase by phase: forward (the encoder's saved tensors grow), head (its chunked step beside them), backward (they shrink,
gradients grow), update (AdamW), rewire. The peak is that of the highest phase. All sizes are in bytes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch

from fanin import kernels
from fanin.config import Config
from fanin.config import Head as HeadSettings
from fanin.heads import STORED
from fanin.heads.dense import ROUNDED
from fanin.kernels.layer import index_dtype
from fanin.lexical import lexical_sizes
from fanin.memory.shapes import EncoderShape
from fanin.optim import CHUNK, MOMENTS

PARTS = ("baseline", "encoder", "encoder_optimizer", "activations", "head_weights", "indices", "head_optimizer", "buffers")
_FLOAT = 4  # weights, gradients, and what is not said to be stored in less
# Of what comes and goes within a step, the share that the allocator keeps beyond it. A CPU: glibc keeps freed blocks below
# 32 MiB, of all the lengths that batches had (measured: 0.9 where texts are long, benchmarks/memory_kept.py); CUDA: what the
# caching allocator loses to blocks that do not fit.
_SLACK = {"cpu": 1.0, "cuda": 0.1}
_KEPT_LAYERS = 3  # with checkpointing a CPU keeps about so many layers' activations, whatever else comes and goes
_LOADER = 52  # bytes a document: lengths, rows, an epoch's order and, for an instant, its sorting


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What a phase holds at its highest, beside what stays for the whole run: bytes."""

    activations: int = 0
    gradients: int = 0
    temporaries: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.temporaries


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The predicted memory of a training step, in bytes.

    encoder: weights of the encoder and the intermediate layer; encoder_optimizer: their two moments; head_weights: with
    biases (and the bottleneck's projection); other: the auxiliary branch with its moments, and the label order of groups;
    loader: the order of the documents and a batch.
    baseline: the process (or on CUDA the libraries' workspaces) before anything is built, as measured; 0 where unknown.
    slack_share: of a phase's coming and going, what the allocator keeps; least_slack: what it keeps in any case.
    """

    baseline: int
    encoder: int
    encoder_optimizer: int
    head_weights: int
    indices: int
    head_optimizer: int
    other: int
    loader: int = 0
    slack_share: float = 0.0
    least_slack: int = 0
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        own = self.encoder + self.encoder_optimizer + self.head_weights + self.indices + self.head_optimizer
        return self.baseline + own + self.other + self.loader

    @property
    def phase(self) -> str:
        """The phase in which the peak comes."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> int:
        """Of tensors and process: what `probe` measures with an allocator that keeps nothing back."""
        return self.resident + self.phases[self.phase].total

    @property
    def slack(self) -> int:
        """What the allocator is expected to keep beyond the peak."""
        return max(int(self.slack_share * self.phases[self.phase].total), self.least_slack)

    @property
    def need(self) -> int:
        """The peak with the allocator's slack: what has to be free for the run to fit."""
        return self.peak + self.slack

    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak; they sum to it. buffers: gradients, temporaries, loader and `other`."""
        at_peak = self.phases[self.phase]
        sizes = {name: getattr(self, name) for name in PARTS if name not in ("activations", "buffers")}
        buffers = at_peak.gradients + at_peak.temporaries + self.other + self.loader
        sizes |= {"activations": at_peak.activations, "buffers": buffers}
        return {name: sizes[name] for name in PARTS}

    def lines(self) -> dict[str, int]:
        """Bytes by part at the peak, finer than `parts` and with the allocator's slack; they sum to `need`."""
        at_peak = self.phases[self.phase]
        buffers = "head's fused step" if self.phase == "head" else f"buffers of the {self.phase} pass"
        return {
            "process and libraries": self.baseline,
            "encoder weights": self.encoder,
            "encoder gradients": at_peak.gradients,
            "encoder optimiser state": self.encoder_optimizer,
            "activations": at_peak.activations,
            "head weights": self.head_weights,
            "head indices": self.indices,
            "head momentum": self.head_optimizer,
            buffers: at_peak.temporaries,
            "auxiliary branch, label order": self.other,
            "loader": self.loader,
            "allocator slack": self.slack,
        }


def predict(
    config: Config,
    encoder: EncoderShape,
    labels: int,
    *,
    batch: int,
    tokens: int,
    head: HeadSettings | None = None,
    device: str = "cpu",
    precision: torch.dtype = torch.float32,
    baseline: int = 0,
    documents: int = 0,
    ranks: int = 1,
) -> Plan:
    """Plan a training step of micro-batches [B, T] on `labels` labels.

    head: the head's settings, config.head unless given; precision: float32, or bfloat16 for autocast; device: cpu or cuda;
    documents: to train on; ranks: processes that share the labels and a batch's documents (the plan is one rank's).
    """
    head = head or config.head
    whole, labels, own = labels, -(-labels // ranks), -(-batch // ranks)
    width = encoder.width(config)
    inner = head.intermediate or width
    profiles, words = lexical_sizes(head, encoder.vocabulary, inner, whole)
    features = inner + profiles + words
    layer = head.intermediate * (width + 1)
    trained = encoder.parameters + layer
    lexical = profiles + words
    sizes = head_bytes(head, labels, features, momentum=config.train.momentum > 0, profiles=profiles, lexical=lexical)
    meta = min(config.clusters.meta_labels, whole) if config.auxiliary.enabled else 0
    moments = MOMENTS[config.train.encoder_moments].itemsize
    checkpointing = config.encoder.checkpointing

    embedding = _FLOAT * own * width * (2 if config.encoder.dropout else 1)
    tail = embedding + _FLOAT * own * inner * (2 if head.activation == "relu" and head.intermediate else 1)
    if features > inner:  # with the words behind them
        tail += _FLOAT * own * features
    activations = encoder.saved(own, tokens, device, precision, checkpointing) + tail
    forward, backward = encoder.temporaries(own, tokens, device, precision, checkpointing)
    order = 0 if not head.ordered else 4 * labels + (8 * whole if device == "cpu" else 0)  # and its inverse, on the host
    branch = 2 * _FLOAT * own * meta  # targets and logits
    waiting = _FLOAT * trained if config.train.accumulation > 1 else 0  # gradients of earlier micro-batches
    gradients = _FLOAT * (trained + meta * (width + 1))
    gathered = 3 * _FLOAT * batch * features if ranks > 1 else 0  # all ranks' x, as it comes and in order, and dx
    step = step_buffers(head, labels, features, batch, device, words) + gathered
    # fused in float32: none; below it a chunk in float32 with its noise
    updating = 0 if moments == _FLOAT else 7 * _FLOAT * min(CHUNK, encoder.vocabulary * encoder.hidden)
    phases = {
        "forward": Phase(activations=activations, gradients=waiting, temporaries=forward),
        "head": Phase(activations=activations, gradients=waiting, temporaries=step),
        "backward": max(  # at its beginning or at its end
            Phase(activations=activations, gradients=waiting, temporaries=backward + branch),
            Phase(gradients=gradients),
            key=lambda phase: phase.total,
        ),
        "update": Phase(gradients=gradients, temporaries=updating),
    }
    if head.sparse and config.rewiring.method != "none":
        method, prune, rows = config.rewiring.method, config.rewiring.prune, labels - head.dense_labels(labels)
        rewire = rewire_buffers(head, rows, inner, batch, method, prune, lexical)
        phases["rewire"] = Phase(temporaries=rewire + tail)
    if head.sparse and config.rewiring.recode_at and config.rewiring.refit_epochs and config.rewiring.exchange:
        rows, embedded = labels - head.dense_labels(labels), min(documents, config.encoder.embed_documents)
        phases["exchange"] = Phase(temporaries=exchange_buffers(head, rows, inner, embedded, lexical))
    return Plan(
        baseline=baseline,
        encoder=_FLOAT * trained,
        encoder_optimizer=2 * moments * trained,
        head_weights=sizes["weights"] + sizes["bias"],
        indices=sizes["indices"],
        head_optimizer=sizes["optimizer"],
        other=(_FLOAT + 2 * moments) * meta * (width + 1) + (8 * whole if meta else 0) + order,
        loader=_LOADER * documents if device == "cpu" else 0,
        slack_share=_SLACK["cpu" if device == "cpu" else "cuda"],
        least_slack=_KEPT_LAYERS * encoder.layer(own, tokens, device, precision) if checkpointing and device == "cpu" else 0,
        phases=phases,
    )


def head_bytes(
    head: HeadSettings, labels: int, features: int, *, momentum: bool, profiles: int = 0, lexical: int = 0
) -> dict[str, int]:
    """What `model.Classifier.head_bytes` gives for this head, without building it; profiles: C, which every rank has; lexical:
    C + V' of the features."""
    if dense := head.dense_labels(labels):
        inner = features - lexical
        own = head_bytes(dataclasses.replace(head, kind="dense"), dense, inner, momentum=momentum)
        rest = head_bytes(dataclasses.replace(head, kind="fixed_fan_in"), labels - dense, features, momentum=momentum)
        return {name: own[name] + rest[name] for name in own}
    entry = STORED[head.dtype].itemsize
    weights, indices = labels * features, 0
    if head.kind == "bottleneck":
        weights = head.bottleneck * (labels + features)
    elif head.kind == "fixed_fan_in":
        weights = labels * head.fan_in
        indices = -(-labels // head.group) * head.fan_in * index_dtype(features).itemsize
    state = _FLOAT if entry >= _FLOAT else 2
    compensation = 2 * weights if head.rounding == "kahan" and entry < _FLOAT else 0
    beside = profiles * head.profiles
    return {
        "weights": entry * weights + _FLOAT * beside,
        "indices": indices + index_dtype(features).itemsize * beside,
        "bias": _FLOAT * labels,
        "optimizer": (state * weights + _FLOAT * (labels + beside) if momentum else 0) + compensation,
    }


def step_buffers(head: HeadSettings, labels: int, features: int, batch: int, device: str = "cpu", words: int = 0) -> int:
    """What `heads.Head.step` allocates at its highest; words: how many of the features those are."""
    if dense := head.dense_labels(labels):  # the tail's step, then that of the dense rows beside the tail's dx
        inner = features - words
        rest = step_buffers(dataclasses.replace(head, kind="fixed_fan_in"), labels - dense, features, batch, device, words)
        own = step_buffers(dataclasses.replace(head, kind="dense"), dense, inner, batch, device)
        return max(rest, own + _FLOAT * batch * inner * (2 if words else 1))
    if head.kind == "fixed_fan_in":
        step = kernels.step_bytes(
            head.backend,
            device,
            labels=labels,
            features=features,
            fan_in=head.fan_in,
            group=head.group,
            batch=batch,
            learnt=features - words,
        )
        checked = min(-(-labels // head.group) * head.fan_in, 2**22)  # indices at once, before the first step with them
        return max(step, 4 * checked)
    reads = head.bottleneck if head.kind == "bottleneck" else features
    chunk = min(max((2**18 if device == "cpu" else 2**24) // batch, 256), 2**16, labels)
    vectors = 2 * _FLOAT * batch * reads * (2 if head.kind == "bottleneck" else 1)  # x and dx, features first; y = P x, dy
    logits = _FLOAT * chunk * batch
    if STORED[head.dtype].itemsize >= _FLOAT:
        return vectors + 2 * logits  # the loss's values beside them
    # the chunk's weights and gradient in float32, and what rounds a part of them: random bits and sums in int64
    rounding = 80 if head.dtype == "fp8" and head.rounding == "stochastic" else 36
    update = features * (2 * _FLOAT * chunk + rounding * min(ROUNDED, chunk))
    return vectors + logits + max(logits, update)


def exchange_buffers(head: HeadSettings, labels: int, features: int, documents: int, words: int = 0) -> int:
    """What `exchange.exchange` allocates at its highest, 64 pairs told of a document; words: features that it leaves."""
    asked, pairs = min(labels, 2**15), 64 * documents
    summed = min(1024, labels) * features * _FLOAT
    found = 2 * documents * features  # the encoder's features in bfloat16
    asking = 64 * (_FLOAT * 2 * (features + words) + 22 * asked) + 32 * pairs  # x, the logits and what is made of them
    ordering = 44 * pairs
    summing = 16 * pairs + 2 * _FLOAT * documents * min(128, features) + 2 * summed
    choosing = 16 * pairs + 6 * summed
    return found + max(asking, ordering, summing, choosing)


def rewire_buffers(head: HeadSettings, labels: int, features: int, batch: int, method: str, prune: str, words: int = 0) -> int:
    """What `heads.FixedFanIn.rewire` allocates at its highest, for one chunk of index rows; words: features that it leaves."""
    total, whole = -(-labels // head.group), max(2**22 // (features * head.group), 1)
    rows = min(whole, total)
    entries, members = rows * head.fan_in, rows * head.fan_in * head.group
    # the new indices in order, then for each label where its weights come from, and they themselves
    moving = 35 * entries if head.group == 1 else 17 * entries + 13 * members
    if method == "rigl":
        choosing = 17 * entries + _FLOAT * batch * (features + words) * (3 if batch > 64 or words else 2)  # x, features first
    else:
        choosing = 35 * entries + _FLOAT * rows * features  # random scores
    highest = max(moving, choosing)
    return max(highest, 20 * 2**16) if prune == "global" else highest  # its histogram
