"""The Triton kernels in Triton's interpreter: run as a test of its own process, since the interpreter is chosen at import.

pytest tests/test_triton.py                       one test: all of the below in a process with TRITON_INTERPRET=1
TRITON_INTERPRET=1 pytest tests/test_triton.py    them, one by one
"""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys

import pytest
import torch

from layer_cases import BF16, FP8, FP32, case, check_given_features, check_rest, check_step, clone, error

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
inside = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that test_in_the_interpreter starts")
# labels, width, fan-in, batch, group: ragged in every way, each kind of K and G, B = 1, several blocks of documents
SINGLE = [
    (1, 5, 1, 1, 1),
    (40, 48, 3, 5, 1),
    (18, 30, 8, 64, 1),
    (9, 40, 17, 130, 1),
    (35, 100, 32, 5, 1),
    (9, 60, 40, 20, 1),
    (8, 128, 100, 5, 1),
    (6, 140, 128, 33, 1),
    (5, 520, 512, 5, 1),
    (20, 300, 4, 5, 1),  # so many features that dx is not spread out
]
GROUPED = [
    (37, 48, 1, 5, 16),
    (21, 64, 32, 64, 8),
    (20, 90, 40, 130, 16),
    (100, 80, 17, 5, 32),
    (70, 140, 128, 20, 64),
    (70, 520, 512, 5, 64),
    (300, 200, 100, 5, 128),
    (20, 30, 12, 9, 3),
    (11, 20, 8, 1, 5),
    (310, 40, 9, 5, 150),
]


@pytest.fixture
def backend(monkeypatch):
    """With wider blocks in the sum of dx, since the interpreter takes its time by the operation; test_in_many_blocks and
    others have the shipped ones."""
    from fanin.kernels.triton import Triton, configs

    monkeypatch.setattr(configs, "reduce", lambda group, block_b: configs.Reduce(16, 16, block_b, 2, 4))
    return Triton()


