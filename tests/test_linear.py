"""FixedFanInLinear against nn.Linear's behaviour: a dense weight with zeros, in float64, is the truth."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fanin import kernels
from fanin.linear import FixedFanInLinear, operators
from linear_layers import D, K, L, assert_valid, dense, make

ON_CPU = [(name, "cpu") for name in ("auto", "reference", "torch", "cpu")]
PLACES = [*ON_CPU, pytest.param("auto", "cuda", marks=pytest.mark.gpu), pytest.param("triton", "cuda", marks=pytest.mark.gpu)]


def run(function, *inputs):
    """Output, and the gradients of a fixed function of it for all inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    z = function(*inputs)
    torch.manual_seed(7)
    z.backward(torch.randn(z.shape, dtype=torch.float64).to(z))
    return [z.detach(), *(tensor.grad for tensor in inputs)]


def truth(layer: FixedFanInLinear, x: torch.Tensor):
    double = [tensor.detach().double() for tensor in (x, layer.weight, layer.bias)]
    return run(lambda x, weight, bias: F.linear(x, dense(layer, weight), bias), *double)


def of(layer: FixedFanInLinear, x: torch.Tensor):
    return run(
        lambda x, weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,)),
        x,
        layer.weight,
        layer.bias,
    )


def skip_unless_available(backend: str, device: str, dtype: torch.dtype) -> None:
    try:
        kernels.backend(backend, device, dtype)
    except kernels.Unavailable as reason:
        pytest.skip(str(reason))


# arithmetic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(D,), (1, D), (6, D), (2, 3, D), (2, 0, D)])
@pytest.mark.parametrize("group", [1, 4, 64])
@pytest.mark.parametrize(("backend", "device"), PLACES)
def test_against_dense_float32(backend, device, group, shape):
    skip_unless_available(backend, device, torch.float32)
    layer, x = make(group, torch.float32, backend).to(device), torch.randn(shape, device=device)
    result, expected = of(layer, x), truth(layer, x)
    assert result[0].shape == (*shape[:-1], L)
    for own, true in zip(result, expected, strict=True):
        assert own.dtype == torch.float32
        assert own.is_contiguous()
        torch.testing.assert_close(own.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES if place not in (("cpu", "cpu"),)])
def test_other_types(backend, device, dtype, tolerance):
    skip_unless_available(backend, device, dtype)
    if backend == "triton" and dtype in (torch.float64, torch.float16):
        pytest.skip("triton kernels take float32 and bfloat16")
    layer, x = make(4, dtype, backend).to(device), torch.randn(6, D, dtype=dtype, device=device)
    for own, true in zip(of(layer, x), truth(layer, x), strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), true, rtol=tolerance, atol=2 * tolerance)


def test_no_bias_and_many_features():
    layer = FixedFanInLinear(70_000, 3, 4, bias=False, dtype=torch.float64)
    assert layer.index.dtype == torch.int32
    assert list(layer.state_dict()) == ["weight", "index"]
    layer.index = torch.tensor([[0, 69_999, 5, 65_536]] * 3)
    x = torch.randn(2, 70_000, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ dense(layer).t())


def test_strided_input_and_expanded_gradient():
    layer = make(dtype=torch.float32, backend="auto")
    x = torch.randn(D, 6).t().requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense(layer).sum(0).expand(6, D))


def test_backward_computes_only_what_is_needed(monkeypatch):
    asked = []
    original = kernels.Reference.gradients
    monkeypatch.setattr(kernels.Reference, "gradients", lambda *a: asked.append(a[4:]) or original(*a))
    layer, x = make(), torch.randn(3, D, dtype=torch.float64)
    layer(x).sum().backward()
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_()).sum().backward()
    layer(x.detach()).sum().backward()  # bias alone
    assert asked == [(False, True), (True, False)]


@pytest.mark.parametrize("group", [1, 4])
def test_gradients_of_gradients(group):
    layer, x = make(group), torch.randn(3, D, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    inputs = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradient_penalty():
    layer, x = make(4), torch.randn(3, D, dtype=torch.float64)

    def penalty(function):
        def of(x, weight, bias):
            (slope,) = torch.autograd.grad(function(x, weight, bias).square().sum(), x, create_graph=True)
            return slope.square().sum()

        return run(of, x, layer.weight, layer.bias)

    own = penalty(lambda x, weight, bias: torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,)))
    true = penalty(lambda x, weight, bias: F.linear(x, dense(layer, weight), bias))
    torch.testing.assert_close(own, true)


