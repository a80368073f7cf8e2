"""Calibration after training: what a logit is worth depends on how many documents its label was learnt from.

A row learnt from one document fits that document; on others it promises too much, and among hundreds of thousands of such
rows some outbid the right label. What they promise and what they keep is seen on the validation documents, which training
never sees: of the labels ranked first, the chance to be right is fitted by logistic regression on the logit, on the words'
part of it, on the logarithm and the inverse of the label's number of training documents, and on the logit times that
logarithm (Platt's scaling, 1999, with the frequency as a covariate). Divided by the mean slope of the logits the fit is a
factor and a shift for each label, by its frequency alone. Labels rarer than nearly all candidates get those of the rarest
candidates: the fit knows nothing of them, and its term in 1/n could lift them above all others. Factors and shifts are folded
into the head: nothing is added at inference. A Gaussian prior holds the fit to "no change" where documents are few.

The head goes half of the way to the fit. The likeliest logits are not those that rank best: what a fit moves most are rare
labels, and its first half brings nearly all that frequent ones gain, its second most of what rare ones lose. Labels are left as
they were where the documents rank worse by more than a standard error, counted by P@1, P@5 and PSP@5 together: what half of a
fit gains is as small as what a thousand documents can show.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fanin.data.batches import collate
from fanin.data.tokens import TokenSet
from fanin.heads import FixedFanIn, Head
from fanin.kernels.layer import decode, raw
from fanin.metrics import Contributions, contributions, csr, inverse_propensity, match
from fanin.model import Classifier
from fanin.retrieval import rank

FITTED = 5  # labels a document, the first ones, that the fit is made on: it is about those places
SHARE = 0.5  # of the way to the fit
CANDIDATES = 20  # labels a document that are ranked anew to see whether it helps
PRIOR = 10.0  # precision of the prior on coefficients of covariates of unit variance: 1 for the logit's, 0 for the others
JUDGES = ("P@1", "P@5", "PSP@5")
FEWEST = 200  # documents; on fifty a fit that only seems to rank better costs a tenth of a point of P@5 elsewhere
SELDOM = 0.01  # of the candidates are rarer than what the fit is trusted for
_BATCH = 256
_ROWS = 2**16  # of the head, changed together
_ROUNDS = 50  # of Newton's method; it takes about 8
_UNSEEN = 0.5  # documents that a label counts as which only held-out documents have


class Shift(NamedTuple):
    """Of a label of n training documents, what becomes of its logits: slope(n) z + (words - 1) z_words + gain(n)."""

    words: float = 1.0
    log_frequency: float = 0.0
    rare: float = 0.0
    slope: float = 1.0
    slope_log_frequency: float = 0.0
    rarest: float = _UNSEEN  # documents: rarer labels count as this, since hardly any of them was among the candidates

    def slopes(self, frequency: np.ndarray) -> np.ndarray:
        """slope + slope_log_frequency log n, and never less than a tenth."""
        return np.maximum(self.slope + self.slope_log_frequency * np.log(_at_least(frequency, self.rarest)), 0.1)

    def gains(self, frequency: np.ndarray) -> np.ndarray:
        """log_frequency log n + rare / n."""
        n = _at_least(frequency, self.rarest)
        return self.log_frequency * np.log(n) + self.rare / n

    def partway(self, share: float) -> Shift:
        """That share of the way from no shift at all to this one."""
        none = Shift(rarest=self.rarest)
        return Shift(*(start + share * (end - start) for start, end in zip(none, self, strict=True)))

    def apply(self, scores: np.ndarray, words: np.ndarray, frequency: np.ndarray) -> np.ndarray:
        """Logits, words' part of them and their labels' frequency, of one shape -> the logits afterwards."""
        slopes = self.slopes(frequency)
        return (scores - words) * slopes + words * self.words_slopes(slopes) + self.gains(frequency)

    def words_slopes(self, slopes: np.ndarray) -> np.ndarray:
        """The factor of words beside those `slopes` of all else."""
        return np.maximum(slopes + (self.words - 1), 0)


def _at_least(frequency: np.ndarray, rarest: float) -> np.ndarray:
    return np.maximum(frequency, rarest).astype(np.float64)


def calibrate(classifier: Classifier, tokens: TokenSet, rows: np.ndarray, frequency: np.ndarray) -> dict[str, float]:
    """Fit a `Shift` on the held-out `rows` of `tokens`, go `SHARE` of the way to it and, unless they rank worse so, fold that
    into the head's weights and biases, in place.

    frequency [L]: training documents of each label. All of the classifier's ranks call this. Returns the shift that was made,
    the candidates' P@k and PSP@k before and after it (the documents that it was fitted on: no estimate of what others would
    gain), the gain (points by which `JUDGES` together rise) with its standard error over documents, and whether the shift was
    kept (1 or 0): not where it loses more than that error, nor of fewer than `FEWEST` documents.
    """
    count, settings = min(CANDIDATES, classifier.labels), classifier.config.evaluate
    labels, scores = rank(classifier, tokens, rows, count, _BATCH)
    words = _words_part(classifier, tokens, rows, labels)
    truth = csr(tokens.labels(rows))
    hits = match(labels, *truth)
    shift = fit(*(each[:, :FITTED] for each in (scores, words, frequency[labels], hits))).partway(SHARE)
    order = np.argsort(-shift.apply(scores, words, frequency[labels]), axis=1, kind="stable")
    known = max(len(tokens) - len(rows), 1)
    inverse = inverse_propensity(np.maximum(frequency, 1), known, settings.propensity_a, settings.propensity_b)
    ranked = np.take_along_axis(labels, order, 1), np.take_along_axis(hits, order, 1)
    before, after = (contributions(*places, *truth, inverse) for places in ((labels, hits), ranked))
    gain, error = _gain(before, after)
    kept = classifier.ranks.of_first(len(rows) >= FEWEST and gain >= -error)  # all fold, or none
    if kept:
        _fold(classifier, shift, frequency)
    said = {
        f"{when} {name}": float(value)
        for when, found in (("before", before), ("after", after))
        for name, value in found.values().items()
        if name.startswith(("P@", "PSP@"))
    }
    return {**shift._asdict(), **said, "gain": gain, "gain_error": error, "kept": float(kept)}


def _gain(before: Contributions, after: Contributions) -> tuple[float, float]:
    """Points by which `JUDGES` together rise, and the standard error of that over the documents."""
    each = np.zeros(len(before.columns))
    for name in JUDGES:
        top, bottom = before.ratios[name]  # what is divided by does not depend on the ranking
        whole = before.columns[:, bottom].mean(dtype=np.float64)
        if whole > 0:
            each += 100 * (after.columns[:, top] - before.columns[:, top]) / whole
    return float(each.mean()), float(each.std() / np.sqrt(len(each)))


def fit(scores: np.ndarray, words: np.ndarray, frequency: np.ndarray, hits: np.ndarray) -> Shift:
    """Candidates' logits, the words' part of them, their labels' training documents and whether they are right, all [N, C]."""
    seen = np.isfinite(scores)
    z, right = scores[seen].astype(np.float64), hits[seen]
    n = _at_least(frequency[seen], _UNSEEN)
    columns = np.stack([z, words[seen], np.log(n), 1 / n, z * np.log(n)]).astype(np.float64)
    mean, spread = columns.mean(1), columns.std(1)
    told = spread > 1e-9  # no words, or all labels alike: nothing to fit
    told[4] &= told[2]
    if not right.any() or right.all() or not told[0]:
        return Shift()
    x = np.column_stack([np.ones(len(z)), (columns[told].T - mean[told]) / spread[told]])
    prior, trust = np.zeros(x.shape[1]), np.full(x.shape[1], PRIOR)
    prior[1], trust[0] = spread[0], 0.0
    slopes = np.zeros(len(columns))
    slopes[told] = _newton(x, right.astype(np.float64), prior, trust)[1:] / spread[told]
    middle = slopes[0] + slopes[4] * mean[2]  # of the candidates' own slopes
    if middle < 0.05:  # logits that say nothing on other documents: not for a shift to mend
        return Shift()
    slope, own, log_frequency, rare, slope_log_frequency = (float(value) for value in slopes / middle)
    seldom = float(np.quantile(n, SELDOM))
    rarest = seldom if seldom > 1 else _UNSEEN
    return Shift(max(1 + own, 0.0), log_frequency, rare, slope, slope_log_frequency, rarest)


