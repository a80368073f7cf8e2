"""The fixed fan-in arithmetic in plain torch: what every other implementation is tested against.

Labels go by in chunks. Within a chunk activations are transposed (xt, dxt [D, B]; g, z [l, B]), so that what a label reads
is a run of whole rows. It writes out the gathered features [l, K, B]. Any float type, any device, integers of any width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fanin.kernels.checks import check_count, check_depth, check_gradient, check_layer, check_loss, check_positives
from fanin.kernels.layer import Backend, Layer, Update, decode


def expand(index: Tensor, labels: int, group: int) -> Tensor:
    """index [ceil(labels / group), K] -> int64 [labels, K]: each label's own row."""
    index = index.to(torch.int64)
    return index if group == 1 else index.repeat_interleave(group, dim=0)[:labels]


class Reference(Backend):
    name = "reference"

    # The arithmetic of one chunk; a subclass may do it faster ---------------------------------------------------------

    def forward(self, xt: Tensor, weight: Tensor, index: Tensor, group: int) -> Tensor:
        """z [l, B] without the bias."""
        return torch.einsum("lk,lkb->lb", weight, xt[expand(index, len(weight), group)])

    def weight_gradient(self, xt: Tensor, g: Tensor, index: Tensor, group: int) -> Tensor:
        """dL/dweight [l, K] from g = dL/dz [l, B]."""
        return torch.einsum("lb,lkb->lk", g, xt[expand(index, len(g), group)])

    def add_input_gradient(self, dxt: Tensor, g: Tensor, weight: Tensor, index: Tensor, group: int) -> None:
        """Add dL/dxt to dxt [D, B]."""
        rows = expand(index, len(weight), group).reshape(-1)
        dxt.index_add_(0, rows, (weight.unsqueeze(2) * g.unsqueeze(1)).reshape(len(rows), -1))

    # The whole -----------------------------------------------------------------------------------------------------

    def chunk(self, group: int, batch: int, device: str = "cpu") -> int:
        """Labels worked on at once: about 1 MiB of logits on a CPU (it stays in the cache), 64 MiB on a GPU."""
        size = min(max((2**18 if device == "cpu" else 2**24) // max(batch, 1), 256), 2**16)
        return -(-size // group) * group

    def step_bytes(self, *, labels: int, features: int, fan_in: int, group: int, batch: int, learnt: int | None = None) -> int:
        chunk = min(self.chunk(group, batch), labels)
        gathered = 8 * chunk * fan_in * (batch + 1)  # twice for an instant, and the rows' int64 indices
        return 4 * (2 * batch * features + chunk * batch) + gathered

    def step(
        self,
        x: Tensor,
        layer: Layer,
        labels: Tensor,
        documents: Tensor,
        update: Update,
        loss: str = "bce",
        want_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_loss(loss)
        check_layer(x, layer, plain=True)
        check_positives(labels, documents, layer.labels, len(x), x.device, values=True)
        xt = _transposed(x, layer)
        dxt = torch.zeros_like(xt)
        chunk = self.chunk(layer.group, len(x), x.device.type)
        ranges = tile_ranges(labels, layer.labels, chunk).tolist()
        losses = []
        for i, part in enumerate(layer.parts(chunk)):
            own = slice(ranges[i], ranges[i + 1])
            weight = _computed(part.weight)
            z = self.forward(xt, weight, part.index, part.group)
            if part.bias is not None:
                z += part.bias[:, None]
            rows = labels[own] - (part.first - layer.first)
            losses.append(logit_gradient_(z, rows, documents[own], loss, want_loss))
            self.add_input_gradient(dxt, z, weight, part.index, part.group)
            update.apply_rounded(part, self.weight_gradient(xt, z, part.index, part.group))
            if part.bias is not None:
                update.apply(part.bias, z.sum(1), part.bias_momentum, decay=False)
        total = torch.stack([value.double() for value in losses if value is not None]).sum() if want_loss else None
        return dxt[: layer.learnt].t().contiguous().to(x.dtype), total

    def logits(self, x: Tensor, layer: Layer) -> Tensor:
        check_layer(x, layer, plain=True)
        xt = _transposed(x, layer)
        z = x.new_empty(len(x), layer.labels)
        for part in layer.parts(self.chunk(layer.group, len(x), x.device.type)):
            place = part.first - layer.first
            zt = self.forward(xt, _computed(part.weight), part.index, part.group)
            z[:, place : place + part.labels] = (zt if part.bias is None else zt + part.bias[:, None]).t()
        return z

    def gradients(
        self, x: Tensor, g: Tensor, layer: Layer, need_x: bool = True, need_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        check_layer(x, layer, plain=True)
        check_gradient(g, x, layer)
        xt = _transposed(x, layer)
        dxt = torch.zeros_like(xt) if need_x else None
        weight = x.new_empty(layer.weight.shape) if need_weight else None
        for part in layer.parts(self.chunk(layer.group, len(x), x.device.type)):
            place = slice(part.first - layer.first, part.first - layer.first + part.labels)
            gt = g[:, place].t().to(xt.dtype).contiguous()
            if dxt is not None:
                self.add_input_gradient(dxt, gt, _computed(part.weight), part.index, part.group)
            if weight is not None:
                weight[place] = self.weight_gradient(xt, gt, part.index, part.group).to(weight.dtype)
        return (None if dxt is None else dxt.t().contiguous().to(x.dtype)), weight

    def candidates(self, x: Tensor, layer: Layer, labels: Tensor, documents: Tensor, count: int, loss: str = "bce") -> Tensor:
        return candidates(self, x, layer, labels, documents, count, loss)

    def topk(self, x: Tensor, layer: Layer, k: int) -> tuple[Tensor, Tensor]:
        check_layer(x, layer, plain=True)
        check_depth(k, layer)
        scores = x.new_empty(len(x), 0)
        labels = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        for part in layer.parts(max(self.chunk(layer.group, len(x), x.device.type), 4 * k)):
            top, where = self.logits(x, part).topk(min(k, part.labels), dim=1)
            scores, labels = torch.cat([scores, top], 1), torch.cat([labels, where + (part.first - layer.first)], 1)
            scores, keep = scores.topk(min(k, scores.shape[1]), dim=1)
            labels = labels.gather(1, keep)
        return scores, labels


def _computed(weight: Tensor) -> Tensor:
    """The weights in the type of the arithmetic."""
    return weight if weight.dtype in (torch.float32, torch.float64) else decode(weight)


def _transposed(x: Tensor, layer: Layer) -> Tensor:
    """x [B, D] -> [D, B] in the type of the arithmetic: float64 for float64 weights, else float32."""
    wide = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
    return x.detach().t().to(wide).contiguous()


def tile_ranges(labels: Tensor, total: int, tile: int) -> Tensor:
    """Where the positives of each tile of `tile` labels begin in the sorted list, and its end: int64 [tiles + 1]."""
    bounds = torch.arange(0, -(-total // tile) + 1, device=labels.device) * tile
    return torch.searchsorted(labels, bounds)


def candidates(backend: Backend, x: Tensor, layer: Layer, labels: Tensor, documents: Tensor, count: int, loss: str) -> Tensor:
    """`Backend.candidates` from a backend's logits and dense matrix products, about 16 MiB at a time."""
    check_loss(loss)
    check_layer(x, layer, plain=True)
    check_positives(labels, documents, layer.labels, len(x), x.device, values=True)
    check_count(count)
    width, block = x.shape[1], 4096
    found = torch.empty(len(layer.index), count, dtype=torch.int32, device=x.device)
    size = max(2**22 // (min(width, block) * layer.group), 1) * layer.group
    ranges = tile_ranges(labels, layer.labels, size).tolist()
    for i, part in enumerate(layer.parts(size)):
        own, first = slice(ranges[i], ranges[i + 1]), part.first - layer.first
        g = backend.logits(x, part).t().contiguous()
        logit_gradient_(g, labels[own] - first, documents[own], loss, False)
        rows = part.index.to(torch.int64)
        best, place = x.new_empty(len(rows), 0), rows.new_empty(len(rows), 0)
        for start in range(0, width, block):
            squares = (g @ x[:, start : start + block]).square_()
            if layer.group > 1:
                squares = F.pad(squares, (0, 0, 0, -len(squares) % layer.group)).unflatten(0, (-1, layer.group)).sum(1)
            columns = squares.shape[1]  # what a row reads already is out; a column more takes what lies in other blocks
            read = torch.where((rows >= start) & (rows < start + columns), rows - start, columns)
            squares = F.pad(squares, (0, 1)).scatter_(1, read, -1.0)[:, :columns]
            best = torch.cat([best, squares], 1)
            place = torch.cat([place, torch.arange(start, start + columns, device=x.device).expand_as(squares)], 1)
            best, keep = best.topk(min(count, best.shape[1]), dim=1)
            place = place.gather(1, keep).masked_fill_(best < 0, -1)
        row = first // layer.group
        found[row : row + len(rows), : place.shape[1]] = place
        found[row : row + len(rows), place.shape[1] :] = -1
    return found


def logit_gradient_(z: Tensor, rows: Tensor, columns: Tensor, loss: str, want_loss: bool) -> Tensor | None:
    """Turn logits z [l, B] in place into dL/dz; (rows, columns) [p] are the positive places of z.

    Returns the summed loss [] if `want_loss`, else None.
    bce: log(1 + e^z) - yz with y in {0, 1}; squared_hinge: max(0, 1 - yz)^2 with y in {-1, 1}.
    Raises ValueError for an unknown loss.
    """
    value = None
    if loss == "bce":
        if want_loss:
            value = F.softplus(z).sum() - z[rows, columns].sum()
        z.sigmoid_()
        z[rows, columns] -= 1
    elif loss == "squared_hinge":
        positive = (1 - z[rows, columns]).clamp_(min=0)
        z.add_(1).clamp_(min=0)
        if want_loss:
            value = z.square().sum() - z[rows, columns].square().sum() + positive.square().sum()
        z.mul_(2)
        z[rows, columns] = -2 * positive
    else:
        raise ValueError(f"loss {loss!r} is not one of bce, squared_hinge")
    return value
