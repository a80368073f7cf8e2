"""A running training's whole state on disk: safetensors and JSON, no pickle, whole or absent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fanin.files import InputError, atomic_path, read_json

_KEPT = 2  # the newest, and the one before it


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
    """Write `folder`/step-<step>, then remove all but the newest two. Raises InputError where it cannot be written."""
    path = folder / f"step-{step:09d}"
    with atomic_path(path, directory=True) as temporary:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(state | {"step": step}) + "\n", encoding="utf-8")
    for old in _all(folder)[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def load_checkpoint(folder: Path, fingerprint: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint of the run that `fingerprint` names, or None where there is none.

    Raises InputError for one that is of this run but broken.
    """
    for path in reversed(_all(folder)):
        state = read_json(path / "state.json")
        if state["fingerprint"] != fingerprint:
            continue
        try:
            return load_file(path / "state.safetensors"), state
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}/state.safetensors: cannot be read ({error}); remove the folder to resume from the one before"
            ) from None
    return None


def clear_checkpoints(folder: Path) -> None:
    """Remove every checkpoint in `folder`, and what a killed writer left behind."""
    for path in [*_all(folder), *folder.glob(".step-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors; its groups are rebuilt from the settings."""
    state = optimizer.state_dict()["state"]
    return {f"{place}.{name}": torch.as_tensor(value) for place, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave."""
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        entries.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


def of_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(prefix + ".")}
