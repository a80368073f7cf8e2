"""Train one rival on a corpus folder and rank its test documents, in the rivals' own environment (`make rivals`).

    .venv-rivals/bin/python study/rivals/run.py bonsai CORPUS OUT [--seed 1] [--threads 0]

CORPUS holds train.parquet, test.parquet and labels.parquet as the corpus stage writes them. Leaves in OUT:
`ranked.npy` [N, 20] int32 label ids, best first, -1 for none, which the study scores with the project's own metrics;
`rival.json` with settings, seconds, peak resident memory, bytes of the saved model and versions. Nothing here imports fanin:
the packages need library versions of their own. The documents' features are TF-IDF in every case, since the rivals
are linear models on such features; making them counts as training and as ranking time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

DEPTH = 20  # labels ranked a document
# Words of two characters or more and pairs of them, those in at least two documents; 1 + log(tf), unit length.
FEATURES: dict[str, Any] = {"ngram_range": (1, 2), "min_df": 2, "sublinear_tf": True}
NO_PACKAGE = 3  # exit code


@dataclass
class Data:
    """Features [N, F] and labels of the training documents, features of the test documents."""

    x: sparse.csr_matrix
    y: sparse.csr_matrix  # [N, L] of ones
    x_test: sparse.csr_matrix


class Rival(Protocol):
    """One method: `settings` as given to its package, then `fit`, `save` (bytes on disk) and `rank`."""

    package: str
    module: str
    settings: dict[str, Any]

    def fit(self, data: Data, folder: Path, seed: int, threads: int) -> None: ...

    def save(self, folder: Path) -> int: ...

    def rank(self, x: sparse.csr_matrix, threads: int) -> np.ndarray: ...


class Omikuji:
    """Parabel (balanced binary trees) and Bonsai (wide, shallow, unbalanced) with the settings of omikuji's README."""

    package, module = "omikuji", "omikuji"

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def fit(self, data: Data, folder: Path, seed: int, threads: int) -> None:
        import omikuji

        path = folder / "train.txt"
        _write_repository_format(data, path)
        parameters = omikuji.Model.default_hyper_param()
        for name, value in self.settings.items():
            setattr(parameters, name, value)
        self.model = omikuji.Model.train_on_data(str(path), parameters, threads)
        path.unlink()

    def save(self, folder: Path) -> int:
        self.model.save(str(folder / "model"))
        return _bytes(folder / "model")

    def rank(self, x: sparse.csr_matrix, threads: int) -> np.ndarray:
        self.model.init_prediction_thread_pool(threads)
        ranked = np.full((x.shape[0], DEPTH), -1, np.int32)
        for row in range(x.shape[0]):
            part = slice(x.indptr[row], x.indptr[row + 1])
            features = list(zip(x.indices[part].tolist(), x.data[part].tolist(), strict=True))
            found = [label for label, _ in self.model.predict(features, beam_size=DEPTH, top_k=DEPTH)]
            ranked[row, : len(found)] = found
        return ranked


class Pecos:
    """PECOS XR-Linear: label features from their documents, hierarchical k-means, one linear ranker a tree node."""

    package, module = "libpecos", "pecos"
    settings: dict[str, Any] = {"label_features": "pifa", "indexer": "hierarchicalkmeans", "beam_size": DEPTH}  # noqa: RUF012

    def fit(self, data: Data, folder: Path, seed: int, threads: int) -> None:
        from pecos.xmc import Indexer, LabelEmbeddingFactory
        from pecos.xmc.xlinear.model import XLinearModel

        features = LabelEmbeddingFactory.create(data.y, data.x, method=self.settings["label_features"])
        chain = Indexer.gen(features, indexer_type=self.settings["indexer"], seed=seed, threads=threads)
        self.model = XLinearModel.train(data.x, data.y, C=chain, threads=threads)

    def save(self, folder: Path) -> int:
        self.model.save(str(folder / "model"))
        return _bytes(folder / "model")

    def rank(self, x: sparse.csr_matrix, threads: int) -> np.ndarray:
        found = self.model.predict(x, only_topk=DEPTH, beam_size=DEPTH, threads=threads)
        return _best(found.tocsr())


class Napkin:
    """napkinXC's probabilistic label tree with its defaults: LIBLINEAR, hierarchical k-means, exact search."""

    package, module = "napkinxc", "napkinxc"
    settings: dict[str, Any] = {"tree_type": "hierarchicalKmeans", "loss": "log"}  # noqa: RUF012

    def fit(self, data: Data, folder: Path, seed: int, threads: int) -> None:
        from napkinxc.models import PLT

        self.folder = folder / "model"
        self.model = PLT(str(self.folder), seed=seed, threads=threads, **self.settings)
        y = np.split(data.y.indices, data.y.indptr[1:-1])
        self.model.fit(data.x, [labels.tolist() for labels in y])

    def save(self, folder: Path) -> int:
        return _bytes(self.folder)

    def rank(self, x: sparse.csr_matrix, threads: int) -> np.ndarray:
        found = self.model.predict(x, top_k=DEPTH)
        ranked = np.full((x.shape[0], DEPTH), -1, np.int32)
        for row, labels in enumerate(found):
            ranked[row, : len(labels)] = labels
        return ranked


