"""Label clusters: balanced, related, reproducible; centroids against a plain sum; errors on inputs that do not fit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from embedded_corpus import write_corpus
from fanin import centroids, clusters
from fanin.centroids import load_label_documents
from fanin.clusters import build_clusters, cuts, order_by_tree
from fanin.config import Config
from fanin.files import InputError, read_json


def random_corpus(
    folder: Path, *, documents: int = 400, labels: int = 60, width: int = 12, seed: int = 0
) -> tuple[Path, Path, list[list[int]], np.ndarray]:
    """Documents with 1 to 3 of all labels but the last two; 300 embedded, 50 held out."""
    rng = np.random.default_rng(seed)
    lists = [sorted(rng.choice(labels - 2, rng.integers(1, 4), replace=False).tolist()) for _ in range(documents)]
    vectors = rng.normal(size=(documents, width)).astype(np.float16)
    rows = rng.permutation(documents)
    tokens, embedded = write_corpus(
        folder, lists, vectors, documents=np.sort(rows[50:350]), validation=np.sort(rows[:50]), label_count=labels
    )
    return tokens, embedded, lists, vectors


def settings(meta_labels: int, seed: int = 1) -> Config:
    config = Config(seed=seed)
    config.clusters.meta_labels = meta_labels
    return config


@pytest.mark.parametrize("gather", [7, 32768])
def test_centroids_are_the_means_over_embedded_documents(tmp_path, monkeypatch, gather):
    monkeypatch.setattr(centroids, "GATHER", gather)
    tokens, embedded, lists, vectors = random_corpus(tmp_path)
    source = load_label_documents(tokens, embedded)
    kept, held_out = np.load(embedded / "documents.npy"), np.load(embedded / "validation_documents.npy")
    members = np.zeros((60, 400))
    for document, own in enumerate(lists):
        members[own, document] = 1
    expected = members[:, kept] @ vectors[kept].astype(np.float64) / np.maximum(members[:, kept].sum(1), 1)[:, None]
    wanted = np.array([5, 59, 0, 31, 30])
    torch.testing.assert_close(source.centroids(wanted), torch.from_numpy(expected[wanted]).float())
    assert not source.centroids(np.array([59])).any()
    assert source.counts.tolist() == members[:, kept].sum(1).tolist()
    assert source.frequency.tolist() == (members.sum(1) - members[:, held_out].sum(1)).tolist()
    assert source.documents == 350


@pytest.mark.parametrize("meta_labels", [2, 3, 7, 16, 29, 30])
def test_outputs_are_balanced_permutations(tmp_path, meta_labels):
    tokens, embedded, _, _ = random_corpus(tmp_path)
    summary = build_clusters(settings(meta_labels), tokens, embedded, tmp_path / "clusters")
    meta, order = np.load(tmp_path / "clusters/meta.npy"), np.load(tmp_path / "clusters/order.npy")
    assert meta.dtype == order.dtype == np.int32
    assert sorted(order.tolist()) == list(range(60))
    sizes = np.bincount(meta, minlength=meta_labels)
    assert sizes.max() - sizes.min() <= 1
    assert (np.diff(meta[order]) >= 0).all()
    assert order[-2:].tolist() == [58, 59]  # no document has them
    assert summary == read_json(tmp_path / "clusters/clusters.json")
    assert summary["sizes"] == {"min": sizes.min(), "max": sizes.max()}
    assert summary["without_documents"] == 2


def nested_points(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """512 unit points in 8 far clusters of 8 nearer clusters of 8, shuffled; and each one's inner cluster, 0..63."""
    rng = np.random.default_rng(seed)
    outer = np.repeat(rng.normal(size=(8, 32)), 64, axis=0)
    inner = np.repeat(rng.normal(size=(64, 32)), 8, axis=0)
    points = outer + 0.5 * inner + 0.05 * rng.normal(size=(512, 32))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    shuffle = rng.permutation(512)
    return points[shuffle].astype(np.float16), shuffle // 8


@pytest.mark.parametrize("subtree", [100, 16384])
def test_finds_nested_clusters(monkeypatch, subtree):
    monkeypatch.setattr(clusters, "SUBTREE", subtree)
    points, truth = nested_points()
    order = order_by_tree(points, cuts(512, 8), seed=3)
    outer = truth[order].reshape(8, 64) // 8
    pure = np.mean([np.bincount(run).max() / 64 for run in outer])
    mixed = np.random.default_rng(0).permutation(outer.ravel()).reshape(8, 64)
    assert pure > 0.85 > 2 * np.mean([np.bincount(run).max() / 64 for run in mixed])


@pytest.mark.parametrize("group", [8, 16, 32, 64])
def test_aligned_groups_are_related(group):
    points, _ = nested_points()
    order = order_by_tree(points, cuts(512, 12), seed=3)

    def likeness(permutation: np.ndarray) -> float:
        runs = points[permutation].astype(np.float32).reshape(-1, group, 32)
        return float(np.linalg.norm(runs.mean(1), axis=1).mean())

    shuffled = likeness(np.random.default_rng(1).permutation(512))
    best = likeness(np.argsort(nested_points()[1], kind="stable"))
    assert likeness(order) - shuffled > 0.75 * (best - shuffled)


