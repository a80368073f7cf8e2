"""Exchange: both sides are weighed as the loss's derivatives say, and only what should change does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fanin import exchange as module
from fanin.data.batches import collate
from fanin.data.tokens import TokenSet
from fanin.exchange import DAMPING, exchange
from fanin.heads import FixedFanIn
from fanin.kernels.layer import decode, raw
from fanin.memory.plan import exchange_buffers
from fanin.model import Classifier
from fanin.rewiring import check_index
from test_memory import Live
from training_folder import DOCUMENTS, LABELS, prepare

ROWS = np.arange(0, DOCUMENTS, 2)
INNER, FAN_IN, WORDS = 48, 12, 3


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exchange")
    return prepare(folder), TokenSet.open(folder / "data/tokens/train.arrow")


@pytest.fixture
def embeddings(project):
    width = Classifier.build(project[0], LABELS, np.arange(LABELS)).encoder.width
    return np.random.default_rng(0).normal(size=(len(ROWS), width)).astype(np.float16)


def build(project, kind="fixed_fan_in", group=1, loss="bce", dtype="fp32", lexical=WORDS, intermediate=INNER) -> Classifier:
    """Labels in an order of their own; a momentum everywhere; weights and biases as training might leave them."""
    config, _ = project
    head = config.head
    head.kind, head.group, head.loss, head.dtype, head.lexical = kind, group, loss, dtype, lexical
    head.rounding, head.intermediate, head.fan_in, head.bottleneck = "kahan", intermediate, FAN_IN, 8
    torch.manual_seed(0)
    classifier = Classifier.build(config, LABELS, np.random.default_rng(0).permutation(LABELS))
    classifier.prepare_training()
    if classifier.lexical is not None:
        classifier.lexical.idf.fill_(1.0)
    for _, part in classifier.head.parts():
        part.bias.uniform_(-3, -1)
        for name in ("momentum", "compensation"):
            if getattr(part, name, None) is not None:
                getattr(part, name).fill_(0.5)
    return classifier


def by_autograd(classifier, tokens, embeddings, first=0):
    """Gradient and diagonal curvature [L, D'] of the loss over all documents, in float64, by a dense layer of the same logits;
    each label's documents."""
    part = dict(classifier.head.parts())[first]
    ids, mask = collate(tokens.ids(ROWS), classifier.tokenizer.pad_token_id or 0)
    features = classifier.project(torch.from_numpy(embeddings.astype(np.float32))).to(torch.bfloat16).float()
    x = classifier.join(features, ids, mask).double()
    index = part.index.to(torch.int64).repeat_interleave(part.group, 0)[: part.labels]
    dense = torch.zeros(part.labels, x.shape[1], dtype=torch.float64).scatter_(1, index, decode(part.weight).double())
    dense.requires_grad_(True)
    y = torch.zeros(len(x), LABELS, dtype=torch.float64)
    for row, own in enumerate(tokens.labels(ROWS)):
        y[row, own if classifier.label_rows is None else classifier.label_rows[own]] = 1
    y = y[:, first : first + part.labels]
    z = x @ dense.T + part.bias.double()
    z.retain_grad()
    if part.loss == "bce":
        F.binary_cross_entropy_with_logits(z, y, reduction="sum").backward()
        at = z.detach()
        wrong = (at > 0) != (y > 0)  # there the parabola through the loss's two points of this height, at z and -z
        bend = torch.where(wrong, (at.abs() / 2).tanh() / (2 * at.abs()), at.sigmoid() * (1 - at.sigmoid()))
    else:
        short = (1 - (2 * y - 1) * z).clamp_min(0)
        short.square().sum().backward()
        bend = 2 * (short.detach() > 0).double()
    inner = classifier.head.inner
    return dense.grad[:, :inner], bend.T @ x[:, :inner].square(), y.sum(0)


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize(("slight", "bound"), [(0.0, 1e-5), (0.1, 0.2)])
def test_sums_are_the_derivatives_of_the_loss(project, embeddings, monkeypatch, loss, slight, bound):
    """Exactly, or nearly where slight slopes count with the average document."""
    monkeypatch.setattr(module, "SLIGHT", slight)
    classifier, (_, tokens) = build(project, loss=loss), project
    features, labels = module._features(classifier, embeddings), torch.arange(3, LABELS)
    slopes = module._slopes(classifier, classifier.head, 0, labels, features, tokens, ROWS)
    assert (len(slopes.labels) == len(labels) * len(ROWS)) == (slight == 0)
    found, exact = module._sums(features, slopes, 0, len(labels)), by_autograd(classifier, tokens, embeddings)
    for own, true in zip(found, exact, strict=False):
        assert 0 <= (own.double() - true[labels]).norm() / true[labels].norm() < bound
    again = module._sums(features, slopes, 10, 20)
    for own, whole in zip(again, found, strict=True):
        torch.testing.assert_close(own, whole[10:20])


HEADS = [("fixed_fan_in", 1, "bce", "fp32"), ("fixed_fan_in", 1, "squared_hinge", "bf16"), ("fixed_fan_in", 8, "bce", "fp32")]
HEADS += [("fixed_fan_in", 7, "bce", "fp8"), ("head_tail", 1, "bce", "bf16")]


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_what_serves_least_goes_for_what_serves_most(project, embeddings, monkeypatch, head):
    """Held to a plain loop over rows, with derivatives by autograd; nothing else changes."""
    monkeypatch.setattr(module, "SLIGHT", 0.0)
    monkeypatch.setattr(module, "LEAST", 4)
    monkeypatch.setattr(module, "_ROWS", 16)
    monkeypatch.setattr(module, "_LABELS", 32)
    classifier, (_, tokens) = build(project, *head), project
    first, part = classifier.head.parts()[-1]
    assert isinstance(part, FixedFanIn)
    gradient, curvature, frequency = by_autograd(classifier, tokens, embeddings, first)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    index, weight = part.index.to(torch.int64).clone(), decode(part.weight).double()
    found = exchange(classifier, tokens, ROWS, embeddings, 0.25)

    inner, count = FAN_IN - WORDS, round(0.25 * (FAN_IN - WORDS))
    moved = looked = 0
    for row, old in enumerate(index):
        own = slice(row * part.group, min((row + 1) * part.group, part.labels))
        new, members = part.index[row].to(torch.int64), range(own.start, own.stop)
        assert (new[:inner].diff() > 0).all()
        assert torch.equal(new[inner:], old[inner:])
        if frequency[own].sum() < 4 * part.group:
            assert torch.equal(new, old)
            assert torch.equal(decode(part.weight[own]).double(), weight[own])
            continue
        looked += len(members)
        costs = {int(f): float((weight[own, k] ** 2 * curvature[own, f]).sum()) for k, f in enumerate(old[:inner])}
        gains = {f: float((gradient[own, f] ** 2 / curvature[own, f]).sum()) for f in range(INNER) if f not in costs}
        cheapest, best = sorted(costs, key=costs.get)[:count], sorted(gains, key=gains.get)[: -count - 1 : -1]
        pairs = [(out, into) for out, into in zip(cheapest, best, strict=True) if gains[into] > costs[out]]
        outs, intos = {out for out, _ in pairs}, {into for _, into in pairs}
        assert set(new[:inner].tolist()) == set(costs) - outs | intos
        moved += len(pairs)
        for label in members:
            for k, f in enumerate(new.tolist()):
                was = weight[label, (old == f).nonzero()[0, 0]] if f not in intos or k >= inner else None
                step = -DAMPING * gradient[label, f] / curvature[label, f] if was is None else None
                near = {4: 1e-3, 2: 5e-3, 1: 0.07}[part.weight.itemsize]
                wanted = float(was if was is not None else step)
                assert float(decode(part.weight[label, k])) == pytest.approx(wanted, rel=near, abs=2e-3)
                for state in (part.momentum, part.compensation):
                    assert state is None or float(state[label, k]) == (0.5 if was is not None else 0.0)
    assert found == moved
    assert moved > (5 if part.group == 1 else 2)
    assert 0 < looked < part.labels
    check_index(part.index, part.width)
    after = classifier.state_dict()
    changed = {name.rpartition(".")[2] for name, value in before.items() if not torch.equal(raw(value), raw(after[name]))}
    assert changed == {"weight", "index", "momentum"} | ({"compensation"} if part.compensation is not None else set())


@pytest.mark.parametrize("group", [1, 8])
def test_it_takes_no_more_than_was_planned(project, embeddings, monkeypatch, group):
    """All pairs are told here, 60 of each document."""
    monkeypatch.setattr(module, "SLIGHT", 0.0)
    monkeypatch.setattr(module, "LEAST", 1)
    classifier, (_, tokens) = build(project, group=group), project
    head = classifier.head
    planned = exchange_buffers(project[0].head, LABELS, INNER, len(ROWS), head.width - INNER)
    live = Live(*classifier.parameters(), *classifier.buffers())
    before = live.now
    with live:
        exchange(classifier, tokens, ROWS, embeddings, 0.25)
    assert 0.4 * planned < live.peak - before < 1.1 * planned


def test_labels_find_the_features_that_decide(project, embeddings, monkeypatch):
    """Each feature is made to tell of one label, which does not read it."""
    monkeypatch.setattr(module, "LEAST", 4)
    classifier, (_, tokens) = build(project, intermediate=0, lexical=0), project
    part, told = classifier.head, []
    frequency = tokens.label_frequency(ROWS, LABELS)
    for label, feature in zip(np.argsort(-frequency)[:20], range(20), strict=True):
        if frequency[label] >= 4 and feature not in part.index[label].tolist():
            told.append((label, feature))
            embeddings[:, feature] = [4.0 * (label in own) for own in tokens.labels(ROWS)]
    assert len(told) > 5
    assert exchange(classifier, tokens, ROWS, embeddings, 0.25) >= len(told)
    for label, feature in told:
        assert float(part.weight[label, (part.index[label].to(torch.int64) == feature).nonzero()[0, 0]]) > 0.1


@pytest.mark.parametrize("kind", ["dense", "bottleneck"])
def test_heads_that_choose_no_features_stay(project, embeddings, kind):
    classifier = build(project, kind, lexical=0)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    assert exchange(classifier, project[1], ROWS, embeddings, 0.25) == 0
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 8])
def test_on_a_gpu_as_on_a_cpu(project, embeddings, monkeypatch, group):
    monkeypatch.setattr(module, "LEAST", 4)
    here, there = build(project, group=group), build(project, group=group).to("cuda")
    found = [exchange(classifier, project[1], ROWS, embeddings, 0.25) for classifier in (here, there)]
    assert min(found) > 0
    assert (there.head.index.cpu() == here.head.index).float().mean() > 0.98  # near ties may fall otherwise
    check_index(there.head.index, there.head.width)
    same = (there.head.index.cpu() == here.head.index).repeat_interleave(group, 0)[: here.head.labels]
    torch.testing.assert_close(there.head.weight.cpu()[same], here.head.weight[same], rtol=1e-2, atol=1e-3)
