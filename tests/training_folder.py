"""A small project folder to train in, through the library's own writers; runs of it in processes that can be killed."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from fanin.config import Auxiliary, Config, Encoder, Head, Rewiring, Start, Tokens, Train
from fanin.embeddings import embed_corpus
from fanin.ranks import ALONE, Ranks
from fanin.training import train
from tiny import tiny_encoder_folder, tiny_token_set

LABELS, DOCUMENTS = 60, 160


def small_config(encoder: Path) -> Config:
    """40 steps with everything on: rewiring until step 26, the auxiliary objective until step 20, recoding and
    refitting at step 18, dropout, accumulation."""
    return Config(
        tokens=Tokens(max_length=32),
        encoder=Encoder(name=str(encoder), dropout=0.2),
        start=Start(source="random"),
        head=Head(fan_in=6, intermediate=48),
        rewiring=Rewiring(method="rigl", amount=0.3, interval=4, recode_at=0.45, refit_epochs=1),
        auxiliary=Auxiliary(enabled=True, cutoff=2.0),
        train=Train(
            epochs=4.0,
            batch=7,
            accumulation=2,
            warmup=5,
            precision="fp32",
            device="cpu",
            log_every=1,
            validate_every=10,
            validation_documents=20,
            checkpoint_every=5,
        ),
    )


def prepare(folder: Path) -> Config:
    """Write data/ under `folder`; the config that fits it."""
    data = folder / "data"
    tokens = tiny_token_set(make(data / "tokens") / "train.arrow", DOCUMENTS, LABELS)
    tiny_token_set(data / "tokens" / "labels.arrow", documents=LABELS, seed=5)
    description = {"documents": {"train": len(tokens), "test": 0}, "label_documents": 0, "labels": LABELS, "pad_id": 0}
    (data / "tokens" / "tokens.json").write_text(json.dumps(description))
    np.save(make(data / "clusters") / "order.npy", np.random.default_rng(3).permutation(LABELS).astype(np.int32))
    np.save(data / "clusters" / "meta.npy", (np.arange(LABELS) % 8).astype(np.int32))
    save_file({}, make(data / "start") / "head.safetensors")
    texts = pa.table({"id": pa.array(range(LABELS), pa.int32()), "text": [f"label {i}" for i in range(LABELS)]})
    pq.write_table(texts, make(data / "corpus") / "labels.parquet")
    config = small_config(tiny_encoder_folder(folder, dropout=0.1))
    embed_corpus(config, data / "tokens", data / "embeddings")
    return config


def train_in(folder: Path, config: Config, name: str = "run", log=lambda metrics, step: None, ranks: Ranks = ALONE) -> dict:
    """Train on folder/data; models, reports and checkpoints go to folder/<name>."""
    data, out = folder / "data", folder / name
    return train(
        copy.deepcopy(config),
        tokens_folder=data / "tokens",
        clusters_folder=data / "clusters",
        embeddings_folder=data / "embeddings",
        start_folder=data / "start",
        labels=data / "corpus" / "labels.parquet",
        models=out / "models",
        reports=out / "reports",
        checkpoints=out / "checkpoints",
        log=log,
        ranks=ranks,
    )


def train_in_two_goes(folder: Path, config: Config, name: str) -> None:
    """As `train_in`, but interrupted at step 13 and taken up again."""
    stopped = []

    def stop(metrics, step):
        if step == 13 and not stopped and "loss" in metrics:
            stopped.append(step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in(folder, config, name, log=stop)
    train_in(folder, config, name)


def make(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def assert_same_run(folder: Path, one: str, two: str) -> None:
    """Both runs ended with the same bits: weights, indices, losses, validation, rewiring."""
    for file in ("models/head.safetensors", "models/encoder/model.safetensors"):
        first, second = load_file(folder / one / file), load_file(folder / two / file)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
    for curve in ("train", "validation", "rewiring"):
        rows = [(folder / run / f"reports/{curve}_curve.csv").read_text().splitlines() for run in (one, two)]
        # the last column of the train curve is documents a second, which no two runs share
        cut = [[line.rpartition(",")[0] if curve == "train" else line for line in lines] for lines in rows]
        assert cut[0] == cut[1]


class Forks:
    """Runs of a folder, each in a process of its own, forked from one that has imported everything: no wait for torch."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", "import training_folder; training_folder.serve()"]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def start(self, folder: Path, name: str) -> Fork:
        """Begin run `name` of `folder` with `small_config`; one at a time."""
        make(folder / name)
        self._say({"folder": str(folder), "name": name})
        return Fork(self, folder / name, self.hear())

    def _say(self, request: dict[str, str]) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()

    def hear(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)


class Fork:
    """One such run. Its logged steps are the lines of `steps`, its stderr is in `errors`."""

    def __init__(self, forks: Forks, out: Path, pid: int) -> None:
        self.forks, self.out, self.pid = forks, out, pid

    def wait_for_step(self, step: int) -> None:
        """Until step `step` has been logged; 0: until the run is about to begin."""
        until, steps = time.monotonic() + 120, self.out / "steps"
        while True:
            lines = steps.read_text().splitlines() if steps.exists() else []
            if lines and int(lines[-1]) >= step:
                return
            assert time.monotonic() < until, self.errors
            time.sleep(0.002)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, or the negative signal that ended it."""
        return os.waitstatus_to_exitcode(self.forks.hear())

    @property
    def errors(self) -> str:
        return (self.out / "errors").read_text()


def serve() -> None:
    """Fork a run for each line of stdin; print its process id, then how it ended."""
    torch.set_num_threads(1)
    import pandas  # noqa: F401 (pyarrow imports it at its first use: once here, not in every child)

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _be_a_run(Path(request["folder"]), request["name"])
        print(child, flush=True)
        print(os.waitpid(child, 0)[1], flush=True)


def _be_a_run(folder: Path, name: str) -> None:
    code = 1
    with open(folder / name / "steps", "w", buffering=1) as steps, open(folder / name / "errors", "w", buffering=1) as errors:
        os.dup2(errors.fileno(), 2)
        print(0, file=steps)
        try:
            train_in(folder, small_config(folder / "encoder"), name, lambda metrics, step: print(step, file=steps))
            code = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
