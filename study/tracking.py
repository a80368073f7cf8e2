"""Runs that no pipeline makes (rivals, compressed heads) in MLflow too, beside those that are DVC experiments."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanin import provenance
from fanin.files import InputError, read_json
from fanin.tracking.outbox import Outbox
from fanin.tracking.owner import Owner
from fanin.tracking.pipelines import flatten, numbers, open_pipeline
from fanin.tracking.sender import MODE_VARIABLE, ensure_sender
from study.corpora import Corpus
from study.methods import Method

TAG = "fanin.study"
_LEFT_OUT = ("curve", "settings", "versions", "rival_versions", "intervals", "device", "commit")


def study_tags(method: Method, corpus: Corpus, seed: int) -> dict[str, str]:
    """What the comparison view filters and groups by: `tags."fanin.study" = 'near'`."""
    tags = {TAG: corpus.name, f"{TAG}.method": method.name, f"{TAG}.seed": str(seed)}
    return tags | {f"{TAG}.tier": method.tier, f"{TAG}.kind": method.kind, f"{TAG}.about": method.about}


def run_name(method: Method, corpus: Corpus, seed: int) -> str:
    return f"{corpus.name} {method.name} seed{seed}"


def track(record: Mapping[str, Any], method: Method, corpus: Corpus) -> None:
    """Write the record as a finished run to the outbox; a disk that is full or a file that is missing only warns."""
    if os.environ.get(MODE_VARIABLE) == "off":
        return
    try:
        outbox, config = Outbox(), corpus.config()
        # one process makes many runs, each of which is told apart by when it was noted
        owner = dataclasses.replace(Owner.this(), started=round(time.time(), 2))
        journal = open_pipeline(outbox, owner, sys.argv)
        uri = os.environ.get("MLFLOW_TRACKING_URI") or config.tracking.uri
        journal.append(
            "describe", name=run_name(method, corpus, record["seed"]), experiment=config.tracking.experiment, uri=uri
        )
        journal.append("params", values={key: str(value) for key, value in flatten(record["settings"]).items()})
        tags = study_tags(method, corpus, record["seed"]) | provenance.commit() | provenance.machine()
        journal.append("tags", values=tags)
        kept = {key: value for key, value in record.items() if key not in _LEFT_OUT}
        journal.append("metrics", values=numbers(kept), step=0)
        about = corpus.folder / "corpus" / "corpus.json"
        journal.append("dataset", corpus=read_json(Path(about)))
        journal.append("end", status="FINISHED")
        ensure_sender(outbox)
    except (OSError, InputError) as error:
        print(f"warning: tracking lost something, the study goes on: {error}", file=sys.stderr)
