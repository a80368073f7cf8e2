"""The MLflow model: logged from code without reading the weights, loaded and served in fresh processes."""

# ruff: noqa: F811 (fixtures are imported)

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.exceptions import MlflowException

import fanin
from fanin.config import Config
from fanin.model import Classifier
from fanin.serving import check_k, check_texts, save_model
from fanin.tracking import pipelines
from fanin.tracking.mirror import Mirror
from fanin.tracking.outbox import Outbox
from fanin.tracking.ui import free_port
from tiny import tiny_encoder_folder, tiny_texts
from tracked import client_of, database, pipeline_of, project, runs_of, stage_of, store  # noqa: F401 (fixtures)

LABELS = 40
TEXTS = tiny_texts(3, seed=5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny trained model as the train stage leaves it."""
    folder = tmp_path_factory.mktemp("tiny")
    config = Config()
    config.encoder.name = str(tiny_encoder_folder(folder))
    config.head = dataclasses.replace(config.head, intermediate=64, fan_in=8)
    names = pa.table({"id": pa.array(range(LABELS), pa.int32()), "text": [f"label {number}" for number in range(LABELS)]})
    pq.write_table(names, folder / "labels.parquet")
    Classifier.build(config, LABELS).save(folder / "models", folder / "labels.parquet")
    return folder / "models"


def expected(models: Path, k: int) -> list[dict[str, Any]]:
    """What the classifier itself says, one text at a time."""
    classifier = Classifier.load(models)
    rows = []
    for text in TEXTS:
        scores, labels = classifier.topk(*classifier.encode([text]), k)
        ids = labels[0].tolist()
        rows.append({"ids": ids, "labels": [f"label {label}" for label in ids], "scores": scores[0].tolist()})
    return rows


def agree(given: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    assert [(row["ids"], row["labels"]) for row in given] == [(row["ids"], row["labels"]) for row in wanted]
    for one, other in zip(given, wanted, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)


def logged_model(store: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of the model that a train stage logged."""
    pipeline = pipeline_of()
    run = stage_of(monkeypatch, pipeline, "train")
    run.model(models, TEXTS)
    run.end("FINISHED")
    pipelines.close_pipeline(Outbox(), pipeline)
    assert Mirror(Outbox()).flush().runs == [pipeline.key]
    train = runs_of(store)[f"{pipeline.key}/train"]
    (output,) = train.outputs.model_outputs
    assert train.data.tags["fanin.model_uri"] == f"models:/{output.model_id}"
    model = client_of(store).get_logged_model(output.model_id)
    assert (model.name, model.status, model.source_run_id) == ("classifier", "READY", train.info.run_id)
    return f"models:/{output.model_id}"


def outside(store: Path, **changed: str) -> dict[str, str]:
    """Environment of a process that knows the store and nothing of this project."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FANIN_") and key != "PYTHONPATH"}
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept.get('PATH', '')}"  # models serve calls uvicorn by name
    return kept | {"MLFLOW_TRACKING_URI": f"sqlite:///{store}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true"} | changed


def test_the_logged_model_is_whole_and_holds_no_pickle(
    store: Path, models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fanin.model.Classifier.load", None)  # logging must not read the model
        uri = logged_model(store, models, monkeypatch)
    model = client_of(store).get_logged_model(uri.removeprefix("models:/"))
    folder = Path(model.artifact_location.removeprefix("file://"))
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"MLmodel", "mlflow_model.py", "requirements.txt", "code/fanin/model.py", "code/fanin/kernels/__init__.py"} <= files
    assert (folder / "artifacts/classifier/head.safetensors").read_bytes() == (models / "head.safetensors").read_bytes()
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".pyc"))]
    requirements = (folder / "requirements.txt").read_text().split()
    assert all("==" in requirement for requirement in requirements)
    assert {requirement.partition("==")[0] for requirement in requirements} >= {
        "torch",
        "transformers",
        "mlflow",
        "safetensors",
    }

    import mlflow

    loaded = mlflow.pyfunc.load_model(str(folder))
    schema = loaded.metadata.signature
    assert [column.type.name for column in schema.inputs] == ["string"]
    assert schema.outputs.input_names() == ["ids", "labels", "scores"]
    assert schema.params.to_dict() == [{"name": "k", "type": "long", "default": 5, "shape": None}]
    agree(loaded.predict(TEXTS).to_dict("records"), expected(models, 5))
    agree(loaded.predict(pd.DataFrame({"text": TEXTS}), params={"k": 2}).to_dict("records"), expected(models, 2))
    for bad, message in (
        ([""], "text 0 is empty"),
        (["a", "  "], "text 1 is empty"),
        ([3], "list\\[str\\]"),
        ([None], "list\\[str\\]"),
    ):
        with pytest.raises(MlflowException, match=message):
            loaded.predict(bad)
    with pytest.raises(MlflowException, match="k: 41 is not a whole number from 1 to 40"):
        loaded.predict(TEXTS, params={"k": 41})


def test_texts_of_a_request() -> None:
    assert check_texts(["a", "b"]) == ["a", "b"]
    for bad, message in (
        ([1], "text 0: expected a string, found int"),
        (["a", None], "text 1: expected a string, found NoneType"),
        (["\n"], "text 0 is empty"),
    ):
        with pytest.raises(MlflowException, match=message):
            check_texts(bad)


@pytest.mark.parametrize("k", [0, -1, 11, 2.5, True])
def test_k_out_of_range(k: Any) -> None:
    with pytest.raises(MlflowException, match=f"k: {k} is not a whole number from 1 to 10"):
        check_k(k, 10)


def test_k_in_range() -> None:
    assert [check_k(k, 10) for k in (1, 10, 3.0)] == [1, 10, 3]


@pytest.mark.slow
def test_a_fresh_process_without_the_project_predicts(store: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = logged_model(store, models, monkeypatch)
    body = "import json, mlflow, sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
    body += "sys.path[:] = [p for p in sys.path if not p.rstrip('/').endswith('src')]\n"
    body += f"rows = mlflow.pyfunc.load_model({uri!r}).predict({TEXTS!r}).to_dict('records')\n"
    body += "import fanin\nprint(json.dumps([fanin.__file__, rows]))\n"
    done = subprocess.run(
        [sys.executable, "-c", body], env=outside(store), cwd="/", capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    origin, rows = json.loads(done.stdout.splitlines()[-1])
    assert Path(origin) != Path(fanin.__file__)
    assert "code/fanin" in origin
    agree(rows, expected(models, 5))


@pytest.mark.slow
def test_mlflow_models_serve_answers(store: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = logged_model(store, models, monkeypatch)
    port = free_port(22000)
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", uri, "-p", str(port), "--env-manager", "local"]
    log = store / "serve.log"
    with open(log, "w") as file:
        server = subprocess.Popen(command, env=outside(store), cwd="/", stdout=file, stderr=file, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 200
        while True:
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.5)
        code, answer = ask(address, {"inputs": TEXTS, "params": {"k": 3}})
        assert code == 200
        agree(answer["predictions"], expected(models, 3))
        code, answer = ask(address, {"inputs": TEXTS})
        assert code == 200
        agree(answer["predictions"], expected(models, 5))
        for request, message in (
            ({"inputs": ["", "x"]}, "text 0 is empty"),
            ({"inputs": [7]}, "list[str]"),
            ({"dataframe_split": {"columns": ["text"], "data": [["x"]]}}, "inputs"),
            ({"inputs": ["a", None]}, "list[str]"),
            ({"inputs": TEXTS, "params": {"k": 0}}, "k: 0 is not a whole number from 1 to 40"),
        ):
            code, answer = ask(address, request)
            assert code == 400
            assert message in answer["message"]
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def ask(address: str, request: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of POST /invocations."""
    data, kind = json.dumps(request).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{address}/invocations", data, kind), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_model_can_be_saved_outside_any_store(models: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "model", models, Path(fanin.__file__).parent, TEXTS, ["mlflow==3.17.2"])
    assert (tmp_path / "model" / "MLmodel").exists()
    example = json.loads((tmp_path / "model" / "serving_input_example.json").read_text())
    assert example == {"inputs": TEXTS, "params": {"k": 5}}
