"""The start from data: held to closed forms, to a plain dense computation, and to what the heads themselves compute."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from embedded_corpus import write_corpus
from fanin.centroids import load_label_documents
from fanin.clusters import build_clusters
from fanin.config import Config
from fanin.files import InputError, read_json
from fanin.heads import Bottleneck, Dense, FixedFanIn, Head, HeadTail
from fanin.kernels.layer import index_dtype
from fanin.label_order import frequent_first, label_order
from fanin.start import build, forms, ranking, sparse_coding
from fanin.start import whitening as whitening_module
from fanin.start.build import build_start
from fanin.start.ranking import Ranking
from fanin.start.sparse_coding import decode, encode, kmeans_dictionary, learn_dictionary
from fanin.start.whitening import whitening

LABELS, WIDTH, DOCUMENTS = 90, 16, 900


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> SimpleNamespace:
    """Documents near the sum of their labels' directions; the last three labels have no embedded document."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    lists = [sorted(rng.choice(LABELS - 3, rng.integers(1, 4), replace=False).tolist()) for _ in range(DOCUMENTS)]
    lists[5] = sorted({*lists[5], LABELS - 3})  # held out below, so never embedded
    directions = rng.normal(size=(LABELS, WIDTH))
    noise = rng.normal(size=(DOCUMENTS, WIDTH)) @ np.diag(np.linspace(0.2, 1.0, WIDTH))
    vectors = (np.stack([directions[own].sum(0) for own in lists]) + noise + 0.7).astype(np.float16)
    validation = np.arange(0, DOCUMENTS, 15) + 5
    documents = np.setdiff1d(np.arange(DOCUMENTS), validation)[:780]
    tokens, embedded = write_corpus(folder, lists, vectors, documents=documents, validation=validation, label_count=LABELS)
    config = Config()
    config.clusters.meta_labels = 8
    build_clusters(config, tokens, embedded, folder / "clusters")
    x = vectors.astype(np.float64)
    y = np.zeros((DOCUMENTS, LABELS))
    for document, own in enumerate(lists):
        y[document, own] = 1
    return SimpleNamespace(
        inputs=(tokens, embedded, folder / "clusters"),
        order=np.load(folder / "clusters/order.npy"),
        x=x[documents],
        y=y[documents],
        validation_x=x[validation],
        validation_y=y[validation],
        frequency=np.delete(y, validation, axis=0).sum(0),
        trained=DOCUMENTS - len(validation),
    )


def settings(kind: str = "fixed_fan_in", intermediate: int = 40, **head) -> Config:
    config = Config()
    config.head.kind, config.head.intermediate = kind, intermediate
    config.head.fan_in, config.head.bottleneck = 6, 5
    config.train.device = "cpu"
    for name, value in head.items():
        setattr(config.head, name, value)
    return config


def run(corpus, config: Config, out: Path) -> tuple[dict[str, torch.Tensor], dict]:
    summary = build_start(config, *corpus.inputs, out)
    assert summary == read_json(out / "start.json")
    return load_file(out / "head.safetensors"), summary


def as_head(config: Config, state: dict[str, torch.Tensor]) -> Head:
    """The head of these settings, loaded from a start file's tensors."""
    own = {name: tensor for name, tensor in state.items() if not name.startswith("intermediate.")}
    width = config.head.intermediate or WIDTH
    head: Head
    if config.head.kind == "dense":
        head = Dense(LABELS, width)
    elif config.head.kind == "bottleneck":
        head = Bottleneck(LABELS, width, config.head.bottleneck)
    elif config.head.kind == "head_tail":
        head = HeadTail(LABELS, width, config.head.dense_labels(LABELS), config.head.fan_in)
    else:
        head = FixedFanIn(LABELS, width, config.head.fan_in, config.head.group)
    head.load_model_state(own, "head.safetensors")
    return head


