from __future__ import annotations

import math

import numpy as np
import pytest

from fanin import metrics

LIST = list[list[int]]


def csr(true: LIST) -> tuple[np.ndarray, np.ndarray]:
    return metrics.csr([np.array(one, dtype=np.int32) for one in true])


def evaluate(ranked: LIST, true: LIST, inverse, groups=None, names=()) -> metrics.Contributions:
    predictions = np.array(ranked, dtype=np.int32)
    offsets, labels = csr(true)
    hits = metrics.match(predictions, offsets, labels)
    return metrics.contributions(predictions, hits, offsets, labels, np.asarray(inverse, float), groups, names)


class Plain:
    """The repository's definitions for one k, over dense lists and with Python loops: slow, and nothing shared."""

    def __init__(self, ranked: LIST, true: LIST, inverse: list[float], k: int) -> None:
        self.k, self.documents = k, len(ranked)
        self.hit = [[1.0 if label in set(own) else 0.0 for label in row[:k]] for row, own in zip(ranked, true, strict=True)]
        self.gain = [
            [h * inverse[label] for h, label in zip(hit, row, strict=False)] for hit, row in zip(self.hit, ranked, strict=True)
        ]
        # What an oracle would list: a document's own labels, the most valuable first.
        self.oracle = [sorted((inverse[label] for label in own), reverse=True)[:k] for own in true]
        self.sizes = [len(own) for own in true]

    def _precision(self, rows: list[list[float]]) -> float:
        return sum(sum(row) / self.k for row in rows) / self.documents

    def _ndcg(self, rows: list[list[float]]) -> float:
        total = 0.0
        for row, size in zip(rows, self.sizes, strict=True):
            dcg = sum(value / math.log2(place + 2) for place, value in enumerate(row))
            ideal = sum(1 / math.log2(place + 2) for place in range(min(self.k, size)))
            total += dcg / ideal if size else 0.0
        return total / self.documents

    def all(self) -> dict[str, float]:
        k = self.k
        recalls = [sum(row) / size if size else 0.0 for row, size in zip(self.hit, self.sizes, strict=True)]
        values = {f"recall@{k}": 100 * sum(recalls) / self.documents}
        if k <= 5:
            values[f"P@{k}"] = 100 * self._precision(self.hit)
            values[f"nDCG@{k}"] = 100 * self._ndcg(self.hit)
            values[f"PSP@{k}"] = 100 * self._precision(self.gain) / self._precision(self.oracle)
            values[f"PSnDCG@{k}"] = 100 * self._ndcg(self.gain) / self._ndcg(self.oracle)
        return values


def random_case(seed: int, documents: int, labels: int, width: int) -> tuple[LIST, LIST, np.ndarray]:
    """Rankings better than chance; some documents without labels, some with more than any k."""
    rng = np.random.default_rng(seed)
    ranked, true = [], []
    for _ in range(documents):
        own = rng.choice(labels, rng.choice([0, 1, 2, 4, 9]), replace=False)
        order = np.argsort(rng.random(labels) - 0.5 * np.isin(np.arange(labels), own))
        true.append(sorted(own.tolist()))
        ranked.append(order[:width].tolist())
    return ranked, true, rng.integers(0, 40, labels)


