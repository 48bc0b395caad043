"""Replace files and folders atomically, even if the process is killed or the power fails.

Content is written under a temporary name and flushed to disk before it replaces the target. Temporary names start with
a dot and are random, so processes on other hosts or in other containers cannot collide, and leftovers of a killed
process are never reused.
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
    """Yield a temporary path for a file or folder, which replaces `path` on exit.

    On an error the temporary is removed and `path` is unchanged. Missing parent folders are created.

    Raises:
        OSError: the path cannot be written, or a file would replace a folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is cut, because file names have at most 255 bytes and a character up to four.
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
    """Write a file atomically."""
    with replaced(file) as temporary:
        temporary.write_bytes(content)


def write_text(file: str | Path, text: str) -> None:
    """Write a file atomically, in UTF-8."""
    write_bytes(file, text.encode())


def write_json(file: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented by two spaces."""
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Decode UTF-8, without the byte order mark that Windows programs put at the start of a file.

    Raises:
        UnicodeDecodeError: the content is not UTF-8.
    """
    return content.decode("utf-8", errors).lstrip("\ufeff")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Remove temporary files of killed processes from `folder`, while no other process writes to it.

    A folder that `_exchange` had moved aside is restored if its replacement is missing.
    """
    for path in folder.glob(".*"):
        if (match := LEFTOVER.fullmatch(path.name)) is None:
            continue
        if match["state"] == "old" and not os.path.lexists(target := path.with_name(match["name"])):
            path.rename(target)
        else:
            remove(path)


def _exchange(new: Path, path: Path) -> None:
    """Exchange `new` and `path`, atomically where supported (Linux, local file systems).

    Elsewhere `path` is first moved aside, to a name that `clear_leftovers` recognises.
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
    """Flush a file's content or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
