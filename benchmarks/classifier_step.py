"""The classifier layer alone: a training step, top-k and rewiring, every kind of head side by side, and this machine's floors.

    python benchmarks/classifier_step.py [--quick] [--only step growth topk rewire] [--out FOLDER]

Each side is checked against dense arithmetic in float64 before any time is printed; the sides of a comparison take turns.
Runs on the GPU where there is one, else on the CPU. Needs torch, numpy (and triton on a GPU) alone.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ceilings
import records
from fanin.heads import STORED, Bottleneck, Dense, FixedFanIn, Head
from fanin.kernels import Unavailable, backend
from fanin.kernels.reference import expand
from fanin.objectives import Positives
from fanin.rewiring import Schedule

SETTINGS = {"lr": 0.01, "momentum": 0.9}


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a head of a shape, stored in a type, on a backend."""

    head: str
    labels: int
    features: int
    batch: int
    fan_in: int | None = None  # the rank of a bottleneck
    group: int | None = None
    dtype: str = "fp32"
    backend: str = "torch"
    momentum: float = 0.9

    def build(self, labels: int | None = None) -> Head:
        labels = labels or self.labels
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            if self.head == "fixed_fan_in":
                assert self.fan_in is not None
                name, _, atomic = self.backend.partition(" ")
                with torch.device("meta"):  # drawing distinct indices for millions of labels would take minutes
                    built: Head = FixedFanIn(
                        labels, self.features, self.fan_in, self.group or 1, dtype=STORED[self.dtype], backend=name
                    )
                built = built.to_empty(device=device)
                _fill(built)
                if atomic:
                    kernels = _atomic()
                    built._kernels = lambda: kernels
            elif self.head == "bottleneck":
                assert self.fan_in is not None
                built = Bottleneck(labels, self.features, self.fan_in)
            else:
                built = DenseRival(labels, self.features, STORED[self.dtype], compiled=self.backend == "torch.compile")
        built.prepare_training(self.momentum)
        return built

    def floor(self, rates: dict[str, float]) -> float:
        """The least time of a step in ms: bytes that must move, and multiplications, at this machine's own rates."""
        entry = STORED[self.dtype].itemsize
        state = (entry if entry == 4 else 2) if self.momentum else 0
        reads = self.fan_in or self.features
        index = 2 * self.labels / (self.group or 1) * reads if self.head == "fixed_fan_in" else 0
        moved = self.labels * (reads * 2 * (entry + state) + 8 * (1 + bool(self.momentum))) + index
        flops = 6 * self.labels * reads * self.batch
        # what is stored below float32 can be multiplied as either: some CPUs are slow in bfloat16
        products = rates["gemm_fp32"] if self.dtype == "fp32" else max(rates["gemm_fp32"], rates["gemm_bf16"])
        return 1e3 * max(moved / rates["copy"], flops / products)

    @property
    def title(self) -> str:
        parts = [self.head, f"L {self.labels}", f"D {self.features}", f"B {self.batch}"]
        parts += [f"K {self.fan_in}"] if self.fan_in else []
        parts += [f"G {self.group}"] if self.group else []
        return " ".join([*parts, self.dtype, self.backend])


def _atomic() -> Any:
    """The Triton kernels with float32 atomics instead of the deterministic sum of dx."""
    from fanin.kernels.triton import Triton

    return Triton(deterministic=False)


class DenseRival(Dense):
    """The project's dense head (chunked, updated in place, no autograd), in bfloat16 too, and through torch.compile."""

    def __init__(self, labels: int, width: int, dtype: torch.dtype, compiled: bool = False) -> None:
        super().__init__(labels, width)
        self.weight = self.weight.to(dtype)
        self.body: Callable[..., None] = torch.compile(_dense_chunk) if compiled else _dense_chunk

    def _step(self, x: Tensor, positives: Positives, update: Any, want_loss: bool) -> tuple[Tensor, Tensor | None]:
        dx = torch.zeros_like(x)
        x = x.to(self.weight.dtype)
        chunk = self.chunk(len(x))
        bounds = torch.arange(0, self.labels + chunk, chunk, device=x.device)
        ranges = torch.searchsorted(positives.labels, bounds).tolist()
        for i, start in enumerate(range(0, self.labels, chunk)):
            rows, own = slice(start, min(start + chunk, self.labels)), slice(ranges[i], ranges[i + 1])
            momentum = (None, None) if self.momentum is None else (self.momentum[rows], self.bias_momentum[rows])
            places = positives.labels[own] - start, positives.documents[own]
            self.body(x, dx, self.weight[rows], self.bias[rows], *momentum, *places, update.lr, update.momentum)
        return dx, None


