"""Tensors on disk as a stream: the safetensors format, and a CRC-32 of every block of a file.

Neither way holds a second copy of the tensors. Writing hands slices of the tensors themselves to the file, while another
thread sums them up; reading fills the tensors in place, block by block, each checked before it is used. Blocks are read
with `pread`, not through a memory map: there a bad sector would be a SIGBUS that ends the process, here it is an error that
the caller can answer. CRC-32 finds every burst of up to 32 wrong bits in a block and all but one in 2^32 of other damage, at
2 GB/s and more; it is no protection against forgery.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
import zlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 2**20  # bytes under one checksum; read, summed and copied while they are in the processor's cache
_SPAN = 8  # blocks that are handed to the file at once
_RUN = 64  # blocks that a reading thread takes at once
_READERS = 3  # threads: the disk is never idle while one block is summed and another copied
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class Damaged(Exception):
    """A file is not what was written; the text says where and how."""


@dataclass(frozen=True)
class Sums:
    """What a file's bytes must be: their number, and the CRC-32 of each `BLOCK` of them."""

    bytes: int
    crc32: list[int]


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: its bytes are start..stop-1, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


# writing ----------------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Sums:
    """Write a safetensors file and force it to disk. Holds at most 16 MiB beside the tensors, on any device.

    Raises OSError where the disk does not take it.
    """
    header, _ = _header({key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()})
    with _Writer(path) as writer:
        writer.write(memoryview(header))
        for tensor in tensors.values():
            for piece in bytes_of(tensor.contiguous()).split(_SPAN * BLOCK):
                writer.write(memoryview(piece.cpu().numpy()))
    return writer.sums


def create_tensors(path: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """A safetensors file whose tensors are still to be written, by `write_rows`, from any number of processes."""
    header, size = _header(shapes)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)


def write_rows(path: Path, parts: Mapping[str, tuple[int, Tensor]]) -> None:
    """Write rows into tensors of a file that `create_tensors` made: by name, the first row's number and the rows."""
    with open(path, "r+b", buffering=0) as file:  # a buffer would write back what others have written over meanwhile
        length = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length - 8))
        for name, (first, rows) in parts.items():
            shape = header[name]["shape"]
            place = length + header[name]["data_offsets"][0]
            place += first * math.prod(shape[1:]) * rows.element_size() if shape else 0
            for piece in bytes_of(rows.contiguous()).split(_SPAN * BLOCK):
                content = memoryview(piece.cpu().numpy())
                while len(content):
                    written = os.pwrite(file.fileno(), content, place)
                    place, content = place + written, content[written:]
        os.fsync(file.fileno())


