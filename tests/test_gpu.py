"""The compiled Triton kernels, and the heads on them, on a GPU. Imports no more of the project than they need."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fanin.heads import Bottleneck, Dense, FixedFanIn
from fanin.kernels import Layer, Update
from fanin.kernels.layer import mix, random_bits, store
from fanin.kernels.reference import Reference
from fanin.kernels.triton import Triton
from fanin.objectives import Positives
from fanin.profiles import Profiles
from fanin.rewiring import Schedule
from layer_cases import BF16, FP8, FP32, case, check_given_features, check_rest, check_step, clone, error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
# labels, width, fan-in, batch, group: all configurations of blocks, ragged sizes, several chunks of labels and of documents
SHAPES = [
    (1, 5, 1, 1, 1),
    (20011, 768, 32, 128, 1),
    (9000, 100, 3, 5, 1),
    (3001, 300, 17, 130, 1),
    (2000, 70000, 40, 9, 1),
    (1500, 300, 100, 33, 1),
    (1003, 768, 128, 300, 1),
    (500, 1024, 512, 64, 1),
    (9001, 64, 1, 5, 16),
    (20000, 768, 128, 128, 64),
    (9001, 768, 32, 128, 64),
    (10007, 300, 40, 130, 16),
    (9000, 64, 64, 64, 8),
    (3003, 70000, 60, 20, 32),
    (4100, 1024, 512, 100, 128),
    (5000, 30, 12, 9, 3),
    (4000, 300, 96, 300, 200),
]


@pytest.fixture
def backend() -> Triton:
    return Triton()


@pytest.fixture(autouse=True)
def _poison():
    """torch.empty gives NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("weights", [FP32, BF16, FP8])
@pytest.mark.parametrize("shape", SHAPES)
def test_steps(backend, shape, weights, loss):
    check_step(backend, "cuda", shape, loss, weights=weights, momentum=FP32 if weights == FP32 else BF16, first=2**33 + 5)


@pytest.mark.parametrize("weights", [FP32, BF16, FP8])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_gradients_and_topk(backend, shape, weights):
    check_rest(backend, "cuda", shape, weights=weights, counts=(1, 100, 1000))


@pytest.mark.parametrize("shape", [(3001, 300, 17, 130, 1), (10007, 300, 40, 130, 16), (9001, 768, 128, 64, 64)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": BF16, "momentum": FP32},
        {"weights": BF16, "kahan": True},
        {"weights": FP8, "kahan": True, "momentum": BF16},
        {"bias": False, "momentum": FP32},
        {"wide": True},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()) or "plain",
)
def test_state(backend, shape, options):
    check_step(backend, "cuda", shape, **options)


@pytest.mark.parametrize("weights", [FP32, BF16])
@pytest.mark.parametrize("shape", [(3001, 300, 17, 130, 1), (10007, 300, 40, 130, 16), (4000, 300, 96, 100, 200)])
def test_with_atomics(shape, weights):
    backend = Triton(deterministic=False)
    check_step(backend, "cuda", shape, weights=weights)
    check_rest(backend, "cuda", shape, weights=weights)


@pytest.mark.parametrize("shape", [(20011, 96, 32, 64, 1), (70000, 96, 32, 64, 8)])
def test_in_many_chunks(shape):
    check_step(Triton(scratch_bytes=2**20), "cuda", shape, weights=BF16)


@pytest.mark.parametrize("shape", [(200_011, 768, 32, 128, 1), (200_011, 768, 128, 128, 64), (50_001, 300, 40, 300, 16)])
def test_the_same_bits_twice(backend, shape):
    results = []
    for _ in range(2):
        layer, x, labels, documents = case(*shape, weights=BF16, momentum=BF16)
        layer, update = clone(layer, "cuda"), Update(lr=0.1, momentum=0.9, seed=4)
        dx, loss = backend.step(x.cuda(), layer, labels.cuda(), documents.cuda(), update, want_loss=True)
        results.append([value.cpu() for value in (dx, loss, layer.weight.float(), layer.momentum, layer.bias)])
    assert all(torch.isfinite(value).all() for value in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(3000, 1000, 32, 64, 1), (3000, 1000, 64, 64, 16)])
