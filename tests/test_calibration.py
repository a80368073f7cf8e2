"""Calibration: that the fit finds what was put in, leaves alone what it cannot know, and is folded into the head exactly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fanin import calibration
from fanin.calibration import Shift, calibrate, fit
from fanin.config import Config
from fanin.heads import STORED, Bottleneck, Dense, FixedFanIn, HeadTail, sparse_part
from fanin.lexical import NORM, Lexical
from fanin.metrics import contributions, csr, inverse_propensity, match
from fanin.ranks import ALONE

LABELS, WIDTH, DOCUMENTS, VOCABULARY, WORDS = 60, 16, 300, 40, 3


def candidates(documents: int, shift: Shift, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Logits whose chance to be right is the sigmoid of what `shift` makes of them."""
    rng = np.random.default_rng(seed)
    scores, words = rng.normal(-1, 2, (documents, 20)), rng.normal(0, 1, (documents, 20)) ** 2
    frequency = np.round(np.exp(rng.uniform(0, 6, (documents, 20)))).astype(np.int64)
    hits = rng.random((documents, 20)) < 1 / (1 + np.exp(-shift.apply(scores, words, frequency)))
    return scores, words, frequency, hits


def test_the_fit_finds_the_shift_that_there_is():
    true = Shift(words=1.6, log_frequency=-0.3, rare=-2.0, slope=0.6, slope_log_frequency=0.14)
    data = candidates(20_000, true)
    found = fit(*data)
    middle = true.slope + true.slope_log_frequency * np.log(data[2]).mean()  # a fit is known up to a factor of all logits
    expected = [1 + (true.words - 1) / middle, *(value / middle for value in true[1:5])]
    np.testing.assert_allclose(found[:5], expected, atol=0.06)
    assert found.rarest == 0.5  # as there are enough of the rarest


def test_calibrated_logits_are_left_alone():
    np.testing.assert_allclose(fit(*candidates(20_000, Shift())), Shift(), atol=0.06)


def test_what_cannot_be_known_is_left_alone():
    scores, words, frequency, hits = candidates(50, Shift())
    assert fit(scores, words, frequency, np.zeros_like(hits)) == Shift()
    assert fit(np.full_like(scores, 2.0), words, frequency, hits) == Shift()
    assert fit(-scores, words, frequency, scores > 0) == Shift()  # the worst first: no shift mends that
    alone = fit(scores, np.zeros_like(words), np.full_like(frequency, 7), hits)  # neither words nor frequencies to tell apart
    assert (alone.words, alone.log_frequency, alone.rare, alone.slope_log_frequency) == (1, 0, 0, 0)


def test_labels_that_were_never_candidates_do_not_count():
    scores, words, frequency, hits = candidates(500, Shift(log_frequency=0.5))
    wide = [np.concatenate([part, part[:, :3]], 1) for part in (scores, words, frequency, hits)]
    wide[0][:, 20:] = -np.inf  # fewer labels than places
    assert fit(*wide) == fit(scores, words, frequency, hits)


def test_labels_rarer_than_the_candidates_are_not_lifted_above_them():
    """Where only frequent labels are ranked, a term in 1/n fitted on them says nothing of labels of one document."""
    scores, words, _, _ = candidates(1000, Shift())
    rng = np.random.default_rng(5)
    frequency = rng.integers(100, 700, scores.shape)
    frequency[:2] = 1  # a tenth of a per cent of them
    hits = rng.random(scores.shape) < 1 / (1 + np.exp(-(scores + 900 / frequency - 4)))
    found = fit(scores, words, frequency, hits)
    assert 100 <= found.rarest < 120
    highest = found.gains(frequency[2:]).max()
    assert found._replace(rarest=0.5).gains(np.array([1])) > highest + 20  # what the formula would make of one document
    assert found.gains(np.array([1])) < highest + 0.5
    np.testing.assert_array_equal(found.gains(np.array([0, 1, 50])), found.gains(np.full(3, found.rarest)))
    np.testing.assert_array_equal(found.slopes(np.array([0, 1, 50])), found.slopes(np.full(3, found.rarest)))