@pytest.mark.parametrize(("documents", "chunk"), [(1, 16384), (7, 3), (150, 16384), (150, 64)])
def test_every_metric_agrees_with_the_plain_formulas(documents, chunk, monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", chunk)
    for seed in range(3):
        ranked, true, frequency = random_case(seed, documents, labels=130, width=100)
        true[0] = true[0] or [3]  # something to find, even in one document
        inverse = metrics.inverse_propensity(frequency, 500, 0.55, 1.5)
        expected: dict[str, float] = {}
        for k in metrics.RECALL_AT:
            expected |= Plain(ranked, true, inverse.tolist(), k).all()
        assert evaluate(ranked, true, inverse).values() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_a_case_worked_out_by_hand():
    # Document 0: true 1, 2, 3; ranks 2, 0, 1, 4, 5 -> hits at places 1 and 3. Document 1: true 0; ranked first.
    found = evaluate([[2, 0, 1, 4, 5], [0, 1, 2, 3, 4]], [[1, 2, 3], [0]], [1.0, 2.0, 4.0, 8.0, 1.0, 1.0]).values()
    log3 = math.log2(3)
    expected = {
        "P@1": 100,
        "P@3": 100 * (2 + 1) / 6,
        "P@5": 100 * (2 + 1) / 10,
        "nDCG@1": 100,
        "nDCG@3": 50 * (1.5 / (1 + 1 / log3 + 0.5) + 1),
        "nDCG@5": 50 * (1.5 / (1 + 1 / log3 + 0.5) + 1),  # three true labels: the ideal stops at place 3
        "PSP@1": 100 * (4 + 1) / (8 + 1),
        "PSP@3": 100 * (6 + 1) / (14 + 1),
        "PSP@5": 100 * (6 + 1) / (14 + 1),
        "PSnDCG@1": 100 * (4 + 1) / (8 + 1),
        "PSnDCG@3": 100 * (5 / (1.5 + 1 / log3) + 1) / ((8 + 4 / log3 + 1) / (1.5 + 1 / log3) + 1),
        "recall@1": 50 * (1 / 3 + 1),
        "recall@3": 50 * (2 / 3 + 1),
        "recall@100": 50 * (2 / 3 + 1),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_fewer_true_labels_than_k_cost_precision_but_not_ndcg():
    found = evaluate([[4, 0, 1, 2, 3]], [[4]], np.ones(5)).values()
    assert found["P@5"] == pytest.approx(20)
    assert found["nDCG@5"] == found["PSP@5"] == found["PSnDCG@5"] == found["recall@5"] == pytest.approx(100)


def test_a_document_without_labels_counts_as_zero_in_the_means_but_not_in_the_ratios():
    alone = evaluate([[0, 1, 2, 3, 4]], [[0, 2]], np.arange(1, 6)).values()
    beside = evaluate([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]], [[0, 2], []], np.arange(1, 6)).values()
    for name, value in alone.items():
        assert beside[name] == pytest.approx(value if name.startswith("PS") else value / 2), name


def test_a_perfect_ranking_scores_100_whatever_the_ties_in_propensity():
    true = [[0, 1, 2, 3, 4, 5, 6], [2, 6], [1]]
    for inverse in (np.ones(8), np.array([2.0, 2, 2, 1, 1, 1, 1, 9])):
        found = evaluate([[0, 1, 2, 3, 4], [2, 6, 0, 1, 3], [1, 0, 2, 3, 4]], true, inverse).values()
        names = [f"{name}@{k}" for name in ("nDCG", "PSP", "PSnDCG") for k in (1, 3, 5)]
        assert [found[name] for name in names] == pytest.approx([100] * 9)


def test_empty_places_and_narrow_rankings_find_nothing():
    full = evaluate([[1, -1, -1, -1, -1], [-1] * 5], [[1, 2], [2]], np.ones(3)).values()
    narrow = evaluate([[1], [-1]], [[1, 2], [2]], np.ones(3)).values()
    assert full == pytest.approx(narrow)
    assert full["P@1"] == pytest.approx(50)
    assert full["P@5"] == pytest.approx(10)
    assert full["recall@100"] == pytest.approx(25)


def test_match_finds_the_same_as_sets_do_across_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "_CHUNK", 8)
    ranked, true, _ = random_case(5, 50, labels=60, width=20)
    hits = metrics.match(np.array(ranked, dtype=np.int32), *csr(true))
    assert hits.tolist() == [[label in own for label in row] for row, own in zip(ranked, true, strict=True)]


