"""Checkpoints in parts: what several ranks write together, and any number of ranks can read.

torch.distributed.checkpoint plans who writes and who reads which rows, and makes one rank's trouble everyone's; the files are
those of `tensor_file`, streamed and checked block by block, one from each rank. This module is imported only where there are
parts: the planner takes 1.7 s and 40 MiB to load.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from fanin.tensor_file import Damaged, Entry, Sums, bytes_of, read_header, read_ranges, write_tensors


class Rows:
    """A tensor's rows first..., of which the whole has `total`; as torch.distributed.checkpoint asks of what is sharded."""

    def __init__(self, rows: Tensor, first: int, total: int) -> None:
        self.rows = rows.detach()
        self.first, self.total = first, total

    def _chunk(self) -> ChunkStorageMetadata:
        offsets = torch.Size([self.first, *[0] * (self.rows.ndim - 1)])
        return ChunkStorageMetadata(offsets=offsets, sizes=self.rows.size())

    def __create_write_items__(self, name: str, rows: Rows) -> list[WriteItem]:
        chunk, size = self._chunk(), torch.Size([self.total, *self.rows.shape[1:]])
        data = TensorWriteData(chunk=chunk, properties=TensorProperties.create_from_tensor(self.rows), size=size)
        return [WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


Part = Tensor | Rows


def write_parts(folder: Path, rank: int, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Every rank's tensors into state-<rank>.safetensors in `folder`; what all ranks have in full is written by one.

    Returns, on rank 0, what `read_parts` needs: the files' checksums and where each row lies. Raises OSError on every rank
    where one of them could not write.
    """
    writer = _Writer(folder, rank)
    with _troubles(OSError):
        dcp.save(dict(parts), storage_writer=writer, planner=_SavePlanner())
    return writer.layout


def read_parts(folder: Path, layout: Mapping[str, Any], parts: Mapping[str, Part], *, alone: bool) -> None:
    """Fill `parts`, on every rank, with the rows that they stand for; alone: there is no other rank.

    Raises `tensor_file.Damaged` on every rank where a file is not what was written.
    """
    with _troubles(Damaged), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no other rank
        dcp.load(dict(parts), storage_reader=_Reader(folder, layout), planner=_LoadPlanner(), no_dist=alone)


@contextmanager
def _troubles(kind: type[Exception]) -> Iterator[None]:
    try:
        yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items())
        raise kind(f"rank {rank}: {first}") from first


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        part = self.state_dict[index.fqn]
        return part.rows if isinstance(part, Rows) else super().lookup_object(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """The names are flat already, and what is not a tensor would be lost on the way."""
        self.state_dict = self.original_state_dict = state_dict
        self.mappings = {}
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        part = self.state_dict[index.fqn]
        return part.rows if isinstance(part, Rows) else super().lookup_tensor(index)


class _Writer(dcp.StorageWriter):
    """Writes this rank's items to one file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.name = folder, f"state-{rank}.safetensors"
        self.layout: dict[str, Any] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        sums = write_tensors(self.folder / self.name, tensors)  # type: ignore[arg-type]
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, 0, (self.name, sums)) for item in plan.items])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for result in (result for own in results for result in own):
            name, sums = result.storage_data
            files.setdefault(name, asdict(sums))
            whole = metadata.state_dict_metadata[result.index.fqn]
            entry = tensors.setdefault(result.index.fqn, {"shape": list(whole.size), "parts": {}})  # type: ignore[union-attr]
            entry["parts"][name] = result.index.offset[0] if result.index.offset else 0
        self.layout = {"files": files, "tensors": tensors}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


class _Reader(dcp.StorageReader):
    """Reads the ranges of bytes that this rank's rows are."""

    def __init__(self, folder: Path, layout: Mapping[str, Any]) -> None:
        self.folder, self.layout = folder, layout
        self.sums = {name: Sums(**sums) for name, sums in layout["files"].items()}
        self.headers: dict[str, dict[str, Entry]] = {}

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self.headers = {name: read_header(self.folder / name, sums) for name, sums in self.sums.items()}
        whole: dict[str, Any] = {}
        for name, tensor in self.layout["tensors"].items():
            entries = {file: self.headers[file][name] for file in tensor["parts"]}
            chunks = [
                ChunkStorageMetadata(offsets=_offset(first, entries[file].shape), sizes=torch.Size(entries[file].shape))
                for file, first in tensor["parts"].items()
            ]
            dtype = next(iter(entries.values())).dtype
            whole[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(tensor["shape"]), chunks)
        return Metadata(whole)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        ranges: dict[str, list[tuple[int, Tensor]]] = {}
        for item in plan.items:
            name = item.storage_index.fqn
            first = item.storage_index.offset[0] if item.storage_index.offset else 0
            file = next(file for file, place in self.layout["tensors"][name]["parts"].items() if place == first)
            entry, target = self.headers[file][name], planner.resolve_tensor(item)
            row = (entry.stop - entry.start) // max(entry.shape[0], 1) if entry.shape else 0
            skipped = item.storage_offsets[0] * row if entry.shape else 0
            ranges.setdefault(file, []).append((entry.start + skipped, bytes_of(target)))
        for file, own in ranges.items():
            read_ranges(self.folder / file, self.sums[file], own)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _offset(first: int, shape: tuple[int, ...]) -> torch.Size:
    return torch.Size([first, *[0] * (len(shape) - 1)] if shape else [])
