"""Heads against autograd and torch.optim.SGD, over several steps; state, top-k, rewiring."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fanin.config import Head as HeadSettings
from fanin.files import InputError
from fanin.heads import Bottleneck, Dense, FixedFanIn, Head, build_head, dense
from fanin.kernels.layer import decode, index_dtype
from fanin.kernels.reference import Reference, expand
from fanin.objectives import Positives
from fanin.rewiring import Schedule

LABELS, WIDTH, BATCH = 600, 40, 6
HEADS = {
    "dense": lambda loss="bce": Dense(LABELS, WIDTH, loss, seeded()),
    "bottleneck": lambda loss="bce": Bottleneck(LABELS, WIDTH, 8, loss, seeded()),
    "fan_in": lambda loss="bce": FixedFanIn(LABELS, WIDTH, 7, 1, loss, seeded()),
    "grouped": lambda loss="bce": FixedFanIn(LABELS, WIDTH, 9, 16, loss, seeded()),
    "reference": lambda loss="bce": FixedFanIn(LABELS, WIDTH, 7, 1, loss, seeded(), backend="reference"),
}


def small_chunks(monkeypatch, size: int) -> None:
    """Chunks of a few labels, so that several make up the head and the last is not whole."""
    monkeypatch.setattr(Dense, "chunk", lambda self, batch: size)
    monkeypatch.setattr(Reference, "chunk", lambda self, group, batch, device="cpu": size)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, Positives]:
    """x, y [B, L] and the same as positives: the first and last label, one that all have, and one document without."""
    x = torch.randn(BATCH, WIDTH, generator=seeded(seed), dtype=torch.float64)
    y = (torch.rand(BATCH, LABELS, generator=seeded(seed + 1)) < 0.01).double()
    y[:, 5] = 1
    y[0, 0] = y[1, LABELS - 1] = 1
    y[2] = 0
    labels, documents = y.t().nonzero(as_tuple=True)
    return x, y, Positives(labels, documents)


def loss_of(z: torch.Tensor, y: torch.Tensor, loss: str) -> torch.Tensor:
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    return (1 - z * (2 * y - 1)).clamp(min=0).square().sum()


class Plain(torch.nn.Module):
    """The same head as ordinary parameters with dense arithmetic: the semantics."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        for name in ("weight", "bias", "projection"):
            if getattr(head, name, None) is not None:
                setattr(self, name, torch.nn.Parameter(getattr(head, name).detach().clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if isinstance(self.head, FixedFanIn):
            rows = expand(self.head.index, LABELS, self.head.group)
            weight = torch.zeros(LABELS, WIDTH, dtype=x.dtype).scatter(1, rows, weight)
        if isinstance(self.head, Bottleneck):
            x = x @ self.projection.t()
        return x @ weight.t() + self.bias


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("name", HEADS)
def test_five_steps_equal_autograd_and_sgd(name, loss, monkeypatch):
    """In fp64, with momentum and decay, chunks that do not divide L; dx is from before the update."""
    small_chunks(monkeypatch, 256)
    head = HEADS[name](loss).double()
    head.prepare_training(0.9)
    plain = Plain(head)
    decayed = [p for n, p in plain.named_parameters() if n != "bias"]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.01}, {"params": [plain.bias]}], lr=0.02, momentum=0.9)
    for seed in range(5):
        x, y, positives = batch(seed)
        leaf = x.clone().requires_grad_()
        value = loss_of(plain(leaf), y, loss)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        dx, found = head.step(x, positives, lr=0.02, momentum=0.9, weight_decay=0.01, want_loss=True)
        torch.testing.assert_close(dx, leaf.grad)
        torch.testing.assert_close(found, value.detach())
    for key in ("weight", "bias", "projection"):
        if hasattr(plain, key):
            torch.testing.assert_close(getattr(head, key), getattr(plain, key).detach())


