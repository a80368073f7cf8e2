"""`FixedFanInLinear`: a sparse linear layer for anyone's model and optimiser, with nn.Linear's manners. See docs/linear.md."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from fanin import kernels, rewiring
from fanin.kernels.layer import FAN_IN_LIMIT, index_dtype
from fanin.linear.operators import autocasts, fixed_fan_in_linear
from fanin.linear.rewire import Captured, capture, magnitude, random_scores, rewire

_CHUNK = 2**22  # elements of a dense gradient made at once: 16 MiB
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class FixedFanInLinear(nn.Module):
    """z[.., l] = bias[l] + sum_k weight[l, k] * x[.., index[l // group, k]]: every output reads only K of the D inputs.

    x [.., D] -> z [.., L]. Parameters weight [L, K] and bias [L]. index [ceil(L / G), K] is saved and moved with them,
    but never cast: uint16 where D <= 65,536, else int32, distinct in each row. `rewire` changes it.

    in_features: D; out_features: L; fan_in: K; group: G, how many consecutive outputs share which inputs they read;
    backend: of fanin.kernels.BACKENDS, or auto; generator: of the random start, on any device.

    Differentiable any number of times. Under autocast x is cast as for nn.Linear and z is of that type, but the weights are
    read as they are. to_empty and skip_init leave weight and bias uninitialised, but draw a valid index.

    Source: fixed fan-in output layers, Schultheis & Babbar, ECML 2023. Raises ValueError for sizes that do not fit.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    index_bytes: Tensor  # index as uint8: torch.distributed cannot send 16-bit integers, as DDP must

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fan_in: int,
        group: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        if out_features < 1 or group < 1:
            raise ValueError(f"out_features and group must be 1 or more, found {out_features} and {group}")
        most = min(in_features, FAN_IN_LIMIT)
        if not 1 <= fan_in <= most:
            raise ValueError(f"fan_in must be 1 to {most} (at most in_features, and {FAN_IN_LIMIT}), found {fan_in}")
        if dtype not in _TYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, _TYPES))}, found {dtype}")
        if backend not in ("auto", *kernels.BACKENDS):
            raise ValueError(f"backend {backend!r} is not one of auto, {', '.join(kernels.BACKENDS)}")
        self.in_features, self.out_features, self.fan_in = in_features, out_features, fan_in
        self.group, self.backend = group, backend
        self._index_type = index_dtype(in_features)
        rows = -(-out_features // group)
        size = fan_in * self._index_type.itemsize
        self.weight = nn.Parameter(torch.empty(out_features, fan_in, device=device, dtype=dtype))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None)
        self.register_buffer("index_bytes", torch.empty(rows, size, device=device, dtype=torch.uint8), persistent=False)
        self.reset_parameters(generator)

    @classmethod
    def from_dense(cls, linear: nn.Linear, fan_in: int, group: int = 1, backend: str = "auto") -> FixedFanInLinear:
        """The largest `fan_in` weights of each output of `linear`, for G > 1 those with the largest norm over the group."""
        dense, bias = linear.weight.detach(), linear.bias
        layer = cls(linear.in_features, linear.out_features, fan_in, group, bias is not None, "meta", dense.dtype, backend)
        layer.weight = nn.Parameter(dense.new_empty(layer.weight.shape))
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        layer.index_bytes = torch.empty(layer.index_bytes.shape, dtype=torch.uint8, device=dense.device)
        with torch.no_grad():
            for start, stop in layer.row_chunks():
                outputs = layer.outputs_of(start, stop)
                rows = magnitude(dense[outputs], group).topk(fan_in, dim=1).indices.sort(dim=1).values
                layer.index[start:stop].copy_(rows)
                chosen = rows.repeat_interleave(group, 0)[: len(dense[outputs])]
                layer.weight[outputs].copy_(dense[outputs].gather(1, chosen))
        return layer.train(linear.training)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the index, and weight and bias as nn.Linear does, with K for the number of inputs."""
        bound = 1 / math.sqrt(self.fan_in)
        self._draw_index(generator)
        for parameter in (self.weight, self.bias):
            if parameter is None or parameter.is_meta:
                continue
            if generator is None or generator.device == parameter.device:
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                drawn = torch.empty(parameter.shape, device=generator.device).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)

    def _draw_index(self, generator: torch.Generator | None = None) -> None:
        if self.index_bytes.is_meta:
            return
        for start, stop in self.row_chunks():
            score = random_scores(stop - start, self, generator)
            self.index[start:stop].copy_(score.topk(self.fan_in, dim=1).indices.sort(dim=1).values)

    # the layer as a function ------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """x [.., D] -> [.., L]. Raises ValueError for another D, TypeError for another dtype than the weight's,
        NotImplementedError for a tangent.
        """
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [.., {self.in_features}] (in_features), found {list(x.shape)}")
        tangents = not torch.compiler.is_compiling() and getattr(forward_ad, "_current_level", -1) >= 0
        if tangents:  # which torch would take for zeros
            given = (x, self.weight, self.bias)
            if any(value is not None and forward_ad.unpack_dual(value).tangent is not None for value in given):
                raise NotImplementedError("FixedFanInLinear has no forward-mode derivatives (jvp, jacfwd); use backward()")
        if x.device != self.weight.device:
            raise ValueError(f"x is on {x.device} but the layer on {self.weight.device}; move one of them with .to()")
        if autocasts(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        elif x.dtype != self.weight.dtype:
            raise TypeError(f"x is {x.dtype} but the weight {self.weight.dtype}; cast one of them with .to()")
        flat = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        z = fixed_fan_in_linear(flat, self.weight, self.index, self.bias, self.group, self.backend)
        if x.dim() == 1:
            return z[0].clone()  # of a custom operator's output a view cannot be changed in place
        return z if x.dim() == 2 else z.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, fan_in={self.fan_in}, group={self.group}, "
            f"bias={self.bias is not None}"
        )

    # the index ----------------------------------------------------------------------------------------------------

    @property
    def index(self) -> Tensor:
        """Which inputs each row of outputs reads [ceil(L / G), K], a view. Assigning copies, after a check (ValueError)."""
        return self.index_bytes.view(self._index_type)

    @index.setter
    def index(self, value: Tensor) -> None:
        self._check_index(value)
        self.index.copy_(value)

    def _check_index(self, value: Tensor) -> None:
        if not isinstance(value, Tensor):
            raise ValueError(f"index is a {type(value).__name__}, but must be a tensor of an integer type")
        if value.shape != self.index.shape:
            raise ValueError(f"index is {list(value.shape)}, but the layer needs {list(self.index.shape)}")
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"index is {value.dtype}, but must be of an integer type")
        if not value.is_meta:
            rewiring.check_index(value, self.in_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedFanInLinear:
        """`fn` says where the index goes, not what it becomes: neither a cast nor to_empty may spoil it."""
        old = self.index_bytes
        super()._apply(fn, recurse)
        device = self.index_bytes.device
        if not old.is_meta:
            self.index_bytes = old.to(device)
        elif device.type != "meta":
            self.index_bytes = torch.empty(old.shape, dtype=old.dtype, device=device)
            self._draw_index()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "index"] = self.index

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Loads nothing of this layer if the index does not fit; torch raises RuntimeError with what is said here."""
        key, weight = prefix + "index", state_dict.get(prefix + "weight")
        value = state_dict.pop(key, None)
        if value is None:
            if strict:
                missing_keys.append(key)
        elif isinstance(weight, Tensor) and weight.shape != self.weight.shape:
            pass  # torch refuses it: an index without its weights would be worse than nothing
        else:
            try:
                self._check_index(value)
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
                return
            if local_metadata.get("assign_to_params_buffers", False):
                self.index_bytes = value.to(self._index_type).contiguous().view(torch.uint8)
            elif not value.is_meta:
                self.index.copy_(value)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    # rewiring -----------------------------------------------------------------------------------------------------

    def capture(self) -> contextlib.AbstractContextManager[Captured]:
        """Keep the input and the output's gradient of the last forward and backward within, for `rewire`.

        Under torch.compile run that one step on the model that was compiled, which shares its parameters.
        """
        return capture(self)

    def rewire(
        self,
        fraction: float,
        *,
        method: str = "set",
        x: Tensor | None = None,
        grad_output: Tensor | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> dict[str, int]:
        """Prune the smallest weights of each row and regrow as many elsewhere, in place; regrown weights start at zero.

        fraction: of K, 0 to 1 (at least one weight of a row stays). method: set (Mocanu et al., 2018) regrows at random,
        rigl (Evci et al., ICML 2020) where the gradient of a dense layer would be largest, from x [.., D] and grad_output
        [.., L], dL/dz, as `capture` gives them. weight.grad and the optimiser's state of the weight (each tensor of its
        shape) follow, and are zero for regrown weights.

        Replicas (DDP) stay equal if they pass their process_group, or, for method set, generators of the same seed. A layer
        without replicas in a job of several processes passes a group of its own process alone.

        Returns index entries, how many of them were pruned, and how many read another input now.
        Raises ValueError, with nothing changed, for what does not fit or is not finite.
        """
        return rewire(self, fraction, method, x, grad_output, optimizer, generator, process_group)

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        """Runs of index rows, start and stop, for which a dense gradient [rows * G, D] has about _CHUNK elements."""
        rows = -(-self.out_features // self.group)
        size = max(_CHUNK // (self.in_features * self.group), 1)
        for start in range(0, rows, size):
            yield start, min(start + size, rows)

    def outputs_of(self, start: int, stop: int) -> slice:
        """The outputs that index rows start..stop-1 serve."""
        return slice(start * self.group, min(stop * self.group, self.out_features))
