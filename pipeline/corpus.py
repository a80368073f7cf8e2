"""Stage `corpus`: the preset's raw files to data/corpus/."""

from __future__ import annotations

from pathlib import Path

from fanin.config import Config
from fanin.data.corpus import build_corpus
from fanin.stage import run_stage
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    facts = build_corpus(config, config.raw_folder, Path("data/corpus"))
    run.dataset(facts)
    run.metrics({key: value for key, value in facts.items() if isinstance(value, int | float)})


if __name__ == "__main__":
    run_stage("corpus", main)
