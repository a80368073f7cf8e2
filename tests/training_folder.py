"""A small project folder to train in: tokens, clusters and a random start, through the library's own writers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file

from fanin.config import Auxiliary, Config, Encoder, Head, Rewiring, Start, Tokens, Train
from fanin.training import train
from tiny import tiny_encoder_folder, tiny_token_set

LABELS, DOCUMENTS = 60, 160


def small_config(encoder: Path) -> Config:
    """40 steps with everything on: rewiring until step 26, the auxiliary objective until step 20, dropout, accumulation."""
    return Config(
        tokens=Tokens(max_length=32),
        encoder=Encoder(name=str(encoder), dropout=0.2),
        start=Start(source="random"),
        head=Head(fan_in=6, intermediate=48),
        rewiring=Rewiring(method="rigl", amount=0.3, interval=4),
        auxiliary=Auxiliary(enabled=True, cutoff=2.0),
        train=Train(
            epochs=4.0,
            batch=7,
            accumulation=2,
            warmup=5,
            precision="fp32",
            device="cpu",
            log_every=1,
            validate_every=10,
            validation_documents=20,
            checkpoint_every=5,
        ),
    )


def prepare(folder: Path) -> Config:
    """Write data/ under `folder`; the config that fits it."""
    data = folder / "data"
    tokens = tiny_token_set(make(data / "tokens") / "train.arrow", DOCUMENTS, LABELS)
    description = {"documents": {"train": len(tokens), "test": 0}, "label_documents": 0, "labels": LABELS, "pad_id": 0}
    (data / "tokens" / "tokens.json").write_text(json.dumps(description))
    np.save(make(data / "clusters") / "order.npy", np.random.default_rng(3).permutation(LABELS).astype(np.int32))
    np.save(data / "clusters" / "meta.npy", (np.arange(LABELS) % 8).astype(np.int32))
    save_file({}, make(data / "start") / "head.safetensors")
    texts = pa.table({"id": pa.array(range(LABELS), pa.int32()), "text": [f"label {i}" for i in range(LABELS)]})
    pq.write_table(texts, make(data / "corpus") / "labels.parquet")
    return small_config(tiny_encoder_folder(folder, dropout=0.1))


def train_in(folder: Path, config: Config, name: str = "run", log=lambda metrics, step: None) -> dict:
    """Train on folder/data; models, reports and checkpoints go to folder/<name>."""
    data, out = folder / "data", folder / name
    return train(
        copy.deepcopy(config),
        tokens_folder=data / "tokens",
        clusters_folder=data / "clusters",
        start_folder=data / "start",
        labels=data / "corpus" / "labels.parquet",
        models=out / "models",
        reports=out / "reports",
        checkpoints=out / "checkpoints",
        log=log,
    )


def make(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path