def _newton(x: np.ndarray, y: np.ndarray, prior: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """The maximum a posteriori of a logistic regression x [N, P] -> y [N], halving steps that do not help."""

    def loss(theta: np.ndarray) -> float:
        z = x @ theta
        return float(np.logaddexp(0, z).sum() - z @ y + (trust * (theta - prior) ** 2).sum() / 2)

    theta, value = prior.copy(), loss(prior)
    for _ in range(_ROUNDS):
        p = 1 / (1 + np.exp(-np.clip(x @ theta, -500, 500)))
        gradient = x.T @ (p - y) + trust * (theta - prior)
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(trust + 1e-9)
        step = np.linalg.solve(curvature, gradient)
        size = 1.0
        while (new := loss(theta - size * step)) > value and size > 1e-6:
            size /= 2
        if size <= 1e-6:
            break
        gain, theta, value = value - new, theta - size * step, new
        if gain <= 1e-14 * abs(value):
            break
    return theta


@torch.inference_mode()
def _words_part(classifier: Classifier, tokens: TokenSet, rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """What words bring to the logits of `labels` [N, C] on the documents `rows` [N]."""
    device, total = classifier.device, torch.zeros(labels.shape, device=classifier.device)
    if classifier.lexical is None:
        return total.cpu().numpy()
    place = _rows_of(classifier, torch.from_numpy(labels.astype(np.int64)).to(device))
    for start in range(0, len(rows), _BATCH):
        ids, mask = collate(tokens.ids(rows[start : start + _BATCH]), 0)
        read = classifier.lexical(ids.to(device), mask.to(device))
        for first, head in classifier.head.parts():
            if not isinstance(head, FixedFanIn):  # reads none
                continue
            own = place[start : start + _BATCH] - first
            here = (own >= 0) & (own < head.labels)
            row = own.clamp(0, head.labels - 1)
            index = _take(head.index, row.flatten() // head.group)[:, head.inner_fan_in :].to(torch.int64) - head.inner
            weight = decode(_take(head.weight, row.flatten()))[:, head.inner_fan_in :]
            values = read.gather(1, index.view(len(own), -1)).view_as(weight)
            total[start : start + _BATCH] += torch.linalg.vecdot(values, weight.float()).view_as(own) * here
    classifier.ranks.sum_([total])
    return total.cpu().numpy()


def _take(tensor: Tensor, rows: Tensor) -> Tensor:
    """tensor[rows], of any type."""
    return raw(tensor)[rows].view(tensor.dtype)


def _rows_of(classifier: Classifier, labels: Tensor) -> Tensor:
    """The rows of this rank's head that label ids are, outside 0..labels-1 where they are others'."""
    rows = classifier.label_rows
    return (labels if rows is None else torch.from_numpy(rows).to(labels.device)[labels]) - classifier.head.first


@torch.no_grad()
def _fold(classifier: Classifier, shift: Shift, frequency: np.ndarray) -> None:
    for first, head in classifier.head.parts():
        own = slice(classifier.head.first + first, classifier.head.first + first + head.labels)
        names = np.arange(own.start, own.stop) if classifier.label_order is None else classifier.label_order[own]
        _fold_part(head, shift, frequency[names])


def _fold_part(head: Head, shift: Shift, frequency: np.ndarray) -> None:
    """frequency: of each row of `head`."""
    own_slopes = shift.slopes(frequency)
    slopes, words = (torch.from_numpy(s).to(head.bias) for s in (own_slopes, shift.words_slopes(own_slopes)))
    head.bias.mul_(slopes).add_(torch.from_numpy(shift.gains(frequency)).to(head.bias))
    weights = head.get_buffer("weight")
    inner = head.inner_fan_in if isinstance(head, FixedFanIn) else weights.shape[1]
    for start in range(0, head.labels, _ROWS):
        weight = weights[start : start + _ROWS]
        for part, factor in ((weight[:, :inner], slopes), (weight[:, inner:], words)):
            part.copy_((decode(part) * factor[start : start + _ROWS, None]).to(weight.dtype))
