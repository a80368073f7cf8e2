"""Measurements in child processes, one head and size each."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from fanin.config import Config
from fanin.files import InputError, read_json, write_json
from fanin.memory import probe
from fanin.memory.job import MIB, Job, available

__all__ = ["MIB", "Job", "answer", "available", "measure_all"]


def measure_all(jobs: Sequence[Job], steps: int, thorough: int, room: int) -> list[dict[str, Any]]:
    """Each job's `probe.measure`, in the order given, each in a process of its own.

    The first `thorough` jobs run `steps` steps and say what autograd saved, the rest run one; the first one also says what
    the allocator keeps. Two run at once on a CPU where their plans leave half of `room`: peaks do not depend on company.
    Raises InputError for what a child refused and for one that ran out of memory, RuntimeError for any other failure.
    """
    largest = sorted(job.plan().peak for job in jobs)[-2:]
    together = jobs[0].device.type == "cpu" and (os.cpu_count() or 1) > 1 and 2 * sum(largest) < room
    waiting = list(range(len(jobs)))
    running: dict[int, _Child] = {}
    results: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < 1 + together:
                    number = waiting.pop(0)
                    full = number < thorough
                    options = {"steps": steps if full else 1, "thorough": full, "allocator": number == 0}
                    running[number] = _Child(jobs[number], options, Path(folder) / str(number))
                for number in [n for n, child in running.items() if child.process.poll() is not None]:
                    results[number] = running.pop(number).result(room)
                time.sleep(0.05)
        finally:  # also after Ctrl-C
            for child in running.values():
                child.process.kill()
                child.process.wait()
    return [results[number] for number in range(len(jobs))]


class _Child:
    """A running `python -m fanin.memory measure`."""

    def __init__(self, job: Job, options: dict[str, Any], folder: Path) -> None:
        self.job, self.folder = job, folder
        folder.mkdir()
        request = options | {"config": dataclasses.asdict(job.config), "labels": job.labels, "tokens": job.tokens}
        request |= {"device": str(job.device), "precision": str(job.precision).removeprefix("torch.")}
        write_json(folder / "request.json", request)
        environment = os.environ | {"TQDM_DISABLE": "1"}
        command = [sys.executable, "-m", "fanin.memory", "measure", str(folder / "request.json"), str(folder / "result.json")]
        with open(folder / "output", "w", encoding="utf-8") as output:
            self.process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)

    def wait(self) -> dict[str, Any]:
        """What the child finds, once it has ended. Raises as `measure_all` does."""
        try:
            self.process.wait()
        finally:  # also after Ctrl-C
            self.process.kill()
            self.process.wait()
        return self.result(available(self.job.device))

    def result(self, room: int) -> dict[str, Any]:
        """What the ended child found. Raises as `measure_all` does."""
        path = self.folder / "result.json"
        found = read_json(path) if path.exists() else {}
        if "baseline" in found:
            return found
        if "refused" in found:
            raise InputError(found["refused"])
        code = self.process.returncode
        if "out_of_memory" in found or code == -9:  # SIGKILL is how the kernel takes memory back
            raise self.job.too_large("measuring ran out of memory", room)
        last = (self.folder / "output").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
        raise RuntimeError("\n".join([f"measuring memory ended with exit code {code}:", *last]))


def process_bytes(job: Job) -> int:
    """What a training process on a CPU holds before anything of `job` is built: measured in one, on a tiny step."""
    with tempfile.TemporaryDirectory() as folder:
        return _Child(job, {"steps": 0, "thorough": False, "allocator": False}, Path(folder) / "0").wait()["baseline"]


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a child does: `probe.measure` as the request says; {"refused" or "out_of_memory": text} where that fails."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), request["config"])
        return probe.measure(
            OmegaConf.to_object(merged),  # type: ignore[arg-type]
            request["labels"],
            request["tokens"],
            request["steps"],
            torch.device(request["device"]),
            getattr(torch, request["precision"]),
            thorough=request["thorough"],
            allocator=request["allocator"],
        )
    except InputError as error:
        return {"refused": str(error)}
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        return {"out_of_memory": str(error)}
    except RuntimeError as error:
        if "allocate memory" in str(error) or "not enough memory" in str(error):  # torch's allocator on a CPU
            return {"out_of_memory": str(error)}
        raise
