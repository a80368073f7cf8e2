"""The pipeline run: parent of its stages' runs, from the first stage's start to the end of its process."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fanin import provenance
from fanin.config import Config
from fanin.files import read_json
from fanin.tracking.outbox import Journal, Outbox
from fanin.tracking.owner import Owner, find_owner

PARENT_VARIABLE = "FANIN_PARENT_RUN"  # key of the pipeline run that the wrapper opened
NAME_VARIABLE = "FANIN_RUN_NAME"
TAGS_VARIABLE = "FANIN_RUN_TAGS"  # JSON object of further tags for the pipeline run
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


def find_pipeline(outbox: Outbox) -> Journal:
    """The pipeline run that a stage in this process belongs to: the wrapper's, else the one of the dvc process above."""
    key = os.environ.get(PARENT_VARIABLE)
    if key:
        journal = outbox.pipeline(key)
        # a variable left over from an ended run, or inherited by a second experiment in the queue, does not count
        experiment = journal.tags().get("fanin.dvc_experiment", os.environ.get("DVC_EXP_NAME", ""))
        same = experiment == os.environ.get("DVC_EXP_NAME", "")
        if journal.path.exists() and journal.end() is None and same:
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
    if head.sparse:
        size = f" K{head.fan_in}" + (f" G{head.group}" if head.group > 1 else "")
    else:
        size = f" R{head.bottleneck}" if head.kind == "bottleneck" else ""
    fallback = f"{config.preset} {head.kind}{size} seed{config.seed}"
    return os.environ.get(NAME_VARIABLE) or os.environ.get("DVC_EXP_NAME") or fallback


def describe_pipeline(pipeline: Journal, config: Config) -> str | None:
    """Write name, settings, commit and environment of the pipeline run; returns the name, None if that was done before."""
    if pipeline.last("describe") is not None:
        return None
    # the environment outweighs params.yaml: a machine's address is not the experiment's business
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
    name = run_name(config)
    pipeline.append("describe", name=name, experiment=config.tracking.experiment, uri=uri)
    pipeline.append("params", values={key: str(value) for key, value in flatten(dataclasses.asdict(config)).items()})
    tags = {"fanin.preset": config.preset, "fanin.head": config.head.kind}
    if os.environ.get("DVC_EXP_NAME"):
        tags["fanin.dvc_experiment"] = os.environ["DVC_EXP_NAME"]
    pipeline.append("tags", values=tags | provenance.commit() | provenance.machine() | _given_tags())
    _text_artifact(pipeline, "packages.txt", "\n".join(provenance.packages()) + "\n", "environment")
    patch = provenance.difference()
    if patch and len(patch) <= PATCH_BYTES:
        _text_artifact(pipeline, "uncommitted.patch", patch, "environment")
    return name


def _given_tags() -> dict[str, str]:
    """The tags in $FANIN_RUN_TAGS; none, with a warning, where it does not hold a JSON object."""
    text = os.environ.get(TAGS_VARIABLE)
    if not text:
        return {}
    try:
        return {str(key): str(value) for key, value in json.loads(text).items()}
    except (ValueError, AttributeError):
        print(f"warning: ${TAGS_VARIABLE} is not a JSON object of tags; found {text[:80]!r}", file=sys.stderr)
        return {}


def _text_artifact(pipeline: Journal, name: str, text: str, folder: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / name).write_text(text, encoding="utf-8")
        pipeline.artifact(Path(place) / name, folder)


def redirect_pipeline(outbox: Outbox, pipeline: Journal, uri: str) -> None:
    """Let another store have the pipeline run, from its beginning."""
    description = pipeline.last("describe")
    if description is None or description["uri"] == uri:
        return
    pipeline.append("describe", name=description["name"], experiment=description["experiment"], uri=uri)
    for journal in (pipeline, *outbox.stages(pipeline)):
        journal.save_state({})


def record_dataset(pipeline: Journal, corpus: dict[str, Any]) -> None:
    """Name the data set as an input of the pipeline run, once."""
    if pipeline.last("dataset") is None:
        pipeline.append("dataset", corpus=corpus)


