"""Reading text files line by line, gzip or not, and the checks that every raw layout shares.

A place in a file is written `file:line`, the first line being 1.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from fanin.files import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_SHOWN = 60  # characters of a bad line that a message quotes


def find(raw: Path, *names: str) -> Path | None:
    """The file of one of these names, or of one with `.gz` behind it, in `raw`; None where there is none.

    Raises InputError where there are several: which one is meant, nobody can tell.
    """
    found = [raw / f"{name}{suffix}" for name in names for suffix in ("", ".gz") if (raw / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise InputError(f"{raw}: {' and '.join(path.name for path in found)} hold the same; remove all but one")
    return found[0] if found else None


def read_bytes(path: Path) -> Iterator[bytes]:
    """Lines of a file without their ends. Raises InputError for an empty file, a damaged gzip, an unreadable file."""
    whole = 0  # lines handed out
    try:
        with open(path, "rb") as file:
            packed = file.read(2) == _GZIP_MAGIC  # whatever the name says
            file.seek(0)
            for line in io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20) if packed else file:
                yield line.rstrip(b"\r\n")
                whole += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}:{whole + 1}: from here on the gzip data is truncated or damaged ({error}); fetch it again"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    if not whole:
        raise InputError(f"{path}:1: the file is empty; fetch it again, or remove it where it is optional")


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(place, line) for each line of a UTF-8 file. Raises InputError as `read_bytes` does, and for other bytes."""
    name = str(path)
    for number, raw in enumerate(read_bytes(path), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{name}:{number}: not UTF-8 (byte 0x{raw[error.start]:02x} at position {error.start + 1}); "
                "fetch the file again or convert it, for example with iconv -f latin1 -t utf-8"
            ) from None
        yield f"{name}:{number}", line


def count_lines(path: Path) -> int:
    """Number of lines. Raises InputError as `read_bytes`."""
    return sum(1 for _ in read_bytes(path))


def quote(found: object) -> str:
    """What was found, short enough for a message."""
    text = repr(found)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def check_text(text: str, place: str) -> str:
    """The text without blanks around it. Raises InputError for an empty one, and for half of a surrogate pair."""
    text = text.strip()
    if not text:
        raise InputError(f"{place}: the text is empty; give it a text, or remove it with its labels")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{place}: {error.object[error.start]!a} is not a character; mend the text") from None
    return text


def check_labels(ids: list[int], labels: int, place: str, *, empty: bool) -> list[int]:
    """The label ids sorted. Raises InputError for a negative, too large or repeated one, and for none unless `empty`."""
    if not ids:
        if empty:
            return []
        raise InputError(f"{place}: a training document without labels; give it a label, or remove it with its text")
    low, high = min(ids), max(ids)
    if low < 0:
        raise InputError(f"{place}: label id {low} is negative; ids go from 0 to {labels - 1}")
    if high >= labels:
        raise InputError(f"{place}: label id {high} is out of range; there are {labels} labels, ids go from 0 to {labels - 1}")
    if len(set(ids)) < len(ids):
        twice = next(id for id in ids if ids.count(id) > 1)
        raise InputError(f"{place}: label id {twice} is repeated; name each label of a document once")
    return sorted(ids)


def parse_integer(text: str, what: str, place: str) -> int:
    """A decimal integer, sign allowed. Raises InputError for anything else (NaN, a fraction, a word)."""
    digits = text[1:] if text[:1] in "+-" else text
    if not (digits.isascii() and digits.isdigit()):
        raise InputError(f"{place}: {what} must be a whole number, found {quote(text)}; correct the line")
    return int(text)
