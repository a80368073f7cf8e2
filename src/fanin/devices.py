"""Where to compute."""

from __future__ import annotations

import torch

from fanin.files import InputError


def choose_device(setting: str) -> torch.device:
    """The device that `train.device` names; auto is CUDA where there is one. Raises InputError where it is not there."""
    if setting == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if setting.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"train.device: {setting} was asked for, but torch sees no CUDA device; set it to auto or cpu")
    return torch.device(setting)
