"""The study's own methods on a machine that has torch and transformers, but neither DVC nor MLflow nor a network:

    python -m study.standalone prepare near relations --into FOLDER       # where the project is set up: data to take along
    python -m study.standalone run --data FOLDER --out RESULTS --workers 6 --budget 4m --jobs "near:sparse,dense_start:1,2"

Several runs share the device (`study.pool`), and what several need is made once (`study.tasks`). The stages' functions are
those that the pipeline calls, and records are those of `python -m study`, each on disk as soon as its run is over. Beside
those fields they hold `workers` (runs at a time: they share the device, so that times are no measure of speed), `threads`
and `parts`, the seconds that each part took.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from fanin.config import Config
from fanin.data.tokens import tokenize_corpus
from fanin.encoder import Encoder, load_tokenizer, resolve
from fanin.files import InputError, atomic_path, read_json, sha256, write_json
from study import corpora
from study.arguments import budget, setting
from study.corpora import STAGES, Corpus, corpus_of, stage_code
from study.methods import Method, choose, load_methods
from study.pool import Pool
from study.records import Records, compressed, configuration_of, digest, origin, record_file, trained
from study.tables import markdown
from study.tasks import SHARED, Task, shared_tasks

COMMIT_VARIABLE = "FANIN_COMMIT"
_TAKEN = ("corpus.json", "labels.parquet", "test.parquet", "filter.parquet")  # of a corpus
_PARTS = ("building", "steps", "validation", "recoding", "refitting", "calibration", "saving", "around", "ranking", "scoring")


class Job(NamedTuple):
    """One run: a method on a corpus with a seed."""

    corpus: Corpus
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return _name(self.corpus.name, self.method.name, self.seed)


def _name(corpus: str, method: str, seed: int) -> str:
    return f"{corpus} {method}, seed {seed}"


def prepare(names: Sequence[str], into: Path) -> None:
    """Put into a folder, as small as can be, what `run` needs of these corpora: tokens, labels, the encoder with its weights
    rounded to float16, and the commit. What is there already is kept where nothing that it was made of has changed."""
    into.mkdir(parents=True, exist_ok=True)
    chosen = [corpus_of(name) for name in names]
    encoders = {corpus.config().encoder.name for corpus in chosen}
    if len(encoders) != 1:
        raise InputError(f"these corpora have {len(encoders)} encoders ({', '.join(sorted(encoders))}); take one's at a time")
    encoder, origins = encoders.pop(), into / "origin.json"
    before = read_json(origins)["made_of"] if origins.exists() else {}
    weights = [sha256(path) for path in sorted(Path(resolve(encoder)).glob("*.safetensors"))]
    made_of = before | {"encoder.tar.xz": digest([encoder, weights])}
    code = stage_code("corpus", "tokens")
    made_of |= {
        f"{corpus.name}.tar.xz": digest([corpora.documents(corpus), code, corpus.config().tokens.max_length, encoder])
        for corpus in chosen
    }
    for name, parts in made_of.items():
        if before.get(name) == parts and (into / name).exists():
            continue
        with tempfile.TemporaryDirectory() as place:
            if name == "encoder.tar.xz":
                _lay_out_encoder(encoder, Path(place))
            else:
                _lay_out(corpus_of(name.removesuffix(".tar.xz")), Path(place))
            with atomic_path(into / name) as temporary, tarfile.open(temporary, "w:xz") as archive:
                archive.add(place, ".")
    write_json(origins, {"commit": origin()["commit"], "code": stage_code(*STAGES), "made_of": made_of})
    for path in sorted(into.iterdir()):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def _lay_out_encoder(name: str, folder: Path) -> None:
    encoder = Encoder.load(name)
    encoder.model.half().save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)


def _lay_out(corpus: Corpus, folder: Path) -> None:
    """The corpus, made by the functions that the stages corpus and tokens call, but for what no later stage needs for its
    figures: training documents beside their tokens, and the test documents' texts."""
    config, made = corpus.config(), corpus.folder / "corpus"
    name, max_length = config.encoder.name, config.tokens.max_length
    tokenize_corpus(made, folder / "tokens", load_tokenizer(name, max_length), max_length=max_length, encoder=name)
    write_json(folder / "documents.json", {"documents": corpora.documents(corpus)})
    (folder / "corpus").mkdir()
    for file in (made / own for own in _TAKEN):
        if file.suffix == ".json":
            shutil.copy(file, folder / "corpus")
        elif file.exists():
            table = pq.read_table(file)
            if file.name == "test.parquet":
                table = table.set_column(table.schema.get_field_index("text"), "text", pa.array([""] * len(table)))
            pq.write_table(table, folder / "corpus" / file.name, compression="none")


