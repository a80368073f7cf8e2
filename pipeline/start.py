"""Stage `start`: the head's start from data (or none, where start.source is random), to data/start/."""

from __future__ import annotations

from pathlib import Path

from fanin.config import Config
from fanin.stage import run_stage
from fanin.start.build import build_start
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    summary = build_start(config, "data/tokens", "data/embeddings", "data/clusters", Path("data/start"))
    run.params({"source": summary["source"]})
    numbers = {key: summary[key] for key in ("residual", "documents") if summary[key] is not None}
    run.metrics(numbers | {f"zero_shot {name}": value for name, value in (summary["zero_shot"] or {}).items()})
    run.artifact(Path("data/start/start.json"))


if __name__ == "__main__":
    run_stage("start", main)
