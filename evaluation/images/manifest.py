"""A folder of generated images and its manifest: one JSON line per image, whatever kills the process.

An image is written beside and renamed, and only then its line appended. So a line always has its image; an image
without a line is simply made again. A torn last line, and lines whose image was deleted, do not count.

Of several processes each appends to a file of its own: the first to manifest.jsonl, number 3 to manifest.3.jsonl. They
are one manifest when it is read, whoever wrote them; at the beginning and the end of a launch they become one file.
"""

import fcntl
import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from PIL import Image

from evaluation.parallel.processes import Processes
from evaluation.protocols.requests import EvaluationError
from kosmosg.files import write_bytes, write_text

MANIFEST, SHARDS = "manifest.jsonl", "manifest.*.jsonl"
IDENTITY = "identity.json"
LOCK = ".lock"
IMAGES = "images"
JPEG_QUALITY = 95


class ManifestError(EvaluationError):
    """A manifest that must not be continued, because its images were made otherwise or the file is damaged."""


@dataclass(frozen=True)
class Row:
    """One image: what it was made from, where it lies (relative to the manifest's folder) and its hash."""

    index: int
    prompt: str
    inputs: tuple[str, ...]
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    model: str
    file: str
    sha256: str


class Manifest:
    """The rows of one folder, opened for one set of images.

    Args:
        folder: made where it does not exist.
        identity: plain values of everything that the images depend on: protocol, system, hashes of model and data; None
            in processes that write while the first one has checked it. These know no rows but their own.

    Raises:
        ManifestError: the folder holds images of another identity, or lines that cannot be read.
    """

    def __init__(self, folder: Path, identity: dict | None):
        self.folder, self.file = folder, folder / MANIFEST
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        self.rows: dict[int, Row] = {}
        if identity is not None:
            self._require_identity(identity)
            self.rows = self._read(self._files())
        self._appended = self.file

    def image_file(self, index: int) -> Path:
        """Where the image of a row lies."""
        return self.folder / self.rows[index].file

    def store(self, image: Image.Image, storage: str, **values) -> Row:
        """Write an image, then its row; inside `locked`.

        Args:
            storage: as in the protocol; memory's bytes are kept as PNG, which loses nothing.
            values: the fields of `Row` but file and sha256.

        Raises:
            ManifestError: the index has a row already.
        """
        index = values["index"]
        if index in self.rows:
            raise ManifestError(f"'{self.file}' has image {index} already; an image is made once.")
        buffer = io.BytesIO()
        if storage == "jpeg":
            image.save(buffer, format="jpeg", quality=JPEG_QUALITY)
        else:
            image.save(buffer, format="png")
        name = f"{IMAGES}/{index:06d}.{'jpg' if storage == 'jpeg' else 'png'}"
        write_bytes(self.folder / name, buffer.getvalue())
        row = Row(**values, file=name, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
        with self._appended.open("ab") as stream:
            stream.write(_line(row))
        self.rows[index] = row
        return row

    def verify(self, asked: Sequence[Mapping[str, Any]]) -> None:
        """Compare every row with what was asked for, and every image with its row.

        Args:
            asked: for each image the fields of its row but file and sha256.

        Raises:
            ManifestError: a row or an image was changed after it was made; names it.
        """
        for values in asked:
            row = self.rows[values["index"]]
            if other := [name for name, value in values.items() if getattr(row, name) != value]:
                raise ManifestError(
                    f"'{self.file}': row {row.index} is not what was asked for: {other[0]} is "
                    f"{getattr(row, other[0])!r}, not {values[other[0]]!r}. Delete the folder, and it is made again."
                )
            file = self.folder / row.file
            if file.stem != f"{row.index:06d}" or hashlib.sha256(file.read_bytes()).hexdigest() != row.sha256:
                raise ManifestError(
                    f"'{file}' is not the image that was generated (its name or hash differs from row {row.index} of "
                    f"{MANIFEST}); delete the file, and it is made again."
                )

    @contextmanager
    def locked(self, processes: Processes) -> Iterator[set[int]]:
        """Keep other launches from writing here while the processes of this one do; gives the indices that are there.

        Afterwards all processes have all rows, which are in one file and in the order of their indices.

        Raises:
            ManifestError: another launch is at it, or a process that a killed launch has left behind.
        """
        with (self.folder / LOCK).open("a+") as lock:
            if processes.first:
                # Alone for a moment, so that nobody of an earlier launch can be left; then one among its own.
                self._take(lock, fcntl.LOCK_EX)
                self._clear()
                self._merge(self._files())
                self._take(lock, fcntl.LOCK_SH)
            there = processes.share(lambda: set(self.rows))
            if not processes.first:
                self._take(lock, fcntl.LOCK_SH)
                self._appended = self._shard(processes.rank)
            yield there
            processes.wait()
            if processes.first:
                # By name and without looking for the images: what a network file system lists may be old.
                self._merge([self.file, *map(self._shard, range(1, processes.count))], look=False)
            self.rows = processes.share(lambda: self.rows)

    def _take(self, lock: IO[str], kind: int) -> None:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ManifestError(f"another process is generating into '{self.folder}'; let it finish.") from error
        except OSError as error:
            raise ManifestError(
                f"'{self.folder}' lies on a file system without locks ({error}), so that two launches would disturb "
                "each other; have it mounted with them (flock), or choose another output folder."
            ) from error

    def _clear(self) -> None:
        """Remove what a killed process left half written."""
        for half_written in (*self.folder.glob(f".{MANIFEST}.*"), *(self.folder / IMAGES).glob(".*")):
            half_written.unlink()

    def _shard(self, rank: int) -> Path:
        return self.folder / f"manifest.{rank}.jsonl"

    def _files(self) -> list[Path]:
        return [self.file, *sorted(self.folder.glob(SHARDS))]

    def _merge(self, files: Sequence[Path], look: bool = True) -> None:
        """All rows into the first of the files."""
        self.rows = self._read(files, look)
        content = b"".join(map(_line, self.rows.values()))
        if content != (self.file.read_bytes() if self.file.is_file() else b""):
            write_bytes(self.file, content)
        # A kill before this leaves rows that stand in two files: they count once.
        for shard in files[1:]:
            shard.unlink(missing_ok=True)

    def _require_identity(self, identity: dict) -> None:
        file = self.folder / IDENTITY
        if not file.is_file():
            if self.file.is_file():
                raise ManifestError(f"'{self.folder}' has a {MANIFEST} but no {IDENTITY}; move it away.")
            write_text(file, json.dumps(identity, indent=1, ensure_ascii=False))
            return
        found = json.loads(file.read_text(encoding="utf-8"))
        different = [
            f"{key} was {found.get(key)!r} and is now {identity.get(key)!r}"
            for key in sorted({*found, *identity})
            if found.get(key) != identity.get(key)
        ]
        if different:
            raise ManifestError(
                f"'{self.folder}' holds images that were made otherwise: " + "; ".join(different) + ". Choose another "
                "output folder, or delete this one."
            )

    def _read(self, files: Sequence[Path], look: bool = True) -> dict[int, Row]:
        """The rows of all files by index and in its order; with `look`, those whose image is there."""
        found = {row.index: row for file in files for row in _read_rows(file)}
        there = (index for index in sorted(found) if not look or (self.folder / found[index].file).is_file())
        return {index: found[index] for index in there}


def _read_rows(file: Path) -> list[Row]:
    try:
        content = file.read_bytes()
    except FileNotFoundError:  # nothing was written yet, or it was merged this moment
        return []
    rows: list[Row] = []
    # What follows the last line break was cut off by a kill.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            values = json.loads(line)
            rows.append(Row(**{**values, "inputs": tuple(values["inputs"])}))
        except (ValueError, TypeError, KeyError) as error:
            raise ManifestError(
                f"'{file}', line {number} is no row ({error}); its fields are "
                f"{', '.join(field.name for field in fields(Row))}. Delete the folder to start anew."
            ) from error
    return rows


def _line(row: Row) -> bytes:
    return (json.dumps(asdict(row), ensure_ascii=False) + "\n").encode()
