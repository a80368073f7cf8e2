"""Peak memory and time of the corpus stage on a generated corpus of the size of Amazon-3M.

    python benchmarks/corpus_streaming.py [--documents 3000000] [--layout xc_json|xc_raw] [--plain]

Writes raw files to a temporary folder, runs the corpus stage's function on them in a process of its own, and compares
what it left with what was generated: the counts, every label's frequency, some whole rows. Only then it reports that
process's resident peak and time; the record goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fanin import __version__
from fanin.config import Config
from fanin.data.corpus import build_corpus
from fanin.files import write_json

LABELS = 2_812_281
BUDGET_MIB = 2048
ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "xc_json": {"train": ("trn.json",), "test": ("tst.json",)},
    "xc_raw": {"train": ("train_raw_texts.txt", "train_labels.txt"), "test": ("test_raw_texts.txt", "test_labels.txt")},
}


def documents(count: int, labels: int, seed: int, chunk: int = 10_000) -> Iterator[tuple[str, str, list[int]]]:
    """(title, content, labels): about 90 words; up to 19 labels, few of them frequent and many rare."""
    rng = np.random.default_rng(seed)
    words = np.array([a + b + c for a in "bdfklmnprst" for b in ("a", "e", "io", "u") for c in ("l", "mer", "ning", "st")])
    phrases = [" ".join(rng.choice(words, 10)) for _ in range(20_000)]
    for start in range(0, count, chunk):
        n = min(chunk, count - start)
        picks = rng.integers(len(phrases), size=(n, 9)).tolist()
        ids = (labels * rng.random((n, 19)) ** 3).astype(np.int64).tolist()
        lengths = rng.integers(1, 20, n).tolist()
        for row in range(n):
            content = ". ".join([phrases[pick] for pick in picks[row][1:]])
            yield f"{phrases[picks[row][0]]} {start + row}", content, list(dict.fromkeys(ids[row][: lengths[row]]))


def encode(layout: str, title: str, content: str, ids: list[int]) -> tuple[str, ...]:
    """A document as one line for each of the layout's files."""
    if layout == "xc_json":
        return (json.dumps({"uid": title, "title": title, "content": content, "target_ind": ids}),)
    return f"{title} /SEP/ {content}", " ".join([f"label_{id}" for id in ids])


class Generated:
    """What the raw files hold, to compare the corpus with."""

    def __init__(self, labels: int) -> None:
        self.documents: dict[str, int] = {}
        self.frequency = np.zeros(labels, np.int64)  # in training
        self.spots: dict[int, tuple[list[str], list[int]]] = {}  # row of training: words, labels


