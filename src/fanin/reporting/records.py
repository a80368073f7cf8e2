"""What the pipeline's stages left on disk, read for the report; a file that is not there is noted, not an error."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fanin.files import InputError, read_json

STAGES = {
    "data/corpus/corpus.json": "corpus",
    "data/corpus/train.parquet": "corpus",
    "data/corpus/labels.parquet": "corpus",
    "data/tokens/tokens.json": "tokens",
    "data/embeddings/embeddings.json": "embeddings",
    "data/clusters/clusters.json": "clusters",
    "data/start/start.json": "start",
    "models/fanin.json": "train",
    "reports/train.json": "train",
    "reports/train_curve.csv": "train",
    "reports/validation_curve.csv": "train",
    "reports/rewiring_curve.csv": "train",
    "reports/metrics.json": "evaluate",
    "reports/evaluation.json": "evaluate",
    "reports/predictions.parquet": "evaluate",
    "reports/memory.json": "memory",
}


class Records:
    """The files under one project root, by their path in it. `missing` lists those asked for and not there.

    Every reader raises InputError, naming the file, for one that is there but broken.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.missing: dict[str, str] = {}  # path -> the stage that writes it
        self._objects: dict[str, dict[str, Any]] = {}

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file's object; empty where it is missing."""
        if path not in self._objects:
            value = read_json(self.root / path) if self._there(path) else {}
            if not isinstance(value, dict):
                raise InputError(f"{path}: expected an object, found {type(value).__name__}; {self._again(path)}")
            self._objects[path] = value
        return self._objects[path]

    def table(self, path: str) -> dict[str, list[float | None]]:
        """A CSV file's columns as numbers, None for an empty cell or NaN; no columns where it is missing."""
        if not self._there(path):
            return {}
        with open(self.root / path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            columns: dict[str, list[float | None]] = {name: [] for name in header}
            for row in reader:
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {reader.line_num}: expected {len(header)} columns, found {len(row)}; "
                        + self._again(path)
                    )
                for name, cell in zip(header, row, strict=True):
                    columns[name].append(self._number(path, reader.line_num, name, cell))
        return columns

    def rows(self, path: str, rows: Sequence[int], columns: Iterable[str] | None = None) -> list[dict[str, Any]]:
        """Chosen rows of a parquet file, in ascending order; only the row groups that hold them are read."""
        file = self._parquet(path)
        if file is None:
            return []
        wanted = np.unique(np.asarray(rows, dtype=np.int64))
        found: list[dict[str, Any]] = []
        first = 0
        for group in range(file.num_row_groups):
            stop = first + file.metadata.row_group(group).num_rows
            here = wanted[(wanted >= first) & (wanted < stop)] - first
            if len(here):
                table = file.read_row_group(group, columns=None if columns is None else list(columns))
                found.extend(table.take(pa.array(here)).to_pylist())
            first = stop
        return found

    def count(self, path: str) -> int:
        """Rows of a parquet file; 0 where it is missing."""
        file = self._parquet(path)
        return 0 if file is None else file.metadata.num_rows

    def column(self, path: str, name: str) -> np.ndarray:
        """One numeric column of a parquet file; empty where it is missing."""
        file = self._parquet(path)
        if file is None:
            return np.zeros(0, dtype=np.int64)
        if name not in file.schema_arrow.names:
            raise InputError(f"{path}: expected a column {name!r}, found {file.schema_arrow.names}; {self._again(path)}")
        return file.read(columns=[name]).column(name).to_numpy()

    def sample(self, path: str, size: int, seed: int) -> list[int]:
        """Rows of a parquet file drawn at random, the same for the same seed and number of rows."""
        total = self.count(path)
        return sorted(random.Random(seed).sample(range(total), min(size, total)))

    def seconds(self) -> dict[str, float]:
        """What each stage took when it last ran, by the stage runner's clock; stages that have not run are absent."""
        paths = {stage: self.root / f"reports/stages/{stage}.json" for stage in dict.fromkeys(STAGES.values())}
        return {stage: float(read_json(path)["seconds"]) for stage, path in paths.items() if path.is_file()}

    def _there(self, path: str) -> bool:
        there = (self.root / path).is_file()
        if not there:
            self.missing[path] = STAGES[path]
        return there

    def _parquet(self, path: str) -> pq.ParquetFile | None:
        if not self._there(path):
            return None
        try:
            return pq.ParquetFile(self.root / path)
        except pa.ArrowInvalid as error:
            raise InputError(f"{path}: not a parquet file ({error}); {self._again(path)}") from None

    def _number(self, path: str, line: int, name: str, cell: str) -> float | None:
        try:
            value = float(cell) if cell else math.nan
        except ValueError:
            raise InputError(f"{path}, line {line}: expected a number in {name}, found {cell!r}; {self._again(path)}") from None
        return value if math.isfinite(value) else None

    def _again(self, path: str) -> str:
        return f"make it again with `dvc repro --force {STAGES[path]}`"
