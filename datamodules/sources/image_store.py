"""Find the images of documents by name or URL, in a folder and in the tars and zips below it.

Only regular files inside the folder are read.
"""

import hashlib
import io
import json
import stat
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from datamodules.errors import ShardError
from datamodules.images import SUFFIXES, StoredImage
from datamodules.sources.converter import Converter, ImageConversionConfig, checked_image
from datamodules.sources.files import Record, is_hidden, visible_files
from datamodules.sources.tables import text_of

ARCHIVES = (".tar", ".zip")
COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
HEADER_BYTES = 1_000_000
"""Maximum size of an extended header of a tar, and of a json member."""
LOCAL_HEADER = 30
ANY_FOLDER = "*/"
IN_TAR = -1
"""Stands for the compression method of images in tars."""


@dataclass
class StoreConfig(ImageConversionConfig):
    """Settings of data sets whose images are stored separately."""

    store: str | None = None
    """Folder of images, or of tars and zips of images such as img2dataset's output; null: the folder of the input."""


Config = TypeVar("Config", bound=StoreConfig)


class StoreConverter(Converter[Config]):
    """Base class of converters with an image store."""

    def __init__(self, source: Path, config: Config):
        super().__init__(source, config)
        path = Path(config.store) if config.store else source if source.is_dir() else source.parent
        self.store = ImageStore(path, config.limits.max_member_bytes)


