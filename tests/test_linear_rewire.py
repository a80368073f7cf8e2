"""FixedFanInLinear in training: rewiring, replicas, a start from a dense layer, and what docs/linear.md shows."""

from __future__ import annotations

import copy
import datetime
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from fanin.linear import FixedFanInLinear
from fanin.linear import layer as layer_module
from linear_layers import D, K, L, assert_valid, dense, make


def trained(layer: FixedFanInLinear, optimizer: torch.optim.Optimizer, steps: int = 2):
    """Captured input and gradient of the last step."""
    for _ in range(steps):
        x = torch.randn(2, 3, D, dtype=layer.weight.dtype)
        optimizer.zero_grad()
        with layer.capture() as seen:
            layer(x).square().sum().backward()
        optimizer.step()
    return seen


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rewire(dtype, group, method, monkeypatch):
    monkeypatch.setattr(layer_module, "_CHUNK", 3 * D * group)  # several chunks, the last a ragged one
    layer = make(group, dtype, "auto")
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    seen = trained(layer, optimizer)
    state = optimizer.state[layer.weight]
    followers = [layer.weight, layer.weight.grad, state["exp_avg"], state["exp_avg_sq"]]
    before = [dense(layer, tensor.detach().float()) for tensor in followers]
    old = dense(layer, torch.ones(L, K)).bool()
    size = before[0].square().split(group)
    size = torch.stack([rows.mean(0) for rows in size])  # [rows, D]: what the pruning goes by
    result = layer.rewire(0.4, method=method, x=seen.x, grad_output=seen.grad_output, optimizer=optimizer)
    assert_valid(layer)
    rows = -(-L // group)
    assert result == {"entries": rows * K, "pruned": rows * 2, "moved": result["moved"]}
    new = dense(layer, torch.ones(L, K)).bool()
    kept, grown = old & new, new & ~old
    assert (kept.sum(1) == K - 2).all()
    assert (grown.sum(1) == 2).all()
    for tensor, was in zip(followers, before, strict=True):
        assert torch.equal(dense(layer, tensor.detach().float()), torch.where(kept, was, 0))
    by_row = slice(None, None, group)
    assert (size[(old & ~new)[by_row]].view(rows, -1).amax(1) <= size[kept[by_row]].view(rows, -1).amin(1)).all()
    if method == "rigl":
        gradient = seen.grad_output.flatten(0, 1).float().t() @ seen.x.flatten(0, 1).float()
        score = torch.stack([part.square().mean(0) for part in gradient.split(group)])
        best = score.masked_fill(old[by_row], -1).topk(2, dim=1).indices
        assert torch.equal(torch.zeros(rows, D, dtype=torch.bool).scatter(1, best, True), grown[by_row])
    trained(layer, optimizer)  # the optimiser goes on


def test_rewire_all_and_nothing():
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    assert layer.rewire(0.0)["pruned"] == 0
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert layer.rewire(1.0) == {"entries": L * K, "pruned": L * (K - 1), "moved": L * (K - 1)}
    assert (layer.weight.count_nonzero(1) == 1).all()
    full = FixedFanInLinear(6, 4, 6)
    full.rewire(0.5)  # every feature is read already: pruned ones come back
    assert torch.equal(full.index.to(torch.int64), torch.arange(6).expand(4, 6))


def test_rewire_is_repeatable():
    layers = make(), make()
    for layer in layers:
        layer.rewire(0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(layers[0].index, layers[1].index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 1.5}, "fraction must be 0 to 1, found 1.5"),
        ({"fraction": float("nan")}, "fraction must be 0 to 1"),
        ({"method": "best"}, "method 'best' is not one of set, rigl"),
        ({"x": None}, "method rigl needs x"),
        ({"grad_output": None}, "method rigl needs x"),
        ({"x": torch.zeros(5, D)}, r"found \[5, 40\] and \[6, 37\]"),
        ({"x": torch.zeros(0, D), "grad_output": torch.zeros(0, L)}, "x is empty"),
        ({"x": torch.full((6, D), torch.nan)}, "x holds NaN or infinite"),
        ({"grad_output": torch.full((6, L), torch.inf)}, "grad_output holds NaN or infinite"),
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(L, K))])}, "does not hold this layer's weight"),
    ],
)
def test_rewire_refuses_and_changes_nothing(arguments, message):
    layer = make(dtype=torch.float32)
    before = copy.deepcopy(layer.state_dict())
    valid = {"fraction": 0.5, "method": "rigl", "x": torch.randn(6, D), "grad_output": torch.randn(6, L)}
    with pytest.raises(ValueError, match=message):
        layer.rewire(**{**valid, **arguments})
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_rewire_refuses_quantised_state():
    layer = make()
    optimizer = torch.optim.SGD(layer.parameters())
    optimizer.state[layer.weight]["quantised"] = torch.zeros(L, K, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"quantised is torch\.uint8"):
        layer.rewire(0.5, optimizer=optimizer)


