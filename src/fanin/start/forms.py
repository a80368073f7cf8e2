"""How each kind of head expresses the rows of a linear classifier over whitened documents, and what its layers start as.

A form is fitted once, to a sample or to sums over all rows, and then expresses rows chunk by chunk. The classifier
reads z = P (x - mean); a head without an intermediate layer reads x itself, one behind it A z for a matrix A that the
form chooses, so that the layer is x -> A P (x - mean).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fanin.config import Config
from fanin.files import InputError
from fanin.start.sparse_coding import decode, encode, kmeans_dictionary, learn_dictionary
from fanin.start.whitening import Whitening

CHUNK = 4096  # labels that callers express at once
RANDOM_BUDGET = 2**22  # numbers drawn at once for random supports


class Expressed(NamedTuple):
    """Rows [n, D] of a classifier as a head holds them."""

    weight: Tensor  # [n, K], [n, D'] or [n, R]
    index: Tensor | None  # type: ignore[assignment]  # [ceil(n / G), K] int64, ascending, where the head is sparse
    fitted: Tensor  # [n, D]: the whitened rows that this weight stands for


class Form(Protocol):
    """What `build_start` asks of a form."""

    layers: dict[str, Tensor]  # the state dict's tensors that are not by label

    def express(self, rows: Tensor) -> Expressed:
        """Unit or zero rows [n, D] as the head's; zero rows get zero weights."""
        ...

    def fitted(self, weight: Tensor, index: Tensor | None) -> Tensor:
        """The rows [n, D] that the head's weights and indices stand for."""
        ...


@dataclass
class Dense:
    """weight = rows @ fold, which the head's features turn back into rows @ unfold over z."""

    fold: Tensor  # [D, D']
    unfold: Tensor  # [D', D]
    layers: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def over(cls, unfold: Tensor) -> Dense:
        """That of the least weights over features which are `unfold` of z."""
        return cls(torch.linalg.pinv(unfold), unfold)

    def express(self, rows: Tensor) -> Expressed:
        weight = rows @ self.fold
        return Expressed(weight, None, self.fitted(weight, None))

    def fitted(self, weight: Tensor, index: Tensor | None) -> Tensor:
        return weight @ self.unfold


