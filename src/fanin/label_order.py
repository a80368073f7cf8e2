"""Which label each row of the head is, where that is not the label's own number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fanin.config import Config
from fanin.data.tokens import TokenSet
from fanin.files import InputError, read_json


def label_order(config: Config, tokens_folder: str | Path, clusters_folder: str | Path) -> np.ndarray | None:
    """[L] int32, the label of each row of the head that `config` describes; None where rows are label ids.

    Labels that share an index row: the clusters' order, in which neighbours are related. A head/tail split: the most
    frequent labels of train.arrow first. Raises InputError where order.npy is not a permutation of the labels.
    """
    head = config.head
    if not head.ordered:
        return None
    labels = int(read_json(Path(tokens_folder) / "tokens.json")["labels"])
    if head.kind == "head_tail":
        tokens = TokenSet.open(Path(tokens_folder) / "train.arrow")
        return frequent_first(tokens.label_frequency(np.arange(len(tokens)), labels), head.dense_labels(labels))
    return _of_clusters(Path(clusters_folder) / "order.npy", labels)


def frequent_first(frequency: np.ndarray, count: int) -> np.ndarray:
    """frequency [L] -> [L] int32: the `count` most frequent labels, then the others by id."""
    order = np.argsort(-frequency, kind="stable")
    return np.concatenate([order[:count], np.sort(order[count:])]).astype(np.int32)


def _of_clusters(path: Path, labels: int) -> np.ndarray:
    try:
        order = np.load(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the stage clusters (dvc repro clusters)") from None
    except (ValueError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole .npy file ({error}); rerun the stage clusters") from None
    if order.shape != (labels,) or not np.array_equal(np.sort(order), np.arange(labels)):
        raise InputError(f"{path}: expected each of the {labels} labels once; rerun the stage clusters")
    return order.astype(np.int32)
