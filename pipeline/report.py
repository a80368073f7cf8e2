"""Stage report: reports/report.html, the page about this run, and reports/run.json, its figures for programs."""

from __future__ import annotations

from pathlib import Path

from fanin.config import Config
from fanin.reporting.page import OUTS, write_report
from fanin.stage import run_stage
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    summary = write_report(Path(), config)
    run.metrics({name: summary[name] for name in ("total_seconds", "dense_to_head_ratio") if summary[name] is not None})
    for out in OUTS:
        run.artifact(Path(out))


if __name__ == "__main__":
    run_stage("report", main)
