"""Ranking metrics of extreme multi-label classification, on arrays.

The definitions are those of the Extreme Classification Repository, with the conventions of its evaluation package
pyxclib, by which published figures are made:

- every test document counts; one without true labels scores 0;
- P@k divides by k, also where a document has fewer than k true labels;
- nDCG@k divides a document's DCG by the DCG of min(k, its number of true labels) hits in a row;
- PSP@k and PSnDCG@k weigh a hit by the inverse propensity of its label, and divide the mean over the documents by the
  mean of the best that any ranking could attain (a ratio of means, not a mean of ratios);
- pairs that a filter file names are left out of the ranking, not out of the true labels.

Propensities: Jain et al., "Extreme multi-label loss functions for recommendation, tagging, ranking & other missing
label applications", KDD 2016.

Rankings are `ranked` [N, k] int32, best first, distinct within a row, -1 for none. True labels are CSR: `offsets`
[N + 1] int64 and `labels` [pairs] int32, ascending within a document. Values are in per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

PRECISION_AT = (1, 3, 5)  # P, nDCG, PSP, PSnDCG
RECALL_AT = (1, 3, 5, 10, 100)
_CHUNK = 16384  # documents worked on at once
# Resamples and documents of one product. Small ones are not threaded by BLAS, whose threads wait for each other by
# spinning: where the cores are shared, larger products took 30 times as long.
_RESAMPLES, _BLOCK = 16, 256


def inverse_propensity(frequency: np.ndarray, documents: int, a: float, b: float) -> np.ndarray:
    """1/p of each label: 1 + C exp(-a log(n + b)), C = (log N - 1) (b + 1)^a. Returns [L] float64.

    frequency: [L] training documents of each label; documents: N, all training documents. C is held at 0 where N is
    below e: a propensity is a probability. Raises ValueError where a label's is not defined.
    """
    frequency = np.asarray(frequency, dtype=np.float64)
    if documents < 1:
        raise ValueError(f"propensities need at least one training document, found {documents}")
    if a > 0 and b <= 0 and (frequency + b <= 0).any():
        unseen = int((frequency + b <= 0).sum())
        raise ValueError(f"propensity_b: {b} gives {unseen} labels without training documents propensity 0; raise it")
    scale = max(np.log(documents) - 1, 0.0) * (b + 1) ** a
    return 1 + scale * (frequency + b) ** -a


def csr(lists: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Each document's labels as CSR: offsets [N + 1] int64, labels [pairs] int32."""
    offsets = np.zeros(len(lists) + 1, dtype=np.int64)
    np.cumsum([len(one) for one in lists], out=offsets[1:])
    labels = np.concatenate(lists) if len(lists) else np.zeros(0)
    return offsets, labels.astype(np.int32, copy=False)


