"""A running training's whole state on disk: safetensors and JSON, no pickle, whole or absent.

    checkpoints/step-000000100/state.safetensors   weights, indices, optimiser state, random generators
    checkpoints/step-000000100/state.json          step, counters, curves, the run's fingerprint
    checkpoints/step-000000100/checksums.json      CRC-32 of both, block by block (`tensor_file`)

A checkpoint appears under its name when all of it is on disk. The newest two are kept: the older one is for a newest one that
turns out damaged. Their order is that of steps; no file's time is ever looked at.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fanin.files import InputError, atomic_path
from fanin.tensor_file import (
    BLOCK,
    Damaged,
    Entry,
    Sums,
    read_bytes,
    read_header,
    read_tensors,
    sync_folder,
    write_bytes,
    write_tensors,
)

_KEPT = 2
_T = TypeVar("_T")
_TENSORS, _STATE, _SUMS = "state.safetensors", "state.json", "checksums.json"


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write `folder`/step-<step>, forced to disk, then remove all but the newest two.

    The tensors are streamed: at most 16 MiB are held beside them. Raises InputError where the folder cannot be
    written or the disk is full, OSError for other troubles of the disk; what was half written is then gone, and earlier
    checkpoints are as they were.
    """
    path = folder / f"step-{step:09d}"
    with atomic_path(path, directory=True) as temporary:
        sums = {
            _TENSORS: write_tensors(temporary / _TENSORS, tensors),
            _STATE: write_bytes(temporary / _STATE, json.dumps({**state, "step": step}).encode()),
        }
        content = {"block": BLOCK, "files": {name: asdict(value) for name, value in sums.items()}}
        write_bytes(temporary / _SUMS, json.dumps(content).encode())
        sync_folder(temporary)
    sync_folder(folder)
    for old in list_checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


class Checkpoint:
    """One checkpoint, opened: its state checked, its tensors still on disk.

    state: what was saved, with `step`; entries: dtype, shape and place of each tensor. Raises Damaged where a file is not
    what its checksums say.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            content = json.loads((path / _SUMS).read_bytes())
            self._sums = {name: Sums(**value) for name, value in content["files"].items()}
            block, tensors, state = content["block"], self._sums[_TENSORS], self._sums[_STATE]
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(f"{path / _SUMS} cannot be read ({error})") from None
        if block != BLOCK:
            raise Damaged(f"{path / _SUMS}: checksums of blocks of {block} bytes, not {BLOCK}")
        self.state: dict[str, Any] = json.loads(read_bytes(path / _STATE, state))
        self.entries: dict[str, Entry] = read_header(path / _TENSORS, tensors)

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Fill `targets`, in place, with the tensors of these names. Raises Damaged as `read_tensors` does."""
        read_tensors(self.path / _TENSORS, self._sums[_TENSORS], targets)


def resume(folder: Path, fingerprint: str, restore: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """Have `restore` take up the newest whole checkpoint of the run that `fingerprint` names; None where there is none.

    One that is damaged, also where only `restore` finds out, is reported on stderr and the one before it is used; it must
    therefore overwrite all that it has touched before. What is newer than the one in use is removed, and what a killed writer
    left. Raises InputError, removing nothing, where all that there is is damaged.
    """
    damaged: list[Damaged] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            checkpoint = Checkpoint(path)
            if checkpoint.state["fingerprint"] != fingerprint:
                continue
            restore(checkpoint)
        except Damaged as error:
            print(f"warning: a checkpoint is damaged and not used: {error}", file=sys.stderr)
            damaged.append(error)
            continue
        _remove([newer for newer in list_checkpoints(folder) if newer.name > path.name], folder)
        return checkpoint
    if damaged:
        raise InputError(f"{folder}: no whole checkpoint is left ({damaged[0]}); remove the folder to start from the beginning")
    return None


def clear_checkpoints(folder: Path) -> None:
    """Remove every checkpoint in `folder`, and what a killed writer left behind."""
    _remove(list_checkpoints(folder), folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"))


def last_good(folder: Path) -> str:
    """In words, for an error: which checkpoint a run can go on from."""
    found = list_checkpoints(folder)
    return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint had been written yet"


def _remove(checkpoints: list[Path], folder: Path) -> None:
    for path in [*checkpoints, *folder.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


# the optimiser's state as flat tensors; its groups are rebuilt from the settings -----------------------------------------


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Each parameter's state as <number>.<name>."""
    state = optimizer.state_dict()["state"]
    return {f"{place}.{name}": torch.as_tensor(value) for place, entry in state.items() for name, value in entry.items()}


def empty_optimizer_tensors(optimizer: torch.optim.Optimizer, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """Tensors to hold what `optimizer_tensors` gave, where the optimiser keeps them.

    That is with their parameters; but torch's optimisers count steps on the CPU unless they are fused.
    """
    parameters = _parameters(optimizer)
    counted = None if optimizer.defaults.get("fused") else "cpu"
    tensors = {}
    for key, entry in entries.items():
        place, _, name = key.partition(".")
        device = (counted if name == "step" else None) or parameters[int(place)].device
        tensors[key] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    return tensors


def adopt_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Make `tensors` themselves, uncopied, the optimiser's whole state."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        optimizer.state[parameters[int(place)]][name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under <prefix>.<key>."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def of_prefix(prefix: str, values: Mapping[str, _T]) -> dict[str, _T]:
    """Those under <prefix>., by the rest of their keys."""
    return {key[len(prefix) + 1 :]: value for key, value in values.items() if key.startswith(prefix + ".")}