def _dense_chunk(
    x: Tensor,
    dx: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: Tensor | None,
    bias_momentum: Tensor | None,
    labels: Tensor,
    documents: Tensor,
    lr: float,
    factor: float,
) -> None:
    """Forward, backward and update of some labels: z [B, l] to its gradient in place, products straight into their target."""
    z = torch.addmm(bias.to(x.dtype), x, weight.t())
    g = z.sigmoid_()
    g.index_put_((documents, labels), torch.full((), -1.0, dtype=g.dtype, device=g.device), accumulate=True)
    if dx.dtype == g.dtype:
        dx.addmm_(g, weight)
    else:
        dx.add_(g @ weight)
    if momentum is None:
        weight.addmm_(g.t(), x, alpha=-lr)
        bias.add_(g.sum(0), alpha=-lr)
    else:
        weight.add_(momentum.addmm_(g.t(), x, beta=factor), alpha=-lr)
        bias.add_(bias_momentum.mul_(factor).add_(g.sum(0)), alpha=-lr)


def _fill(head: FixedFanIn) -> None:
    """Random weights, and random distinct indices: a random start and an odd stride, in blocks."""
    rows, fan_in, width = len(head.index), head.fan_in, head.width
    head.bias.fill_(-float(np.log(head.labels)))
    steps = torch.tensor([s for s in range(1, 40) if np.gcd(s, width) == 1], device=head.index.device)
    for start in range(0, rows, 2**20):
        part = head.index[start : start + 2**20]
        first = torch.randint(0, width, (len(part), 1), device=part.device)
        stride = steps[torch.randint(0, len(steps), (len(part), 1), device=part.device)]
        part.copy_(((first + stride * torch.arange(fan_in, device=part.device)) % width).sort(1).values)
    for start in range(0, head.labels, 2**22):
        weight = head.weight[start : start + 2**22]
        weight.copy_(torch.empty(weight.shape, device=weight.device).uniform_(-0.1, 0.1))


def inputs(labels: int, features: int, batch: int) -> tuple[Tensor, Positives]:
    """A random batch with three labels a document."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    drawn = torch.randint(0, labels, (batch, 3)).sort(1).values
    drawn += torch.arange(3) * (drawn[:, :1] + 3 > labels).logical_not()  # distinct enough: unique below
    pairs = torch.unique(drawn.clamp(max=labels - 1).flatten() * batch + torch.arange(batch).repeat_interleave(3))
    positives = Positives((pairs // batch).to(device), (pairs % batch).to(device))
    return torch.randn(batch, features, device=device), positives


def check(side: Side, labels: int = 5000) -> None:
    """Compare a step's dx, and the logits after it, with dense float64 arithmetic on a small head; stop where they differ."""
    head = side.build(labels)
    x, positives = inputs(labels, side.features, side.batch)
    weight, bias = _dense_weight(head).double(), head.bias.double()
    g = torch.sigmoid(x.double() @ weight.t() + bias)
    g[positives.documents, positives.labels] -= 1
    dx, _ = head.step(x, positives, **SETTINGS | {"momentum": side.momentum})
    mask = _dense_weight(head, ones=True).double()
    after = x.double() @ (weight - SETTINGS["lr"] * (g.t() @ x.double()) * mask).t() + bias - SETTINGS["lr"] * g.sum(0)
    found = (
        head.logits(x.to(head.weight.dtype) if side.head == "dense" else x, 0, labels).double()
        if side.head != "bottleneck"
        else after
    )
    for what, ours, exact in (("dx", dx.double(), g @ weight), ("logits after the step", found, after)):
        error = ((ours - exact).norm() / exact.norm()).item()
        limit = {"fp32": 1e-4, "bf16": 2e-2, "fp8": 8e-2}[side.dtype]  # the weights themselves are rounded after a step
        if not error < limit:
            raise SystemExit(f"{side.title}: {what} is off by {error:.1e}; no time is reported")