@dataclass
class FixedFanIn:
    """Rows coded by `fan_in` of the atoms [D', D], which are of unit length once divided by their `lengths` [D']."""

    atoms: Tensor
    lengths: Tensor
    fan_in: int
    group: int
    generator: torch.Generator
    layers: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dense(self) -> Dense:
        """The form of rows that read all of the features that these choose from."""
        return Dense.over(self.atoms * self.lengths[:, None])

    def express(self, rows: Tensor) -> Expressed:
        """A group of zero rows only has nothing to choose features by: it gets random ones.

        Coding is the dear part: where that at least halves it, such a group is not coded, nor is one equal to the group
        before it. (Always to leave them out would move others' last bits, as a product's rows depend on their number.)
        """
        groups = F.pad(rows, (0, 0, 0, -len(rows) % self.group)).unflatten(0, (-1, self.group))
        filled = groups.any(dim=2).any(dim=1)
        fresh = filled.clone()
        fresh[1:] &= (groups[1:] != groups[:-1]).any(dim=2).any(dim=1)
        if 2 * int(fresh.sum()) > len(fresh):
            fresh = torch.ones_like(filled)
        code = (fresh.cumsum(0) - 1)[filled]
        index = torch.empty(len(groups), self.fan_in, dtype=torch.int64, device=rows.device)
        index[~filled] = self._random_support(int((~filled).sum())).to(rows.device)
        value, fitted = rows.new_zeros(len(groups), self.group, self.fan_in), torch.zeros_like(groups)
        if fresh.any():
            own, values = encode(groups[fresh].flatten(0, 1), self.atoms, self.fan_in, self.group)
            index[filled] = own[code]
            value[filled] = values.unflatten(0, (-1, self.group))[code]
            fitted[filled] = decode(own, values, self.atoms, self.group).unflatten(0, (-1, self.group))[code]
        value, fitted = value.flatten(0, 1)[: len(rows)], fitted.flatten(0, 1)[: len(rows)]
        return Expressed(value / self.lengths[index.repeat_interleave(self.group, 0)[: len(rows)]], index, fitted)

    def fitted(self, weight: Tensor, index: Tensor | None) -> Tensor:
        assert index is not None
        length = self.lengths[index.repeat_interleave(self.group, 0)[: len(weight)]]
        return decode(index, weight * length, self.atoms, self.group)

    def _random_support(self, rows: int) -> Tensor:
        width = len(self.atoms)
        parts = [torch.empty(0, self.fan_in, dtype=torch.int64)]
        for start in range(0, rows, max(RANDOM_BUDGET // width, 1)):
            score = torch.rand(min(rows - start, max(RANDOM_BUDGET // width, 1)), width, generator=self.generator)
            parts.append(score.topk(self.fan_in, dim=1).indices.sort(dim=1).values)
        return torch.cat(parts)


def fit_form(
    config: Config, white: Whitening, sample: Tensor, everything: Iterable[Tensor], generator: torch.Generator
) -> Form:
    """The form of `config.head`, fitted to rows in whole groups.

    sample [n, D]: rows whose errors count by their squared lengths; everything: all rows [*, D], of unit length, in chunks.

    Raises InputError where the head reads more features, or has a wider bottleneck, than there are.
    """
    head, width = config.head, len(white.mean)
    if head.sparse:
        fan_in = head.inner_fan_in
        if fan_in > (head.intermediate or width):
            raise InputError(
                f"head.fan_in: {fan_in} is above the {head.intermediate or width} features that the head reads; "
                "lower it, or raise head.intermediate"
            )
        if not head.intermediate:  # the features are given: seen from z, feature d is row d of the inverse
            lengths = white.inverse.norm(dim=1)
            return FixedFanIn(white.inverse / lengths[:, None], lengths, fan_in, head.group, generator)
        atoms = learn_dictionary(sample, head.intermediate, fan_in, head.group, config.start.rounds, generator)
        lengths = atoms.new_ones(len(atoms))
        return FixedFanIn(atoms, lengths, fan_in, head.group, generator, _layer(atoms, white))
    if head.kind == "bottleneck" and head.bottleneck > min(width, head.intermediate or width):
        raise InputError(
            f"head.bottleneck: {head.bottleneck} is above the {min(width, head.intermediate or width)} directions that "
            "a start from data can give it; lower it, or set start.source to random"
        )
    layers: dict[str, Tensor] = {}
    fold, unfold = white.matrix, white.inverse
    directions = torch.eye(width).to(sample)
    narrow = head.intermediate and head.intermediate < width
    if narrow or head.kind == "bottleneck":
        directions = principal_directions(everything, width)
    if head.intermediate:
        unfold = directions[: head.intermediate] if narrow else kmeans_dictionary(sample, head.intermediate, generator)
        fold = torch.linalg.pinv(unfold)
        layers = _layer(unfold, white)
    if head.kind == "bottleneck":
        factors = directions[: head.bottleneck]
        layers["projection"] = factors @ fold
        fold, unfold = factors.T, factors
    return Dense(fold, unfold, layers)


def principal_directions(chunks: Iterable[Tensor], width: int) -> Tensor:
    """Rows [*, D] in chunks -> [D, D]: orthonormal rows, the first R of which span the best rank-R subspace."""
    moment = torch.zeros(width, width, dtype=torch.float64)
    for rows in chunks:
        moment = moment.to(rows.device) + (rows.T @ rows).double()
    return torch.linalg.eigh(moment).eigenvectors.flip(1).T.float().contiguous()


def _layer(atoms: Tensor, white: Whitening) -> dict[str, Tensor]:
    """The intermediate layer x -> atoms P (x - mean)."""
    weight = atoms @ white.matrix
    return {"intermediate.weight": weight, "intermediate.bias": -(weight @ white.mean)}
