from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fanin.data.tokens import TokenSet
from fanin.retrieval import rank
from tiny import tiny_token_set

LABELS = 30


class StandIn(nn.Module):
    """A classifier that adds up its tokens' rows of a table, under dropout; it notes the batches that it is shown."""

    def __init__(self, labels: int = LABELS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(300, labels, generator=generator))
        self.dropout = nn.Dropout(0.5)
        self.labels = labels
        self.tokenizer = SimpleNamespace(pad_token_id=7)
        self.device = torch.device("cpu")
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.asked: list[int] = []

    def scores(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.dropout(self.table[ids]) * mask[..., None]).sum(1)

    def topk(self, ids: torch.Tensor, mask: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append((ids, mask))
        self.asked.append(k)
        return self.scores(ids, mask).topk(k, dim=1)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TokenSet:
    return tiny_token_set(Path(tmp_path_factory.mktemp("tokens")) / "test.arrow", documents=90, labels=LABELS)


def expected(classifier: StandIn, tokens: TokenSet, rows, k: int, filtered=()) -> tuple[np.ndarray, np.ndarray]:
    """One document at a time, all its scores sorted."""
    labels, values = [], []
    for row in rows:
        ids = torch.from_numpy(tokens.ids(np.array([row]))[0].astype(np.int64))[None]
        scores = StandIn.scores(classifier.eval(), ids, torch.ones_like(ids))[0].detach().numpy().copy()
        for document, label in filtered:
            if document == row:
                scores[label] = -np.inf
        order = np.argsort(-scores, kind="stable")[:k]
        order = np.where(scores[order] == -np.inf, -1, order)
        labels.append(order)
        values.append(np.where(order < 0, -np.inf, scores[order]))
    return np.array(labels), np.array(values)


def check(found, wanted) -> None:
    assert found[0].dtype == np.int32
    assert found[1].dtype == np.float32
    np.testing.assert_array_equal(found[0], wanted[0])
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_rows_come_back_in_the_order_given_with_their_own_best_labels(tokens, batch):
    rows = np.random.default_rng(0).permutation(90)[:50]
    rows = np.concatenate([rows, rows[:3]])  # a row asked for twice
    classifier = StandIn()
    check(rank(classifier, tokens, rows, 5, batch), expected(classifier, tokens, rows, 5))


def test_documents_are_batched_by_length_with_little_padding(tokens):
    classifier = StandIn()
    rank(classifier, tokens, np.arange(90), 5, 10)
    widths = [ids.shape[1] for ids, _ in classifier.seen]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == tokens.lengths.max()
    for ids, mask in classifier.seen:
        assert mask.bool().any(0).all()  # padded to the longest of the batch, not beyond
        assert (ids[mask == 0] == 7).all()


def test_filtered_pairs_are_left_out_and_the_next_best_move_up(tokens):
    rng = np.random.default_rng(1)
    classifier = StandIn()
    rows = rng.permutation(90)[:40]
    best, _ = expected(classifier, tokens, rows, 3)
    pairs = [(int(rows[0]), int(label)) for label in best[0]]  # all of its best three
    pairs += [(int(rng.integers(90)), int(rng.integers(LABELS))) for _ in range(200)]
    pairs += pairs[:5]  # named twice
    filtered = tuple(np.array(column) for column in zip(*pairs, strict=True))
    found = rank(classifier, tokens, rows, 5, 8, (filtered[0], filtered[1]))
    check(found, expected(classifier, tokens, rows, 5, pairs))
    assert not set(best[0]) & set(found[0][0])
    for row, labels in zip(rows, found[0], strict=True):
        assert not {(row, label) for label in labels} & set(pairs)


def test_no_more_labels_are_asked_for_than_the_filter_can_take(tokens):
    classifier = StandIn()
    rows = np.arange(90)
    filtered = (np.array([4, 4, 4, 60]), np.array([0, 1, 2, 3]))
    rank(classifier, tokens, rows, 5, 1, filtered)
    assert sorted(classifier.asked) == [5] * 88 + [6, 8]
    classifier.asked.clear()
    rank(classifier, tokens, rows, 5, 10, (np.zeros(0, np.int32), np.zeros(0, np.int32)))
    assert set(classifier.asked) == {5}


def test_where_labels_run_out_the_places_stay_empty(tokens):
    classifier = StandIn()
    pairs = [(3, label) for label in range(LABELS - 2)]
    filtered = (np.array([3] * len(pairs), dtype=np.int32), np.array([label for _, label in pairs], dtype=np.int32))
    found = rank(classifier, tokens, np.arange(6), 4, 3, filtered)
    check(found, expected(classifier, tokens, np.arange(6), 4, pairs))
    assert found[0][3].tolist()[2:] == [-1, -1]
    wide = rank(classifier, tokens, np.arange(6), LABELS + 3, 3)
    assert (wide[0][:, LABELS:] == -1).all()
    assert np.isneginf(wide[1][:, LABELS:]).all()
    assert (np.sort(wide[0][:, :LABELS], axis=1) == np.arange(LABELS)).all()


def test_dropout_is_off_and_the_mode_is_put_back(tokens):
    classifier = StandIn().train()
    first = rank(classifier, tokens, np.arange(20), 5, 8)
    assert classifier.training
    assert classifier.dropout.training
    np.testing.assert_array_equal(first[0], rank(classifier, tokens, np.arange(20), 5, 8)[0])
    classifier.eval()
    rank(classifier, tokens, np.arange(2), 5, 8)
    assert not classifier.training


def test_the_mode_is_put_back_when_ranking_fails(tokens):
    classifier = StandIn().train()

    def fail(done: int) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        rank(classifier, tokens, np.arange(20), 5, 8, progress=fail)
    assert classifier.training


def test_progress_counts_every_document_once(tokens):
    done: list[int] = []
    rank(StandIn(), tokens, np.arange(25), 5, 10, progress=done.append)
    assert done == [10, 10, 5]


def test_no_rows_give_empty_rankings(tokens):
    labels, scores = rank(StandIn(), tokens, np.zeros(0, dtype=np.int64), 5, 10)
    assert labels.shape == scores.shape == (0, 5)
