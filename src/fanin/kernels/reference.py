"""The fixed fan-in arithmetic in plain torch: what every other implementation is tested against.

Shapes: xt, dxt [D, B]; weight [l, K]; index [ceil(l / G), K], integers of any width, G = group; g, z [l, B].
It writes out the gathered features [l, K, B], so it is for small chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(index: Tensor, labels: int, group: int) -> Tensor:
    """index [ceil(labels / group), K] -> int64 [labels, K]: each label's own row."""
    index = index.to(torch.int64)
    return index if group == 1 else index.repeat_interleave(group, dim=0)[:labels]


def forward(xt: Tensor, weight: Tensor, index: Tensor, group: int = 1) -> Tensor:
    """z [l, B] without the bias."""
    gathered = xt[expand(index, len(weight), group)]
    return torch.einsum("lk,lkb->lb", weight, gathered)


def weight_gradient(xt: Tensor, g: Tensor, index: Tensor, group: int = 1) -> Tensor:
    """dL/dweight [l, K] from g = dL/dz [l, B]."""
    gathered = xt[expand(index, len(g), group)]
    return torch.einsum("lb,lkb->lk", g, gathered)


def add_input_gradient(dxt: Tensor, g: Tensor, weight: Tensor, index: Tensor, group: int = 1) -> None:
    """Add dL/dxt to dxt [D, B]."""
    rows = expand(index, len(weight), group).reshape(-1)
    dxt.index_add_(0, rows, (weight.unsqueeze(2) * g.unsqueeze(1)).reshape(len(rows), -1))
