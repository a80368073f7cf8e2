"""What every benchmark record carries, and the one way to add it to benchmarks/results/."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from fanin.files import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def device_name() -> str:
    """The GPU's name where there is one, else the processor's with the threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from fanin.provenance import machine  # needs psutil, which a bare GPU machine may lack

    return f"{machine()['fanin.cpu']}, {torch.get_num_threads()} threads"


def provenance(project: Path = RESULTS) -> dict[str, Any]:
    """Device, versions and the commit of `project` ("-dirty" where tracked files differ from it).

    FANIN_COMMIT in the environment is the commit of a copy whose .git is not its own.
    """
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=project, capture_output=True, text=True, check=False
    )
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": os.environ.get("FANIN_COMMIT") or described.stdout.strip() or "unknown",
    }


def add(name: str, records: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Append records to `folder`/<name>-<device>.json and return its path."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = folder / f"{name}-{slug}.json"
    old = json.loads(path.read_text()) if path.exists() else []
    write_json(path, old + [provenance() | record for record in records])
    return path
