"""Journals to MLflow: the one place that talks to a tracking server or store.

Sending is repeatable. A run is found by its `fanin.key` tag before it is created; metrics carry the time and step of
their event, and MLflow keeps one of several equal points; params, tags and artifacts replace themselves. How far a
journal was sent is noted in its state.json after each batch, so a crash costs a repeated batch and nothing else.
"""

from __future__ import annotations

import getpass
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fanin.outbox import Event, Journal, Outbox
from fanin.store import Unreachable, connect, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("fanin.mirror")
T = TypeVar("T")

BATCH_METRICS, BATCH_REST = 1000, 100  # MLflow's limits for one log_batch
# what MLflow answers to a request that will never succeed: passed over, for it would block all that follows
_HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")


@dataclass
class Summary:
    """What one pass over the outbox did."""

    events: int = 0
    runs: list[str] = field(default_factory=list)  # keys of pipeline runs that are wholly sent now
    problems: list[str] = field(default_factory=list)  # one line for each server that did not take its runs


def metric_name(name: str) -> str:
    """`name` with what MLflow refuses replaced: P@1 -> P_at_1."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


class Mirror:
    """Sends an outbox. One instance keeps its connections between passes."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self._clients: dict[str, MlflowClient] = {}
        self._experiments: dict[tuple[str, str], str] = {}

    def flush(self) -> Summary:
        """Send everything unsent, the oldest pipeline run first. A server that fails is left alone for this pass."""
        summary = Summary()
        failed: dict[str, str] = {}
        with self.outbox.lock("flush", wait=True):
            for pipeline in self.outbox.pipelines():
                description = pipeline.last("describe")
                if description is None:
                    continue
                uri = pipeline.state().get("uri") or store_uri(self.outbox, description["uri"])
                if uri in failed:
                    continue
                try:
                    self._send_pipeline(pipeline, description, uri, summary)
                except Unreachable as error:
                    failed[uri] = str(error)
                    self._clients.pop(uri, None)
        summary.problems = [f"{uri}: {' '.join(reason.split())[:300]}" for uri, reason in failed.items()]
        return summary

    def _send_pipeline(self, pipeline: Journal, description: Event, uri: str, summary: Summary) -> None:
        # The pipeline run goes on meanwhile: its journal is read up to here, before its stages are listed, so that no
        # event that speaks of a stage comes before the stage.
        limit = pipeline.end_of_whole_lines()
        stages = self.outbox.stages(pipeline)
        if any(journal.unsent() for journal in (pipeline, *stages)):
            if uri not in self._clients:
                self._clients[uri] = guarded(connect, self.outbox, uri)
            sender = _Sender(self, self._clients[uri], uri, description["experiment"])
            parent = sender.run_id(pipeline, description["name"], {"fanin.kind": "pipeline"})
            for journal in stages:
                start = journal.start()
                if start and journal.unsent():
                    tags = {"fanin.kind": "stage", "fanin.stage": start["stage"], "mlflow.parentRunId": parent}
                    sender.run_id(journal, start["stage"], tags)
                    summary.events += sender.send(journal, stages, journal.end_of_whole_lines())
            summary.events += sender.send(pipeline, stages, limit)
        closed = pipeline.end() is not None  # after that no stage begins
        if closed and not any(journal.unsent() for journal in (pipeline, *self.outbox.stages(pipeline))):
            self.outbox.archive(pipeline)
            summary.runs.append(pipeline.key)

    def experiment(self, client: MlflowClient, uri: str, name: str) -> str:
        """Id of the experiment, created if it is new, brought back if it was deleted."""
        if (uri, name) not in self._experiments:
            found = client.get_experiment_by_name(name)
            if found is None:
                place = (self.outbox.root / "mlartifacts").as_uri() if uri.startswith("sqlite:") else None
                try:
                    found = client.get_experiment(client.create_experiment(name, artifact_location=place))
                except Exception:  # another process was faster
                    found = client.get_experiment_by_name(name)
                    if found is None:
                        raise
            if uri.startswith("sqlite:") and found.artifact_location.startswith("mlflow-artifacts:"):
                raise Unreachable(
                    f"experiment '{name}' was made through a server, which alone can store its artifacts; "
                    "set MLFLOW_TRACKING_URI to that server, or tracking.experiment to another name"
                )
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            self._experiments[uri, name] = found.experiment_id
        return self._experiments[uri, name]


def guarded(action: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Run a request; raise Unreachable unless its failure is the request's own fault."""
    from mlflow.exceptions import MlflowException

    try:
        return action(*arguments, **named)
    except (Unreachable, FileNotFoundError):
        raise
    except MlflowException as error:
        if error.error_code in _HOPELESS:
            raise
        raise Unreachable(error.message) from error
    except Exception as error:  # whatever the layers below raise: requests, sqlalchemy, botocore, a full disk
        raise Unreachable(f"{type(error).__name__}: {error}") from error


class _Sender:
    """One pass over one pipeline run's journals."""

    def __init__(self, mirror: Mirror, client: MlflowClient, uri: str, experiment: str) -> None:
        self.outbox, self.client, self.uri = mirror.outbox, client, uri
        self.experiment = guarded(mirror.experiment, client, uri, experiment)

    def run_id(self, journal: Journal, name: str, tags: Mapping[str, str]) -> str:
        """Id of the journal's MLflow run: noted, else found by its tag, else created."""
        state = journal.state()
        if "run_id" not in state:
            start = journal.start()

            def create() -> str:
                found = self.client.search_runs([self.experiment], f"tags.`fanin.key` = '{journal.key}'", max_results=1)
                if found:
                    return found[0].info.run_id
                everything = {"fanin.key": journal.key, "mlflow.user": _user(), "mlflow.source.type": "LOCAL", **tags}
                return self.client.create_run(self.experiment, start.get("time"), everything, name).info.run_id

            state = {"uri": self.uri, "run_id": guarded(create), "experiment": self.experiment, "offset": 0}
            journal.save_state(state)
        return state["run_id"]

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
