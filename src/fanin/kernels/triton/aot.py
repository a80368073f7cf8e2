"""Proof without a GPU: every kernel in the configurations that ship, compiled ahead of time, and what it needs of the GPU.

    python -m fanin.kernels.triton.aot            compile, compare with the table kept in the repository
    python -m fanin.kernels.triton.aot --write    renew the table

The launches are not listed here: the backend's own methods are called with tensors that have no memory, and what they
would launch is compiled, with the argument types and alignments that Triton's JIT would have seen.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fanin.kernels.layer import Layer, Update
from fanin.kernels.triton import Triton
from fanin.kernels.triton import update as modes

TABLE = Path(__file__).with_name("resources.json")
CAPABILITIES = (80, 90)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes a block may have on an A100 and an H100 or H200."""
SPILL_LIMIT = 144
"""Bytes a thread may spill: 36 registers, written and read once in a program that moves 500 or more. What that buys is a second
block on a multiprocessor, and with it most of the waiting hidden."""
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async"}
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float8_e4m3fn: "*u8", torch.uint16: "*u16", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
_MODES = {getattr(modes, name).value: name for name in ("STEP", "LOGITS", "SLOPES", "BACKWARD", "MAXIMA")}
_LABELS, _FEATURES = 2**18, 768


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel as it would be launched: what tells its compiled form from others."""

    case: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]
    capability: int

    @property
    def name(self) -> str:
        constants = dict(self.constants)
        mode = "update" if constants.get("UPDATE") else _MODES.get(constants.get("MODE", -1), "")
        return " ".join(filter(None, (self.kernel, mode, self.case)))


class Recorder(Triton):
    """The backend, with launches written down instead of made."""

    def __init__(self, case: str, capability: int, **options: Any) -> None:
        super().__init__(**options)
        self.case, self.capability = case, capability
        self.launches: list[Launch] = []

    def _find(self) -> bool:
        return True

    def _check(self, x: torch.Tensor, layer: Layer) -> None:
        """Tensors without memory have no values to check."""

    def _capability(self, device: torch.device) -> int:
        return self.capability

    def _launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        own = {name: options.pop(name) for name in ("num_warps", "maxnreg") if name in options}
        signature, constants, aligned = {}, dict(options), []
        for place, (param, value) in enumerate(zip(kernel.params, args, strict=False)):
            name = param.name
            if value is None or (isinstance(value, int) and value == 1 and not param.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                signature[name] = _POINTERS[value.dtype]
                sixteen = not param.do_not_specialize_on_alignment
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
                sixteen = isinstance(value, int) and value % 16 == 0 and not param.do_not_specialize
            if sixteen:
                aligned.append(place)
        signature |= dict.fromkeys(options, "constexpr")
        names = [param.name for param in kernel.params]
        assert set(signature) == set(names), set(names) ^ set(signature)
        order = tuple((name, signature[name]) for name in names)
        constant, chosen = tuple(sorted(constants.items())), tuple(sorted(own.items()))
        self.launches.append(Launch(self.case, kernel.__name__, order, constant, tuple(aligned), chosen, self.capability))


def shipped() -> Iterator[Launch]:
    """Every kernel as some shape would launch it, each once."""
    seen = set()
    both = itertools.product(_cases(), CAPABILITIES)
    for launch in itertools.chain.from_iterable(_record(capability=capability, **case) for case, capability in both):
        key = dataclasses.replace(launch, case="")
        if key not in seen:
            seen.add(key)
            yield launch


def _cases() -> Iterator[dict[str, Any]]:
    """`step` in all configurations; the other methods, weight types and options in those that matter most."""
    bf16, fp8, fp32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32

    def cases(weights: torch.dtype, group: int, fan_in: int, batch: int = 128, *methods: str, **more: Any) -> dict[str, Any]:
        common = {"weights": weights, "group": group, "fan_in": fan_in, "batch": batch}
        return {**common, "methods": methods or ("step",), **more}

    for weights in (bf16, fp32):
        blocks = itertools.product((8, 16, 32, 64, 128, 256, 512), (16, 32, 64, 128))
        yield from (cases(weights, 1, fan_in, batch) for fan_in, batch in blocks)
        yield from (cases(weights, *shape) for shape in itertools.product((8, 32, 64), (16, 32, 64, 128), (16, 32, 64, 128)))
        yield from (cases(weights, *shape) for shape in ((128, 128), (64, 512), (64, 128, 512), (1, 32, 512), (16, 60)))
    everything = ("step", "logits", "gradients", "topk")
    for group, fan_in, batch in ((1, 1, 1), (16, 1, 1), (200, 96, 300)):
        yield cases(bf16, group, fan_in, batch, *everything, want_loss=True)
    yield cases(fp8, 200, 96, 300, *everything, momentum=bf16, kahan=True)
    for group, fan_in in ((1, 32), (64, 32), (64, 128)):
        yield cases(fp8, group, fan_in)
        yield cases(bf16, group, fan_in, 128, "step", first=2**40)
        yield from (cases(weights, group, fan_in, 128, *everything[1:]) for weights in (bf16, fp32))
    for group, fan_in in ((1, 32), (64, 128)):
        yield cases(bf16, group, fan_in, deterministic=False)
        yield cases(bf16, group, fan_in, loss="squared_hinge", want_loss=True)
        yield cases(bf16, group, fan_in, momentum=bf16, kahan=True)
        yield cases(fp8, group, fan_in, momentum=bf16)


def _record(
    *, weights: torch.dtype, group: int, fan_in: int, batch: int, methods: tuple[str, ...], capability: int,
    deterministic: bool = True,
    loss: str = "bce", want_loss: bool = False, momentum: torch.dtype | None = None, kahan: bool = False,
    first: int = 0,
) -> list[Launch]:  # fmt: skip
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    labels = _LABELS
    layer = Layer(
        weight=empty(labels, fan_in, dtype=weights),
        index=empty(-(-labels // group), fan_in, dtype=torch.uint16),
        bias=empty(labels),
        group=group,
        momentum=None if momentum is None else empty(labels, fan_in, dtype=momentum),
        bias_momentum=None if momentum is None else empty(labels),
        compensation=empty(labels, fan_in, dtype=torch.bfloat16) if kahan else None,
        first=first,
    )
    x = empty(batch, _FEATURES)
    words = [str(weights).removeprefix("torch."), f"G={group} K={fan_in} B={batch}"]
    words += ["" if deterministic else "atomic", "" if loss == "bce" else loss, "loss" if want_loss else ""]
    words += ["" if momentum is None else "momentum", "Kahan" if kahan else "", f"first={first}" if first else ""]
    recorder = Recorder(" ".join(filter(None, words)), capability, deterministic=deterministic)
    if "step" in methods:
        positives = empty(3 * batch, dtype=torch.int64)
        recorder.step(x, layer, positives, positives, Update(lr=0.1, seed=3), loss, want_loss)
    if "logits" in methods:
        recorder.logits(x, layer)
    if "gradients" in methods:
        recorder.gradients(x, empty(batch, labels), layer)
    if "topk" in methods:
        recorder.topk(x, layer, 100)
    return recorder.launches


def assembled(launch: Launch) -> Any:
    """The launch as Triton compiles it for its capability."""
    from fanin.kernels.triton import grouped, reduce, single, spread, topk

    kernels = (
        single.single, grouped.grouped, grouped.grouped_step, grouped.grouped_backward, reduce.reduce, spread.spread, topk.pick,
    )  # fmt: skip
    kernel = {kernel.__name__: kernel for kernel in kernels}[launch.kernel]
    places = {name: (i,) for i, (name, _) in enumerate(launch.signature)}
    source = ASTSource(
        kernel,
        dict(launch.signature),
        {places[name]: value for name, value in launch.constants},
        {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", launch.capability, 32), options=dict(launch.options))


def compiled(launch: Launch) -> dict[str, Any]:
    """What the kernel needs of its GPU: registers and spilled bytes a thread, shared bytes a block,
    and which of `TENSOR_CORES` it uses."""
    result = assembled(launch)
    usage = _usage(result.asm["cubin"])
    found = [word for word in TENSOR_CORES.values() if word in result.asm["ptx"]]
    return {
        "kernel": launch.name,
        "capability": launch.capability,
        **dict(launch.options),
        "registers": usage["REG"],
        "spilled": max(usage["STACK"], usage["LOCAL"]),
        "shared": int(result.metadata.shared),
        "tensor_cores": found,
    }


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if set(found) != {"REG", "STACK", "LOCAL"}:
        raise RuntimeError(f"{tool} printed no resource usage: {text!r}")
    return found


def _worker() -> None:
    os.nice(19)


def compile_all(workers: int | None = None) -> list[dict[str, Any]]:
    """A row for every kernel and capability, in parallel processes."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers or os.cpu_count(), context, initializer=_worker) as pool:
        return list(pool.map(compiled, shipped()))


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What no GPU should be asked for, in words."""
    found = []
    for row in rows:
        where = f"{row['kernel']} on sm_{row['capability']}"
        if row["spilled"] > SPILL_LIMIT:
            found.append(f"{where}: spills {row['spilled']} bytes a thread; the limit is {SPILL_LIMIT}")
        limit = SHARED_LIMIT[row["capability"]]
        if row["shared"] > limit:
            found.append(f"{where}: wants {row['shared']} bytes of shared memory; a block may have {limit}")
        if row["kernel"].startswith(("grouped", "spread")) and not row["tensor_cores"]:
            found.append(f"{where}: uses no tensor cores")
    return found


def differences(rows: list[dict[str, Any]], table: dict[str, Any]) -> list[str]:
    """Where `rows` are not those of the kept table, in words; another version of Triton may choose other registers."""
    if triton.__version__ != table["triton"]:
        return []
    kept = {(row["kernel"], row["capability"]): row for row in table["rows"]}
    found = {(row["kernel"], row["capability"]): row for row in rows}
    words = [f"{name} on sm_{capability}: not in the table" for name, capability in found.keys() - kept.keys()]
    words += [f"{name} on sm_{capability}: in the table, but ships no more" for name, capability in kept.keys() - found.keys()]
    words += [
        f"{name} on sm_{capability}: {kept[name, capability]} in the table, now {found[name, capability]}"
        for name, capability in found.keys() & kept.keys()
        if found[name, capability] != kept[name, capability]
    ]
    return sorted(words)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    parser.add_argument("--write", action="store_true", help=f"renew {TABLE.name}")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one a core)")
    options = parser.parse_args()
    rows = compile_all(options.workers)
    trouble = faults(rows)
    if options.write:
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    else:
        trouble += differences(rows, json.loads(TABLE.read_text()))
    print("\n".join([f"{len(rows)} compiled kernels, {len(trouble)} faults", *trouble]))
    return 1 if trouble else 0


if __name__ == "__main__":
    sys.exit(main())
