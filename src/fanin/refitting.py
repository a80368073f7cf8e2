"""Refitting: the head alone learns from cached embeddings, for a few epochs, right after recoding.

An epoch or less shows the head each document once, and most of what that step costs is the encoder's. Recoding has just
embedded documents anew: on these the head's step costs a few milliseconds, so that rows meet their documents,
and above all the negatives among the others, several times more. The encoder's share of training is as before; what is
left of it afterwards brings both together. Linear probing before fine-tuning (Kumar et al., ICLR 2022) has the same order.
"""

from __future__ import annotations

import numpy as np
import torch
from tqdm import tqdm

from fanin.data.batches import Batches
from fanin.data.tokens import TokenSet
from fanin.exchange import AT, exchange
from fanin.model import Classifier
from fanin.optim import warmup_cosine
from fanin.seeds import seed_of

_STREAM = 0x4EF17  # keeps this order of documents apart from the trainer's of the same seed


@torch.no_grad()
def refit(classifier: Classifier, tokens: TokenSet, rows: np.ndarray, embeddings: np.ndarray, epochs: int) -> dict[str, int]:
    """Train the head, and profiles of words, in place on the ascending `rows` [N] of `tokens`, whose present embeddings are
    `embeddings` [N, D].

    Rates, batches and momentum are those of training, with a warm-up (at most a tenth of its steps) and a cosine of its own.
    On its way labels `exchange` features, `rewiring.exchange` of them each time.
    All of the classifier's ranks call this with the same arguments. Returns refitted (the steps made) and, of all ranks
    together, exchanged (the entries that came to read another feature). Raises FloatingPointError where
    features are not finite.
    """
    if not epochs:
        return {"refitted": 0, "exchanged": 0}
    settings, ranks, device = classifier.config.train, classifier.ranks, classifier.device
    seed, pad_id = seed_of(classifier.config.seed, _STREAM) >> 1, classifier.tokenizer.pad_token_id or 0
    batches = Batches(tokens, rows, settings.batch, seed, pad_id, classifier.label_rows, ranks)
    head, total = classifier.head, epochs * len(batches)
    warmup = min(settings.warmup, total // 10)
    marks, exchanged = {round(at * total) for at in AT}, 0
    every = (batch for epoch in range(epochs) for batch in batches.epoch(epoch))
    for step, batch in enumerate(tqdm(every, "refitting", total, unit="step", mininterval=10, disable=not ranks.leads)):
        if step in marks and classifier.config.rewiring.exchange:
            exchanged += exchange(classifier, tokens, rows, embeddings, classifier.config.rewiring.exchange)
        own = np.searchsorted(rows, batch.rows[slice(*ranks.share(len(batch.rows)))])
        embedding = torch.from_numpy(embeddings[own].astype(np.float32)).to(device)
        features = classifier.join(classifier.project(embedding), batch.ids.to(device), batch.mask.to(device))
        lr, scale = settings.head_lr * warmup_cosine(step, warmup, total), 1 / len(batch.rows)
        dx, _ = head.step(
            ranks.gather(features, len(batch.rows)),
            batch.positives.between(head.first, head.first + head.labels).to(device),
            lr=lr,
            momentum=settings.momentum,
            weight_decay=settings.head_weight_decay,
            scale=scale,
            seed=seed + step,
        )
        if classifier.profiles is not None:
            classifier.step_profiles(features, ranks.scatter_sum(dx[:, head.inner :] * scale), lr)
    return {"refitted": total, "exchanged": int(ranks.total([exchanged])[0])}