def logits(corpus, config: Config, state: dict[str, torch.Tensor], x: np.ndarray) -> np.ndarray:
    """What the layers of the file make of embeddings [N, D]: [N, L] in order of label ids."""
    features = torch.from_numpy(x).float()
    if config.head.intermediate:
        features = F.linear(features, state["intermediate.weight"], state["intermediate.bias"])
    else:
        assert not any(name.startswith("intermediate") for name in state)
    made = as_head(config, state).logits(features, 0, LABELS).double().numpy()
    order = label_order(config, corpus.inputs[0], corpus.inputs[2])
    if order is None:
        return made
    by_label = np.empty_like(made)
    by_label[:, order] = made
    return by_label


def ridge_rows(corpus) -> tuple[np.ndarray, np.ndarray]:
    """The ridge classifier's directions in x [L, D], by solving with the covariance: no whitening. And the mean [D]."""
    mean = corpus.x.mean(0)
    covariance = np.cov(corpus.x.T)
    covariance += 0.05 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    centroids = corpus.y.T @ (corpus.x - mean) / np.maximum(corpus.y.sum(0), 1)[:, None]
    centroids[corpus.y.sum(0) == 0] = 0
    return np.linalg.solve(covariance, centroids.T).T, mean


def expected_dense(corpus, config) -> np.ndarray:
    """Logits of the scaled ridge classifier on the validation documents [N, L], without whitening."""
    rows, mean = ridge_rows(corpus)
    covariance = np.cov(corpus.x.T)
    covariance += 0.05 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    length = np.sqrt(np.einsum("ld,de,le->l", rows, covariance, rows))  # of the row in whitened coordinates
    scale = np.where(length > 0, config.start.spread / np.where(length > 0, length, 1), 0)
    return (corpus.validation_x - mean) @ (rows * scale[:, None]).T + mean_logits(corpus, config)


def mean_logits(corpus, config) -> np.ndarray:
    """[L]: at which a normal logit of this spread has the prior as its mean odds."""
    covered = corpus.y.sum(0) > 0
    return np.log((corpus.frequency + 0.5) / corpus.trained) - covered * config.start.spread**2 / 2


