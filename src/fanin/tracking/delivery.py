"""One pipeline run's journals to MLflow: runs created or found again, events sent in batches, models and data sets."""

from __future__ import annotations

import getpass
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanin.tracking.outbox import Event, Journal, Outbox
from fanin.tracking.store import Unreachable, guarded

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH_METRICS, BATCH_REST = 1000, 100  # MLflow's limits for one log_batch

log = logging.getLogger("fanin.tracking.delivery")


def metric_name(name: str) -> str:
    """`name` with what MLflow refuses replaced: P@1 -> P_at_1."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


class Delivery:
    """One pass over one pipeline run's journals."""

    def __init__(self, outbox: Outbox, client: MlflowClient, uri: str, experiment: str) -> None:
        self.outbox, self.client, self.uri, self.experiment = outbox, client, uri, experiment

    def run_id(self, journal: Journal, name: str, tags: Mapping[str, str]) -> str:
        """Id of the journal's MLflow run: noted, else found by its tag, else created (again, where the store lost it)."""
        state = journal.state()
        if "run_id" not in state or not self._exists(state["run_id"]):
            state = {"uri": self.uri, "run_id": guarded(self._create, journal, name, tags), "offset": 0}
            state["experiment"] = self.experiment
            journal.save_state(state)
        return state["run_id"]

    def _exists(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            guarded(self.client.get_run, run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    def _create(self, journal: Journal, name: str, tags: Mapping[str, str]) -> str:
        found = self.client.search_runs([self.experiment], f"tags.`fanin.key` = '{journal.key}'", max_results=1)
        if found:
            return found[0].info.run_id
        everything = {"fanin.key": journal.key, "mlflow.user": _user(), "mlflow.source.type": "LOCAL", **tags}
        began = journal.start().get("time")
        return self.client.create_run(self.experiment, began, everything, name).info.run_id

    def send(self, journal: Journal, stages: list[Journal], limit: int) -> int:
        """Send the journal's events from where the last pass ended up to byte `limit`; returns their number."""
        from mlflow.entities import Metric, Param, RunTag

        state = journal.state()
        run_id, sent = state["run_id"], 0
        metrics: list[Metric] = []
        params: list[Param] = []
        tags: list[RunTag] = []

        def post(offset: int) -> None:
            for kind, entries, size in (
                ("metrics", metrics, BATCH_METRICS),
                ("params", params, BATCH_REST),
                ("tags", tags, BATCH_REST),
            ):
                for first in range(0, len(entries), size):
                    self._batch(run_id, kind, entries[first : first + size])
                entries.clear()
            state["offset"] = offset
            journal.save_state(state)

        offset = state["offset"]
        for after, event in journal.events(offset):
            if after > limit:
                break
            kind, moment = event["event"], event["time"]
            if kind == "metrics":
                metrics += [Metric(metric_name(k), float(v), moment, event["step"]) for k, v in event["values"].items()]
            elif kind == "params":
                params += [Param(key, value) for key, value in event["values"].items()]
            elif kind == "tags":
                tags += [RunTag(key, str(value)) for key, value in event["values"].items()]
            else:
                post(offset)
                try:
                    self._other(journal, run_id, event, stages)
                except Unreachable:
                    raise
                except Exception as error:
                    log.warning("%s: %s was passed over: %s", journal.key, kind, error)
                post(after)
            offset, sent = after, sent + 1
            if len(metrics) >= BATCH_METRICS:
                post(offset)
        post(max(offset, limit))
        return sent

    def _batch(self, run_id: str, kind: str, entries: list[Any]) -> None:
        def send(some: list[Any]) -> None:
            batch: dict[str, Any] = {kind: some}
            guarded(self.client.log_batch, run_id, **batch)

        try:
            send(entries)
        except Unreachable:
            raise
        except Exception:  # one entry is refused: the others must not go with it
            for entry in entries:
                try:
                    send([entry])
                except Unreachable:
                    raise
                except Exception as error:
                    log.warning("run %s: %s %s was refused: %s", run_id, kind, entry.key, error)

    def _other(self, journal: Journal, run_id: str, event: Event, stages: list[Journal]) -> None:
        kind = event["event"]
        if kind == "artifact":
            path = journal.folder / event["path"]
            if not path.exists():
                log.warning("%s: artifact %s is no longer there", journal.key, path)
            elif event["directory"]:
                guarded(self.client.log_artifacts, run_id, str(path), event["folder"] or None)
            else:
                guarded(self.client.log_artifact, run_id, str(path), event["folder"] or None)
        elif kind == "dataset":
            guarded(self.client.log_inputs, run_id, [_dataset(event["corpus"])])
        elif kind == "model":
            guarded(self._model, journal, run_id, event)
        elif kind == "stages":
            self._link(run_id, event["hashes"], stages)
        elif kind == "end":
            guarded(self.client.set_terminated, run_id, event["status"], event["time"])

    def _link(self, run_id: str, hashes: Mapping[str, str], stages: list[Journal]) -> None:
        """Tag the pipeline run with the run of each of its stages: its own, or the one that DVC's cached outs came from."""
        own = {journal.start().get("stage"): journal for journal in stages if journal.ended("FINISHED")}
        for stage, stage_hash in hashes.items():
            if stage in own:
                found = own[stage].state().get("run_id")
            else:
                query = f"tags.`fanin.stage_hash` = '{stage_hash}' and attributes.status = 'FINISHED'"
                latest = ["attributes.start_time DESC"]
                runs = guarded(self.client.search_runs, [self.experiment], query, max_results=1, order_by=latest)
                found = runs[0].info.run_id if runs else None
            if found:
                guarded(self.client.set_tag, run_id, f"fanin.stage.{stage}", found)

    def _model(self, journal: Journal, run_id: str, event: Event) -> None:
        from mlflow.entities import LoggedModelOutput

        from fanin.serving import save_model

        earlier = self.client.search_logged_models([self.experiment], f"source_run_id = '{run_id}'")
        if any(model.status == "READY" for model in earlier):
            return
        data = journal.folder / event["data"]
        settings = json.loads((data / "fanin.json").read_text())
        if earlier:
            model = earlier[0]
        else:
            params = {key: str(value) for key, value in settings.items() if isinstance(value, int | str)}
            model = self.client.create_logged_model(self.experiment, "classifier", run_id, None, params, "classifier")
        with tempfile.TemporaryDirectory(dir=self.outbox.folder, prefix=".model-") as folder:
            target = Path(folder) / "model"
            save_model(target, data, journal.folder / event["code"], event["examples"], event["requirements"], model, run_id)
            for cache in target.rglob("__pycache__"):
                shutil.rmtree(cache, ignore_errors=True)
            self.client.log_model_artifacts(model.model_id, str(target))
        self.client.finalize_logged_model(model.model_id, "READY")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        self.client.set_tag(run_id, "fanin.model_uri", f"models:/{model.model_id}")


def _dataset(corpus: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    checksum = str(corpus.get("checksum", ""))
    source = json.dumps({"source": corpus.get("source"), "licence": corpus.get("licence"), "sha256": checksum})
    profile = json.dumps({key: value for key, value in corpus.items() if isinstance(value, int | float)})
    # MLflow takes digests of at most 36 characters; the whole checksum is in the source
    entity = Dataset(str(corpus.get("name", "corpus")), checksum[:32] or "unknown", "fanin_corpus", source, None, profile)
    return DatasetInput(entity, [InputTag("mlflow.data.context", "training")])


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return "unknown"
