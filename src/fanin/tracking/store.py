"""Which MLflow store a project uses, and a connection to it that never takes long to fail."""

from __future__ import annotations

import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fanin.config import load_config
from fanin.files import InputError
from fanin.tracking.outbox import Outbox

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROBE_SECONDS = 3.0
# what MLflow answers to a request that will never succeed: passed over, for it would block all that follows
_HOPELESS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS")
T = TypeVar("T")


class Unreachable(Exception):
    """The server did not answer, or not in time, or with an error of its own: try again later."""


def quiet_mlflow() -> None:
    """Settings for MLflow in this process, before its import: no telemetry, no progress bars, short waits."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
        "MLFLOW_UV_AUTO_DETECT": "false",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }.items():
        os.environ.setdefault(name, value)
    for name in ("mlflow", "alembic", "sqlalchemy", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def default_uri(root: Path) -> str:
    """The store where neither the environment nor params.yaml names one: mlflow.db in the project's root."""
    return f"sqlite:///{root / 'mlflow.db'}"


def store_uri(outbox: Outbox, named: str | None) -> str:
    """The absolute address of a store; `named` may be a relative sqlite path or nothing."""
    if not named:
        return default_uri(outbox.root)
    match = re.fullmatch(r"sqlite:///([^/].*)", named)
    return f"sqlite:///{outbox.root / match.group(1)}" if match else named


def configured_uri(outbox: Outbox) -> str:
    """Where runs go now: $MLFLOW_TRACKING_URI, else tracking.uri of params.yaml, else mlflow.db in the project's root."""
    named = os.environ.get("MLFLOW_TRACKING_URI")
    if not named:
        try:
            named = load_config(outbox.root / "params.yaml").tracking.uri
        except InputError:  # the UI opens whatever is wrong with the other settings
            named = None
    return store_uri(outbox, named)


def reachable(uri: str) -> str | None:
    """None if something answers at an http address within 3 s (or the store is not on a server), else the reason."""
    if not uri.startswith(("http://", "https://")):
        return None
    try:
        urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return None  # it speaks; a proxy may ask for credentials that MLflow's client has
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return None


def connect(outbox: Outbox, uri: str) -> MlflowClient:
    """A client for a store that is ready for use. A fresh database is migrated by one process alone.

    Raises Unreachable.
    """
    reason = reachable(uri)
    if reason is not None:
        raise Unreachable(reason)
    quiet_mlflow()
    from mlflow import MlflowClient

    if not uri.startswith("sqlite:"):
        return MlflowClient(tracking_uri=uri)
    with outbox.lock("store", wait=True):  # two processes that both create the tables would crash
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


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
