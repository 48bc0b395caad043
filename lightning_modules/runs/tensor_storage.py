"""Tensors in a folder through torch.distributed.checkpoint, with an index that is JSON.

PyTorch keeps that index in a pickle, `.metadata`, and executes it on loading. Here it is `tensors.json`, and the pieces
themselves are read with `weights_only`: nothing that lies in the folder is ever run. Each process writes the pieces it
holds into a file of its own; any number of processes can read them again, each the pieces it needs.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

INDEX_FILE = "tensors.json"


class StorageError(ValueError):
    """Tensors that cannot be read: not there, of another shape, or holding what is refused."""


class JsonIndexWriter(dcp.FileSystemWriter):
    """Writes each process's pieces and, on the first process, the index."""

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """Write the index: for each tensor its dtype, shape and pieces [offsets, sizes, file, first byte, bytes]."""
        stored = {result.index: result.storage_data for of_process in results for result in of_process}
        index = {}
        for name, tensor in metadata.state_dict_metadata.items():
            pieces = []
            for chunk in tensor.chunks:  # type: ignore[union-attr]
                place = stored[MetadataIndex(name, chunk.offsets)]
                pieces.append([list(chunk.offsets), list(chunk.sizes), place.relative_path, place.offset, place.length])
            dtype = str(tensor.properties.dtype).removeprefix("torch.")  # type: ignore[union-attr]
            index[name] = {"dtype": dtype, "shape": list(tensor.size), "pieces": pieces}  # type: ignore[union-attr]
        write_synced(Path(self.path) / INDEX_FILE, json.dumps(index, separators=(",", ":")).encode())


class JsonIndexReader(dcp.FileSystemReader):
    """Reads what JsonIndexWriter wrote."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        tensors, places = {}, {}
        for name, entry in read_index(Path(self.path)).items():
            chunks = [ChunkStorageMetadata(torch.Size(piece[0]), torch.Size(piece[1])) for piece in entry["pieces"]]
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            tensors[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            for offsets, _, file, first, length in entry["pieces"]:
                places[MetadataIndex(name, offsets)] = _StorageInfo(file, first, length)
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))


def save_tensors(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write `tensors`, whole or sharded (DTensor), into the existing `folder`. All processes call it together.

    A tensor that several processes hold whole is written once.

    Raises:
        OSError: on every process, what the first failing one met (a full disk).
    """
    try:
        dcp.save(
            dict(tensors),
            storage_writer=JsonIndexWriter(folder),
            planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
            no_dist=not distributed.is_initialized(),
        )
    except CheckpointException as error:
        raise OSError(f"{folder}: {_first_cause(error)}") from error


def load_tensors(folder: Path, targets: Mapping[str, Tensor], *, alone: bool = False) -> None:
    """Fill `targets` in place, whole or sharded in whatever way. All processes call it together unless `alone`.

    Raises:
        StorageError: a target is absent or has another shape, a piece cannot be read or is refused.
    """
    index = read_index(folder)
    for name, target in targets.items():
        if name not in index:
            raise StorageError(f"{folder}: {name} is absent")
        if list(target.shape) != index[name]["shape"]:
            raise StorageError(f"{folder}: {name} is {index[name]['shape']} there and {list(target.shape)} here")
    try:
        dcp.load(
            dict(targets),
            storage_reader=JsonIndexReader(folder),
            planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
            no_dist=alone or not distributed.is_initialized(),
        )
    except CheckpointException as error:
        raise StorageError(f"{folder}: {_first_cause(error)}") from error


def read_index(folder: Path) -> dict[str, dict[str, Any]]:
    """The index, checked: plain file names within the folder, known dtypes, whole numbers.

    Raises:
        StorageError: there is none, or it is not of this form.
    """
    file = folder / INDEX_FILE
    try:
        index = json.loads(file.read_bytes())
        for name, entry in index.items():
            if not isinstance(getattr(torch, entry["dtype"]), torch.dtype):
                raise StorageError(f"{file}: {name} has the dtype {entry['dtype']!r}, which is none")
            for offsets, sizes, piece_file, first, length in entry["pieces"]:
                if Path(piece_file).name != piece_file or piece_file in ("", ".", ".."):
                    raise StorageError(f"{file}: {name} is said to lie in {piece_file!r}, which is no file here")
                numbers = [*offsets, *sizes, first, length, *entry["shape"]]
                if not all(isinstance(number, int) and number >= 0 for number in numbers):
                    raise StorageError(f"{file}: {name} has a place that is not made of whole numbers")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file} is no index of tensors: {error}") from error
    return index


def read_plain(file: Path) -> Any:
    """What `write_plain` wrote: plain values and tensors.

    Raises:
        StorageError: names the file and what was refused in it, such as a function to be called.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise StorageError(f"{file}: {_essence(error)}") from error


def write_plain(value: Any, file: Path) -> None:
    """Write plain values and tensors, on disk when this returns."""
    with open(file, "wb") as target:
        torch.save(value, target)
        target.flush()
        os.fsync(target.fileno())


def write_synced(file: Path, content: bytes) -> None:
    """Write a file that is on disk when this returns."""
    with open(file, "wb") as target:
        target.write(content)
        target.flush()
        os.fsync(target.fileno())


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_cause(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"process {rank}: {_essence(cause)}"


def _essence(error: BaseException) -> str:
    """The part of PyTorch's message that says what is wrong, without its advice on how to execute it all the same."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "Unsupported" in line or "GLOBAL" in line or "blocked" in line]
    return (telling or lines or [type(error).__name__])[0]
