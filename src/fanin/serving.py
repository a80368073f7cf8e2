"""The trained classifier as an MLflow model, logged from code: texts in; label ids, label texts and scores out.

Imports mlflow: only the sender, a model server and whoever loads the model get here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.models.utils import _save_example
from mlflow.pyfunc import PythonModel, PythonModelContext
from mlflow.pyfunc import save_model as save_pyfunc
from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

DEFAULT_K = 5
BATCH = 64  # texts at a time
_FOLDER = "classifier"  # of the artifacts

OUTPUTS = Schema(
    [
        ColSpec(Array(DataType.long), "ids"),
        ColSpec(Array(DataType.string), "labels"),
        ColSpec(Array(DataType.double), "scores"),
    ]
)
PARAMS = ParamSchema([ParamSpec("k", DataType.long, DEFAULT_K)])


class TextClassifier(PythonModel):
    """`predict(texts, params={"k": 5})` gives one row a text: `ids`, `labels` and `scores`, each k long, best first.

    Scores are the head's logits, after calibration where it was kept: for ranking, their sigmoid is no probability.
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Load the classifier from the model's folder, onto a GPU where there is one."""
        import torch  # not at the top: logging the model imports this file and needs no torch

        from fanin.model import Classifier

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.classifier = Classifier.load(context.artifacts[_FOLDER], device)
        if self.classifier.label_texts is None:
            raise MlflowException(f"{context.artifacts[_FOLDER]} holds no label texts")
        self.names = self.classifier.label_texts

    # list[str] is also MLflow's schema: it takes a list, a column or a frame of one, and refuses what is not a string
    def predict(
        self, context: PythonModelContext, model_input: list[str], params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Rank labels for texts, a row each.

        Raises MlflowException (HTTP status 400 from a server) naming the row that is not a text or is empty, or the
        range of k.
        """
        texts = check_texts(model_input)
        k = check_k((params or {}).get("k", DEFAULT_K), self.classifier.labels)
        rows: list[tuple[list[int], list[str], list[float]]] = []
        for first in range(0, len(texts), BATCH):
            scores, labels = self.classifier.topk(*self.classifier.encode(texts[first : first + BATCH]), k)
            for ids, values in zip(labels.tolist(), scores.tolist(), strict=True):
                rows.append((ids, [self.names[label] for label in ids], values))
        return pd.DataFrame(rows, columns=["ids", "labels", "scores"])


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts of a request. Raises MlflowException naming the first one that is not a string or is empty."""
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise _bad(f"text {row}: expected a string, found {type(text).__name__}")
        if not text.strip():
            raise _bad(f"text {row} is empty; send at least one word")
    return list(texts)


def check_k(given: Any, labels: int) -> int:
    """The number of labels asked for. Raises MlflowException outside 1 to the number of labels."""
    if isinstance(given, bool) or int(given) != given or not 1 <= given <= labels:
        raise _bad(f"k: {given} is not a whole number from 1 to {labels}, the number of labels")
    return int(given)


def _bad(message: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(message)


def save_model(
    target: Path,
    data: Path,
    code: Path,
    examples: Sequence[str],
    requirements: Sequence[str],
    model: LoggedModel | None = None,
    run_id: str | None = None,
) -> None:
    """Write an MLflow model folder around a models/ folder, without reading the model into memory.

    data: the models/ folder; code: the `fanin` package to pack; examples: texts kept as the input example;
    requirements: pinned pip requirements; model, run_id: what the MLmodel file names as its origin.
    """
    description = Model()
    if model is not None:
        description = Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, run_id=run_id, model_id=model.model_id
        )
    save_pyfunc(
        path=str(target),
        mlflow_model=description,
        python_model=str(code / "mlflow_model.py"),
        artifacts={_FOLDER: str(data)},
        code_paths=[str(code)],
        pip_requirements=list(requirements),
    )
    # Given the example, MLflow would load the model and run it to learn of outputs and params: they are known
    signature = description.signature
    if signature is None:
        raise MlflowException(f"{code / 'mlflow_model.py'}: MLflow found no type hints")
    signature.outputs, signature.params = OUTPUTS, PARAMS
    _save_example(description, (list(examples) or ["a text to label"], {"k": DEFAULT_K}), str(target))
    description.save(str(target / "MLmodel"))
