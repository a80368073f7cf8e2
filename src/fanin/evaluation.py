"""The evaluate stage: rank the test documents with a trained classifier, score the ranking, keep it for reading."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from fanin import metrics
from fanin.config import Config, Evaluate
from fanin.data.tokens import TokenSet
from fanin.encoder import choose_precision
from fanin.files import InputError, atomic_path, read_json, write_json
from fanin.model import Classifier
from fanin.ranks import ALONE, Ranks
from fanin.retrieval import Pairs, rank

SPLITS = ("head", "torso", "tail")
OUTS = ("metrics.json", "evaluation.json", "predictions.parquet", "frequency.csv")
KEPT = 10  # predictions a document in predictions.parquet
_SHUFFLE = 20240923  # of the test documents and the bootstrap: the same in every run, whatever its seed
_ROWS = 4096  # documents a row group of predictions.parquet


def evaluate(
    config: Config,
    models: str | Path,
    tokens_folder: str | Path,
    corpus_folder: str | Path,
    out_folder: str | Path,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Evaluate the model in `models` on the test documents; write OUTS into `out_folder`; return metrics.json's content.

    `config.evaluate` rules the evaluation; precision and device are those that the model was trained with (a GPU that
    is not there is replaced by the CPU). All outs appear together, or none. Every one of `ranks` calls this at the same
    time and holds its share of the labels; the first one scores and writes, the others return nothing. Raises InputError
    where folders are missing, damaged or do not belong together.
    """
    began = time.perf_counter()
    settings = config.evaluate
    corpus, out = Path(corpus_folder), Path(out_folder)
    about = read_json(corpus / "corpus.json")
    tokens = TokenSet.open(Path(tokens_folder) / "test.arrow")
    _check_documents(corpus / "test.parquet", len(tokens))
    label_texts, frequency = _labels(corpus / "labels.parquet")
    classifier = _load(models, len(frequency), ranks)
    rows = choose_documents(len(tokens), settings.documents)
    filtered = _filter(corpus / "filter.parquet", len(tokens), len(frequency))
    inverse = _inverse_propensity(settings, frequency, about["train_documents"])

    depth = min(metrics.RECALL_AT[-1], len(frequency))
    ranking = time.perf_counter()
    with tqdm(total=len(rows), desc="evaluate", unit="doc", disable=None if ranks.leads else True) as bar:
        ranked, scores = rank(classifier, tokens, rows, depth, settings.batch, filtered, bar.update)
    ranking = time.perf_counter() - ranking
    if np.isnan(scores).any():
        raise InputError(f"{models}: the model gives scores that are not numbers; train it again, with lower learning rates")

    if not ranks.leads:
        return {}
    offsets, true = metrics.csr(tokens.labels(rows))
    if not len(true):
        raise InputError(f"{corpus / 'test.parquet'}: none of the {len(rows)} documents evaluated has a label")
    hits = metrics.match(ranked, offsets, true)
    evaluation = {
        "documents": len(rows),
        "test_documents": len(tokens),
        "documents_without_labels": int((np.diff(offsets) == 0).sum()),
        "filtered_pairs": 0 if filtered is None else len(filtered[0]),
        "train_documents": about["train_documents"],
        "labels": len(frequency),
        "ranked_labels": depth,
        "notes": _notes(depth),
        **score(settings, frequency, inverse, ranked, hits, offsets, true),
        "precision": str(classifier.precision).removeprefix("torch."),
        "device": str(classifier.device),
        "ranking_seconds": round(ranking, 3),
        "documents_per_second": round(len(rows) / ranking, 1),
    }
    with ExitStack() as stack:  # each is renamed when the stack closes: all are complete by then
        paths = {name: stack.enter_context(atomic_path(out / name)) for name in OUTS}
        _write_predictions(paths["predictions.parquet"], corpus, rows, label_texts, offsets, true, ranked, scores, hits)
        _write_buckets(paths["frequency.csv"], evaluation["buckets"])
        write_json(paths["metrics.json"], evaluation["metrics"])
        evaluation["seconds"] = round(time.perf_counter() - began, 3)
        write_json(paths["evaluation.json"], evaluation)
    return evaluation["metrics"]