def _dense_weight(head: Head, ones: bool = False) -> Tensor:
    weight: Tensor = head.weight.float()  # type: ignore[union-attr]
    if isinstance(head, FixedFanIn):
        values = torch.ones_like(weight) if ones else weight
        rows = expand(head.index, head.labels, head.group)
        return torch.zeros(head.labels, head.width, device=weight.device).scatter_(1, rows, values)
    if isinstance(head, Bottleneck):
        weight = weight @ head.projection
    return torch.ones_like(weight) if ones else weight


def alternate(calls: dict[Any, Callable[[], Any]], rounds: int, warm: int = 3) -> dict[Any, list[float]]:
    """Milliseconds of each call in `rounds` rounds, taking turns, after `warm` that do not count."""
    cuda = torch.cuda.is_available()
    times: dict[Any, list[float]] = {key: [] for key in calls}
    for number in range(rounds + warm):
        for key, call in calls.items():
            if cuda:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                call()
                end.record()
                torch.cuda.synchronize()
                taken = begin.elapsed_time(end)
            else:
                began = time.perf_counter()
                call()
                taken = 1e3 * (time.perf_counter() - began)
            if number >= warm:
                times[key].append(taken)
    return times


def spread(taken: list[float]) -> dict[str, float]:
    low, median, high = np.quantile(taken, [0.1, 0.5, 0.9]).tolist()
    return {"median_ms": median, "p10_ms": low, "p90_ms": high}