@pytest.mark.parametrize("name", HEADS)
def test_scale_acts_on_the_update_not_on_dx(name):
    x, _, positives = batch(3)
    whole, half = HEADS[name]().double(), HEADS[name]().double()
    before = whole.weight.clone()
    dx, none = whole.step(x, positives, lr=0.1)
    dx_half, _ = half.step(x, positives, lr=0.1, scale=0.5)
    assert none is None
    torch.testing.assert_close(dx, dx_half)
    torch.testing.assert_close(half.weight - before, (whole.weight - before) / 2)


@pytest.mark.parametrize("name", HEADS)
def test_topk_is_exact_and_sorted(name, monkeypatch):
    small_chunks(monkeypatch, 96)
    head = HEADS[name]().double()
    x, _, _ = batch(0)
    every = head.logits(x, 0, LABELS)
    torch.testing.assert_close(every, Plain(head)(x).detach())
    for k in (1, 7, LABELS):
        scores, rows = head.topk(x, k)
        best = every.topk(k, dim=1)
        torch.testing.assert_close(scores, best.values)
        torch.testing.assert_close(every.gather(1, rows), best.values)
    with pytest.raises(ValueError, match=r"k must be 1 to 600"):
        head.topk(x, LABELS + 1)


@pytest.mark.parametrize("name", HEADS)
def test_bytes_count_every_buffer(name):
    head = HEADS[name]()
    resting = head.bytes()
    assert resting["optimizer"] == 0
    head.prepare_training(0.9)
    training = head.bytes()
    assert training["optimizer"] == sum(training.values()) - training["optimizer"] - training["indices"]
    assert sum(training.values()) == sum(b.numel() * b.element_size() for b in head.buffers())
    assert "momentum" not in head.model_state()
    head.finish_training()
    assert head.bytes() == resting


def test_default_head_takes_an_eighth_of_dense():
    """Weights and indices at K = 32 of 1536 against a dense fp32 layer on MiniLM's 384 features."""
    sizes = FixedFanIn(1000, 1536, 32).bytes()
    assert (sizes["weights"] + sizes["indices"]) * 8 <= 1000 * 384 * 4


def test_no_dense_array_is_ever_made():
    """In a step, top-k and rewiring of 30,000 labels no tensor reaches [L, D] or [B, L]."""
    labels, width, size = 30_000, 512, 64
    head = FixedFanIn(labels, width, 8)
    head.prepare_training(0.9)
    x = torch.randn(size, width)
    positives = Positives(torch.arange(size), torch.arange(size))
    rigl = Schedule(method="rigl", prune="fraction", amount=0.3, interval=1, end_step=10)
    with Largest() as largest:
        head.step(x, positives, lr=0.1, momentum=0.9, want_loss=True)
        head.topk(x, 100)
    assert largest.numel <= labels * 8 * 2  # the weights themselves, and sort's pairs
    with Largest() as largest:
        head.rewire(rigl, 1, 0, x, positives)
    assert largest.numel <= 2**22 + width  # a chunk of the dense gradient


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operation's result holds (views of inputs do not count as new)."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize(("prune", "amount"), [("fraction", 0.3), ("global", 0.3), ("threshold", 0.17)])
def test_rewiring_keeps_the_invariants(group, method, prune, amount):
    """K distinct ascending indices a row, in range; kept weights and momenta move along; regrown ones are zero."""
    head = FixedFanIn(LABELS, WIDTH, 10, group, generator=seeded())
    head.prepare_training(0.9)
    x, _, positives = batch(1)
    x = x.float()
    head.step(x, positives, lr=0.1, momentum=0.9)
    dense_before = densify(head, head.weight), densify(head, head.momentum)
    old = head.index.long()
    schedule = Schedule(method=method, prune=prune, amount=amount, interval=1, end_step=10**9)
    counts = head.rewire(schedule, 1, 0, x, positives)
    new = head.index.long()
    assert new.shape == old.shape
    assert (new[:, 1:] > new[:, :-1]).all()
    assert new.min() >= 0
    assert new.max() < WIDTH
    assert counts["entries"] == new.numel()
    assert 0 < counts["moved"] <= counts["pruned"] < counts["entries"]
    if prune == "fraction":
        assert counts["pruned"] == 3 * len(new)
    if prune == "global":
        assert counts["pruned"] == pytest.approx(0.3 * new.numel(), rel=0.02)
    for before, tensor in zip(dense_before, (head.weight, head.momentum), strict=True):
        after = densify(head, tensor)
        changed = after != before
        assert (after[changed] == 0).all()  # what was pruned; nothing else changed, nothing regrew above zero


