"""The synthetic corpus: what it promises of labels and texts, that it is the same however it is cut, and its errors."""

from __future__ import annotations

import re
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from fanin.config import Config, check
from fanin.data import synthetic
from fanin.data.corpus import build_corpus, open_source
from fanin.data.sources import Document
from fanin.data.synthetic import Synthetic
from fanin.files import InputError

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"{first}{vowel}{last}" for first in "bdfgklmnprstvz" for vowel in "aeiou" for last in "bdfgklmnprstvz"]


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """980 made-up words: parsing WordNet anew for every test would take most of the time."""
    monkeypatch.setattr(synthetic, "vocabulary", lambda path: sorted(WORDS))


def make(labels: int = 600, documents: int = 3000, mean: int = 4, seed: int = 1, test: int = 300) -> Synthetic:
    sizes = {"labels": labels, "documents": documents, "test_documents": test, "labels_per_document": mean}
    return Synthetic(Path("synsets.parquet"), **sizes, seed=seed)


def frequency(documents: list[Document], labels: int) -> np.ndarray:
    return np.bincount(np.concatenate([own for _, own in documents]), minlength=labels)


@pytest.mark.parametrize(
    ("labels", "documents", "mean"),
    [(600, 3000, 4), (5000, 1000, 6), (5000, 1000, 7), (2, 2, 2), (7, 5, 3), (5, 4097, 2), (20_000, 50, 401), (999, 1000, 2)],
)
def test_every_label_has_a_document_where_documents_suffice(labels: int, documents: int, mean: int) -> None:
    found = list(make(labels, documents, mean).train())
    assert len(found) == documents
    assert all(own == sorted(set(own)) and own and own[0] >= 0 and own[-1] < labels for _, own in found)
    seen = int((frequency(found, labels) > 0).sum())
    assert documents * (mean - 1) >= labels
    assert seen == labels
    assert all(text.strip() == text and text for text, _ in found)


def test_too_few_documents_show_as_many_labels_as_they_can() -> None:
    found = list(make(labels=10_000, documents=500, mean=6).train())
    assert 500 * 5 <= (frequency(found, 10_000) > 0).sum() < 10_000


@pytest.mark.parametrize(("labels", "documents", "mean"), [(20_000, 10_000, 5), (20_000, 2_000, 20), (300, 6_000, 3)])
def test_labels_a_document(labels: int, documents: int, mean: int) -> None:
    source = make(labels, documents, mean)
    for part in (source.train(), source.test()):
        sizes = [len(own) for _, own in part]
        assert 0.8 * mean < np.mean(sizes) <= 1.05 * mean  # below: what is drawn twice counts once
        assert max(sizes) < 4 * mean


def test_frequencies_fall_like_zipf_with_a_long_tail() -> None:
    labels, documents = 20_000, 40_000
    counts = np.sort(frequency(list(make(labels, documents, 5).train()), labels))[::-1]
    rank = np.geomspace(100, 10_000, 30).astype(int)
    slope = np.polyfit(np.log(rank), np.log(counts[rank]), 1)[0]
    assert -1.3 < slope < -0.7
    straight = np.corrcoef(np.log(rank), np.log(counts[rank]))[0, 1]
    assert straight < -0.95
    assert 0.0005 < counts[0] / documents < 0.05
    assert (counts <= 5).mean() > 0.4
    assert (counts == 1).mean() > 0.05


def test_labels_of_a_cluster_occur_together() -> None:
    """Of two labels of one document, another document with the first has the second far more often than by chance."""
    labels = 2000
    found = [set(own) for _, own in make(labels, 8000, 5).train()]
    counts = np.bincount([label for own in found for label in own], minlength=labels)
    pairs = Counter((a, b) for own in found for a in own for b in own if a != b)
    expected = np.array([counts[a] * counts[b] / len(found) for a, b in pairs])
    observed = np.array(list(pairs.values()))
    # the mean number of shared documents of the pairs seen, weighted by their documents, against independent labels
    assert (observed @ observed) / observed.sum() > 4 * (observed @ expected) / observed.sum()


def test_text_tells_labels() -> None:
    """Naive Bayes on words ranks labels of unseen documents far better than their frequencies do."""
    labels, words = 600, {word: number for number, word in enumerate(sorted(WORDS))}
    source = make(labels, 6000, 4, test=500)
    train, test = list(source.train()), list(source.test())
    seen = np.ones((labels, len(words))) * 0.02
    for text, own in train:
        for word in text.split():
            seen[own, words[word]] += 1
    counts = frequency(train, labels)
    score = np.log(seen / seen.sum(1, keepdims=True))
    hits = [np.argmax(np.log(counts + 1) + score[:, [words[w] for w in text.split()]].sum(1)) in own for text, own in test]
    chance = np.mean([counts.argmax() in own for _, own in test])
    assert chance < 0.15
    assert np.mean(hits) > max(0.3, 4 * chance)


