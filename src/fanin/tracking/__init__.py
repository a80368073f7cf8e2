"""Tracking: journals on disk, MLflow as their mirror."""

from fanin.tracking.run import Run

__all__ = ["Run"]
