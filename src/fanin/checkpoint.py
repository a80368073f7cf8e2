"""A running training's whole state on disk: safetensors and JSON, no pickle, whole or absent.

    checkpoints/step-000000100/state.safetensors   weights, indices, optimiser state
    checkpoints/step-000000100/state.json          step, counters, curves, the run's fingerprint
    checkpoints/step-000000100/checksums.json      CRC-32 of both, block by block (`tensor_file`)

Ranks write state-0.safetensors, state-1.safetensors, ..., and to checksums.json where which rows are (`checkpoint_parts`);
any number of ranks can take that up, and one that a single process wrote.

A checkpoint appears under its name when all of it is on disk. The newest two are kept: the older one is for a newest one that
turns out damaged. Their order is that of steps; no file's time is ever looked at.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from fanin.files import InputError, atomic_path
from fanin.optim import parameters_of
from fanin.ranks import ALONE, Ranks
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


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    places: Mapping[str, tuple[int, int]] | None = None,
    ranks: Ranks = ALONE,
) -> Path:
    """Write `folder`/step-<step>, forced to disk, then remove all but it and the one before it.

    places: of the tensors that are a rank's part of a whole, the first row's number and the whole's rows; `folder` is then
    on a disk that all ranks see. The tensors are streamed: at most 16 MiB are held beside them. Raises InputError where the
    folder cannot be written or the disk is full, OSError for other troubles of the disk and on the other ranks; what was
    half written is then gone, and earlier checkpoints are as they were.
    """
    path = folder / f"step-{step:09d}"
    with ExitStack() as stack:
        with ranks.agreed():
            temporary = stack.enter_context(atomic_path(path, directory=True)) if ranks.leads else path
        temporary = ranks.of_first(temporary)
        content: dict[str, Any] = {"block": BLOCK}
        if ranks.size == 1:
            content["files"] = {_TENSORS: asdict(write_tensors(temporary / _TENSORS, tensors))}
        else:
            content |= _parts().write_parts(temporary, ranks.rank, _in_parts(tensors, places))
        with ranks.agreed():
            if ranks.leads:
                content["files"][_STATE] = asdict(write_bytes(temporary / _STATE, json.dumps({**state, "step": step}).encode()))
                write_bytes(temporary / _SUMS, json.dumps(content).encode())
                sync_folder(temporary)
            stack.close()
    if not ranks.leads:
        return path
    sync_folder(folder)
    found = list_checkpoints(folder)
    place = found.index(path) + 1  # what is newer is another training's
    for old in (*found[: max(place - _KEPT, 0)], *found[place:]):
        shutil.rmtree(old, ignore_errors=True)
    return path


class Checkpoint:
    """One checkpoint, opened: its state checked, its tensors still on disk.

    state: what was saved, with `step`; entries: dtype and whole shape of each tensor. Raises Damaged where a file is not
    what its checksums say.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = path, ranks
        try:
            self._layout = json.loads((path / _SUMS).read_bytes())
            sums = {name: Sums(**value) for name, value in self._layout["files"].items()}
            block, state = self._layout["block"], sums.pop(_STATE)
            parts = self._layout.get("tensors")
            if parts is None and set(sums) != {_TENSORS}:
                raise KeyError(_TENSORS)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(f"{path / _SUMS} cannot be read ({error})") from None
        if block != BLOCK:
            raise Damaged(f"{path / _SUMS}: checksums of blocks of {block} bytes, not {BLOCK}")
        self._layout["files"] = {name: asdict(value) for name, value in sums.items()}
        self.state: dict[str, Any] = json.loads(read_bytes(path / _STATE, state))
        self.entries: dict[str, Entry] = {}
        for name, value in sums.items():
            self.entries |= read_header(path / name, value)
        if parts is None:
            self._layout["tensors"] = {key: {"shape": e.shape, "parts": {_TENSORS: 0}} for key, e in self.entries.items()}
        else:
            self.entries = {key: replace(e, shape=tuple(parts[key]["shape"])) for key, e in self.entries.items()}

    def read(self, targets: Mapping[str, Tensor], places: Mapping[str, tuple[int, int]] | None = None) -> None:
        """Fill `targets`, in place, with the tensors of these names; `places` as in `save_checkpoint`.

        Raises Damaged as `read_tensors` does, on every rank where one of them meets it.
        """
        files = self._layout["files"]
        if self.ranks.size == 1 and set(files) == {_TENSORS}:
            read_tensors(self.path / _TENSORS, Sums(**files[_TENSORS]), targets)
            return
        shapes = {key: (t.dtype, tuple(t.shape)) for key, t in targets.items()}
        for key, (_, total) in (places or {}).items():
            shapes[key] = (shapes[key][0], (total, *shapes[key][1][1:]))
        odd = sorted(shapes.items() ^ {key: (e.dtype, tuple(e.shape)) for key, e in self.entries.items()}.items(), key=str)
        if odd:
            raise Damaged(f"{self.path} and this version's state differ in {', '.join(key for key, _ in odd[:5])}")
        _parts().read_parts(self.path, self._layout, _in_parts(targets, places), alone=self.ranks.size == 1)