def generate(raw: Path, count: int, labels: int, layout: str, packed: bool) -> Generated:
    """Write `count` training documents and a thirtieth of that for testing."""
    made = Generated(labels)
    for seed, (part, names) in enumerate(FILES[layout].items()):
        made.documents[part] = count if part == "train" else max(1, count // 30)
        spots = {0, 1, count // 2, count - 1} if part == "train" else set()
        with ExitStack() as stack:
            writers = [_writer(stack, raw / name, packed) for name in names]
            for row, (title, content, ids) in enumerate(documents(made.documents[part], labels, seed)):
                for write, line in zip(writers, encode(layout, title, content, ids), strict=True):
                    write(line)
                if part == "train":
                    made.frequency[ids] += 1
                if row in spots:
                    made.spots[row] = (f"{title} {content}".split(), sorted(ids))
    if layout == "xc_json":
        with ExitStack() as stack:
            write = _writer(stack, raw / "lbl.json", packed)
            for id in range(labels):
                write(f'{{"uid": "{id}", "title": "label {id}"}}')
    return made


def _writer(stack: ExitStack, path: Path, packed: bool) -> Callable[[str], Any]:
    binary: Any = gzip.GzipFile(f"{path}.gz", "wb", compresslevel=1) if packed else path.open("wb")
    file = stack.enter_context(io.BufferedWriter(binary, 1 << 20))
    return lambda line: file.write(line.encode() + b"\n")


def compare(made: Generated, out: Path, facts: dict[str, Any]) -> None:
    """Raise AssertionError where the corpus differs from what was generated."""
    labels = pq.read_table(out / "labels.parquet")
    ids = np.array([int(text.removeprefix("label ")) for text in labels["text"].to_pylist()])
    assert len(np.unique(ids)) == len(ids) == facts["labels"], "labels are missing or doubled"
    assert np.array_equal(labels["frequency"].to_numpy(), made.frequency[ids]), "a label's frequency differs"
    assert made.frequency[ids].sum() == made.frequency.sum(), "a label of the training documents is missing"
    for part, count in made.documents.items():
        assert pq.read_metadata(out / f"{part}.parquet").num_rows == facts[f"{part}_documents"] == count, f"{part} documents"
    train = pq.ParquetFile(out / "train.parquet")
    first = 0
    for group in range(train.num_row_groups):
        rows = train.metadata.row_group(group).num_rows
        for row in [row for row in made.spots if first <= row < first + rows]:
            found = train.read_row_group(group).slice(row - first, 1).to_pylist()[0]
            words, targets = made.spots.pop(row)
            assert found["text"].split() == words, f"text of document {row}"
            assert sorted(ids[found["labels"]].tolist()) == targets, f"labels of document {row}"
        first += rows
    assert not made.spots, "documents are missing"


def child(raw: Path, out: Path, layout: str) -> None:
    """The measured process: nothing but the stage's function. Prints one line of JSON."""
    config = Config(preset="generated")
    config.corpus.format = layout
    before = _peak_mib()
    started = time.perf_counter()
    facts = build_corpus(config, raw, out)
    print(json.dumps({"seconds": time.perf_counter() - started, "peak": _peak_mib(), "before": before, "facts": facts}))


def _peak_mib() -> float:
    # VmHWM, not ru_maxrss: that one starts at the parent's peak
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) / 1024


def _cpu() -> str:
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    used = [module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "fanin" and module.__file__]
    dirty = git("status", "--porcelain", "--", *used, __file__)
    return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=3_000_000)
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--layout", choices=sorted(FILES), default="xc_json")
    parser.add_argument("--plain", action="store_true", help="no gzip")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the record")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(*given.child, given.layout)
    commit = _commit()  # before the run, which takes minutes
    with tempfile.TemporaryDirectory(prefix="fanin-corpus-") as folder:
        raw, out = Path(folder, "raw"), Path(folder, "corpus")
        raw.mkdir()
        made = generate(raw, given.documents, given.labels, given.layout, not given.plain)
        raw_bytes = sum(path.stat().st_size for path in raw.iterdir())
        command = [sys.executable, __file__, "--layout", given.layout, "--child", str(raw), str(out)]
        result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        compare(made, out, result["facts"])
        corpus_bytes = sum(path.stat().st_size for path in out.iterdir())
    record = {
        "benchmark": "corpus_streaming",
        "layout": given.layout,
        "gzip": not given.plain,
        "documents": given.documents,
        "labels": result["facts"]["labels"],
        "labels_per_document": result["facts"]["labels_per_document"],
        "raw_mib": round(raw_bytes / 2**20, 1),
        "corpus_mib": round(corpus_bytes / 2**20, 1),
        "peak_mib": round(result["peak"], 1),
        "imports_mib": round(result["before"], 1),
        "budget_mib": BUDGET_MIB,
        "seconds": round(result["seconds"], 1),
        "device": _cpu(),
        "versions": {
            "fanin": __version__,
            "python": platform.python_version(),
            "pyarrow": pa.__version__,
            "numpy": np.__version__,
        },
        "commit": commit,
    }
    device = re.sub(r"[^a-z0-9]+", "-", record["device"].lower()).strip("-")
    suffix = "" if given.layout == "xc_json" else f"-{given.layout}"
    path = given.out / f"corpus_streaming{suffix}-{device}.json"
    write_json(path, record)
    print(f"checked. {given.documents} documents: peak {record['peak_mib']} MiB, {record['seconds']} s; {path}")
    if record["peak_mib"] > BUDGET_MIB:
        sys.exit(f"the peak is above {BUDGET_MIB} MiB")


if __name__ == "__main__":
    main()
