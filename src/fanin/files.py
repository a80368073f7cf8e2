"""Files that are whole or absent, and the one error class for what a user can mend."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


class InputError(ValueError):
    """Something the user gave (a setting, a file, a folder) cannot be used; the text says what, where and what to do."""


@contextmanager
def atomic_path(path: str | Path, *, directory: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`, on any error it is removed.

    `directory=True` makes the temporary path an empty folder, which replaces the old folder whole.
    Raises InputError where the place cannot be written (read-only, full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        if directory:
            temporary.mkdir()
        yield temporary
        if directory and path.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            _remove(old)
            path.rename(old)
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            _remove(old)
        else:
            os.replace(temporary, path)
    except NotADirectoryError as error:
        raise InputError(f"cannot write {path}: a part of {path.parent} is a file, but a folder is needed there") from error
    except OSError as error:
        if isinstance(error, FileExistsError) and path.parent.is_file():
            raise InputError(f"cannot write {path}: {path.parent} is a file, but a folder is needed there") from error
        if error.errno in _WRITE_ERRORS:
            raise InputError(f"cannot write {path}: {_WRITE_ERRORS[error.errno]}") from error
        raise
    finally:
        _remove(temporary)


_WRITE_ERRORS = {
    13: "permission denied; make the folder writable or choose another one",
    27: "the file grew past the size allowed here; raise the limit (ulimit -f) or choose another folder",
    28: "the disk is full; free some space and run again",
    30: "the file system is read-only; choose a folder that can be written",
    122: "the disk quota is used up; free some space and run again",
}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused (it is not JSON)."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises InputError that names the file where it is missing or broken."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run the stage that writes it (dvc repro)") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); rerun the stage that writes it") from None


SOURCES = (".py", ".cpp", ".h")  # how the names of what results depend on end


@functools.cache
def sources_digest() -> str:
    """Hex digest of this package's own sources, as they lie on disk when it is first asked for."""
    folder = Path(__file__).parent
    files = sorted(path for path in folder.rglob("*") if path.suffix in SOURCES)
    named = "".join(f"{path.relative_to(folder)} {sha256(path)}\n" for path in files)
    return hashlib.sha256(named.encode()).hexdigest()


def sha256(path: str | Path) -> str:
    """Hex digest of one file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
