"""The heads on a CUDA device against the same heads on the CPU. Imports no more of the project than the heads need."""

from __future__ import annotations

import copy

import pytest
import torch

from fanin.heads import Bottleneck, Dense, FixedFanIn
from fanin.objectives import Positives
from fanin.rewiring import Schedule

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
LABELS, WIDTH, BATCH = 5000, 300, 9


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("kind", ["dense", "bottleneck", "fan_in", "grouped"])
def test_steps_topk_and_rewiring_as_on_the_cpu(kind, loss):
    build = {
        "dense": lambda: Dense(LABELS, WIDTH, loss),
        "bottleneck": lambda: Bottleneck(LABELS, WIDTH, 32, loss),
        "fan_in": lambda: FixedFanIn(LABELS, WIDTH, 17, 1, loss),
        "grouped": lambda: FixedFanIn(LABELS, WIDTH, 24, 16, loss),
    }
    here = build[kind]().double()
    there = copy.deepcopy(here).cuda()
    labels = torch.tensor([0, 7, 7, 4999])
    positives = Positives(labels, torch.tensor([1, 0, 8, 2]))
    for head in (here, there):
        head.prepare_training(0.9)
    for _ in range(4):
        x = torch.randn(BATCH, WIDTH, dtype=torch.float64)
        dx, loss_here = here.step(x, positives, lr=0.05, momentum=0.9, weight_decay=1e-3, want_loss=True)
        dx_there, loss_there = there.step(
            x.cuda(), positives.to("cuda"), lr=0.05, momentum=0.9, weight_decay=1e-3, want_loss=True
        )
        torch.testing.assert_close(dx_there.cpu(), dx)
        torch.testing.assert_close(loss_there.cpu(), loss_here)
    torch.testing.assert_close(there.weight.cpu(), here.weight)
    scores, rows = here.topk(x, 10)
    scores_there, rows_there = there.topk(x.cuda(), 10)
    torch.testing.assert_close(scores_there.cpu(), scores)
    assert torch.equal(rows_there.cpu(), rows)
    if isinstance(there, FixedFanIn):
        schedule = Schedule(method="rigl", prune="fraction", amount=0.3, interval=1, end_step=100)
        there.rewire(schedule, 1, torch.Generator("cuda").manual_seed(0), x.cuda(), positives.to("cuda"))
        index = there.index.long()
        assert (index[:, 1:] > index[:, :-1]).all()
