"""Which launch configuration is fastest on this GPU: a training step of the classifier layer under each of many.

    python benchmarks/tune.py [--only WORD ...] [--shipped] [--labels N] [--out FOLDER]

For a GPU that the configurations in src/fanin/kernels/triton/configs.py were not chosen on. Every variant is compiled first, in
as many processes as there are cores; then its dx and updated weights are held against those of the shipped configuration, and
the variants are timed in turns, as graphs: what Python takes to launch them does not count. Needs torch and triton alone;
changes nothing, but prints a table and adds a record.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import records
from fanin.kernels import Layer, Update
from fanin.kernels.triton import Triton, configs

LABELS, FEATURES, BATCH = 2_812_281, 768, 128


@dataclass(frozen=True)
class Variant:
    """A layer's shape, and what differs from the configuration that ships for it."""

    group: int
    fan_in: int
    dtype: str = "bf16"
    changes: dict[str, Any] = field(default_factory=dict)  # fields of configs.Single or configs.Grouped
    reduce: dict[str, Any] = field(default_factory=dict)  # fields of configs.Reduce
    spread: dict[str, Any] = field(default_factory=dict)  # fields of configs.Spread
    scratch_mib: int | None = None
    atomic: bool = False
    without_sum: bool = False  # the first kernel alone: dx is not summed, so it is not compared

    def __hash__(self) -> int:
        return hash(repr(self))

    @property
    def title(self) -> str:
        words = [f"G {self.group} K {self.fan_in} {self.dtype}"]
        words += [f"{name} {value}" for name, value in self.changes.items()]
        words += [f"reduce {name} {value}" for name, value in self.reduce.items()]
        words += [f"spread {name} {value}" for name, value in self.spread.items()]
        words += [f"scratch {self.scratch_mib}"] if self.scratch_mib else []
        words += ["atomic"] if self.atomic else []
        return ", ".join([*words, "without the sum of dx"] if self.without_sum else words)


def variants() -> Iterator[Variant]:
    grouped, single = Variant(64, 128), Variant(1, 32)
    for base in (grouped, single):
        yield base
        yield replace(base, without_sum=True)
        yield replace(base, atomic=True)
        yield from (replace(base, scratch_mib=size) for size in (40, 160, 320, 640))
    for block_k, warps, registers in (
        (128, 8, 128),
        (128, 8, None),
        (128, 4, None),
        (128, 4, 168),
        (64, 4, None),
        (64, 4, 168),
    ):
        changes = {"block_k": block_k, "warps": warps, "registers": registers}
        yield replace(grouped, changes=changes)
        yield replace(grouped, changes=changes, without_sum=True)
    shapes: tuple[tuple[int, int, int, int, int], ...]
    shapes = (1, 16, 128, 4, 4), (4, 2, 128, 8, 4), (8, 2, 128, 8, 8), (2, 4, 64, 16, 4), (1, 2, 128, 16, 1)
    yield from (replace(grouped, reduce=_reduce(*shape)) for shape in shapes)
    for rows, columns, warps, registers in (
        (16, 64, 1, 168), (16, 64, 1, 128), (16, 128, 1, None), (16, 128, 2, None), (16, 128, 2, 128), (32, 64, 1, 168),
        (8, 64, 1, 168), (16, 32, 1, None), (16, 32, 1, 96),
    ):  # fmt: skip
        changes = {"block_l": rows, "block_b": columns, "warps": warps, "registers": registers}
        yield replace(single, changes=changes, without_sum=True)
    for block_l, block_k, block_d, block_b, warps, registers in (
        (64, 32, 128, 128, 8, 128), (64, 16, 128, 128, 8, None), (32, 16, 128, 128, 8, 128), (128, 16, 64, 128, 8, 128),
        (64, 16, 128, 64, 8, 80), (64, 16, 64, 64, 4, 128),
    ):  # fmt: skip
        sizes = {"block_l": block_l, "block_k": block_k, "block_d": block_d, "block_b": block_b}
        yield replace(single, spread=sizes | {"warps": warps, "registers": registers})


def _reduce(block_f: int, block_e: int, block_b: int, turns: int, warps: int) -> dict[str, int]:
    return {"block_f": block_f, "block_e": block_e, "block_b": block_b, "turns": turns, "warps": warps}


@contextlib.contextmanager
def applied(variant: Variant) -> Iterator[Triton]:
    """The backend under a variant's configuration."""
    single, grouped, reduce, spread = configs.single, configs.grouped, configs.reduce, configs.spread

    def reduced(*shape: int) -> configs.Reduce:
        found = replace(reduce(*shape), **variant.reduce)
        return replace(found, block_b=min(found.block_b, shape[1]))

    configs.single = lambda *shape: replace(single(*shape), **variant.changes)
    configs.grouped = lambda *shape: replace(grouped(*shape), **variant.changes)
    configs.reduce = reduced
    configs.spread = lambda *shape: replace(spread(*shape), **variant.spread)
    try:
        size = configs.SCRATCH_BYTES if variant.scratch_mib is None else variant.scratch_mib * 2**20
        backend = Triton(deterministic=not variant.atomic, scratch_bytes=size)
        if variant.without_sum:
            backend._reduce = backend._spread = _Nothing()
        yield backend
    finally:
        configs.single, configs.grouped, configs.reduce, configs.spread = single, grouped, reduce, spread


