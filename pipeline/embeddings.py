"""Embed a sample of data/tokens/ into data/embeddings/."""

from __future__ import annotations

from fanin.config import Config
from fanin.embeddings import embed_corpus
from fanin.stage import run_stage
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    summary = embed_corpus(config)
    run.params({"encoder": config.encoder.name, "pooling": config.encoder.pooling, "precision": summary.pop("precision")})
    run.metrics(summary)


if __name__ == "__main__":
    run_stage("embeddings", main)
