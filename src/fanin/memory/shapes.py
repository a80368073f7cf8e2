"""What the plan needs to know of a Hugging Face encoder, worked out from its config: sizes, saved tensors, temporaries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoModel, AutoModelForTextEncoding

from fanin.config import Config
from fanin.files import InputError

_FLOAT = 4  # weights and their gradients are float32


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

    def saved(self, batch: int, tokens: int, device: str, precision: torch.dtype, checkpointing: bool = False) -> int:
        """What autograd keeps of the encoder's forward pass at [B, T], weights not counted; checkpointing: of each layer its
        input alone."""
        half, cuda, positions = precision == torch.bfloat16, device != "cpu", batch * tokens
        mask = 1 if cuda else _FLOAT  # of the embeddings' dropout, which is float32
        embedding = positions * (self.hidden * (_FLOAT + mask * (self.dropouts > 0)) + 20)
        if checkpointing:
            return self.layers * positions * self.hidden * _FLOAT + embedding + positions * tokens
        return self.layers * self.layer(batch, tokens, device, precision) + embedding + (2 * self.linear if half else 0)

    def layer(self, batch: int, tokens: int, device: str, precision: torch.dtype) -> int:
        """What autograd keeps of one layer.

        That is the inputs of its linear layers and norms, q, k, v, the activation's input and output, and masks.
        Attention is fused, so of size B T, unless its dropout makes the CPU write out the weights [B, heads, T, T].
        """
        half = precision == torch.bfloat16
        cuda, entry = device != "cpu", 2 if half else _FLOAT
        written = not self.fused or (self.attention_dropout and not cuda)
        mask = 1 if cuda else entry  # a CPU keeps dropout's factors, CUDA one byte each
        positions = batch * tokens
        # float32: x, q, k, v, the attention's output, both norms' inputs, the first one's output; under autocast the
        # norms' inputs stay float32, x is cast for each of q, k and v, and a CPU's attention is float32
        wide = 0 if not half else 6 if written else 0 if cuda else 10
        hidden = (24 if half else 32) + self.dropouts * mask + wide
        layer = positions * self.hidden * hidden + 2 * entry * positions * self.feed_forward + 16 * positions
        if written:
            return layer + batch * self.heads * tokens * tokens * _FLOAT * (3 if self.attention_dropout else 1)
        padding = batch * tokens * tokens * (entry if cuda else _FLOAT)
        return layer + positions * self.heads * _FLOAT + padding  # and log-sum-exp

    def temporaries(
        self, batch: int, tokens: int, device: str, precision: torch.dtype, checkpointing: bool = False
    ) -> tuple[int, int]:
        """What the forward and the backward pass hold for an instant beside all saved tensors.

        With checkpointing the forward pass holds a layer's widest moment, and the backward pass a layer computed again.
        """
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
        if checkpointing:
            again = self.layer(batch, tokens, device, precision)
            casts = 2 * self.linear if half else 0  # autocast keeps its copies of weights until the pass ends
            widest = 2 * wide + 2 * hidden  # the feed-forward part
            if not self.fused or (self.attention_dropout and device == "cpu"):
                widest = max(widest, 3 * batch * self.heads * tokens * tokens * _FLOAT + 6 * hidden)
            return max(forward, widest) + casts, again + backward + casts // max(self.layers, 1)
        return forward, backward


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
