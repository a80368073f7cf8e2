"""The split head: dense rows for frequent labels, a fixed fan-in for the others; against autograd, and its state."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from fanin.config import Config, check
from fanin.config import Head as HeadSettings
from fanin.files import InputError
from fanin.heads import HeadTail, build_head, sparse_part
from fanin.kernels.reference import expand
from fanin.model import Classifier
from fanin.objectives import Positives
from fanin.rewiring import Schedule
from training_folder import prepare, train_in

LABELS, CUT, INNER, WORDS, FAN_IN, LEXICAL, BATCH = 300, 13, 24, 16, 9, 3, 6
WIDTH = INNER + WORDS


def split(loss: str = "bce", **changes) -> HeadTail:
    generator = torch.Generator().manual_seed(0)
    return HeadTail(LABELS, WIDTH, CUT, FAN_IN, loss, generator, lexical=LEXICAL, vocabulary=WORDS, **changes)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, Positives]:
    """x, y [B, L] and the same as positives: both ends, both sides of the cut, and a document without a label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)
    y = (torch.rand(BATCH, LABELS, generator=generator) < 0.02).double()
    y[0, 0] = y[1, CUT - 1] = y[1, CUT] = y[3, LABELS - 1] = 1
    y[2] = 0
    return x, y, Positives(*y.t().nonzero(as_tuple=True))