class Neighbours:
    """TF-IDF nearest neighbours: a label's score is the sum of the cosines of the nearest documents that have it."""

    package, module = "scikit-learn", "sklearn"
    chunk = 256  # test documents at once

    def __init__(self, neighbours: int) -> None:
        self.settings = {"neighbours": neighbours}

    def fit(self, data: Data, folder: Path, seed: int, threads: int) -> None:
        self.x, self.y = data.x.T.tocsr(), data.y

    def save(self, folder: Path) -> int:
        """The training documents' features and labels are the model."""
        for name, matrix in (("features", self.x), ("labels", self.y)):
            sparse.save_npz(folder / f"{name}.npz", matrix, compressed=False)
        return _bytes(folder / "features.npz") + _bytes(folder / "labels.npz")

    def rank(self, x: sparse.csr_matrix, threads: int) -> np.ndarray:
        k = self.settings["neighbours"]
        parts = []
        for start in range(0, x.shape[0], self.chunk):
            cosine = (x[start : start + self.chunk] @ self.x).toarray()
            near = np.argpartition(-cosine, k, axis=1)[:, :k]
            weights = np.take_along_axis(cosine, near, axis=1)
            offsets = np.arange(0, near.size + 1, k)
            chosen = sparse.csr_matrix((weights.ravel(), near.ravel(), offsets), shape=cosine.shape)
            parts.append(_best((chosen @ self.y).tocsr()))
        return np.concatenate(parts)


RIVALS: dict[str, Rival] = {
    "parabel": Omikuji(),
    "bonsai": Omikuji(cluster_balanced=False, cluster_k=100, max_depth=3),
    "pecos": Pecos(),
    "napkinxc": Napkin(),
    "tfidf_knn": Neighbours(30),
}


def load(corpus: Path, vectorizer: TfidfVectorizer) -> Data:
    """The corpus as matrices; fits the vectorizer to the training texts."""
    labels = pq.ParquetFile(corpus / "labels.parquet").metadata.num_rows
    train = pq.read_table(corpus / "train.parquet")
    owned = train["labels"].combine_chunks()
    offsets = owned.offsets.to_numpy().astype(np.int64)
    values = owned.values.to_numpy().astype(np.int32)
    y = sparse.csr_matrix((np.ones(len(values), np.float32), values, offsets), shape=(len(train), labels))
    x = vectorizer.fit_transform(train["text"].to_pylist())
    x_test = vectorizer.transform(pq.read_table(corpus / "test.parquet", columns=["text"])["text"].to_pylist())
    return Data(x.tocsr(), y, x_test.tocsr())


def _write_repository_format(data: Data, path: Path) -> None:
    """`N F L`, then `label,label feature:value ...` a line: what omikuji reads. It takes no document without features."""
    x, y = data.x, data.y
    rows = np.flatnonzero(np.diff(x.indptr))
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{len(rows)} {x.shape[1]} {y.shape[1]}\n")
        for row in rows:
            labels = ",".join(map(str, y.indices[y.indptr[row] : y.indptr[row + 1]]))
            part = slice(x.indptr[row], x.indptr[row + 1])
            features = " ".join(f"{f}:{v:.6g}" for f, v in zip(x.indices[part], x.data[part], strict=True))
            file.write(f"{labels} {features}\n")


def _best(scores: sparse.csr_matrix) -> np.ndarray:
    """The DEPTH best columns of each row, best first, -1 where a row has fewer."""
    ranked = np.full((scores.shape[0], DEPTH), -1, np.int32)
    for row in range(scores.shape[0]):
        part = slice(scores.indptr[row], scores.indptr[row + 1])
        order = np.argsort(-scores.data[part], kind="stable")[:DEPTH]
        ranked[row, : len(order)] = scores.indices[part][order]
    return ranked


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _peak_mib() -> float:
    """Peak resident memory. Linux's own figure of this program: getrusage also counts what stood here before exec."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 2**10
    except (OSError, StopIteration):
        pass
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    options = parser.parse_args()
    rival, threads = RIVALS[options.rival], options.threads or os.cpu_count() or 1
    options.out.mkdir(parents=True, exist_ok=True)

    try:
        import_module(rival.module)
    except ImportError as error:
        print(f"{rival.package} cannot be imported: {error}", file=sys.stderr)
        sys.exit(NO_PACKAGE)
    began, worked = time.monotonic(), time.process_time()
    data = load(options.corpus, TfidfVectorizer(**FEATURES, dtype=np.float32))
    featured = time.monotonic()
    rival.fit(data, options.out, options.seed, threads)
    fitted, peak, worked = time.monotonic(), _peak_mib(), time.process_time() - worked
    size = rival.save(options.out)
    ranking = time.monotonic()
    ranked = rival.rank(data.x_test, threads)
    done = time.monotonic()

    np.save(options.out / "ranked.npy", ranked)
    packages = {name: metadata.version(name) for name in (rival.package, "scikit-learn", "numpy", "scipy")}
    record = {
        "rival": options.rival,
        "settings": rival.settings | {"tfidf": FEATURES, "features": data.x.shape[1]},
        "features_seconds": round(featured - began, 2),
        "train_seconds": round(fitted - began, 2),
        "train_cpu_seconds": round(worked, 2),  # over all threads; tells a busy machine from a slow method
        "rank_seconds": round(done - ranking, 2),
        "peak_mib": round(peak, 1),
        "model_bytes": size,
        "threads": threads,
        "versions": packages | {"python": platform.python_version()},
    }
    (options.out / "rival.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