def test_features_that_are_given(backend, shape):
    check_given_features(backend, "cuda", shape)


@pytest.mark.parametrize("group", [1, 16])
def test_rewiring_in_place_is_seen(backend, group):
    layer, x, *_ = case(5000, 300, 20, 9, group)
    there, g = clone(layer, "cuda"), torch.randn(9, 5000)
    before = backend.gradients(x.cuda(), g.cuda(), there)[0]
    other = torch.rand(len(layer.index), 300).topk(20, dim=1).indices
    for index in (layer.index, there.index):
        index.copy_(other)
    after = backend.gradients(x.cuda(), g.cuda(), there)[0]
    assert error(after, Reference().gradients(x.double(), g.double(), clone(layer, wide=True))[0]) < 5e-6
    assert error(before, after) > 0.1


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_rounding_bit_for_bit(dtype, stochastic):
    from fanin.kernels.triton.job import raw, seeds
    from triton_probe import encoded

    values = (torch.randn(2**16) * torch.exp2(torch.linspace(-24, 12, 2**16))).view(-1, 8)
    values[0] = torch.tensor([0.0, -0.0, 448, 464, 1e9, -1e9, 2**-6, -(2.0**-10)])
    for first, seed in ((0, 0), (2**29 - 100, 7), (2**59, 123456789)):
        layer = Layer(torch.empty(values.shape, dtype=dtype), torch.zeros(values.shape, dtype=torch.int32), first=first)
        store(layer.weight, values, random_bits(mix(seed), layer) if stochastic else None)
        found = torch.empty(values.shape, dtype=dtype, device="cuda")
        begin = torch.tensor([first * 8], device="cuda")
        encoded[(64,)](values.cuda(), raw(found, False), begin, seeds(seed)[0], STOCHASTIC=stochastic, SIZE=1024)
        assert torch.equal(raw(found, True).cpu(), raw(layer.weight, True))


