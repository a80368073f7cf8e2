"""Command line of tracking.

python -m fanin.tracking run -- dvc repro    one pipeline run around a command
python -m fanin.tracking sync                send what the server does not have yet
python -m fanin.tracking ui                  the MLflow UI on the project's store
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fanin.tracking import ui
from fanin.tracking.sender import send_loop, sync, wrap


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m fanin.tracking`."""
    about = "Tracking: journals on disk, MLflow as their mirror."
    parser = argparse.ArgumentParser(prog="python -m fanin.tracking", description=about)
    commands = parser.add_subparsers(dest="command", required=True)
    around = commands.add_parser("run", help="run a command (dvc repro ...) as one pipeline run")
    around.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    resend = commands.add_parser("sync", help="send what the tracking server does not have yet")
    resend.add_argument("--again", action="store_true", help="also what was sent before, to a server that lost it or a new one")
    resend.add_argument("--to", metavar="URI", help="send to this store, whatever the runs named (a server that has moved)")
    page = commands.add_parser("ui", help="the MLflow UI on the project's store")
    page.add_argument("--port", type=int, default=ui.DEFAULT_PORT, help="the next free one is taken where it is in use")
    commands.add_parser("send", help="send in the background until all open runs have ended (started by stages)")
    options = parser.parse_args(arguments)
    if options.command == "run":
        words = options.words[1:] if options.words[:1] == ["--"] else options.words
        if not words:
            parser.error("run: a command is missing, for example: run -- dvc repro")
        return wrap(words)
    if options.command == "sync":
        return sync(again=options.again, to=options.to)
    if options.command == "ui":
        return ui.serve(options.port)
    return send_loop()


if __name__ == "__main__":
    sys.exit(main())
