"""What a training step will hold in memory, predicted from shapes alone.

Nothing is allocated but the encoder's skeleton on the meta device. The arithmetic follows the step as the trainer makes
it, phase by phase: forward (the encoder's saved tensors grow), head (its chunked step beside them), backward (they shrink,
gradients grow), update (AdamW), rewire. The peak is that of the highest phase. All sizes are in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

from fanin import kernels
from fanin.config import Config
from fanin.config import Head as HeadSettings
from fanin.files import InputError
from fanin.heads import STORED
from fanin.kernels.layer import index_dtype

PARTS = ("baseline", "encoder", "encoder_optimizer", "activations", "head_weights", "indices", "head_optimizer", "buffers")
_FLOAT = 4  # weights, gradients, moments and heads are float32


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """What the plan needs to know of a Hugging Face encoder.

    parameters, linear (the linear layers' weights): numbers of entries. dropouts: dropout masks a layer beside the
    attention's. fused: attention through sdpa, not written out.
    """

    hidden: int
    feed_forward: int
    heads: int
    layers: int
    vocabulary: int
    parameters: int
    linear: int
    dropouts: int
    attention_dropout: bool
    fused: bool

    @classmethod
    def of(cls, config: Any, hidden_dropout: float | None = None) -> EncoderShape:
        """The shape that a Hugging Face config describes; hidden_dropout: encoder.hidden_dropout.

        Raises InputError where it describes no transformer.
        """
        sizes = {key: getattr(config, key, None) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers")}
        lacking = [key for key, value in sizes.items() if not isinstance(value, int)]
        if lacking:
            raise InputError(f"encoder.name: its config lacks {', '.join(lacking)}, so its memory cannot be planned")
        with torch.device("meta"):
            model = random_encoder(config)
        rates = [getattr(config, name, None) for name in ("attention_probs_dropout_prob", "attention_dropout")]
        masks = 0
        for path, module in model.named_modules():
            if isinstance(module, nn.Dropout):
                rate = module.p if hidden_dropout is None else hidden_dropout
                masks += rate > 0 and any(name.isdigit() for name in path.split("."))  # a layer's, not the embeddings'
        attention = any(rate for rate in rates) if hidden_dropout is None else hidden_dropout > 0
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        wide = [getattr(config, name, None) for name in ("intermediate_size", "hidden_dim", "d_ff")]
        return cls(
            hidden=config.hidden_size,
            feed_forward=next((size for size in wide if isinstance(size, int)), 4 * config.hidden_size),
            heads=config.num_attention_heads,
            layers=config.num_hidden_layers,
            vocabulary=model.get_input_embeddings().weight.shape[0],  # type: ignore[operator]
            parameters=sum(p.numel() for p in parameters),
            linear=sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
            dropouts=max(masks // config.num_hidden_layers - attention, 0),
            attention_dropout=attention,
            fused=getattr(model.config, "_attn_implementation", "eager") != "eager",
        )

    def width(self, config: Config) -> int:
        """D, the width of the embedding."""
        return self.hidden * (config.encoder.layers if config.encoder.pooling == "cls_layers" else 1)

    def saved(self, batch: int, tokens: int, device: str, precision: torch.dtype) -> int:
        """What autograd keeps of the encoder's forward pass at [B, T], weights not counted.

        A layer keeps the inputs of its linear layers and norms, q, k, v, the activation's input and output, and masks.
        Attention is fused, so of size B T, unless its dropout makes the CPU write out the weights [B, heads, T, T].
        """
        half = precision == torch.bfloat16
        cuda, entry = device != "cpu", 2 if half else _FLOAT
        written = not self.fused or (self.attention_dropout and not cuda)
        mask = 1 if cuda else entry  # a CPU keeps dropout's factors, CUDA one byte each
        positions = batch * tokens
        # float32: x, q, k, v, the attention's output, both norms' inputs, the first one's output; under autocast the
        # norms' inputs stay float32, x is cast for each of q, k and v, and written-out attention is float32
        hidden = (24 if half else 32) + self.dropouts * mask + (6 if half and written else 0)
        layer = positions * self.hidden * hidden + 2 * entry * positions * self.feed_forward + 16 * positions
        if written:
            layer += batch * self.heads * tokens * tokens * _FLOAT * (3 if self.attention_dropout else 1)
        else:
            layer += positions * self.heads * _FLOAT + batch * tokens * tokens * entry  # log-sum-exp, padding mask
        embedding = positions * (self.hidden * (_FLOAT + (mask if not half or cuda else _FLOAT) * (self.dropouts > 0)) + 20)
        return self.layers * layer + embedding + (2 * self.linear if half else 0)

    def temporaries(self, batch: int, tokens: int, device: str, precision: torch.dtype) -> tuple[int, int]:
        """What the forward and the backward pass hold for an instant beside all saved tensors."""
        half = precision == torch.bfloat16
        hidden = batch * tokens * self.hidden * _FLOAT
        wide = batch * tokens * self.feed_forward * (2 if half else _FLOAT)
        weight = self.hidden * self.feed_forward * _FLOAT
        forward = 9 * hidden // 2 if half else 2 * hidden  # the last layer's end and the pooling
        backward = max(2 * hidden, wide + weight)  # the last layer's: its end, or its feed-forward part
        if not self.fused or (self.attention_dropout and device == "cpu"):
            attention = batch * self.heads * tokens * tokens * _FLOAT
            # by then the layer's later tensors are gone, or not there yet
            backward = max(backward, attention - 2 * wide - (1 if half else 3) * hidden + 2 * weight)
            forward = max(forward, attention - 2 * wide - 4 * hidden if half else 0)
        return forward, backward


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
    biases (and the bottleneck's projection); other: the auxiliary branch with its moments, and the label order of groups.
    baseline: the process (or on CUDA the libraries' workspaces) before anything is built, as measured; 0 where unknown.
    """

    baseline: int
    encoder: int
    encoder_optimizer: int
    head_weights: int
    indices: int
    head_optimizer: int
    other: int
    phases: dict[str, Phase] = field(default_factory=dict)

    @property
    def resident(self) -> int:
        """What stays from step to step."""
        own = self.encoder + self.encoder_optimizer + self.head_weights + self.indices + self.head_optimizer
        return self.baseline + own + self.other

    @property
    def phase(self) -> str:
        """The phase in which the peak comes."""
        return max(self.phases, key=lambda name: self.phases[name].total)

    @property
    def peak(self) -> int:
        return self.resident + self.phases[self.phase].total

    def parts(self) -> dict[str, int]:
        """Bytes by part at the peak; they sum to it. buffers: gradients, temporaries and `other`."""
        at_peak = self.phases[self.phase]
        sizes = {name: getattr(self, name) for name in PARTS if name not in ("activations", "buffers")}
        buffers = at_peak.gradients + at_peak.temporaries + self.other
        sizes |= {"activations": at_peak.activations, "buffers": buffers}
        return {name: sizes[name] for name in PARTS}


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
) -> Plan:
    """Plan a training step of micro-batches [B, T] on `labels` labels.

    head: the head's settings, config.head unless given; precision: float32, or bfloat16 for autocast; device: cpu or cuda.
    """
    head = head or config.head
    width = encoder.width(config)
    features = head.intermediate or width
    layer = head.intermediate * (width + 1)
    trained = encoder.parameters + layer
    sizes = head_bytes(head, labels, features, momentum=config.train.momentum > 0)
    meta = min(config.clusters.meta_labels, labels) if config.auxiliary.enabled else 0

    embedding = _FLOAT * batch * width * (2 if config.encoder.dropout else 1)
    tail = embedding + _FLOAT * batch * features * (2 if head.activation == "relu" and head.intermediate else 1)
    activations = encoder.saved(batch, tokens, device, precision) + tail
    forward, backward = encoder.temporaries(batch, tokens, device, precision)
    order = 0 if head.group == 1 else 12 if device == "cpu" else 4  # int32, and its inverse as int64 on the host
    branch = 2 * _FLOAT * batch * meta  # targets and logits
    waiting = _FLOAT * trained if config.train.accumulation > 1 else 0  # gradients of earlier micro-batches
    gradients = _FLOAT * (trained + meta * (width + 1))
    phases = {
        "forward": Phase(activations=activations, gradients=waiting, temporaries=forward),
        "head": Phase(
            activations=activations, gradients=waiting, temporaries=step_buffers(head, labels, features, batch, device)
        ),
        "backward": max(  # at its beginning or at its end
            Phase(activations=activations, gradients=waiting, temporaries=backward + branch),
            Phase(gradients=gradients),
            key=lambda phase: phase.total,
        ),
        "update": Phase(gradients=gradients),  # fused: no temporaries
    }
    if head.kind == "fixed_fan_in" and config.rewiring.method != "none":
        rewire = rewire_buffers(head, labels, features, batch, config.rewiring.method, config.rewiring.prune)
        phases["rewire"] = Phase(temporaries=rewire + tail)
    return Plan(
        baseline=baseline,
        encoder=_FLOAT * trained,
        encoder_optimizer=2 * _FLOAT * trained,
        head_weights=sizes["weights"] + sizes["bias"],
        indices=sizes["indices"],
        head_optimizer=sizes["optimizer"],
        other=3 * _FLOAT * meta * (width + 1) + labels * ((8 if meta else 0) + order),
        phases=phases,
    )


