"""What a start from data ranks before any training: precision on held-out documents, labels offered chunk by chunk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fanin.centroids import load_embeddings
from fanin.data.tokens import TokenSet
from fanin.start.sparse_coding import decode
from fanin.start.whitening import Whitening
from fanin.start.words import LabelWords

SCORES = 2**24  # scores of validation documents held at once
RANKED = 2048  # validation documents ranked, at most
CUTOFFS = (1, 3, 5)
_READ = 256  # documents whose words are read at once


class Ranking:
    """The best labels of each validation document, as far as labels have been offered."""

    def __init__(self, embeddings: np.ndarray, truth: list[np.ndarray], labels: int, words: Tensor | None = None) -> None:
        self.embeddings, self.truth, self.labels = embeddings, truth, labels
        self.words = words  # [C + V', N] lexical features of the documents
        self.z = self.best = torch.empty(0)
        self.found = torch.empty(0, dtype=torch.int64)

    @classmethod
    def open(cls, tokens_folder: Path, embeddings_folder: Path, labels: int, words: LabelWords | None = None) -> Ranking:
        """Raises InputError where the validation embeddings do not fit train.arrow."""
        tokens = TokenSet.open(tokens_folder / "train.arrow")
        names = ("validation.npy", "validation_documents.npy")
        embeddings, documents = load_embeddings(embeddings_folder, *names, len(tokens))
        every = max(-(-len(documents) // RANKED), 1)  # evenly: documents of a kind often lie together
        embeddings, documents = embeddings[::every], documents[::every]
        read = None
        if words is not None:
            read = torch.empty(words.width, len(documents))
            for start in range(0, len(documents), _READ):
                own = slice(start, start + _READ)
                read[:, own] = words.features(documents[own]).T
        return cls(embeddings, tokens.labels(documents), labels, read)

    def whiten(self, white: Whitening) -> None:
        x = torch.from_numpy(self.embeddings.astype(np.float32)).to(white.mean.device)
        self.z = (x - white.mean) @ white.matrix
        self.words = None if self.words is None else self.words.to(x.device)
        self.best = self.z.new_empty(len(x), 0)
        self.found = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)

    def offer(
        self, rows: Tensor, bias: Tensor, labels: np.ndarray, read: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Rank labels [n] among those before; rows [n, D], whitened; bias [n], mean logits; read, weight [n, K]: words."""
        if not len(self.z):
            return
        says = rows.any(dim=1) if weight is None else rows.any(dim=1) | weight.any(dim=1)
        blank = (~says).nonzero()[:, 0]  # they score their bias on every document: only the best can be found
        if len(blank) > CUTOFFS[-1]:
            kept = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            kept[blank] = False
            kept[blank[bias[blank].topk(CUTOFFS[-1]).indices]] = True
            rows, bias, labels = rows[kept], bias[kept], labels[kept.cpu().numpy()]
            if read is not None and weight is not None:
                read, weight = read[kept], weight[kept]
        some = max(SCORES // len(self.z), CUTOFFS[-1])
        names = torch.from_numpy(labels.astype(np.int64)).to(rows.device)
        for start in range(0, len(rows), some):
            own, base, name = (tensor[start : start + some] for tensor in (rows, bias, names))
            score = torch.addmm(base, self.z, own.T)
            if read is not None and weight is not None and self.words is not None:
                score += decode(read[start : start + some], weight[start : start + some], self.words).T
            best, place = score.topk(min(CUTOFFS[-1], score.shape[1]), dim=1)
            best, found = torch.cat([self.best, best], 1), torch.cat([self.found, name[place]], 1)
            self.best, place = best.topk(min(CUTOFFS[-1], best.shape[1]), dim=1)
            self.found = found.gather(1, place)

    def precision(self) -> dict[str, float] | None:
        """P@k in per cent, or None without validation documents."""
        if not self.truth:
            return None
        document = np.repeat(np.arange(len(self.truth)), [len(own) for own in self.truth])
        pairs = document * self.labels + np.concatenate(self.truth)
        guesses = np.arange(len(self.truth))[:, None] * self.labels + self.found.cpu().numpy()
        hits = np.isin(guesses, pairs)
        return {f"P@{k}": round(100 * float(hits[:, :k].sum()) / (k * len(hits)), 3) for k in CUTOFFS}
