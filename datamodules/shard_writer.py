"""Write shards as deterministic tars that appear under their final name only when complete.

    FOLDER/PREFIX-000000.tar   one tar group per sample, in the order of writing
    FOLDER/shards.json         the listing, written when the set is complete

The same samples always give the same bytes: tar headers contain no user and no time.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from webdataset.writer import TarWriter

from datamodules.errors import DataError
from datamodules.sample import Sample
from datamodules.shards import write_listing
from datamodules.tar import split_name
from kosmosg.files import flush

TEMPORARY_SUFFIX = ".partial"
NOT_IN_PREFIX = re.compile(r"[*?\[{}|:]")  # characters with a meaning in patterns of shards


class ShardWriter:
    """Context manager that writes samples into numbered shards.

    A shard gets its final name once it is complete and flushed to the disk. After an exception inside the `with` block,
    completed shards remain but are not listed, and the partial one is deleted.

    Args:
        folder: created if absent.
        prefix: of the file names, e.g. `captions` for `captions-000000.tar`.
        samples_per_shard: the last shard may have fewer.
        complete: records of the shards that an interrupted run completed; writing continues after them and replaces
            any others of this prefix.

    Raises:
        ValueError: samples_per_shard is below 1, or the prefix is not a plain file name.
        FileExistsError: the folder already contains shards of this prefix, and `complete` is None.
    """

    def __init__(
        self, folder: str | Path, prefix: str, samples_per_shard: int = 1000, complete: Sequence[dict] | None = None
    ):
        if samples_per_shard < 1:
            raise ValueError(f"samples_per_shard={samples_per_shard} must be at least 1.")
        if not prefix or Path(prefix).name != prefix or NOT_IN_PREFIX.search(prefix):
            raise ValueError(f"prefix '{prefix}' must be a plain file name, without / * ? [ {{ }} | : .")
        self.folder, self.prefix, self.samples_per_shard = Path(folder), prefix, samples_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        existing = sorted(path.name for path in self.folder.glob(f"{prefix}-*.tar"))
        if existing and complete is None:
            raise FileExistsError(f"'{folder}' already holds {len(existing)} shards of '{prefix}', e.g. {existing[0]}.")
        self.shards: list[dict] = list(complete or ())
        self._keys: set[str] = set()
        self._stream: IO[bytes] | None = None
        self._writer: TarWriter | None = None

    def write(self, sample: Sample, key: str | None = None) -> None:
        """Append one sample. Its key is `key`, else the sample's own key, else its number in the order of writing.

        Raises:
            ValueError: the key is not valid (see `datamodules.tar.split_name`) or already used in the shard.
        """
        key = key or sample.key or f"{sum(shard['samples'] for shard in self.shards) + len(self._keys):09d}"
        if split_name(f"{key}.json") != (key, "json") or key in self._keys:
            raise ValueError(f"key '{key}' must be unique in its shard, have no dot and not be of the form __name__.")
        if self._writer is None:
            self._stream = open(self._partial, "wb")  # noqa: SIM115 - closed by _close_shard
            self._writer = TarWriter(
                self._stream, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False
            )
        self._writer.write({"__key__": key, **sample.encode()})
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self._close_shard()

    @property
    def open(self) -> bool:
        """Whether a shard is being written."""
        return self._writer is not None

    def holds(self, key: str) -> bool:
        """Whether the shard that is being written already has a sample with this key."""
        return key in self._keys

    def close(self) -> Path:
        """Complete the last shard, write `shards.json` and return its path.

        Raises:
            DataError: no sample was written.
        """
        if self._writer is not None:
            self._close_shard()
        if not self.shards:
            raise DataError(f"no sample was written to '{self.folder}/{self.prefix}-*.tar'; a set must not be empty.")
        return write_listing(self.folder, self.shards, re.compile(rf"{re.escape(self.prefix)}-\d{{6}}\.tar").fullmatch)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        elif self._stream is not None and self._writer is not None:
            self._writer.close()
            self._stream.close()
            self._partial.unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return f"{self.prefix}-{len(self.shards):06d}.tar"

    @property
    def _partial(self) -> Path:
        return self.folder / (self._name + TEMPORARY_SUFFIX)

    def _close_shard(self) -> None:
        assert self._writer is not None and self._stream is not None
        self._writer.close()
        self._stream.close()
        path, partial = self.folder / self._name, self._partial
        flush(partial)
        size = partial.stat().st_size
        with open(partial, "rb") as written:
            checksum = hashlib.file_digest(written, "sha256").hexdigest()
        partial.rename(path)
        flush(self.folder)
        self.shards.append({"name": path.name, "samples": len(self._keys), "bytes": size, "sha256": checksum})
        self._stream = self._writer = None
        self._keys = set()