def commit_of(data: Path) -> str:
    """The commit that runs here: that of $FANIN_COMMIT, else git's own, else the one that `prepare` saw, which is `-dirty`
    where the stages' source files have changed since."""
    if told := os.environ.get(COMMIT_VARIABLE):
        return told
    known = origin()["commit"]
    if known != "unknown":
        return str(known)
    seen = read_json(data / "origin.json")
    commit = str(seen["commit"])
    return commit if seen["code"] == stage_code(*STAGES) or commit.endswith("-dirty") else f"{commit}-dirty"


def jobs_of(text: str, methods: Mapping[str, Method]) -> list[Job]:
    """ "near,debian:dense_start,sparse:1,2 relations:main:1" -> the runs in order: seeds outermost, then corpora, methods.

    A compressed method brings the one that its models come from. Raises InputError for what is no run of this project's.
    """
    found: dict[str, Job] = {}
    for item in text.split():
        parts = item.split(":")
        if len(parts) != 3 or not all(seed.isdecimal() for seed in parts[2].split(",")):
            raise InputError(f"--jobs: {item!r} is not CORPORA:METHODS:SEEDS, such as near:sparse,dense_start:1,2")
        for seed in map(int, parts[2].split(",")):
            for corpus in map(corpus_of, parts[0].split(",")):
                for method in choose(methods, parts[1]):
                    if method.kind == "rival":
                        raise InputError(f"--jobs: {method.name} is a rival; those run in `make compare`")
                    for own in ([methods[method.of]] if method.of else []) + [method]:
                        job = Job(corpus, own, seed)
                        found.setdefault(job.name, job)
    return list(found.values())


