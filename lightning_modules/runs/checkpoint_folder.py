"""A checkpoint: a folder that is complete or absent, and intact before anything in it is believed.

step-00000500/
  state.pt        step, position of the data, schedules, counts: plain values
  __0_0.distcp …  pieces of the tensors, one file a process     (tensor_storage.py)
  tensors.json    which tensor lies where
  manifest.json   written last: bytes and SHA-256 of every other file

It is written beside its place under a name that begins with a dot, fsynced and renamed; what stands is never written
to. On several machines the folder lies on a file system that all of them share.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as distributed
from torch import Tensor

from lightning_modules.runs.tensor_storage import (
    StorageError,
    read_plain,
    save_tensors,
    sync_folder,
    write_plain,
    write_synced,
)

Outcome = TypeVar("Outcome")
CHECKPOINT_PATTERN = "step-*"
FORMAT = 1
MANIFEST_FILE, STATE_FILE = "manifest.json", "state.pt"
BLOCK_BYTES = 1 << 20
READERS = 8  # hashing lets go of the interpreter's lock


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; nothing of it is left, and those before it stand."""


class CheckpointDamagedError(ValueError):
    """A checkpoint that is not what was written."""


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` updates; names sort as steps do."""
    return f"step-{step:08d}"


def checkpoint_step(folder: Path) -> int:
    """Updates done in a checkpoint, by its name."""
    return int(folder.name.removeprefix("step-"))


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write the checkpoint `folder`. All processes call it together, with the same `state`.

    Args:
        tensors: whole, or sharded over the processes.
        state: plain values.

    Raises:
        CheckpointWriteError: on all processes alike.
    """
    beside = folder.with_name(f".{folder.name}")
    try:
        _together(lambda: _make_room(beside), first_alone=True)
        _together(lambda: save_tensors(tensors, beside))
        # Each process hashes what it wrote, as read back from the file.
        sums = _together(lambda: _sums(beside, f"__{_rank()}_*"))
        _together(lambda: _complete(beside, folder, dict(state), sums), first_alone=True)
    except CheckpointWriteError:
        if _rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the `keep` latest checkpoints in `folder`; one that is half removed is no longer found."""
    for old in sorted(folder.glob(CHECKPOINT_PATTERN))[:-keep]:
        removed = old.with_name(f".{old.name}.removed")
        old.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain values. Raises StorageError: what is refused in the file, by name."""
    return read_plain(folder / STATE_FILE)


def require_intact(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        CheckpointDamagedError: names each file that is missing, changed or does not belong there.
    """
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
        version, listed = manifest["format"], manifest["files"]
        expected = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointDamagedError(f"'{folder}' has no readable {MANIFEST_FILE}: {error}") from error
    if version != FORMAT:
        raise CheckpointDamagedError(f"'{folder}' is of format {version}; this version reads format {FORMAT}")
    with ThreadPoolExecutor(READERS) as pool:
        problems = [problem for problem in pool.map(lambda item: _problem(folder, *item), expected.items()) if problem]
    for file in sorted(folder.iterdir()):
        if file.name not in expected and file.name != MANIFEST_FILE:
            note = ", a pickle, which is never opened" if file.name.endswith(".metadata") else ""
            problems.append(f"{file.name} does not belong there{note}")
    if problems:
        raise CheckpointDamagedError(f"'{folder}' is damaged: {'; '.join(problems)}")


def _problem(folder: Path, name: str, expected: tuple[int, str]) -> str | None:
    file = folder / name
    if not file.is_file():
        return f"{name} is missing"
    if file.stat().st_size != expected[0]:
        return f"{name} has {file.stat().st_size} bytes instead of {expected[0]}"
    return None if _digest(file) == expected[1] else f"{name} has another content than was written"


def _make_room(beside: Path) -> None:
    """An empty folder; what an interrupted save or removal left is cleared away."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    for left in beside.parent.glob(f".{CHECKPOINT_PATTERN}"):
        shutil.rmtree(left)
    beside.mkdir()


def _complete(beside: Path, folder: Path, state: dict[str, Any], sums: list[dict[str, Any]]) -> None:
    write_plain(state, beside / STATE_FILE)
    files = {name: entry for of_process in sums for name, entry in of_process.items()}
    files |= _sums(beside, "[!_]*")
    manifest = {"format": FORMAT, "step": checkpoint_step(folder), "processes": len(sums), "files": files}
    write_synced(beside / MANIFEST_FILE, json.dumps(manifest, indent=1).encode())
    sync_folder(beside)
    beside.rename(folder)
    sync_folder(folder.parent)


def _sums(folder: Path, pattern: str) -> dict[str, dict[str, Any]]:
    files = sorted(folder.glob(pattern))
    return {file.name: {"bytes": file.stat().st_size, "sha256": _digest(file)} for file in files}


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as source:
        while block := source.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _together(action: Callable[[], Outcome], first_alone: bool = False) -> list[Outcome]:
    """Run `action` on all processes or on the first alone; its results in order. What fails on one fails on all."""
    outcome, failure = None, None
    if _rank() == 0 or not first_alone:
        try:
            outcome = action()
        except (OSError, RuntimeError, StorageError) as error:
            failure = f"process {_rank()}: {error}"
    outcomes: list[Any] = [(outcome, failure)]
    if distributed.is_initialized():
        outcomes = [None] * distributed.get_world_size()
        distributed.all_gather_object(outcomes, (outcome, failure))
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        raise CheckpointWriteError(os.strerror(28) if "No space left" in failures[0] else failures[0])
    return [result for result, _ in outcomes]
