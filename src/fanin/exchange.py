"""Exchange: while the head is refitted, labels give up the features that serve them least for those that would serve them most.

RigL (Evci et al., ICML 2020) drops the smallest weights and grows, from zero, where one batch's gradient is largest. Refitting
has every document's features at hand and can weigh both sides by the loss itself, to the second order: to drop a weight w
costs w^2 h / 2 (optimal brain damage, LeCun et al., NIPS 1989), and a feature that the label does not read yet would win
g^2 / 2h by a Newton step on its weight alone, with the gradient g and the curvature h of the loss over all documents. A
feature comes in with `DAMPING` of that step, as others come in beside it.

No array of documents x labels is held, nor of labels x features: labels come in blocks, and of a block's pairs those few
stay that the loss is not indifferent to.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fanin import kernels, rewiring
from fanin.data.batches import collate, positives
from fanin.data.tokens import TokenSet
from fanin.heads import FixedFanIn
from fanin.kernels.layer import Layer, decode, raw, store
from fanin.kernels.reference import expand, logit_gradient_
from fanin.model import Classifier

AT = (0.1, 0.3, 0.5)  # of refitting: the rest of it brings old and new weights together
LEAST = 5  # documents of a label that let it choose: fewer say too little
DAMPING = 0.25
SLIGHT = 1e-3  # of a slope: a document counts for that label as the average one does
_DOCUMENTS = 64  # at once, words and all
_COLUMNS = 128  # features summed at once
_LABELS = 2**15  # asked at once
_ROWS = 1024  # and summed


class _Slopes(NamedTuple):
    """What documents say of n labels: dloss/dz and its derivative, pair by pair where they are not slight, else summed up."""

    labels: Tensor  # [E] int32, positions among the n, ascending
    documents: Tensor  # [E] int32
    slopes: Tensor  # [E] float32
    curvatures: Tensor  # [E] float32
    other_slopes: Tensor  # [n] float32
    other_curvatures: Tensor  # [n] float32


@torch.no_grad()
def exchange(classifier: Classifier, tokens: TokenSet, rows: np.ndarray, embeddings: np.ndarray, share: float) -> int:
    """Let every label of `LEAST` documents or more exchange up to `share` of the features that it reads of the encoder's.

    In place; words stay, momenta of new weights start at zero. rows [N]: ascending rows of `tokens`, embeddings [N, D] theirs.
    Each rank sees to its own labels, without the others. Returns how many of its entries read another feature now.
    """
    exchanged = 0
    for first, part in classifier.head.parts():
        count = round(share * part.inner_fan_in) if isinstance(part, FixedFanIn) else 0
        if not isinstance(part, FixedFanIn) or not count:
            continue
        begin = classifier.head.first + first
        frequency = tokens.label_frequency(rows, classifier.labels)[classifier.row_labels[begin : begin + part.labels]]
        choosing = _choosing(torch.from_numpy(frequency), part.group).to(classifier.device)
        if not len(choosing):
            continue
        features = _features(classifier, embeddings)
        for groups in choosing.split(max(_LABELS // part.group, 1)):
            labels = _labels_of(groups, part)
            slopes = _slopes(classifier, part, begin, labels, features, tokens, rows)
            for start in range(0, len(groups), max(_ROWS // part.group, 1)):
                own = slice(start, start + max(_ROWS // part.group, 1))
                sums = _sums(features, slopes, own.start * part.group, min(own.stop * part.group, len(labels)))
                exchanged += _exchange(part, groups[own], *sums, count)
    return exchanged


def _features(classifier: Classifier, embeddings: np.ndarray) -> Tensor:
    """The encoder's features of all documents [N, D'] bfloat16: rounded, since they only choose."""
    features = torch.empty(len(embeddings), classifier.head.inner, dtype=torch.bfloat16, device=classifier.device)
    for start in range(0, len(embeddings), 4096):
        part = torch.from_numpy(embeddings[start : start + 4096].astype(np.float32)).to(classifier.device)
        features[start : start + 4096] = classifier.project(part)
    return features


def _slopes(
    classifier: Classifier,
    part: FixedFanIn,
    begin: int,
    labels: Tensor,
    features: Tensor,
    tokens: TokenSet,
    rows: np.ndarray,
) -> _Slopes:
    """What the documents say of the ascending `labels` [n] of `part`, whole groups; `begin`: the head's row of its first."""
    pad_id, device = classifier.tokenizer.pad_token_id or 0, classifier.device
    layer = Layer(
        weight=raw(part.weight)[labels].view(part.weight.dtype),
        index=raw(part.index)[labels[:: part.group] // part.group].view(part.index.dtype),
        bias=part.bias[labels],
        group=part.group,
    )
    backend = kernels.backend(part.backend, device, part.weight.dtype)
    others = [torch.zeros(len(labels), device=device) for _ in range(2)]
    found = []
    for start in range(0, len(rows), _DOCUMENTS):
        own = rows[start : start + _DOCUMENTS]
        ids, mask = collate(tokens.ids(own), pad_id)
        x = classifier.join(features[start : start + len(own)].float(), ids.to(device), mask.to(device))
        z = backend.logits(x, layer)
        pairs = positives(tokens.labels(own), classifier.label_rows).between(begin, begin + part.labels).to(device)
        place = torch.searchsorted(labels, pairs.labels).clamp_max_(len(labels) - 1)
        here = labels[place] == pairs.labels
        place, documents = place[here], pairs.documents[here]
        slope = z.clone()
        logit_gradient_(slope.t(), place, documents, part.loss, False)
        told = slope.abs() >= SLIGHT
        told[documents, place] = True
        telling = told.flatten().nonzero()[:, 0]
        slopes = slope.take(telling)
        documents, place = (telling // len(labels) + start).int(), (telling % len(labels)).int()
        found.append((documents, place, slopes, _bounded_curvature(z.take(telling), slopes, part.loss)))
        slope.put_(telling, slope.new_zeros(()).expand(len(telling)))  # what is left is slight
        for other, each in zip(others, (slope, _curvature(slope, part.loss)), strict=True):
            other += each.sum(0)
    documents, place, *values = (torch.cat(each) for each in zip(*found, strict=True))
    del found
    place, order = place.sort(stable=True)
    return _Slopes(place, documents[order], *(each[order] for each in values), *others)


def _curvature(slope: Tensor, loss: str) -> Tensor:
    """The loss's second derivative in a logit, where its first is `slope`."""
    size = slope.abs()
    return 2 * (size > 0).float() if loss == "squared_hinge" else size * (1 - size)


def _bounded_curvature(z: Tensor, slope: Tensor, loss: str) -> Tensor:
    """The same at logits z, but for those on the wrong side.

    A logit far on the wrong side has a slope and hardly a second derivative: one such document would outweigh all others, and
    its Newton step lead anywhere. There the curvature is that of the parabola that bounds the loss and touches it at z
    (Jaakkola & Jordan, Statistics and Computing 2000).
    """
    if loss == "squared_hinge":
        return _curvature(slope, loss)
    bound = torch.where(z.abs() > 1e-3, (z / 2).tanh() / (2 * z), 0.25)
    return torch.where(slope.abs() > 0.5, bound, _curvature(slope, loss))


def _choosing(frequency: Tensor, group: int) -> Tensor:
    """The groups whose labels have `LEAST` documents each, on average."""
    whole = F.pad(frequency, (0, -len(frequency) % group)).view(-1, group).sum(1)
    return (whole >= LEAST * group).nonzero()[:, 0]


def _labels_of(groups: Tensor, part: FixedFanIn) -> Tensor:
    """The labels of ascending groups; the last one may be short."""
    labels = (groups[:, None] * part.group + torch.arange(part.group, device=groups.device)).flatten()
    return labels[labels < part.labels]


def _sums(features: Tensor, slopes: _Slopes, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Gradient and curvature of the loss over all documents in the weights of labels start..stop-1 on every feature: [n, D'].

    Slight slopes count with the average document.
    """
    bounds = torch.arange(start, stop + 1, dtype=torch.int32, device=features.device)
    offsets = torch.searchsorted(slopes.labels, bounds, out_int32=True)
    pairs = slice(int(offsets[0]), int(offsets[-1]))
    weights = (slopes.slopes, slopes.curvatures)
    others = (slopes.other_slopes, slopes.other_curvatures)
    sums = [torch.empty(stop - start, features.shape[1], device=features.device) for _ in weights]
    for column in range(0, features.shape[1], _COLUMNS):
        part = features[:, column : column + _COLUMNS].float()
        for out, weight, other in zip(sums, weights, others, strict=True):
            own = F.embedding_bag(
                slopes.documents[pairs],
                part,
                offsets - offsets[0],
                mode="sum",
                per_sample_weights=weight[pairs],
                include_last_offset=True,
            )
            out[:, column : column + _COLUMNS] = own + other[start:stop, None] * part.mean(0)
            part = part.square()  # what the curvature goes with
    return sums[0], sums[1]


def _exchange(part: FixedFanIn, groups: Tensor, gradient: Tensor, curvature: Tensor, count: int) -> int:
    """Exchange up to `count` features of each of `groups` [n], given the sums [n * G, D'] of their labels. Returns how many."""
    group, inner, labels = part.group, part.inner_fan_in, _labels_of(groups, part)
    held = {
        name: raw(tensor)[labels, :inner].view(tensor.dtype)
        for name in ("weight", "momentum", "compensation")
        if (tensor := getattr(part, name)) is not None
    }
    index = raw(part.index)[groups, :inner].view(part.index.dtype)
    read = index.to(torch.int64)
    curvature.clamp_min_(1e-12)
    cost = decode(held["weight"]).square() * curvature.gather(1, expand(read, len(labels), group))
    cost, place = _of_groups(cost, group).topk(count, dim=1, largest=False)
    gain, best = _of_groups(gradient.square() / curvature, group).scatter_(1, read, -1.0).topk(count, dim=1)
    better = gain > cost  # the best against the cheapest, the second best against the second
    new = read.scatter(1, place, torch.where(better, best, read.gather(1, place)))
    fresh = torch.zeros_like(read, dtype=torch.bool).scatter_(1, place, better)
    exchanged = rewiring.move_(index, new, fresh, held.values(), group)
    fresh = expand(fresh.gather(1, new.argsort(dim=1)), len(labels), group).bool()
    step = (gradient / curvature).gather(1, expand(index, len(labels), group)).mul_(-DAMPING)
    store(held["weight"], torch.where(fresh, step, decode(held["weight"])), None)
    for name, rows in held.items():
        raw(getattr(part, name))[labels, :inner] = raw(rows)
    raw(part.index)[groups, :inner] = raw(index)
    return exchanged


def _of_groups(rows: Tensor, group: int) -> Tensor:
    """[n * G, m] -> [n, m], summed; the last group may be short."""
    return rows if group == 1 else F.pad(rows, (0, 0, 0, -len(rows) % group)).view(-1, group, rows.shape[1]).sum(1)