def test_capture_pairs_input_and_gradient():
    layer = make()
    first, second = (torch.randn(2, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with layer.capture() as seen:
        a, b = layer(first), layer(second)
        assert seen.x is None
        a.sum().backward()
        assert torch.equal(seen.x, first)
        (3 * b).sum().backward()
        assert torch.equal(seen.x, second)
        assert torch.equal(seen.grad_output, torch.full_like(b, 3.0))
    layer(first).sum().backward()
    assert torch.equal(seen.x, second)


@pytest.mark.parametrize("group", [1, 4])
def test_from_dense_keeps_the_largest(group, monkeypatch):
    monkeypatch.setattr(layer_module, "_CHUNK", 3 * D * group)
    linear = nn.Linear(D, L, dtype=torch.float64).eval()
    layer = FixedFanInLinear.from_dense(linear, K, group)
    assert_valid(layer)
    assert not layer.training
    parts = linear.weight.detach().square().split(group)
    best = torch.stack([part.sum(0).topk(K).indices.sort().values for part in parts])
    assert torch.equal(layer.index.to(torch.int64), best)
    kept = dense(layer, torch.ones(L, K, dtype=torch.float64)).bool()
    assert torch.equal(dense(layer), torch.where(kept, linear.weight, 0))
    exact = FixedFanInLinear.from_dense(linear, D, group)
    x = torch.randn(3, D, dtype=torch.float64)
    torch.testing.assert_close(exact(x), linear(x))


# data parallel --------------------------------------------------------------------------------------------------------


def replica(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    # a file, not a port: one that is free now may be taken by the time both processes are up
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2, timeout=patience)
    try:
        torch.save(trained_replica(rank), f"{path}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def trained_replica(rank: int) -> dict:
    # A function of its own, so that DDP's reducer is gone before the process group is: the reducer is freed with the GIL
    # held, and where it held the group's last reference it would wait there for a gloo thread that wants the GIL.
    torch.manual_seed(rank)  # different starts: DDP must make them equal
    layer = FixedFanInLinear(D, L, K, group=4, backend="torch")
    model = nn.parallel.DistributedDataParallel(layer)
    x, g = (torch.randn(8, size, generator=torch.Generator().manual_seed(1)) for size in (D, L))
    own = slice(4 * rank, 4 * rank + 4)
    with layer.capture() as seen:
        (2 * model(x[own]) * g[own]).sum().backward()  # DDP takes the mean over processes
    result = {"state": copy.deepcopy(layer.state_dict()), "gradient": layer.weight.grad.clone()}
    for arguments in ({"method": "set"}, {"method": "rigl", "x": seen.x, "grad_output": seen.grad_output}):
        with pytest.raises(ValueError, match="process_group"):
            layer.rewire(0.4, **arguments)
        layer.rewire(0.4, **arguments, process_group=dist.group.WORLD)
    return {**result, "rewired": layer.state_dict()}


def test_ddp_equals_one_process(tmp_path):
    mp.spawn(replica, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key in ("weight", "bias", "index"):
        assert torch.equal(first["state"][key], second["state"][key])
        assert torch.equal(first["rewired"][key], second["rewired"][key])
    assert not torch.equal(first["state"]["index"], first["rewired"]["index"])
    layer = FixedFanInLinear(D, L, K, group=4, backend="torch")
    layer.load_state_dict(first["state"])
    x, g = (torch.randn(8, size, generator=torch.Generator().manual_seed(1)) for size in (D, L))
    (layer(x) * g).sum().backward()
    torch.testing.assert_close(first["gradient"], layer.weight.grad)
    torch.testing.assert_close(second["gradient"], layer.weight.grad)


# the documentation ------------------------------------------------------------------------------------------------------


def test_the_documentation_runs():
    text = (Path(__file__).parents[1] / "docs" / "linear.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block, names)
    with torch.no_grad():
        loss = F.cross_entropy(names["model"](names["inputs"]), names["targets"])
    assert loss < 1.0  # it began near ln 1000 = 6.9
