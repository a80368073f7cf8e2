"""Keep the figures of the pipeline's last run as a record: stage times, throughput, memory, accuracy.

    dvc exp run -S preset=synthetic && python benchmarks/pipeline_run.py

Reads what the stages left in reports/ and data/ and adds it to benchmarks/results/. Raises InputError where a stage's part
is missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import records
from fanin.config import load_config
from fanin.files import read_json

STAGES = ("corpus", "tokens", "embeddings", "clusters", "start", "train", "evaluate")


def figures(project: Path) -> dict[str, Any]:
    config = load_config(project / "params.yaml")
    train = read_json(project / "reports/train.json")
    corpus = read_json(project / "data/corpus/corpus.json")
    kept = ("steps", "documents_per_second", "precision", "threads", "labels", "features", "peak_rss_mib", "head_bytes")
    return {
        "preset": config.preset,
        "seed": config.seed,
        "head": config.head.kind,
        "fan_in": config.head.fan_in,
        "group": config.head.group,
        "dtype": config.head.dtype,
        "batch": config.train.batch * config.train.accumulation,
        "tokens": config.tokens.max_length,
        "train_documents": corpus["train_documents"],
        "labels_per_document": corpus["labels_per_document"],
        **{name: train[name] for name in kept},
        "stage_seconds": {name: read_json(project / f"reports/stages/{name}.json")["seconds"] for name in STAGES},
        "metrics": read_json(project / "reports/metrics.json"),
        "commit": records.provenance(project)["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path("."), help="where the pipeline ran")
    found = figures(parser.parse_args().project)
    print(", ".join(f"{name} {found[name]}" for name in ("labels", "documents_per_second", "peak_rss_mib")))
    print(f"added to {records.add('pipeline', [found])}")


if __name__ == "__main__":
    main()
