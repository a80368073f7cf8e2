"""Journals to MLflow: one pass after another over the outbox.

Sending is repeatable. A run is found by its `fanin.key` tag before it is created; metrics carry the time and step of
their event, and MLflow keeps one of several equal points; params, tags and artifacts replace themselves. How far a
journal was sent is noted in its state.json after each batch, so a crash costs a repeated batch and nothing else.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fanin.tracking.delivery import Delivery
from fanin.tracking.outbox import Event, Journal, Outbox
from fanin.tracking.store import Unreachable, connect, guarded, store_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


log = logging.getLogger("fanin.tracking.mirror")


@dataclass
class Summary:
    """What one pass over the outbox did."""

    events: int = 0
    runs: list[str] = field(default_factory=list)  # keys of pipeline runs that are wholly sent now
    problems: list[str] = field(default_factory=list)  # one line for each server that did not take its runs


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
        refused: list[str] = []
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
                    failed[uri] = _line(error)
                    self._clients.pop(uri, None)
                except Exception as error:  # this run's own trouble: the others must not wait for it
                    log.warning("%s was not sent", pipeline.key, exc_info=True)
                    refused.append(f"{uri}: {pipeline.key}: {_line(error)}")
        summary.problems = [f"{uri}: {reason}" for uri, reason in failed.items()] + refused
        return summary

    def _send_pipeline(self, pipeline: Journal, description: Event, uri: str, summary: Summary) -> None:
        # The pipeline run goes on meanwhile: its journal is read up to here, before its stages are listed, so that no
        # event that speaks of a stage comes before the stage.
        limit = pipeline.end_of_whole_lines()
        stages = self.outbox.stages(pipeline)
        if any(journal.unsent() for journal in (pipeline, *stages)):
            if uri not in self._clients:
                self._clients[uri] = guarded(connect, self.outbox, uri)
            experiment = guarded(self.experiment, self._clients[uri], uri, description["experiment"])
            sender = Delivery(self.outbox, self._clients[uri], uri, experiment)
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
                kind = {"mlflow.experimentKind": "custom_model_development"}  # the UI opens it as training, not as GenAI
                try:
                    found = client.get_experiment(client.create_experiment(name, place, kind))
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
