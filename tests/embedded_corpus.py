"""A small embedded corpus on disk, as the tokens and embeddings stages leave it, for the tests of clusters and start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from fanin.files import write_json


def write_corpus(
    folder: Path,
    labels: list[list[int]],
    embeddings: np.ndarray,
    *,
    documents: np.ndarray,
    validation: np.ndarray,
    label_count: int,
) -> tuple[Path, Path]:
    """Write data/tokens and data/embeddings for documents with these label lists; return the two folders.

    embeddings [N, D] for all documents; `documents` and `validation` are the rows of them that are kept on disk.
    """
    tokens, embedded = folder / "tokens", folder / "embeddings"
    tokens.mkdir(parents=True)
    embedded.mkdir()
    table = {
        "ids": pa.array([[1, 2]] * len(labels), pa.large_list(pa.uint16())),
        "labels": pa.array(labels, pa.large_list(pa.int32())),
    }
    batch = pa.record_batch(table)
    with pa.ipc.new_file(tokens / "train.arrow", batch.schema) as writer:
        for start in range(0, len(labels), 64):
            writer.write_batch(pa.record_batch({k: v[start : start + 64] for k, v in table.items()}))
    write_json(tokens / "tokens.json", {"labels": label_count, "documents": {"train": len(labels), "test": 0}})
    np.save(embedded / "embeddings.npy", embeddings[documents].astype(np.float16))
    np.save(embedded / "documents.npy", documents.astype(np.int64))
    np.save(embedded / "validation.npy", embeddings[validation].astype(np.float16))
    np.save(embedded / "validation_documents.npy", validation.astype(np.int64))
    return tokens, embedded
