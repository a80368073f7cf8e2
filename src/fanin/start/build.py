"""The head's start from data: a ridge classifier made of label centroids, in the form that the head has.

In coordinates that whiten the documents, z = P (x - mean), the centroids of the labels are the rows of a closed-form
ridge classifier (a mean-separating start: Schultheis & Babbar, arXiv 2109.13122). There a row's length is the standard
deviation of its logit over documents: all rows start with the same one, so that labels are ranked by how unusually well a
document fits them and by their priors, the biases. (Rows scaled to lift their own documents equally would rank rare labels
last: a centroid of few documents is long, mostly of noise, and would be shrunk the most.) Labels go by in chunks: centroids
are made, expressed by the head's form (`forms`), written into its state and ranked, and no array holds all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fanin.centroids import LabelDocuments, load_label_documents
from fanin.config import Config
from fanin.data.batches import enlarge
from fanin.data.tokens import LABELS, TokenSet
from fanin.devices import choose_device
from fanin.files import InputError, atomic_path, read_json, write_json
from fanin.kernels.layer import index_dtype
from fanin.label_order import label_order
from fanin.lexical import NORM, lexical_sizes
from fanin.profiles import choose_profiled
from fanin.start.forms import CHUNK, Expressed, FixedFanIn, Form, fit_form
from fanin.start.ranking import Ranking
from fanin.start.whitening import whitening
from fanin.start.words import DOCUMENTS, LIFT, LabelWords

SAMPLE = 32768  # labels that a dictionary is learnt from
HINGE_LIFT = 2.0  # squared hinge: from -1, where nearly all its targets are, to the margin at 1
NEAREST = 0.5  # own documents nearer to the mean than this, in standard deviations, are lifted less: that is noise


def build_start(
    config: Config,
    tokens_folder: str | Path,
    embeddings_folder: str | Path,
    clusters_folder: str | Path,
    out: str | Path,
) -> dict[str, Any]:
    """Write head.safetensors and start.json to `out`; return start.json's content.

    The file holds what the head's `load_model_state` takes, and `intermediate.weight` and `.bias` where there is that
    layer; it holds no tensor where `start.source` is random. The rows are labels in the order of `label_order`. Labels
    without an embedded document get zero weights, and the features of their group or else random ones. Raises InputError
    where the inputs do not fit together or the head asks for more features than there are.
    """
    tensors: dict[str, Tensor] = {}
    summary: dict[str, Any] = dict.fromkeys(("zero_shot", "residual", "atoms", "documents"))
    if config.start.source == "data":
        source = load_label_documents(tokens_folder, embeddings_folder)
        words = _words(config, Path(tokens_folder), Path(embeddings_folder), source)
        order = label_order(config, tokens_folder, clusters_folder)
        ranking = Ranking.open(Path(tokens_folder), Path(embeddings_folder), source.labels, words)
        tensors, summary = start_from_data(config, source, order, ranking, words)
    summary = {"source": config.start.source, **summary}
    with atomic_path(out, directory=True) as folder:
        save_file(
            tensors, folder / "head.safetensors", {"source": config.start.source}
        )  # one entry: the order of several is random
        write_json(folder / "start.json", summary)
    return summary


def start_from_data(
    config: Config, source: LabelDocuments, order: np.ndarray | None, ranking: Ranking, words: LabelWords | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The head's state, its rows the labels in this order (None: by id), and what start.json says of it but for the source."""
    order = np.arange(source.labels) if order is None else order.astype(np.int64)
    head, device = config.head, choose_device(config.train.device)
    generator = torch.Generator().manual_seed(config.seed)
    white = whitening(source.embeddings, device)
    ranking.whiten(white)
    group = head.group if head.kind == "fixed_fan_in" else 1
    chunk = -(-CHUNK // group) * group

    def targets(labels: np.ndarray) -> Tensor:
        centroids = source.centroids(labels).to(device)
        known = torch.from_numpy(source.counts[labels] > 0).to(device)
        return (centroids - white.mean) @ white.matrix * known[:, None]

    def everything() -> Iterator[Tensor]:
        for start in range(0, source.labels, chunk):
            yield F.normalize(targets(order[start : start + chunk]), dim=1)

    dense = head.dense_labels(source.labels)
    chosen, weight = _sample(source, order[dense:], group, generator)
    sample = F.normalize(targets(chosen), dim=1) * weight.sqrt().to(device)[:, None]
    form = fit_form(config, white, sample, everything(), generator)
    del sample
    bias = _biases(config, source, order)
    state: dict[str, Tensor] = {"bias": bias}
    error = 0.0
    visits = np.argsort(order)[_alike_together(source)] if group == 1 else np.arange(source.labels)
    for part, rows in _chunks(_parts(form, words, dense, source.labels), visits, chunk):
        target = targets(order[rows])
        unit = F.normalize(target, dim=1)
        expressed = part.form.express(unit)
        error += float((unit - expressed.fitted).square().sum(dtype=torch.float64))
        scale = _scale(config, expressed.fitted, target)
        expressed = expressed._replace(weight=expressed.weight * scale[:, None], fitted=expressed.fitted * scale[:, None])
        inner = head.intermediate or source.width
        read = lift = None
        if part.words is not None and expressed.index is not None:
            read, lift = (tensor.to(device) for tensor in part.words.of(order[rows], head.lexical, group))
            index = torch.cat([expressed.index, read + inner], 1)
            expressed = expressed._replace(weight=torch.cat([expressed.weight, lift], 1), index=index)
            read = read.repeat_interleave(group, 0)[: len(rows)]
        ranking.offer(expressed.fitted, bias[rows].to(device), order[rows], read, lift)
        _store(state, part, expressed, rows - part.first, group, inner + (words.width if words else 0))
        if not head.intermediate:  # the head reads x, not x - mean
            bias[rows] -= (expressed.fitted @ (white.matrix @ white.mean)).cpu()
    if dense:  # each part has its own biases
        state |= {"frequent.bias": bias[:dense].clone(), "tail.bias": bias[dense:].clone()}
        del state["bias"]
    state |= {name: tensor.cpu().contiguous() for name, tensor in form.layers.items()}
    if words is not None:
        state |= {f"lexical.{name}": tensor for name, tensor in words.lexical.state_dict().items()}
    return state, {
        "zero_shot": ranking.precision(),
        "residual": error / max(int((source.counts > 0).sum()), 1),
        "atoms": head.intermediate or source.width,
        "documents": len(source.embeddings),
    }


def _words(config: Config, tokens_folder: Path, embeddings_folder: Path, source: LabelDocuments) -> LabelWords | None:
    """The labels' words in all training documents, embedded or not; None where the head reads none."""
    if not config.head.sparse or not config.head.lexical:
        return None
    tokens = TokenSet.open(tokens_folder / "train.arrow")
    embedded, held_out = (np.load(embeddings_folder / name) for name in ("documents.npy", "validation_documents.npy"))
    rows = enlarge(embedded, len(tokens), held_out, DOCUMENTS, config.seed)  # the embedded ones cover the labels
    vocabulary, inner = read_json(tokens_folder / "tokens.json")["vocabulary"], config.head.intermediate or source.width
    count, words = lexical_sizes(config.head, vocabulary, inner, source.labels)
    return LabelWords(
        tokens,
        rows,
        source.labels,
        words,
        profiled=choose_profiled(source.frequency, count, config.head.profiles),
        profiles=count,
        profile_words=config.head.profiles,
        lift=LIFT[config.head.loss] / NORM,
        texts=_label_texts(tokens_folder, source.labels) if config.start.label_texts else None,
        text_share=config.start.label_texts,
    )


def _label_texts(tokens_folder: Path, labels: int) -> TokenSet:
    texts = TokenSet.open(tokens_folder / LABELS)
    if len(texts) != labels:
        raise InputError(f"{texts.path}: {len(texts)} texts, but {labels} labels; rerun the tokens stage (dvc repro -f tokens)")
    return texts


def _biases(config: Config, source: LabelDocuments, order: np.ndarray) -> Tensor:
    """Logits [L] of the mean document, in the head's order.

    BCE: the log prior less spread^2 / 2, so that the mean probability is the prior: a logit that spreads by s around m has
    the mean odds exp(m + s^2 / 2). Squared hinge: the least-squares optimum of targets of -1 and 1 for a row of zeros.
    Labels without an embedded document have rows of zeros: their logit is the prior's.
    """
    prior = torch.from_numpy((source.frequency[order] + 0.5) / max(source.documents, 1))
    if config.head.loss == "squared_hinge":
        return (2 * prior.clamp_max(1) - 1).float()
    spreads = torch.from_numpy(source.counts[order] > 0) * config.start.spread
    return (prior.log() - spreads.square() / 2).float()


def _scale(config: Config, fitted: Tensor, target: Tensor) -> Tensor:
    """Factors [n] on whitened rows `fitted` [n, D] of labels whose centroids are `target` [n, D].

    BCE: every logit's standard deviation over documents becomes `start.spread`. Squared hinge: a label's own documents come
    to lie HINGE_LIFT above its mean logit.
    """
    length = fitted.norm(dim=1).clamp_min(1e-6)
    if config.head.loss == "squared_hinge":
        return HINGE_LIFT / torch.linalg.vecdot(fitted, target).maximum(NEAREST * length)
    return config.start.spread / length


def _alike_together(source: LabelDocuments) -> np.ndarray:
    """[L] int64: the labels, those of the same one embedded document next to each other, those of none last.

    In a long tail many labels were seen in one document: they have its embedding in common, and so one code. Where that
    would not save half of the coding, the labels stay in order.
    """
    counts = source.counts
    document = np.where(counts == 0, len(source.embeddings) + 1, len(source.embeddings))
    single = np.flatnonzero(counts == 1)
    document[single] = source.members[source.offsets[single]]
    coded = len(np.unique(document[single])) + int((counts > 1).sum())
    return np.argsort(document, kind="stable") if 2 * coded <= source.labels else np.arange(source.labels)


class _Part(NamedTuple):
    """Rows first..last-1 of the head, which have one form; what their tensors' names begin with."""

    prefix: str
    first: int
    last: int
    form: Form
    words: LabelWords | None


def _parts(form: Form, words: LabelWords | None, dense: int, labels: int) -> list[_Part]:
    if not dense:
        return [_Part("", 0, labels, form, words)]
    assert isinstance(form, FixedFanIn)
    return [_Part("frequent.", 0, dense, form.dense, None), _Part("tail.", dense, labels, form, words)]


def _chunks(parts: list[_Part], visits: np.ndarray, size: int) -> Iterator[tuple[_Part, np.ndarray]]:
    """Each part's rows, `size` at a time, in the order of `visits` [L]."""
    for part in parts:
        own = visits[(visits >= part.first) & (visits < part.last)]
        for start in range(0, len(own), size):
            yield part, own[start : start + size]


def _store(state: dict[str, Tensor], part: _Part, expressed: Expressed, rows: np.ndarray, group: int, width: int) -> None:
    """Put a chunk's weights and indices into these rows of the part's state, which is allocated by the first chunk."""
    weight, index, labels = f"{part.prefix}weight", f"{part.prefix}index", part.last - part.first
    if weight not in state:
        state[weight] = torch.empty(labels, expressed.weight.shape[1])
        if expressed.index is not None:
            state[index] = torch.empty(-(-labels // group), expressed.index.shape[1], dtype=index_dtype(width))
    state[weight].numpy()[rows] = expressed.weight.cpu()
    if expressed.index is not None:  # through numpy: torch does not scatter uint16
        state[index].numpy()[rows[::group] // group] = expressed.index.cpu()


def _sample(source: LabelDocuments, order: np.ndarray, group: int, generator: torch.Generator) -> tuple[np.ndarray, Tensor]:
    """Labels [n] that a dictionary is learnt from, and what each one's error counts [n], 1 in the mean.

    An error counts once for each training document of its label: logits of frequent labels decide most rankings, and their
    centroids are least noisy. Whole groups of the head's order, at most SAMPLE labels, none without an embedded document:
    half of them the heaviest, half drawn from the rest at random, which then count for those not drawn too.
    """
    begins = np.arange(0, len(order), group)
    covered = np.flatnonzero(np.add.reduceat(source.counts[order], begins) > 0)
    if not len(covered):
        raise InputError("embeddings.npy: no label has an embedded document; raise encoder.embed_documents")
    size = max(SAMPLE // group, 1)
    share = np.ones(len(begins))
    if len(covered) > size:
        weight = np.add.reduceat(source.frequency[order], begins)[covered]
        covered = covered[np.argsort(-weight, kind="stable")]
        heavy, rest = covered[: size // 2], covered[size // 2 :]
        drawn = rest[torch.randperm(len(rest), generator=generator)[: size - len(heavy)].numpy()]
        share[drawn] = len(rest) / len(drawn)
        covered = np.sort(np.concatenate([heavy, drawn]))
    places = (covered[:, None] * group + np.arange(group)).ravel()
    places = places[places < len(order)]
    weight = source.frequency[order[places]].clip(1) * share[places // group]
    return order[places], torch.from_numpy(weight / weight.mean()).float()