def densify(head: FixedFanIn, values: torch.Tensor) -> torch.Tensor:
    return torch.zeros(LABELS, WIDTH).scatter(1, expand(head.index, LABELS, head.group), values)


def test_rigl_regrows_where_the_dense_gradient_is_largest():
    head = FixedFanIn(LABELS, WIDTH, 10, generator=seeded())
    x, y, positives = batch(1)
    x = x.float()
    old = head.index.long()
    z = head.logits(x, 0, LABELS)
    gradient = (torch.sigmoid(z).t() - y.t().float()) @ x
    smallest = head.weight.abs().topk(2, dim=1, largest=False).indices
    head.rewire(Schedule(method="rigl", prune="fraction", amount=0.2, interval=1, end_step=10**9), 1, 0, x, positives)
    for label in (0, 5, 77, LABELS - 1):
        free = gradient[label].abs().clone()
        free[old[label]] = -1
        expected = set(old[label].tolist()) - set(old[label, smallest[label]].tolist()) | set(free.topk(2).indices.tolist())
        assert set(head.index[label].tolist()) == expected


def test_rewiring_when_nearly_every_feature_is_used():
    """K = D - 1: one free feature for two pruned ones, so one comes back and rows stay distinct."""
    head = FixedFanIn(50, 9, 8, generator=seeded())
    x, positives = torch.randn(3, 9), Positives(torch.tensor([0]), torch.tensor([0]))
    for step in range(1, 20):
        schedule = Schedule(method="set", prune="fraction", amount=0.25, interval=1, end_step=10**9)
        head.rewire(schedule, step, 0, x, positives)
        rows = head.index.long()
        assert (rows[:, 1:] > rows[:, :-1]).all()


def test_dense_cannot_be_rewired():
    schedule = Schedule(method="set", prune="fraction", amount=0.25, interval=1, end_step=9)
    with pytest.raises(InputError, match=r"rewiring.method: set needs head.kind fixed_fan_in"):
        Dense(4, 4).rewire(schedule, 1, 0, torch.zeros(1, 4), Positives(torch.empty(0), torch.empty(0)))


def test_index_types():
    assert [index_dtype(w) for w in (5, 65536, 65537)] == [torch.uint16, torch.uint16, torch.int32]


def test_feature_use_counts_labels():
    head = FixedFanIn(LABELS, WIDTH, 9, 16, generator=seeded())
    use = head.feature_use()
    assert int(use.sum()) == LABELS * 9
    rows = expand(head.index, LABELS, 16)
    assert use.tolist() == torch.bincount(rows.reshape(-1), minlength=WIDTH).tolist()


@pytest.mark.parametrize("kind", ["dense", "bottleneck", "fixed_fan_in"])
def test_build_and_state_round_trip(kind):
    settings = HeadSettings(kind=kind, fan_in=4, bottleneck=4)
    one, two = build_head(settings, 30, 16, seeded(1)), build_head(settings, 30, 16, seeded(2))
    assert (one.width, one.inner, one.learnt) == (16, 16, 16)
    assert not torch.equal(one.weight, two.weight)
    two.load_model_state(one.model_state(), "here")
    for key, value in one.model_state().items():
        assert torch.equal(two.model_state()[key], value)


def test_a_backend_that_cannot_run_is_named():
    if torch.cuda.is_available():
        pytest.skip("Triton runs here")
    with pytest.raises(InputError, match=r"head.backend: the triton backend needs a GPU.*set it to auto"):
        build_head(HeadSettings(fan_in=4, backend="triton"), 30, 16)