def plain(head: HeadTail, x: torch.Tensor, dense: torch.Tensor, sparse: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The same logits with dense arithmetic."""
    rows = expand(head.tail.index, LABELS - CUT, 1)
    wide = torch.zeros(LABELS - CUT, WIDTH, dtype=x.dtype).scatter(1, rows, sparse)
    return torch.cat([x[:, :INNER] @ dense.t(), x @ wide.t()], 1) + bias


def parameters_of(head: HeadTail) -> list[torch.Tensor]:
    biases = torch.cat([head.frequent.bias, head.tail.bias])
    return [tensor.clone().requires_grad_() for tensor in (head.frequent.weight, head.tail.weight, biases)]


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_five_steps_equal_autograd_and_sgd(loss):
    """Dense rows at K / D' of the rate, by the features of the encoder's that either kind reads."""
    head = split(loss).double()
    head.prepare_training(0.9)
    dense, sparse, bias = parameters_of(head)
    slower = (FAN_IN - LEXICAL) / INNER
    rates = torch.cat([torch.full((CUT,), slower), torch.ones(LABELS - CUT)]).double()
    momenta = [torch.zeros_like(tensor) for tensor in (dense, sparse, bias)]
    for seed in range(5):
        x, y, positives = batch(seed)
        leaf = x.clone().requires_grad_()
        z = plain(head, leaf, dense, sparse, bias)
        value = (
            F.binary_cross_entropy_with_logits(z, y, reduction="sum")
            if loss == "bce"
            else (1 - z * (2 * y - 1)).clamp(min=0).square().sum()
        )
        gradients = torch.autograd.grad(value, [dense, sparse, bias, leaf])
        with torch.no_grad():
            for tensor, momentum, gradient, rate in zip(
                (dense, sparse, bias), momenta, gradients, (slower, 1.0, rates), strict=False
            ):
                decay = 0.0 if tensor is bias else 0.01
                momentum.mul_(0.9).add_(gradient + decay * tensor)
                tensor -= 0.02 * rate * momentum
        dx, found = head.step(x, positives, lr=0.02, momentum=0.9, weight_decay=0.01, want_loss=True)
        torch.testing.assert_close(dx, gradients[3][:, :INNER])
        torch.testing.assert_close(found, value.detach())
    for held, expected in zip(parameters_of(head), (dense, sparse, bias), strict=True):
        torch.testing.assert_close(held, expected)


def test_topk_and_logits_cross_the_cut():
    head = split().double()
    x, _, _ = batch(0)
    every = plain(head, x, *(tensor.detach() for tensor in parameters_of(head)))
    torch.testing.assert_close(head.logits(x, 0, LABELS), every)
    for start, stop in ((0, CUT), (CUT, LABELS), (CUT - 3, CUT + 4), (2, 5), (40, 50)):
        torch.testing.assert_close(head.logits(x, start, stop), every[:, start:stop])
    for k in (1, 5, CUT + 1, LABELS):
        scores, rows = head.topk(x, k)
        torch.testing.assert_close(scores, every.topk(k, dim=1).values)
        torch.testing.assert_close(every.gather(1, rows), scores)
        assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_rewiring_moves_the_tail_alone(method):
    head = split()
    head.prepare_training(0.9)
    x, _, positives = batch(0)
    dense, words = head.frequent.weight.clone(), head.tail.index[:, -LEXICAL:].clone()
    before = head.tail.index.clone()
    schedule = Schedule(method=method, prune="fraction", amount=0.3, interval=1, end_step=10)
    moved = head.rewire(schedule, 1, 0, x.float(), positives)
    assert moved["entries"] == (LABELS - CUT) * (FAN_IN - LEXICAL)
    assert 0 < moved["moved"] <= moved["pruned"]
    assert not torch.equal(head.tail.index, before)
    assert torch.equal(head.frequent.weight, dense)
    assert torch.equal(head.tail.index[:, -LEXICAL:], words)


def test_its_state_comes_back_and_what_does_not_fit_is_refused():
    head, other = split(), split()
    head.prepare_training(0.9)
    x, _, positives = batch(0)
    head.step(x.float(), positives, lr=0.1, momentum=0.9)
    state = head.model_state()
    assert set(state) == {"frequent.weight", "frequent.bias", "tail.weight", "tail.index", "tail.bias"}
    assert {name: head.place(name) for name in state if name != "tail.index"} == {
        "frequent.weight": (0, CUT),
        "frequent.bias": (0, CUT),
        "tail.weight": (0, LABELS - CUT),
        "tail.bias": (0, LABELS - CUT),
    }
    other.load_model_state(state, "here")
    torch.testing.assert_close(other.logits(x.float(), 0, LABELS), head.logits(x.float(), 0, LABELS))
    sizes = head.bytes()
    assert sizes["weights"] == 4 * (CUT * INNER + (LABELS - CUT) * FAN_IN)
    assert sizes["bias"] == 4 * LABELS
    assert sizes["optimizer"] == sizes["weights"] + sizes["bias"]
    head.finish_training()
    assert head.bytes()["optimizer"] == 0
    wrong = copy.deepcopy(state)
    wrong["tail.index"][0] = 0
    with pytest.raises(InputError, match=r"here: .*index"):
        other.load_model_state(wrong, "here")
    wrong = copy.deepcopy(state)
    wrong["frequent.weight"][0, 0] = torch.nan
    with pytest.raises(InputError, match="NaN"):
        other.load_model_state(wrong, "here")
    with pytest.raises(FloatingPointError):
        head.step(torch.full((1, WIDTH), torch.nan), Positives(*torch.empty(2, 0, dtype=torch.int64)), lr=0.1)


def test_a_label_that_never_fires_rests_where_it_does_in_other_heads():
    plainly = build_head(HeadSettings(fan_in=8), LABELS, 40)
    head = build_head(HeadSettings(kind="head_tail", fan_in=8, dense_share=0.1), LABELS, 40)
    assert isinstance(head, HeadTail)
    assert head.frequent.labels == 30
    assert sparse_part(head) is head.tail
    for _, part in head.parts():
        assert torch.equal(part.bias, plainly.bias[: part.labels])


@pytest.mark.parametrize("share", [0.0, 1e-6, 0.5])
def test_there_is_always_a_head_and_a_tail(share):
    for labels in (2, 3, 1000):
        assert 0 < HeadSettings(kind="head_tail", dense_share=share).dense_labels(labels) < labels


def test_settings_that_cannot_work_are_named():
    config = Config()
    config.head.kind, config.head.group = "head_tail", 4
    with pytest.raises(InputError, match=r"head\.group: 4 is for head\.kind fixed_fan_in, but it is head_tail"):
        check(config)
    config.head.group, config.head.dense_share = 1, 0.7
    with pytest.raises(InputError, match=r"head\.dense_share: 0\.7 is outside 0 to 0\.5"):
        check(config)
    with pytest.raises(InputError, match=r"head\.kind: head_tail cannot share its labels over processes"):
        build_head(HeadSettings(kind="head_tail", fan_in=8), LABELS, 40, part=(0, 150))
    with pytest.raises(InputError, match=r"head\.dense_share: 300 of 300 labels"):
        HeadTail(LABELS, WIDTH, LABELS, FAN_IN)


def test_it_trains_and_its_model_speaks_of_label_ids(tmp_path):
    """Recoded, refitted, calibrated and saved; the order of its rows is in the model."""
    config = prepare(tmp_path)
    config.head.kind, config.head.dense_share = "head_tail", 0.2
    config.rewiring.recode_at, config.rewiring.refit_epochs = 0.5, 1
    summary = train_in(tmp_path, config, "split")
    assert summary["head_bytes"]["weights"] > 0
    loaded = Classifier.load(tmp_path / "split/models")
    assert isinstance(loaded.head, HeadTail)
    assert loaded.order is not None
    assert sorted(loaded.order.tolist()) == list(range(60))
    assert loaded.head.frequent.labels == 12
    ids, mask = loaded.encode(["ba de gi"])
    scores, labels = loaded.topk(ids, mask, 60)
    rows = loaded.head.logits(loaded.features(ids, mask), 0, 60)
    torch.testing.assert_close(rows[0][torch.argsort(loaded.order)][labels[0]], scores[0])
