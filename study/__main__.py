"""Command line of the study (what `make compare CORPUS=near BUDGET=30m` calls)."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from fanin.files import InputError
from study.arguments import budget, setting
from study.corpora import CORPORA, WORK, corpus_of
from study.loop import Study
from study.methods import choose, load_methods
from study.plots import draw_all
from study.records import RESULTS, Records, record_file
from study.tables import results, write_csv


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the budget holds, then print the table; 1 where a run failed, 130 where it was stopped."""
    parser = argparse.ArgumentParser(prog="python -m study", description="Every method on a corpus, side by side.")
    parser.add_argument("corpus", metavar="CORPUS", help=f"{', '.join(CORPORA)}, or any preset")
    parser.add_argument("--budget", type=budget, metavar="TIME", help="90s, 30m, 6h: start no run that would pass it")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", default="", help="names, main, ablation, rivals or all (the default), between blanks")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help=f"over all methods; records go to {WORK}"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, show what there is")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup a closed terminal is no reason to stop
            signal.signal(number, _interrupt)
    try:
        corpus, methods = corpus_of(options.corpus), load_methods()
        trial = dict(options.set)
        folder = WORK / corpus.name / "trial" if trial else RESULTS
        records = Records(record_file(corpus.name, folder))
        failed = False
        if not options.table:
            outcome = Study(corpus, choose(methods, options.methods), options.seeds, records, trial).run(options.budget)
            failed = bool(outcome.failed)
        print("\n" + results(records.all, methods))
        if records.all:
            write_csv(records.all, WORK / corpus.name / "study.csv")
            draw_all(records.all, methods, corpus.title, WORK / corpus.name / "plots")
            print(f"\nplots and study.csv: {WORK / corpus.name}; in MLflow (make ui): tags.`fanin.study` = '{corpus.name}'")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return int(failed)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