@pytest.mark.parametrize("group", [1, 16])
@pytest.mark.parametrize(("dtype", "rounding"), [("bf16", "stochastic"), ("bf16", "kahan"), ("fp8", "stochastic")])
def test_low_precision_heads_train_rewire_and_are_saved(dtype, rounding, group):
    """They follow the float32 head, keep their type through it all, and rewiring moves every tensor along."""
    settings = HeadSettings(fan_in=10, group=group, dtype=dtype, rounding=rounding)
    head, wide = build_head(settings, LABELS, WIDTH, seeded()), build_head(HeadSettings(fan_in=10, group=group), LABELS, WIDTH)
    wide.load_model_state({k: v.float() if v.is_floating_point() else v for k, v in head.model_state().items()}, "here")
    losses = []
    for one in (head, wide):
        one.prepare_training(0.9)
        for number in range(30):
            x, _, positives = batch(number % 3)
            _, loss = one.step(x.float(), positives, lr=0.02, momentum=0.9, seed=number, want_loss=True)
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.03 if dtype == "bf16" else 0.15)
    assert head.momentum.dtype == torch.bfloat16
    assert (head.compensation is not None) == (rounding == "kahan")
    before = densify(head, decode(head.weight))
    rigl = Schedule(method="rigl", prune="fraction", amount=0.3, interval=1, end_step=10**9)
    head.rewire(rigl, 1, 0, x.float(), positives)
    after = densify(head, decode(head.weight))
    assert (after[after != before] == 0).all()
    state = head.model_state()
    assert state["weight"].dtype == head.weight.dtype
    other = build_head(settings, LABELS, WIDTH)
    other.load_model_state(state, "here")
    assert torch.equal(other.logits(x.float(), 0, LABELS), head.logits(x.float(), 0, LABELS))


def test_a_step_refuses_bad_input_and_leaves_the_head_as_it_was():
    head = FixedFanIn(LABELS, WIDTH, 7, generator=seeded())
    head.prepare_training(0.9)
    before = {name: buffer.clone() for name, buffer in head.named_buffers()}
    x, _, positives = batch(0)
    x = x.float()
    broken = x.clone()
    broken[2, 5], broken[4, 0] = torch.nan, torch.inf
    for error, message, given, where in (
        (FloatingPointError, r"x holds NaN or infinite values, in documents \[2, 4\] of the batch", broken, positives),
        (ValueError, r"x must be \[B, 40\] with B at least 1, found \[0, 40\]", x[:0], positives),
        (ValueError, r"x must be \[B, 40\]", x[:, :-1], positives),
        (ValueError, "label ids must be sorted", x, Positives(positives.labels.flip(0), positives.documents)),
        (ValueError, "positives: label 600 is outside 0..599", x, Positives(positives.labels + 1, positives.documents)),
        (ValueError, "positives: document 6 is outside 0..5", x, Positives(positives.labels, positives.documents + 1)),
    ):
        with pytest.raises(error, match=message):
            head.step(given, where, lr=0.1, momentum=0.9)
    assert all(torch.equal(buffer, before[name]) for name, buffer in head.named_buffers())


def test_bad_states_are_refused():
    head = FixedFanIn(30, 16, 4, generator=seeded())
    state = head.model_state()
    with pytest.raises(InputError, match=r"start.safetensors: holds \['bias'\], but this head needs"):
        head.load_model_state({"bias": state["bias"]}, "start.safetensors")
    with pytest.raises(InputError, match=r"weight is \(29, 4\), but the settings ask for \(30, 4\)"):
        head.load_model_state(state | {"weight": torch.zeros(29, 4)}, "f")
    with pytest.raises(InputError, match=r"f: index row 0 holds 16, outside 0..15"):
        head.load_model_state(state | {"index": torch.full((30, 4), 16, dtype=torch.uint8)}, "f")
    with pytest.raises(InputError, match="f: index row 0 holds 0 twice"):
        head.load_model_state(state | {"index": torch.zeros(30, 4, dtype=torch.uint8)}, "f")
    with pytest.raises(InputError, match="weight holds NaN"):
        head.load_model_state(state | {"weight": torch.full((30, 4), torch.nan)}, "f")
    with pytest.raises(InputError, match=r"head.fan_in: 17 is above the 16 features"):
        FixedFanIn(30, 16, 17)
    with pytest.raises(InputError, match=r"head.bottleneck: 17 is above the 16 features"):
        Bottleneck(30, 16, 17)


