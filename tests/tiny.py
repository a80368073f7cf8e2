"""A random two-layer BERT and a small corpus, built in a temporary folder: what a test needs of an encoder, in milliseconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from fanin.data.tokens import TokenSet, write_tokens

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [first + second + third for first in "bdgklmnp" for second in "aeiou" for third in ("", "n", "r", "s", "t")]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over 200 made-up words, with BERT's special tokens around each text."""
    vocabulary = {token: number for number, token in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def tiny_encoder_folder(folder: Path, *, dropout: float = 0.0, seed: int = 0) -> Path:
    """Write a Hugging Face folder (hidden 32, 2 layers, 4 heads, 64 positions) to folder/encoder and return its path."""
    path = folder / "encoder"
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(config, add_pooling_layer=False).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def tiny_texts(documents: int, seed: int = 0, longest: int = 20) -> list[str]:
    """Texts of 1 to `longest` words, the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest + 1))) for _ in range(documents)]


def tiny_labels(documents: int, labels: int, seed: int = 0, most: int = 4) -> list[list[int]]:
    """One to `most` sorted label ids a document, frequent labels first (Zipf), every label at least once where it can be."""
    rng = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, labels + 1)
    weights /= weights.sum()
    drawn = [set(rng.choice(labels, rng.integers(1, most + 1), p=weights).tolist()) for _ in range(documents)]
    for label in range(labels):
        drawn[label % documents].add(label)
    return [sorted(chosen) for chosen in drawn]


def tiny_token_set(path: Path, documents: int = 200, labels: int = 30, seed: int = 0, rows_a_batch: int = 64) -> TokenSet:
    """A token set of `tiny_texts` and `tiny_labels` at `path`, written through the library's own writer."""
    table = pa.table(
        {
            "text": pa.array(tiny_texts(documents, seed), pa.string()),
            "labels": pa.array(tiny_labels(documents, labels, seed), pa.list_(pa.int32())),
        }
    )
    write_tokens(table.to_batches(), path, tiny_tokenizer(), max_length=32, rows_a_batch=rows_a_batch)
    return TokenSet.open(path)
