"""Embeddings of a sample of the training documents, on disk, for the label clusters and the head's start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from fanin.config import Config
from fanin.data.batches import collate, split
from fanin.data.tokens import TokenSet
from fanin.devices import choose_device
from fanin.encoder import Encoder, choose_precision
from fanin.files import InputError, atomic_path, read_json, write_json

LEVELS = 4  # documents that each label is given, where it has them and the budget holds them
ENOUGH = 30000  # where they are fewer than this, documents drawn at random make it up
_CHUNK = 16384  # documents looked at together
_TOKENS_A_BATCH = {"cpu": 768, "cuda": 32768}  # on a CPU small enough for the caches: twice as fast as ten times as many
_CHOICE_STREAM = 0xC0FE  # keeps the choice's random numbers apart from the split's for the same seed


def choose_documents(tokens: TokenSet, rows: np.ndarray, budget: int, labels: int, seed: int) -> np.ndarray:
    """At most `budget` of `rows` (ascending int64), as many of the `labels` labels covered as a greedy pass can.

    Pass n (of `LEVELS`) takes a document where one of its labels has fewer than n documents yet, those with the rarest
    labels (largest sum of 1 / frequency) first: they cover labels that hardly another document has, and the frequent
    ones on the way. Where these are fewer than `ENOUGH`, others are drawn at random up to that. The same arguments give
    the same documents.
    """
    if len(rows) <= min(budget, ENOUGH):
        return np.sort(np.asarray(rows, np.int64))
    rng = np.random.default_rng([seed, _CHOICE_STREAM])
    order = rng.permutation(np.asarray(rows, np.int64))  # decides among equally rare documents
    frequency = tokens.label_frequency(order, labels)
    order = order[np.argsort(-_rarity(tokens, frequency)[order], kind="stable")]
    covered = np.zeros(labels, np.int64)
    taken = np.zeros(len(order), bool)
    left = budget
    for level in range(1, LEVELS + 1):
        wanted = np.minimum(frequency, level)
        for start in range(0, len(order), _CHUNK):
            if not left or (covered >= wanted).all():
                break
            places = start + np.flatnonzero(~taken[start : start + _CHUNK])
            found = tokens.labels(order[places])
            for place, own in _needed(places, found, covered < wanted):
                if left and (covered[own] < level).any():  # an earlier document of this chunk may have covered them
                    covered[own] += 1
                    taken[place] = True
                    left -= 1
    left = min(left, max(ENOUGH - int(taken.sum()), 0))
    taken[rng.choice(np.flatnonzero(~taken), left, replace=False)] = True
    return np.sort(order[taken])


def embed(
    encoder: Encoder,
    tokens: TokenSet,
    rows: np.ndarray,
    path: str | Path,
    *,
    pad_id: int,
    precision: torch.dtype = torch.float32,
    desc: str = "embeddings",
) -> np.ndarray:
    """Write the embeddings of `rows`, in their order, as [N, D] float16 to the .npy file `path`; return it memory-mapped.

    Runs where the encoder is, in evaluation mode, by batches of about equal length. Raises InputError where an
    embedding is not finite in float16, naming the row; then no file is left.
    """
    rows = np.asarray(rows, np.int64)
    device = next(encoder.parameters()).device
    training = encoder.training
    encoder.eval()
    try:
        with (
            atomic_path(path) as temporary,
            tqdm(total=len(rows), desc=desc, unit="doc", disable=None) as bar,
            torch.inference_mode(),
            torch.autocast(device.type, precision, enabled=precision != torch.float32),
        ):
            shape = (len(rows), encoder.width)
            out = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
            for places in _by_length(tokens.lengths[rows], _TOKENS_A_BATCH["cuda" if device.type == "cuda" else "cpu"]):
                ids, mask = collate(tokens.ids(rows[places]), pad_id)
                found = encoder(ids.to(device), mask.to(device)).half().cpu().numpy()
                finite = np.isfinite(found).all(axis=1)
                if not finite.all():
                    row = rows[places[~finite][0]]
                    raise InputError(
                        f"{tokens.path}, row {row}: its embedding is not finite in float16; "
                        "use an encoder (encoder.name) whose weights are whole, or train.precision fp32"
                    )
                out[places] = found
                bar.update(len(places))
            out.flush()
            del out
    finally:
        encoder.train(training)
    return np.load(path, mmap_mode="r")


def embed_corpus(
    config: Config, tokens_folder: str | Path = "data/tokens", out: str | Path = "data/embeddings"
) -> dict[str, Any]:
    """Embed the chosen training documents and the held-out ones into the folder `out`; return its embeddings.json."""
    about = read_json(Path(tokens_folder) / "tokens.json")
    tokens = TokenSet.open(Path(tokens_folder) / "train.arrow")
    own = len(tokens) - about["label_documents"]  # the labels' own texts follow the documents and are never held out
    train_rows, validation_rows = split(own, config.train.held_out(own), config.seed)
    train_rows = np.concatenate([train_rows, np.arange(own, len(tokens))])
    chosen = choose_documents(tokens, train_rows, config.encoder.embed_documents, about["labels"], config.seed)

    device = choose_device(config.train.device)
    settings = config.encoder
    encoder = Encoder.load(settings.name, settings.pooling, settings.layers, settings.dropout).to(device)
    how: dict[str, Any] = {"pad_id": about["pad_id"], "precision": choose_precision(config.train.precision, device)}
    with atomic_path(out, directory=True) as folder:
        np.save(folder / "documents.npy", chosen)
        np.save(folder / "validation_documents.npy", validation_rows)
        embed(encoder, tokens, chosen, folder / "embeddings.npy", **how)
        embed(encoder, tokens, validation_rows, folder / "validation.npy", desc="validation", **how)
        summary = {
            "documents": len(chosen),
            "validation_documents": len(validation_rows),
            "width": encoder.width,
            "covered_labels": int((tokens.label_frequency(chosen, about["labels"]) > 0).sum()),
            "precision": str(how["precision"]).removeprefix("torch."),
        }
        write_json(folder / "embeddings.json", summary)
    return summary


def _rarity(tokens: TokenSet, frequency: np.ndarray) -> np.ndarray:
    """[N] float32: the sum of 1 / frequency over each document's labels."""
    rarity = np.zeros(len(tokens), np.float32)
    for documents, found in tokens.label_pairs():
        first = documents[0] if documents.size else 0
        sums = np.bincount(documents - first, weights=1 / np.maximum(frequency[found], 1))
        rarity[first : first + len(sums)] += sums
    return rarity


def _needed(places: np.ndarray, found: list[np.ndarray], wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The places, with their labels, of the documents that have a wanted label."""
    if not found:
        return
    owner = np.repeat(np.arange(len(found)), [len(own) for own in found])
    for i in np.unique(owner[wanted[np.concatenate(found)]]).tolist():
        yield places[i], found[i]


def _by_length(lengths: np.ndarray, tokens_a_batch: int) -> Iterator[np.ndarray]:
    """Positions of documents of about equal length, as many as `tokens_a_batch` padded tokens hold, the longest first.

    Documents are sorted in windows of `_CHUNK`, which keeps the pages that a batch reads and writes close together.
    """
    for start in range(0, len(lengths), _CHUNK):
        places = start + np.argsort(-lengths[start : start + _CHUNK], kind="stable")
        while places.size:
            size = max(1, tokens_a_batch // int(lengths[places[0]]))
            yield places[:size]
            places = places[size:]
