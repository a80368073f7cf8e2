"""Losses against torch's, the auxiliary objective, schedules and optimiser groups."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fanin.kernels.reference import logit_gradient_, tile_ranges
from fanin.objectives import AuxiliaryObjective, Positives
from fanin.optim import adamw, set_learning_rate, warmup_cosine


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
def test_gradient_and_value_against_autograd(loss):
    z = (3 * torch.randn(7, 5, dtype=torch.float64)).requires_grad_()
    y = torch.zeros(7, 5, dtype=torch.float64)
    rows, columns = torch.tensor([0, 2, 2, 6]), torch.tensor([1, 0, 4, 4])
    y[rows, columns] = 1
    if loss == "bce":
        value = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    else:
        value = (1 - (2 * y - 1) * z).clamp(min=0).square().sum()
    value.backward()
    found = z.detach().clone()
    torch.testing.assert_close(logit_gradient_(found, rows, columns, loss, True), value.detach())
    torch.testing.assert_close(found, z.grad)
    assert logit_gradient_(found, rows, columns, loss, False) is None
    with pytest.raises(ValueError, match="'mse' is not one of bce, squared_hinge"):
        logit_gradient_(found, rows, columns, "mse", False)


def test_extreme_logits_stay_finite():
    z = torch.tensor([[200.0, -200.0]])
    value = logit_gradient_(z, torch.tensor([0]), torch.tensor([1]), "bce", True)
    assert value.item() == pytest.approx(400)
    assert z.tolist() == [[1.0, -1.0]]


def test_ranges_of_tiles():
    assert tile_ranges(torch.tensor([0, 0, 3, 4, 9]), 10, 4).tolist() == [0, 3, 4, 5]
    assert tile_ranges(torch.empty(0, dtype=torch.int64), 10, 5).tolist() == [0, 0, 0]


def test_auxiliary_objective_predicts_the_clusters_of_a_documents_labels():
    meta = torch.tensor([0, 0, 1, 2])
    branch = AuxiliaryObjective(6, meta, 0.4, 100)
    nn.init.normal_(branch.layer.weight)
    x = torch.randn(3, 6)
    positives = Positives(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 2]))
    target = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1]])
    expected = F.binary_cross_entropy_with_logits(branch.layer(x), target, reduction="sum")
    torch.testing.assert_close(branch(x, positives), expected)


def test_lambda_falls_on_a_cosine_to_the_cut_off():
    branch = AuxiliaryObjective(6, torch.tensor([0, 1]), 0.4, 100)
    assert [branch.coefficient(s) for s in (0, 50, 100, 200)] == pytest.approx([0.4, 0.2, 0.0, 0.0])


def test_warmup_then_cosine():
    factors = [warmup_cosine(step, 4, 12) for step in range(13)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[4] == 1.0
    assert factors[8] == pytest.approx(0.5)
    assert factors[12] == 0.0
    assert factors[4:] == sorted(factors[4:], reverse=True)


def test_optimiser_groups():
    one, two = nn.Linear(3, 2), nn.LayerNorm(2)
    optimizer = adamw([(one, 0.1), (None, 1.0), (two, 0.2)], 0.01)
    held = [(g["lr"], g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups]
    assert held == [(0.1, 0.01, [2]), (0.1, 0.0, [1]), (0.2, 0.0, [1, 1])]
    set_learning_rate(optimizer, 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05, 0.1]
