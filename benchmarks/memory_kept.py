"""What a training process on a CPU really holds, step after step, on a corpus whose documents have many lengths.

    python benchmarks/memory_kept.py [--tokens FOLDER] [--labels FILE] [--steps 150] [--set KEY=VALUE ...]

`benchmarks/memory.py` measures steps of one length, with an allocator that keeps nothing; glibc does keep freed blocks, and
batches of many lengths leave many sizes of them. Here the train stage's own function runs on real tokens, and the highest
resident memory since it asked for its plan is held against that plan. Needs Linux and a tokens folder (dvc repro tokens).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

import records
from fanin import training
from fanin.config import Config, load_config
from fanin.embeddings import embed_corpus
from fanin.files import read_json
from fanin.memory.job import MIB
from fanin.memory.peaks import Peaks, Trimmer, current
from fanin.memory.plan import Plan
from fanin.start.build import build_start
from fanin.trainer import Trainer

STARTED_FROM = 2000  # documents: memory does not depend on how good the start is
MARKS = (10, 30, 50, 100, 150, 200, 300, 500, 1000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"), help="folder of the tokens stage")
    parser.add_argument("--labels", type=Path, default=Path("data/corpus/labels.parquet"), help="labels.parquet of that corpus")
    parser.add_argument("--name", default="wordnet", help="what to call the corpus in the record")
    parser.add_argument("--steps", type=int, default=150, metavar="N")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="settings", help="over params.yaml")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the records")
    options = parser.parse_args()
    config = configured(options.settings, options.steps)
    record = {"corpus": options.name, "settings": options.settings, **measured(config, options.tokens, options.labels)}
    records.add("memory_kept", [record], options.out)
    peak, need = record["planned_peak_mib"], record["planned_need_mib"]
    highest = ", ".join(f"{held:,.0f} in {steps} steps" for steps, held in record["highest_mib"].items())
    print(f"planned {peak:,.0f} MiB, with what the allocator keeps {need:,.0f}; highest {highest}")
    print(f"given back {record['trims']} times; {record['seconds']:.0f} s, {record['cpu_seconds']:.0f} of the processor")
    return 0


def configured(settings: list[str], steps: int) -> Config:
    """params.yaml with these settings over it, for `steps` steps of training alone."""
    params = OmegaConf.load("params.yaml")
    fixed = [f"train.max_steps={steps}", "train.validation_documents=0", "train.checkpoint_every=0", "rewiring.recode_at=0"]
    params.merge_with_dotlist([f"encoder.embed_documents={STARTED_FROM}", *settings, *fixed])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        OmegaConf.save(params, path)
        return load_config(path, "presets")


def prepare(config: Config, tokens: Path, folder: Path) -> None:
    """A start, in a process of its own as the pipeline makes it, so that it leaves nothing in the one that trains."""
    embed_corpus(config, tokens, folder / "embeddings")
    build_start(config, tokens, folder / "embeddings", folder, folder / "start")


def measured(config: Config, tokens: Path, labels: Path) -> dict[str, Any]:
    """Train, and return what was planned and the highest resident memory after so many steps, in MiB, both beside what the
    process held when it asked for the plan."""
    peaks = Peaks(training.choose_device(config.train.device))
    if not peaks.resettable:
        raise SystemExit("this system does not let the peak of resident memory be reset")
    held, plans, trimmers = 0, list[Plan](), list[Trimmer]()
    highest: dict[int, float] = {}

    def check(*arguments: Any) -> Plan:
        nonlocal held
        held = current(peaks.device)
        plans.append(_check(*arguments))
        peaks.begin("training")
        return plans[0]

    def between(*arguments: Any) -> Any:
        trimmers.append(_between(*arguments))
        return trimmers[0]

    def step(trainer: Trainer, *arguments: Any) -> Any:
        result = _step(trainer, *arguments)
        if trainer.step in MARKS or trainer.step == trainer.total:
            peaks.enter("training")
            highest[trainer.step] = round((max(peaks.highest.values()) - held) / MIB, 1)
        return result

    _check, _between, _step = training.check, training.between_steps, Trainer._train_step
    training.check, training.between_steps, Trainer._train_step = check, between, step  # type: ignore[assignment, method-assign]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = read_json(tokens / "tokens.json")["labels"]
        for path in (folder / "order.npy", folder / "meta.npy"):
            np.save(path, np.arange(count, dtype=np.int32))
        preparing = multiprocessing.get_context("spawn").Process(target=prepare, args=(config, tokens, folder))
        preparing.start()
        preparing.join()
        if preparing.exitcode:
            raise SystemExit("the start could not be made")
        began, cpu = time.perf_counter(), time.process_time()
        summary = training.train(
            config,
            tokens_folder=tokens,
            clusters_folder=folder,
            start_folder=folder / "start",
            labels=labels,
            models=folder / "models",
            reports=folder / "reports",
            checkpoints=folder / "checkpoints",
        )
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    plan = plans[0]
    return {
        "labels": count,
        "tokens": config.tokens.max_length,
        "batch": config.train.batch,
        "precision": summary["precision"],
        "planned_peak_mib": round(plan.peak / MIB, 1),
        "planned_step_mib": round((plan.peak - plan.resident) / MIB, 1),
        "planned_need_mib": round(plan.need / MIB, 1),
        "highest_mib": highest,
        "trims": trimmers[0].trimmed,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
    }


if __name__ == "__main__":
    sys.exit(main())
