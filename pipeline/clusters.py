"""Stage `clusters`: balanced clusters of related labels, from the embedded documents, to data/clusters/."""

from __future__ import annotations

from pathlib import Path

from fanin.clusters import build_clusters
from fanin.config import Config
from fanin.stage import run_stage
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    summary = build_clusters(config, "data/tokens", "data/embeddings", Path("data/clusters"))
    run.params({"meta_labels": summary["meta_labels"], "labels": summary["labels"]})
    run.metrics({key: summary[key] for key in ("without_documents",)})
    run.artifact(Path("data/clusters/clusters.json"))


if __name__ == "__main__":
    run_stage("clusters", main)