def record_results(pipeline: Journal, workspace: Path, stage: str) -> None:
    """After a stage (or, with "" for it, after all): its headline numbers and files to the pipeline run."""
    reports = workspace / "reports"
    results = (("metrics.json", "", "evaluate"), ("train.json", "train/", "train"), ("memory.json", "memory/", "memory"))
    for name, prefix, made_by in results:
        if (reports / name).exists() and stage in (made_by, LAST_STAGE, ""):
            values = {prefix + key: value for key, value in numbers(read_json(reports / name)).items()}
            known = _recorded(pipeline)
            values = {key: value for key, value in values.items() if known.get(key) != value}
            if values:
                pipeline.append("metrics", values=values, step=0)
    corpus = workspace / "data" / "corpus" / "corpus.json"
    if corpus.exists():
        record_dataset(pipeline, read_json(corpus))
    if stage == LAST_STAGE and (reports / "report.html").exists():
        pipeline.artifact(reports / "report.html", "report")


def _recorded(pipeline: Journal) -> dict[str, float]:
    found: dict[str, float] = {}
    for _, entry in pipeline.events():
        if entry["event"] == "metrics":
            found |= entry["values"]
    return found


def _lock(outbox: Outbox, pipeline: Journal) -> tuple[Path, str | None]:
    """Where the pipeline run's stages work (an experiment may have a copy of the project), and the dvc.lock there."""
    starts = [pipeline.start(), *(journal.start() for journal in outbox.stages(pipeline))]
    workspace = Path(next((start["workspace"] for start in reversed(starts) if "workspace" in start), ""))
    return workspace, provenance.dvc_lock(workspace, outbox.root, pipeline.tags().get("fanin.dvc_experiment"))


def record_stage_hashes(outbox: Outbox, pipeline: Journal) -> dict[str, str]:
    """Tag each finished stage of the pipeline run with its hash in dvc.lock; returns all hashes in dvc.lock.

    DVC writes dvc.lock after a stage, so this runs at the next stage's start and when the pipeline run is closed. A
    dvc.lock older than the stage's end (dvc was killed in between) says nothing about that stage.
    """
    workspace, text = _lock(outbox, pipeline)
    if text is None:
        return {}
    hashes = provenance.stage_hashes(text)
    lock = workspace / "dvc.lock"
    written = lock.stat().st_mtime * 1000 if lock.exists() else math.inf
    for journal in outbox.stages(pipeline):
        end, begun = journal.end(), journal.start()
        if end is None or end["status"] != "FINISHED" or end["time"] > written + 1:
            continue
        if begun["stage"] in hashes and "fanin.stage_hash" not in journal.tags():
            journal.append("tags", values={"fanin.stage_hash": hashes[begun["stage"]]})
    return hashes


def close_pipeline(outbox: Outbox, pipeline: Journal, code: int | None = None) -> None:
    """End a pipeline run whose process is done: stages that were killed, links to stages, final numbers, status.

    `code` is the command's exit code where a wrapper saw it. A run in which nothing ran or changed leaves no trace.
    """
    statuses = {}  # of each stage's last attempt
    for journal in outbox.stages(pipeline):
        if journal.dead():
            journal.append("tags", values={"fanin.reason": "the process was gone without a word (killed)"})
            journal.append("end", status="KILLED")
        end = journal.end()
        statuses[journal.start().get("stage")] = end["status"] if end else "KILLED"
    failed = next((status for status in ("KILLED", "FAILED") if status in statuses.values()), None)
    if failed is None and code:
        failed = "KILLED" if code in (130, 143, -2, -15, -9) else "FAILED"
    hashes = record_stage_hashes(outbox, pipeline)
    workspace, text = _lock(outbox, pipeline)
    if failed is not None:  # what dvc.lock says of the stages that did not come to run is an earlier run's
        hashes = {stage: value for stage, value in hashes.items() if statuses.get(stage) == "FINISHED"}
    if hashes:
        pipeline.append("stages", hashes=hashes)
    if text is not None:
        _text_artifact(pipeline, "dvc.lock", text, "dvc")
    if failed is None and code is not None:
        record_results(pipeline, workspace, "")
    pipeline.append("end", status=failed or "FINISHED")
