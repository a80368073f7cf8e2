"""Words of the study's command lines."""

from __future__ import annotations

import argparse
import re
from typing import Any

from omegaconf import OmegaConf

UNITS = {"s": 1, "m": 60, "h": 3600}


def budget(text: str) -> float:
    """ "30m" -> 1800.0. Raises ArgumentTypeError for anything but a number with s, m or h behind it."""
    if not (found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 90s, 30m or 6h")
    return float(found[1]) * UNITS[found[2]]


def setting(text: str) -> tuple[str, Any]:
    """ "train.max_steps=40" -> ("train.max_steps", 40), the value read as YAML."""
    key, equals, _ = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not a setting such as train.max_steps=40")
    return key, OmegaConf.select(OmegaConf.from_dotlist([text]), key)