def test_a_shift_can_be_gone_partway():
    whole = Shift(words=1.8, log_frequency=-0.4, rare=-3.0, slope=0.6, slope_log_frequency=0.1, rarest=2.0)
    scores, words, frequency, _ = candidates(100, Shift())
    assert whole.partway(0.0) == Shift(rarest=2.0)
    np.testing.assert_allclose(whole.partway(1.0), whole)
    half = whole.partway(0.5).apply(scores, words, frequency)
    np.testing.assert_allclose(half, (scores + whole.apply(scores, words, frequency)) / 2, atol=1e-12)


def test_few_documents_move_little():
    """With five documents the prior decides: a coefficient goes no further than a few of its standard deviations."""
    found = fit(*candidates(5, Shift(rare=-50.0)))
    assert -50 < found.rare < 0


class _Tokens:
    """Documents of three tokens each, with one to three labels."""

    def __init__(self, labels: list[np.ndarray]) -> None:
        rng = np.random.default_rng(3)
        self._ids = rng.integers(0, VOCABULARY, (len(labels), 3))
        self._labels = labels
        self.lengths = np.full(len(labels), 3, np.int32)

    def __len__(self):
        return len(self.lengths)

    def ids(self, rows):
        return list(self._ids[rows])

    def labels(self, rows):
        return [self._labels[row] for row in rows]


def classifier(kind: str, group: int, dtype: str, lexical: bool):
    """What `calibrate` asks of a classifier: here a document's features are a function of its tokens."""
    generator = torch.Generator().manual_seed(0)
    words = Lexical(VOCABULARY) if lexical else None
    if words is not None:
        words.idf.uniform_(0.5, 3, generator=generator)
    if kind == "dense":
        head = Dense(LABELS, WIDTH, "bce", generator, dtype=STORED[dtype], rounding="kahan")
    elif kind == "bottleneck":
        head = Bottleneck(LABELS, WIDTH, 8, "bce", generator)
    else:
        extra = {"lexical": WORDS, "vocabulary": VOCABULARY} if lexical else {}
        extra |= {"dtype": STORED[dtype], "rounding": "kahan"}
        width, fan_in = WIDTH + VOCABULARY * lexical, 6 + WORDS * lexical
        if kind == "split":
            head = HeadTail(LABELS, width, 9, fan_in, "bce", generator, **extra)
        else:
            head = FixedFanIn(LABELS, width, fan_in, group, "bce", generator, **extra)
        sparse = sparse_part(head)
        if lexical:
            value = torch.rand(sparse.labels, WORDS, generator=generator) * (2 / NORM)
            sparse.weight[:, 6:] = value.to(sparse.weight.dtype)
    for _, part in head.parts():
        part.bias.uniform_(-3, -1, generator=generator)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator)
    order = np.random.default_rng(1).permutation(LABELS) if group > 1 or kind == "split" else None

    def features(ids, mask):
        inner = (table[ids] * mask[:, :, None]).sum(1)
        return inner if words is None else torch.cat([inner, words(ids, mask)], 1)

    def topk(ids, mask, k):
        scores, rows = head.topk(features(ids, mask), k)
        return scores, rows if order is None else torch.from_numpy(order)[rows]

    own = SimpleNamespace(head=head, lexical=words, label_order=order, ranks=ALONE, device=torch.device("cpu"), labels=LABELS)
    own.config = Config()
    own.label_rows = None if order is None else np.argsort(order)
    own.topk, own.features, own.training = topk, features, False
    own.eval = lambda: own
    own.train = lambda mode: own
    own.tokenizer = SimpleNamespace(pad_token_id=0)
    return own


