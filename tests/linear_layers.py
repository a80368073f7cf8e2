"""Small FixedFanInLinear layers, and the dense weight that they stand for."""

from __future__ import annotations

import torch

from fanin.linear import FixedFanInLinear

D, L, K = 40, 37, 5


def make(group: int = 1, dtype: torch.dtype = torch.float64, backend: str = "reference", **settings) -> FixedFanInLinear:
    generator = torch.Generator().manual_seed(group)
    return FixedFanInLinear(D, L, K, group, dtype=dtype, backend=backend, generator=generator, **settings)


def dense(layer: FixedFanInLinear, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The weight [L, D] that nn.Linear would have: only a test may make it."""
    weight = layer.weight if weight is None else weight
    index = layer.index.to(torch.int64).repeat_interleave(layer.group, 0)[: layer.out_features]
    shape = (layer.out_features, layer.in_features)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device).scatter(1, index, weight)


def assert_valid(layer: FixedFanInLinear) -> None:
    rows = layer.index.to(torch.int64)
    assert rows.shape == (-(-L // layer.group), K)
    assert ((rows >= 0) & (rows < D)).all()
    assert (rows.diff(dim=1) > 0).all()  # sorted and distinct
