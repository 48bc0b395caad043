"""A folder of generated images and its manifest: one JSON line per image, whatever kills the process.

An image is written beside and renamed, and only then its line appended. So a line always has its image; an image
without a line is simply made again. A torn last line, and lines whose image was deleted, are dropped on opening.
"""

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from PIL import Image

from evaluation.requests import EvaluationError

MANIFEST = "manifest.jsonl"
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
        identity: plain values of everything that the images depend on: protocol, system, hashes of model and data.

    Raises:
        ManifestError: the folder holds images of another identity, or lines that cannot be read.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        self._require_identity(identity)
        self.rows = {row.index: row for row in self._read()}

    @property
    def file(self) -> Path:
        return self.folder / MANIFEST

    def image_file(self, index: int) -> Path:
        """Where the image of a row lies."""
        return self.folder / self.rows[index].file

    def store(self, image: Image.Image, storage: str, **values) -> Row:
        """Write an image, then its row.

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
        write_atomically(self.folder / name, buffer.getvalue())
        row = Row(**values, file=name, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
        with self.file.open("ab") as stream:
            stream.write(_line(row))
        self.rows[index] = row
        return row

    def finish(self) -> None:
        """Put the rows into the order of their indices, where repairs have disturbed it."""
        if list(self.rows) != sorted(self.rows):
            self.rows = dict(sorted(self.rows.items()))
            self._rewrite(self.rows.values())

    def verify(self) -> None:
        """Compare every image with its row's hash.

        Raises:
            ManifestError: an image was changed after it was made; names it.
        """
        for row in self.rows.values():
            if hashlib.sha256((self.folder / row.file).read_bytes()).hexdigest() != row.sha256:
                raise ManifestError(
                    f"'{self.folder / row.file}' is not the image that was generated (its hash differs from row "
                    f"{row.index} of {MANIFEST}); delete the file, and it is made again."
                )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing here, and clear away what a killed one left half written.

        Raises:
            ManifestError: another process does.
        """
        with (self.folder / LOCK).open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ManifestError(f"another process is generating into '{self.folder}'; let it finish.") from error
            for half_written in (self.folder / IMAGES).glob(".*"):
                half_written.unlink()
            yield

    def _require_identity(self, identity: dict) -> None:
        file = self.folder / IDENTITY
        if not file.is_file():
            if self.file.is_file():
                raise ManifestError(f"'{self.folder}' has a {MANIFEST} but no {IDENTITY}; move it away.")
            write_atomically(file, json.dumps(identity, indent=1, ensure_ascii=False).encode())
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

    def _read(self) -> list[Row]:
        if not self.file.is_file():
            return []
        content = self.file.read_bytes()
        rows: list[Row] = []
        # What follows the last line break was cut off by a kill.
        lines = content.split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                rows.append(Row(**{**values, "inputs": tuple(values["inputs"])}))
            except (ValueError, TypeError, KeyError) as error:
                raise ManifestError(
                    f"'{self.file}', line {number} is no row ({error}); its fields are "
                    f"{', '.join(field.name for field in fields(Row))}. Delete the folder to start anew."
                ) from error
        kept = {row.index: row for row in rows if (self.folder / row.file).is_file()}
        if b"".join(map(_line, kept.values())) != content:
            self._rewrite(kept.values())
        return list(kept.values())

    def _rewrite(self, rows) -> None:
        write_atomically(self.file, b"".join(map(_line, rows)))


def write_atomically(file: Path, content: bytes) -> None:
    """Write beside, then rename: `file` is whole or absent."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(file)


def _line(row: Row) -> bytes:
    return (json.dumps(asdict(row), ensure_ascii=False) + "\n").encode()
