"""Folders and files that are there whole or not at all: written beside, flushed to the disk, renamed."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kosmosg.conversion.errors import ConversionError

# One of these tells a folder that may be replaced from one that was named by mistake.
MARKS = ("conversion.json", "model_index.json", "mllm/config.json")


def require_free(target: Path, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse to write where something stands.

    Args:
        inputs: files and folders that are read, which must not be inside `target`.

    Raises:
        ConversionError: `target` exists and `overwrite` is off, is no model folder, or holds an input.
    """
    if not (target.exists() or target.is_symlink()):
        return
    if not overwrite:
        raise ConversionError(f"'{target}' exists; give another name, or --overwrite to replace it.")
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(target.resolve()):
            raise ConversionError(f"'{path}' lies in '{target}', which --overwrite would replace.")
    if target.is_dir() and any(target.iterdir()) and not any((target / mark).exists() for mark in MARKS):
        raise ConversionError(
            f"'{target}' is no model folder (it has none of {', '.join(MARKS)}); --overwrite keeps it."
        )


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to; it takes `target`'s place at the end, and is removed if anything fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside, replaced = (target.with_name(f".{target.name}.{kind}.{os.getpid()}") for kind in ("new", "old"))
    remove(beside)
    try:
        yield beside
        flush(beside)
        if target.exists() or target.is_symlink():
            target.rename(replaced)
        beside.rename(target)
    except BaseException:
        remove(beside)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    remove(replaced)
    flush_one(target.parent)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Bring a file, or a folder with all in it, to the disk."""
    for inner in (*path.rglob("*"), path):
        flush_one(inner)


def flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