def _parts() -> ModuleType:
    from fanin import checkpoint_parts  # late: it is large, and one process has no need of it

    return checkpoint_parts


def _in_parts(tensors: Mapping[str, Tensor], places: Mapping[str, tuple[int, int]] | None) -> dict[str, Any]:
    return {key: _parts().Rows(t, *places[key]) if key in (places or {}) else t for key, t in tensors.items()}  # type: ignore[index]


def resume(folder: Path, fingerprint: str, restore: Callable[[Checkpoint], None], ranks: Ranks = ALONE) -> Checkpoint | None:
    """Have `restore` take up the newest whole checkpoint of the run that `fingerprint` names; None where there is none.

    One that is damaged, also where only `restore` finds out, is reported on stderr and the one before it is used; it must
    therefore overwrite all that it has touched before. What is newer than the one in use is removed, and what a killed writer
    left. Another run's are reported and stay until this one's take their place. All ranks take up the same one. Raises
    InputError, removing nothing, where all that there is is damaged.
    """
    damaged: list[Exception] = []
    others: list[Path] = []
    for path in ranks.of_first(list(reversed(list_checkpoints(folder)))):
        try:
            with ranks.agreed(Damaged):
                checkpoint = Checkpoint(path, ranks)
            if checkpoint.state["fingerprint"] != fingerprint:
                others.append(path)
                continue
            restore(checkpoint)
        except Damaged as error:
            if ranks.leads:
                print(f"warning: a checkpoint is damaged and not used: {error}", file=sys.stderr)
            damaged.append(error)
            continue
        if ranks.leads:
            _remove([newer for newer in list_checkpoints(folder) if newer.name > path.name], folder)
        return checkpoint
    if damaged:
        raise InputError(f"{folder}: no whole checkpoint is left ({damaged[0]}); remove the folder to start from the beginning")
    if ranks.leads:
        _remove([], folder)
        if others:
            print(
                f"warning: {others[0]} is of a training with other settings or inputs: training starts from the beginning, and "
                "its own checkpoints take that one's place; to go on from it stop now and set back what was changed",
                file=sys.stderr,
            )
    return None


def clear_checkpoints(folder: Path, ranks: Ranks = ALONE) -> None:
    """Remove every checkpoint in `folder`, and what a killed writer left behind."""
    if ranks.leads:
        _remove(list_checkpoints(folder), folder)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the newest last."""
    return sorted(folder.glob("step-*"))


def last_good(folder: Path) -> str:
    """In words, for an error: which checkpoint a run with the same settings can go on from."""
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
    parameters = parameters_of(optimizer)
    counted = None if optimizer.defaults.get("fused") else "cpu"
    tensors = {}
    for key, entry in entries.items():
        place, _, name = key.partition(".")
        device = (counted if name == "step" else None) or parameters[int(place)].device
        tensors[key] = torch.empty(entry.shape, dtype=entry.dtype, device=device)
    return tensors


def adopt_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Make `tensors` themselves, uncopied, the optimiser's whole state."""
    parameters = parameters_of(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        optimizer.state[parameters[int(place)]][name] = value


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under <prefix>.<key>."""
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def of_prefix(prefix: str, values: Mapping[str, _T]) -> dict[str, _T]:
    """Those under <prefix>., by the rest of their keys."""
    return {key[len(prefix) + 1 :]: value for key, value in values.items() if key.startswith(prefix + ".")}