def test_the_same_however_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = make()
    expected = [list(whole.train()), list(whole.test()), list(whole.labels())]
    monkeypatch.setattr(synthetic, "CHUNK", 17)
    pieces = make()
    assert [list(pieces.train()), list(pieces.test()), list(pieces.labels())] == expected
    assert list(pieces.train()) == expected[0]  # again, from the same object
    assert list(make(seed=2).train()) != expected[0]


def test_train_and_test_differ_but_are_alike() -> None:
    source = make(labels=2000, documents=3000, mean=4, test=3000)
    train, test = list(source.train()), list(source.test())
    assert not {text for text, _ in train} & {text for text, _ in test}
    a, b = frequency(train, 2000), frequency(test, 2000)
    assert np.corrcoef(a, b)[0, 1] > 0.8


def test_label_names_are_unique_words() -> None:
    names = list(make(labels=50_000, documents=50_000).labels())
    assert len(set(names)) == len(names) == 50_000
    assert all(re.fullmatch("[a-z]{3} [a-z]{3}", name) for name in names)


def test_memory_does_not_grow_with_the_corpus() -> None:
    peaks = []
    for labels, documents in ((10_000, 10_000), (100_000_000, 100_000_000)):
        source = make(labels, documents, 5)
        tracemalloc.start()
        for part in (source.train(), source.test(), source.labels()):
            assert sum(1 for _ in islice(part, 9000)) >= 300
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 32 * 2**20


@pytest.mark.parametrize("count", [1, 2, 3, 8, 999, 4096, 2_812_281])
def test_spread_is_a_permutation(count: int) -> None:
    found = synthetic._spread(np.arange(count), count)
    assert np.array_equal(np.sort(found), np.arange(count))


def test_spread_of_a_billion_stays_within_int64() -> None:
    count = 10**9
    places = np.array([0, 1, count - 1])
    step = int(synthetic._spread(np.array([1]), count)[0])
    assert synthetic._spread(places, count).tolist() == [place * step % count for place in places.tolist()]


def test_uniform_numbers_are_uniform_and_streams_are_apart() -> None:
    source = make()
    a = source._uniform(np.arange(20_000), 3)
    b = source._uniform(np.arange(20_000), 4)
    table = source._uniform(np.arange(2000)[:, None], 3, np.arange(10))
    for found in (a, b, table.ravel()):
        assert np.histogram(found, 20, (0, 1))[0] == pytest.approx([1000] * 20, abs=150)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(table[:, 0], table[:, 1])[0, 1]) < 0.08
    assert np.array_equal(table[:, 0], source._uniform(np.arange(2000), 3))


def test_as_a_corpus_of_the_corpus_stage(tmp_path: Path) -> None:
    config = Config(preset="synthetic")
    config.corpus.format, config.corpus.labels, config.corpus.documents = "synthetic", 500, 1000
    config.corpus.test_documents, config.corpus.labels_per_document = 100, 3
    raw = tmp_path / "raw" / "synthetic"
    (tmp_path / "raw" / "wordnet").mkdir(parents=True)
    (tmp_path / "raw" / "wordnet" / "synsets.parquet").write_bytes(b"words")
    facts = build_corpus(config, raw, tmp_path / "corpus")
    expected = {"name": "synthetic-500", "labels": 500, "train_documents": 1000, "test_documents": 100}
    assert expected.items() <= facts.items()
    assert pq.read_table(tmp_path / "corpus" / "labels.parquet")["frequency"].to_numpy().min() >= 1
    config.corpus.labels = 501
    assert build_corpus(config, raw, tmp_path / "corpus")["checksum"] != facts["checksum"]


def test_words_come_from_the_bundled_wordnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    config = Config(preset="synthetic")
    config.corpus.format = "synthetic"
    text, _ = next(open_source(config.corpus, ROOT / "data/raw/synthetic").train())
    found = synthetic.vocabulary(ROOT / "data/raw/wordnet/synsets.parquet")
    assert {"dog", "justice", "walk"} <= set(found)
    assert set(text.split()) <= set(found)
    assert len(found) == len(set(found)) > 40_000
    with pytest.raises(InputError, match=r"synsets\.parquet is missing; corpus\.format synthetic takes its words from it"):
        synthetic.vocabulary(tmp_path / "synsets.parquet")
    (tmp_path / "synsets.parquet").write_bytes(b"no parquet")
    with pytest.raises(InputError, match=r"synsets\.parquet is broken"):
        synthetic.vocabulary(tmp_path / "synsets.parquet")


@pytest.mark.parametrize(
    ("name", "value"), [("labels", 1), ("documents", 1), ("test_documents", 0), ("labels_per_document", 1), ("labels", 10**10)]
)
def test_impossible_sizes_are_named(name: str, value: int) -> None:
    config = Config()
    setattr(config.corpus, name, value)
    with pytest.raises(InputError, match=rf"corpus\.{name}: {value} is outside"):
        check(config)