@pytest.mark.parametrize("lexical", [False, True])
@pytest.mark.parametrize(
    ("kind", "group", "dtype"),
    [
        ("fixed", 1, "fp32"),
        ("fixed", 4, "fp32"),
        ("fixed", 1, "bf16"),
        ("fixed", 4, "fp8"),
        ("dense", 1, "fp32"),
        ("bottleneck", 1, "fp32"),
        ("split", 1, "fp32"),
    ],
)
def test_the_head_gives_the_shifted_logits(monkeypatch, kind, group, dtype, lexical):
    if lexical and kind not in ("fixed", "split"):
        pytest.skip("reads no words")
    rng = np.random.default_rng(0)
    tokens = _Tokens([np.unique(rng.integers(0, LABELS, rng.integers(1, 4))).astype(np.int32) for _ in range(DOCUMENTS)])
    frequency = rng.integers(0, 200, LABELS)
    own = classifier(kind, group, dtype, lexical)
    rows = np.arange(40, DOCUMENTS)
    ids = torch.from_numpy(tokens._ids[:40])
    mask = torch.ones_like(ids)
    x = own.features(ids, mask)
    before = own.head.logits(x, 0, LABELS).numpy()
    silent = x.clone()
    silent[:, WIDTH:] = 0
    words = before - own.head.logits(silent, 0, LABELS).numpy()
    shift = Shift(words=1.4, log_frequency=-0.2, rare=-1.5, slope=0.8, slope_log_frequency=0.05, rarest=2.0)
    whole = Shift(words=1.8, log_frequency=-0.4, rare=-3.0, slope=0.6, slope_log_frequency=0.1, rarest=2.0)
    asked = {}
    monkeypatch.setattr(calibration, "fit", lambda *given: asked.update(given=given) or whole)
    monkeypatch.setattr(calibration, "_gain", lambda *given: (0.2, 0.1))  # labels are random here

    found = calibrate(own, tokens, rows, frequency)

    names = np.arange(LABELS) if own.label_order is None else own.label_order
    expected = shift.apply(before.astype(np.float64), words.astype(np.float64), frequency[names][None].repeat(40, 0))
    tolerance = {"fp32": 1e-4, "bf16": 0.05, "fp8": 0.6}[dtype]
    np.testing.assert_allclose(own.head.logits(x, 0, LABELS).numpy(), expected, atol=tolerance)
    assert (found["words"], found["kept"]) == (pytest.approx(1.4), 1)
    scores, part, own_frequency, hits = asked["given"]
    assert scores.shape == (260, calibration.FITTED)
    assert hits.sum() > 0
    assert part.any() == lexical
    # the part of words is that of the very candidates
    labels = own.topk(torch.from_numpy(tokens._ids[rows]), torch.ones(260, 3, dtype=torch.int64), 1)[1]
    assert own_frequency.shape == labels.expand(-1, calibration.FITTED).shape


@pytest.mark.parametrize(("gain", "kept"), [(0.5, 1), (-0.29, 1), (-0.31, 0)])
def test_a_loss_that_chance_explains_does_not_undo_a_shift(monkeypatch, gain, kept):
    own, tokens = classifier("fixed", 1, "fp32", False), _Tokens([np.array([0], np.int32)] * DOCUMENTS)
    monkeypatch.setattr(calibration, "fit", lambda *given: Shift(log_frequency=1.0))
    monkeypatch.setattr(calibration, "_gain", lambda *given: (gain, 0.3))
    before = own.head.bias.clone()
    found = calibrate(own, tokens, np.arange(DOCUMENTS), np.full(LABELS, 9))
    assert (found["kept"], found["gain"], found["gain_error"]) == (kept, gain, 0.3)
    assert torch.equal(own.head.bias, before) == (not kept)


def test_a_gain_is_the_judges_and_its_error_that_of_resampled_documents():
    rng = np.random.default_rng(0)
    frequency, documents = rng.integers(1, 50, LABELS), 400
    owned = [np.unique(rng.integers(0, LABELS, rng.integers(1, 9))).astype(np.int32) for _ in range(documents)]
    inverse = inverse_propensity(frequency, documents, 0.55, 1.5)
    ranked = np.stack([rng.permutation(LABELS)[:10] for _ in range(documents)])
    then = np.sort(ranked, axis=1)

    def of(rows):
        own = csr([owned[row] for row in rows])
        return [contributions(order[rows], match(order[rows], *own), *own, inverse) for order in (ranked, then)]

    before, after = of(np.arange(documents))
    gain, error = calibration._gain(before, after)
    assert gain == pytest.approx(sum(after.values()[name] - before.values()[name] for name in calibration.JUDGES), abs=1e-4)
    drawn = [calibration._gain(*of(rng.integers(0, documents, documents)))[0] for _ in range(300)]
    assert error == pytest.approx(np.std(drawn), rel=0.15)