# torch's own tests of operators, compilation, autocast ----------------------------------------------------------------


@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("torch", torch.float32), ("cpu", torch.float32)])
def test_opcheck(backend, dtype):
    skip_unless_available(backend, "cpu", dtype)
    layer, x = make(4, dtype, backend), torch.randn(3, D, dtype=dtype, requires_grad=True)
    for bias in (layer.bias, None):
        torch.library.opcheck(operators.forward, (x, layer.weight, layer.index, bias, 4, backend))
    g = torch.randn(3, L, dtype=dtype, requires_grad=True)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(operators.backward, (g, x, layer.weight, layer.index, 4, backend, *needs))


def compiled(compiler: str, autocast: bool) -> None:
    model = nn.Sequential(nn.Linear(8, D), nn.ReLU(), make(4, torch.float32, "auto"))
    torch.compiler.reset()
    fast = torch.compile(model, fullgraph=True, backend=compiler)
    for rows in (6, 3):
        x = torch.randn(rows, 8)
        results = []
        for function in (model, fast):
            model.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z = function(x)
            z.float().square().sum().backward()
            assert z.dtype == (torch.bfloat16 if autocast else torch.float32)
            results.append([z, *(parameter.grad for parameter in model.parameters())])
        torch.testing.assert_close(*results, rtol=2e-2 if autocast else 1e-5, atol=5e-2 if autocast else 1e-5)
        model[-1].rewire(0.4)
    with torch.compiler.set_stance("fail_on_recompile"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)  # rewiring was in place


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_without_graph_breaks(autocast):
    compiled("aot_eager", autocast)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_with_inductor(autocast):
    compiled("inductor", autocast)


def test_capture_refuses_a_compiled_model():
    layer = make(dtype=torch.float32)
    fast = torch.compile(layer, fullgraph=True, backend="eager")
    with layer.capture(), pytest.raises(Exception, match="_orig_mod"):
        fast(torch.randn(2, D))


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "cpu"])
def test_autocast(backend):
    skip_unless_available(backend, "cpu", torch.float32)
    layer, x = make(4, torch.float32, backend), torch.randn(6, D)
    exact = truth(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        linear = F.linear(x, dense(layer), layer.bias)
        z, *gradients = of(layer, x)
        assert make()(x.double()).dtype == torch.float64  # as nn.Linear: autocast leaves float64 alone
    assert z.dtype == linear.dtype == torch.bfloat16
    torch.testing.assert_close(z.double(), exact[0], rtol=2e-2, atol=2e-2)
    # no worse than the dense layer, which rounds the weights too
    assert (z.double() - exact[0]).norm() <= (linear.double() - exact[0]).norm()
    for own, true in zip(gradients, exact[1:], strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), true, rtol=3e-2, atol=5e-2)


# nn.Module's manners ------------------------------------------------------------------------------------------------


def test_start_is_random_bounded_and_repeatable():
    layer, same = make(4), make(4)
    assert_valid(layer)
    assert layer.index.dtype == torch.uint16
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), same.state_dict().values(), strict=True))
    bound = K**-0.5
    assert 0.9 * bound < layer.weight.abs().max() <= bound
    before = layer.index.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.index, before)
    assert_valid(layer)


def test_casts_leave_the_index_alone():
    layer = make()
    index = layer.index.clone()
    for cast in (
        layer.half,
        layer.double,
        layer.bfloat16,
        lambda: layer.to("cpu", torch.float32),
        lambda: layer.type(torch.half),
    ):
        cast()
        assert layer.index.dtype == torch.uint16
        assert torch.equal(layer.index, index)
    assert layer.weight.dtype == torch.float16
    layer.to_empty(device="cpu")
    assert torch.equal(layer.index, index)


def test_meta_device_and_skip_init():
    layer = make(device="meta")
    assert layer(torch.empty(2, D, dtype=torch.float64, device="meta")).shape == (2, L)
    source = make()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, D, dtype=torch.float64)
    assert torch.equal(layer(x), source(x))
    assert_valid(make(4, device="meta").to_empty(device="cpu"))
    assert_valid(nn.utils.skip_init(FixedFanInLinear, D, L, fan_in=K))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_apart(duplicate):
    layer = make(4)
    twin = duplicate(layer)
    x = torch.randn(2, D, dtype=torch.float64)
    assert torch.equal(layer(x), twin(x))
    before = layer(x)
    twin.rewire(0.5)
    assert torch.equal(layer(x), before)
    assert not torch.equal(twin(x), before)


