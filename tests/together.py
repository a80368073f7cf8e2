"""Functions run by several ranks at once: gloo processes, forked from one that has imported everything."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from fanin.ranks import ALONE, Ranks


class Together:
    """The process that the others are forked from; `modules` is what it imports."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder, self.number = folder, 0
        command = [sys.executable, "-c", f"import together; together.serve({modules!r})"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def start(self, size: int, function: str, *arguments: object) -> list[int]:
        """Begin "module.function"(ranks, *arguments) in `size` processes; their process ids."""
        self.number += 1
        request = {"size": size, "function": function, "arguments": arguments, "out": str(self.folder / str(self.number))}
        (self.folder / str(self.number)).mkdir()
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self._hear()

    def wait(self) -> list[int]:
        """Their exit codes, by rank; negative for a signal that ended one."""
        return self._hear()

    def run(self, size: int, function: str, *arguments: object) -> None:
        """Run to the end, where all must succeed."""
        self.start(size, function, *arguments)
        codes = self.wait()
        assert codes == [0] * size, self.errors

    @property
    def errors(self) -> str:
        files = sorted((self.folder / str(self.number)).glob("errors-*"))
        return "\n".join(f"{file.name}: {file.read_text()}" for file in files)

    def _hear(self) -> list[int]:
        assert self.server.stdout is not None
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)


def serve(modules: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    import pandas  # noqa: F401 (pyarrow imports it at its first use: once here, not in every child)

    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for rank in range(request["size"]):
            child = os.fork()
            if not child:
                _be(rank, request)
            children.append(child)
        print(json.dumps(children), flush=True)
        print(json.dumps(_ends(children)), flush=True)


def _ends(children: list[int], patience: float = 240.0) -> list[int]:
    """Exit codes; who is still there after `patience` seconds is killed."""
    ends: dict[int, int] = {}
    until = time.monotonic() + patience
    while len(ends) < len(children):
        for child in [child for child in children if child not in ends]:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ends[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
        if time.monotonic() > until:
            for child in set(children) - set(ends):
                os.kill(child, signal.SIGKILL)
    return [ends[child] for child in children]


def _be(rank: int, request: dict) -> None:
    code = 1
    out = Path(request["out"])
    with open(out / f"errors-{rank}", "w", buffering=1) as errors:
        os.dup2(errors.fileno(), 2)
        try:
            size = request["size"]
            if size > 1:
                dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=size)
            module, _, function = request["function"].rpartition(".")
            ranks = Ranks(rank, size, size) if size > 1 else ALONE
            getattr(importlib.import_module(module), function)(ranks, *request["arguments"])
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