def test_documents_without_labels_tell_nothing():
    empty = csr([np.zeros(0, np.int32)] * 3)
    ranked = np.tile(np.arange(5), (3, 1))
    same = contributions(ranked, match(ranked, *empty), *empty, np.ones(5))
    assert calibration._gain(same, same) == (0.0, 0.0)


@pytest.mark.parametrize("right", ["afterwards", "before", "always"])
def test_a_shift_is_undone_where_documents_rank_worse(monkeypatch, right):
    """It puts labels of one document behind all others: what came first then comes last, whose place a frequent one takes."""
    own = classifier("fixed", 1, "fp32", False)
    ids = torch.from_numpy(_Tokens([np.array([0], np.int32)] * DOCUMENTS)._ids)
    first = own.topk(ids, torch.ones_like(ids), 1)[1][:, 0].numpy()
    frequency = np.where(np.isin(np.arange(LABELS), first), 1, 100)
    shift = Shift(log_frequency=100.0)
    then = (own.head.logits(own.features(ids, torch.ones_like(ids)), 0, LABELS).numpy() + shift.gains(frequency)).argmax(1)
    chosen = {"afterwards": then[:, None], "before": first[:, None], "always": np.tile(np.arange(LABELS), (DOCUMENTS, 1))}
    tokens = _Tokens(list(chosen[right].astype(np.int32)))
    monkeypatch.setattr(calibration, "fit", lambda *given: shift)
    weight, bias = own.head.weight.clone(), own.head.bias.clone()

    few = calibrate(own, tokens, np.arange(calibration.FEWEST - 1), frequency)
    assert few["kept"] == 0
    assert torch.equal(own.head.bias, bias)

    found = calibrate(own, tokens, np.arange(calibration.FEWEST), frequency)

    assert found["kept"] == (right == "afterwards")
    assert torch.equal(own.head.bias, bias) == (right != "afterwards")
    assert torch.equal(own.head.weight, weight)  # which this shift leaves alone
    if right == "always":  # as precise, but by labels that are easier
        assert found["after P@5"] == found["before P@5"] == pytest.approx(100)
        assert found["after PSP@5"] < found["before PSP@5"]


def test_words_part_is_that_of_the_candidates():
    rng = np.random.default_rng(0)
    tokens = _Tokens([np.array([0], np.int32)] * DOCUMENTS)
    for group in (1, 4):
        own = classifier("fixed", group, "fp32", True)
        rows = np.arange(DOCUMENTS)
        labels = rng.integers(0, LABELS, (DOCUMENTS, 5))
        ids = torch.from_numpy(tokens._ids)
        x = own.features(ids, torch.ones_like(ids))
        x[:, :WIDTH] = 0
        names = np.arange(LABELS) if own.label_order is None else own.label_order
        all_words = np.empty((DOCUMENTS, LABELS), np.float32)
        all_words[:, names] = (own.head.logits(x, 0, LABELS) - own.head.bias).numpy()
        expected = np.take_along_axis(all_words, labels, 1)
        np.testing.assert_allclose(calibration._words_part(own, tokens, rows, labels), expected, atol=1e-5)


def test_rare_labels_that_promise_too_much_are_put_in_their_place():
    """Ranked by logits alone, labels of one document push out the right ones; calibrated on some documents, others gain."""
    rng = np.random.default_rng(2)
    frequency = np.where(np.arange(LABELS) < 30, 1, 100)
    right = rng.integers(30, LABELS, 2000)
    scores = rng.normal(0, 1, (2000, LABELS)) + 3 * (frequency == 1)
    scores[np.arange(2000), right] += 3
    hits = np.arange(LABELS)[None] == right[:, None]
    every = frequency[None].repeat(2000, 0)
    shift = fit(scores[:1000], np.zeros((1000, LABELS)), every[:1000], hits[:1000])
    after = shift.apply(scores[1000:], np.zeros((1000, LABELS)), every[1000:])
    assert (scores[1000:].argmax(1) == right[1000:]).mean() < 0.3
    assert (after.argmax(1) == right[1000:]).mean() > 0.7
