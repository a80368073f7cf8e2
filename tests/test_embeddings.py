"""The sample that is embedded, the embeddings on disk, and the stage around them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from fanin.config import Config
from fanin.data.batches import collate, split
from fanin.data.tokens import TokenSet, write_tokens
from fanin.embeddings import LEVELS, _by_length, choose_documents, embed, embed_corpus
from fanin.encoder import Encoder
from fanin.files import InputError, read_json, write_json
from tiny import tiny_encoder_folder, tiny_labels, tiny_texts, tiny_token_set, tiny_tokenizer

LABELS = 80


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return tiny_token_set(tmp_path_factory.mktemp("tokens") / "train.arrow", documents=2000, labels=LABELS)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return Encoder.load(tiny_encoder_folder(tmp_path_factory.mktemp("tiny")))


def counts(tokens: TokenSet, rows: np.ndarray) -> np.ndarray:
    return np.bincount(np.concatenate(tokens.labels(rows)), minlength=LABELS)


def token_set(path: Path, labels: list[list[int]]) -> TokenSet:
    table = pa.table({"text": tiny_texts(len(labels)), "labels": pa.array(labels, pa.list_(pa.int32()))})
    write_tokens(table.to_batches(), path, tiny_tokenizer(), max_length=32)
    return TokenSet.open(path)


def test_a_budget_for_all_takes_all(tokens: TokenSet) -> None:
    rows = np.arange(100, 2000)
    assert np.array_equal(choose_documents(tokens, rows, 1900, LABELS, seed=1), rows)


def test_the_choice_keeps_to_its_rows_and_its_budget(tokens: TokenSet) -> None:
    rows = np.arange(0, 2000, 2)
    chosen = choose_documents(tokens, rows, 400, LABELS, seed=1)
    assert len(chosen) == 400
    assert (np.diff(chosen) > 0).all()
    assert np.isin(chosen, rows).all()


def test_every_label_is_covered_up_to_the_levels(tokens: TokenSet) -> None:
    rows = np.arange(2000)
    chosen = choose_documents(tokens, rows, 400, LABELS, seed=1)
    assert (counts(tokens, chosen) >= np.minimum(counts(tokens, rows), LEVELS)).all()
    drawn = np.random.default_rng(0).choice(rows, 400, replace=False)
    assert (counts(tokens, drawn) >= np.minimum(counts(tokens, rows), LEVELS)).mean() < 1  # chance does not do it


@pytest.mark.parametrize("budget", [1900, 2000, 70_000])
@pytest.mark.parametrize("enough", [0, 700, 1200])
def test_a_large_budget_takes_what_covers_the_labels_or_is_enough(
    tokens: TokenSet, monkeypatch, enough: int, budget: int
) -> None:
    rows = np.arange(2000)
    monkeypatch.setattr("fanin.embeddings.ENOUGH", enough)
    chosen = choose_documents(tokens, rows, budget, LABELS, seed=1)
    monkeypatch.setattr("fanin.embeddings.ENOUGH", 0)
    needed = choose_documents(tokens, rows, budget, LABELS, seed=1)
    assert (counts(tokens, chosen) >= np.minimum(counts(tokens, rows), LEVELS)).all()
    assert len(chosen) == max(enough, len(needed))
    assert len(needed) < 700
    assert np.isin(needed, chosen).all()


def test_a_small_budget_covers_more_labels_than_chance(tokens: TokenSet) -> None:
    covered = (counts(tokens, choose_documents(tokens, np.arange(2000), 30, LABELS, seed=1)) > 0).sum()
    rng = np.random.default_rng(0)
    chance = [(counts(tokens, rng.choice(2000, 30, replace=False)) > 0).sum() for _ in range(20)]
    assert covered >= 60
    assert covered > max(chance)


def test_rare_labels_come_first_and_cover_the_frequent_ones_on_the_way(tmp_path: Path) -> None:
    labels = [[0]] * 50 + [[0, i] for i in range(1, 6)] + [[0]] * 50
    chosen = choose_documents(token_set(tmp_path / "t.arrow", labels), np.arange(105), 5, 6, seed=1)
    assert chosen.tolist() == [50, 51, 52, 53, 54]


def test_the_rest_is_random_and_the_seed_fixes_it(tokens: TokenSet) -> None:
    rows = np.arange(2000)
    first, again, other = (choose_documents(tokens, rows, 800, LABELS, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert 0.25 < (first < 1000).mean() < 0.75


def test_a_label_out_of_range_is_refused(tokens: TokenSet) -> None:
    with pytest.raises(InputError, match=r"label 79 is outside 0\.\.78"):
        choose_documents(tokens, np.arange(2000), 100, LABELS - 1, seed=1)


def test_batches_by_length_hold_every_document_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 40000)
    batches = list(_by_length(lengths, 512))
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(40000))
    assert max(len(places) * lengths[places].max() for places in batches) <= 512
    padded = sum(len(places) * lengths[places].max() for places in batches)
    assert padded < 1.02 * lengths.sum()
    assert [len(places) for places in _by_length(np.array([700, 3]), 512)] == [1, 1]  # one too long for any batch


def test_embeddings_come_in_the_order_of_the_rows(tokens: TokenSet, encoder: Encoder, tmp_path: Path) -> None:
    rows = np.array([7, 3, 1999, 3, *range(100, 300)])
    found = embed(encoder.train(), tokens, rows, tmp_path / "e.npy", pad_id=0)
    assert encoder.training  # as it was
    encoder.eval()
    assert isinstance(found, np.memmap)
    assert found.dtype == np.float16
    assert found.shape == (len(rows), 32)
    with torch.inference_mode():
        alone = torch.cat([encoder(*collate(tokens.ids(rows[i : i + 1]), 0)) for i in range(len(rows))])
    np.testing.assert_allclose(found, alone.numpy(), atol=2e-3)
    assert np.array_equal(np.load(tmp_path / "e.npy"), found)


def test_no_documents_give_an_empty_file(tokens: TokenSet, encoder: Encoder, tmp_path: Path) -> None:
    assert embed(encoder, tokens, np.empty(0, np.int64), tmp_path / "e.npy", pad_id=0).shape == (0, 32)


@pytest.mark.parametrize("value", [float("nan"), 1e6])  # the second is finite, but not in float16
def test_an_embedding_that_is_not_finite_is_refused(tokens: TokenSet, tmp_path: Path, value: float) -> None:
    broken = Encoder.load(tiny_encoder_folder(tmp_path))
    with torch.no_grad():
        broken.model.encoder.layer[-1].output.LayerNorm.bias[3] = value
    with pytest.raises(InputError, match=r"train\.arrow, row \d+: its embedding is not finite in float16"):
        embed(broken, tokens, np.arange(50), tmp_path / "e.npy", pad_id=0)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_the_stage_leaves_what_the_contract_says(tmp_path: Path) -> None:
    own, label_documents = 300, 20
    (tmp_path / "tokens").mkdir()
    tokens = token_set(tmp_path / "tokens" / "train.arrow", tiny_labels(own, 20) + [[i] for i in range(label_documents)])
    write_json(tmp_path / "tokens" / "tokens.json", {"labels": 20, "label_documents": label_documents, "pad_id": 0})
    config = Config(seed=3)
    config.encoder.name = str(tiny_encoder_folder(tmp_path))
    config.encoder.pooling, config.encoder.layers = "cls_layers", 2
    config.encoder.embed_documents, config.train.validation_documents, config.train.device = 120, 40, "cpu"
    summary = embed_corpus(config, tmp_path / "tokens", tmp_path / "embeddings")

    folder = tmp_path / "embeddings"
    read = {path.stem: np.load(path) for path in folder.glob("*.npy")}
    _, held_out = split(own, 40, seed=3)
    assert read["embeddings"].shape == (120, 64)
    assert read["validation"].shape == (40, 64)
    assert np.array_equal(read["validation_documents"], held_out)  # none of the label documents
    assert read["documents"].dtype == np.int64
    assert not np.isin(read["documents"], held_out).any()
    assert (np.diff(read["documents"]) > 0).all()
    assert summary == read_json(folder / "embeddings.json")
    assert (summary["documents"], summary["width"], summary["covered_labels"]) == (120, 64, 20)
    encoder = Encoder.load(config.encoder.name, "cls_layers", 2)
    with torch.inference_mode():
        for name, rows in (("embeddings", "documents"), ("validation", "validation_documents")):
            expected = encoder(*collate(tokens.ids(read[rows][:5]), 0))
            np.testing.assert_allclose(read[name][:5], expected.numpy(), atol=1e-1)  # auto may choose bf16
