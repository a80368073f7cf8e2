"""Balanced clusters of related labels: meta-labels for the auxiliary objective, an order for groups of labels.

A recursive balanced 2-means on the sphere of label centroids, as the label trees of Parabel are made (Prabhu et al.,
WWW 2018). The cuts of the tree are fixed before it grows: cluster m of M takes the places [m L / M, (m + 1) L / M) of
the order, so that any M gives sizes that differ by at most one, and below a cluster the cuts fall on multiples of the
highest power of two, so that aligned runs of 8, 16, ... 128 places are whole subtrees, but for those across an edge.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fanin.centroids import LabelDocuments, load_label_documents
from fanin.config import Config
from fanin.files import InputError, atomic_path, write_json

LEAF = 8  # places below which a subtree is not divided further
SUBTREE = 16384  # rows held in memory at once; larger nodes are split from a sample of so many
ITERATIONS = 8  # of each balanced 2-means


def build_clusters(config: Config, tokens_folder: str | Path, embeddings_folder: str | Path, out: str | Path) -> dict[str, Any]:
    """Write meta.npy [L] int32, order.npy [L] int32 and clusters.json to `out`; return clusters.json's content.

    Labels without an embedded document have no centroid: they come last in the order, by id, and fill the last clusters.
    Of fewer labels than twice clusters.meta_labels half as many clusters as labels are made. Raises InputError where the
    inputs do not fit together.
    """
    source = load_label_documents(tokens_folder, embeddings_folder)
    clusters = min(config.clusters.meta_labels, max(source.labels // 2, 1))
    if clusters < config.clusters.meta_labels:
        wanted = f"clusters.meta_labels: {config.clusters.meta_labels} clusters need twice as many labels"
        print(f"{wanted}; the corpus has {source.labels}, so {clusters} are made", file=sys.stderr)
    covered = np.flatnonzero(source.counts)
    if not len(covered):
        raise InputError(f"{embeddings_folder}: no label has an embedded document; raise encoder.embed_documents")
    with tempfile.TemporaryFile(dir=_existing(Path(out))) as file:
        points = _unit_centroids(source, covered, file)
        tree = order_by_tree(points, cuts(source.labels, clusters), config.seed)
    order = np.concatenate((covered[tree], np.flatnonzero(source.counts == 0))).astype(np.int32)
    bounds = cuts(source.labels, clusters)
    meta = np.empty(source.labels, np.int32)
    meta[order] = np.repeat(np.arange(clusters, dtype=np.int32), np.diff(bounds))
    sizes = np.bincount(meta, minlength=clusters)
    summary = {
        "meta_labels": clusters,
        "labels": source.labels,
        "without_documents": int(source.labels - len(covered)),
        "sizes": {"min": int(sizes.min()), "max": int(sizes.max())},
    }
    with atomic_path(out, directory=True) as folder:
        np.save(folder / "meta.npy", meta)
        np.save(folder / "order.npy", order)
        write_json(folder / "clusters.json", summary)
    return summary


def cuts(labels: int, clusters: int) -> np.ndarray:
    """[clusters + 1] int64: where each cluster begins in the order; the sizes differ by at most one."""
    return np.arange(clusters + 1, dtype=np.int64) * labels // clusters


def order_by_tree(points: np.ndarray, bounds: np.ndarray, seed: int) -> np.ndarray:
    """points [n, D] unit rows (memory-mapped, any float type) -> [n] int64: their order in the cluster tree.

    `bounds` are the clusters' edges in the order of all labels; places past n belong to labels without a point.
    Nodes above SUBTREE rows are divided along a direction found on a sample and applied chunk by chunk; smaller ones
    are read once and grown to the leaves in memory.
    """
    generator = torch.Generator().manual_seed(seed)
    order = np.arange(len(points), dtype=np.int64)
    waiting = [(0, len(points))]
    while waiting:
        begin, end = waiting.pop()
        if end - begin <= SUBTREE:
            rows = np.sort(order[begin:end])
            order[begin:end] = rows[_grow(_read(points, rows), begin, bounds, generator).numpy()]
            continue
        middle = _cut(begin, end, bounds)
        rows = np.sort(order[begin:end])  # ascending, so that the file is read forwards
        sample = _read(points, rows[np.sort(torch.randperm(len(rows), generator=generator)[:SUBTREE].numpy())])
        left = round(SUBTREE * (middle - begin) / (end - begin))
        _, (direction,) = _two_means(sample, torch.tensor([0, SUBTREE]), torch.tensor([left]), generator)
        parts = np.array_split(rows, -(-len(rows) // SUBTREE))
        score = torch.cat([_read(points, part) @ direction for part in parts])
        order[begin:end] = rows[torch.argsort(score, descending=True, stable=True).numpy()]
        waiting += [(begin, middle), (middle, end)]
    return order


def _grow(x: Tensor, begin: int, bounds: np.ndarray, generator: torch.Generator) -> Tensor:
    """x [n, D]: the rows at places begin, begin + 1, ... -> [n] int64: their order, all nodes of a level at a time."""
    order = torch.arange(len(x))
    edges = [0, len(x)]
    while True:
        middles = [
            _cut(begin + low, begin + high, bounds) - begin if high - low > LEAF else low for low, high in pairwise(edges)
        ]
        if middles == edges[:-1]:
            return order
        limits = torch.tensor(edges)
        rank, _ = _two_means(x[order], limits, torch.tensor(middles) - limits[:-1], generator)
        order = order[rank]
        edges = sorted({*edges, *middles})


def _two_means(x: Tensor, limits: Tensor, left: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Balanced spherical 2-means in each node at once.

    x [n, D]: rows, the nodes' one after the other; limits [nodes + 1]; left [nodes]: rows that go left (0: leave the
    node as it is). Returns the rows' new order [n] and each node's direction [nodes, D]: left rows lie highest on it.
    """
    sizes = limits.diff()
    node = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    place = torch.arange(len(x)) - limits[node]
    goes_left, stays = place < left[node], left[node] == 0
    bags = torch.cumsum(left, 0) - left  # where each node's left rows begin among all left rows
    seed = limits[:-1] + (torch.rand(len(sizes), generator=generator) * sizes).long().clamp_max(sizes - 1)
    total = F.embedding_bag(torch.arange(len(x)), x, limits[:-1], mode="sum")
    direction = F.normalize(x[seed] - total / sizes[:, None], dim=1)
    order = torch.arange(len(x))
    for _ in range(ITERATIONS):
        score = torch.cat([rows @ way for rows, way in zip(x.split(sizes.tolist()), direction, strict=True)])
        score = torch.where(stays, -place.to(score), score)
        by_score = torch.argsort(score, descending=True, stable=True)
        new = by_score[torch.argsort(node[by_score], stable=True)]
        if torch.equal(new, order):
            break
        order = new
        lefts = F.embedding_bag(order[goes_left], x, bags, mode="sum")
        direction = F.normalize(F.normalize(lefts, dim=1) - F.normalize(total - lefts, dim=1), dim=1)
    return order, direction


def _cut(begin: int, end: int, bounds: np.ndarray) -> int:
    """Where a node is divided, in (begin, end): at its middle cluster edge, else at the roundest number in binary."""
    first, last = np.searchsorted(bounds, [begin, end], side="right")
    last -= bounds[last - 1] == end
    if last > first:
        return int(bounds[(first + last) // 2])
    bit = (begin ^ (end - 1)).bit_length() - 1
    return (end - 1) >> bit << bit


def _unit_centroids(source: LabelDocuments, covered: np.ndarray, file: Any) -> np.ndarray:
    """Write the `covered` labels' centroids, made unit length, to `file`; return its memory map [n, D] float16."""
    points = np.memmap(file, np.float16, "w+", shape=(len(covered), source.width))
    for start in range(0, len(covered), SUBTREE):
        part = source.centroids(covered[start : start + SUBTREE])
        points[start : start + len(part)] = F.normalize(part, dim=1).numpy()
    return points


def _read(points: np.ndarray, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(points[rows].astype(np.float32))


def _existing(path: Path) -> Path:
    """The folder beside `path`, made if need be: large temporary files go where the outs go, not to a small /tmp."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent
