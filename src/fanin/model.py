"""A whole classifier: encoder, optional intermediate layer, head; as one folder on disk."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fanin import __version__
from fanin.config import Config
from fanin.data.batches import collate
from fanin.encoder import Encoder
from fanin.files import InputError, atomic_path, read_json
from fanin.heads import Head, build_head
from fanin.label_texts import LabelTexts
from fanin.lexical import Lexical, lexical_sizes
from fanin.profiles import Profiles
from fanin.ranks import ALONE, Ranks
from fanin.rewiring import check_index
from fanin.tensor_file import create_tensors, write_rows

_LEXICAL = "lexical."
_CPU_TOKENS = 768  # padded tokens encoded at once: beyond it, activations leave the cache


class Classifier(nn.Module):
    """Texts in, ranked labels out.

    order: int32, the label id of each of this rank's rows of the head, or None where rows are label ids; label_order: the
    whole order [L], on the host.
    precision: what the encoder computes in (torch.float32, or torch.bfloat16 through autocast).
    ranks: the processes that share the head's labels; each calls every method at the same time as the others.
    """

    def __init__(
        self,
        config: Config,
        encoder: Encoder,
        intermediate: nn.Linear | None,
        head: Head,
        order: Tensor | None,
        ranks: Ranks = ALONE,
        lexical: Lexical | None = None,
    ) -> None:
        super().__init__()
        self.order: Tensor | None
        self.config, self.encoder, self.intermediate, self.head = config, encoder, intermediate, head
        self.lexical = lexical
        self.ranks = ranks
        self.label_order: np.ndarray | None = None
        self.register_buffer("order", order)
        self.precision = torch.float32
        self.label_texts: LabelTexts | None = None

    @classmethod
    def build(
        cls,
        config: Config,
        labels: int,
        order: np.ndarray | None = None,
        encoder: Encoder | None = None,
        ranks: Ranks = ALONE,
        drawn: bool = True,
    ) -> Classifier:
        """A classifier with a random head, as `config` describes it; deterministic given config.seed.

        drawn: false where a state is loaded right afterwards, so that no sparse rows are drawn only to be replaced.
        order: [L], the label of each row, as `label_order.label_order` gives it; needed where rows are not label ids.
        Raises InputError naming the setting that does not fit the encoder.
        """
        settings = config.encoder
        if encoder is None:
            encoder = Encoder.load(settings.name, settings.pooling, settings.layers, settings.dropout)
        if settings.hidden_dropout is not None:
            encoder.set_hidden_dropout(settings.hidden_dropout)
        if settings.checkpointing:
            encoder.set_checkpointing()
        generator = torch.Generator().manual_seed(config.seed)
        width = encoder.width
        intermediate = None
        if config.head.intermediate:
            intermediate = nn.Linear(width, config.head.intermediate)
            bound = (6 / width) ** 0.5 if config.head.activation == "relu" else (3 / width) ** 0.5
            nn.init.uniform_(intermediate.weight, -bound, bound, generator=generator)
            nn.init.zeros_(intermediate.bias)
            width = config.head.intermediate
        sparse = config.head.kind == "fixed_fan_in"
        group = config.head.group if sparse else 1
        if labels < group * ranks.size:
            raise InputError(
                f"train.processes: {labels} labels in groups of {group} cannot be shared by {ranks.size} processes; use fewer"
            )
        profiles, words = lexical_sizes(config.head, encoder.vocabulary, width, labels)
        lexical = Lexical(words, profiles, config.head.profiles) if words else None
        read = profiles + words
        head = build_head(config.head, labels, width + read, generator, ranks.share(labels, group), read, profiles, drawn)
        rows = None
        if config.head.ordered:
            if order is None:
                raise InputError(f"head.kind, head.group: the rows of this {config.head.kind} head need their labels' order")
            rows = torch.from_numpy(np.array(order[head.first : head.first + head.labels], dtype=np.int32))
        classifier = cls(config, encoder, intermediate, head, rows, ranks, lexical)
        classifier.label_order = None if rows is None else order
        return classifier

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def profiles(self) -> Profiles | None:
        """The profiles of words, where the head reads any."""
        return self.lexical.profiles if self.lexical is not None else None

    @property
    def labels(self) -> int:
        """L, those of all ranks."""
        return self.head.whole

    @property
    def row_labels(self) -> np.ndarray:
        """[L], on the host: the label id of each of the head's rows."""
        return np.arange(self.labels) if self.label_order is None else self.label_order

    @property
    def label_rows(self) -> np.ndarray | None:
        """[L] int64, on the host: the head's row of each label id, or None where that is the id."""
        if self.label_order is None:
            return None
        rows = np.empty(len(self.label_order), dtype=np.int64)
        rows[self.label_order] = np.arange(len(rows))
        return rows

    @property
    def device(self) -> torch.device:
        return self.head.device

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T] -> the encoder's embedding [B, D] float32."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            embedding = self.encoder(ids, mask)
        return embedding.float()

    def project(self, embedding: Tensor) -> Tensor:
        """Embedding [B, D] -> the encoder's features [B, D'] (in float32: the start from data has large entries)."""
        if self.intermediate is None:
            return embedding
        features = self.intermediate(embedding)
        return torch.relu(features) if self.config.head.activation == "relu" else features

    def join(self, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The encoder's features [B, D'] and the tokens that they are of -> what the head reads [B, D' + C + V'], detached.

        A feature's values lie side by side, as kernels read them: turning 30,000 words round costs more than the step."""
        if self.lexical is None:
            return features.detach()
        joined = features.new_zeros(self.head.width, len(features)).t()
        joined[:, : features.shape[1]] = features.detach()
        self.lexical.write(joined[:, features.shape[1] :], ids, mask)
        return joined

    @torch.no_grad()
    def step_profiles(self, read: Tensor, gradient: Tensor, lr: float) -> None:
        """Have the profiles of words learn, where there are any; all ranks call this together.

        read [B, D' + C + V']: what the head read of this rank's documents; gradient [B, C]: what its step handed back for the
        profiles' features, times the factor of the head's own update.
        """
        profiles = self.profiles
        if profiles is None:
            return
        own = profiles.gradient(read[:, self.head.learnt :], gradient) if len(read) else torch.zeros_like(profiles.weight)
        self.ranks.sum_([own])
        profiles.step(own, lr, self.config.train.momentum)

    def prepare_training(self) -> None:
        """Allocate the state of what learns by the head's own rule."""
        momentum = self.config.train.momentum
        self.head.prepare_training(momentum)
        if self.profiles is not None:
            self.profiles.prepare_training(momentum)

    def finish_training(self) -> None:
        """Free it."""
        self.head.finish_training()
        if self.profiles is not None:
            self.profiles.prepare_training(0.0)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T] -> what the head reads [B, D' + C + V'] float32; no gradient."""
        return self.join(self.project(self.embed(ids, mask)), ids, mask)

    @torch.inference_mode()
    def topk(self, ids: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """ids, mask [B, T] -> (logits [B, k], label ids [B, k] int64), highest first."""
        first, last = self.ranks.share(len(ids))
        own_ids, own_mask = ids[first:last], mask[first:last]
        parts = [self.embed(own_ids[rows, :longest], own_mask[rows, :longest]) for rows, longest in self._parts(own_mask)]
        embedding = torch.cat(parts) if parts else torch.empty(0, self.encoder.width, device=self.device)
        features = self.join(self.project(embedding), own_ids, own_mask)
        features, few = self.ranks.gather(features, len(ids)), min(k, self.head.labels)
        scores, rows = self.head.topk(features, few)
        found = rows + self.head.first if self.order is None else self.order[rows].to(torch.int64)
        if self.ranks.size == 1:
            return scores, found
        scores, found = F.pad(scores, (0, k - few), value=-torch.inf), F.pad(found, (0, k - few))
        scores, found = (torch.cat(list(self.ranks.collect(part)), 1) for part in (scores, found))
        scores, place = scores.topk(k, dim=1)
        return scores, found.gather(1, place)

    def _parts(self, mask: Tensor) -> Iterator[tuple[slice, int]]:
        """Runs of documents that a CPU encodes fastest (they stay in its cache), each cut to its longest; a GPU takes all."""
        lengths = mask.sum(1).tolist()
        if self.device.type != "cpu" and lengths:
            yield slice(0, len(lengths)), max(lengths, default=0)
            return
        start = 0
        while start < len(lengths):
            stop, longest = start + 1, lengths[start]
            while stop < len(lengths) and max(longest, lengths[stop]) * (stop + 1 - start) <= _CPU_TOKENS:
                longest = max(longest, lengths[stop])
                stop += 1
            yield slice(start, stop), longest
            start = stop

    def encode(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Texts -> (ids, mask) [B, T] on the classifier's device, cut to tokens.max_length. Raises ValueError for no texts."""
        if not texts:
            raise ValueError("texts is empty; expected at least one")
        encoded = self.tokenizer(texts, truncation=True, max_length=self.config.tokens.max_length)
        ids, mask = collate([np.asarray(row) for row in encoded["input_ids"]], self.tokenizer.pad_token_id or 0)
        return ids.to(self.device), mask.to(self.device)

    def load_start(self, path: Path) -> None:
        """Take head and intermediate layer from what the start stage wrote; keep the random ones where it holds none."""
        state = _tensors(path, self.head)
        if state:
            self._load_layers(state, str(path))

    def layers_state(self) -> dict[str, Tensor]:
        """The head's tensors, the intermediate layer's under `intermediate.`, and those of words under `lexical.`."""
        state = self.head.model_state()
        if self.intermediate is not None:
            state |= {f"intermediate.{key}": value for key, value in self.intermediate.state_dict().items()}
        if self.lexical is not None:
            state |= {f"{_LEXICAL}{key}": value for key, value in self.lexical.state_dict().items() if "momentum" not in key}
        return {key: value.detach().contiguous() for key, value in state.items()}

    def _load_layers(self, state: dict[str, Tensor], source: str) -> None:
        self._load_words({key: state.pop(key) for key in sorted(state) if key.startswith(_LEXICAL)}, source)
        own = {key.removeprefix("intermediate."): value for key, value in state.items() if key.startswith("intermediate.")}
        self.head.load_model_state({k: v for k, v in state.items() if not k.startswith("intermediate.")}, source)
        if (self.intermediate is None) != (not own):
            raise InputError(
                f"{source}: its intermediate layer and head.intermediate do not agree; rerun the stage that writes it"
            )
        if self.intermediate is not None:
            if own["weight"].shape != self.intermediate.weight.shape:
                raise InputError(
                    f"{source}: intermediate.weight is {tuple(own['weight'].shape)}, but the settings and encoder ask for "
                    f"{tuple(self.intermediate.weight.shape)}; rerun the stage that writes it"
                )
            self.intermediate.load_state_dict(own)

    def _load_words(self, state: dict[str, Tensor], source: str) -> None:
        own = {k: v for k, v in self.layers_state().items() if k.startswith(_LEXICAL)}
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise InputError(
                f"{source}: its words do not agree with head.lexical and head.profiles; rerun the stage that writes it"
            )
        for key, value in state.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"{source}: {key} holds NaN or infinite values; rerun the stage that writes it")
        if self.lexical is not None and self.profiles is not None:
            try:
                check_index(state[f"{_LEXICAL}profiles.index"], self.lexical.words)
            except ValueError as error:
                raise InputError(f"{source}: profiles: {error}; rerun the stage that writes it") from None
        for key, value in state.items():
            own[key].copy_(value)

    def save(self, folder: str | Path, labels: str | Path) -> None:
        """Write the model as a folder that needs nothing else of the project; `labels` is the corpus's labels.parquet.

        Ranks write their own rows of the one file, so `folder` must be on a disk that all of them see.
        """
        head_bytes = self.head_bytes()
        if not self.ranks.leads:
            self._write_rows(Path(self.ranks.of_first("")))
            return
        with atomic_path(folder, directory=True) as temporary:
            self.encoder.save(temporary / "encoder")
            state = self.layers_state()
            if self.order is not None:
                state["order"] = self.order
            path = temporary / "head.safetensors"
            if self.ranks.size == 1:
                save_file(state, path)
            else:
                largest_first = sorted(state.items(), key=lambda item: -item[1].itemsize)  # so that all are aligned
                places = self.places()
                shapes = {k: (v.dtype, (places.get(k, (0, len(v)))[1], *v.shape[1:])) for k, v in largest_first}
                create_tensors(path, shapes)
                write_rows(path, {key: (0, value) for key, value in state.items() if key not in places})
                self._write_rows(Path(self.ranks.of_first(str(path))))
            LabelTexts.write(labels, temporary / LabelTexts.FILE)
            description = {
                "config": dataclasses.asdict(self.config),
                "labels": self.labels,
                "features": self.head.width,
                "width": self.encoder.width,
                "head_bytes": head_bytes,
                "precision": str(self.precision).removeprefix("torch."),
                "device": self.device.type,
                "versions": {"fanin": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
            (temporary / "fanin.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    def head_bytes(self) -> dict[str, int]:
        """`Head.bytes` of all ranks together, profiles of words with them."""
        own = self.head.bytes()
        sizes = {name: int(size) for name, size in zip(own, self.ranks.total(list(own.values())), strict=True)}
        profiles = self.profiles
        if profiles is not None:  # they are rows of labels too, which every rank holds
            for name, tensor in (("weights", profiles.weight), ("indices", profiles.index), ("optimizer", profiles.momentum)):
                sizes[name] += tensor.nbytes if tensor is not None else 0
        return sizes

    def places(self) -> dict[str, tuple[int, int]]:
        """Of the head's tensors and `order`, which row of the whole this rank's first one is, and the whole's rows."""
        return {
            name: self.head.place(name) for name in (*self.head.state_dict(), *(["order"] if self.order is not None else []))
        }

    def _write_rows(self, path: Path) -> None:
        """Put this rank's part of head and order into the file; go on when all have."""
        own = self.layers_state() | ({} if self.order is None else {"order": self.order})
        places = self.places()
        write_rows(path, {key: (places[key][0], value) for key, value in own.items() if key in places})
        self.ranks.wait()

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", ranks: Ranks = ALONE) -> Classifier:
        """A trained classifier from its folder, ready to rank. Raises InputError where the folder is not whole."""
        folder = Path(folder)
        description = read_json(folder / "fanin.json")
        try:
            config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), description["config"]))  # type: ignore[assignment]
        except Exception as error:
            raise InputError(f"{folder / 'fanin.json'}: written by another version of fanin ({error}); train again") from None
        settings = config.encoder
        encoder = Encoder.load(str(folder / "encoder"), settings.pooling, settings.layers, settings.dropout)
        path = folder / "head.safetensors"
        order = _tensors(path, only="order").get("order")
        rows = None if order is None else order.numpy()
        classifier = cls.build(config, description["labels"], rows, encoder, ranks, drawn=False)
        state = _tensors(path, classifier.head)
        state.pop("order", None)
        classifier._load_layers(state, str(path))
        classifier.label_texts = LabelTexts(folder / LabelTexts.FILE)
        return classifier.to(device).eval()


def holds_tensors(path: Path) -> bool:
    """Whether what the start stage wrote holds any: none where the start is random."""
    try:
        with safe_open(path, "pt") as file:
            return bool(file.keys())
    except (FileNotFoundError, SafetensorError):  # whoever reads it says what is wrong
        return False


def _tensors(path: Path, head: Head | None = None, only: str | None = None) -> dict[str, Tensor]:
    """The file's tensors by name, of those that `head` shares out its own part of the rows."""
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if only in (None, name)]  # noqa: SIM118 (it is no mapping)
            own = head.model_state() if head is not None else {}
            return {name: _rows(file, name, head, own.get(name)) for name in names}
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the stage that writes it (dvc repro)") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); rerun the stage that writes it") from None


def _rows(file: Any, name: str, head: Head | None, own: Tensor | None) -> Tensor:
    """Tensor `name`, or its rows that `own` is for. A whole one of another size comes as it is, for the caller to refuse."""
    if head is None or own is None or len(own) == head.place(name)[1]:
        return file.get_tensor(name)
    first, rows = head.place(name)
    part = file.get_slice(name)
    return part[first : first + len(own)] if part.get_shape()[0] == rows else file.get_tensor(name)