def score(
    settings: Evaluate,
    frequency: np.ndarray,
    inverse: np.ndarray,
    ranked: np.ndarray,
    hits: np.ndarray,
    offsets: np.ndarray,
    true: np.ndarray,
) -> dict[str, Any]:
    """The part of evaluation.json that the ranking decides; arrays as in `fanin.metrics`, values in per cent.

    `metrics`; `splits`, each with its number of labels and of true pairs beside its metrics; `intervals` by metric
    and by "<split>/<metric>"; `bootstrap` and `propensity`, how they were made; `buckets` by training frequency.
    """
    splits = np.where(frequency >= settings.head_frequency, 0, np.where(frequency <= settings.tail_frequency, 2, 1))
    contributions = metrics.contributions(ranked, hits, offsets, true, inverse, splits, SPLITS)
    values = _rounded(contributions.values())
    intervals = contributions.intervals(settings.bootstrap, _SHUFFLE)
    return {
        "metrics": {name: value for name, value in values.items() if "/" not in name},
        "splits": {
            split: {
                "labels": int((splits == number).sum()),
                "pairs": int((splits[true] == number).sum()),
                **{name.removeprefix(f"{split}/"): value for name, value in values.items() if name.startswith(f"{split}/")},
            }
            for number, split in enumerate(SPLITS)
        },
        "intervals": {name: [round(end, 2) for end in ends] for name, ends in intervals.items()},
        "bootstrap": {"resamples": settings.bootstrap, "level": 0.95, "unit": "document"},
        "propensity": {"a": settings.propensity_a, "b": settings.propensity_b},
        "buckets": [_rounded(row) for row in metrics.by_frequency(ranked, hits, true, frequency)],
    }


def choose_documents(documents: int, limit: int | None) -> np.ndarray:
    """Ascending rows: all, or the first `limit` of a shuffle that is always the same (so a smaller set is in a larger)."""
    if limit is None or limit >= documents:
        return np.arange(documents)
    return np.sort(np.random.default_rng(_SHUFFLE).permutation(documents)[:limit])


def _load(models: str | Path, labels: int, ranks: Ranks) -> Classifier:
    classifier = Classifier.load(models, ranks=ranks)
    if classifier.labels != labels:
        raise InputError(
            f"{models}: the model ranks {classifier.labels} labels, but the corpus has {labels}; "
            "train it again (dvc repro train)"
        )
    train = classifier.config.train
    wanted = "cuda" if train.device == "auto" else train.device
    device = torch.device(wanted if wanted.startswith("cuda") and torch.cuda.is_available() else "cpu")
    trained = read_json(Path(models) / "fanin.json")
    same = trained.get("device") == device.type  # else what was the faster there says nothing here
    precision = getattr(torch, trained["precision"]) if same else choose_precision(train.precision, device)
    classifier.precision = ranks.of_first(precision)
    return classifier.to(device)


def _labels(path: Path) -> tuple[pa.Array, np.ndarray]:
    """Label texts as one Arrow array and training frequencies [L]."""
    table = _table(path, ["text", "frequency"])
    texts = table["text"].cast(pa.large_string()).combine_chunks()  # large: together they may pass 2 GiB
    return texts, table["frequency"].to_numpy().astype(np.int64)


def _filter(path: Path, documents: int, labels: int) -> Pairs | None:
    if not path.exists():
        return None
    table = _table(path, ["document", "label"])
    pairs = table["document"].to_numpy(), table["label"].to_numpy()
    for name, ids, count in zip(("document", "label"), pairs, (documents, labels), strict=True):
        if len(ids) and not 0 <= ids.min() <= ids.max() < count:
            wrong = ids[(ids < 0) | (ids >= count)][0]
            raise InputError(f"{path}: {name} {wrong} is outside 0..{count - 1}; rerun the corpus stage (dvc repro -f corpus)")
    return pairs


