"""Pipeline runs side by side: `python -m fanin.tracking.compare RUN RUN...` (what `make compare` calls)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fanin.files import InputError
from fanin.tracking.mirror import Mirror
from fanin.tracking.outbox import Outbox
from fanin.tracking.store import Unreachable, configured_uri, connect
from fanin.tracking.ui import DEFAULT_PORT, HOST, compare_link

if TYPE_CHECKING:
    from mlflow import MlflowClient

PIPELINES = "tags.`fanin.kind` = 'pipeline'"
ABSENT = "-"


def find_runs(client: MlflowClient, names: Sequence[str]) -> list[Any]:
    """MLflow runs of the named pipeline runs (run name, DVC experiment, run id or its beginning); the latest where
    several bear a name, the latest two where none is named.

    Raises InputError for a name that no run bears, with the names that exist.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = list(client.search_runs(experiments, PIPELINES, max_results=1000, order_by=["attributes.start_time DESC"]))
    if not names:
        if len(runs) < 2:
            raise InputError(f"RUNS: {len(runs)} pipeline run(s) in the store, two are needed; run `dvc exp run -S ...` first")
        return runs[1::-1]
    found = []
    for name in names:
        fitting = [run for run in runs if name in (run.info.run_name, run.data.tags.get("fanin.dvc_experiment"))]
        fitting = fitting or [run for run in runs if len(name) >= 6 and run.info.run_id.startswith(name)]
        if not fitting:
            known = ", ".join(dict.fromkeys(f"'{run.info.run_name}'" for run in runs[:10])) or "none yet"
            raise InputError(f"RUNS: no pipeline run is called {name!r}; the latest are: {known}")
        found.append(fitting[0])
    return found


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text, the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def differing(values: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Rows (name, value of each run) for the settings that are not the same in all runs."""
    names = sorted(set().union(*values))
    rows = [[name, *(run.get(name, ABSENT) for run in values)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def side_by_side(values: Sequence[Mapping[str, float]]) -> list[list[str]]:
    """Rows (name, value of each run, difference to the first run for each further one) for all metrics."""
    rows = []
    for name in sorted(set().union(*values)):
        numbers = [run.get(name) for run in values]
        first = numbers[0]
        changes = [ABSENT if first is None or n is None else f"{n - first:+.4g}" for n in numbers[1:]]
        rows.append([name, *(ABSENT if n is None else f"{n:.6g}" for n in numbers), *changes])
    return rows


def report(runs: Sequence[Any]) -> str:
    """What `make compare` prints of the runs, but for the address."""
    names = [f"{run.info.run_name} [{run.info.run_id[:8]}]" for run in runs]
    settings = differing([run.data.params for run in runs])
    metrics = side_by_side([run.data.metrics for run in runs])
    changes = [f"difference {number}" if len(runs) > 2 else "difference" for number in range(2, len(runs) + 1)]
    blocks = [
        table([["setting", *names], *settings]) if settings else "The settings are the same.",
        table([["metric", *names, *changes], *metrics]) if metrics else "No metrics yet.",
    ]
    return "\n\n".join(blocks)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: send what waits, then print settings that differ, metrics and the address of the UI's page."""
    parser = argparse.ArgumentParser(prog="python -m fanin.tracking.compare", description="Compare pipeline runs.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run name, DVC experiment or run id; none: the latest two")
    options = parser.parse_args(arguments)
    outbox = Outbox()
    uri = configured_uri(outbox)
    try:
        Mirror(outbox).flush()
        runs = find_runs(connect(outbox, uri), options.runs)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Unreachable as error:
        print(f"error: no answer from {uri}: {error}; start the server or unset MLFLOW_TRACKING_URI", file=sys.stderr)
        return 1
    print(report(runs))
    local = not uri.startswith("http")
    address = f"http://{HOST}:{DEFAULT_PORT}" if local else uri
    experiments = list(dict.fromkeys(run.info.experiment_id for run in runs))
    print(
        f"\n{compare_link(address, experiments, [run.info.run_id for run in runs])}"
        + (" (while `make ui` runs)" if local else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
