"""Recoding while training: labels are drawn towards their documents as the encoder sees them by then, and coded anew.

A row of the head learns from its label's own documents. Most labels of a long tail have few, and an epoch shows each of them
once: while the encoder moves, their rows stay where the start put them. So once, well into training, documents are embedded
anew, and each label's row, in coordinates that whiten those embeddings, is turned towards the centroid of its
documents and expressed by the features as they are now: K of them where the head is sparse (words stay). Training then goes
on. Other rewiring moves single indices and starts them at zero; here a label's whole row is chosen again, with its weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fanin.centroids import LabelDocuments, label_documents, load_embeddings
from fanin.data.batches import enlarge
from fanin.data.tokens import TokenSet
from fanin.embeddings import embed
from fanin.files import InputError
from fanin.heads import Bottleneck, FixedFanIn, Head
from fanin.kernels.layer import decode, raw
from fanin.model import Classifier
from fanin.refitting import refit
from fanin.start import forms
from fanin.start.forms import CHUNK, Form
from fanin.start.whitening import Whitening, whitening

SHARE = 0.7  # of the way from a row's direction to its centroid's that a label without a document in training would go
EVIDENCE = 30  # training documents of a label that make its learnt row count as much as that


def recode_now(classifier: Classifier, tokens_folder: Path, embeddings_folder: Path, scratch: Path) -> dict[str, float]:
    """Embed training documents anew, in the folder `scratch` (gone afterwards), `recode`, and `refit`.

    These are the start's sample, which covers the labels, and where the head is refitted as many others as
    `encoder.embed_documents` allows. All of the classifier's ranks call this, with the same folders on a disk that all see.
    Returns what `recode` and `refit` do, and documents (those embedded). Raises InputError where the folders do
    not fit together, or an embedding is not finite.
    """
    ranks, tokens, config = classifier.ranks, TokenSet.open(tokens_folder / "train.arrow"), classifier.config
    _, rows = load_embeddings(embeddings_folder, "embeddings.npy", "documents.npy", len(tokens))
    _, held_out = load_embeddings(embeddings_folder, "validation.npy", "validation_documents.npy", len(tokens))
    if config.rewiring.refit_epochs:
        rows = enlarge(rows, len(tokens), held_out, config.encoder.embed_documents, config.seed)
    first, last = ranks.share(len(rows))
    pad_id, precision = classifier.tokenizer.pad_token_id or 0, classifier.precision
    try:
        with ranks.agreed(InputError):
            scratch.mkdir(parents=True, exist_ok=True)
            own = scratch / f"{ranks.rank}.npy"
            embed(classifier.encoder, tokens, rows[first:last], own, pad_id=pad_id, precision=precision, desc="recoding")
        parts = [np.load(scratch / f"{rank}.npy", mmap_mode="r") for rank in range(ranks.size)]
        now = parts[0] if len(parts) == 1 else np.concatenate(parts)
        found = recode(classifier, label_documents(tokens, classifier.labels, now, rows, held_out))
        return found | {"documents": len(rows)} | refit(classifier, tokens, rows, now, config.rewiring.refit_epochs)
    finally:
        if ranks.leads:
            shutil.rmtree(scratch, ignore_errors=True)


@torch.no_grad()
def recode(classifier: Classifier, source: LabelDocuments) -> dict[str, float]:
    """Recode every label that `source` has documents of, in place; the momenta of their weights start again at zero.

    A label of n training documents goes SHARE * EVIDENCE / (EVIDENCE + n) of the way from the direction of its row to that of
    its centroid: what few documents have taught is worth less than where those documents are. The mean and the standard
    deviation of its logits over documents stay.
    Returns, of all ranks together, labels (those recoded) and residual (the mean squared error of their unit rows).
    """
    head, device = classifier.head, classifier.device
    white = whitening(source.embeddings, device)
    middle = F.pad(classifier.project(white.mean[None]), (0, classifier.lexical.width if classifier.lexical else 0))
    names, labels, error = classifier.row_labels, 0, 0.0
    for first, part in head.parts():
        form = _present_form(part, classifier.intermediate, white)
        read = middle[:, : part.width]
        group = part.group if isinstance(part, FixedFanIn) else 1
        size = -(-CHUNK // group) * group
        for start in range(0, part.labels, size):
            stop = min(start + size, part.labels)
            own = names[head.first + first + start : head.first + first + stop]
            known = torch.from_numpy(source.counts[own] > 0).to(device)
            if not known.any():
                continue
            present = _rows(part, form, start, stop)
            share = SHARE * EVIDENCE / (EVIDENCE + torch.from_numpy(source.frequency[own]).float().to(device))
            target = _towards(present, (source.centroids(own).to(device) - white.mean) @ white.matrix, share * known)
            chosen = _whole_groups(known, group)
            expressed = form.express(target[chosen])
            error += float((target[chosen] - expressed.fitted).square().sum(1)[known[chosen]].sum(dtype=torch.float64))
            labels += int(known.sum())
            mean = part.logits(read, start, stop)[0]
            scale = present[chosen].norm(dim=1) / expressed.fitted.norm(dim=1).clamp_min(1e-6)
            _write(part, start, chosen, expressed.weight * scale[:, None], expressed.index)
            part.bias[start:stop] += mean - part.logits(read, start, stop)[0]
    everyone, total = classifier.ranks.total([labels, error])
    return {"labels": everyone, "residual": total / max(everyone, 1)}


def _present_form(head: Head, intermediate: nn.Linear | None, white: Whitening) -> Form:
    """The form of a head on the features that it reads now; random supports, which only groups without weights get, from 0."""
    unfold = white.inverse if intermediate is None else intermediate.weight @ white.inverse
    if isinstance(head, FixedFanIn):
        lengths = unfold.norm(dim=1).clamp_min(1e-12)
        generator = torch.Generator().manual_seed(0)
        return forms.FixedFanIn(unfold / lengths[:, None], lengths, head.inner_fan_in, head.group, generator)
    if isinstance(head, Bottleneck):
        unfold = head.projection @ unfold
    return forms.Dense.over(unfold)


def _rows(head: Head, form: Form, start: int, stop: int) -> Tensor:
    """Rows start..stop-1 over whitened documents [n, D]."""
    weight: Tensor = head.get_buffer("weight")[start:stop]
    weight = decode(weight) if weight.itemsize < 4 else weight
    if not isinstance(head, FixedFanIn):
        return form.fitted(weight, None)
    index = head.index[start // head.group : -(-stop // head.group), : head.inner_fan_in]
    return form.fitted(weight[:, : head.inner_fan_in], index.to(torch.int64))


def _towards(rows: Tensor, targets: Tensor, share: Tensor) -> Tensor:
    """rows, targets [n, D], share [n] -> unit rows, that share of the way from the ones' directions to the others'."""
    share = share[:, None]
    return F.normalize((1 - share) * F.normalize(rows, dim=1) + share * F.normalize(targets, dim=1), dim=1)


def _whole_groups(known: Tensor, group: int) -> Tensor:
    """known [n] bool -> [n] bool: the labels of groups where any is known; they choose their features together."""
    whole = F.pad(known, (0, -len(known) % group)).view(-1, group).any(dim=1)
    return whole.repeat_interleave(group)[: len(known)]


def _write(head: Head, start: int, chosen: Tensor, weight: Tensor, index: Tensor | None) -> None:
    """Put the chosen labels' weights, and their groups' indices, into the head's rows from `start` on; forget their momenta."""
    rows = start + chosen.nonzero()[:, 0]
    for name, values in (("weight", weight), ("momentum", weight.new_zeros(())), ("compensation", weight.new_zeros(()))):
        held = getattr(head, name, None)
        if held is not None:
            raw(held)[rows, : weight.shape[1]] = raw(values.to(held.dtype))
    if index is not None and isinstance(head, FixedFanIn):
        groups = (start + chosen.nonzero()[:: head.group, 0]) // head.group
        raw(head.index)[groups, : index.shape[1]] = raw(index.to(head.index.dtype))
