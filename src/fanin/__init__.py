"""fanin: extreme multi-label text classification whose output layer is sparse from the first step to the last."""

__version__ = "0.1.0"