@pytest.fixture(autouse=True)
def _poison():
    """torch.empty gives NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(600)
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-n", "2", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@inside
@pytest.mark.parametrize("shape", SINGLE + GROUPED)
def test_steps_in_float32(backend, shape):
    check_step(backend, "cpu", shape, steps=1, momentum=FP32)


@inside
@pytest.mark.parametrize("shape", SINGLE + GROUPED)
def test_logits_gradients_and_topk(backend, shape):
    check_rest(backend, "cpu", shape, counts=(5,) if shape[3] < 64 else (1,), halves=shape[3] == 9)


@inside
@pytest.mark.parametrize("weights", [BF16, FP8])
@pytest.mark.parametrize("shape", [(21, 48, 17, 20, 1), (45, 90, 40, 20, 32), (70, 100, 80, 20, 64)])
def test_weights_below_float32(backend, shape, weights):
    check_step(backend, "cpu", shape, weights=weights, first=2**33 + 5)
    check_rest(backend, "cpu", shape, weights=weights, counts=(5,), halves=False)


@inside
@pytest.mark.parametrize("shape", [(40, 48, 17, 20, 1), (45, 90, 33, 20, 16)])
@pytest.mark.parametrize(
    "options",
    [
        {"loss": "squared_hinge"},
        {"loss": "squared_hinge", "weights": BF16, "momentum": BF16},
        {"weights": FP8, "momentum": BF16},
        {"weights": BF16, "momentum": FP32},
        {"weights": BF16, "kahan": True},
        {"weights": FP8, "kahan": True, "momentum": BF16},
        {"bias": False, "momentum": FP32},
    ],
    ids=lambda options: "-".join(f"{value}" for value in options.values()),
)
def test_losses_and_state(backend, shape, options):
    check_step(backend, "cpu", shape, steps=1, **options)


@inside
@pytest.mark.parametrize("shape", [(21, 48, 7, 20, 1), (45, 90, 40, 20, 32), (20, 60, 20, 40, 16), (140, 40, 9, 5, 70)])
def test_with_atomics(shape):
    from fanin.kernels.triton import Triton

    backend = Triton(deterministic=False)
    check_step(backend, "cpu", shape)
    check_rest(backend, "cpu", shape, counts=(), halves=shape[0] == 21)


@inside
@pytest.mark.parametrize("scratch", [1, 2**20])
@pytest.mark.parametrize(("shape", "spread"), [((150, 10, 4, 5, 1), 64), ((150, 10, 4, 5, 1), 0), ((210, 10, 4, 5, 3), 0)])
def test_in_many_blocks(shape, spread, scratch, monkeypatch):
    """Blocks of 64 index rows, the last one short: one after another, or in one chunk whose blocks are added side by side.
    For G = 1 with dx from spread-out tiles, and from lists of places."""
    from fanin.kernels.triton import Triton, plan

    monkeypatch.setattr(plan, "_SMALL", 256)
    monkeypatch.setattr(plan, "_SPREAD", spread)
    labels, width, fan_in, batch, group = shape
    own = plan.Plan(labels, width, fan_in, group, batch)
    chunk = own.chunk(scratch, True)
    assert chunk == 64 * group if scratch == 1 else chunk >= labels and own.slices(chunk) > 1
    check_step(Triton(scratch_bytes=scratch), "cpu", shape, steps=1)


@inside
def test_more_labels_than_topk_keeps_tiles_of(backend, monkeypatch):
    from fanin.kernels.triton import configs

    monkeypatch.setattr(configs, "TOPK_LABELS", 1)  # parts of 3 tiles, since the 3 best are asked for
    monkeypatch.setattr(configs, "PICK_BYTES", 2 * 3 * 64 * 4)  # documents by twos
    for shape, count in (((200, 20, 3, 3, 1), 3), ((30, 20, 3, 3, 4), 30)):
        layer, x, *_ = case(*shape)
        scores, labels = backend.topk(x, layer, count)
        z = backend.logits(x, layer)
        torch.testing.assert_close(scores, z.topk(count, dim=1).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(z.gather(1, labels), scores, rtol=1e-5, atol=1e-5)


@inside
@pytest.mark.parametrize("group", [1, 4])
def test_topk_names_labels_that_there_are_where_a_bias_takes_labels_out(backend, group):
    layer, x, *_ = case(30, 20, 3, 3, group)
    layer.bias[2:] = -torch.inf
    torch.set_default_dtype(torch.bfloat16)  # which is nobody's business
    try:
        scores, labels = backend.topk(x, layer, 30)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(row.sort().values.tolist() == list(range(30)) for row in labels)
    assert labels[:, :2].max() < 2
    assert (scores[:, 2:] == -torch.inf).all()


@inside
def test_a_wide_index(backend):
    from fanin.kernels.triton import Triton

    check_step(Triton(deterministic=False), "cpu", (40, 70000, 5, 3, 1), steps=1)
    check_step(backend, "cpu", (40, 30, 5, 3, 1), steps=1, wide=True)
    check_step(backend, "cpu", (40, 30, 5, 3, 4), steps=1, wide=True)


@inside
@pytest.mark.parametrize("shape", [(35, 100, 32, 5, 1), (37, 48, 8, 5, 16)])
def test_features_that_are_given(backend, shape):
    check_given_features(backend, "cpu", shape)


@inside
@pytest.mark.parametrize("group", [1, 8])
def test_rewiring_in_place_is_seen(backend, group):
    layer, x, *_ = case(40, 50, 6, 5, group)
    order = backend.orders.get(layer.index, 50, 64)
    assert backend.orders.get(layer.part(0, 40).index, 50, 64) is order
    g = torch.randn(5, 40)
    before = backend.gradients(x, g, layer)[0]
    layer.index[:] = torch.rand(len(layer.index), 50).topk(6, dim=1).indices.to(torch.uint16)
    assert backend.orders.get(layer.index, 50, 64) is not order
    after, exact = backend.gradients(x, g, layer)[0], clone(layer, wide=True)
    from fanin.kernels.reference import Reference

    assert error(after, Reference().gradients(x.double(), g.double(), exact)[0]) < 2e-6
    assert error(before, after) > 0.1


@inside
def test_orders_are_forgotten_with_their_index(backend):
    for seed in range(3):
        layer, x, *_ = case(40, 50, 6, 5, 8, seed=seed)
        backend.gradients(x, torch.randn(5, 40), layer)
        del layer
        gc.collect()
    assert len(backend.orders._kept) == 1
    with torch.inference_mode():
        layer, x, *_ = case(40, 50, 6, 5, 8)
        backend.gradients(x, torch.randn(5, 40), layer)
    assert len(backend.orders._kept) == 1


@inside
def test_the_same_bits_twice(backend):
    from fanin.kernels import Update

    results = []
    for _ in range(2):
        layer, x, labels, documents = case(21, 48, 17, 20, 1, weights=BF16, momentum=BF16)
        dx, loss = backend.step(x, layer, labels, documents, Update(lr=0.1, momentum=0.9, seed=4), want_loss=True)
        results.append((dx, loss, layer.weight, layer.momentum, layer.bias))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@inside
@pytest.mark.parametrize("dtype", [BF16, FP8])
@pytest.mark.parametrize("stochastic", [True, False])
def test_rounding_bit_for_bit(dtype, stochastic):
    from fanin.kernels import Layer
    from fanin.kernels.layer import mix, random_bits, store
    from fanin.kernels.triton.job import raw, seeds
    from triton_probe import encoded

    size = 2**14
    scales = torch.exp2(torch.linspace(-24, 12, size))
    values = (torch.randn(size) * scales).view(size // 8, 8)
    values[0] = torch.tensor([0.0, -0.0, 448, 464, 1e9, -1e9, 2**-6, -(2.0**-10)])
    for first, seed in ((0, 0), (2**29 - 100, 7), (2**59, 123456789)):
        layer = Layer(torch.empty(size // 8, 8, dtype=dtype), torch.zeros(size // 8, 8, dtype=torch.int32), first=first)
        store(layer.weight, values, random_bits(mix(seed), layer) if stochastic else None)
        found = torch.empty_like(layer.weight)
        encoded[(size // 1024,)](
            values, raw(found, True), torch.tensor([first * 8]), seeds(seed)[0], STOCHASTIC=stochastic, SIZE=1024
        )
        assert torch.equal(raw(found, True), raw(layer.weight, True))


@inside
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_decoding_every_code(dtype):
    from triton_probe import decoded

    codes = torch.arange(-(2**15), 2**15).to(torch.int16) if dtype == BF16 else torch.arange(256).to(torch.uint8)
    out = torch.empty(len(codes))
    decoded[(len(codes) // 256,)](codes, out, SIZE=256)
    torch.testing.assert_close(out, codes.view(dtype).float(), rtol=0, atol=0, equal_nan=True)


@inside
def test_addresses_past_2_31():
    from triton_probe import begins

    rows = torch.tensor([0, 1, 2**22, 2**31 - 1, 123456789, 5, 7, 2**30], dtype=torch.int32)
    out = torch.empty(8, dtype=torch.int64)
    begins[(1,)](rows, 512, out, SIZE=8)
    assert out.tolist() == [row * 512 for row in rows.tolist()]
    begins[(1,)](rows.to(torch.int64) * 2**10, 512, out, SIZE=8)
    assert out.tolist() == [row * 2**10 * 512 for row in rows.tolist()]
    narrow = rows.to(torch.uint16)
    begins[(1,)](narrow, 2**20, out, SIZE=8)
    assert out.tolist() == [row * 2**20 for row in narrow.tolist()]


@inside
def test_bad_input_leaves_the_weights(backend):
    from fanin.kernels import Update

    layer, x, labels, documents = case(20, 30, 4, 5, 1)
    before = layer.weight.clone()
    update = Update(lr=0.1)
    with pytest.raises(ValueError, match=r"index is float32; expected one of uint16, int32"):
        backend.step(x, dataclasses.replace(layer, index=layer.index.float()), labels, documents, update)
    with pytest.raises(ValueError, match=r"loss 'hinge' is not one of bce, squared_hinge"):
        backend.step(x, layer, labels, documents, update, "hinge")
    with pytest.raises(ValueError, match=r"k is 21; expected 1 to 20"):
        backend.topk(x, layer, 21)
    with pytest.raises(ValueError, match=r"g is \[5, 19\] on cpu; expected \[5, 20\]"):
        backend.gradients(x, torch.zeros(5, 19), layer)
    assert torch.equal(layer.weight, before)