def _header(shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The file's beginning, and the bytes of the tensors that follow it."""
    header: dict[str, dict[str, object]] = {}
    end = 0
    for key, (dtype, shape) in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned
    return len(text).to_bytes(8, "little") + text, end


def write_bytes(path: Path, content: bytes) -> Sums:
    """Write a small file and force it to disk."""
    with _Writer(path) as writer:
        writer.write(memoryview(content))
    return writer.sums


class _Writer:
    """A file whose checksums are made by a second thread while the first one writes."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=2**20)  # noqa: SIM115 (closed in __exit__)
        self._pool = ThreadPoolExecutor(1)
        self._summing: Future[None] | None = None
        self._size = self._flushed = 0
        self._crc32: list[int] = []

    @property
    def sums(self) -> Sums:
        return Sums(self._size, self._crc32)

    def write(self, content: memoryview) -> None:
        if self._summing is not None:
            self._summing.result()  # so that at most two pieces are held
        self._summing = self._pool.submit(self._sum, content, self._size)
        self._file.write(content)
        self._size += len(content)
        if self._size - self._flushed >= _SPAN * BLOCK and hasattr(os, "posix_fadvise"):
            # the disk begins now, not at the fsync; and what is written needs no place in the page cache
            os.posix_fadvise(self._file.fileno(), self._flushed, self._size - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self._size

    def _sum(self, content: memoryview, begin: int) -> None:
        while len(content):
            if begin % BLOCK == 0:
                self._crc32.append(0)
            piece = content[: BLOCK - begin % BLOCK]
            self._crc32[-1] = zlib.crc32(piece, self._crc32[-1])
            begin, content = begin + len(piece), content[len(piece) :]

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._pool.shutdown()
            self._file.close()
        if kind is None and self._summing is not None:
            self._summing.result()


def sync_folder(path: Path) -> None:
    """Force a folder's entries (new names, renames) to disk, where the system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# reading ----------------------------------------------------------------------------------------------------------------


def read_bytes(path: Path, sums: Sums) -> bytes:
    """A small file's content. Raises Damaged where it is not what `sums` says."""
    with _Reader(path, sums) as reader:
        return b"".join(reader.block(number, memoryview(bytearray(BLOCK))) for number in range(len(sums.crc32)))


def read_header(path: Path, sums: Sums) -> dict[str, Entry]:
    """What tensors a file holds. Raises Damaged where its beginning is not what `sums` says."""
    with _Reader(path, sums) as reader:
        content = bytearray(reader.block(0, memoryview(bytearray(BLOCK))))
        length = 8 + int.from_bytes(content[:8], "little")
        for number in range(1, math.ceil(length / BLOCK)):
            content += reader.block(number, memoryview(bytearray(BLOCK)))
    entries = {}
    for key, value in json.loads(content[8:length]).items():
        begin, end = value["data_offsets"]
        entries[key] = Entry(_TYPES[value["dtype"]], tuple(value["shape"]), length + begin, length + end)
    return entries


def read_tensors(path: Path, sums: Sums, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (contiguous, on any device) with the tensors of the same names, which must be all that there are.

    Holds 3 MiB beside them. Raises Damaged where the file is not what `sums` says, or holds other tensors than
    these; the targets are then partly overwritten.
    """
    entries = read_header(path, sums)
    if entries.keys() != targets.keys():
        odd = sorted(entries.keys() ^ targets.keys())
        raise Damaged(f"{path} and this version's state differ in {', '.join(odd[:5])}")
    for key, target in targets.items():
        if (entries[key].dtype, entries[key].shape) != (target.dtype, tuple(target.shape)):
            raise Damaged(f"{path}: {key} is {entries[key].dtype} {entries[key].shape}, not {target.dtype} {target.shape}")
    read_ranges(path, sums, [(entries[key].start, bytes_of(target)) for key, target in targets.items()])


def read_ranges(path: Path, sums: Sums, ranges: Sequence[tuple[int, Tensor]]) -> None:
    """Fill tensors (contiguous, on any device) with the file's bytes from a place on each; the ranges do not overlap.

    Only the blocks that hold some of them are read and checked. Raises Damaged where one is not what `sums` says.
    """
    # by place; those without bytes have none
    layout = sorted(((start, start + t.numel() * t.element_size(), t) for start, t in ranges if t.numel()), key=lambda r: r[0])
    stops = [stop for _, stop, _ in layout]
    wanted = sorted({number for start, stop, _ in layout for number in range(start // BLOCK, -(-stop // BLOCK))})
    with _Reader(path, sums) as reader, ThreadPoolExecutor(_READERS) as pool:

        def fill(numbers: list[int]) -> None:
            buffer = memoryview(bytearray(BLOCK))
            for number in numbers:
                begin, end = number * BLOCK, min((number + 1) * BLOCK, sums.bytes)
                first = bisect_right(stops, begin)
                start, stop, target = layout[first]
                if start <= begin and end <= stop and target.device.type == "cpu":  # most blocks: no copy
                    reader.block(number, bytes_of(target).numpy().data[begin - start : end - start])
                    continue
                content = torch.frombuffer(reader.block(number, buffer), dtype=torch.uint8)
                for start, stop, target in layout[first:]:
                    if start >= end:
                        break
                    low, high = max(start, begin), min(stop, end)
                    bytes_of(target)[low - start : high - start].copy_(content[low - begin : high - begin])

        running = [pool.submit(fill, wanted[first : first + _RUN]) for first in range(0, len(wanted), _RUN)]
        try:
            for future in running:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


class _Reader:
    """A file open for reading, its blocks checked. Every trouble with it is raised as Damaged, with its name."""

    def __init__(self, path: Path, sums: Sums) -> None:
        self.path, self.sums = path, sums
        try:
            self.descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Damaged(f"{path} cannot be opened ({error.strerror})") from None

    def __enter__(self) -> _Reader:
        size = os.fstat(self.descriptor).st_size
        if size != self.sums.bytes or len(self.sums.crc32) != math.ceil(size / BLOCK):
            os.close(self.descriptor)
            raise Damaged(f"{self.path} has {size} bytes, but {self.sums.bytes} were written")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.descriptor)

    def block(self, number: int, buffer: memoryview) -> memoryview:
        """Block `number`, in `buffer`; safe to call from many threads."""
        begin = number * BLOCK
        content = buffer[: min(BLOCK, self.sums.bytes - begin)]
        filled = 0
        while filled < len(content):
            try:
                read = os.preadv(self.descriptor, [content[filled:]], begin + filled)
            except OSError as error:  # a bad sector
                raise Damaged(f"{self.path} cannot be read at byte {begin + filled} ({error.strerror})") from None
            if not read:
                raise Damaged(f"{self.path} ends at byte {begin + filled}")
            filled += read
        if zlib.crc32(content) != self.sums.crc32[number]:
            raise Damaged(f"{self.path}: the checksum of bytes {begin} to {begin + len(content) - 1} is wrong")
        return content


def bytes_of(tensor: Tensor) -> Tensor:
    """A contiguous tensor's own memory as a flat uint8 tensor. Raises RuntimeError for one that is not contiguous."""
    return tensor.detach().view(-1).view(torch.uint8)
