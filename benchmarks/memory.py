"""The memory plan held against measured peaks: a grid of heads, sizes and settings, every record a process of its own.

    python benchmarks/memory.py [--only NAME ...] [--list] [--out FOLDER]

A record holds the plan, made before anything of the run was built (`predicted_mib`, with `slack_mib` for the allocator beside
it), and the measured peak of the trainer's own step (`peak_mib`; on a CPU `resident_mib` is the peak with glibc's allocator
left as it is, which is how training runs). Cases whose plan does not fit into free memory are left out, and named.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, PreTrainedTokenizerFast

import records
from fanin import __version__
from fanin.config import Config, check
from fanin.encoder import choose_precision, load_description
from fanin.memory.fits import FIRST_USE
from fanin.memory.job import MIB, Job, available
from fanin.memory.jobs import measure_all, process_bytes
from fanin.memory.shapes import EncoderShape

AMAZON_670K, AMAZON_3M = 670_091, 2_812_281


@dataclass(frozen=True, kw_only=True)
class Case:
    """One record's settings, as `section.name` of params.yaml; encoder: minilm, or bert-base for a random one of its shape."""

    labels: int
    batch: int = 64
    tokens: int = 64
    encoder: str = "minilm"
    settings: dict[str, Any] = field(default_factory=dict)

    def job(self, device: torch.device, folder: Path) -> Job:
        config = Config()
        wanted = {"rewiring.method": "set", "train.batch": self.batch, "encoder.name": _encoder(self.encoder, folder)}
        for key, value in (wanted | self.settings).items():
            section, name = key.split(".")
            config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        check(config)
        shape = EncoderShape.of(load_description(config.encoder.name), config.encoder.hidden_dropout)
        precision = choose_precision(config.train.precision, device)
        return Job(config=config, shape=shape, labels=self.labels, tokens=self.tokens, device=device, precision=precision)


def sparse(labels: int, *, shape: dict[str, Any] | None = None, **settings: Any) -> Case:
    return Case(labels=labels, settings={f"head.{k}": v for k, v in settings.items()}, **(shape or {}))


def rival(kind: str, labels: int, **shape: Any) -> Case:
    """A dense or bottleneck head, straight on the encoder."""
    return Case(labels=labels, settings={"head.kind": kind, "head.intermediate": 0, "rewiring.method": "none"}, **shape)


def changed(case: Case, **settings: Any) -> Case:
    return replace(case, settings=case.settings | {key.replace("__", "."): value for key, value in settings.items()})


