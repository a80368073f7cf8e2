"""Processes that share a device: each imports everything once and then does task after task, until the budget's end."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from study.tasks import Task, perform

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Pool:
    """`workers` processes of `threads` CPU threads; what they print goes to files in the folder `logs`."""

    def __init__(self, workers: int, threads: int, logs: Path) -> None:
        self.threads, self.logs = threads, logs
        logs.mkdir(parents=True, exist_ok=True)
        self._context = multiprocessing.get_context("spawn")  # a fork has no way to use a GPU
        self._workers = [self._hire(number) for number in range(workers)]

    def run(
        self,
        tasks: Sequence[Task],
        deadline: float,
        expected: Callable[[Task], float],
        done: Callable[[Task, dict[str, Any], float], None],
        failed: Callable[[Task, str], None],
    ) -> list[Task]:
        """Do `tasks`, the first of those that are ready first; returns those left undone for lack of time.

        deadline: on the monotonic clock: no task is started that would pass it by `expected` seconds, and one that does
        nevertheless is ended. done(task, result, seconds) and failed(task, traceback) are called here; what needs a task
        that failed is not done either, and failed hears of it.
        """
        waiting, finished, lost, left = list(tasks), set[str](), set[str](), list[Task]()
        while waiting or any(worker.task for worker in self._workers):
            for task in [task for task in waiting if lost.intersection(task.needs.values())]:
                waiting.remove(task)
                lost.add(task.key)
                failed(task, "what it needs failed")
            for worker in self._workers:
                for task in [task for task in waiting if finished.issuperset(task.needs.values())]:
                    if worker.task is not None:
                        break
                    waiting.remove(task)
                    if time.monotonic() + expected(task) > deadline:
                        left.append(task)
                    else:
                        worker.begin(task)
            busy = [worker for worker in self._workers if worker.task]
            if not busy:
                break
            told = wait([worker.connection for worker in busy], min(max(deadline - time.monotonic(), 0), 60))
            if not told and time.monotonic() >= deadline:
                break
            for worker in busy:
                if worker.connection not in told:
                    continue
                task, (result, trouble), seconds = worker.finish()
                if result is not None:
                    finished.add(task.key)
                    done(task, result, seconds)
                else:
                    lost.add(task.key)
                    failed(task, trouble)
                if not worker.process.is_alive():
                    self._workers[worker.number] = self._hire(worker.number)
        return [*[worker.task for worker in self._workers if worker.task], *left, *waiting]

    def close(self) -> None:
        """End the processes, those that still work too."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()

    def _hire(self, number: int) -> _Worker:
        before = {name: os.environ.get(name) for name in _THREADS}
        os.environ.update(dict.fromkeys(_THREADS, str(self.threads)))  # read when a child's libraries are loaded
        try:
            return _Worker(self._context, number, self.threads, self.logs / f"worker-{number}.txt")
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


class _Worker:
    def __init__(self, context: Any, number: int, threads: int, log: Path) -> None:
        self.number = number
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads, log), daemon=True)
        self.process.start()
        other.close()
        self.task: Task | None = None
        self.began = 0.0

    def begin(self, task: Task) -> None:
        self.task, self.began = task, time.monotonic()
        self.connection.send(task)

    def finish(self) -> tuple[Task, tuple[dict[str, Any] | None, str], float]:
        """The task, its result or the traceback, and its seconds."""
        assert self.task is not None
        task, self.task = self.task, None
        try:
            result, trouble, seconds = self.connection.recv()
            return task, (result, trouble), seconds
        except (EOFError, OSError):
            self.process.join(10)
            return task, (None, f"its process ended with exit code {self.process.exitcode}"), 0.0


def _end_with_parent() -> None:
    """A study that is killed would leave its workers at their tasks, for hours."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _serve(connection: Connection, threads: int, log: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.empty(1, device="cuda")  # takes a second, and memory statistics need it
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        began = time.monotonic()  # the wait for the process itself is none of the task's
        result, trouble = None, ""
        try:
            result = perform(task)
        except Exception:
            trouble = traceback.format_exc()
        connection.send((result, trouble, time.monotonic() - began))
