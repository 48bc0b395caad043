"""Writing shards: deterministic tars, never half-written under their final name.

    FOLDER/PREFIX-000000.tar   one tar group per sample, in the order of writing
    FOLDER/shards.json         lists them when the set is complete

The same samples give the same bytes, whoever writes them and when.
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
NOT_IN_PREFIX = re.compile(r"[*?\[{}|:]")  # what a pattern of shards reads otherwise


class ShardWriter:
    """Writes samples into numbered shards; a context manager.

    A shard appears under its name when it is complete and on the disk. An exception inside the `with` block leaves
    the shards that were complete, unlisted, and nothing partial.

    Args:
        folder: made if absent.
        prefix: of the file names, e.g. `captions` for `captions-000000.tar`.
        samples_per_shard: the last shard may hold fewer.
        complete: records (as in `shards`) of the first shards, which an interrupted writing completed; others of this
            prefix are written anew.

    Raises:
        ValueError: samples_per_shard below 1, or a prefix that is not a plain file name.
        FileExistsError: the folder already holds shards of this prefix; not raised with `complete`.
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
        there = sorted(path.name for path in self.folder.glob(f"{prefix}-*.tar"))
        if there and complete is None:
            raise FileExistsError(f"'{folder}' already holds {len(there)} shards of '{prefix}' (first {there[0]}).")
        self.shards: list[dict] = list(complete or ())
        self._keys: set[str] = set()
        self._stream: IO[bytes] | None = None
        self._writer: TarWriter | None = None

    def write(self, sample: Sample, key: str | None = None) -> None:
        """Append one sample; its key is `key`, or the sample's own, or its number in the writing order.

        Raises:
            ValueError: a key that would not be read back (see `datamodules.tar.split_name`), or used twice in a shard.
        """
        key = key or sample.key or f"{sum(shard['samples'] for shard in self.shards) + len(self._keys):09d}"
        if split_name(f"{key}.json") != (key, "json") or key in self._keys:
            raise ValueError(f"key '{key}' must be unique in its shard and hold no dot, nor be of the form __name__.")
        if self._writer is None:
            self._stream = open(self._partial, "wb")  # noqa: SIM115 - lives until _close_shard
            # Owner and time are fixed: they would make equal shards differ.
            self._writer = TarWriter(
                self._stream, user="", group="", mode=0o644, mtime=0, compress=False, encoder=False
            )
        self._writer.write({"__key__": key, **sample.encode()})
        self._keys.add(key)
        if len(self._keys) == self.samples_per_shard:
            self._close_shard()

    @property
    def open(self) -> bool:
        """Whether a shard is begun and not complete."""
        return self._writer is not None

    def holds(self, key: str) -> bool:
        """Whether the shard that is being written has a sample of this key."""
        return key in self._keys

    def close(self) -> Path:
        """Complete the last shard and list the set in `shards.json`; returns its path.

        Raises:
            DataError: nothing was written.
        """
        if self._writer is not None:
            self._close_shard()
        if not self.shards:
            raise DataError(f"no sample was written to '{self.folder}/{self.prefix}-*.tar'; an empty set is an error.")
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
