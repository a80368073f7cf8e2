"""Stage evaluate: how well the model in models/ ranks the test documents."""

from pathlib import Path

from fanin.config import Config
from fanin.evaluation import OUTS, evaluate
from fanin.ranks import join
from fanin.stage import run_stage
from fanin.tracking import Run

REPORTS = Path("reports")


def main(config: Config, run: Run) -> None:
    with join(config.train.device) as ranks:
        found = evaluate(config, "models", "data/tokens", "data/corpus", REPORTS, ranks)
    if not ranks.leads:
        return
    run.metrics(found)
    for name in OUTS:
        run.artifact(REPORTS / name)


if __name__ == "__main__":
    run_stage("evaluate", main, processes=lambda config: config.train.processes)
