"""The `triton` backend's face: arguments checked, a layer cut in chunks, kernels launched. Nothing here waits for the GPU."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from fanin.kernels.checks import check_depth, check_gradient, check_layer, check_loss, check_positives
from fanin.kernels.layer import LOSSES, Backend, Layer, Unavailable, Update, without_lowest
from fanin.kernels.reference import candidates
from fanin.kernels.triton import configs
from fanin.kernels.triton.job import InputGradient, Job, raw, seeds
from fanin.kernels.triton.order import Orders
from fanin.kernels.triton.plan import Plan

_OLDEST = (3, 6)


class Triton(Backend):
    """Fused kernels for GPUs of compute capability 8.0 on, and AMD's.

    Float32 weights are computed with in float32 (matrix products as three tf32 ones); bfloat16 and float8 weights with x
    rounded to bfloat16 and sums in float32. Sizes need not be multiples of anything.

    deterministic: dx is summed in a fixed order, and the same call gives the same bits. It costs the layer's Order beside
    the index (order.py: about the index's own bytes; made on first use and after a rewiring) and partial sums of dx
    (configs.PARTIAL_BYTES). False: float32 atomics, without either.
    scratch_bytes: what a step may use for a chunk of labels; with `deterministic` at least one block of the Order is held.
    """

    name = "triton"

    def __init__(self, deterministic: bool = True, scratch_bytes: int = configs.SCRATCH_BYTES) -> None:
        """Raises Unavailable, with the reason, where Triton cannot run."""
        self.deterministic = deterministic
        self.scratch_bytes = scratch_bytes
        self.orders = Orders()
        self._interpreted = self._find()
        from fanin.kernels.triton import grouped, reduce, single, spread, topk

        self._single, self._grouped = single.single, grouped.grouped
        self._grouped_step, self._grouped_backward = grouped.grouped_step, grouped.grouped_backward
        self._reduce, self._spread, self._pick = reduce.reduce, spread.spread, topk.pick

    # The face -------------------------------------------------------------------------------------------------------

    def step(
        self,
        x: Tensor,
        layer: Layer,
        labels: Tensor,
        documents: Tensor,
        update: Update,
        loss: str = "bce",
        want_loss: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        check_loss(loss)
        self._check(x, layer)
        check_positives(labels, documents, layer.labels, len(x), x.device)
        job = Job(x, layer, self._capability(x.device))
        plan = job.plan
        chunk = plan.chunk(self.scratch_bytes, self.deterministic)
        dx = self._input_gradient(job, chunk)
        ranges = job.ranges(labels)
        blocks = 1 if plan.fused else plan.columns
        losses = torch.zeros(plan.tiles(layer.labels), blocks, dtype=torch.float32, device=x.device) if want_loss else None
        g = old = None
        if self.deterministic if layer.group == 1 else not plan.fused:
            g = job.empty(min(chunk, layer.labels))
        if self.deterministic and layer.group == 1:
            old = torch.empty_like(layer.weight[:chunk])
        for part in layer.parts(chunk):
            offset = part.first - layer.first
            tile = plan.tiles(offset)
            own: dict[str, Any] = {
                "labels": labels,
                "documents": documents,
                "ranges": ranges[tile:],
                "losses": None if losses is None else losses[tile:],
                "offset": offset,
                "loss": LOSSES.index(loss),
            }
            if layer.group == 1:
                self._run_single(job, part, "STEP", dxt=dx.atomic, g=g, old=old, update=update, **own)
            elif plan.fused:
                self._run_grouped_step(job, part, dx, update=update, **own)
            else:
                self._run_grouped(job, part, "SLOPES", g=g, **own)
                self._run_backward(job, part, g, dx, None, update)
            dx.add(part, g, old)
        return dx.total()[:, : layer.learnt], None if losses is None else losses.sum(dtype=torch.float64)

    def step_bytes(self, *, labels: int, features: int, fan_in: int, group: int, batch: int, learnt: int | None = None) -> int:
        return Plan(labels, features, fan_in, group, batch, learnt=learnt).step_bytes(self.scratch_bytes)

    def logits(self, x: Tensor, layer: Layer) -> Tensor:
        self._check(x, layer)
        job = Job(x, layer, self._capability(x.device))
        chunk = job.plan.chunk(self.scratch_bytes, False)
        z = x.new_empty(len(x), layer.labels)
        turned = torch.empty(min(chunk, layer.labels), job.plan.stride, dtype=torch.float32, device=x.device)
        for part in layer.parts(chunk):
            place = part.first - layer.first
            self._run(job, part, "LOGITS", out=turned)
            z[:, place : place + part.labels] = turned[: part.labels, : len(x)].t()
        return z

    def gradients(
        self, x: Tensor, g: Tensor, layer: Layer, need_x: bool = True, need_weight: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        self._check(x, layer)
        check_gradient(g, x, layer)
        job = Job(x, layer, self._capability(x.device))
        chunk = job.plan.chunk(self.scratch_bytes, need_x and self.deterministic)
        dx = self._input_gradient(job, chunk) if need_x else None
        weight = x.new_empty(layer.weight.shape) if need_weight else None
        direct = x.dtype == torch.float32
        turned = job.empty(min(chunk, layer.labels)).zero_()
        for part in layer.parts(chunk):
            place = slice(part.first - layer.first, part.first - layer.first + part.labels)
            turned[: part.labels, : len(x)] = g[:, place].t()
            out = None
            if weight is not None:
                out = weight[place] if direct else torch.empty(part.weight.shape, dtype=torch.float32, device=x.device)
            if layer.group > 1:
                self._run_backward(job, part, turned, dx, out, None)
            elif out is not None or (dx is not None and dx.atomic is not None):
                self._run_single(job, part, "BACKWARD", dxt=None if dx is None else dx.atomic, g=turned, out=out)
            if dx is not None:
                dx.add(part, turned, part.weight if layer.group == 1 else None)
            if weight is not None and out is not None and not direct:
                weight[place] = out
        return None if dx is None else dx.total(), weight

    def topk(self, x: Tensor, layer: Layer, k: int) -> tuple[Tensor, Tensor]:
        """As Backend.topk. The k best labels of a document lie in the k tiles of labels whose best are the highest: a first
        pass writes only the tiles' maxima, and the logits of those k tiles are computed again."""
        self._check(x, layer)
        check_depth(k, layer)
        job = Job(x, layer, self._capability(x.device))
        tile = job.plan.topk_tile()
        documents = max(configs.PICK_BYTES // (4 * k * tile), 1)
        if len(x) > documents:
            turns = [self.topk(part, layer, k) for part in x.split(documents)]
            return torch.cat([scores for scores, _ in turns]), torch.cat([found for _, found in turns])
        scores = torch.empty(len(x), 0, dtype=torch.float32, device=x.device)
        found = torch.empty(len(x), 0, dtype=torch.int64, device=x.device)
        rows = x.detach().to(job.dtype).contiguous()
        for part in layer.parts(max(min(configs.TOPK_LABELS // tile, 2**24 // len(x)), k) * tile):
            tiles = -(-part.labels // tile)
            maxima = torch.empty(len(x), tiles, dtype=torch.float32, device=x.device)
            self._run(job, part, "MAXIMA", out=maxima, tiles=tiles)
            chosen = maxima.topk(min(k, tiles), dim=1).indices
            logits = torch.empty(*chosen.shape, tile, dtype=torch.float32, device=x.device)
            block_l, block_k, warps = configs.PICK
            self._launch(
                self._pick, chosen.shape, rows, part.weight, part.index, part.bias, chosen, logits,
                x.shape[1], part.labels, part.group, tile, part.fan_in, chosen.shape[1],
                BLOCK_L=block_l, BLOCK_K=min(block_k, job.plan.config.block_k), num_warps=warps,
            )  # fmt: skip
            top, where = logits.flatten(1).topk(min(k, part.labels), dim=1)
            where = chosen.gather(1, where // tile) * tile + where % tile + (part.first - layer.first)
            scores, found = torch.cat([scores, top], 1), torch.cat([found, where], 1)
            scores, keep = scores.topk(min(k, scores.shape[1]), dim=1)
            found = found.gather(1, keep)
        return without_lowest(scores).to(x.dtype), found

    def candidates(self, x: Tensor, layer: Layer, labels: Tensor, documents: Tensor, count: int, loss: str = "bce") -> Tensor:
        """As Backend.candidates: logits from the kernels, the dense gradient of a chunk of rows by torch's own products."""
        return candidates(self, x, layer, labels, documents, count, loss)

    # Launches -------------------------------------------------------------------------------------------------------

    def _run(self, job: Job, part: Layer, mode: str, **own: Any) -> None:
        (self._run_single if part.group == 1 else self._run_grouped)(job, part, mode, **own)

    def _run_single(
        self, job: Job, part: Layer, mode: str, *, labels: Tensor | None = None, documents: Tensor | None = None,
        ranges: Tensor | None = None, g: Tensor | None = None, old: Tensor | None = None, dxt: Tensor | None = None,
        out: Tensor | None = None, losses: Tensor | None = None, offset: int = 0, loss: int = 0,
        update: Update | None = None, tiles: int = 0,
    ) -> None:  # fmt: skip
        from fanin.kernels.triton import update as modes

        plan, config = job.plan, job.plan.config
        block_l = configs.TOPK_TILE if mode == "MAXIMA" else plan.tile
        columns = plan.columns if mode in ("LOGITS", "MAXIMA") else 1
        state = part if mode == "STEP" else Layer(part.weight, part.index)
        self._launch(
            self._single, (-(-part.labels // block_l), columns),
            job.xt, part.weight, part.index, part.bias, state.momentum, state.bias_momentum,
            state.compensation, labels, documents, ranges, g, old, dxt, out, losses, *_numbers(update),
            part.first, offset, part.labels, part.fan_in, plan.batch, plan.stride, tiles,
            MODE=getattr(modes, mode).value, LOSS=loss, ATOMIC=dxt is not None,
            BLOCK_L=block_l, BLOCK_K=config.block_k, BLOCK_B=config.block_b, WHOLE_B=plan.batch == plan.stride,
            **configs.options(config),
        )  # fmt: skip

    def _run_grouped(
        self, job: Job, part: Layer, mode: str, *, labels: Tensor | None = None, documents: Tensor | None = None,
        ranges: Tensor | None = None, g: Tensor | None = None, out: Tensor | None = None, losses: Tensor | None = None,
        offset: int = 0, loss: int = 0, tiles: int = 0,
    ) -> None:  # fmt: skip
        from fanin.kernels.triton import update as modes

        plan, config = job.plan, job.plan.config
        self._launch(
            self._grouped, (tiles or plan.tiles(part.labels), plan.columns),
            job.xt, part.weight, part.index, part.bias, labels, documents, ranges, g, out, losses,
            offset, part.labels, part.group, part.fan_in, plan.batch, plan.stride, tiles,
            MODE=getattr(modes, mode).value, LOSS=loss, TILES=plan.tiles_per_group,
            REPEAT=plan.topk_repeat() if mode == "MAXIMA" else 1, K_BLOCKS=-(-part.fan_in // config.block_k),
            BLOCK_M=plan.tile, BLOCK_K=config.block_k, BLOCK_B=config.block_b,
            WHOLE_K=part.fan_in % config.block_k == 0,
            **configs.options(config, capped=part.weight.itemsize > 1),
        )  # fmt: skip

    def _run_grouped_step(
        self, job: Job, part: Layer, dx: InputGradient, *, labels: Tensor, documents: Tensor, ranges: Tensor,
        losses: Tensor | None, offset: int, loss: int, update: Update,
    ) -> None:  # fmt: skip
        plan, config = job.plan, job.plan.config
        self._launch(
            self._grouped_step, (plan.tiles(part.labels),),
            job.xt, part.weight, part.index, part.bias, part.momentum, part.bias_momentum, part.compensation,
            labels, documents, ranges, dx.rows, dx.atomic, losses, *_numbers(update),
            part.first, offset, part.labels, part.group, part.fan_in, plan.batch, plan.stride,
            LOSS=loss, ATOMIC=dx.atomic is not None, TILES=plan.tiles_per_group,
            BLOCK_M=plan.tile, BLOCK_K=config.block_k, BLOCK_B=config.block_b,
            WHOLE_K=plan.fan_in % config.block_k == 0, WHOLE_B=plan.batch == plan.stride,
            **configs.options(config, capped=losses is None and (part.weight.itemsize > 1 or config.block_k > 32)),
        )  # fmt: skip

    def _run_backward(
        self, job: Job, part: Layer, g: Tensor | None, dx: InputGradient | None, out: Tensor | None, update: Update | None
    ) -> None:
        plan, config = job.plan, job.plan.config
        atomic = None if dx is None else dx.atomic
        state = Layer(part.weight, part.index) if update is None else part
        self._launch(
            self._grouped_backward, (plan.tiles(part.labels), -(-part.fan_in // plan.backward_k)),
            job.xt, part.weight, part.index, state.bias, state.momentum, state.bias_momentum,
            state.compensation, g, None if dx is None else dx.rows, atomic, out, *_numbers(update),
            part.first, part.labels, part.group, part.fan_in, plan.batch, plan.stride,
            ATOMIC=atomic is not None, UPDATE=update is not None, TILES=plan.tiles_per_group,
            BLOCK_M=plan.tile, BLOCK_K=plan.backward_k, BLOCK_B=config.block_b,
            WHOLE_K=plan.fan_in % plan.backward_k == 0, WHOLE_B=plan.batch == plan.stride,
            **configs.options(config, capped=part.weight.itemsize > 1),
        )  # fmt: skip

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        device = args[0].device
        args = tuple(raw(value, self._interpreted) if isinstance(value, Tensor) else value for value in args)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[tuple(grid)](*args, **options)

    # Preparations ---------------------------------------------------------------------------------------------------

    def _find(self) -> bool:
        """Whether the kernels run in Triton's interpreter. Raises Unavailable where they do not run at all."""
        try:
            import triton
        except ImportError as error:
            raise Unavailable(f"the triton backend needs Triton, which cannot be imported here ({error})") from error
        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if version < _OLDEST:
            raise Unavailable(f"the triton backend needs Triton {_OLDEST[0]}.{_OLDEST[1]} or later, found {triton.__version__}")
        if triton.knobs.runtime.interpret:
            return True
        if not torch.cuda.is_available():
            raise Unavailable("the triton backend needs a GPU, and torch sees none here")
        if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            found = ".".join(map(str, torch.cuda.get_device_capability()))
            raise Unavailable(f"the triton backend needs a GPU of compute capability 8.0 or later (bfloat16), found {found}")
        return False

    def _check(self, x: Tensor, layer: Layer) -> None:
        check_layer(x, layer)
        if x.device.type != "cuda" and not self._interpreted:
            raise ValueError(f"x is on {x.device}; the triton backend works on GPU tensors")

    def _capability(self, device: torch.device) -> int:
        """80, 90 and so on; 0 for what is not NVIDIA's."""
        if self._interpreted or torch.version.hip is not None:
            return 90 if self._interpreted else 0
        major, minor = torch.cuda.get_device_capability(device)
        return 10 * major + minor

    def _input_gradient(self, job: Job, chunk: int) -> InputGradient:
        plan, order = job.plan, None
        if self.deterministic and not plan.spreads:
            order = self.orders.get(job.layer.index, plan.dx_features, plan.block_rows())
        return InputGradient(job, self.deterministic, order, chunk, (self._reduce, self._spread), self._launch)


def _numbers(update: Update | None) -> tuple[float | int, ...]:
    if update is None:
        return 0.0, 0.0, 0.0, 0.0, 0, 0
    return float(update.lr), float(update.momentum), float(update.weight_decay), float(update.scale), *seeds(update.seed)
