"""The texts of a model's labels, beside it on disk."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from fanin.files import InputError


class LabelTexts:
    """Label texts by id: an uncompressed Arrow file, memory-mapped, so that millions of them take no memory of their own."""

    FILE = "labels.arrow"

    def __init__(self, path: str | Path) -> None:
        try:
            self._texts: pa.ChunkedArray = pa.ipc.open_file(pa.memory_map(str(path))).read_all()["text"]
        except (FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
            raise InputError(f"{path}: not a readable table of label texts ({error}); rerun the train stage") from None

    @staticmethod
    def write(labels: str | Path, path: str | Path) -> None:
        """Copy the texts of `labels`, a corpus's labels.parquet, to `path`, a batch of rows at a time.

        Raises InputError where `labels` is missing or not such a table.
        """
        schema = pa.schema([("text", pa.large_string())])
        try:
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer, pq.ParquetFile(labels) as source:
                source.schema_arrow.field("text")
                for batch in source.iter_batches(batch_size=2**16, columns=["text"]):
                    writer.write_batch(pa.record_batch([batch["text"].cast(pa.large_string())], schema))
        except (FileNotFoundError, pa.ArrowInvalid, KeyError) as error:
            raise InputError(f"{labels}: not a readable table of label texts ({error}); rerun the corpus stage") from None

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, label: int) -> str:
        return self._texts[int(label)].as_py()
