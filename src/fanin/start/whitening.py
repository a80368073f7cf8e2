"""Coordinates in which documents' embeddings are white: there a row's length is the standard deviation of its logit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fanin.centroids import GATHER
from fanin.files import InputError

RIDGE = 0.05  # of the covariance, in mean eigenvalues


class Whitening(NamedTuple):
    """z = matrix (x - mean): mean [D], matrix [D, D] symmetric, and its inverse."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor


def whitening(embeddings: np.ndarray, device: torch.device) -> Whitening:
    """embeddings [N, D] -> mean and P = (covariance + RIDGE mean eigenvalue I)^(-1/2), summed in float64 block by block.

    Raises InputError where there are fewer than two documents or all embeddings are the same.
    """
    documents, width = embeddings.shape
    total = torch.zeros(width, dtype=torch.float64)
    moment = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, documents, GATHER):
        block = torch.from_numpy(embeddings[start : start + GATHER].astype(np.float32))
        total += block.sum(0, dtype=torch.float64)
    mean = total / max(documents, 1)
    for start in range(0, documents, GATHER):
        block = torch.from_numpy(embeddings[start : start + GATHER].astype(np.float32)) - mean.float()
        moment += (block.T @ block).double()
    values, vectors = torch.linalg.eigh(moment / max(documents - 1, 1))
    if documents < 2 or not values.mean() > 1e-12:
        raise InputError(
            f"embeddings.npy: {documents} documents whose embeddings do not differ; check encoder.name and the corpus, "
            "or set start.source to random"
        )
    values = (values.clamp_min(0) + RIDGE * values.mean()).sqrt()
    matrix, inverse = (vectors * values**power @ vectors.T for power in (-1, 1))
    return Whitening(*(tensor.float().to(device) for tensor in (mean, matrix, inverse)))
