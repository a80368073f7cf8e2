"""Profiles of words: their sums, their gradient, which labels start with which, and training with them, resumed and shared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fanin import profiles
from fanin.clusters import build_clusters
from fanin.config import Head, check
from fanin.data.tokens import TokenSet, vocabulary_size
from fanin.files import InputError, read_json, write_json
from fanin.lexical import NORM, Lexical, lexical_sizes
from fanin.memory.plan import head_bytes
from fanin.model import Classifier
from fanin.profiles import Profiles, choose_profiled, profile_count
from fanin.refitting import refit
from fanin.start.build import build_start
from fanin.start.words import LIFT, LabelWords
from tiny import tiny_tokenizer
from training_folder import DOCUMENTS, LABELS, assert_same_run, prepare, train_in, train_in_two_goes

VOCABULARY = vocabulary_size(tiny_tokenizer())
COUNT, WORDS = 5, 12
ROWS = np.arange(0, 160, 2)


def random_profiles() -> Profiles:
    generator = torch.Generator().manual_seed(0)
    own = Profiles(COUNT, WORDS, VOCABULARY)
    own.index.copy_(torch.rand(COUNT, VOCABULARY, generator=generator).topk(WORDS).indices.sort(dim=1).values)
    own.weight.copy_(torch.randn(COUNT, WORDS, generator=generator))
    return own


def spread(own: Profiles, weight: torch.Tensor) -> torch.Tensor:
    """As rows over all words [C, V']."""
    return torch.zeros(COUNT, VOCABULARY).scatter(1, own.index.to(torch.int64), weight)


def test_sums_and_gradient_are_those_of_a_dense_layer():
    own = random_profiles()
    words = torch.randn(7, VOCABULARY + 3)[:, 3:]  # strided, as the classifier has them
    weight = own.weight.clone().requires_grad_()
    z = words @ spread(own, weight).T
    torch.testing.assert_close(own(words), z.detach(), rtol=1e-4, atol=1e-5)
    outer = torch.randn(7, COUNT)
    z.backward(outer)
    torch.testing.assert_close(own.gradient(words, outer), weight.grad, rtol=1e-4, atol=1e-5)


def test_a_step_is_torch_s_sgd():
    own = random_profiles()
    own.prepare_training(0.9)
    weight = own.weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.3, momentum=0.9)
    for seed in range(3):
        gradient = torch.randn(COUNT, WORDS, generator=torch.Generator().manual_seed(seed))
        weight.grad = gradient.clone()
        optimizer.step()
        own.step(gradient, 0.3, 0.9)
    torch.testing.assert_close(own.weight, weight.detach())


def test_which_heads_have_profiles():
    head = Head(fan_in=30, lexical=8, profiles=64)
    assert profile_count(head, 18_944) == 296
    assert profile_count(head, 63) == 0
    assert profile_count(head, 10**8) == profiles.MOST
    for change in ({"profiles": 0}, {"lexical": 0}, {"group": 16}, {"kind": "dense"}):
        assert profile_count(dataclasses.replace(head, **change), 18_944) == 0
    frequency = np.array([70, 3, 200, 64, 63, 90])
    assert choose_profiled(frequency, 6, 64).tolist() == [2, 5, 0, 3]
    assert choose_profiled(frequency, 2, 64).tolist() == [2, 5]
    assert not len(choose_profiled(frequency, 6, 300))
    with pytest.raises(InputError, match=r"head\.profiles: 64 is above the 40 tokens of the encoder; lower it"):
        Lexical(40, 2, 64)