def _table(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the corpus stage (dvc repro corpus)") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); rerun the corpus stage (dvc repro -f corpus)") from None


def _inverse_propensity(settings: Evaluate, frequency: np.ndarray, documents: int) -> np.ndarray:
    try:
        return metrics.inverse_propensity(frequency, documents, settings.propensity_a, settings.propensity_b)
    except ValueError as error:
        raise InputError(f"params.yaml: evaluate.{error}") from None


def _notes(depth: int) -> list[str]:
    cut = [k for k in metrics.RECALL_AT if k > depth]
    return [f"recall@{k} is over {depth} predictions: the corpus has no more labels" for k in cut]


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 2) if isinstance(value, float) else value for name, value in values.items()}


def _write_buckets(path: Path, buckets: list[dict[str, Any]]) -> None:
    names = ["bucket", "labels", "pairs", *(f"P@{k}" for k in metrics.PRECISION_AT)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, *(f"recall@{k}" for k in metrics.RECALL_AT)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(buckets)


def _write_predictions(
    path: Path,
    corpus: Path,
    rows: np.ndarray,
    label_texts: pa.Array,
    offsets: np.ndarray,
    true: np.ndarray,
    ranked: np.ndarray,
    scores: np.ndarray,
    hits: np.ndarray,
) -> None:
    """One row a document, in `rows`' order (ascending); texts are read a batch at a time."""
    schema = pa.schema(
        {
            "document": pa.int64(),  # row of test.parquet
            "text": pa.large_string(),
            "labels": pa.list_(pa.int32()),
            "label_texts": pa.list_(pa.large_string()),
            "predicted": pa.list_(pa.int32()),
            "predicted_texts": pa.list_(pa.large_string()),
            "scores": pa.list_(pa.float32()),
            "hits": pa.list_(pa.bool_()),
        }
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        done = 0
        for texts in _texts(corpus / "test.parquet", rows):
            part = slice(done, done + len(texts))
            bounds = offsets[part.start : part.stop + 1]
            own = true[bounds[0] : bounds[-1]]
            top = ranked[part, :KEPT]
            present = top >= 0
            ends = np.concatenate([[0], np.cumsum(present.sum(1))])

            def lists(bounds: np.ndarray, values: pa.Array | np.ndarray) -> pa.Array:
                return pa.ListArray.from_arrays(pa.array(bounds.astype(np.int32)), pa.array(values))

            columns = [
                pa.array(rows[part]),
                texts,
                lists(bounds - bounds[0], own),
                lists(bounds - bounds[0], label_texts.take(pa.array(own))),
                lists(ends, top[present]),
                lists(ends, label_texts.take(pa.array(top[present]))),
                lists(ends, scores[part, :KEPT][present]),
                lists(ends, hits[part, :KEPT][present]),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            done = part.stop


def _check_documents(path: Path, tokenised: int) -> None:
    try:
        documents = pq.read_metadata(path).num_rows
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the corpus stage (dvc repro corpus)") from None
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); rerun the corpus stage (dvc repro -f corpus)") from None
    if not documents:
        raise InputError(f"{path} holds no document to evaluate on; add test documents and rerun (dvc repro)")
    if documents != tokenised:
        raise InputError(f"{path} has {documents} documents, the tokens {tokenised}; rerun the tokens stage (dvc repro tokens)")


def _texts(path: Path, rows: np.ndarray) -> Iterator[pa.Array]:
    """The texts of ascending `rows` of test.parquet, a batch of the file at a time."""
    first = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(_ROWS, columns=["text"]):
            low, high = np.searchsorted(rows, [first, first + batch.num_rows])
            if high > low:
                yield batch["text"].take(pa.array(rows[low:high] - first)).cast(pa.large_string())
            first += batch.num_rows
