"""Words as features: what a document's are, which ones a label starts with, and heads that read them, start to serving."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fanin import kernels
from fanin.clusters import build_clusters
from fanin.config import Config, Head, check
from fanin.data.tokens import TokenSet, vocabulary_size
from fanin.files import InputError, read_json, write_json
from fanin.heads import FixedFanIn
from fanin.lexical import NORM, Lexical, lexical_width
from fanin.metrics import csr, match, precision
from fanin.model import Classifier
from fanin.objectives import Positives
from fanin.retrieval import rank
from fanin.rewiring import Schedule
from fanin.start import words as label_words
from fanin.start.build import build_start
from fanin.start.words import LIFT, LabelWords
from tiny import tiny_token_set, tiny_tokenizer
from training_folder import DOCUMENTS, LABELS, assert_same_run, prepare, train_in, train_in_two_goes

VOCABULARY = vocabulary_size(tiny_tokenizer())
WORDS = 3


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> TokenSet:
    return tiny_token_set(tmp_path_factory.mktemp("lexical") / "train.arrow", documents=120, labels=25)


def by_hand(ids: np.ndarray, idf: np.ndarray) -> np.ndarray:
    """One document's features, from their definition."""
    x = np.zeros(len(idf))
    for token in ids:
        count = int((ids == token).sum())
        x[token] = (1 + math.log(count)) * idf[token]
    return NORM * x / max(np.linalg.norm(x), 1e-12)


