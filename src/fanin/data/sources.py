"""What a corpus is read from: the interface of a raw layout, the choice of one, and our own parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fanin.config import Corpus

Document = tuple[str, list[int]]  # text, label ids (sorted, unique)


@dataclass
class Facts:
    """What corpus.json says about a source, beside the counts that come from its documents."""

    source: str  # where the data comes from
    licence: str
    counts: dict[str, int] = field(default_factory=dict)  # what a reader left out, filled while it reads


class Source(Protocol):
    """One raw corpus. Readers stream: nothing of a document's size is kept between two documents.

    Everything that the iterators yield has been checked; what is wrong raises InputError with the file and the line.
    `train` is read to its end before `labels` and `test`: some layouts collect the label names from it.
    """

    facts: Facts

    def files(self) -> list[Path]:
        """The files that are read, for the checksum, in a fixed order."""
        ...

    def train(self) -> Iterator[Document]:
        """Training documents, each with at least one label."""
        ...

    def test(self) -> Iterator[Document]:
        """Test documents; a document may have no label."""
        ...

    def labels(self) -> Iterator[str]:
        """The labels' texts; the n-th is that of label n."""
        ...

    def filtered(self, documents: int) -> Iterator[tuple[int, int]] | None:
        """Pairs (row of test, label) that stay out of the ranking; None where the source has no such list.

        `documents` is the number of test documents.
        """
        ...


def open_source(corpus: Corpus, raw: Path) -> Source:
    """The source that `corpus.format` names, over the folder `raw`. Raises InputError for a missing or empty file."""
    from fanin.data.wordnet import WordNet

    return WordNet(raw, corpus.task)
