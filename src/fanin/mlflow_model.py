"""What MLflow runs to get the model (models from code): nothing is pickled."""

import mlflow.models

from fanin.serving import TextClassifier

mlflow.models.set_model(TextClassifier())
