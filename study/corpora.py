"""The study's corpora: which settings name each, and its own copy for what works outside the pipeline."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fanin import provenance
from fanin.config import Config
from fanin.data.corpus import build_corpus
from fanin.data.tokens import tokenize_corpus
from fanin.encoder import load_tokenizer
from fanin.files import InputError, read_json, sha256, write_json
from study.methods import configuration

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
    """Make sure that `corpus.folder` holds corpus/ and tokens/ of the present raw files and code; returns corpus.json.

    Built by the functions that the pipeline's stages call, so that it is the same, but apart from data/, whose corpus may be
    another one now.
    """
    config, folder = corpus.config(), corpus.folder
    wanted = {"identity": identity(corpus)}
    stamp = folder / "prepared.json"
    if not (stamp.exists() and read_json(stamp) == wanted):
        stamp.unlink(missing_ok=True)
        build_corpus(config, config.raw_folder, folder / "corpus")
        name, length = config.encoder.name, config.tokens.max_length
        tokenize_corpus(folder / "corpus", folder / "tokens", load_tokenizer(name, length), max_length=length, encoder=name)
        write_json(stamp, wanted)
    return read_json(folder / "corpus" / "corpus.json")


def identity(corpus: Corpus) -> str:
    """A hash of all that decides the tokens: settings, raw files, code."""
    config = corpus.config()
    files = sorted(path for path in config.raw_folder.rglob("*") if path.is_file())
    settings = [dataclasses.asdict(section) for section in (config.corpus, config.tokens)] + [config.encoder.name]
    parts = [json.dumps(settings), *(f"{path.name} {sha256(path)}" for path in files), stage_code("corpus", "tokens")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def stage_code(*stages: str) -> str:
    """A hash of the source files that dvc.yaml names among the deps of these stages."""
    listed = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    files = sorted({dep for stage in stages for dep in listed[stage]["deps"] if dep.endswith((".py", ".cpp"))})
    return hashlib.sha256("\n".join(f"{file} {sha256(file)}" for file in files).encode()).hexdigest()
