"""Stage `memory`: the training step's memory, predicted and measured, beside a dense layer's."""

from __future__ import annotations

from pathlib import Path

from fanin.config import Config
from fanin.memory.record import record
from fanin.stage import run_stage
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    content = record(config)
    metrics = {"head_ratio": content["ratio"]}
    for row in content["runs"]:
        name = row["role"].replace(" ", "_")
        metrics[f"{name}/predicted_peak_mib"] = row["predicted_mib"]["peak"]
        if row["measured_mib"] is not None:
            metrics |= {f"{name}/{part}_mib": size for part, size in row["measured_mib"].items()}
            metrics[f"{name}/error_percent"] = row["error_percent"]
    run.metrics(metrics)
    run.artifact(Path("reports/memory.json"))
    run.artifact(Path("reports/memory_scale.csv"))


if __name__ == "__main__":
    run_stage("memory", main)