class Run:
    """The runs of a list of jobs: their tasks, and the records that come of them.

    data: what `prepare` made; out: a folder for the record files; work: one for everything else.
    """

    def __init__(
        self, jobs: Sequence[Job], data: Path, out: Path, work: Path, workers: int, threads: int, settings: Mapping[str, Any]
    ) -> None:
        self.jobs, self.data, self.work, self.settings = jobs, data, work, dict(settings)
        self.out = out / "trial" if settings else out
        self.workers, self.threads = workers, threads
        self.code, self.commit = stage_code(*STAGES), commit_of(data)
        self.encoder = self._unpacked("encoder")
        self.weights = sha256(self.encoder / "model.safetensors")
        self.documents: dict[str, str] = {}
        self.records: dict[str, dict[str, Any]] = {}  # by the names of jobs
        self.failed: list[str] = []
        self.seconds: dict[str, float] = {}  # of finished tasks
        self._amounts: list[tuple[Task, float]] = []
        self._job_of: dict[str, Job] = {}
        self._began = time.monotonic()

    def tasks(self) -> list[Task]:
        """All tasks, each after those that it needs, in the order of the jobs."""
        found: dict[str, Task] = {}
        compressed_of = {_name(job.corpus.name, job.method.of, job.seed) for job in self.jobs if job.method.of}
        trainings: dict[str, Task] = {}
        for job in self.jobs:
            place = self._unpacked(job.corpus.name)
            self.documents[job.corpus.name] = read_json(place / "documents.json")["documents"]
            config = self.config(job)
            if job.method.kind == "compressed":
                parent = trainings[_name(job.corpus.name, job.method.of, job.seed)]
                key = digest([parent.key, dict(job.method.settings)])
                task = Task("compress", job.name, key, config, place, self.work, {"train": parent.key}, job.method)
            else:
                shared = shared_tasks(job.corpus.name, config, place, self.work)
                for one in shared.values():
                    found.setdefault(one.key, one)
                needs = {kind: one.key for kind, one in shared.items()}
                key = digest(["train", job.name, needs, configuration_of(config)])
                task = Task("train", job.name, key, config, place, self.work, needs, keep_model=job.name in compressed_of)
                trainings[job.name] = task
            found[task.key] = task
            self._job_of[task.key] = job
        return list(found.values())

    def _unpacked(self, name: str) -> Path:
        archive = self.data / f"{name}.tar.xz"
        if not archive.exists():
            raise InputError(f"{archive} is missing; run `python -m study.standalone prepare CORPUS ... --into {self.data}`")
        place = self.work / "data" / f"{name}-{sha256(archive)[:12]}"  # what other data left in a kept folder is not taken
        if not place.exists():
            with atomic_path(place, directory=True) as temporary, tarfile.open(archive) as file:
                file.extractall(temporary, filter="data")
        return place

    def overrides(self, job: Job) -> dict[str, Any]:
        """The settings over params.yaml, as a record has them."""
        settings = job.method.settings if job.method.kind == "trained" else load_methods()[job.method.of].settings
        return job.corpus.settings | dict(settings) | self.settings | {"seed": job.seed}

    def config(self, job: Job) -> Config:
        """The configuration, with the encoder that was taken along."""
        config = job.corpus.config(self.overrides(job))
        return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, name=str(self.encoder)))

    def expected(self, task: Task) -> float:
        """Seconds that a task may take, from those of its kind that are over; 0: nobody knows."""
        amount = _amount(task)
        known = [(other.corpus == task.corpus, max(amount / _amount(other), 1) * s) for other, s in self._amounts]
        kinds = [other.kind == task.kind for other, _ in self._amounts]
        like = [one for one, same in zip(known, kinds, strict=True) if same]
        return max([s for same, s in like if same] or [s for _, s in like], default=0.0)

    def done(self, task: Task, result: dict[str, Any], seconds: float) -> None:
        """Take a finished task's record, if it has one."""
        self.seconds[task.key] = seconds
        self._amounts.append((task, seconds))
        job = self._job_of.get(task.key)
        if job is None:
            self._say(f"{task.name}: {seconds:.1f} s")
            return
        record = self._record(job, task, result)
        method = job.method
        record |= {"commit": self.commit, "key": self._key(job), "tier": method.tier, "about": method.about}
        record |= {"wall_seconds": round(seconds, 1), "workers": self.workers, "threads": self.threads, "note": self._note()}
        self.records[job.name] = record
        Records(record_file(job.corpus.name, self.out)).add(record)
        figures = ", ".join(f"{k} {record[k]:.2f}" for k in ("P@1", "P@3", "P@5", "PSP@5"))
        self._say(f"{task.name}: {figures} in {seconds:.1f} s")

    def _record(self, job: Job, task: Task, result: dict[str, Any]) -> dict[str, Any]:
        if task.kind == "compress":
            return compressed(job.method, self.records[_name(job.corpus.name, job.method.of, job.seed)], **result)
        parts = result.pop("parts")
        shared = {kind: self.seconds[task.needs[kind]] for kind in SHARED if kind in task.needs}
        parts |= {kind: round(s, 2) for kind, s in shared.items()}
        own = trained(
            job.method, job.corpus, job.seed, task.config, self.overrides(job), prepare_seconds=sum(shared.values()), **result
        )
        return own | {"parts": parts}

    def _key(self, job: Job) -> str:
        config = configuration_of(job.corpus.config(self.overrides(job)))
        own = [dict(job.method.settings)] if job.method.kind == "compressed" else []
        return digest([self.documents[job.corpus.name], self.code, config, *own, "encoder", self.weights, job.seed])

    def _note(self) -> str:
        shared = f"{self.workers} runs at a time shared the device: times are no measure of speed. " if self.workers > 1 else ""
        resident = "" if torch.cuda.is_available() else "Peak memory is a worker's since its first run. "
        return f"{shared}{resident}The pre-trained encoder's weights were rounded to float16 beforehand."

    def fail(self, task: Task, trouble: str) -> None:
        self.failed.append(task.name)
        self._say(f"{task.name} failed:\n{trouble.rstrip()}")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


