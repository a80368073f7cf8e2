"""The fixed fan-in arithmetic through torch's embedding-bag kernels (G = 1) and batched matrix products (G > 1).

For machines where neither the compiled CPU kernels nor Triton can run. A label is a bag of K features with weights, so the
logits are a weighted embedding bag over xt; dx is the same with the roles turned: a feature is a bag of the labels that
read it. Nothing of size [l, K, B] is written for G = 1. Deterministic on a CPU: every sum has a fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fanin.kernels.reference import Reference


class Bag(Reference):
    name = "torch"

    def forward(self, xt: Tensor, weight: Tensor, index: Tensor, group: int) -> Tensor:
        if group == 1:
            return F.embedding_bag(index.to(torch.int32), xt, per_sample_weights=weight, mode="sum")
        gathered, blocks = _gathered(xt, index), _blocks(weight, group)
        return torch.bmm(blocks, gathered).flatten(0, 1)[: len(weight)]

    def step_bytes(self, *, labels: int, features: int, fan_in: int, group: int, batch: int, learnt: int | None = None) -> int:
        whole = self.chunk(group, batch)
        chunk = min(whole, labels)
        vectors, logits = 8 * batch * features, 4 * chunk * batch
        before = logits if labels > whole else 0  # the chunk before is let go once the next one's logits are there
        entries = -(-chunk // group) * fan_in
        turned = entries * (4 + 4 + 8 + 4) + 4 * features * batch  # int32 indices, those sorted, places, weights
        if group == 1:
            return vectors + logits + max(before + 4 * entries, logits, turned)
        gathered = 4 * entries * batch  # the features that a group reads, or their gradients
        padded = logits if chunk % group else 0  # a copy, where the last group is not whole
        gradient = 8 * entries + 4 * chunk * fan_in + padded
        return vectors + logits + max(before + gathered, logits, gathered + turned, gathered + gradient)

    def weight_gradient(self, xt: Tensor, g: Tensor, index: Tensor, group: int) -> Tensor:
        labels, fan_in = len(g), index.shape[1]
        if group == 1:
            offsets = torch.arange(0, labels * fan_in, fan_in, device=g.device)
            bags = torch.arange(labels, device=g.device).repeat_interleave(fan_in)
            flat = index.reshape(-1).to(torch.int64)
            # mode 0 is "sum"; this is what autograd calls for per_sample_weights
            gradient = torch.ops.aten._embedding_bag_per_sample_weights_backward(g, xt, flat, offsets, bags, 0)
            return gradient.view(labels, fan_in)
        return torch.bmm(_blocks(g, group), _gathered(xt, index).transpose(1, 2)).flatten(0, 1)[:labels]

    def add_input_gradient(self, dxt: Tensor, g: Tensor, weight: Tensor, index: Tensor, group: int) -> None:
        flat = index.reshape(-1).to(torch.int32)
        features, position = flat.sort(stable=True)
        offsets = torch.searchsorted(features, torch.arange(len(dxt), device=dxt.device, dtype=torch.int32))
        if group == 1:
            source, weights = g, weight.reshape(-1)[position]
            position = position.div_(weight.shape[1], rounding_mode="floor")
        else:
            source = torch.bmm(_blocks(weight, group).transpose(1, 2), _blocks(g, group)).flatten(0, 1)
            weights = torch.ones(len(position), dtype=g.dtype, device=g.device)
        dxt += F.embedding_bag(position, source, offsets=offsets, per_sample_weights=weights, mode="sum")


def _gathered(xt: Tensor, index: Tensor) -> Tensor:
    return xt[index.to(torch.int64)]


def _blocks(rows: Tensor, group: int) -> Tensor:
    """[l, n] -> [ceil(l / group), group, n], the last block filled with zeros."""
    missing = -len(rows) % group
    return (F.pad(rows, (0, 0, 0, missing)) if missing else rows).view(-1, group, rows.shape[1])
