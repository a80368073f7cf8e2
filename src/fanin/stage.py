"""What every stage script does around its work: settings, tracking, signals, exit codes."""

from __future__ import annotations

import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

import psutil

from fanin import torchrun
from fanin.config import Config, load_config
from fanin.files import InputError, write_json
from fanin.tracking import Run

REPEAT_SECONDS = 3.0  # a terminal, make and dvc may each pass on the same Ctrl-C


def _age() -> float:
    """Seconds since this process began, imports counted."""
    return time.time() - psutil.Process().create_time()


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: finish what must be kept and leave. `code` is the exit code that says which."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Signals:
    """Turn SIGINT and SIGTERM into `Stopped` in the main thread; one that follows within 3 s is the same request."""

    def __init__(self) -> None:
        self._last = -REPEAT_SECONDS

    def install(self) -> None:
        # SIGINT too: a stage that was started in the background inherits "ignore"
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= REPEAT_SECONDS:
            self._last = now
            raise Stopped(128 + number)

    def ignore(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)


def run_stage(name: str, main: Callable[[Config, Run], None], processes: Callable[[Config], int] = lambda config: 1) -> None:
    """Run a stage's `main(config, run)` and leave the process: exit code 0, 1 (error), 130 (Ctrl-C) or 143 (SIGTERM).

    `main` sees Ctrl-C and SIGTERM as KeyboardInterrupt; it may keep what it wants (a checkpoint) and must let it pass.
    InputError becomes one line on stderr, any other exception keeps its traceback. The tracked run ends accordingly.
    processes: how many of this machine run `main` together; the first of all machines' is the one that is tracked.
    """
    sys.exit(execute(name, main, processes))


def execute(name: str, main: Callable[[Config, Run], None], processes: Callable[[Config], int] = lambda config: 1) -> int:
    """What `run_stage` does, returning the exit code; signal handlers stay installed."""
    signals = _Signals()
    signals.install()
    run: Run | None = None
    leads = torchrun.leads()
    code, status, reason = 0, "FINISHED", ""
    try:
        config = load_config()
        torchrun.launch(processes(config))
        run = Run.start(name, config) if leads else Run(None, None)
        main(config, run)
        if leads:
            write_json(f"reports/stages/{name}.json", {"stage": name, "seconds": round(_age(), 3)})
    except InputError as error:
        code, status, reason = 1, "FAILED", str(error)
        print(f"error: {error}", file=sys.stderr)
    except Stopped as stop:
        code, status, reason = stop.code, "KILLED", signal.Signals(stop.code - 128).name
        print(f"{name}: stopped by {reason}", file=sys.stderr)
    except KeyboardInterrupt:
        code, status, reason = 130, "KILLED", "SIGINT"
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
        status, reason = ("FINISHED", "") if code == 0 else ("FAILED", f"exit code {code}")
    except BaseException as error:
        code, status, reason = 1, "FAILED", f"{type(error).__name__}: {error}"
        traceback.print_exc()
    signals.ignore()  # the rest takes milliseconds and must not be cut
    if run is not None:
        run.end(status, reason)
    sys.stdout.flush()
    return code
