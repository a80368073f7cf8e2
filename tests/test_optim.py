"""Documents that outweigh their batch, and AdamW with bfloat16 moments: beside torch's own, unbiased, resumable bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fanin import optim
from fanin.optim import AdamWBf16, adamw, limit_outliers


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 24), nn.LayerNorm(24))


def run(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = 0.01 * torch.randn(parameter.shape, generator=generator) + 0.004
        optimizer.step()


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def rows(*lengths: float) -> Tensor:
    """Rows [n, 8] of these lengths in random directions."""
    directions = torch.randn(len(lengths), 8, generator=torch.Generator().manual_seed(0))
    return nn.functional.normalize(directions, dim=1) * torch.tensor(lengths)[:, None]


def test_one_document_does_not_outweigh_its_batch() -> None:
    before = rows(1, 2, 400, 1, 0, 3, 0.1)  # without the one of no gradient the median is 1
    after = before.clone()
    limit_outliers(after, before.norm(dim=1), before.norm(dim=1))
    assert torch.equal(after[[0, 1, 3, 4, 6]], before[[0, 1, 3, 4, 6]])
    assert after.norm(dim=1)[[2, 5]].tolist() == pytest.approx([3, 3], rel=1e-5)
    assert nn.functional.cosine_similarity(after[2], before[2], dim=0) == pytest.approx(1)


def test_all_ranks_documents_make_the_median() -> None:
    whole, own = rows(1, 1, 1, 10, 20), rows(1, 1, 1, 10, 20)[3:]
    norms = whole.norm(dim=1)
    limit_outliers(own, norms[3:], norms)
    limit_outliers(whole, norms, norms)
    assert torch.equal(own, whole[3:])
    assert own.norm(dim=1).tolist() == pytest.approx([3, 3], rel=1e-5)


def test_no_gradient_stays_none_and_nan_stays_nan() -> None:
    nothing, bad = torch.zeros(3, 8), rows(1, 1, 1)
    limit_outliers(nothing, torch.zeros(3), torch.zeros(3))
    assert not nothing.any()
    bad[1, 4] = torch.nan
    limit_outliers(bad, bad.norm(dim=1), bad.norm(dim=1))
    assert bad[1].isnan().any()
    assert bad[[0, 2]].isfinite().all()


def test_it_goes_where_adamw_goes() -> None:
    exact, low = layers(), layers()
    start = flat(exact)
    run(exact, adamw([(exact, 1e-3)], 0.1), range(50))
    run(low, adamw([(low, 1e-3)], 0.1, "bf16", seed=1), range(50))
    moved = (flat(exact) - start).norm()
    assert moved > 0.1
    assert (flat(low) - flat(exact)).norm() < 0.01 * moved


def test_the_state_takes_four_bytes_a_weight() -> None:
    module = layers()
    optimizer = adamw([(module, 1e-3)], 0.1, "bf16")
    run(module, optimizer, range(1))
    held = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert held == 4 * sum(p.numel() for p in module.parameters())


def test_the_second_moment_follows_where_rounding_to_nearest_would_stand_still() -> None:
    parameter = nn.Parameter(torch.zeros(4096))
    optimizer = AdamWBf16([parameter], lr=0.0, seed=3)
    parameter.grad = torch.ones(4096)
    optimizer.step()
    square = optimizer.state[parameter]["exp_avg_sq"]
    square.fill_(0.5)
    assert torch.equal((square.float() * 0.999 + 0.001).bfloat16(), square)  # a step is lost on it
    for _ in range(200):
        optimizer.step()
    expected = 1 - 0.5 * 0.999**200
    assert square.float().mean() == pytest.approx(expected, abs=0.002)


def test_rounding_is_unbiased_for_both_signs() -> None:
    values = torch.tensor([1.001, -1.001, 3.3e-5, -7.7e3, 0.0]).repeat(20_000, 1)
    bits = torch.randint(0, 2**16, values.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    found = torch.empty_like(values, dtype=torch.bfloat16)
    optim._round(values, bits, found)
    torch.testing.assert_close(found.double().mean(0), values[0].double(), rtol=1e-4, atol=0)
    assert ((found.float() - values).abs() <= values.abs() * 2**-7).all()


def test_all_sixteen_bits_of_both_moments_are_drawn() -> None:
    noise = AdamWBf16([nn.Parameter(torch.zeros(1))], seed=1)._noise(torch.device("cpu"), 1)
    for bits in (noise & 0xFFFF, (noise >> 16) & 0xFFFF):
        assert bits.double().mean() == pytest.approx(2**15, rel=0.01)
        assert bits.max() > 0xFF00


def test_chunks_change_nothing_but_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks smaller than a row and chunks of some rows reach every entry once."""
    exact = layers()
    run(exact, adamw([(exact, 1e-3)], 0.1), range(3))
    for chunk in (7, 50):
        monkeypatch.setattr(optim, "CHUNK", chunk)
        low = layers()
        run(low, adamw([(low, 1e-3)], 0.1, "bf16"), range(3))
        torch.testing.assert_close(flat(low), flat(exact), atol=1e-4, rtol=0)


def test_it_goes_on_from_its_state_dict_bit_for_bit() -> None:
    whole, broken = layers(), layers()
    run(whole, adamw([(whole, 1e-3)], 0.1, "bf16", seed=5), range(6))
    first = adamw([(broken, 1e-3)], 0.1, "bf16", seed=5)
    run(broken, first, range(3))
    second = adamw([(broken, 1e-3)], 0.1, "bf16", seed=5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert {t.dtype for s in second.state.values() for t in s.values() if t.ndim} == {torch.bfloat16}
    run(broken, second, range(3, 6))
    assert torch.equal(flat(broken), flat(whole))