def test_whitening_whitens():
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(5000, 8)) @ rng.normal(size=(8, 8)) + 3).astype(np.float16)
    white = whitening(x, torch.device("cpu"))
    z = (torch.from_numpy(x.astype(np.float32)) - white.mean) @ white.matrix
    values = torch.linalg.eigvalsh(torch.cov(torch.from_numpy(x.astype(np.float64)).T))
    expected = (values / (values + 0.05 * values.mean())).float()
    torch.testing.assert_close(torch.linalg.eigvalsh(torch.cov(z.T)), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(white.matrix @ white.inverse, torch.eye(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("intermediate", [0, 40, WIDTH])
def test_dense_start_is_the_ridge_classifier(corpus, tmp_path, intermediate):
    config = settings("dense", intermediate)
    state, summary = run(corpus, config, tmp_path / "start")
    expected = expected_dense(corpus, config)
    np.testing.assert_allclose(logits(corpus, config, state, corpus.validation_x), expected, atol=0.02, rtol=1e-3)
    assert summary["residual"] < 1e-6


def test_dense_behind_a_narrow_layer_is_the_best_of_its_rank(corpus, tmp_path):
    _, summary = run(corpus, settings("dense", 5), tmp_path / "start")
    assert summary["residual"] == pytest.approx(best_residual(corpus, 5), rel=1e-3)


def best_residual(corpus, rank: int) -> float:
    """The least mean squared error of any rank-`rank` approximation of the unit rows (Eckart & Young)."""
    rows, _ = ridge_rows(corpus)
    covariance = np.cov(corpus.x.T)
    covariance += 0.05 * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    z = rows @ np.linalg.cholesky(covariance)  # any square root: the singular values are the same
    covered = corpus.y.sum(0) > 0
    unit = z[covered] / np.linalg.norm(z[covered], axis=1, keepdims=True)
    return float((np.linalg.svd(unit, compute_uv=False)[rank:] ** 2).sum() / covered.sum())


@pytest.mark.parametrize("intermediate", [0, 40, 7])
def test_bottleneck_start_is_the_best_of_its_rank(corpus, tmp_path, intermediate):
    config = settings("bottleneck", intermediate)
    state, summary = run(corpus, config, tmp_path / "start")
    assert state["projection"].shape == (5, intermediate or WIDTH)
    assert state["weight"].shape == (LABELS, 5)
    assert summary["residual"] == pytest.approx(best_residual(corpus, 5), rel=1e-3)
    centred = logits(corpus, config, state, corpus.x)
    centred -= centred.mean(0)
    assert np.linalg.matrix_rank(centred, tol=1e-4 * np.abs(centred).max()) == 5


ALL_FORMS = [
    settings("head_tail", 0, dense_share=0.1),
    settings("head_tail", 40, dense_share=0.1),
    settings("dense", 0),
    settings("dense", 40),
    settings("bottleneck", 0),
    settings("bottleneck", 40),
    settings("fixed_fan_in", 0),
    settings("fixed_fan_in", 40),
    settings("fixed_fan_in", 40, group=8),
    settings("fixed_fan_in", 0, group=8),
    settings("fixed_fan_in", 200),  # more atoms than labels
]
NAMES = [f"{c.head.kind}-{c.head.intermediate}-{c.head.group}" for c in ALL_FORMS]


@pytest.mark.parametrize("config", ALL_FORMS, ids=NAMES)
def test_all_logits_spread_alike_around_their_priors(corpus, tmp_path, config):
    state, _ = run(corpus, config, tmp_path / "start")
    made = logits(corpus, config, state, corpus.x)
    covered = corpus.y.sum(0) > 0
    np.testing.assert_allclose(made.mean(0), mean_logits(corpus, config), atol=0.02)
    spread = made.std(0, ddof=1)[covered]
    assert (spread < config.start.spread + 0.01).all()  # the ridge takes a little off
    assert (spread > 0.8 * config.start.spread).all()
    own = (corpus.y * made).sum(0) / np.maximum(corpus.y.sum(0), 1)
    assert (own - made.mean(0))[covered].min() > 0.5 * config.start.spread
    assert covered.sum() == LABELS - 3
    assert np.ptp(made[:, ~covered], axis=0).max() == 0  # nothing is known of these labels


def test_documents_of_rare_labels_are_found_as_well_as_those_of_frequent_ones(tmp_path):
    """Ten classes far from each other, of 5 to 500 documents: the start alone should tell them apart."""
    rng = np.random.default_rng(0)
    sizes = [500] * 5 + [5] * 5
    centres = 6 * rng.normal(size=(10, 12))
    own = np.repeat(np.arange(10), sizes)
    vectors = (centres[own] + rng.normal(size=(len(own), 12))).astype(np.float16)
    rows = rng.permutation(len(own))
    documents, validation = np.sort(rows[:-200]), np.sort(rows[-200:])
    lists = [[int(label)] for label in own]
    tokens, embedded = write_corpus(tmp_path, lists, vectors, documents=documents, validation=validation, label_count=10)
    build_start(settings("dense", 0), tokens, embedded, tmp_path, tmp_path / "start")
    state = load_file(tmp_path / "start/head.safetensors")
    fresh = np.repeat(np.arange(10), 50)
    x = torch.from_numpy(centres[fresh] + rng.normal(size=(500, 12))).float()
    found = (x @ state["weight"].T + state["bias"]).argmax(1).numpy() == fresh
    assert found[fresh >= 5].mean() > 0.9
    assert found[fresh < 5].mean() > 0.9


@pytest.mark.parametrize("config", ALL_FORMS, ids=NAMES)
def test_zero_shot_is_what_the_head_ranks(corpus, tmp_path, config):
    state, summary = run(corpus, config, tmp_path / "start")
    made = logits(corpus, config, state, corpus.validation_x)
    best = np.argsort(-made, axis=1)
    for k in (1, 3, 5):
        precision = np.take_along_axis(corpus.validation_y, best[:, :k], 1).mean()
        assert summary["zero_shot"][f"P@{k}"] == pytest.approx(100 * precision, abs=0.35)  # one near tie in 60 x 5
    assert summary["zero_shot"]["P@1"] > 10  # chance is about 2; a bottleneck of 5 is narrow


@pytest.mark.parametrize("config", ALL_FORMS[6:], ids=NAMES[6:])
def test_indices_are_distinct_ascending_and_small(corpus, tmp_path, config):
    state, _ = run(corpus, config, tmp_path / "start")
    rows = -(-LABELS // config.head.group)
    assert state["index"].shape == (rows, 6)
    assert state["index"].dtype == index_dtype(config.head.intermediate or WIDTH)
    index = state["index"].to(torch.int64)
    assert (index[:, 1:] > index[:, :-1]).all()
    assert 0 <= int(index.min()) <= int(index.max()) < (config.head.intermediate or WIDTH)
    assert state["weight"].shape == (LABELS, 6)
    assert state["weight"].dtype == state["bias"].dtype == torch.float32


@pytest.mark.parametrize("config", ALL_FORMS, ids=NAMES)
def test_chunked_equals_all_at_once(corpus, tmp_path, monkeypatch, config):
    config.start.rounds = 1  # a dictionary that does not depend on the chunks of coding
    whole, summary = run(corpus, config, tmp_path / "whole")
    monkeypatch.setattr(build, "CHUNK", 24)
    monkeypatch.setattr(whitening_module, "GATHER", 50)
    monkeypatch.setattr(ranking, "SCORES", 60 * 7)
    monkeypatch.setattr(sparse_coding, "CPU_BUDGET", 3000)
    monkeypatch.setattr(forms, "RANDOM_BUDGET", 64)
    pieces, again = run(corpus, config, tmp_path / "pieces")
    assert again["zero_shot"] == summary["zero_shot"]
    assert again["residual"] == pytest.approx(summary["residual"], rel=1e-3, abs=1e-9)
    x = corpus.validation_x
    np.testing.assert_allclose(logits(corpus, config, pieces, x), logits(corpus, config, whole, x), atol=0.05, rtol=1e-3)
    if "index" in whole:
        assert (whole["index"].to(torch.int64) == pieces["index"].to(torch.int64)).all(1).float().mean() > 0.97


def test_same_seed_same_start(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = settings()
        config.seed = seed
        run(corpus, config, tmp_path / name)
    a, b, c = ((tmp_path / name / "head.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_random_start_holds_no_tensor(corpus, tmp_path):
    config = settings()
    config.start.source = "random"
    state, summary = run(corpus, config, tmp_path / "start")
    assert state == {}
    assert (summary["source"], summary["zero_shot"]) == ("random", None)
    with safe_open(tmp_path / "start/head.safetensors", "pt") as file:
        assert file.metadata()["source"] == "random"


def test_squared_hinge_puts_own_documents_at_the_margin(corpus, tmp_path):
    config = settings("dense", 0, loss="squared_hinge")
    state, _ = run(corpus, config, tmp_path / "start")
    made = logits(corpus, config, state, corpus.x)
    prior = (corpus.frequency + 0.5) / corpus.trained
    own = (corpus.y * made).sum(0) / np.maximum(corpus.y.sum(0), 1)
    covered = corpus.y.sum(0) > 0
    np.testing.assert_allclose(made.mean(0), 2 * prior - 1, atol=0.01)
    np.testing.assert_allclose(own[covered], (1 + 2 * prior)[covered], atol=0.01)


def test_groups_follow_the_cluster_order(corpus, tmp_path):
    state, _ = run(corpus, settings(group=8), tmp_path / "start")
    mean = mean_logits(corpus, settings())
    np.testing.assert_allclose(state["bias"].numpy(), mean[corpus.order], rtol=1e-5)


def test_without_validation_documents_no_zero_shot(corpus, tmp_path):
    tokens, embedded, clusters = corpus.inputs
    copy = tmp_path / "embeddings"
    copy.mkdir()
    for name in ("embeddings.npy", "documents.npy"):
        (copy / name).write_bytes((embedded / name).read_bytes())
    np.save(copy / "validation.npy", np.empty((0, WIDTH), np.float16))
    np.save(copy / "validation_documents.npy", np.empty(0, np.int64))
    summary = build_start(settings(), tokens, copy, clusters, tmp_path / "start")
    assert summary["zero_shot"] is None


def sparse_targets(atoms: int, fan_in: int, targets: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit targets [n, 32] that are sums of `fan_in` atoms, the atoms, and which."""
    generator = torch.Generator().manual_seed(seed)
    dictionary = F.normalize(torch.randn(atoms, 32, generator=generator), dim=1)
    index = torch.rand(targets, atoms, generator=generator).topk(fan_in, dim=1).indices.sort(dim=1).values
    sign = torch.randint(0, 2, (targets, fan_in), generator=generator) * 2 - 1
    value = sign * (1 + torch.rand(targets, fan_in, generator=generator))
    return F.normalize(decode(index, value, dictionary), dim=1), dictionary, index


def residual(targets: torch.Tensor, dictionary: torch.Tensor, fan_in: int, group: int = 1) -> float:
    index, value = encode(targets, dictionary, fan_in, group)
    return float((targets - decode(index, value, dictionary, group)).square().sum(1).mean())


def test_a_known_code_is_found():
    targets, dictionary, truth = sparse_targets(atoms=48, fan_in=3, targets=600)
    index, _ = encode(targets, dictionary, 3)
    assert (index == truth).all(1).float().mean() > 0.9
    assert residual(targets, dictionary, 3) < 0.01


@pytest.mark.parametrize(("group", "rounds"), [(1, 32), (4, 32), (1, 2), (4, 3)])
def test_each_round_takes_the_atoms_with_the_most_energy_in_what_is_left(group, rounds):
    """Orthogonal matching pursuit, step by step with least squares in place of an orthonormal basis."""
    generator = torch.Generator().manual_seed(3)
    targets, atoms = (F.normalize(torch.randn(n, 20, generator=generator), dim=1) for n in (24, 50))
    fan_in = 7
    index, _ = encode(targets, atoms, fan_in, group, rounds)
    for own, found in zip(targets.view(-1, group, 20).double().numpy(), index, strict=True):
        chosen: list[int] = []
        while len(chosen) < fan_in:
            basis = atoms[chosen].double().numpy().T
            left = own.T - basis @ np.linalg.lstsq(basis, own.T, rcond=None)[0] if chosen else own.T
            energy = ((atoms.double().numpy() @ left) ** 2).sum(1)
            energy[chosen] = -1
            chosen += np.argsort(-energy)[: min(-(-fan_in // rounds), fan_in - len(chosen))].tolist()
        assert found.tolist() == sorted(chosen)


def test_values_are_the_least_squares_ones():
    targets, dictionary, _ = sparse_targets(atoms=48, fan_in=8, targets=20)
    index, value = encode(targets, dictionary, 4)
    for row in range(20):
        best = torch.linalg.lstsq(dictionary[index[row]].T.double(), targets[row].double()[:, None]).solution[:, 0]
        torch.testing.assert_close(value[row].double(), best, atol=0.01, rtol=0.01)


def test_more_fan_in_leaves_less():
    targets, dictionary, _ = sparse_targets(atoms=64, fan_in=16, targets=300)
    left = [residual(targets, dictionary, k) for k in (2, 4, 8, 16, 32)]
    assert left == sorted(left, reverse=True)
    assert residual(targets, dictionary, 64) < 1e-4  # all atoms: nothing is left


def test_a_dictionary_is_learnt():
    targets, truth, _ = sparse_targets(atoms=48, fan_in=2, targets=3000)
    generator = torch.Generator().manual_seed(0)
    first = residual(targets, kmeans_dictionary(targets, 48, generator), 2)
    learnt = residual(targets, learn_dictionary(targets, 48, 2, 1, 10, generator), 2)
    random = residual(targets, F.normalize(torch.randn(48, 32, generator=generator), dim=1), 2)
    assert learnt < 0.8 * first < 0.64 * random
    assert residual(targets, truth, 2) < 0.01


def test_longer_targets_are_coded_better():
    """More targets than atoms can serve: those that count more get the atoms."""
    generator = torch.Generator().manual_seed(0)
    targets = F.normalize(torch.randn(400, 32, generator=generator), dim=1)
    weight = torch.ones(400, 1)
    weight[300:] = 4
    plain, weighted = (
        learn_dictionary(rows, 48, 3, 1, 4, torch.Generator().manual_seed(1)) for rows in (targets, targets * weight)
    )
    light, heavy = targets[:300], targets[300:]
    assert residual(heavy, weighted, 3) < 0.85 * residual(heavy, plain, 3)
    assert residual(light, weighted, 3) > residual(light, plain, 3)


@pytest.mark.parametrize("group", [1, 4])
def test_the_sample_counts_each_training_document_of_a_label_once(corpus, monkeypatch, group):
    source = load_label_documents(*corpus.inputs[:2])
    generator = torch.Generator().manual_seed(0)
    chosen, weight = build._sample(source, corpus.order, group, generator)
    assert len(chosen) >= LABELS - 3
    torch.testing.assert_close(
        weight / weight[0], torch.from_numpy(source.frequency[chosen].clip(1) / source.frequency[chosen[0]]).float()
    )

    monkeypatch.setattr(build, "SAMPLE", 24)
    drawn = [build._sample(source, corpus.order, group, generator) for _ in range(400)]
    always = set.intersection(*(set(chosen.tolist()) for chosen, _ in drawn))
    assert len(always) == 12  # the heaviest half
    assert len(set.union(*(set(chosen.tolist()) for chosen, _ in drawn))) >= LABELS - 3
    heavy = np.isin(np.arange(LABELS), list(always))
    ratio = np.mean([float(weight[~heavy[chosen]].sum() / weight[heavy[chosen]].sum()) for chosen, weight in drawn])
    known = source.counts > 0
    assert ratio == pytest.approx(source.frequency[known & ~heavy].sum() / source.frequency[heavy].sum(), rel=0.05)


def test_dictionary_larger_than_the_targets():
    targets, _, _ = sparse_targets(atoms=48, fan_in=2, targets=10)
    generator = torch.Generator().manual_seed(0)
    dictionary = learn_dictionary(targets, 64, 4, 1, 3, generator)
    torch.testing.assert_close(dictionary.norm(dim=1), torch.ones(64))
    assert torch.linalg.matrix_rank(dictionary) == 32
    assert residual(targets, dictionary, 4) < 0.01


@pytest.mark.parametrize("targets", [96, 90])
def test_a_group_shares_the_support_of_most_energy(targets):
    generator = torch.Generator().manual_seed(0)
    dictionary = F.normalize(torch.randn(40, 32, generator=generator), dim=1)
    groups = -(-targets // 8)
    truth = torch.rand(groups, 40, generator=generator).topk(3, dim=1).indices.sort(dim=1).values
    value = torch.randn(targets, 3, generator=generator)
    made = F.normalize(decode(truth, value, dictionary, 8), dim=1)
    index, value = encode(made, dictionary, 3, 8)
    assert index.shape == (groups, 3)
    assert value.shape == (targets, 3)
    assert (index == truth).all(1).float().mean() > 0.9
    assert residual(made, dictionary, 3, 8) < 0.02


def test_fewer_targets_than_a_group():
    targets, dictionary, _ = sparse_targets(atoms=40, fan_in=3, targets=5)
    index, value = encode(targets, dictionary, 10, 8)
    assert index.shape == (1, 10)
    assert value.shape == (5, 10)
    # ten atoms for five targets do better than the first ten of the dictionary
    first = targets - targets @ torch.linalg.pinv(dictionary[:10]) @ dictionary[:10]
    assert (targets - decode(index, value, dictionary, 8)).square().mean() < 0.5 * first.square().mean()


def test_zero_targets_get_random_features_and_zero_weights(corpus, tmp_path):
    state, _ = run(corpus, settings(), tmp_path / "start")
    bare = torch.from_numpy(np.flatnonzero(corpus.y.sum(0) == 0))
    assert len(bare) == 3
    assert not state["weight"][bare].any()
    supports = {tuple(row.tolist()) for row in state["index"].to(torch.int64)[bare]}
    assert len(supports) == 3


@pytest.fixture
def long_tail(tmp_path) -> SimpleNamespace:
    """30 embedded documents with 12 labels each that no other has, 4 that all share out, and 240 labels without any."""
    rng = np.random.default_rng(3)
    lists = [[4 + 12 * document + i for i in range(12)] for document in range(30)]
    ids = 4 + rng.permutation(600)  # so that no two of a document are neighbours
    lists = [sorted([document % 4, *ids[np.array(own) - 4].tolist()]) for document, own in enumerate(lists)]
    vectors = rng.normal(size=(40, WIDTH)).astype(np.float16)
    lists += [[0]] * 10  # held out
    where = {"documents": np.arange(30), "validation": np.arange(30, 40), "label_count": 604}
    return SimpleNamespace(inputs=(*write_corpus(tmp_path / "in", lists, vectors, **where), tmp_path), lists=lists[:30])


@pytest.mark.parametrize("intermediate", [0, 40])
def test_a_long_tail_is_coded_once_a_document(long_tail, tmp_path, monkeypatch, intermediate):
    """The state is that of coding every label by itself, and far fewer rows are coded."""
    config = settings(intermediate=intermediate)
    config.start.rounds = 1
    coded = []

    def counted(rows, *rest, **more):
        coded.append(len(rows))
        return encode(rows, *rest, **more)

    monkeypatch.setattr(forms, "encode", counted)
    monkeypatch.setattr(build, "CHUNK", 100)
    short, summary = run(long_tail, config, tmp_path / "short")
    assert 34 <= sum(coded) < 34 + 7  # 30 documents, 4 labels of several; once more in each chunk that cuts a run
    coded.clear()
    monkeypatch.setattr(build, "_alike_together", lambda source: np.arange(source.labels))
    plain, expected = run(long_tail, config, tmp_path / "plain")
    assert sum(coded) > 300
    seen = torch.zeros(604, dtype=torch.bool)
    seen[[label for own in long_tail.lists for label in own]] = True
    for name in ("weight", "index"):
        torch.testing.assert_close(short[name][seen].double(), plain[name][seen].double(), rtol=1e-4, atol=1e-5)
    assert not short["weight"][~seen].any()
    torch.testing.assert_close(short["bias"], plain["bias"], rtol=1e-5, atol=1e-5)
    assert all(len(set(row.tolist())) == config.head.fan_in for row in short["index"].to(torch.int64))
    assert summary["residual"] == pytest.approx(expected["residual"], rel=1e-5)
    assert summary["zero_shot"] == expected["zero_shot"]


def test_only_the_best_of_the_labels_without_weights_can_be_found():
    """Ranking leaves the other ones out; the result is that of ranking all."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 8, generator=generator) * (torch.arange(300) % 3 == 0)[:, None]
    bias, z = torch.randn(300, generator=generator), torch.randn(20, 8, generator=generator)
    ranking = Ranking(np.zeros((20, 8), np.float16), [np.array([0])] * 20, 300)
    ranking.z, ranking.best = z, z.new_empty(20, 0)
    ranking.found = torch.empty(20, 0, dtype=torch.int64)
    names = np.random.default_rng(0).permutation(300)
    for part in np.array_split(np.arange(300), 4):
        ranking.offer(rows[part], bias[part], names[part])
    score = torch.addmm(bias, z, rows.T)
    assert np.array_equal(ranking.found.numpy(), names[score.topk(5, dim=1).indices.numpy()])


def test_fan_in_above_the_width_is_an_error(corpus, tmp_path):
    with pytest.raises(InputError, match=r"head\.fan_in: 17 is above the 16 features"):
        build_start(settings(intermediate=0, fan_in=17), *corpus.inputs, tmp_path / "start")
    assert not (tmp_path / "start").exists()


@pytest.mark.parametrize("intermediate", [0, 40])
def test_bottleneck_above_the_directions_is_an_error(corpus, tmp_path, intermediate):
    with pytest.raises(InputError, match=r"head\.bottleneck: 17 is above the 16 directions"):
        build_start(settings("bottleneck", intermediate, bottleneck=17), *corpus.inputs, tmp_path / "start")


def test_a_label_on_every_document_stays_near_its_prior(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 8)).astype(np.float16)
    lists = [sorted({0, int(label)}) for label in rng.integers(1, 10, 200)]
    documents, validation = np.arange(180), np.arange(180, 200)
    tokens, embedded = write_corpus(tmp_path, lists, vectors, documents=documents, validation=validation, label_count=10)
    config = settings("dense", 0)
    build_start(config, tokens, embedded, tmp_path, tmp_path / "start")
    state = load_file(tmp_path / "start/head.safetensors")
    made = torch.from_numpy(vectors.astype(np.float32)) @ state["weight"][0] + state["bias"][0]
    # its centroid is the mean itself, its row's direction noise: no reason to be longer than other rows
    assert made.std() < 1.1 * config.start.spread
    assert float(made.mean()) == pytest.approx(np.log(180.5 / 180) - config.start.spread**2 / 2, abs=0.2)


def test_a_device_that_is_not_there_is_an_error(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = settings()
    config.train.device = "cuda"
    with pytest.raises(InputError, match=r"train\.device: cuda"):
        build_start(config, *corpus.inputs, tmp_path / "start")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (np.zeros(LABELS, np.int32), "each of the 90 labels once"),
        (np.arange(LABELS - 1), "each of the 90 labels once"),
        (None, "order.npy is missing"),
    ],
)
def test_an_order_that_does_not_fit_is_an_error(corpus, tmp_path, order, message):
    if order is not None:
        np.save(tmp_path / "order.npy", order)
    with pytest.raises(InputError, match=message):
        build_start(settings(group=4), *corpus.inputs[:2], tmp_path, tmp_path / "start")


def test_equal_embeddings_are_an_error(tmp_path):
    lists = [[label] for label in range(8)] * 3
    tokens, embedded = write_corpus(
        tmp_path, lists, np.ones((24, 4), np.float16), documents=np.arange(20), validation=np.arange(20, 24), label_count=8
    )
    with pytest.raises(InputError, match="do not differ"):
        build_start(settings(fan_in=2), tokens, embedded, tmp_path, tmp_path / "start")


def test_a_full_fan_in_is_the_ridge_classifier(corpus, tmp_path):
    config = settings(intermediate=0, fan_in=WIDTH)
    state, summary = run(corpus, config, tmp_path / "start")
    expected = expected_dense(corpus, config)
    np.testing.assert_allclose(logits(corpus, config, state, corpus.validation_x), expected, atol=0.1, rtol=0.02)
    assert summary["residual"] < 1e-3


@pytest.mark.parametrize("intermediate", [0, 40])
def test_a_splits_frequent_labels_have_the_ridge_classifiers_rows(corpus, tmp_path, intermediate):
    config = settings("head_tail", intermediate, dense_share=0.2)
    state, _ = run(corpus, config, tmp_path / "start")
    frequent = label_order(config, corpus.inputs[0], corpus.inputs[2])[:18]
    assert state["frequent.weight"].shape == (18, intermediate or WIDTH)
    assert state["tail.index"].shape == (LABELS - 18, 6)
    made, expected = logits(corpus, config, state, corpus.validation_x), expected_dense(corpus, config)
    np.testing.assert_allclose(made[:, frequent], expected[:, frequent], atol=2e-2)
    others = np.setdiff1d(np.arange(LABELS), frequent)
    assert np.abs(made[:, others] - expected[:, others]).max() > 0.5  # of a few features


def test_a_splits_first_rows_are_the_most_frequent_labels():
    frequency = np.array([3, 9, 0, 9, 5, 1])
    assert frequent_first(frequency, 3).tolist() == [1, 3, 4, 0, 2, 5]


def test_counts_of_the_source(corpus, tmp_path):
    source = load_label_documents(*corpus.inputs[:2])
    _, summary = run(corpus, settings(), tmp_path / "start")
    assert summary["documents"] == len(source.embeddings) == 780
    assert summary["atoms"] == 40
