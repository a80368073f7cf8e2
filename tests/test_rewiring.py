"""Rewiring as pure functions. What it does to a whole head: test_heads.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fanin.rewiring import Schedule, global_threshold, magnitude, pruned_mask, regrow


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 6), width=st.integers(1, 30), data=st.data())
def test_regrow_keeps_rows_distinct_and_counts(rows, width, data):
    fan_in = data.draw(st.integers(1, width))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    index = torch.rand(rows, width, generator=generator).topk(fan_in, dim=1).indices
    mask = torch.rand(rows, fan_in, generator=generator) < 0.5
    score = torch.rand(rows, width, generator=generator)
    new = regrow(index.to(torch.int16), mask, score.clone())
    assert new.shape == index.shape
    assert torch.equal(new[~mask], index[~mask])
    for row in range(rows):
        assert len(set(new[row].tolist())) == fan_in
        free = [f for f in range(width) if f not in index[row].tolist()]
        best = sorted(free, key=lambda f: -score[row, f].item())[: int(mask[row].sum())]
        assert set(best) <= set(new[row].tolist())


def test_prune_by_fraction_takes_the_smallest_of_each_row():
    size = torch.tensor([[3.0, 1.0, 2.0, 4.0], [0.1, 0.4, 0.3, 0.2]])
    assert pruned_mask(size, "fraction", 0.5).tolist() == [[False, True, True, False], [True, False, False, True]]
    assert not pruned_mask(size, "fraction", 0.2).any()
    assert pruned_mask(size, "fraction", 0.999).sum(1).tolist() == [3, 3]


def test_prune_by_threshold_leaves_one_a_row():
    size = torch.tensor([[3.0, 1.0], [0.1, 0.4]])
    assert pruned_mask(size, "threshold", 2.0).tolist() == [[False, True], [True, False]]
    assert not pruned_mask(size, "threshold", 0.0).any()


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.9])
def test_global_threshold_is_the_quantile(fraction):
    values = torch.randn(40, 500, generator=torch.Generator().manual_seed(0)).abs()
    found = global_threshold(lambda: iter(values.split(7)), values.numel(), fraction)
    assert (values <= found).double().mean().item() == pytest.approx(fraction, abs=2e-3)
    assert global_threshold(lambda: iter([torch.zeros(3)]), 3, fraction) == 0.0


@pytest.mark.parametrize(("fraction", "pruned"), [(0.1, 0.0), (0.15, 0.25), (0.3, 0.25), (0.4, 0.5), (0.9, 1.0)])
def test_equal_magnitudes_are_pruned_together_or_not_at_all(fraction, pruned):
    values = torch.tensor([0.25, 0.3, 0.5, 1.0]).repeat(20)
    amount = global_threshold(lambda: iter(values.split(7)), values.numel(), fraction)
    assert (values <= amount).double().mean().item() == pruned
    same = torch.full((4, 20), 0.3)
    assert (same <= global_threshold(lambda: iter([same]), 80, fraction)).double().mean().item() == round(fraction)


def test_a_group_is_judged_by_its_root_mean_square():
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0], [1.0, 2.0]])  # groups of two: rows 0-1, row 2 alone
    expected = torch.tensor([[12.5**0.5, 0.0], [1.0, 2.0]])
    torch.testing.assert_close(magnitude(weight, 2), expected)


def test_schedule():
    schedule = Schedule(method="set", prune="fraction", amount=0.4, interval=10, end_step=30)
    assert [step for step in range(60) if step and schedule.due(step)] == [10, 20]
    assert schedule.amount_at(0) == pytest.approx(0.4)
    assert schedule.amount_at(15) == pytest.approx(0.2)
    assert schedule.amount_at(30) == schedule.amount_at(99) == pytest.approx(0.0)
    static = Schedule(method="none", prune="fraction", amount=0.4, interval=10, end_step=30)
    assert not any(static.due(step) for step in range(100))