def test_cluster_sizes_for_any_number():
    for labels, count in [(10, 3), (11, 5), (1000, 499), (1 << 20, 77), (6, 3)]:
        sizes = np.diff(cuts(labels, count))
        assert sizes.sum() == labels
        assert len(sizes) == count
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(("begin", "end", "edges"), [(0, 100, [0, 33, 66, 100]), (3, 12, [0, 3, 100]), (64, 66, [0, 100])])
def test_cuts_lie_inside(begin, end, edges):
    waiting, places = [(begin, end)], set()
    while waiting:
        low, high = waiting.pop()
        if high - low > 1:
            middle = clusters._cut(low, high, np.array(edges))
            assert low < middle < high
            places.add(middle)
            waiting += [(low, middle), (middle, high)]
    assert places == set(range(begin + 1, end))


def test_whole_runs_of_a_power_of_two_are_subtrees():
    waiting, nodes = [(0, 1024)], set()
    while waiting:
        low, high = waiting.pop()
        nodes.add((low, high))
        if high - low > 8:
            middle = clusters._cut(low, high, cuts(1024, 3))
            waiting += [(low, middle), (middle, high)]
    edges = set(cuts(1024, 3).tolist())
    for run in (8, 16, 32, 64, 128):
        for low, high in pairwise(range(0, 1025, run)):
            assert (low, high) in nodes or any(low < edge < high for edge in edges), (low, high)


def test_same_seed_same_clusters(tmp_path):
    tokens, embedded, _, _ = random_corpus(tmp_path)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_clusters(settings(8, seed), tokens, embedded, tmp_path / name)
    a, b, c = (np.load(tmp_path / name / "order.npy") for name in "abc")
    assert (a == b).all()
    assert (a != c).any()


def test_identical_points_still_divide():
    points = np.ones((200, 4), np.float16) / 2
    assert sorted(order_by_tree(points, cuts(200, 8), seed=0).tolist()) == list(range(200))


def test_more_clusters_than_labels_can_fill_become_half_as_many_as_labels(tmp_path, capsys):
    tokens, embedded, _, _ = random_corpus(tmp_path)
    assert build_clusters(settings(512), tokens, embedded, tmp_path / "clusters")["meta_labels"] == 30
    assert "512 clusters need twice as many labels; the corpus has 60, so 30 are made" in capsys.readouterr().err
    build_clusters(settings(30), tokens, embedded, tmp_path / "asked")
    assert not capsys.readouterr().err
    for name in ("meta.npy", "order.npy"):
        assert (np.load(tmp_path / "clusters" / name) == np.load(tmp_path / "asked" / name)).all()


@pytest.mark.parametrize("labels", [1, 2, 3])
def test_one_to_three_labels_are_one_cluster(tmp_path, labels):
    vectors = np.eye(8, dtype=np.float16)
    of_documents = [[document % labels] for document in range(6)]
    tokens, embedded = write_corpus(
        tmp_path, of_documents, vectors[:6], documents=np.arange(5), validation=np.array([5]), label_count=labels
    )
    assert build_clusters(settings(2), tokens, embedded, tmp_path / "clusters")["meta_labels"] == 1
    assert np.load(tmp_path / "clusters/meta.npy").tolist() == [0] * labels
    assert sorted(np.load(tmp_path / "clusters/order.npy").tolist()) == list(range(labels))


def _break_shape(folder: Path) -> None:
    np.save(folder / "documents.npy", np.arange(3))


def _break_order(folder: Path) -> None:
    np.save(folder / "documents.npy", np.load(folder / "documents.npy")[::-1].copy())


def _break_range(folder: Path) -> None:
    np.save(folder / "documents.npy", np.load(folder / "documents.npy") + 1000)


def _break_values(folder: Path) -> None:
    embeddings = np.load(folder / "embeddings.npy")
    embeddings[17, 3] = np.nan
    np.save(folder / "embeddings.npy", embeddings)


def _break_type(folder: Path) -> None:
    np.save(folder / "embeddings.npy", np.load(folder / "embeddings.npy").astype(np.float64))


def _truncate(folder: Path) -> None:
    whole = (folder / "embeddings.npy").read_bytes()
    (folder / "embeddings.npy").write_bytes(whole[: len(whole) // 2])


def _remove(folder: Path) -> None:
    (folder / "embeddings.npy").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_break_shape, r"documents\.npy: expected int64 \[300\]"),
        (_break_order, r"documents\.npy: expected ascending rows"),
        (_break_range, r"documents\.npy: expected ascending rows below 400"),
        (_break_values, r"embeddings\.npy, row 17: the embedding of document \d+ is not finite"),
        (_break_type, r"embeddings\.npy: expected float16 \[documents, width\], found float64"),
        (_truncate, r"embeddings\.npy: not a whole \.npy file"),
        (_remove, r"embeddings\.npy is missing"),
    ],
)
def test_broken_embeddings_are_named(tmp_path, spoil, message):
    tokens, embedded, _, _ = random_corpus(tmp_path)
    spoil(embedded)
    with pytest.raises(InputError, match=message):
        build_clusters(settings(8), tokens, embedded, tmp_path / "clusters")