class ImageStore:
    """Images in a folder, or in one tar or zip. Instances are sent to worker processes.

    A name is searched for in this order: as a member of an archive, or the URL in the json of an image's tar group (as
    img2dataset writes it); as a path in the folder; as a member in any folder of an archive.

    Raises:
        ShardError: the path does not exist, or an archive cannot be read.
    """

    def __init__(self, path: Path, max_bytes: int):
        self.max_bytes = max_bytes
        self.folder = path.resolve() if path.is_dir() else None
        if self.folder is not None:
            self.archives = visible_files(path, lambda file: file.suffix.lower() in ARCHIVES)
            if compressed := visible_files(path, lambda file: file.name.lower().endswith(COMPRESSED)):
                raise ShardError(f"'{compressed[0]}' is compressed: decompress it (gunzip), or set another store=…")
        elif path.is_file() and path.suffix.lower() in ARCHIVES:
            self.archives = [path]
        else:
            raise ShardError(f"store='{path}' must be a folder, a .tar or a .zip.")
        self.hashes, self.entries = _index(self.archives)

    def image(self, record: Record, config: ImageConversionConfig, *values: Any) -> StoredImage:
        """Return an image of a row, checked by `checked_image`.

        Args:
            values: an encoded image (see `embedded_bytes`), or names and URLs of the image; None is ignored.

        Raises:
            SampleError: `invalid_field`, or the errors of `find` and `checked_image`.
        """
        given = [value for value in values if value is not None] or [None]
        content = embedded_bytes(given[0])
        if content is not None:
            return checked_image(record, content, "image", config)
        names = [text_of(record, value.get("path") if isinstance(value, dict) else value, "image") for value in given]
        return checked_image(record, self.find(record, *names), names[0][:200], config)

    def find(self, record: Record, *names: str) -> bytes:
        """Return the bytes of an image.

        Args:
            names: file names, relative paths or URLs; the first one that exists is used.

        Raises:
            SampleError: `missing_image`, `ambiguous_image`, `refused_path`, `member_too_large`, `damaged_file` or
                `unreadable_file`.
        """
        for name in names:
            if entries := self._entries(name):
                return self._read_entry(record, name, *entries[0])
            if "://" in name:
                continue
            content = read_inside(record, self.folder, name, self.max_bytes) if self.folder else None
            if content is not None:
                return content
            if len(entries := self._entries(ANY_FOLDER + name)) > 1:
                raise record.error("ambiguous_image", f"{name!r:.200} is in {len(entries)} folders of the archives")
            if entries:
                return self._read_entry(record, name, *entries[0])
        raise record.error("missing_image", f"{names[0]!r:.200}")

    def _entries(self, name: str) -> list[list[int]]:
        begin, end = (np.searchsorted(self.hashes, _hash(name), side) for side in ("left", "right"))
        return self.entries[begin:end].tolist()

    def _read_entry(self, record: Record, name: str, archive: int, offset: int, size: int, method: int) -> bytes:
        _check_size(record, name, size, self.max_bytes)
        try:
            with open(self.archives[archive], "rb") as stream:
                stream.seek(offset)
                if method != IN_TAR:  # a zip's directory contains the start of the local header, but not its length
                    header = stream.read(LOCAL_HEADER)
                    stream.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
                content = stream.read(size)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.max_bytes + 1)
        except (OSError, zlib.error) as error:
            raise record.error("damaged_file", f"{name!r:.200}: {error}") from error
        if method not in (IN_TAR, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise record.error("damaged_file", f"{name!r:.200} is encrypted, or not compressed with deflate")
        _check_size(record, name, len(content), self.max_bytes)
        return content


def embedded_bytes(value: Any) -> bytes | None:
    """Return the encoded image in a value of a Parquet file, bytes or the Hub's {"bytes", "path"}; None without one."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def read_inside(record: Record, folder: Path, name: str, max_bytes: int) -> bytes | None:
    """Read a regular file of a folder, which must be a resolved path; None if it does not exist.

    Raises:
        SampleError: `refused_path`, `member_too_large` or `unreadable_file`.
    """
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):  # `..`, an absolute path, or a link
            raise record.error("refused_path", f"{name!r:.200} is outside the folder")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would block, and a device would never end
            raise record.error("refused_path", f"{name!r:.200} is not a regular file")
        _check_size(record, name, status.st_size, max_bytes)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: invalid name; RuntimeError: circular links
        raise record.error("unreadable_file", f"{name!r:.200}: {error}") from error


def _check_size(record: Record, name: str, size: int, limit: int) -> None:
    if size > limit:
        raise record.error("member_too_large", f"{name!r:.200} has at least {size} bytes, at most {limit}")


def _index(archives: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted hashes of names and URLs with the position of each image: 40 bytes per name, less than a dict."""
    hashes, entries = array("Q"), array("q")
    for number, path in enumerate(archives):
        members = _zip_images if path.suffix.lower() == ".zip" else _tar_images
        try:
            for name, *entry in members(path):
                for alias in [name] if "://" in name else [name, ANY_FOLDER + PurePosixPath(name).name]:
                    hashes.append(_hash(alias))
                    entries.extend((number, *entry))
        except Exception as error:  # on malformed headers, tarfile and zipfile raise almost any exception
            raise ShardError(f"'{path}' is not a readable archive ({error}); replace or remove it.") from error
    order = np.argsort(np.array(hashes), kind="stable")
    return np.array(hashes)[order], np.array(entries).reshape(-1, 4)[order]


class _Headers(io.FileIO):
    """A tar of which only headers are read, with a limit, so that malformed sizes cannot fill the memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}; at most {HEADER_BYTES}")
        return super().read(size)


def _tar_images(path: Path) -> Iterator[tuple[str, int, int, int]]:
    key, image, url = "", None, None
    with _Headers(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise tarfile keeps all headers in memory
            if member.size < 0:  # the next header would be one that was read before
                raise tarfile.ReadError(f"'{member.name}' has {member.size} bytes")
            if not member.isreg() or member.issparse() or is_hidden(PurePosixPath(member.name).name):
                continue
            folder, _, file = member.name.rpartition("/")
            group, suffix = f"{folder}/{file.partition('.')[0]}", PurePosixPath(file).suffix[1:].lower()
            if group != key:
                key, image, url = group, None, None
            if suffix in SUFFIXES:
                image = (member.offset_data, member.size, IN_TAR)
                yield member.name, *image
            elif suffix == "json" and member.size <= HEADER_BYTES:
                url = _url_in(tar.extractfile(member).read())  # type: ignore[union-attr]
            if image and url:
                yield url, *image
                url = None
        stream.seek(tar.offset)  # type: ignore[attr-defined]
        if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile treats a damaged header as the end
            raise tarfile.ReadError(f"a damaged header at byte {tar.offset}")  # type: ignore[attr-defined]


def _zip_images(path: Path) -> Iterator[tuple[str, int, int, int]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if name.suffix[1:].lower() in SUFFIXES and not is_hidden(name.name):
                encrypted = info.flag_bits & 1
                yield info.filename, info.header_offset, info.compress_size, 99 if encrypted else info.compress_type


def _url_in(content: bytes) -> str | None:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        return None
    url = record.get("url") if isinstance(record, dict) else None
    return url if isinstance(url, str) else None


def _hash(name: str) -> int:
    name = name if "://" in name else str(PurePosixPath(name))  # `tar -c .` writes ./a.jpg
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