def test_match_passes_the_range_of_int32():
    ranked = np.full((3, 2), 2**31 - 2, dtype=np.int32)
    offsets, labels = np.array([0, 0, 1, 2]), np.array([2**31 - 2, 5], dtype=np.int32)
    assert metrics.match(ranked, offsets, labels).tolist() == [[False, False], [True, True], [False, False]]


def test_match_refuses_true_labels_that_it_could_not_find():
    ranked = np.zeros((2, 1), dtype=np.int32)
    with pytest.raises(ValueError, match="ascending and distinct"):
        metrics.match(ranked, *csr([[2, 1], [0]]))
    with pytest.raises(ValueError, match="ascending and distinct"):
        metrics.match(ranked, *csr([[1], [0, 0]]))
    with pytest.raises(ValueError, match="offsets for 1 documents"):
        metrics.match(ranked, *csr([[0]]))


def test_csr_and_quick_precision():
    offsets, labels = metrics.csr([])
    assert (offsets.tolist(), labels.tolist(), labels.dtype) == ([0], [], np.int32)
    offsets, labels = csr([[3], [], [1, 2]])
    assert (offsets.tolist(), labels.tolist()) == ([0, 1, 1, 3], [3, 1, 2])
    ranked, true, _ = random_case(1, 40, labels=30, width=5)
    hits = metrics.match(np.array(ranked, dtype=np.int32), *csr(true))
    whole = evaluate(ranked, true, np.ones(30)).values()
    assert metrics.precision(hits) == pytest.approx({f"P@{k}": whole[f"P@{k}"] for k in (1, 3, 5)})


# propensities ---------------------------------------------------------------------------------------------------------


def test_propensities_follow_their_formula():
    a, b, documents = 0.55, 1.5, 14588
    c = (math.log(documents) - 1) * (b + 1) ** a
    expected = [1 + c * math.exp(-a * math.log(n + b)) for n in (0, 1, 5, 14588)]
    found = metrics.inverse_propensity(np.array([0, 1, 5, 14588], dtype=np.int32), documents, a, b)
    assert found == pytest.approx(expected)
    assert (np.diff(found) < 0).all()  # the rarer, the more a hit counts
    assert found[-1] > 1


def test_propensities_at_the_edges():
    few = metrics.inverse_propensity(np.array([0, 1, 2]), 2, 0.55, 1.5)  # log 2 < 1 would make probabilities above 1
    assert few.tolist() == [1, 1, 1]
    assert metrics.inverse_propensity(np.array([0, 9]), 100, 0.0, 0.0) == pytest.approx([math.log(100)] * 2)
    assert np.isfinite(metrics.inverse_propensity(np.array([1, 9]), 100, 0.5, 0.0)).all()
    with pytest.raises(ValueError, match=r"propensity_b: 0.0 gives 2 labels"):
        metrics.inverse_propensity(np.array([0, 0, 1]), 100, 0.5, 0.0)
    with pytest.raises(ValueError, match="at least one training document"):
        metrics.inverse_propensity(np.array([0]), 0, 0.5, 1.5)


# groups and buckets ---------------------------------------------------------------------------------------------------


def test_groups_sum_to_the_whole_in_precision_and_divide_it_in_recall():
    ranked, true, frequency = random_case(2, 120, labels=130, width=100)
    inverse = metrics.inverse_propensity(frequency, 500, 0.55, 1.5)
    groups = np.where(frequency >= 30, 0, np.where(frequency <= 5, 2, 1))
    found = evaluate(ranked, true, inverse, groups, ("head", "torso", "tail")).values()
    for name in [f"{metric}@{k}" for metric in ("P", "PSP") for k in (1, 3, 5)]:
        assert sum(found[f"{group}/{name}"] for group in ("head", "torso", "tail")) == pytest.approx(found[name], rel=1e-5)
    for number, group in enumerate(("head", "torso", "tail")):
        member = set(np.flatnonzero(groups == number))
        for k in metrics.RECALL_AT:
            own = [(set(row[:k]) & set(one) & member, set(one) & member) for row, one in zip(ranked, true, strict=True)]
            shares = [len(hit) / len(all_) for hit, all_ in own if all_]
            assert found[f"{group}/recall@{k}"] == pytest.approx(100 * np.mean(shares), rel=1e-5)


