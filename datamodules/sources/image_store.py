"""Images that lie beside their documents: by name or by URL, in a folder, and in the tars and zips below it.

A name never leads out of the folder, and only regular files are read.
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
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
HEADER_BYTES = 1_000_000
"""Most bytes of an extended header of a tar, and of a json member."""
LOCAL_HEADER = 30
ANY_FOLDER = "*/"
IN_TAR = -1
"""In the place of a zip's method of compression."""


@dataclass
class StoreConfig(ImageConversionConfig):
    """How a set is converted whose images lie beside it."""

    store: str | None = None
    """Folder of images or of tars and zips of them, such as img2dataset's output; null: the folder of the input."""


Config = TypeVar("Config", bound=StoreConfig)


class StoreConverter(Converter[Config]):
    """A converter with `store`, where the images are."""

    def __init__(self, source: Path, config: Config):
        super().__init__(source, config)
        place = Path(config.store) if config.store else source if source.is_dir() else source.parent
        self.store = ImageStore(place, config.limits.max_member_bytes)


class ImageStore:
    """Images under a folder, or in one tar or zip. Plain values only: it is sent to worker processes.

    A name is looked for as a member of an archive or the URL in the json of an image's tar group (img2dataset writes
    it), as a path in the folder, and as a member in any folder of an archive.

    Raises:
        ShardError: there is no such folder, or an archive cannot be read.
    """

    def __init__(self, place: Path, max_bytes: int):
        self.max_bytes = max_bytes
        self.folder = place.resolve() if place.is_dir() else None
        if self.folder is not None:
            self.archives = visible_files(place, lambda path: path.suffix.lower() in ARCHIVES)
            if packed := visible_files(place, lambda path: path.name.lower().endswith(PACKED)):
                raise ShardError(f"'{packed[0]}' is compressed: unpack it to a .tar (gunzip), or set another store=…")
        elif place.is_file() and place.suffix.lower() in ARCHIVES:
            self.archives = [place]
        else:
            raise ShardError(f"store='{place}' must be a folder, a .tar or a .zip.")
        self.hashes, self.places = _index(self.archives)

    def image(self, record: Record, config: ImageConversionConfig, *values: Any) -> StoredImage:
        """An image of a row, checked.

        Args:
            values: the encoded image as `embedded_bytes` takes it, or its names and URLs; null ones do not count.

        Raises:
            SampleError: `invalid_field`, or see `find` and `checked_image`.
        """
        known = [value for value in values if value is not None] or [None]
        content = embedded_bytes(known[0])
        if content is not None:
            return checked_image(record, content, "image", config)
        names = [text_of(record, value.get("path") if isinstance(value, dict) else value, "image") for value in known]
        return checked_image(record, self.find(record, *names), names[0][:200], config)

    def find(self, record: Record, *names: str) -> bytes:
        """The bytes of an image.

        Args:
            names: file name, relative path or URL; the first that is there is taken.

        Raises:
            SampleError: `missing_image`, `ambiguous_image`, `refused_path`, `member_too_large`, `damaged_file` or
                `unreadable_file`.
        """
        for name in names:
            if places := self._places(name):
                return self._unpacked(record, name, *places[0])
            if "://" in name:
                continue
            content = read_inside(record, self.folder, name, self.max_bytes) if self.folder else None
            if content is not None:
                return content
            if len(places := self._places(ANY_FOLDER + name)) > 1:
                raise record.error("ambiguous_image", f"{name!r:.200} is in {len(places)} folders of the archives")
            if places:
                return self._unpacked(record, name, *places[0])
        raise record.error("missing_image", f"{names[0]!r:.200}")

    def _places(self, name: str) -> list[list[int]]:
        begin, end = (np.searchsorted(self.hashes, _hash(name), side) for side in ("left", "right"))
        return self.places[begin:end].tolist()

    def _unpacked(self, record: Record, name: str, archive: int, offset: int, size: int, method: int) -> bytes:
        _check_size(record, name, size, self.max_bytes)
        try:
            with open(self.archives[archive], "rb") as stream:
                stream.seek(offset)
                if method != IN_TAR:  # a zip's directory tells where the header begins, not where it ends
                    header = stream.read(LOCAL_HEADER)
                    stream.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little"), 1)
                content = stream.read(size)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, self.max_bytes + 1)
        except (OSError, zlib.error) as error:
            raise record.error("damaged_file", f"{name!r:.200}: {error}") from error
        if method not in (IN_TAR, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise record.error("damaged_file", f"{name!r:.200} is encrypted, or of another method than deflate")
        _check_size(record, name, len(content), self.max_bytes)
        return content


def embedded_bytes(value: Any) -> bytes | None:
    """The encoded image in a value of a Parquet file: bytes, or the hub's {"bytes", "path"}; None: there is none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else None


def read_inside(record: Record, folder: Path, name: str, max_bytes: int) -> bytes | None:
    """A regular file of a folder, given resolved; None if it is not there.

    Raises:
        SampleError: `refused_path`, `member_too_large` or `unreadable_file`.
    """
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):  # by `..`, as an absolute path, or through a link
            raise record.error("refused_path", f"{name!r:.200} leads out of the folder")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device never end
            raise record.error("refused_path", f"{name!r:.200} is no regular file")
        _check_size(record, name, found.st_size, max_bytes)
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no name; RuntimeError: links in a circle
        raise record.error("unreadable_file", f"{name!r:.200}: {error}") from error


def _check_size(record: Record, name: str, size: int, most: int) -> None:
    if size > most:
        raise record.error("member_too_large", f"{name!r:.200} has {size} bytes or more, at most {most}")


def _index(archives: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted hashes of names and URLs, and the place of each image: 40 bytes a name, not a dictionary."""
    hashes, places = array("Q"), array("q")
    for number, path in enumerate(archives):
        members = _zip_images if path.suffix.lower() == ".zip" else _tar_images
        try:
            for name, *place in members(path):
                for known in [name] if "://" in name else [name, ANY_FOLDER + PurePosixPath(name).name]:
                    hashes.append(_hash(known))
                    places.extend((number, *place))
        except Exception as error:  # hostile headers make tarfile and zipfile raise nearly anything
            raise ShardError(f"'{path}' is no readable archive of images ({error}); replace or remove it.") from error
    order = np.argsort(np.array(hashes), kind="stable")
    return np.array(hashes)[order], np.array(places).reshape(-1, 4)[order]


class _Headers(io.FileIO):
    """A tar that is read header by header: a hostile header's size fills no memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes at byte {self.tell()}, allowed are {HEADER_BYTES}")
        return super().read(size)


def _tar_images(path: Path) -> Iterator[tuple[str, int, int, int]]:
    key, image, url = "", None, None
    with _Headers(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            tar.members.clear()  # type: ignore[attr-defined]  # a large tar's headers would all stay in memory
            if member.size < 0:  # it would lead back to a header that was read before
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
        if any(stream.read(tarfile.BLOCKSIZE)):  # tarfile takes a damaged header for the end
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
