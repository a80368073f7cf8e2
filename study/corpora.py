"""The study's corpora: which settings name each, and its own copy for what works outside the pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml

from fanin import provenance
from fanin.config import Config
from fanin.data.corpus import build_corpus
from fanin.files import SOURCES, InputError, read_json, sha256, write_json
from study.methods import configuration

STAGES = ("corpus", "tokens", "embeddings", "clusters", "start", "train", "evaluate")  # those that a record rests on
WORK = Path(".study")  # ignored by git: corpora, predictions, logs


@dataclass(frozen=True)
class Corpus:
    """A corpus of the study. settings: over params.yaml; raw: folders whose files git may ignore, but a copy needs."""

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    raw: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where the study keeps its copy, made by `prepare`."""
        return WORK / self.name

    def ignored_files(self) -> list[str]:
        """Raw files that git ignores: the copy of the project in which an experiment runs would lack them."""
        if not self.raw:
            return []
        return (provenance.git("ls-files", "--others", "--ignored", "--exclude-standard", "--", *self.raw) or "").splitlines()

    def config(self, settings: dict[str, Any] | None = None, root: Path = Path()) -> Config:
        """The configuration of a run on this corpus, with `settings` over it."""
        return configuration(self.settings | (settings or {}), root)


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("near", "WordNet near", {"preset": "wordnet", "corpus.task": "near"}),
        Corpus("relations", "WordNet relations", {"preset": "wordnet", "corpus.task": "relations"}),
        Corpus("debian", "Debian", {"preset": "debian"}, ("data/raw/debian",)),
    )
}


def corpus_of(name: str) -> Corpus:
    """One of CORPORA, or any preset by its name. Raises InputError where there is no such preset."""
    if name in CORPORA:
        return CORPORA[name]
    if not (Path("presets") / f"{name}.yaml").exists():
        raise InputError(f"CORPUS: {name!r} is none of {', '.join(CORPORA)}, nor a preset in presets/")
    return Corpus(name, name, {"preset": name}, (f"data/raw/{name}",))


def prepare(corpus: Corpus) -> dict[str, Any]:
    """Make sure that `corpus.folder`/corpus is that of the present raw files and code; returns corpus.json's content.

    Built by the function that the corpus stage calls, so that it is the same, but apart from data/, whose corpus may be
    another one now.
    """
    config, folder = corpus.config(), corpus.folder
    files = sorted(path for path in config.raw_folder.rglob("*") if path.is_file())
    parts = [json.dumps(dataclasses.asdict(config.corpus)), *(f"{path.name} {sha256(path)}" for path in files)]
    made_of = hashlib.sha256("\n".join([*parts, stage_code("corpus")]).encode()).hexdigest()
    stamp = folder / "prepared.json"
    if not (stamp.exists() and read_json(stamp).get("made_of") == made_of):
        stamp.unlink(missing_ok=True)
        build_corpus(config, config.raw_folder, folder / "corpus")
        write_json(stamp, {"made_of": made_of, "documents": _digest(folder / "corpus")})
    return read_json(folder / "corpus" / "corpus.json")


def documents(corpus: Corpus) -> str:
    """A hash of all documents and labels, whatever code made them."""
    prepare(corpus)
    return str(read_json(corpus.folder / "prepared.json")["documents"])


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for side in ("train", "test"):
        with pq.ParquetFile(folder / f"{side}.parquet") as file:
            for batch in file.iter_batches(columns=["text", "labels"]):
                for text, labels in zip(batch["text"].to_pylist(), batch["labels"].to_pylist(), strict=True):
                    digest.update(f"{text}\0{labels}\0".encode())
        digest.update(side.encode())
    return digest.hexdigest()


def stage_code(*stages: str) -> str:
    """A hash of the source files that dvc.yaml names among the deps of these stages."""
    listed = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    files = sorted({dep for stage in stages for dep in listed[stage]["deps"] if dep.endswith(SOURCES)})
    return hashlib.sha256("\n".join(f"{file} {sha256(file)}" for file in files).encode()).hexdigest()
