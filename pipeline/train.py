"""Train the classifier."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from fanin.config import Config
from fanin.ranks import join
from fanin.stage import Run, run_stage
from fanin.training import CURVES, train


def main(config: Config, run: Run) -> None:
    with join(config.train.device) as ranks:
        summary = train(config, log=run.metrics, ranks=ranks)
    if not ranks.leads:
        return
    numbers = {key: value for key, value in summary.items() if isinstance(value, int | float) and not isinstance(value, bool)}
    run.metrics(numbers | {f"head_bytes/{part}": size for part, size in summary["head_bytes"].items()})
    for curve in CURVES:
        run.artifact(Path(f"reports/{curve}_curve.csv"))
    examples = pq.ParquetFile("data/corpus/test.parquet").iter_batches(batch_size=2, columns=["text"])
    run.model(Path("models"), next(examples)["text"].to_pylist())


if __name__ == "__main__":
    run_stage("train", main, processes=lambda config: config.train.processes)
