"""Batches: every document once, an order that (seed, epoch) fixes, and exact resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fanin.data.batches import WINDOW, Batch, Batches, collate, enlarge, positives, split
from fanin.data.tokens import TokenSet
from fanin.files import InputError
from tiny import tiny_token_set


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> TokenSet:
    return tiny_token_set(tmp_path_factory.mktemp("tokens") / "t.arrow", documents=1003, labels=40)


def same(a: Batch, b: Batch) -> bool:
    pairs = zip((a.ids, a.mask, *a.positives), (b.ids, b.mask, *b.positives), strict=True)
    return np.array_equal(a.rows, b.rows) and all(torch.equal(x, y) for x, y in pairs)


def test_an_epoch_holds_every_row_once_and_one_partial_batch(tokens: TokenSet) -> None:
    rows = np.arange(3, 1003, 1)
    batches = Batches(tokens, rows, 7, seed=1, pad_id=0)
    epoch = list(batches.epoch(0))
    assert len(epoch) == len(batches) == 143
    assert sorted(np.concatenate([batch.rows for batch in epoch]).tolist()) == rows.tolist()
    assert sorted(len(batch.rows) for batch in epoch)[:2] == [1000 - 142 * 7, 7]


def test_a_batch_holds_what_the_token_set_holds(tokens: TokenSet) -> None:
    for batch in Batches(tokens, np.arange(1003), 16, seed=1, pad_id=9).epoch(0):
        ids, labels = tokens.ids(batch.rows), tokens.labels(batch.rows)
        longest = max(map(len, ids))
        assert batch.ids.shape == batch.mask.shape == (len(batch.rows), longest)
        assert batch.ids.dtype == batch.mask.dtype == torch.int64
        for i, row in enumerate(ids):
            assert batch.ids[i].tolist() == row.tolist() + [9] * (longest - len(row))
            assert batch.mask[i].tolist() == [1] * len(row) + [0] * (longest - len(row))
        pairs = sorted((label, i) for i, own in enumerate(labels) for label in own.tolist())
        assert list(zip(*(tensor.tolist() for tensor in batch.positives), strict=True)) == pairs


@pytest.mark.parametrize("skip", [0, 1, 50, 142, 143])
def test_skipping_gives_the_rest_of_the_same_epoch(tokens: TokenSet, skip: int) -> None:
    rows = np.arange(1000)
    whole = list(Batches(tokens, rows, 7, seed=5, pad_id=0).epoch(2))
    rest = list(Batches(tokens, rows, 7, seed=5, pad_id=0).epoch(2, skip))
    assert len(rest) == 143 - skip
    assert all(same(a, b) for a, b in zip(whole[skip:], rest, strict=True))


@pytest.mark.parametrize("skip", [-1, 144])
def test_skipping_past_the_epoch_is_an_error(tokens: TokenSet, skip: int) -> None:
    with pytest.raises(ValueError, match="143 batches"):
        next(Batches(tokens, np.arange(1000), 7, seed=5, pad_id=0).epoch(0, skip))


def test_seed_and_epoch_change_the_order(tokens: TokenSet) -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return next(Batches(tokens, np.arange(1000), 32, seed, pad_id=0).epoch(epoch)).rows.tolist()

    orders = {tuple(first(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len(orders) == 4
    assert first(1, 0) == first(1, 0)


def test_buckets_pad_little_but_mix_the_lengths(tokens: TokenSet) -> None:
    batches = list(Batches(tokens, np.arange(1000), 10, seed=1, pad_id=0).epoch(0))
    padded = sum(batch.ids.numel() for batch in batches)
    assert padded < 1.1 * tokens.lengths[:1000].sum()
    order, _ = Batches(tokens, np.arange(1000), 10, seed=1, pad_id=0).order(0)
    window = tokens.lengths[order[: WINDOW * 10]]
    assert (np.diff(window) >= 0).all()
    widths = [batch.ids.shape[1] for batch in batches]
    assert np.corrcoef(widths, np.arange(len(widths)))[0, 1] ** 2 < 0.1  # not short batches first


def test_label_rows_reorder_the_positives() -> None:
    labels = [np.array([0, 2], np.int32), np.array([1], np.int32), np.array([0, 3], np.int32)]
    found = positives(labels, label_rows=np.array([3, 1, 0, 2]))  # where the head keeps labels 0, 1, 2, 3
    assert found.labels.tolist() == [0, 1, 2, 3, 3]
    assert found.documents.tolist() == [0, 1, 2, 0, 2]
    assert found.labels.dtype == found.documents.dtype == torch.int64


def test_positives_of_documents_without_labels() -> None:
    found = positives([np.empty(0, np.int32), np.empty(0, np.int32)])
    assert found.labels.shape == found.documents.shape == (0,)


def test_collate_takes_plain_lists() -> None:
    ids, mask = collate([[5, 6, 7], [8]], pad_id=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_split_is_a_partition_that_the_seed_fixes() -> None:
    train, validation = split(1000, 100, seed=3)
    assert len(validation) == 100
    assert np.array_equal(np.union1d(train, validation), np.arange(1000))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    assert np.array_equal(split(1000, 100, seed=3)[1], validation)
    assert not np.array_equal(split(1000, 100, seed=4)[1], validation)
    assert len(split(10, 0, seed=1)[1]) == 0


def test_a_split_that_leaves_nothing_is_refused(tokens: TokenSet) -> None:
    with pytest.raises(InputError, match=r"train\.validation_documents: 1000 of only 1000"):
        split(1000, 1000, seed=1)
    with pytest.raises(InputError, match=r"train\.validation_documents"):
        Batches(tokens, np.empty(0, np.int64), 8, seed=1, pad_id=0)


def test_a_choice_is_enlarged_by_all_training_documents_or_by_some() -> None:
    chosen, held_out = np.array([3, 8, 20]), np.array([4, 9])
    every = enlarge(chosen, 40, held_out, 1000, seed=1)
    np.testing.assert_array_equal(every, np.setdiff1d(np.arange(40), held_out))
    some = enlarge(chosen, 40, held_out, 12, seed=1)
    assert (len(some), some.dtype) == (12, np.int64)
    assert np.isin(chosen, some).all()
    assert not np.isin(held_out, some).any()
    assert (np.diff(some) > 0).all()
    np.testing.assert_array_equal(enlarge(chosen, 40, held_out, 12, seed=1), some)
    assert not np.array_equal(enlarge(chosen, 40, held_out, 12, seed=2), some)
    np.testing.assert_array_equal(enlarge(chosen, 40, held_out, 2, seed=1), chosen)


def test_a_batch_moves_with_its_positives(tokens: TokenSet) -> None:
    moved = next(Batches(tokens, np.arange(50), 8, seed=1, pad_id=0).epoch(0)).to("meta")
    assert {moved.ids.device.type, moved.mask.device.type, moved.positives.labels.device.type} == {"meta"}


def test_a_short_epoch_has_one_batch(tmp_path: Path) -> None:
    small = tiny_token_set(tmp_path / "t.arrow", documents=3, labels=2)
    epoch = list(Batches(small, np.arange(3), 8, seed=1, pad_id=0).epoch(0))
    assert [len(batch.rows) for batch in epoch] == [3]