def test_state_dict_through_a_file(tmp_path):
    model, other = nn.Sequential(make(4)), nn.Sequential(make(4))
    other[0].reset_parameters()
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.index"]
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    x = torch.randn(2, D, dtype=torch.float64)
    assert torch.equal(model(x), other(x))


def spoilt(index: torch.Tensor, what: str) -> torch.Tensor:
    index = index.to(torch.int64)
    if what == "high":
        index[3, 1] = D
    elif what == "low":
        index[3, 1] = -1
    elif what == "repeated":
        index[3, 1] = index[3, 4]
    elif what == "float":
        return index.double()
    elif what == "shape":
        return index[:-1]
    return index


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("high", rf"index row 3 holds {D}, outside 0\.\.{D - 1}"),
        ("low", "index row 3 holds -1, outside"),
        ("repeated", "index row 3 holds .* twice"),
        ("float", r"index is torch\.float64"),
        ("shape", rf"index is \[{L - 1}, {K}\], but the layer needs \[{L}, {K}\]"),
    ],
)
def test_a_bad_index_is_refused_and_nothing_is_loaded(what, message):
    layer = make()
    before = copy.deepcopy(layer.state_dict())
    state = {"weight": torch.zeros(L, K), "bias": torch.zeros(L), "index": spoilt(layer.index, what)}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state, assign=assign)
    with pytest.raises(ValueError, match=message):
        layer.index = state["index"]
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_weights_of_another_shape_leave_the_index_alone():
    """33 and 34 outputs in groups of four have index rows alike."""
    layer, other = (FixedFanInLinear(D, outputs, K, 4) for outputs in (33, 34))
    before = layer.index.clone()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.index, before)


def test_missing_and_unexpected_keys():
    layer = make()
    state = layer.state_dict()
    del state["index"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"index"'):
        layer.load_state_dict(state)
    assert layer.load_state_dict(state, strict=False).missing_keys == ["index"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
        layer.load_state_dict({**layer.state_dict(), "other": torch.zeros(1)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fan_in": 0}, "fan_in must be 1 to 40.*found 0"),
        ({"fan_in": 41}, "fan_in must be 1 to 40.*found 41"),
        ({"in_features": 1000, "fan_in": 513}, "fan_in must be 1 to 512.*found 513"),
        ({"out_features": 0}, "out_features and group must be 1 or more, found 0"),
        ({"group": 0}, "out_features and group must be 1 or more"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be one of"),
        ({"backend": "fast"}, "backend 'fast' is not one of auto, reference"),
    ],
)
def test_bad_sizes(settings, message):
    with pytest.raises(ValueError, match=message):
        FixedFanInLinear(**{"in_features": D, "out_features": L, "fan_in": K, **settings})


def test_bad_input():
    layer = make(dtype=torch.float32)
    for shape in ((), (3,), (2, D + 1)):
        with pytest.raises(ValueError, match=r"x must be \[\.\., 40\]"):
            layer(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"x is torch\.float64 but the weight torch\.float32"):
        layer(torch.zeros(2, D, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        layer(torch.zeros(2, D, dtype=torch.int64))
    with pytest.raises(ValueError, match="x is on meta but the layer on cpu"):
        layer(torch.zeros(2, D, device="meta"))


def test_outputs_can_be_changed_in_place():
    layer = make()
    for shape in ((D,), (6, D), (2, 3, D)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        layer(x).relu_().sum().backward()
        own, x.grad = x.grad, None
        F.linear(x, dense(layer), layer.bias).relu_().sum().backward()
        torch.testing.assert_close(own, x.grad)


def test_capture_sees_the_gradient_of_what_is_changed_in_place_and_of_a_named_input():
    layer = make()
    for shape in ((D,), (6, D), (2, 3, D)):
        x = torch.randn(shape, dtype=torch.float64)
        with layer.capture() as seen:
            z = layer(x=x).relu_()
            z.sum().backward()
        assert torch.equal(seen.x, x)
        assert torch.equal(seen.grad_output, (z > 0).double())


def test_forward_mode_is_refused():
    layer, x = make(), torch.randn(3, D, dtype=torch.float64)
    for call in (torch.func.jacfwd(layer), lambda x: torch.func.jvp(layer, (x,), (x,))):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(x)


def test_repr():
    expected = "in_features=40, out_features=37, fan_in=5, group=4, bias=True"
    assert make(4).extra_repr() == expected