# end to end ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a start from data in which a fifth of the labels have profiles."""
    monkeypatch.setattr(profiles, "EVERY", LABELS // COUNT)
    config = prepare(tmp_path)
    about = tmp_path / "data" / "tokens" / "tokens.json"
    write_json(about, read_json(about) | {"vocabulary": VOCABULARY})
    config.head = Head(fan_in=9, lexical=3, intermediate=48, profiles=WORDS)
    config.start.source = "data"
    config.clusters.meta_labels = 8
    check(config)
    data = tmp_path / "data"
    build_clusters(config, data / "tokens", data / "embeddings", data / "clusters")
    build_start(config, data / "tokens", data / "embeddings", data / "clusters", data / "start")
    return tmp_path, config


def started(project) -> Classifier:
    folder, config = project
    classifier = Classifier.build(config, LABELS)
    classifier.load_start(folder / "data" / "start" / "head.safetensors")
    return classifier


def test_the_most_frequent_labels_start_with_the_heaviest_words_of_their_documents_and_texts(project):
    folder, config = project
    classifier = started(project)
    tokens = TokenSet.open(folder / "data" / "tokens" / "train.arrow")
    held_out = np.load(folder / "data" / "embeddings" / "validation_documents.npy")
    rows = np.setdiff1d(np.arange(DOCUMENTS), held_out)
    frequency = tokens.label_frequency(rows, LABELS)
    chosen = np.argsort(-frequency, kind="stable")[:COUNT]
    texts = TokenSet.open(folder / "data" / "tokens" / "labels.arrow")
    words = LabelWords(tokens, rows, LABELS, VOCABULARY, texts=texts, text_share=config.start.label_texts)
    own, head = classifier.lexical.profiles, classifier.head
    assert (head.inner, head.learnt, head.width) == (48, 48 + COUNT, 48 + COUNT + VOCABULARY)

    index, weight = words.of(chosen, WORDS)
    assert torch.equal(own.index.to(torch.int64), index)
    torch.testing.assert_close(own.weight, LIFT["bce"] / NORM * weight)
    read, beside = words.of(np.arange(LABELS), 3)
    for label in range(LABELS):
        indices, weights = head.index[label, 6:].to(torch.int64), head.weight[label, 6:]
        assert (indices.diff() > 0).all()
        if label in chosen:
            assert indices[0] == 48 + int(np.flatnonzero(chosen == label)[0])
            assert weights.tolist() == [1, 0, 0]
            heaviest = set(read[label, beside[label].topk(2).indices].tolist())
            assert set((indices[1:] - 48 - COUNT).tolist()) == heaviest
        else:
            assert torch.equal(indices, read[label] + 48 + COUNT)
            torch.testing.assert_close(weights, LIFT["bce"] / NORM * beside[label])


def test_labels_with_fewer_documents_than_a_profile_has_words_have_none(project):
    folder, config = project
    data = folder / "data"
    tokens, held_out = TokenSet.open(data / "tokens" / "train.arrow"), np.load(data / "embeddings" / "validation_documents.npy")
    frequency = tokens.label_frequency(np.setdiff1d(np.arange(DOCUMENTS), held_out), LABELS)
    words = int(np.sort(frequency)[-2])
    some = int((frequency >= words).sum())
    assert 2 <= some < COUNT
    config.head = dataclasses.replace(config.head, profiles=words)
    build_start(config, data / "tokens", data / "embeddings", data / "clusters", data / "start")
    classifier = started(project)
    assert len(classifier.lexical.profiles) == COUNT
    assert classifier.lexical.profiles.weight[:some].any(dim=1).all()
    assert not classifier.lexical.profiles.weight[some:].any()
    read = classifier.head.index[:, 6:].to(torch.int64) - 48
    assert sorted(read[read < COUNT].tolist()) == list(range(some))
    assert train_in(folder, config, "few")["profiles"] == some


def test_a_profile_s_label_scores_the_sum_of_its_words(project):
    """Before training a logit is the encoder's part and the cosine with the longer centroid, lifted."""
    folder, _ = project
    classifier = started(project)
    tokens = TokenSet.open(folder / "data" / "tokens" / "train.arrow")
    own, head = classifier.lexical.profiles, classifier.head
    ids = torch.from_numpy(tokens.ids(np.array([3]))[0].astype(np.int64))[None]
    x = classifier.features(ids, torch.ones_like(ids))
    words = x[:, 48 + COUNT :]
    torch.testing.assert_close(x[:, 48 : 48 + COUNT], words @ spread(own, own.weight).T, rtol=1e-4, atol=1e-5)
    z = (x[:, head.index.to(torch.int64)] * head.weight).sum(2) + head.bias
    torch.testing.assert_close(head.logits(x, 0, LABELS), z, rtol=1e-4, atol=1e-4)


def test_training_stops_and_goes_on_with_profiles(project):
    folder, config = project
    before = started(project).lexical.profiles.weight.clone()
    summary = train_in(folder, config, "whole")
    assert summary["profiles"] == COUNT
    train_in_two_goes(folder, config, "parts")
    assert_same_run(folder, "whole", "parts")

    trained = Classifier.load(folder / "whole" / "models")
    assert trained.lexical.profiles.momentum is None
    moved = (trained.lexical.profiles.weight - before).abs()
    assert (moved.amax(dim=1) > 1e-3).all()
    assert torch.equal(trained.lexical.profiles.index, started(project).lexical.profiles.index)


def test_refitting_follows_the_loss_s_gradient(project):
    """One step of refitting moves profiles as autograd and SGD would, through the head's logits and the mean loss."""
    folder, config = project
    classifier = started(project)
    config.train.batch, config.train.warmup, config.train.momentum, config.train.head_lr = len(ROWS), 0, 0.0, 0.1
    classifier.prepare_training()
    tokens = TokenSet.open(folder / "data" / "tokens" / "train.arrow")
    embeddings = np.random.default_rng(2).normal(size=(len(ROWS), classifier.encoder.width)).astype(np.float16)
    own, head = classifier.lexical.profiles, classifier.head
    longest = max(map(len, tokens.ids(ROWS)))
    ids = torch.zeros(len(ROWS), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(tokens.ids(ROWS)):
        ids[row, : len(document)], mask[row, : len(document)] = torch.from_numpy(document.astype(np.int64)), 1
    x = classifier.join(classifier.project(torch.from_numpy(embeddings).float()), ids, mask)
    weight = own.weight.clone().requires_grad_()
    sums = x[:, 48 + COUNT :] @ spread(own, weight).T
    x = torch.cat([x[:, :48], sums, x[:, 48 + COUNT :]], 1)
    z = (x[:, head.index.to(torch.int64)] * head.weight.clone()).sum(2) + head.bias.clone()
    y = torch.zeros_like(z)
    for row, labels in enumerate(tokens.labels(ROWS)):
        y[row, torch.from_numpy(np.asarray(labels, dtype=np.int64))] = 1
    loss = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="sum") / len(ROWS)
    loss.backward()
    expected = (weight - 0.1 * weight.grad).detach()
    config.rewiring.exchange = 0.0
    assert refit(classifier, tokens, ROWS, embeddings, 1) == {"refitted": 1, "exchanged": 0}
    assert not torch.equal(own.weight, weight)
    torch.testing.assert_close(own.weight, expected, rtol=1e-4, atol=1e-6)


def test_bytes_are_counted_with_the_head_s(project):
    _, config = project
    classifier = started(project)
    classifier.prepare_training()
    assert lexical_sizes(config.head, VOCABULARY, 48, LABELS) == (COUNT, VOCABULARY)
    found = head_bytes(config.head, LABELS, classifier.head.width, momentum=True, profiles=COUNT)
    assert found == classifier.head_bytes()
    assert found["weights"] == 4 * (9 * LABELS + WORDS * COUNT)
    assert found["indices"] == 2 * (9 * LABELS + WORDS * COUNT)


@pytest.mark.parametrize("change", [{"profiles": 0}, {"profiles": WORDS - 1}])
def test_a_start_with_other_profiles_is_refused(project, change):
    folder, config = project
    other = dataclasses.replace(config, head=dataclasses.replace(config.head, **change))
    data = folder / "data"
    build_start(other, data / "tokens", data / "embeddings", data / "clusters", folder / "other")
    with pytest.raises(InputError, match=r"its words do not agree with head\.lexical and head\.profiles"):
        Classifier.build(config, LABELS).load_start(folder / "other" / "head.safetensors")