@pytest.mark.parametrize(("group", "fan_in"), [(1, 32), (64, 128)])
def test_a_step_waits_for_nothing_and_takes_what_was_planned(backend, group, fan_in):
    shape = {"labels": 300_000, "features": 768, "fan_in": fan_in, "group": group, "batch": 128}
    layer = Layer(
        weight=torch.randn(300_000, fan_in, device="cuda"),
        index=torch.rand(-(-300_000 // group), 768, device="cuda").topk(fan_in, dim=1).indices.to(torch.uint16),
        bias=torch.randn(300_000, device="cuda"),
        group=group,
    )
    x = torch.randn(128, 768, device="cuda")
    labels, documents = torch.arange(0, 300_000, 1000, device="cuda"), torch.arange(300, device="cuda") % 128
    backend.step(x, layer, labels, documents, Update(lr=0.1))  # compiles, and sorts the index
    backend.orders.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backend.step(x, layer, labels, documents, Update(lr=0.1))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    planned = backend.step_bytes(**shape)
    assert 0.4 * planned < peak < 1.3 * planned
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.step(x, layer, labels, documents, Update(lr=0.1, seed=1), want_loss=True)
        backend.topk(x, layer, 10)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("group", [1, 64])
def test_more_weights_than_an_int32_counts(backend, group):
    """4.3 million labels of 512: the last ones lie beyond offset 2^31 in weights, index, order and scratch."""
    labels, fan_in, width, batch = 2**22 + 2**16 + 37, 512, 600, 3
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GiB")
    rows = -(-labels // group)
    shifts = torch.arange(rows, device="cuda", dtype=torch.int32) * 7 % width
    index = torch.empty(rows, fan_in, dtype=torch.uint16, device="cuda")
    for begin in range(0, rows, 2**20):
        own = shifts[begin : begin + 2**20, None] + torch.arange(fan_in, device="cuda", dtype=torch.int32)
        index[begin : begin + 2**20] = (own % width).to(torch.uint16)
    weight = torch.randint(0, 256, (labels, fan_in), dtype=torch.uint8, device="cuda")
    weight = weight.bitwise_and_(0xAF).view(FP8)  # below 0.5 in size
    layer = Layer(weight, index, torch.randn(labels, device="cuda") * 100, group)
    x = (torch.randn(batch, width, device="cuda") * 0.1).to(BF16).float()
    positives = torch.tensor([5, labels - 2], device="cuda"), torch.tensor([0, 2], device="cuda")
    start = (labels - 5000) // group * group
    end = clone(layer.part(start, labels))
    exact = Reference().logits(x.cpu().double(), dataclasses.replace(clone(end, wide=True), first=0))
    assert error(backend.logits(x, layer)[:, start:], exact) < 5e-3
    scores, found = backend.topk(x, layer, 100)
    torch.testing.assert_close(backend.logits(x, layer).gather(1, found), scores, rtol=1e-4, atol=1e-3)
    update = Update(lr=0.5, seed=3)
    own = torch.tensor([labels - 2 - start]), torch.tensor([2])
    Reference().step(x.cpu(), end, *own, update)
    backend.step(x, layer, *positives, update)
    assert error(weight[start:].float(), end.weight.float()) < 5e-3
    assert error(layer.bias[start:], end.bias) < 5e-3


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("kind", ["dense", "bottleneck", "fan_in", "grouped"])
def test_heads_as_on_the_cpu(kind, loss):
    build = {
        "dense": lambda: Dense(5000, 300, loss),
        "bottleneck": lambda: Bottleneck(5000, 300, 32, loss),
        "fan_in": lambda: FixedFanIn(5000, 300, 17, 1, loss),
        "grouped": lambda: FixedFanIn(5000, 300, 24, 16, loss),
    }
    here = build[kind]()
    there = copy.deepcopy(here).cuda()
    for head in (here, there):
        head.prepare_training(0.9)
    positives = Positives(torch.tensor([0, 7, 7, 4999]), torch.tensor([1, 0, 8, 2]))
    for _ in range(4):
        x = torch.randn(9, 300)
        # the loss is a sum here: at a higher rate the bottleneck's diverges
        settings = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-3, "want_loss": True}
        dx, total = here.step(x, positives, **settings)
        found, total_there = there.step(x.cuda(), positives.to("cuda"), **settings)
        assert error(found, dx) < 1e-5
        assert error(total_there, total) < 1e-5
    assert error(there.weight, here.weight) < 1e-5
    scores, labels = here.topk(x, 10)
    scores_there, labels_there = there.topk(x.cuda(), 10)
    torch.testing.assert_close(scores_there.cpu(), scores, rtol=1e-4, atol=1e-4)
    assert (labels_there.cpu() == labels).float().mean() > 0.9  # near ties may change places
    if isinstance(there, FixedFanIn):
        schedule = Schedule(method="rigl", prune="fraction", amount=0.3, interval=1, end_step=100)
        moved = there.rewire(schedule, 1, 0, x.cuda(), positives.to("cuda"))
        assert moved["moved"] > 0
        index = there.index.long()
        assert (index[:, 1:] > index[:, :-1]).all()
        dx, _ = there.step(x.cuda(), positives.to("cuda"), lr=0.0, momentum=0.0, weight_decay=0.0, want_loss=False)
        back = copy.deepcopy(there).cpu()
        expected, _ = back.step(x, positives, lr=0.0, momentum=0.0, weight_decay=0.0, want_loss=False)
        assert error(dx, expected) < 1e-5


def test_profiles_of_words():
    """Sums, gradient and step as on the CPU."""
    generator = torch.Generator().manual_seed(0)
    own = Profiles(300, 64, 5000)
    own.index.copy_(torch.rand(300, 5000, generator=generator).topk(64).indices.sort(dim=1).values)
    own.weight.copy_(torch.randn(300, 64, generator=generator))
    own.prepare_training(0.9)
    words = torch.randn(128, 5000, generator=generator) * (torch.rand(128, 5000, generator=generator) < 0.01)
    outer = torch.randn(128, 300, generator=generator)
    other = copy.deepcopy(own).cuda()
    torch.testing.assert_close(other(words.cuda()).cpu(), own(words), rtol=1e-4, atol=1e-4)
    for one, x, g in ((own, words, outer), (other, words.cuda(), outer.cuda())):
        one.step(one.gradient(x, g), 0.1, 0.9)
    torch.testing.assert_close(other.weight.cpu(), own.weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other.momentum.cpu(), own.momentum, rtol=1e-4, atol=1e-4)
