"""Images that stand beside their documents: by name or by URL, in folders, in tars, in img2dataset's shards.

A name never leads out of the folder, and of tars only regular files are taken.
"""

import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from datamodules.errors import DataError
from datamodules.images import SUFFIXES
from datamodules.sources.layout import Record
from datamodules.tar import split_name

JSON_BYTES = 1_000_000


class ImageStore:
    """Images under a folder, or in one tar. Plain values only: it is sent to worker processes.

    Looked for are `FOLDER/name`, `FOLDER/ab/name` with the first two letters of the name (as `kosmosg data download`
    stores it), and in the tars below the folder a member of that name, or the image whose json tells this URL.

    Raises:
        DataError: there is no such folder or tar.
    """

    def __init__(self, place: Path, max_bytes: int):
        if not place.exists():
            raise DataError(f"store='{place}' does not exist.")
        self.folder = place.resolve() if place.is_dir() else None
        self.max_bytes = max_bytes
        self.tars = sorted(place.rglob("*.tar")) if place.is_dir() else [place]
        self.hashes, self.places = _index(self.tars)

    def find(self, record: Record, name: str) -> bytes:
        """The bytes of an image.

        Args:
            name: a file name, a relative path, or a URL.

        Raises:
            SampleError: `missing_image`, `refused_path` or `member_too_large`.
        """
        number = int(np.searchsorted(self.hashes, _hash(name)))
        if number < len(self.hashes) and self.hashes[number] == _hash(name):
            tar, offset, size = self.places[number].tolist()
            self._check(record, name, size)
            with open(self.tars[tar], "rb") as stream:
                stream.seek(offset)
                return stream.read(size)
        for path in self._paths(record, name):
            try:
                self._check(record, name, path.stat().st_size)
                return path.read_bytes()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                continue
            except OSError as error:
                raise record.error("unreadable_file", f"{name!r:.200}: {error}") from error
        raise record.error("missing_image", f"{name!r:.200}")

    def _paths(self, record: Record, name: str) -> list[Path]:
        if self.folder is None:
            return []
        if "://" in name:
            name = url_name(name)
        if not is_inside(name):
            raise record.error("refused_path", f"{name!r:.200} leads out of the folder of images")
        found = [self.folder / name, self.folder / name[:2] / name]
        stem = PurePosixPath(name)
        found += [path.with_suffix(f".{suffix}") for path in found for suffix in SUFFIXES if not stem.suffix]
        for path in found:
            # A link inside the folder may still point elsewhere.
            if not path.resolve().is_relative_to(self.folder):
                raise record.error("refused_path", f"{name!r:.200} leads out of the folder of images")
        return found

    def _check(self, record: Record, name: str, size: int) -> None:
        if size > self.max_bytes:
            raise record.error("member_too_large", f"{name!r:.200} has {size} bytes, at most {self.max_bytes}")


def is_inside(name: str) -> bool:
    """Whether a name is a plain relative path that stays where it begins."""
    path = PurePosixPath(name)
    plain = bool(name) and "\0" not in name and "\\" not in name and len(os.fsencode(name)) < 1000
    return plain and not path.is_absolute() and ".." not in path.parts


def url_name(url: str) -> str:
    """The file name under which an image of this URL is kept."""
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass
class _Found:
    """Members of one tar group on the way through a tar: the image's place, and the URL that its json tells."""

    key: str = ""
    image: tuple[int, int] | None = None
    url: str | None = None


def _index(tars: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes of names and URLs, and (tar, offset, size) of each: 32 bytes an image, not a dictionary."""
    hashes: list[int] = []
    places: list[tuple[int, int, int]] = []

    def add(name: str, tar: int, place: tuple[int, int]) -> None:
        hashes.append(_hash(name))
        places.append((tar, *place))

    for number, path in enumerate(tars):
        group = _Found()
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members.clear()  # type: ignore[attr-defined]  # a large tar's headers would all stay in memory
                    if not member.isfile():
                        continue
                    key, suffix = split_name(member.name)
                    place = (member.offset_data, member.size)
                    if key != group.key:
                        group = _Found(key)
                    if suffix in SUFFIXES:
                        group.image = place
                        for name in {member.name, PurePosixPath(member.name).name}:
                            add(name, number, place)
                    elif suffix == "json" and member.size <= JSON_BYTES:
                        group.url = _url_in(tar.extractfile(member).read())  # type: ignore[union-attr]
                    if group.image and group.url:
                        add(group.url, number, group.image)
                        group.url = None
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"'{path}' is no readable tar of images ({error}); replace it or leave it out.") from error
    order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
    return np.array(hashes, dtype=np.uint64)[order], np.array(places, dtype=np.int64).reshape(-1, 3)[order]


def _url_in(content: bytes) -> str | None:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    url = record.get("url") if isinstance(record, dict) else None
    return url if isinstance(url, str) else None


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