def head_bytes(head: HeadSettings, labels: int, features: int, *, momentum: bool) -> dict[str, int]:
    """What `heads.Head.bytes` gives for this head, without building it."""
    entry = STORED[head.dtype].itemsize
    weights, indices = labels * features, 0
    if head.kind == "bottleneck":
        weights = head.bottleneck * (labels + features)
    elif head.kind == "fixed_fan_in":
        weights = labels * head.fan_in
        indices = -(-labels // head.group) * head.fan_in * index_dtype(features).itemsize
    state = _FLOAT if entry >= _FLOAT else 2
    compensation = 2 * weights if head.rounding == "kahan" and entry < _FLOAT else 0
    return {
        "weights": entry * weights,
        "indices": indices,
        "bias": _FLOAT * labels,
        "optimizer": (state * weights + _FLOAT * labels if momentum else 0) + compensation,
    }


def step_buffers(head: HeadSettings, labels: int, features: int, batch: int, device: str = "cpu") -> int:
    """What `heads.Head.step` allocates at its highest."""
    if head.kind == "fixed_fan_in":
        return kernels.step_bytes(
            head.backend, device, labels=labels, features=features, fan_in=head.fan_in, group=head.group, batch=batch
        )
    reads = head.bottleneck if head.kind == "bottleneck" else features
    chunk = min(max((2**18 if device == "cpu" else 2**24) // batch, 256), 2**16, labels)
    vectors = 2 * _FLOAT * batch * reads * (2 if head.kind == "bottleneck" else 1)  # x and dx, features first; y = P x, dy
    logits = _FLOAT * chunk * batch
    return vectors + 2 * logits  # the loss's values beside them


def rewire_buffers(head: HeadSettings, labels: int, features: int, batch: int, method: str, prune: str) -> int:
    """What `heads.FixedFanIn.rewire` allocates at its highest, for one chunk of index rows."""
    total, whole = -(-labels // head.group), max(2**22 // (features * head.group), 1)
    rows = min(whole, total)
    entries, members = rows * head.fan_in, rows * head.fan_in * head.group
    # the new indices in order, then for each label where its weights come from, and they themselves
    moving = 35 * entries if head.group == 1 else 17 * entries + 13 * members
    if method == "rigl":
        choosing = 17 * entries + _FLOAT * batch * features * (3 if batch > 64 else 2)  # x, features first
    else:
        choosing = 35 * entries + _FLOAT * rows * features  # random scores
    highest = max(moving, choosing)
    return max(highest, 20 * 2**16) if prune == "global" else highest  # its histogram


def random_encoder(config: Any) -> nn.Module:
    """A Hugging Face encoder with random weights, built as `fanin.encoder` loads it: no pooler, evaluation mode."""
    loader: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    try:
        model = loader.from_config(config, add_pooling_layer=False)
    except TypeError as error:
        if "add_pooling_layer" not in str(error):
            raise
        model = loader.from_config(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model.eval()