def peak_of(call: Callable[[], Any]) -> float:
    """MiB that a call holds at its highest beside what was there: allocated on a GPU, resident on a CPU (0 where unknown)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        call()
        return 0.0

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    reset.write_text("5")
    before = read("VmRSS:")
    call()
    return max(read("VmHWM:") - before, 0) / 2**10


def compare(sides: list[Side], rounds: int, tops: dict[str, ceilings.Ceiling]) -> list[dict[str, Any]]:
    """Check all sides, then time them and the machine's ceilings in turns; one record each."""
    built: dict[Side, tuple[Head, Tensor, Positives]] = {}
    peaks = {}
    for side in sides:
        try:
            if side.head == "fixed_fan_in":
                backend(side.backend.partition(" ")[0], "cuda" if torch.cuda.is_available() else "cpu", STORED[side.dtype])
            check(side)
        except Unavailable as reason:
            print(f"{side.title}: left out ({reason})")
            continue
        head = side.build()
        built[side] = (head, *inputs(side.labels, side.features, side.batch))
        peaks[side] = sum(head.bytes().values()) / 2**20 + peak_of(_step(side, *built[side]))
    found = []
    calls: dict[Any, Callable[[], Any]] = {name: top.call for name, top in tops.items()}
    times = alternate(calls | {side: _step(side, *given) for side, given in built.items()}, rounds)
    rates = {name: 1e3 * top.work / spread(times.pop(name))["median_ms"] for name, top in tops.items()}
    print("ceilings: " + ", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in rates.items()), flush=True)
    slowest = max((spread(t)["median_ms"] for s, t in times.items() if s.head == "dense"), default=None)
    for side, taken in times.items():
        record = asdict(side) | {"what": "step"} | spread(taken)
        record |= {"peak_mib": peaks[side], "floor_ms": side.floor(rates), "ceilings": rates}
        found.append(record)
        ratio = "" if slowest is None else f", {slowest / record['median_ms']:.1f} x dense"
        line = f"{side.title}: {record['median_ms']:.2f} ms (p10 {record['p10_ms']:.2f}, p90 {record['p90_ms']:.2f}), "
        print(line + f"floor {record['floor_ms']:.2f}{ratio}, {record['peak_mib']:.0f} MiB", flush=True)
    del built
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _step(side: Side, head: Head, x: Tensor, positives: Positives) -> Callable[[], Any]:
    settings = SETTINGS | {"momentum": side.momentum}
    return lambda: head.step(x, positives, **settings)


def others(what: str, sides: list[Side], rounds: int) -> list[dict[str, Any]]:
    """Top-100, or a rewiring of 15 % with the candidates of RigL or at random, of all sides in turns."""
    calls: dict[tuple[Side, str], Callable[[], Any]] = {}
    peaks = {}
    for side in sides:
        try:
            head = side.build()
        except Unavailable as reason:
            print(f"{side.title}: left out ({reason})")
            continue
        x, positives = inputs(side.labels, side.features, side.batch)
        if what == "topk":
            _check_topk(side)
            calls[side, "topk"] = lambda head=head, x=x: head.topk(x, 100)
        else:
            for method in ("set", "rigl"):
                schedule = Schedule(method=method, prune="fraction", amount=0.15, interval=1, end_step=10**9)
                calls[side, method] = lambda h=head, s=schedule, x=x, p=positives: h.rewire(s, 1, 0, x, p)
    for key, call in calls.items():
        peaks[key] = peak_of(call)
    found = []
    for (side, method), taken in alternate(calls, rounds, 1).items():
        record = asdict(side) | {"what": what if what == "topk" else f"rewire_{method}"} | spread(taken)
        found.append(record | {"peak_mib": peaks[side, method]})
        print(
            f"{side.title}: {record['what']} {record['median_ms']:.2f} ms, {peaks[side, method]:.0f} MiB beside the head",
            flush=True,
        )
    return found


def _check_topk(side: Side) -> None:
    small = replace(side, labels=5000)
    head = small.build()
    x, _ = inputs(5000, side.features, side.batch)
    scores, labels = head.topk(x, 100)
    every = head.logits(x, 0, 5000)
    # the second pass may add a logit up in another order
    if not all(
        torch.allclose(scores, z, rtol=1e-4, atol=1e-4) for z in (every.gather(1, labels), every.topk(100, dim=1).values)
    ):
        raise SystemExit(f"{side.title}: top-k is wrong; no time is reported")


def on_cpu(quick: bool) -> dict[str, list[list[Side]]]:
    """Comparisons by what they measure."""
    shapes = []
    for features in (384,) if quick else (384, 768):
        base = Side("fixed_fan_in", 131072, features, 64, 32, 1, backend="cpu")
        sides = [Side("dense", 131072, features, 64), replace(base, head="bottleneck", fan_in=48, group=None, backend="torch")]
        sides += [replace(base, group=group) for group in (1, 16, 64)]
        if not quick:
            sides += [replace(base, dtype=dtype, group=group) for dtype in ("bf16", "fp8") for group in (1, 16)]
            sides += [replace(base, group=group, backend="torch") for group in (1, 16)]
        shapes.append(sides)
    wide = Side("fixed_fan_in", 131072, 768, 64, 32, 1, backend="cpu")
    growth = [[replace(wide, labels=n, group=g) for n in (131072, 670091, 2812281)[: 2 if quick else 3]] for g in (1, 16)]
    top = [Side("dense", 131072, 384, 64), *(Side("fixed_fan_in", 131072, 384, 64, 32, g, backend="cpu") for g in (1, 16))]
    return {"step": shapes, "growth": growth, "topk": [top], "rewire": [top[1:]]}


def on_gpu(quick: bool) -> dict[str, list[list[Side]]]:
    """Comparisons by what they measure."""
    base = Side("fixed_fan_in", 2812281, 768, 128, 32, 1, "bf16", "triton", 0.0)
    dense = Side("dense", 2812281, 768, 128, dtype="bf16", momentum=0.0)
    large = [dense, replace(dense, backend="torch.compile"), replace(base, fan_in=128, group=64), base]
    large += [replace(large[2], backend="triton atomic"), replace(base, backend="triton atomic")]
    large += [replace(base, dtype="fp8"), replace(base, dtype="fp8", fan_in=128, group=64), replace(base, group=64)]
    middle = [replace(side, labels=131072, momentum=0.9, dtype="fp32") for side in (dense, base, replace(base, group=16))]
    plans: dict[str, list[list[Side]]] = {"step": [large, middle], "topk": [[replace(base, fan_in=128, group=64), base]]}
    plans["rewire"] = [[replace(base, labels=131072)]]
    if not quick:
        plans["growth"] = [[replace(base, labels=10**9, dtype="fp8", group=64)]]
    return plans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two minutes' worth")
    parser.add_argument("--only", nargs="+", choices=("step", "growth", "topk", "rewire"), help="some of the comparisons")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the record")
    options = parser.parse_args()
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    tops = ceilings.ceilings()
    rounds = 7 if options.quick else 21
    for what, comparisons in (on_gpu if cuda else on_cpu)(options.quick).items():
        if options.only and what not in options.only:
            continue
        for sides in comparisons:
            found = compare(sides, rounds, tops) if what in ("step", "growth") else others(what, sides, max(rounds // 2, 3))
            path = records.add("classifier_step", found, options.out)
    print(f"records in {path}")


if __name__ == "__main__":
    main()
