"""Files and folders that are replaced whole or not at all, also when the process is killed or the power fails.

Every write is flushed to the disk under a temporary name before it takes the target's place. The temporary name begins
with a dot and is random, so no other process (of another host or container) can have it, and what a killed process
left is neither found by its name nor written into again.
"""

import ctypes
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LEFTOVER = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.(?P<state>new|old)")
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # <linux/fcntl.h>, <linux/fs.h>


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write a file or a folder to; it takes the place of `path` at the end.

    Until then `path` is what it was. If anything fails, the temporary is removed and `path` stays. Folders are made
    down to `path`'s parent.

    Raises:
        OSError: it cannot be written, or a file would replace a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Cut: a file name has at most 255 bytes, a character up to four.
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(8)}.new")
    try:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            if not written.is_symlink():
                flush(written)
        if temporary.is_dir() and os.path.lexists(path):
            _exchange(temporary, path)
        else:
            temporary.replace(path)
        flush(path.parent)
    finally:
        remove(temporary)


def write_bytes(file: str | Path, content: bytes) -> None:
    """Replace a file's content."""
    with replaced(file) as temporary:
        temporary.write_bytes(content)


def write_text(file: str | Path, text: str) -> None:
    """Replace a file's content, in UTF-8."""
    write_bytes(file, text.encode())


def write_json(file: str | Path, value: Any) -> None:
    """Replace a file's content, as JSON with an indentation of two spaces."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def decode_text(content: bytes, errors: str = "strict") -> str:
    """UTF-8 as text, without the byte order mark that Windows' programs put where a file begins.

    Raises:
        UnicodeDecodeError: the content is not UTF-8.
    """
    return content.decode("utf-8", errors).lstrip("\ufeff")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove what killed processes left in `folder`. No other process may be writing there.

    A folder that was moved aside for one that never came (see `_exchange`) is put back.
    """
    for path in folder.glob(".*"):
        if (match := LEFTOVER.fullmatch(path.name)) is None:
            continue
        if match["state"] == "old" and not os.path.lexists(target := path.with_name(match["name"])):
            path.rename(target)
        else:
            remove(path)


def _exchange(new: Path, path: Path) -> None:
    """Let `new` and `path` change places, in one system call where the system has it (Linux, local file systems).

    Elsewhere `path` is moved aside first, to a name that `clear_leftovers` knows.
    """
    if sys.platform == "linux" and (rename := getattr(ctypes.CDLL(None), "renameat2", None)) is not None:
        if rename(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE) == 0:
            return
    aside = new.with_suffix(".old")
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    aside.rename(new)


def flush(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