@pytest.mark.parametrize(("dtype", "rounding"), [("bf16", "stochastic"), ("bf16", "kahan"), ("fp8", "stochastic")])
def test_a_dense_head_below_float32_follows_the_float32_one(dtype, rounding, monkeypatch):
    """In chunks that do not divide L, each updated in parts that do not divide the chunk; saved in its own type."""
    small_chunks(monkeypatch, 250)
    monkeypatch.setattr(dense, "ROUNDED", 64)
    settings = HeadSettings(kind="dense", dtype=dtype, rounding=rounding)
    head, wide = build_head(settings, LABELS, WIDTH, seeded()), build_head(HeadSettings(kind="dense"), LABELS, WIDTH)
    wide.load_model_state({key: value.float() for key, value in head.model_state().items()}, "here")
    before = wide.weight.clone()
    losses, gradients = [], []
    for one in (head, wide):
        one.prepare_training(0.9)
        for number in range(30):
            x, _, positives = batch(number % 3)
            dx, loss = one.step(x.float(), positives, lr=0.02, momentum=0.9, weight_decay=0.01, seed=number, want_loss=True)
            gradients.append(dx)
        losses.append(loss.item())
    torch.testing.assert_close(gradients[0], gradients[30])  # the same weights still
    assert losses[0] == pytest.approx(losses[1], rel=0.03 if dtype == "bf16" else 0.15)
    moved = (wide.weight - before).norm()
    assert (decode(head.weight) - wide.weight).norm() < {"bf16": 0.05, "fp8": 0.5}[dtype] * moved
    assert head.momentum.dtype == torch.bfloat16
    assert (head.compensation is not None) == (rounding == "kahan")
    head.finish_training()
    assert head.bytes() == {"weights": head.weight.itemsize * LABELS * WIDTH, "indices": 0, "bias": 4 * LABELS, "optimizer": 0}
    other = build_head(settings, LABELS, WIDTH)
    other.load_model_state(head.model_state(), "here")
    assert other.weight.dtype == head.weight.dtype
    scores, rows = other.topk(x.float(), 5)
    torch.testing.assert_close(scores, head.logits(x.float(), 0, LABELS).gather(1, rows))


def test_rounded_updates_do_not_depend_on_the_parts(monkeypatch):
    """Random bits belong to a weight's place in the whole head: chunks and processes cut it as they like."""
    weights = []
    for chunk, rounded, parts in ((LABELS, 512, [(0, LABELS)]), (96, 40, [(0, 256), (256, LABELS)])):
        small_chunks(monkeypatch, chunk)
        monkeypatch.setattr(dense, "ROUNDED", rounded)
        x, _, positives = batch(0)
        found = []
        for start, stop in parts:
            head = Dense(LABELS, WIDTH, "bce", seeded(), dtype=torch.bfloat16, part=(start, stop))
            own = (positives.labels >= start) & (positives.labels < stop)
            head.step(x.float(), Positives(positives.labels[own] - start, positives.documents[own]), lr=0.1, seed=3)
            found.append(head.weight)
        weights.append(torch.cat(found))
    different = (weights[0] != weights[1]).float().mean()  # products of other shapes differ in their last bits
    assert different < 0.01


@pytest.mark.parametrize("group", [1, 4])
def test_rows_that_are_loaded_need_not_be_drawn(group: int) -> None:
    settings = HeadSettings(fan_in=6, group=group)
    drawn, blank = build_head(settings, 30, 16, seeded(1)), build_head(settings, 30, 16, seeded(2), drawn=False)
    assert not blank.weight.any()
    blank.load_model_state(drawn.model_state(), "here")
    assert all(torch.equal(blank.model_state()[name], tensor) for name, tensor in drawn.model_state().items())
