"""python -m fanin.memory measure REQUEST RESULT: one measurement in this process; both are JSON files (see `jobs`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fanin.files import read_json, write_json
from fanin.memory.jobs import answer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fanin.memory", description="Memory of the training step.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    measure = commands.add_parser("measure", help="run a training step in this process and write its peak memory")
    measure.add_argument("request", type=Path, help="JSON: config and the arguments of probe.measure")
    measure.add_argument("result", type=Path, help="JSON to write; sizes in bytes")
    options = parser.parse_args()
    write_json(options.result, answer(read_json(options.request)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