LONG = {"batch": 32, "tokens": 128}
PAPER = {"batch": 128, "tokens": 128, "encoder": "bert-base"}  # Amazon-3M as Renee and ELMO train it
CPU_CASES = {
    "sparse-19k": sparse(18_944),
    "dense-19k": rival("dense", 18_944),
    "bottleneck-19k": rival("bottleneck", 18_944),
    "sparse-131k": sparse(131_072),
    "dense-131k": rival("dense", 131_072),
    "sparse-670k": sparse(AMAZON_670K),
    "dense-670k": rival("dense", AMAZON_670K),
    "bottleneck-670k": rival("bottleneck", AMAZON_670K),
    "head-tail-670k": sparse(AMAZON_670K, kind="head_tail", dense_share=0.01),
    "sparse-670k-rigl": changed(sparse(AMAZON_670K), rewiring__method="rigl"),
    "sparse-670k-long": sparse(AMAZON_670K, shape=LONG),
    "sparse-670k-checkpointing": changed(sparse(AMAZON_670K, shape=LONG), encoder__checkpointing=True),
    "sparse-670k-bf16-moments": changed(sparse(AMAZON_670K), train__encoder_moments="bf16", encoder__checkpointing=True),
    "sparse-670k-accumulation": changed(sparse(AMAZON_670K, shape={"batch": 16}), train__accumulation=4),
    "sparse-3m": sparse(AMAZON_3M),
    "sparse-3m-no-dropout": changed(sparse(AMAZON_3M), encoder__hidden_dropout=0.0),  # as presets/wordnet.yaml has it
    "sparse-3m-groups-bf16": sparse(AMAZON_3M, group=64, dtype="bf16"),
    "sparse-3m-fp8": changed(sparse(AMAZON_3M, dtype="fp8"), train__momentum=0.0),
    "bottleneck-3m": rival("bottleneck", AMAZON_3M),
    "dense-3m": rival("dense", AMAZON_3M),
    "sparse-10m": sparse(10_000_000),
    "sparse-10m-groups-bf16": changed(sparse(10_000_000, group=64, dtype="bf16"), train__momentum=0.0),
}
_GROUPS = {"intermediate": 0, "group": 64, "dtype": "bf16"}
GPU_CASES = {
    "sparse-3m": changed(sparse(AMAZON_3M, shape=PAPER, **_GROUPS), train__momentum=0.0),
    "sparse-3m-frugal": changed(
        sparse(AMAZON_3M, shape=PAPER, **_GROUPS),
        train__momentum=0.0,
        encoder__checkpointing=True,
        train__encoder_moments="bf16",
    ),
    "sparse-3m-fp32": sparse(AMAZON_3M, shape=PAPER, intermediate=0),
    "bottleneck-3m": rival("bottleneck", AMAZON_3M, **PAPER),
    "dense-3m": rival("dense", AMAZON_3M, **PAPER),
    "sparse-1b": changed(
        sparse(10**9, shape={"batch": 32, "tokens": 32}, **(_GROUPS | {"dtype": "fp8"}), fan_in=16), train__momentum=0.0
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some cases of the grid")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder for the records")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = GPU_CASES if device.type == "cuda" else CPU_CASES
    unknown = sorted(set(options.only or ()) - set(cases))
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; there are {', '.join(cases)}")
    if options.list:
        print("\n".join(cases))
        return 0
    chosen = {name: cases[name] for name in options.only or cases}
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        jobs = {name: case.job(device, Path(folder)) for name, case in chosen.items()}
        baseline = process_bytes(next(iter(jobs.values()))) if device.type == "cpu" else FIRST_USE["cuda"]
        for name, job in jobs.items():
            plan, room = job.plan(baseline), available(device)
            if plan.need > room:
                print(f"{name}: left out, for {plan.need / MIB:,.0f} MiB are planned and {room / MIB:,.0f} free")
                continue
            measured = measure_all([job], 1, 0, room)[0]
            record = described(name, chosen[name], job) | figures(job, baseline, measured)
            records.add("memory", [record], options.out)
            worst = max(worst, abs(record["error_percent"]))
            print(f"{name}: planned {record['predicted_mib']:,.0f}, measured {record['peak_mib']:,.0f} MiB", end="; ")
            print(
                f"{record['error_percent']:+.1f} %; resident {record['resident_mib']} of {record['need_mib']} MiB", flush=True
            )
    print(f"worst error {worst:.1f} %")
    return int(worst > 10)


def described(name: str, case: Case, job: Job) -> dict[str, Any]:
    head, train = job.config.head, job.config.train
    fixed = head.sparse
    return {
        "name": name,
        "head": head.kind,
        "labels": job.labels,
        "features": job.features,
        "batch": train.batch,
        "accumulation": train.accumulation,
        "tokens": job.tokens,
        "fan_in": head.fan_in if fixed else head.bottleneck if head.kind == "bottleneck" else None,
        "group": head.group if fixed else None,
        "dtype": head.dtype,
        "momentum": train.momentum,
        "rewiring": job.config.rewiring.method,
        "encoder": case.encoder,
        "precision": str(job.precision).removeprefix("torch."),
        "checkpointing": job.config.encoder.checkpointing,
        "encoder_moments": train.encoder_moments,
        "fanin": __version__,
    }


def figures(job: Job, baseline: int, measured: dict[str, Any]) -> dict[str, Any]:
    plan, peak = job.plan(baseline), measured["peak"]
    kept = measured["allocator"] if job.device.type == "cpu" else measured["reserved"] - peak
    return {
        "predicted_mib": round(plan.peak / MIB, 1),
        "peak_mib": round(peak / MIB, 1),
        "error_percent": round(100 * (plan.peak / peak - 1), 2),
        "phase": measured["phase"],
        "predicted_phase": plan.phase,
        "slack_mib": round(plan.slack / MIB, 1),
        "need_mib": round(plan.need / MIB, 1),
        "resident_mib": None if kept is None else round((peak + kept) / MIB, 1),
        "baseline_mib": round(measured["baseline"] / MIB, 1),
    }


def _encoder(name: str, folder: Path) -> str:
    """What `Encoder.load` takes. bert-base: a folder with its config (transformers' default) and a tokenizer that knows as many
    words, made up; no weights. So a bare machine needs no package with an encoder."""
    path = folder / name
    if name == "bert-base" and not path.exists():
        config = BertConfig()
        config.save_pretrained(path)
        words = ["[PAD]", "[UNK]", *(f"word{i}" for i in range(config.vocab_size - 2))]
        known = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        PreTrainedTokenizerFast(tokenizer_object=known, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(path)
    return str(path) if name == "bert-base" else name


if __name__ == "__main__":
    sys.exit(main())