class _Nothing:
    """A kernel that is not launched."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: None


def layer_of(variant: Variant, labels: int) -> Layer:
    dtype = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}[variant.dtype]
    generator = torch.Generator("cuda").manual_seed(0)
    rows = -(-labels // variant.group)
    index = torch.empty(rows, variant.fan_in, dtype=torch.uint16, device="cuda")
    for begin in range(0, rows, 2**17):
        part = index[begin : begin + 2**17]
        drawn = torch.rand(len(part), FEATURES, device="cuda", generator=generator).topk(variant.fan_in, dim=1).indices
        part.copy_(drawn.sort(dim=1).values.to(torch.uint16))
    weight = (0.1 * torch.randn(labels, variant.fan_in, device="cuda", generator=generator)).to(dtype)
    return Layer(weight, index, torch.full((labels,), -8.0, device="cuda"), variant.group)


def batch_of(labels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(BATCH, FEATURES, device="cuda", generator=generator)
    positives = torch.randint(0, labels, (3 * BATCH,), device="cuda", generator=generator).unique()
    return x, positives, torch.arange(len(positives), device="cuda") % BATCH


def compile_one(variant: Variant) -> str:
    """Run a small step, which leaves the kernels in Triton's cache."""
    try:
        with applied(variant) as backend:
            backend.step(*_call(layer_of(variant, 8192), batch_of(8192)))
            torch.cuda.synchronize()
    except Exception as error:  # whatever it is, the variant is out
        return f"{type(error).__name__}: {str(error)[:150]}"
    return ""


def _captured(variant: Variant, layer: Layer, batch: tuple[torch.Tensor, ...], orders: Any) -> torch.cuda.CUDAGraph:
    """A step as a graph, whose replay takes the GPU's time alone and none of Python's."""
    graph = torch.cuda.CUDAGraph()
    with applied(variant) as backend:
        backend.orders = orders  # sorted once for all
        backend.step(*_call(layer, batch))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            backend.step(*_call(layer, batch))
    return graph


def _call(layer: Layer, batch: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
    x, positives, documents = batch
    return x, layer, positives, documents, Update(lr=0.01, seed=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="variants whose title has all of these words")
    parser.add_argument(
        "--shipped", action="store_true", help="the shipped configurations alone, whole and without the sum of dx"
    )
    parser.add_argument("--labels", type=int, default=LABELS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args()
    chosen = [v for v in variants() if all(word in v.title for word in options.only)]
    if options.shipped:
        chosen = [v for v in chosen if v == replace(Variant(v.group, v.fan_in, v.dtype), without_sum=v.without_sum)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(chosen), os.cpu_count() or 1, 12)) as pool:
        faults = dict(zip(chosen, pool.map(compile_one, chosen, chunksize=1), strict=True))
    batch = batch_of(options.labels)
    found = []
    for shape in dict.fromkeys((v.group, v.fan_in, v.dtype) for v in chosen):
        layer = layer_of(Variant(*shape), options.labels)
        expected: tuple[torch.Tensor, torch.Tensor] | None = None
        ready: list[Variant] = []
        times: dict[Variant, list[float]] = {}
        orders = Triton().orders
        small, small_batch = layer_of(Variant(*shape), 100_000), batch_of(100_000)
        kept = small.weight.clone(), small.bias.clone()
        for variant in (v for v in chosen if (v.group, v.fan_in, v.dtype) == shape):
            if faults[variant]:
                print(f"{variant.title}: left out ({faults[variant]})")
                continue
            with applied(variant) as backend:
                dx, _ = backend.step(*_call(small, small_batch))
            result = dx, small.weight.float() - kept[0].float()
            small.weight.copy_(kept[0]), small.bias.copy_(kept[1])
            expected = expected or result
            off = [((a - b).norm() / b.norm()).item() for a, b in zip(result, expected, strict=True)]
            off[0] *= not variant.without_sum
            if not max(off) < 5e-2:  # of the change of weights, most of which is stochastic rounding
                print(f"{variant.title}: WRONG, off by {off[0]:.1e} (dx) and {off[1]:.1e} (change of weights)")
                continue
            ready.append(variant)
        graphs = {variant: _captured(variant, layer, batch, orders) for variant in ready}
        for number in range(options.rounds + 1):
            for variant, graph in graphs.items():
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                graph.replay()
                end.record()
                torch.cuda.synchronize()
                if number:
                    times.setdefault(variant, []).append(begin.elapsed_time(end))
        for variant in sorted(ready, key=lambda v: statistics.median(times[v])):
            median = statistics.median(times[variant])
            print(f"{median:8.3f} ms (least {min(times[variant]):.3f})  {variant.title}", flush=True)
            found.append({"what": "tune", "variant": variant.title, "labels": options.labels, "median_ms": median})
        del layer, orders, graphs
        torch.cuda.empty_cache()
    print("records in", records.add("tune", found, options.out))


if __name__ == "__main__":
    main()
