"""A whole classifier: encoder, optional intermediate layer, head; as one folder on disk."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fanin import __version__
from fanin.config import Config
from fanin.data.batches import collate
from fanin.encoder import Encoder
from fanin.files import InputError, atomic_path, read_json
from fanin.heads import Head, build_head

_CPU_TOKENS = 768  # padded tokens encoded at once: beyond it, activations leave the cache


class Classifier(nn.Module):
    """Texts in, ranked labels out.

    order: [L] int32, the label id of each row of the head, or None where rows are label ids.
    precision: what the encoder computes in (torch.float32, or torch.bfloat16 through autocast).
    """

    def __init__(
        self, config: Config, encoder: Encoder, intermediate: nn.Linear | None, head: Head, order: Tensor | None
    ) -> None:
        super().__init__()
        self.order: Tensor | None
        self.config, self.encoder, self.intermediate, self.head = config, encoder, intermediate, head
        self.register_buffer("order", order)
        self.precision = torch.float32
        self.label_texts: LabelTexts | None = None

    @classmethod
    def build(cls, config: Config, labels: int, order: np.ndarray | None = None, encoder: Encoder | None = None) -> Classifier:
        """A classifier with a random head, as `config` describes it; deterministic given config.seed.

        order: [L], the labels in the order of the cluster tree; used where labels share index rows (head.group > 1).
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
        head = build_head(config.head, labels, width, generator)
        rows = None
        if config.head.group > 1:
            if order is None:
                raise InputError(
                    "head.group: labels that share features need the order of the clusters stage; run it (dvc repro clusters)"
                )
            rows = torch.from_numpy(np.array(order, dtype=np.int32))
        return cls(config, encoder, intermediate, head, rows)

    @property
    def tokenizer(self) -> Any:
        return self.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        return self.head.bias.device

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T] -> the encoder's embedding [B, D] float32."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16):
            embedding = self.encoder(ids, mask)
        return embedding.float()

    def project(self, embedding: Tensor) -> Tensor:
        """Embedding [B, D] -> what the head reads [B, D'] (in float32: the start from data has large entries)."""
        if self.intermediate is None:
            return embedding
        features = self.intermediate(embedding)
        return torch.relu(features) if self.config.head.activation == "relu" else features

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask [B, T] -> what the head reads [B, D'] float32."""
        return self.project(self.embed(ids, mask))

    @torch.inference_mode()
    def topk(self, ids: Tensor, mask: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """ids, mask [B, T] -> (logits [B, k], label ids [B, k] int64), highest first."""
        parts = [self.features(ids[rows, :longest], mask[rows, :longest]) for rows, longest in self._parts(mask)]
        scores, rows = self.head.topk(torch.cat(parts), k)
        return scores, rows if self.order is None else self.order[rows].to(torch.int64)

    def _parts(self, mask: Tensor) -> Iterator[tuple[slice, int]]:
        """Runs of documents that a CPU encodes fastest (they stay in its cache), each cut to its longest; a GPU takes all."""
        lengths = mask.sum(1).tolist()
        if self.device.type != "cpu":
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
        """Texts -> (ids, mask) [B, T] on the classifier's device, cut to tokens.max_length."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self.config.tokens.max_length)
        ids, mask = collate([np.asarray(row) for row in encoded["input_ids"]], self.tokenizer.pad_token_id or 0)
        return ids.to(self.device), mask.to(self.device)

    def load_start(self, path: Path) -> None:
        """Take head and intermediate layer from what the start stage wrote; keep the random ones where it holds none."""
        state = _tensors(path)
        if state:
            self._load_layers(state, str(path))

    def layers_state(self) -> dict[str, Tensor]:
        """The head's tensors and the intermediate layer's under `intermediate.`."""
        state = self.head.model_state()
        if self.intermediate is not None:
            state |= {f"intermediate.{key}": value for key, value in self.intermediate.state_dict().items()}
        return {key: value.detach().contiguous() for key, value in state.items()}

    def _load_layers(self, state: dict[str, Tensor], source: str) -> None:
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

    def save(self, folder: str | Path, labels: str | Path) -> None:
        """Write the model as a folder that needs nothing else of the project; `labels` is the corpus's labels.parquet."""
        with atomic_path(folder, directory=True) as temporary:
            self.encoder.save(temporary / "encoder")
            state = self.layers_state()
            if self.order is not None:
                state["order"] = self.order
            save_file(state, temporary / "head.safetensors")
            LabelTexts.write(labels, temporary / LabelTexts.FILE)
            description = {
                "config": dataclasses.asdict(self.config),
                "labels": self.head.labels,
                "features": self.head.width,
                "width": self.encoder.width,
                "head_bytes": self.head.bytes(),
                "versions": {"fanin": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
            (temporary / "fanin.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Classifier:
        """A trained classifier from its folder, ready to rank. Raises InputError where the folder is not whole."""
        folder = Path(folder)
        description = read_json(folder / "fanin.json")
        try:
            config: Config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), description["config"]))  # type: ignore[assignment]
        except Exception as error:
            raise InputError(f"{folder / 'fanin.json'}: written by another version of fanin ({error}); train again") from None
        settings = config.encoder
        encoder = Encoder.load(str(folder / "encoder"), settings.pooling, settings.layers, settings.dropout)
        state = _tensors(folder / "head.safetensors")
        order = state.pop("order", None)
        classifier = cls.build(config, description["labels"], None if order is None else order.numpy(), encoder)
        classifier._load_layers(state, str(folder / "head.safetensors"))
        classifier.label_texts = LabelTexts(folder / LabelTexts.FILE)
        return classifier.to(device).eval()


class LabelTexts:
    """Label texts by id: an uncompressed Arrow file, memory-mapped, so that millions of them take no memory of their own."""

    FILE = "labels.arrow"

    def __init__(self, path: str | Path) -> None:
        try:
            self._texts: pa.ChunkedArray = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"]
        except (FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
            raise InputError(f"{path}: not a readable table of label texts ({error}); rerun the train stage") from None

    @staticmethod
    def write(labels: str | Path, path: str | Path) -> None:
        """Copy the texts of `labels`, a corpus's labels.parquet, to `path`, a batch of rows at a time.

        Raises InputError where `labels` is missing or not such a table.
        """
        schema = pa.schema([("text", pa.large_string())])
        try:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer, pq.ParquetFile(labels) as source:
                source.schema_arrow.field("text")
                for batch in source.iter_batches(batch_size=2**16, columns=["text"]):
                    writer.write_batch(pa.record_batch([batch["text"].cast(pa.large_string())], schema))
        except (FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
            raise InputError(f"{labels}: not a readable table of label texts ({error}); rerun the corpus stage") from None

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, label: int) -> str:
        return self._texts[int(label)].as_py()


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt"):
            pass
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the stage that writes it (dvc repro)") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); rerun the stage that writes it") from None
