"""A rival's run: its own process in its own environment, its predictions scored by the project's own metrics."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from fanin.files import InputError, read_json
from study.corpora import Corpus, prepare
from study.methods import Method
from study.processes import run_group
from study.records import data_facts, origin, quality, scored

PYTHON = Path(".venv-rivals/bin/python")
SCRIPT = Path("study/rivals/run.py")
_MIB = 2**20


class Unavailable(InputError):
    """The rival's package is not there; the study says so and goes on."""


def run(method: Method, corpus: Corpus, seed: int) -> dict[str, Any]:
    """Train and rank; returns the record. Raises Unavailable without the package, InputError where the rival fails."""
    began = time.monotonic()
    about = prepare(corpus)
    folder = corpus.folder / "rivals" / method.name
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    (folder / "rival.json").unlink(missing_ok=True)
    words = [str(PYTHON), str(SCRIPT), method.name, str(corpus.folder / "corpus"), str(folder), "--seed", str(seed)]
    if not PYTHON.exists():
        raise Unavailable(f"{method.name}: no {PYTHON}; run `make rivals`")
    with open(log, "w") as file:
        code = run_group(words, file)
    if code == 3:  # run.py's own: the package cannot be imported
        raise Unavailable(f"{method.name}: {log.read_text(errors='replace').strip().splitlines()[-1]}")
    if code or not (folder / "rival.json").exists():
        raise InputError(f"{method.name} ended with exit code {code}; its output is in {log}")
    told = read_json(folder / "rival.json")
    evaluation = scored(np.load(folder / "ranked.npy"), corpus.folder / "corpus", corpus.config().evaluate)
    return {
        "method": method.name,
        "kind": "rival",
        "corpus": corpus.name,
        "seed": seed,
        **data_facts(about),
        **quality(evaluation),
        "model_mib": round(told["model_bytes"] / _MIB, 3),
        "train_seconds": told["train_seconds"],
        "train_cpu_seconds": told["train_cpu_seconds"],
        "rank_seconds": told["rank_seconds"],
        "peak_mib": told["peak_mib"],
        "settings": told["settings"],
        **origin(),
        "rival_versions": told["versions"],
        "threads": told["threads"],
        "wall_seconds": round(time.monotonic() - began, 1),
    }
