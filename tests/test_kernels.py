"""Every backend that runs here against dense arithmetic and torch.optim.SGD in float64, and what all share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

import layer_cases
from fanin import kernels
from fanin.kernels import BACKENDS, Layer, Unavailable, Update, backend
from fanin.kernels.layer import decode, mix, random_bits, store
from fanin.kernels.reference import expand
from layer_cases import BF16, FP8, FP32, SHAPES, clone, error

ANY_FLOAT = ("reference", "torch")
case = functools.partial(layer_cases.case, momentum=FP32, rounded=False)


def needs(name: str):
    """The backend, or a skip that says why it cannot run."""
    if name == "triton":
        pytest.skip("tests/test_triton.py has it, in the interpreter")
    try:
        return backend(name)
    except Unavailable as reason:
        pytest.skip(str(reason))


def densified(layer: Layer, width: int) -> torch.Tensor:
    """[L, D] float64: only a test may do that."""
    rows = expand(layer.index, layer.labels, layer.group)
    return torch.zeros(layer.labels, width, dtype=torch.float64).scatter(1, rows, decode(layer.weight).double())


def close(found, expected, tolerance=1e-5):
    assert error(found, expected) <= tolerance


@pytest.mark.parametrize("loss", ["bce", "squared_hinge"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_three_steps_equal_autograd_and_sgd(name, shape, loss):
    module = needs(name)
    layer, x, labels, documents = case(*shape)
    y = torch.zeros(len(x), layer.labels, dtype=torch.float64)
    y[documents, labels] = 1
    weight = densified(layer, x.shape[1]).requires_grad_()
    bias = layer.bias.double().requires_grad_()
    mask = densified(dataclasses.replace(layer, weight=torch.ones_like(layer.weight)), x.shape[1])
    optimizer = torch.optim.SGD([{"params": [weight], "weight_decay": 0.01}, {"params": [bias]}], lr=0.05, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = densified(dataclasses.replace(layer, weight=layer.momentum), x.shape[1])
    optimizer.state[bias]["momentum_buffer"] = layer.bias_momentum.double()
    for seed in range(3):
        batch = (x * (1 + seed)).double().requires_grad_()
        z = batch @ weight.t() + bias
        if loss == "bce":
            value = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
        else:
            value = (1 - z * (2 * y - 1)).clamp(min=0).square().sum()
        optimizer.zero_grad()
        value.backward()
        for parameter in (weight, bias):
            parameter.grad *= 0.5
        weight.grad *= mask
        before = z.detach()
        given = x * (1 + seed)
        close(module.logits(given, layer), before)
        update = Update(lr=0.05, momentum=0.9, weight_decay=0.01, scale=0.5, seed=seed)
        dx, found = module.step(given, layer, labels, documents, update, loss, want_loss=True)
        optimizer.step()
        close(dx, batch.grad)
        close(found, value.detach())
        close(densified(layer, x.shape[1]), weight.detach())
        close(layer.bias, bias.detach())
    close(layer.bias_momentum, optimizer.state[bias]["momentum_buffer"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_equal_autograd(name, shape):
    module = needs(name)
    layer, x, _, _ = case(*shape)
    g = torch.randn(len(x), layer.labels, generator=torch.Generator().manual_seed(1))
    dense = densified(layer, x.shape[1])
    dx, dw = module.gradients(x, g, layer)
    close(dx, g.double() @ dense)
    rows = expand(layer.index, layer.labels, layer.group)
    close(dw, (g.double().t() @ x.double()).gather(1, rows))
    assert module.gradients(x, g, layer, need_x=False)[0] is None
    assert module.gradients(x, g, layer, need_weight=False)[1] is None
    assert module.gradients(x, g, layer, need_x=False, need_weight=False) == (None, None)
    close(module.gradients(x, g, layer, need_weight=False)[0], dx)
    close(module.gradients(x, g, layer, need_x=False)[1], dw)


@pytest.mark.parametrize("name", ANY_FLOAT)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_torch_in_fp64_is_exact(name, shape):
    layer, x, _, _ = case(*shape)
    wide = clone(layer, wide=True)
    close(backend(name).logits(x.double(), wide), x.double() @ densified(layer, x.shape[1]).t() + layer.bias.double(), 1e-14)


@pytest.mark.parametrize("shape", [(70, 48, 7, 5, 1), (3000, 300, 32, 64, 1), (3000, 300, 40, 70, 16), (500, 64, 33, 3, 64)])
@pytest.mark.parametrize("name", BACKENDS)
def test_topk_is_exact(name, shape):
    module = needs(name)
    layer, x, _, _ = case(*shape)
    z = module.logits(x, layer)
    for k in (1, 5, layer.labels):
        scores, labels = module.topk(x, layer, k)
        assert torch.equal(scores, z.topk(k, dim=1).values)
        assert torch.equal(z.gather(1, labels), scores)
        assert all(len(row.unique()) == k for row in labels)


@pytest.mark.parametrize("shape", [(70, 48, 7, 5, 1), (70, 48, 8, 5, 4)])
@pytest.mark.parametrize("name", BACKENDS)
def test_topk_of_logits_that_are_minus_infinity_names_labels_that_there_are(name, shape):
    """Such a bias takes a label out; what fills the last tile up must not tie with it."""
    module = needs(name)
    layer, x, _, _ = case(*shape)
    layer.bias[3:] = -torch.inf
    scores, labels = module.topk(x, layer, layer.labels)
    assert all(row.sort().values.tolist() == list(range(layer.labels)) for row in labels)
    assert labels[:, :3].max() < 3
    assert (scores[:, 3:] == -torch.inf).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float64])
@pytest.mark.parametrize("name", BACKENDS)
def test_torchs_default_type_decides_nothing(name, dtype):
    module = needs(name)
    layer, x, labels, documents = case(300, 64, 8, 20, 4)
    update = Update(lr=0.05, momentum=0.9)

    def results() -> list[torch.Tensor]:
        own = clone(layer)
        dx, loss = module.step(x, own, labels, documents, update, want_loss=True)
        z = module.logits(x, own)
        found = [module.topk(x, own, 9)[0], module.candidates(x, own, labels, documents, 3)]
        return [dx, loss, z, own.weight, *module.gradients(x, z, own), *found]

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        found = results()
    finally:
        torch.set_default_dtype(FP32)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("kahan", [False, True])
@pytest.mark.parametrize("momentum", [None, BF16, FP32])
@pytest.mark.parametrize("weights", [BF16, FP8])
@pytest.mark.parametrize("name", ["cpu", "torch"])
def test_low_precision_steps_round_as_the_reference_does(name, weights, momentum, kahan):
    """The same random bits, so all but a few that lie on an edge round alike; for those the codes differ by one step."""
    module = needs(name)
    for shape in ((300, 200, 24, 20, 16), (120, 90, 11, 7, 1)):
        layer, x, labels, documents = case(*shape, weights=weights, momentum=momentum, kahan=kahan)
        if layer.group > 1 and getattr(module, "bfloat16_units", False):
            continue  # products of rounded numbers: the next test
        ours, theirs = clone(layer), clone(layer)
        stored = [name for name in ("weight", "momentum") if getattr(layer, name) is not None]
        largest = {name: getattr(layer, name).float().abs() for name in stored}  # that each entry has been
        for seed in range(2):
            update = Update(lr=0.1, momentum=0.9, weight_decay=0.01, scale=0.5, seed=seed)
            dx, _ = module.step(x, ours, labels, documents, update)
            expected, _ = backend("reference").step(x, theirs, labels, documents, update)
            close(dx, expected, 1e-3)
            largest = {name: torch.maximum(size, getattr(theirs, name).float().abs()) for name, size in largest.items()}
        for name in stored:
            one, two = getattr(ours, name), getattr(theirs, name)
            if one.dtype != FP32:
                apart, number = (one.float() - two.float()).abs(), torch.finfo(one.dtype)
                assert (apart > 0).float().mean() < 0.01
                # one rounding for each step; a momentum that falls since keeps the one of its size before
                assert (apart <= 2 * number.eps * largest[name].clamp_min(number.tiny)).all()
        assert (ours.weight.float() != layer.weight.float()).float().mean() > 0.5
        if kahan:
            close(ours.weight.float() + ours.compensation.float(), theirs.weight.float() + theirs.compensation.float(), 1e-3)


ROUNDED = [(300, 200, 32, 64, 16), (77, 90, 11, 7, 8), (203, 150, 48, 100, 64), (50, 40, 5, 33, 2), (130, 90, 40, 41, 32)]


@pytest.mark.parametrize("weights", [BF16, FP8])
@pytest.mark.parametrize("shape", ROUNDED)
def test_bfloat16_units_sum_products_of_rounded_numbers(shape, weights):
    """Ragged batches, groups and K; dL/dz tips over the edge between two bfloat16 in a few places."""
    module = needs("cpu")
    if not module.bfloat16_units:
        pytest.skip("needs a processor with AVX512_BF16")
    layer, x, labels, documents = case(*shape, weights=weights, momentum=FP32)
    layer.momentum.zero_()
    dense, near = densified(layer, x.shape[1]), x.bfloat16().double()
    y = torch.zeros(len(x), layer.labels, dtype=torch.float64)
    y[documents, labels] = 1
    g = ((near @ dense.t() + layer.bias.double()).sigmoid() - y).float().bfloat16().double()
    gradient = (g.t() @ near).gather(1, expand(layer.index, layer.labels, layer.group))
    for learnt in (None, x.shape[1] // 2):
        own, update = dataclasses.replace(clone(layer), learnt=learnt), Update(lr=0.1, momentum=0.9, seed=4)
        dx, _ = module.step(x, own, labels, documents, update)
        close(dx, (g @ dense)[:, :learnt], 5e-4)
        close(own.momentum, gradient, 5e-4)
        expected = torch.empty_like(own.weight)
        store(expected, decode(layer.weight) - 0.1 * own.momentum, random_bits(update.seeds()[0], layer))
        assert (own.weight.float() != expected.float()).float().mean() < 0.01  # 0.1 g may be rounded once or twice
        assert (own.weight.float() != layer.weight.float()).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_stochastic_rounding_is_unbiased_and_between_neighbours(dtype):
    values = torch.cat([torch.linspace(-1, 1, 257), torch.tensor([0.0, 1e-3, 3e-3, -0.0101, 447.0, 500.0, 2.0**-9])])
    wide = values.repeat(4000, 1)
    layer = Layer(weight=torch.empty(wide.shape, dtype=dtype), index=torch.empty(0))
    store(layer.weight, wide.clone(), random_bits(mix(1), layer))
    rounded = layer.weight.float()
    inside = values.clamp(-448, 448) if dtype == FP8 else values
    gap = (rounded - inside).abs().max(dim=0).values
    step = torch.maximum(inside.abs() * (2.0**-3 if dtype == FP8 else 2.0**-7), torch.tensor(2.0**-9))
    assert (gap <= step).all()
    error = (rounded.double().mean(0) - inside.double()).abs()
    assert (error <= 5 * step / 2 / 4000**0.5).all()
    exact = decode(torch.tensor([0.5, -0.25, 0.0]).to(dtype))
    store(part := torch.empty(3, dtype=dtype), exact.clone(), torch.full((3,), 0xFFFFFFFF))
    assert torch.equal(part.float(), exact)  # what can be stored is not moved


def test_random_bits_do_not_depend_on_how_a_layer_is_cut():
    layer, *_ = case(64, 48, 7, 5, 16)
    whole = random_bits(mix(5), layer)
    assert torch.equal(torch.cat([random_bits(mix(5), part) for part in layer.parts(16)]), whole)
    far = dataclasses.replace(layer, first=2**33)
    assert not torch.equal(random_bits(mix(5), far), whole)
    assert whole.min() >= 0
    assert whole.max() < 2**32
    assert len(whole.unique()) == whole.numel()


@pytest.mark.parametrize("name", BACKENDS)
def test_a_step_sees_a_rewired_index(name):
    """Nothing about the index may be kept from the step before."""
    module = needs(name)
    layer, x, labels, documents = case(203, 300, 32, 20, 1)
    module.step(x, layer, labels, documents, Update(lr=0.1, momentum=0.9))
    layer.index.copy_(case(203, 300, 32, 20, 1, seed=9)[0].index)
    fresh = clone(layer)
    found, _ = module.step(x, layer, labels, documents, Update(lr=0.1, momentum=0.9))
    expected, _ = backend("reference").step(x, fresh, labels, documents, Update(lr=0.1, momentum=0.9))
    close(found, expected)
    close(layer.weight, fresh.weight)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_positives_no_bias_no_momentum(name):
    module = needs(name)
    layer, x, *_ = case(70, 48, 7, 5, 1)
    layer = dataclasses.replace(layer, bias=None, bias_momentum=None, momentum=None)
    wide = clone(layer, wide=True)
    none = torch.empty(0, dtype=torch.int64)
    dx, _ = module.step(x, layer, none, none, Update(lr=0.1))
    expected, _ = backend("reference").step(x.double(), wide, none, none, Update(lr=0.1))
    close(dx, expected)
    close(layer.weight, wide.weight)


@pytest.mark.parametrize("group", [1, 16])
def test_cpu_gives_the_same_bits_on_one_and_two_threads(group):
    module = needs("cpu")
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 2):
            torch.set_num_threads(number)
            layer, x, labels, documents = case(20_001, 100, 24, 70, group, weights=BF16, momentum=BF16)
            dx, loss = module.step(x, layer, labels, documents, Update(lr=0.1, momentum=0.9, seed=3), want_loss=True)
            scores, rows = module.topk(x, layer, 9)
            g = torch.randn(len(x), layer.labels, generator=torch.Generator().manual_seed(1))
            found.append(
                [
                    dx,
                    loss,
                    layer.weight.float(),
                    layer.momentum.float(),
                    layer.bias,
                    scores,
                    rows,
                    *module.gradients(x, g, layer),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_cpu_writes_nothing_outside_its_tensors():
    """Every tensor that a step writes lies between guards that must not change, at sizes that fill no whole vector."""
    module = needs("cpu")
    for shape, weights in itertools.product(((37, 50, 7, 5, 1), (37, 50, 9, 17, 16), (200, 60, 21, 67, 8)), (FP32, BF16)):
        layer, x, labels, documents = case(*shape, weights=weights)
        names = ("weight", "bias", "momentum", "bias_momentum")
        guarded = {n: torch.full((getattr(layer, n).numel() + 128,), 7.0, dtype=getattr(layer, n).dtype) for n in names}
        views = {n: guarded[n][64:-64].view(getattr(layer, n).shape) for n in names}
        for n in names:
            views[n].copy_(getattr(layer, n))
        dx, _ = module.step(x, dataclasses.replace(layer, **views), labels, documents, Update(lr=0.1, momentum=0.9))
        expected, _ = module.step(x, layer, labels, documents, Update(lr=0.1, momentum=0.9))
        assert torch.equal(dx, expected)  # whatever the alignment
        for n in names:
            assert torch.equal(views[n], getattr(layer, n))
            assert (guarded[n][:64] == 7).all()
            assert (guarded[n][-64:] == 7).all()


def test_float8_and_bfloat16_codes_are_read_alike():
    """Every finite code of float8 and many of bfloat16, through one feature of one document."""
    module = needs("cpu")
    codes = torch.arange(256, dtype=torch.uint8)
    for weight in (codes[(codes & 0x7F) < 0x7F].view(FP8), torch.randn(999).to(BF16)):
        layer = Layer(weight=weight[:, None], index=torch.zeros(len(weight), 1, dtype=torch.uint16))
        assert torch.equal(module.logits(torch.ones(1, 1), layer)[0], weight.float())


def test_unknown_and_unavailable_backends(monkeypatch):
    with pytest.raises(ValueError, match=r"kernel backend 'cuda' is not one of auto, reference, torch, cpu, triton"):
        backend("cuda")

    def absent(name):
        if name == "cpu":
            raise Unavailable("kernel backend cpu needs a C++ compiler")
        return whole(name)

    whole = kernels._load
    monkeypatch.setattr(kernels, "_load", absent)
    kernels._fastest.cache_clear()
    try:
        with pytest.raises(Unavailable, match="needs a C"):
            backend("cpu")
        with pytest.warns(RuntimeWarning, match="falling back to slower kernels in plain torch"):
            assert backend().name == "torch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert backend().name == "torch"  # it is said once
    finally:
        kernels._fastest.cache_clear()
    assert backend(dtype=torch.float64).name == "torch"


def test_a_named_backend_for_what_it_cannot_take():
    with pytest.raises(Unavailable, match=r"cpu takes weights in float32, bfloat16 or float8_e4m3fn, found torch.float64"):
        backend("cpu", dtype=torch.float64)
    with pytest.raises(Unavailable, match="kernel backend cpu works on a CPU, but the weights are on cuda"):
        backend("cpu", "cuda")


@pytest.mark.parametrize("shape", [(70, 48, 7, 5, 1), (203, 300, 32, 70, 16), (40, 30, 28, 9, 8), (64, 5000, 8, 3, 1)])
@pytest.mark.parametrize("name", BACKENDS)
def test_candidates_are_the_largest_dense_gradients(name, shape):
    """Against the dense gradient of autograd in float64; a row that lacks free features says so."""
    module = needs(name)
    layer, x, labels, documents = case(*shape)
    width, group = x.shape[1], layer.group
    y = torch.zeros(len(x), layer.labels, dtype=torch.float64)
    y[documents, labels] = 1
    z = x.double() @ densified(layer, width).t() + layer.bias.double()
    gradient = (z.sigmoid() - y).t() @ x.double()
    size = F.pad(gradient.square(), (0, 0, 0, -layer.labels % group)).unflatten(0, (-1, group)).sum(1)
    rows = layer.index.long()
    size.scatter_(1, rows, -1.0)
    count = 5
    found = module.candidates(x, layer, labels, documents, count).long()
    free = width - layer.fan_in
    assert (found[:, free:] == -1).all()
    found = found[:, : min(count, free)]
    assert (found >= 0).all()
    assert (size.gather(1, found) > 0).all()  # none is read already
    close(size.gather(1, found), size.topk(found.shape[1], dim=1).values)


def spoil(layer: Layer, **changes) -> Layer:
    return dataclasses.replace(layer, **{name: change(getattr(layer, name)) for name, change in changes.items()})


BAD_LAYERS = {
    "index is .*expected": {"index": lambda t: t[:-1]},
    "index is int64": {"index": lambda t: t.long()},
    "index holds feature 48; expected 0 to 47": {"index": lambda t: t.clone().fill_(48)},
    "weight is float64": {"weight": lambda t: t.double()},
    "weight is not contiguous": {"weight": lambda t: t.t().contiguous().t()},
    "bias is .69.; expected .70.": {"bias": lambda t: t[:-1]},
    "momentum is .70, 6.": {"momentum": lambda t: t[:, :-1].contiguous()},
    "weight is on meta but x on cpu": {"weight": lambda t: t.to("meta")},
    "learnt is 49; expected 0 to 48": {"learnt": lambda t: 49},
    "compensation is for weights stored below float32": {"compensation": lambda t: torch.zeros(70, 7, dtype=BF16)},
}
COMPILED = ("index is int64", "weight is float64")  # plain torch takes these


@pytest.mark.parametrize(
    ("name", "message"),
    [(name, message) for name in ("cpu", *ANY_FLOAT) for message in BAD_LAYERS if name == "cpu" or message not in COMPILED],
)
def test_bad_layers_are_refused_before_anything_is_written(name, message):
    module = needs(name)
    layer, x, labels, documents = case(70, 48, 7, 5, 1)
    bad = spoil(layer, **BAD_LAYERS[message])
    before = clone(layer)
    with pytest.raises(ValueError, match=message):
        module.step(x, bad, labels, documents, Update(lr=0.1, momentum=0.9))
    assert all(torch.equal(getattr(layer, n), getattr(before, n)) for n in ("weight", "bias", "momentum", "bias_momentum"))


@pytest.mark.parametrize("name", ["cpu", *ANY_FLOAT])
def test_bad_calls_are_refused(name):
    module = needs(name)
    layer, x, labels, documents = case(70, 48, 7, 5, 1)
    update = Update(lr=0.1, momentum=0.9)
    before = clone(layer)
    wide = Layer(weight=torch.zeros(2, 600), index=torch.arange(600).repeat(2, 1).to(torch.uint16))
    for message, call in {
        r"x is \[5, 48, 1\]": lambda: module.step(x[:, :, None], layer, labels, documents, update),
        "empty batch": lambda: module.step(x[:0], layer, labels[:0], documents[:0], update),
        "fan-in 600 is over the limit of 512": lambda: needs("cpu").logits(torch.zeros(2, 700), wide),
        "fan-in 7 is over the 6 features": lambda: module.logits(x[:, :6], layer),
        "labels of the positives are not sorted": lambda: module.step(x, layer, labels.flip(0), documents, update),
        "positives name label 70": lambda: module.step(x, layer, labels + 1, documents, update),
        "positives name document 5": lambda: module.step(x, layer, labels, documents + 1, update),
        "twice": lambda: module.step(x, layer, labels.repeat_interleave(2), documents.repeat_interleave(2), update),
        "loss 'mse'": lambda: module.step(x, layer, labels, documents, update, "mse"),
        "k is 71": lambda: module.topk(x, layer, 71),
        r"g is \[5, 69\]": lambda: module.gradients(x, torch.zeros(5, 69), layer),
        r"g is \[5, 70\] on meta": lambda: module.gradients(x, torch.zeros(5, 70, device="meta"), layer),
        "count is 0": lambda: module.candidates(x, layer, labels, documents, 0),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(getattr(layer, n), getattr(before, n)) for n in ("weight", "bias", "momentum", "bias_momentum"))


def test_an_index_is_read_again_once_it_has_changed():
    module = needs("cpu")
    layer, x, *_ = case(70, 48, 7, 5, 1)
    module.logits(x, layer)
    module.logits(x, layer.part(10, 20))  # a part of what was found in range
    layer.index[15, 3] = 48
    for part in (layer, layer.part(10, 20)):
        with pytest.raises(ValueError, match="index holds feature 48"):
            module.logits(x, part)
    layer.index[15, 3] = 47
    module.logits(x, layer)
    with pytest.raises(ValueError, match="index holds feature 47"):
        module.logits(x[:, :47], layer)
