"""Where a run comes from: commit, machine, packages, and the hash of what DVC says went into a stage."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pyarrow", "mlflow", "dvc", "fanin")
_WRITTEN_BY_STAGES = (":(exclude)dvc.lock", ":(exclude)reports")  # these change in every run


def git(*arguments: str, folder: Path | None = None) -> str | None:
    """Output of a git command, None where git or the repository or the object is missing."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def commit() -> dict[str, str]:
    """Tags for the commit and whether tracked files differ from it (what stages write themselves left out)."""
    head = git("rev-parse", "HEAD")
    if head is None:
        return {}
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *_WRITTEN_BY_STAGES)
    branch = git("rev-parse", "--abbrev-ref", "HEAD") or ""
    return {
        "mlflow.source.git.commit": head.strip(),
        "mlflow.source.git.branch": branch.strip(),
        "fanin.git_dirty": str(bool(changed)).lower(),
    }


def difference() -> str:
    """The changes to tracked files since the commit, as a patch; empty where there are none."""
    return git("diff", "HEAD", "--", ".", *_WRITTEN_BY_STAGES) or ""


def packages() -> list[str]:
    """Every installed distribution as name==version, sorted, as `pip freeze` lists them."""
    found = {(d.metadata["Name"] or "", d.version) for d in metadata.distributions()}
    return sorted((f"{name}=={version}" for name, version in found if name), key=str.lower)


def versions(names: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of those of the named packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Tags for Python, packages, processor, cores and memory."""
    tags = {
        "fanin.python": platform.python_version(),
        "fanin.platform": platform.platform(terse=True),
        "fanin.cpu": _processor(),
        "fanin.cores": str(os.cpu_count() or 0),
        "fanin.memory_gib": f"{psutil.virtual_memory().total / 2**30:.1f}",
    }
    return tags | {f"fanin.version.{name}": version for name, version in versions().items()}


def _processor() -> str:
    """The processor's name; where a virtual machine hides the model ("AMD EPYC"), its family and model numbers beside it."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()]
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in lines}
    name = fields.get("model name", "")
    if name and not re.search(r"\d", name) and {"cpu family", "model"} <= fields.keys():
        name = f"{name} (family {fields['cpu family']}, model {fields['model']})"
    return name or platform.processor() or platform.machine()


def device(setting: str) -> str:
    """Name of the device that this process computes on, without importing torch where nothing else has."""
    torch = sys.modules.get("torch")
    if setting == "cpu" or torch is None or not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_name())


def stage_hashes(lock: str) -> dict[str, str]:
    """Stage name to hash of its command, deps and params, from the text of a dvc.lock.

    Equal hashes mean that DVC would take the one stage's outs for the other's. Left out are stages whose entry is out of
    date: a dep is not, or rests on something that is not, what the stage that makes it made last.
    """
    import yaml

    try:
        stages = (yaml.safe_load(lock) or {}).get("stages", {})
        made = {out["path"]: (name, out.get("md5")) for name, entry in stages.items() for out in entry.get("outs", [])}
        stale: set[str] = set()
        for _ in stages:  # once more for each link of the longest chain
            stale |= {
                name for name, entry in stages.items() if any(_outdated(dep, made, stale) for dep in entry.get("deps", []))
            }
        return {name: _stage_hash(entry) for name, entry in stages.items() if name not in stale}
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        return {}


def _outdated(dep: Mapping[str, Any], made: Mapping[str, tuple[str, str | None]], stale: set[str]) -> bool:
    maker, content = made.get(dep["path"], ("", dep.get("md5")))
    return maker in stale or content != dep.get("md5")


def _stage_hash(entry: Mapping[str, Any]) -> str:
    deps = sorted((dep["path"], dep.get("md5") or dep.get("etag") or "") for dep in entry.get("deps", []))
    return hashlib.sha256(json.dumps([entry.get("cmd"), deps, entry.get("params", {})], sort_keys=True).encode()).hexdigest()


def dvc_lock(workspace: Path, root: Path, experiment: str | None) -> str | None:
    """Text of the dvc.lock in `workspace`; where that was an experiment's copy and is gone, the one in its commit."""
    try:
        return (workspace / "dvc.lock").read_text()
    except OSError:
        if workspace.exists() or not experiment:
            return None
    for ref in (git("for-each-ref", "--format=%(refname)", "refs/exps", folder=root) or "").split():
        if ref.rsplit("/", 1)[-1] == experiment:
            return git("show", f"{ref}:dvc.lock", folder=root)
    return None