def test_a_group_that_no_document_has_gets_no_recall():
    contributions = evaluate([[0, 1]], [[0]], np.ones(3), np.array([0, 0, 1]), ("seen", "missing"))
    found = contributions.values()
    assert found["missing/P@1"] == 0
    assert "missing/recall@5" not in found
    assert "missing/recall@5" not in contributions.intervals(20)
    assert found["seen/recall@5"] == pytest.approx(100)


def test_buckets_sum_to_the_whole_and_name_their_frequencies():
    ranked, true, _ = random_case(3, 90, labels=130, width=100)
    frequency = np.random.default_rng(0).choice([0, 1, 2, 5, 6, 50, 51, 1000, 1001, 10**6], 130)
    predictions = np.array(ranked, dtype=np.int32)
    offsets, labels = csr(true)
    hits = metrics.match(predictions, offsets, labels)
    rows = metrics.by_frequency(predictions, hits, labels, frequency)
    assert [row["bucket"] for row in rows] == ["0", "1", "2-5", "6-10", "21-50", "51-100", "101-1000", "1001+"]
    assert sum(row["labels"] for row in rows) == 130
    assert sum(row["pairs"] for row in rows) == len(labels)
    for k in metrics.PRECISION_AT:
        assert sum(row[f"P@{k}"] for row in rows) == pytest.approx(100 * hits[:, :k].mean())
    member = set(np.flatnonzero((frequency >= 2) & (frequency <= 5)))
    found = sum(len(set(row[:10]) & set(own) & member) for row, own in zip(ranked, true, strict=True))
    assert rows[2]["recall@10"] == pytest.approx(100 * found / sum(len(set(own) & member) for own in true))


# intervals ------------------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_resampling_documents_one_by_one():
    ranked, true, frequency = random_case(4, 60, labels=130, width=100)
    inverse = metrics.inverse_propensity(frequency, 500, 0.55, 1.5)
    contributions = evaluate(ranked, true, inverse)
    found = contributions.intervals(400, seed=7)
    rng = np.random.default_rng(7)
    drawn: dict[str, list[float]] = {"P@5": [], "PSP@3": [], "PSnDCG@5": [], "recall@100": []}
    for _ in range(400):
        chosen = rng.integers(60, size=60)
        again = evaluate([ranked[i] for i in chosen], [true[i] for i in chosen], inverse).values()
        for name, values in drawn.items():
            values.append(again[name])
    for name, values in drawn.items():
        assert found[name] == pytest.approx(np.percentile(values, [2.5, 97.5]), rel=1e-4)


def test_intervals_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    ranked, true, frequency = random_case(4, 60, labels=130, width=20)
    contributions = evaluate(ranked, true, metrics.inverse_propensity(frequency, 500, 0.55, 1.5))
    whole = contributions.intervals(50, seed=1)
    monkeypatch.setattr(metrics, "_RESAMPLES", 3)
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    pieces = contributions.intervals(50, seed=1)
    assert pieces.keys() == whole.keys()
    for name, ends in whole.items():
        assert pieces[name] == pytest.approx(ends, rel=1e-5)
    assert contributions.intervals(50, seed=2) != whole
    assert contributions.intervals(0) == {}


def test_an_interval_is_as_wide_as_the_binomial_one():
    hit = np.arange(2000) % 10 < 3  # P@1 = 30 %
    contributions = evaluate([[0] if one else [1] for one in hit], [[0]] * 2000, np.ones(2))
    low, high = contributions.intervals(1000)["P@1"]
    error = 1.96 * math.sqrt(0.3 * 0.7 / 2000) * 100
    assert low == pytest.approx(30 - error, abs=0.35)
    assert high == pytest.approx(30 + error, abs=0.35)
