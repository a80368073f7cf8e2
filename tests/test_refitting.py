"""Refitting: the head learns from given embeddings and from words, nothing else changes, and twice the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fanin import refitting
from fanin.data.tokens import TokenSet
from fanin.model import Classifier
from fanin.refitting import refit
from fanin.start.words import LabelWords
from training_folder import LABELS, prepare

ROWS = np.arange(0, 160, 2)
VOCABULARY = 205


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refitting")
    config = prepare(folder)
    config.train.batch, config.head.bottleneck = 8, 24
    return config, TokenSet.open(folder / "data/tokens/train.arrow"), np.random.default_rng(0).permutation(LABELS)


def build(project, kind="fixed_fan_in", group=1, lexical=0):
    config, tokens, order = project
    config.head.kind, config.head.group, config.head.lexical = kind, group, lexical
    config.train.head_lr = 0.05 if kind == "bottleneck" else 0.5  # its two factors multiply
    classifier = Classifier.build(config, LABELS, order)
    classifier.head.prepare_training(config.train.momentum)
    return classifier, tokens


@torch.no_grad()
def right(classifier, tokens, embeddings):
    """Of the documents, how many have the label that ranks first."""
    ids = [torch.from_numpy(own.astype(np.int64))[None] for own in tokens.ids(ROWS)]
    found = 0
    for own, embedding, labels in zip(ids, torch.from_numpy(embeddings).float(), tokens.labels(ROWS), strict=True):
        x = classifier.join(classifier.project(embedding[None]), own, torch.ones_like(own))
        row = classifier.head.topk(x, 1)[1]
        found += int(row if classifier.order is None else classifier.order[row]) in labels
    return found / len(ROWS)


@pytest.mark.parametrize(("kind", "group"), [("fixed_fan_in", 1), ("fixed_fan_in", 4), ("dense", 1), ("bottleneck", 1)])
def test_the_head_learns_the_embeddings_that_it_is_given(project, kind, group):
    classifier, tokens = build(project, kind, group)
    # each document near the directions of its labels: nothing that the encoder would make
    directions = np.random.default_rng(1).normal(size=(LABELS, classifier.encoder.width))
    embeddings = np.stack([directions[own].sum(0) for own in tokens.labels(ROWS)]).astype(np.float16)
    others = {k: v.clone() for k, v in classifier.state_dict().items() if not k.startswith("head.")}
    before = right(classifier, tokens, embeddings)
    found = refit(classifier, tokens, ROWS, embeddings, 30)
    assert found["refitted"] == 30 * len(ROWS) // 8
    assert (found["exchanged"] > 0) == (kind == "fixed_fan_in")
    assert before < 0.2
    assert right(classifier, tokens, embeddings) > 0.8
    for name, tensor in others.items():
        assert torch.equal(classifier.state_dict()[name], tensor), name


def test_the_head_learns_words(project):
    """Embeddings that are all the same leave only words to tell documents apart."""
    classifier, tokens = build(project, lexical=3)
    words = LabelWords(tokens, ROWS, LABELS, classifier.lexical.width)
    classifier.lexical.idf.copy_(torch.from_numpy(words.idf))
    index, _ = words.of(np.arange(LABELS), 3)
    classifier.head.index[:, classifier.head.inner_fan_in :] = (index + classifier.head.inner).to(classifier.head.index.dtype)
    embeddings = np.ones((len(ROWS), classifier.encoder.width), np.float16)
    assert right(classifier, tokens, embeddings) < 0.2
    refit(classifier, tokens, ROWS, embeddings, 20)
    assert right(classifier, tokens, embeddings) > 0.6


def test_a_warm_up_takes_a_tenth_of_its_steps_at_most(project, monkeypatch):
    classifier, tokens = build(project)
    monkeypatch.setattr(classifier.config.train, "warmup", 50)
    asked = []
    monkeypatch.setattr(refitting, "warmup_cosine", lambda *given: asked.append(given) or 1.0)
    embeddings = np.ones((len(ROWS), classifier.encoder.width), np.float16)
    for epochs in (1, 3, 60):
        refit(classifier, tokens, ROWS, embeddings, epochs)
    assert asked[:10] == [(step, 1, 10) for step in range(10)]
    assert asked[10] == (0, 3, 30)
    assert asked[40] == (0, 50, 600)


def test_it_repeats_bit_for_bit_and_no_epoch_is_no_change(project):
    embeddings = np.random.default_rng(2).normal(size=(len(ROWS), 32)).astype(np.float16)
    found = []
    for epochs in (0, 2, 2):
        classifier, tokens = build(project)
        untouched = {k: v.clone() for k, v in classifier.state_dict().items()}
        refit(classifier, tokens, ROWS, embeddings[:, : classifier.encoder.width], epochs)
        found.append(classifier.state_dict())
        changed = [k for k, v in untouched.items() if not torch.equal(found[-1][k], v)]
        assert bool(changed) == bool(epochs)
    for name, tensor in found[1].items():
        assert torch.equal(found[2][name], tensor), name
