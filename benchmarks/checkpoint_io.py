"""How fast a checkpoint is written and read, against dd on the same disk, and what it takes of memory.

    python benchmarks/checkpoint_io.py [--gib 1.0] [--rounds 3] [--folder checkpoints]

Each round writes and reads the same number of bytes both ways, in turns: dd with 8 MiB blocks and conv=fsync, then what
training does (`save_checkpoint` with checksums and fsync; `Checkpoint.read` into tensors that exist already). The file is out
of the page cache before each read. What was read is compared with what was written. The record, with the median and the best
round's rates (a shared disk can halve any round), goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fanin.checkpoint import Checkpoint, save_checkpoint
from fanin.memory.peaks import Peaks, current

sys.path.insert(0, str(Path(__file__).parent))
import records

CPU = torch.device("cpu")
DISK_SHARE, GROWTH_MIB = 0.8, 64  # what is asked for


def state(total: int) -> dict[str, torch.Tensor]:
    """About `total` bytes as training has them: a head of K = 32 with momentum, and a BERT-like encoder with two moments."""
    encoder = {f"layer.{i}.{name}": torch.randn(768, 768) for i in range(24) for name in ("weight", "exp_avg", "exp_avg_sq")}
    encoder |= {f"layer.{i}.bias": torch.randn(768) for i in range(24)}
    labels = (total - sum(t.nbytes for t in encoder.values())) // (32 * (4 + 4 + 2))
    index = torch.randint(0, 768, (labels, 32), dtype=torch.int32).to(torch.uint16)
    return encoder | {"weight": torch.randn(labels, 32), "momentum": torch.randn(labels, 32), "index": index}


def evict(path: Path) -> None:
    """Drop a file from the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)  # dirty pages stay
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def dd(*words: str) -> None:
    subprocess.run(["dd", "bs=8M", *words], check=True, stderr=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description="Checkpoint write and read rates against dd's.")
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("."), help="a folder on the disk in question")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    tensors = state(int(arguments.gib * 2**30))
    copies = {key: torch.full_like(tensor, 1) for key, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    seconds: dict[str, list[float]] = {name: [] for name in ("dd_write", "write", "dd_read", "read")}
    growth = {"write": 0, "read": 0}
    peaks = Peaks(CPU)
    if not peaks.resettable:
        raise SystemExit("the system does not let resident peaks be reset, so no growth can be measured")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, raw = Path(name), Path(name) / "raw"
        for step in range(arguments.rounds):
            seconds["dd_write"].append(timed(lambda: dd("if=/dev/zero", f"of={raw}", f"count={size // 2**23}", "conv=fsync")))
            before = current(CPU)
            peaks.begin("write")
            seconds["write"].append(timed(lambda step=step: save_checkpoint(folder, step, tensors, {})))
            peaks.enter("between")
            growth["write"] = max(growth["write"], peaks.highest["write"] - before)
            checkpoint = Checkpoint(folder / f"step-{step:09d}")
            evict(raw)
            seconds["dd_read"].append(timed(lambda: dd(f"if={raw}", "of=/dev/null")))
            evict(checkpoint.path / "state.safetensors")
            before = current(CPU)
            peaks.begin("read")
            seconds["read"].append(timed(lambda checkpoint=checkpoint: checkpoint.read(copies)))
            peaks.enter("between")
            growth["read"] = max(growth["read"], peaks.highest["read"] - before)
    if any(not torch.equal(tensors[key], copies[key]) for key in tensors):
        raise SystemExit("what was read is not what was written")
    rate = {key: size / 2**20 / statistics.median(values) for key, values in seconds.items()}
    record = {
        "bytes": size,
        "rounds": arguments.rounds,
        **{f"{key}_mib_per_second": round(value, 1) for key, value in rate.items()},
        "write_share_of_dd": round(rate["write"] / rate["dd_write"], 3),
        "read_share_of_dd": round(rate["read"] / rate["dd_read"], 3),
        **{f"{key}_best_mib_per_second": round(size / 2**20 / min(values), 1) for key, values in seconds.items()},
        **{f"{key}_growth_mib": round(value / 2**20, 1) for key, value in growth.items()},
    }
    print(record, {key: [round(value, 3) for value in values] for key, values in seconds.items()})
    print(f"added to {records.add('checkpoint-io', [record])}")
    held = record["write_share_of_dd"] >= DISK_SHARE and record["read_share_of_dd"] >= DISK_SHARE
    return 0 if held and growth["write"] < GROWTH_MIB * 2**20 else 1


if __name__ == "__main__":
    sys.exit(main())