def _amount(task: Task) -> float:
    """What a task's time grows with, among those of its kind: documents shown."""
    if task.kind != "train":
        return 1.0
    train = task.config.train
    documents = read_json(task.corpus / "tokens" / "tokens.json")["documents"]["train"]
    return float(train.total_steps(math.ceil(documents / train.batch)) * train.accumulation * train.batch)


def summary(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures and seconds of each run, then where its seconds went, as Markdown."""
    figures = ("P@1", "P@3", "P@5", "PSP@5")
    quality = [
        [name, *(f"{record[k]:.2f}" for k in figures)]
        + [f"{record[k]:.0f}" for k in ("train_seconds", "wall_seconds", "peak_mib")]
        for name, record in records.items()
    ]
    parts = [*SHARED, *_PARTS]
    spent = [
        [name, *(f"{record['parts'].get(part, 0):.1f}" for part in parts)]
        for name, record in records.items()
        if "parts" in record
    ]
    header = ["run", *figures, "train s", "all s", "peak MiB"]
    return f"{markdown(header, quality)}\n\n{markdown(['seconds', *parts], spent)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m study.standalone", description="The study's methods without DVC and MLflow."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    first = verbs.add_parser("prepare", help="pack corpora and the encoder")
    first.add_argument("corpora", nargs="+", metavar="CORPUS")
    first.add_argument("--into", type=Path, required=True)
    second = verbs.add_parser("run", help="run methods on what was packed")
    second.add_argument("--data", type=Path, required=True)
    second.add_argument("--out", type=Path, required=True, help="for the record files")
    second.add_argument("--jobs", required=True, metavar="JOBS", help="CORPORA:METHODS:SEEDS between blanks, the first first")
    second.add_argument("--workers", type=int, default=1, help="runs at a time")
    second.add_argument("--threads", type=int, help="CPU threads of each (cores / workers)")
    second.add_argument("--budget", type=budget, default=float("inf"), metavar="TIME", help="90s, 30m: nothing runs after it")
    second.add_argument("--work", type=Path, help="for everything else; kept (a temporary folder)")
    second.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="over all; records in trial/"
    )
    options = parser.parse_args(arguments)
    try:
        if options.verb == "prepare":
            prepare(options.corpora, options.into)
            return 0
        with _folder(options.work) as work:
            return _run(options, work)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace, work: Path) -> int:
    deadline = time.monotonic() + options.budget
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threads = options.threads or max((os.cpu_count() or 1) // options.workers, 1)
    torch.set_num_threads(threads)
    pool = Pool(options.workers, threads, work / "logs")  # they import while this process unpacks
    try:
        jobs = jobs_of(options.jobs, load_methods())
        run = Run(jobs, options.data, options.out, work, options.workers, threads, dict(options.set))
        left = pool.run(run.tasks(), deadline, run.expected, run.done, run.fail)
    finally:
        pool.close()
    print("\n" + summary(run.records))
    if left:
        print(f"\nno time was left for: {'; '.join(task.name for task in left)}")
    if run.failed:
        print(f"\nfailed: {'; '.join(run.failed)}")
    return int(bool(run.failed))


class _folder:
    """The folder that was asked for, or a temporary one."""

    def __init__(self, wanted: Path | None) -> None:
        self.wanted = wanted

    def __enter__(self) -> Path:
        self.path = self.wanted or Path(tempfile.mkdtemp())
        return self.path.resolve()

    def __exit__(self, *error: object) -> None:
        if self.wanted is None:
            shutil.rmtree(self.path, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
