"""What runs, in which order, until when: resumable, and never past the budget by more than one estimate's error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fanin.files import InputError, sha256
from study import compress, experiment, rival
from study.corpora import STAGES, Corpus, documents, stage_code
from study.methods import TIERS, Method
from study.records import Records, configuration_of, digest, origin
from study.tracking import track

SEEDLESS = ("tfidf_knn",)  # the same result whatever the seed


class Job(NamedTuple):
    """One run: a method with a seed. key: all that its result depends on."""

    method: Method
    seed: int
    key: str


@dataclass
class Outcome:
    """What a study did: how many runs, which failed and why, which did not fit the budget."""

    finished: int = 0
    known: int = 0
    failed: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


class Study:
    """Methods on a corpus; `settings` over all of them (for a trial)."""

    def __init__(
        self, corpus: Corpus, methods: list[Method], seeds: int, records: Records, settings: Mapping[str, Any]
    ) -> None:
        self.corpus, self.methods, self.seeds, self.records, self.settings = corpus, methods, seeds, records, dict(settings)
        self._code, self._data = stage_code(*STAGES), documents(corpus)
        self.runners: dict[str, Callable[[Job], dict[str, Any]]] = {
            "trained": self._train,
            "compressed": self._compress,
            "rival": lambda job: rival.run(job.method, corpus, job.seed),
        }

    def jobs(self) -> list[Job]:
        """Round-robin over seeds within a tier: every main method has one seed before any has two; ablations follow."""
        jobs = []
        for tier in TIERS:
            for seed in range(1, self.seeds + 1):
                for method in self.methods:
                    if method.tier == tier and (seed == 1 or method.name not in SEEDLESS):
                        jobs.append(Job(method, seed, self.key(method, seed)))
        return jobs

    def key(self, method: Method, seed: int) -> str:
        """A hash of settings, seed, code and data."""
        if method.kind == "rival":
            return digest([self._data, sha256(rival.SCRIPT), method.name, seed])
        compressed = method.kind == "compressed"
        trained = self._by_name(method.of) if compressed else method
        config = self.corpus.config(dict(trained.settings) | self.settings | {"seed": seed})
        own = [dict(method.settings), sha256(Path(compress.__file__))] if compressed else []
        return digest([self._data, self._code, configuration_of(config), *own, seed])

    def _by_name(self, name: str) -> Method:
        found = next((method for method in self.methods if method.name == name), None)
        if found is None:
            raise InputError(f"METHODS: {name} must be among the methods too; what is compressed is its model")
        return found

    def finished(self, job: Job) -> bool:
        record = self.records.find(job.method.name, job.seed)
        return record is not None and record.get("key") == job.key and "unavailable" not in record

    def run(self, budget: float | None) -> Outcome:
        """Run what is not finished. budget: seconds from now, None for no end. One failure does not stop the others."""
        began, outcome = time.monotonic(), Outcome()
        jobs = self.jobs()
        waiting = [job for job in jobs if not self.finished(job)]
        outcome.known = len(jobs) - len(waiting)
        print(f"{self.corpus.title}: {len(jobs)} runs, {outcome.known} of them finished before; records in {self.records.path}")
        for number, job in enumerate(waiting):
            name = f"{job.method.name}, seed {job.seed}"
            expected = self.records.seconds(job.method.name, job.method.kind)
            spent = time.monotonic() - began
            if budget is not None and spent + expected > budget:
                outcome.left = [f"{later.method.name}, seed {later.seed}" for later in waiting[number:]]
                print(f"budget: {_span(budget - spent)} left, {name} takes about {_span(expected)}; stopping before it")
                break
            print(f"{name}: {job.method.about}" + (f", about {_span(expected)}" if expected else ""), flush=True)
            try:
                record = self.runners[job.method.kind](job) | {
                    "key": job.key,
                    "tier": job.method.tier,
                    "about": job.method.about,
                }
            except rival.Unavailable as reason:
                self._unavailable(job, str(reason))
                outcome.failed.append(str(reason))
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                outcome.failed.append(f"{name}: {error}")
            else:
                self.records.add(record)
                if job.method.kind != "trained":  # those are pipeline runs, which track themselves
                    track(record, job.method, self.corpus)
                outcome.finished += 1
                print(
                    "  "
                    + ", ".join(f"{k} {record[k]:.2f}" for k in ("P@1", "P@5", "PSP@5"))
                    + f" in {_span(record['wall_seconds'])}"
                )
        return outcome

    def _train(self, job: Job) -> dict[str, Any]:
        return experiment.run(job.method, self.corpus, job.seed, job.key, self.settings)

    def _compress(self, job: Job) -> dict[str, Any]:
        parent = self._by_name(job.method.of)
        record = self.records.find(parent.name, job.seed)
        if record is None or record.get("key") != self.key(parent, job.seed):
            raise InputError(f"{job.method.name}: {parent.name} with seed {job.seed} has to run first, and did not")
        return compress.run(job.method, self.corpus, record)

    def _unavailable(self, job: Job, reason: str) -> None:
        """Note that a rival cannot be had here, unless an earlier result stands."""
        print(f"  {reason}", file=sys.stderr)
        if self.records.find(job.method.name, job.seed) is None and job.seed == 1:
            facts = {"method": job.method.name, "kind": "rival", "corpus": self.corpus.name, "seed": job.seed}
            self.records.add(facts | {"unavailable": reason, "wall_seconds": 0.0, "about": job.method.about, **origin()})


def _span(seconds: float) -> str:
    """Seconds as a person says them."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