def match(ranked: np.ndarray, offsets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which ranked labels are true: [N, k] bool. Raises ValueError where the true labels are not ascending."""
    documents = len(ranked)
    if len(offsets) != documents + 1 or offsets[-1] != len(labels):
        raise ValueError(f"{documents} rankings, but offsets for {len(offsets) - 1} documents and {len(labels)} labels")
    hits = np.zeros(ranked.shape, dtype=bool)
    stride = int(max(labels.max(initial=0), ranked.max(initial=0))) + 2
    for start, stop in _spans(documents):
        true = labels[offsets[start] : offsets[stop]]
        # One number a (document, label); +1 makes room for -1, which no true label has.
        keys = _owners(offsets[start : stop + 1]) * stride + true + 1
        if (np.diff(keys) <= 0).any():
            raise ValueError("true labels must be ascending and distinct within a document")
        if len(keys):
            wanted = np.arange(stop - start)[:, None] * stride + ranked[start:stop] + 1
            place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
            hits[start:stop] = keys[place] == wanted
    return hits


def precision(hits: np.ndarray) -> dict[str, float]:
    """P@1, P@3 and P@5 in per cent, from `match`'s hits [N, k]. For a quick look; `contributions` gives everything."""
    return {f"P@{k}": float(100 * hits[:, :k].sum() / (k * max(len(hits), 1))) for k in PRECISION_AT}


@dataclass(frozen=True)
class Contributions:
    """What each document adds to each metric: a metric is the sum of one column over the sum of another.

    columns: [N, C] float32; ratios: metric name -> (numerator's column, denominator's column).
    """

    columns: np.ndarray
    ratios: Mapping[str, tuple[int, int]]

    def values(self) -> dict[str, float]:
        """Each metric in per cent. A metric whose denominator is 0 (no document it could apply to) is left out."""
        sums = self.columns.sum(axis=0, dtype=np.float64)
        return {name: 100 * sums[i] / sums[j] for name, (i, j) in self.ratios.items() if sums[j] > 0}

    def intervals(self, resamples: int, seed: int = 0, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap intervals of `values()`, in per cent; documents are resampled, ratios taken after.

        The ordinary bootstrap (Efron 1979): a resample's weights are multinomial counts. They are drawn 16 resamples at
        a time: 64 bytes a document, however many resamples there are.
        """
        documents, width = self.columns.shape
        rng = np.random.default_rng(seed)
        sums = np.zeros((resamples, width))
        for first in range(0, resamples, _RESAMPLES):
            weights = np.empty((min(_RESAMPLES, resamples - first), documents), dtype=np.float32)
            for row in weights:
                row[:] = np.bincount(rng.integers(documents, size=documents), minlength=documents)
            total = sums[first : first + len(weights)]
            for start, stop in _spans(documents, _BLOCK):  # float32 products, added up in float64
                total += weights[:, start:stop] @ self.columns[start:stop]
        tails = [50 * (1 - level), 50 * (1 + level)]
        known = self.values() if resamples else {}
        intervals = {}
        for name in known:
            numerator, denominator = (sums[:, column] for column in self.ratios[name])
            drawn = denominator > 0  # a rare group can be missing from a resample
            if drawn.any():
                low, high = np.percentile(100 * numerator[drawn] / denominator[drawn], tails)
                intervals[name] = (float(low), float(high))
        return intervals


def contributions(
    ranked: np.ndarray,
    hits: np.ndarray,
    offsets: np.ndarray,
    labels: np.ndarray,
    inverse: np.ndarray,
    groups: np.ndarray | None = None,
    group_names: tuple[str, ...] = (),
) -> Contributions:
    """Per-document contributions to every metric, whole and (named "<group>/<metric>") by group of labels.

    hits: what `match` found; inverse: [L] inverse propensities; groups: [L] index into group_names, such as head,
    torso, tail. By group:
    - P@k and PSP@k: the part of the whole's that hits of the group's labels bring, so that the groups sum to the whole;
    - recall@k: a document's share of its true labels of that group found, averaged over the documents that have any.
    A ranking narrower than k counts as one with nothing in the places that it lacks.
    """
    names: list[str] = []
    ratios: dict[str, tuple[int, int]] = {}
    parts = []
    for start, stop in _spans(len(ranked)):
        chunk = _Chunk(ranked[start:stop], hits[start:stop], offsets[start : stop + 1], labels, inverse)
        columns = chunk.whole()
        for number, name in enumerate(group_names if groups is not None else ()):
            columns |= {f"{name}/{key}": column for key, column in chunk.of_group(groups == number).items()}  # type: ignore[arg-type]
        names = list(columns)
        parts.append(np.stack([columns[name] for name in names], axis=1).astype(np.float32))
    for name in names:
        if "@" in name and not name.startswith("best "):
            ratios[name] = (names.index(name), names.index(_denominator(name)))
    return Contributions(np.concatenate(parts) if parts else np.zeros((0, 0), np.float32), ratios)


def by_frequency(
    ranked: np.ndarray, hits: np.ndarray, labels: np.ndarray, frequency: np.ndarray
) -> list[dict[str, float | int | str]]:
    """How labels of each training frequency fare: one row a bucket that holds labels, from rare to frequent.

    Over all (document, label) pairs of the bucket at once: `recall@k` is the share of its true pairs found among the
    first k, `P@k` the part of P@k that its hits bring (the buckets sum to the whole), both in per cent; `labels` and
    `pairs` count the bucket's labels and true pairs. A recall without true pairs is left out.
    """
    bucket = np.searchsorted(_BUCKETS[1:], frequency, side="right")
    sizes = np.bincount(bucket, minlength=len(_BUCKETS))
    pairs = np.bincount(bucket[labels], minlength=len(_BUCKETS))
    found = {
        k: np.bincount(bucket[ranked[:, :k][hits[:, :k]]], minlength=len(_BUCKETS)) for k in sorted({*PRECISION_AT, *RECALL_AT})
    }
    rows: list[dict[str, float | int | str]] = []
    for i in np.flatnonzero(sizes):
        row: dict[str, float | int | str] = {"bucket": bucket_name(int(i))}
        row |= {"labels": int(sizes[i]), "pairs": int(pairs[i])}
        row |= {f"P@{k}": float(100 * found[k][i] / (k * max(len(ranked), 1))) for k in PRECISION_AT}
        if pairs[i]:
            row |= {f"recall@{k}": float(100 * found[k][i] / pairs[i]) for k in RECALL_AT}
        rows.append(row)
    return rows


_BUCKETS = np.array([0, 1, 2, 6, 11, 21, 51, 101, 1001])  # lowest frequency of each


def bucket_name(number: int) -> str:
    """The frequencies of one of `by_frequency`'s buckets, such as "2-5"."""
    low = int(_BUCKETS[number])
    if number + 1 == len(_BUCKETS):
        return f"{low}+"
    high = int(_BUCKETS[number + 1]) - 1
    return str(low) if low == high else f"{low}-{high}"


class _Chunk:
    """The columns of some documents. `offsets` point into all of `labels`."""

    def __init__(
        self, ranked: np.ndarray, hits: np.ndarray, offsets: np.ndarray, labels: np.ndarray, inverse: np.ndarray
    ) -> None:
        self.ranked, self.hits = ranked, hits
        self.documents = len(ranked)
        self.counts = np.diff(offsets)
        self.owner = _owners(offsets)
        self.true = labels[offsets[0] : offsets[-1]]
        deepest = PRECISION_AT[-1]
        self.gain = np.where(hits[:, :deepest], inverse[ranked[:, :deepest]], 0.0)
        self.best = self._best_gain(inverse[self.true], deepest)

    def _best_gain(self, gain: np.ndarray, deepest: int) -> np.ndarray:
        """[N, deepest] the largest gains that each document's true labels offer, 0 beyond them."""
        order = np.lexsort((-gain, self.owner))
        starts = np.cumsum(self.counts) - self.counts
        place = np.arange(len(gain)) - np.repeat(starts, self.counts)
        kept = place < deepest
        best = np.zeros((self.documents, deepest))
        best[self.owner[kept], place[kept]] = gain[order][kept]
        return best

    def whole(self) -> dict[str, np.ndarray]:
        discount = 1 / np.log2(np.arange(PRECISION_AT[-1]) + 2)
        ideal = np.cumsum(discount)
        # A document without true labels has no hits either: any divisor but 0 will do.
        span = {k: ideal[np.clip(self.counts, 1, k) - 1] for k in PRECISION_AT}
        columns: dict[str, np.ndarray] = {"documents": np.ones(self.documents)}
        columns |= {f"P@{k}": self.hits[:, :k].sum(1) / k for k in PRECISION_AT}
        columns |= {f"nDCG@{k}": _dot(self.hits, discount, k) / span[k] for k in PRECISION_AT}
        columns |= {f"PSP@{k}": self.gain[:, :k].sum(1) / k for k in PRECISION_AT}
        columns |= {f"best PSP@{k}": self.best[:, :k].sum(1) / k for k in PRECISION_AT}
        columns |= {f"PSnDCG@{k}": _dot(self.gain, discount, k) / span[k] for k in PRECISION_AT}
        columns |= {f"best PSnDCG@{k}": _dot(self.best, discount, k) / span[k] for k in PRECISION_AT}
        columns |= {f"recall@{k}": self.hits[:, :k].sum(1) / np.maximum(self.counts, 1) for k in RECALL_AT}
        return columns

    def of_group(self, member: np.ndarray) -> dict[str, np.ndarray]:
        hits = self.hits & member[self.ranked]
        counts = np.bincount(self.owner[member[self.true]], minlength=self.documents)
        columns: dict[str, np.ndarray] = {"documents": counts > 0}
        columns |= {f"P@{k}": hits[:, :k].sum(1) / k for k in PRECISION_AT}
        columns |= {f"PSP@{k}": np.where(hits[:, :k], self.gain[:, :k], 0).sum(1) / k for k in PRECISION_AT}
        columns |= {f"recall@{k}": hits[:, :k].sum(1) / np.maximum(counts, 1) for k in RECALL_AT}
        return columns


def _denominator(name: str) -> str:
    group, _, metric = name.rpartition("/")
    if metric.startswith("PS"):
        return f"best {metric}"
    return f"{group}/documents" if group and metric.startswith("recall") else "documents"


def _dot(values: np.ndarray, discount: np.ndarray, k: int) -> np.ndarray:
    width = min(k, values.shape[1])
    return values[:, :width] @ discount[:width]


def _owners(offsets: np.ndarray) -> np.ndarray:
    """The document (from 0) of each of the labels that `offsets` spans."""
    return np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))


def _spans(documents: int, size: int | None = None) -> list[tuple[int, int]]:
    size = size or _CHUNK
    return [(start, min(start + size, documents)) for start in range(0, documents, size)]