def test_features_are_tf_idf_of_one_length_and_padding_counts_nothing(tokens):
    words = LabelWords(tokens, np.arange(100), 25, VOCABULARY)
    documents = np.arange(20)
    found = tokens.ids(np.arange(100))
    seen = np.array([sum(token in ids for ids in found) for token in range(VOCABULARY)])
    idf = np.where(seen, np.log(100 / np.maximum(seen, 1)), 0)
    np.testing.assert_allclose(words.idf, idf, rtol=1e-6)
    assert idf[2] == idf[3] == 0  # [CLS] and [SEP] are in all
    expected = np.stack([by_hand(np.asarray(ids), idf) for ids in tokens.ids(documents)])

    lexical = Lexical(VOCABULARY)
    lexical.idf.copy_(torch.from_numpy(words.idf))
    longest = max(map(len, found))
    ids, mask = torch.zeros(20, longest, dtype=torch.int64), torch.zeros(20, longest, dtype=torch.int64)
    for row, own in enumerate(tokens.ids(documents)):
        ids[row, : len(own)], mask[row, : len(own)] = torch.from_numpy(own.astype(np.int64)), 1
    ids[mask == 0] = 7  # a token that others have
    np.testing.assert_allclose(lexical(ids, mask).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(words.features(documents).numpy(), expected, atol=2e-5)


def test_a_vocabulary_too_large_for_short_indices_is_folded():
    assert lexical_width(30_522, 1536) == 30_522
    assert lexical_width(250_000, 1536) == 2**16 - 1536
    assert lexical_width(250_000, 40_000) == 2**15
    lexical = Lexical(10)
    lexical.idf.fill_(1.0)
    out = lexical(torch.tensor([[3, 13, 25]]), torch.ones(1, 3, dtype=torch.int64))
    assert out[0].nonzero().flatten().tolist() == [3, 5]  # 3 and 13 are one feature, which comes twice
    assert out[0, 3] > out[0, 5]


@pytest.mark.parametrize(
    ("group", "chunk", "members", "share"),
    [
        (1, 2**21, 256, 0),
        (1, 40, 256, 0),
        (4, 2**21, 256, 0),
        (4, 40, 256, 0),
        (1, 2**21, 2, 0),
        (1, 40, 256, 0.5),
        (4, 9, 2, 2),
    ],
)
def test_a_label_reads_the_heaviest_words_of_documents_and_text(tokens, tmp_path, monkeypatch, group, chunk, members, share):
    monkeypatch.setattr(label_words, "_TOKENS", chunk)
    monkeypatch.setattr(label_words, "MEMBERS", members)
    rows = np.arange(100)
    texts = tiny_token_set(tmp_path / "labels.arrow", documents=26, seed=5)
    own = texts if share else None
    words = LabelWords(tokens, rows, 26, VOCABULARY, texts=own, text_share=share)  # label 25 is nobody's
    labels = np.random.default_rng(0).permutation(26)
    index, weight = words.of(labels, WORDS, group)
    assert index.shape == (-(-26 // group), WORDS)
    assert weight.shape == (26, WORDS)
    assert (index[:, 1:] > index[:, :-1]).all()
    assert index.min() >= 0
    assert index.max() < VOCABULARY

    x = words.features(rows).numpy().astype(np.float64)
    centroids = np.zeros((26, VOCABULARY))
    for place, label in enumerate(labels):
        own = [row for row in rows if label in tokens.labels(np.array([row]))[0]]
        size = min(len(own), members)
        some = [own[i * len(own) // size] for i in range(size)]
        (text,) = texts.ids(np.array([label]))
        total = x[some].sum(0) + share * by_hand(text, words.idf)
        centroids[place] = total / max(np.linalg.norm(total), 1e-12)
    for row in range(len(index)):
        part = centroids[row * group : (row + 1) * group]
        energy = (part**2).sum(0)
        best = np.sort(energy)[::-1][:WORDS]
        np.testing.assert_allclose(np.sort(energy[index[row]])[::-1], best, atol=1e-6)
        read = part[:, index[row]]
        read = read / np.maximum(np.linalg.norm(read, axis=1, keepdims=True), 1e-12)
        np.testing.assert_allclose(weight[row * group : (row + 1) * group].numpy(), read, atol=1e-5)
    assert bool(weight[labels == 25].any()) == (share > 0)


def test_labels_with_fewer_words_than_they_may_read_are_filled_up(tmp_path):
    """Also where the vocabulary is hardly larger than what a label reads."""
    tokens = tiny_token_set(tmp_path / "train.arrow", documents=4, labels=6)
    for width in (10, VOCABULARY):
        index, weight = LabelWords(tokens, np.array([0]), 6, width).of(np.arange(6), 8)
        assert (index[:, 1:] > index[:, :-1]).all()
        assert index.min() >= 0
        assert index.max() < width
        assert torch.isfinite(weight).all()


# the head ------------------------------------------------------------------------------------------------------------


def head(group: int = 1, dtype: torch.dtype = torch.float32, labels: int = 40) -> FixedFanIn:
    generator = torch.Generator().manual_seed(0)
    return FixedFanIn(labels, 20 + 50, 6 + WORDS, group, "bce", generator, dtype=dtype, lexical=WORDS, vocabulary=50)


@pytest.mark.parametrize("group", [1, 4])
def test_a_random_head_reads_words_without_weight(group):
    own = head(group)
    index = own.index.to(torch.int64)
    assert (index[:, :6] < 20).all()
    assert (index[:, 6:] >= 20).all()
    assert (index[:, 1:] > index[:, :-1]).all()
    assert own.weight[:, :6].all()
    assert not own.weight[:, 6:].any()
    assert len(own.feature_use()) == 20
    assert own.feature_use().sum() == 6 * 40


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("prune", ["fraction", "global", "threshold"])
@pytest.mark.parametrize("group", [1, 4])
def test_rewiring_leaves_words_where_they_are(method, prune, group):
    own = head(group, labels=42)
    own.weight[:, 6:] = 1e-4  # the smallest, if they were asked
    before, words = own.index.to(torch.int64), own.weight[:, 6:].clone()
    x = torch.randn(8, 70, generator=torch.Generator().manual_seed(1))
    x[:, 20:] *= 100  # the largest gradients
    positives = Positives(torch.tensor([3, 11, 30]), torch.tensor([0, 1, 5]))
    amount = 0.1 if prune == "threshold" else 0.4
    schedule = Schedule(method=method, prune=prune, amount=amount, interval=1, end_step=10)
    counts = own.rewire(schedule, 1, 0, x, positives)
    after = own.index.to(torch.int64)
    assert counts["moved"] > 0
    assert counts["entries"] == 6 * len(before)
    assert torch.equal(after[:, 6:], before[:, 6:])
    assert torch.equal(own.weight[:, 6:], words)
    assert (after[:, :6] < 20).all()
    assert (after[:, 1:] > after[:, :-1]).all()


def test_indices_that_mix_words_and_features_are_refused():
    own = head()
    state = {key: value.clone() for key, value in own.model_state().items()}
    state["index"].numpy()[5, 5] = 21
    state["index"].numpy()[5, 6:] = [30, 31, 32]
    with pytest.raises(InputError, match=r"start\.file: index row 5 holds 21, outside 0\.\.19"):
        own.load_model_state(state, "start.file")


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("batch", [1, 40, 130])
def test_a_step_leaves_the_gradient_of_words_out_and_nothing_else(backend, group, batch):
    """As a layer whose features are all learnt: the same weights, and dx of the encoder's features alone."""
    try:
        kernels.backend(backend)
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 70, generator=generator)
    x[:, 20:] *= torch.rand(batch, 50, generator=generator) < 0.1 / batch**0.5  # some words are in no document
    positives = Positives(torch.tensor([1, 1, 30]), torch.tensor([0, batch - 1, 0])) if batch > 1 else _one(3)
    update = kernels.Update(lr=0.5, momentum=0.9, weight_decay=0.01, scale=0.5)
    found = []
    for learnt in (None, 20):
        own = head(group, labels=42)
        own.weight[:, 6:] = torch.rand(42, WORDS, generator=torch.Generator().manual_seed(2))
        own.index[:, 6:] = (
            (torch.rand(len(own.index), 50, generator=torch.Generator().manual_seed(3)).topk(WORDS).indices + 20)
            .sort(dim=1)
            .values.to(own.index.dtype)
        )
        own.prepare_training(0.9)
        layer = dataclasses.replace(own.layer(), learnt=learnt)
        for _ in range(2):
            dx, loss = kernels.backend(backend).step(x, layer, *positives, update, "bce", True)
        found.append((dx[:, :20], loss, own.weight, own.bias, own.momentum, own.bias_momentum))
        assert dx.shape == (batch, learnt or 70)
    for whole, part in zip(*found, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 4])
def test_a_step_with_words_has_the_same_bits_with_any_number_of_threads(group):
    try:
        kernels.backend("cpu")
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            own = head(group, labels=9000)
            own.prepare_training(0.9)
            x = torch.randn(70, 70, generator=torch.Generator().manual_seed(1))
            x[:, 20:] *= torch.rand(70, 50, generator=torch.Generator().manual_seed(2)) < 0.02
            dx, _ = own.step(x, Positives(torch.tensor([1, 1, 8000]), torch.tensor([0, 5, 3])), lr=0.5, momentum=0.9)
            found.append((dx, own.weight.clone(), own.bias.clone()))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


def _one(label: int) -> Positives:
    return Positives(torch.tensor([label]), torch.tensor([0]))


# end to end ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[1, 4], ids=["one by one", "groups of 4"])
def project(request, tmp_path_factory):
    """A folder with a start from data whose labels read three words each of their documents."""
    folder = tmp_path_factory.mktemp("words")
    config = prepare(folder)
    about = folder / "data" / "tokens" / "tokens.json"
    write_json(about, read_json(about) | {"vocabulary": VOCABULARY})
    config.head = Head(fan_in=9, lexical=WORDS, intermediate=48, group=request.param)
    config.start.source, config.start.label_texts = "data", 0.0
    config.clusters.meta_labels = 8
    check(config)
    data = folder / "data"
    build_clusters(config, data / "tokens", data / "embeddings", data / "clusters")
    build_start(config, data / "tokens", data / "embeddings", data / "clusters", data / "start")
    return folder, config


def test_the_start_gives_each_label_its_words(project):
    folder, config = project
    data = folder / "data"
    order = np.load(data / "clusters" / "order.npy").astype(np.int64)
    classifier = Classifier.build(config, LABELS, order)
    classifier.load_start(data / "start" / "head.safetensors")
    own = classifier.head
    assert isinstance(own, FixedFanIn)
    assert own.width == 48 + VOCABULARY
    tokens = TokenSet.open(data / "tokens" / "train.arrow")
    rows = np.setdiff1d(np.arange(DOCUMENTS), np.load(data / "embeddings" / "validation_documents.npy"))
    words = LabelWords(tokens, rows, LABELS, VOCABULARY)
    index, weight = words.of(order if config.head.group > 1 else np.arange(LABELS), WORDS, config.head.group)
    assert torch.equal(own.index[:, 6:].to(torch.int64), index + 48)
    torch.testing.assert_close(own.weight[:, 6:], LIFT["bce"] / NORM * weight)
    np.testing.assert_array_equal(classifier.lexical.idf.numpy(), words.idf)


def test_the_start_reads_label_texts_where_they_count(project):
    folder, config = project
    data, config = folder / "data", copy.deepcopy(config)
    config.start.label_texts = 0.5
    texts = TokenSet.open(data / "tokens" / "labels.arrow")
    build_start(config, data / "tokens", data / "embeddings", data / "clusters", folder / "named")
    found, before = (load_file(start / "head.safetensors") for start in (folder / "named", data / "start"))

    order = np.load(data / "clusters" / "order.npy").astype(np.int64)
    tokens = TokenSet.open(data / "tokens" / "train.arrow")
    rows = np.setdiff1d(np.arange(DOCUMENTS), np.load(data / "embeddings" / "validation_documents.npy"))
    words = LabelWords(tokens, rows, LABELS, VOCABULARY, lift=LIFT["bce"] / NORM, texts=texts, text_share=0.5)
    index, weight = words.of(order if config.head.group > 1 else np.arange(LABELS), WORDS, config.head.group)
    assert torch.equal(found["index"][:, 6:].to(torch.int64), index + 48)
    torch.testing.assert_close(found["weight"][:, 6:], weight)
    assert (found["index"][:, 6:] != before["index"][:, 6:]).any()
    assert torch.equal(found["index"][:, :6], before["index"][:, :6])  # the features are chosen by the documents alone
    assert torch.equal(found["lexical.idf"], before["lexical.idf"])

    tiny_token_set(data / "tokens" / "labels.arrow", documents=LABELS - 1)
    with pytest.raises(InputError, match=rf"labels\.arrow: {LABELS - 1} texts, but {LABELS} labels; rerun the tokens stage"):
        build_start(config, data / "tokens", data / "embeddings", data / "clusters", folder / "named")


def test_the_start_s_ranking_counts_words(project):
    """What start.json says of the held-out documents is what the classifier that it starts does with them."""
    folder, config = project
    data = folder / "data"
    classifier = Classifier.build(config, LABELS, np.load(data / "clusters" / "order.npy"))
    classifier.load_start(data / "start" / "head.safetensors")
    tokens, held_out = TokenSet.open(data / "tokens" / "train.arrow"), np.load(data / "embeddings" / "validation_documents.npy")
    found, _ = rank(classifier.eval(), tokens, held_out, 5, 8)
    expected = precision(match(found, *csr(tokens.labels(held_out))))
    said = read_json(data / "start" / "start.json")["zero_shot"]
    assert said == pytest.approx(expected, abs=6)  # embeddings are kept in float16: a near tie may fall the other way


@pytest.mark.parametrize("method", ["none", "rigl"])
def test_training_stops_and_goes_on_with_words(project, method):
    folder, config = project
    config = dataclasses.replace(config, rewiring=dataclasses.replace(config.rewiring, method=method))
    train_in(folder, config, f"whole {method}")
    train_in_two_goes(folder, config, f"parts {method}")
    assert_same_run(folder, f"whole {method}", f"parts {method}")

    trained = Classifier.load(folder / f"whole {method}" / "models")
    start = Classifier.build(config, LABELS, np.load(folder / "data" / "clusters" / "order.npy"))
    start.load_start(folder / "data" / "start" / "head.safetensors")
    assert torch.equal(trained.head.index[:, 6:], start.head.index[:, 6:])
    assert not torch.equal(trained.head.weight[:, 6:], start.head.weight[:, 6:])


def test_a_saved_model_reads_words(project):
    """Its logits are those of the encoder's features and of the words, written out."""
    folder, config = project
    train_in(folder, config, "saved")
    classifier = Classifier.load(folder / "saved" / "models")
    ids, mask = classifier.encode(["ban bin ban dor", "dor gen"])
    scores, labels = classifier.topk(ids, mask, 5)
    inner = classifier.project(classifier.embed(ids, mask))
    words = np.stack(
        [by_hand(own[own_mask > 0].numpy(), classifier.lexical.idf.numpy()) for own, own_mask in zip(ids, mask, strict=True)]
    )
    assert words.any()
    x = torch.cat([inner, torch.from_numpy(words).float()], 1)
    own = classifier.head
    index = own.index.to(torch.int64).repeat_interleave(own.group, 0)[:LABELS]
    z = (x[:, index] * own.weight).sum(2) + own.bias
    best, row = z.topk(5, dim=1)
    torch.testing.assert_close(scores, best)
    torch.testing.assert_close(labels, row if classifier.order is None else classifier.order[row].to(torch.int64))


def test_settings_that_cannot_work():
    config = Config(head=Head(fan_in=8, lexical=8, intermediate=48))
    with pytest.raises(InputError, match=r"head\.lexical: 8 of head\.fan_in 8 leave no feature of the encoder; lower it"):
        check(config)
    config = Config(head=Head(fan_in=16, lexical=8, intermediate=48))
    config.start.source = "random"
    with pytest.raises(InputError, match=r"head\.lexical: words are chosen by the start from data; set start\.source to data"):
        check(config)
    config.head.kind = "dense"  # reads no words
    check(config)


def test_a_start_without_words_is_refused(project):
    folder, config = project
    data = folder / "data"
    other = dataclasses.replace(config, head=dataclasses.replace(config.head, fan_in=6, lexical=0))
    build_start(other, data / "tokens", data / "embeddings", data / "clusters", folder / "without")
    classifier = Classifier.build(config, LABELS, np.load(data / "clusters" / "order.npy"))
    with pytest.raises(InputError, match=r"its words do not agree with head\.lexical and head\.profiles; rerun the stage"):
        classifier.load_start(folder / "without" / "head.safetensors")
