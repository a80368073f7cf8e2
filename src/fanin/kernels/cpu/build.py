"""The C++ sources compiled for this very machine, once, into the user's cache folder.

It is a plain shared library behind ctypes: it needs a C++ compiler, but neither torch's headers nor a build tool, and takes
seconds. Two processes that build at once both succeed: each renames its own file into place.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fanin.kernels.layer import Unavailable

SOURCE = Path(__file__).with_name("fixed_fan_in.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-std=c++17",
    "-shared",
    "-fPIC",
)


def compiler() -> str:
    """$CXX, else the first of c++, g++ and clang++ on the path. Raises Unavailable where there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    raise Unavailable("kernel backend cpu needs a C++ compiler: none of $CXX, c++, g++, clang++ was found; install one (g++)")


def cache_folder() -> Path:
    """$FANIN_CACHE, else fanin/ in the user's cache folder, else one among the temporary files."""
    base = os.environ.get("FANIN_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fanin")
    for folder in (Path(base).expanduser(), Path(tempfile.gettempdir()) / f"fanin-{os.getuid()}"):
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise Unavailable(f"kernel backend cpu: no folder to build in ({base} cannot be written); set FANIN_CACHE to one that can")


def _instructions() -> str:
    """What this processor can run: a library built on another machine must not be taken for ours."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises Unavailable, with the reason, where they cannot be built or loaded."""
    command = compiler()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    sources = [path.read_text() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h")))]
    what = "\n".join([*sources, *FLAGS, command, version, platform.machine(), _instructions()])
    target = cache_folder() / f"fixed_fan_in-{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not target.exists():
        _build(command, target)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise Unavailable(f"kernel backend cpu: {target} cannot be loaded ({error}); remove it to build it again") from error


def _build(command: str, target: Path) -> None:
    handle, name = tempfile.mkstemp(suffix=".so", dir=target.parent)
    os.close(handle)
    try:
        for threads in (["-fopenmp"], []):  # a compiler without OpenMP gives the same results on one thread
            done = subprocess.run(
                [command, *FLAGS, *threads, str(SOURCE), "-o", name], capture_output=True, text=True, check=False
            )
            if done.returncode == 0:
                os.replace(name, target)
                return
    finally:
        Path(name).unlink(missing_ok=True)
    raise Unavailable(f"kernel backend cpu: {command} could not compile {SOURCE.name}: {done.stderr.strip()[-600:]}")
