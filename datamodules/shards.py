"""Sets of shards: what a pattern names, and how many samples each shard holds, from the `shards.json` beside them.

A start reads `shards.json` alone and opens no shard. Our writer makes it (datamodules/shard_writer.py); shards of other
programs get theirs from `kosmosg data index`.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from datamodules.errors import ShardError
from datamodules.remote import RemoteConfig, Store
from datamodules.tar import OpenFiles, Tar, find_samples
from kosmosg.files import write_text

LISTING = "shards.json"
VERSION = 1
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
WILD = re.compile(r"[*?\[]")


class ShardList:
    """The shards that a pattern names, in order of name.

    Attributes:
        urls: paths, or URLs of a store.
        samples, bytes: of each, int64.
        checksums: SHA-256 of each in hexadecimal digits, "" where unknown.
        store: that the URLs are of; None for local files.
        identity: hash of names, sizes and checksums, without folders, so that a set may be moved.
    """

    def __init__(self, pattern: str, urls: list[str], records: list[dict], store: Store | None = None):
        self.pattern, self.urls, self.store = pattern, urls, store
        self.samples = np.array([record["samples"] for record in records], dtype=np.int64)
        self.bytes = np.array([record["bytes"] for record in records], dtype=np.int64)
        self.checksums = [record.get("sha256", "") for record in records]
        digest = hashlib.sha256()
        for record in records:
            name = record["name"].rpartition("/")[2]
            digest.update(f"{name} {record['samples']} {record['bytes']} {record.get('sha256', '')}\n".encode())
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        """Samples of all shards."""
        return int(self.samples.sum())

    @property
    def paths(self) -> list[Path]:
        """The shards' files, for what lies beside them. Raises ShardError: they are in an object store."""
        if self.store is not None:
            raise ShardError(f"'{self.pattern}' is in an object store, where nothing is kept beside shards.")
        return [Path(url) for url in self.urls]


def list_shards(pattern: str, remote: RemoteConfig | None = None) -> ShardList:
    """A path, a folder, a glob, a brace list or a `shards.json`, local or in a store that `remote` allows → its shards.

    Raises:
        ShardError: a protocol that is not allowed, nothing is there, or shards and `shards.json` disagree.
    """
    remote = remote or RemoteConfig()
    store = open_store(pattern, remote)
    if pattern.endswith(".json"):
        records = read_listing(pattern, store)
        folder, names = pattern.rpartition("/")[0], [record["name"] for record in records]
        urls = [name if SCHEME.match(name) else os.path.join(folder, name) for name in names]
        store = store or (open_store(urls[0], remote) if urls else None)
    else:
        urls, records = _remote(pattern, store) if store is not None else _local(pattern)
    if not records:
        raise ShardError(f"no shard at '{pattern}'. {'' if store else what_is_there(pattern)}".rstrip())
    kept = sorted(dict(zip(urls, records, strict=True)).items())
    if not sum(record["samples"] for _, record in kept):
        raise ShardError(f"'{pattern}' names {len(kept)} shards without a sample.")
    return ShardList(pattern, [url for url, _ in kept], [record for _, record in kept], store)


def find_tars(pattern: str) -> list[Path]:
    """Local path, folder, glob or brace list → existing tars, in order of name, listed or not.

    Raises:
        ShardError: not a local path, or nothing is there.
    """
    if SCHEME.match(pattern) or "|" in pattern:
        raise ShardError(f"'{pattern}' is not a local path.")
    found: set[Path] = set()
    for name in expand_urls(pattern):
        if Path(name).is_dir():
            paths = [path for path in Path(name).iterdir() if path.suffix == ".tar" and not path.name.startswith(".")]
        else:
            paths = [Path(path) for path in (glob(name, recursive=True) if WILD.search(name) else [name])]
            paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ShardError(f"no shard at '{name}' (pattern '{pattern}'). {what_is_there(name)}")
        found.update(paths)
    if not found:
        raise ShardError("the pattern of shards is empty; give a path, a folder, a glob or a brace list.")
    return sorted(found)


def what_is_there(name: str) -> str:
    """The shards in the folder of a missing one, for its message."""
    folder = Path(name) if Path(name).is_dir() else Path(name).parent
    if not folder.is_dir():
        return f"The folder '{folder}' does not exist."
    tars = sorted(entry.name for entry in folder.glob("*.tar"))
    shown = ", ".join(tars[:5]) + (f" and {len(tars) - 5} more" if len(tars) > 5 else "")
    return f"'{folder}' holds {shown}." if tars else f"'{folder}' holds no .tar file."


def open_store(pattern: str, remote: RemoteConfig) -> Store | None:
    """The store of a pattern of URLs; None if it is local. Raises ShardError: its protocol is not allowed."""
    scheme = SCHEME.match(pattern)
    if "|" in pattern or "::" in pattern or (scheme and scheme[1] not in remote.protocols):
        allowed = f"the protocols {', '.join(remote.protocols)} are" if remote.protocols else "none is"
        raise ShardError(
            f"'{pattern}' is not a local path, and of URLs {allowed} allowed. Add its protocol to "
            "data.remote.protocols if it is an object store, or copy or mount the shards."
        )
    return Store(scheme[1], remote) if scheme else None


def _local(pattern: str) -> tuple[list[str], list[dict]]:
    urls, records = [], []
    folders: dict[Path, dict[str, dict]] = {}
    for path in find_tars(pattern):
        folder = path.parent
        if folder not in folders:
            folders[folder] = {record["name"]: record for record in read_listing(str(folder / LISTING))}
        record = folders[folder].get(path.name)
        if record is None:
            raise ShardError(f"'{path}' is not listed in '{folder / LISTING}'. {_remedy(pattern)}")
        urls.append(str(path))
        records.append(record)
    for folder, listed in folders.items():
        here = Path(pattern) == folder
        for name in listed.keys() - {Path(url).name for url in urls}:
            if (here or fnmatch(str(folder / name), str(Path(pattern)))) and not (folder / name).is_file():
                raise ShardError(
                    f"'{folder / name}' is listed in '{folder / LISTING}' but is missing (pattern '{pattern}'). "
                    f"{what_is_there(str(folder / name))}"
                )
    return urls, records


def _remote(pattern: str, store: Store) -> tuple[list[str], list[dict]]:
    urls, records = [], []
    folders: dict[str, dict[str, dict]] = {}
    for url in expand_urls(pattern):
        address, _, query = url.partition("?") if store.protocol in ("http", "https") else (url, "", "")
        if address.endswith(".tar"):
            folder, _, name = address.rpartition("/")
        else:
            folder, name = address.rstrip("/"), "*.tar"
        if WILD.search(folder):
            raise ShardError(f"'{pattern}': '*' is allowed in the last part of a URL alone.")
        if folder not in folders:
            folders[folder] = {record["name"]: record for record in read_listing(f"{folder}/{LISTING}", store)}
        listed = folders[folder]
        found = sorted(one for one in listed if fnmatch(one, name)) if WILD.search(name) else [name]
        for one in found:
            if one not in listed:
                raise ShardError(f"'{url}' is not listed in '{folder}/{LISTING}'. {_remedy(pattern)}")
            urls.append(f"{folder}/{one}" + (f"?{query}" if query else ""))
            records.append(listed[one])
    return urls, records


def read_listing(listing: str, store: Store | None = None) -> list[dict]:
    """Records of a listing. Raises ShardError: it is absent, or none."""
    try:
        content = Path(listing).read_bytes() if store is None else store.whole(listing)
    except FileNotFoundError:
        raise ShardError(f"there is no '{listing}', which tells how many samples each shard holds. "
                         f"{_remedy(listing.rpartition('/')[0])}") from None  # fmt: skip
    except OSError as error:
        raise ShardError(f"'{listing}' cannot be read: {error}.") from error
    try:
        found = json.loads(content)
        records = found["shards"]
        if found.get("version", VERSION) > VERSION:
            raise ValueError(f"version {found['version']}; this software reads up to {VERSION}")
        for record in records:
            counts = record["samples"], record["bytes"]
            if not isinstance(record["name"], str) or not all(isinstance(n, int) and n >= 0 for n in counts):
                raise ValueError(f"{record!r:.100}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ShardError(f"'{listing}' is not a list of shards ({error!r:.200}); write it again. "
                         f"{_remedy(listing.rpartition('/')[0])}") from error  # fmt: skip
    return records


def _remedy(pattern: str) -> str:
    return f"Write it with: kosmosg data index '{pattern}'"


def index_shards(urls: Sequence[str], store: Store | None = None, known: Iterable[dict] = ()) -> Iterable[dict]:
    """A record of each tar, see `index_shard`."""
    earlier = {record["name"]: record for record in known}
    return (index_shard(url, store, earlier.get(url.partition("?")[0].rpartition("/")[2])) for url in urls)


def index_shard(url: str, store: Store | None = None, known: dict | None = None) -> dict:
    """A tar's record: from img2dataset's `_stats.json` beside it, or by walking through the tar, which a store then
    sends whole.

    Args:
        known: an earlier record; a shard of the same size is not counted again.

    Raises:
        ShardError: it cannot be read, is no tar or holds no sample.
        OSError: it is absent, or the store does not give it.
    """
    address, mark, query = url.partition("?") if store is not None else (url, "", "")
    name = address.rpartition("/")[2]
    size = _size(url, store)
    if known is not None and known["bytes"] == size:
        return known | {"name": name}
    count = _counted_by_img2dataset(f"{address.removesuffix('.tar')}_stats.json{mark}{query}", store)
    if count is None or size is None:
        with store.local(url) if store is not None else nullcontext(Path(url)) as path:
            size = path.stat().st_size
            count = sum(1 for _ in find_samples(Tar(path, OpenFiles(), name)))
    return {"name": name, "samples": count, "bytes": size}


def _size(url: str, store: Store | None) -> int | None:
    if store is None:
        return os.stat(url).st_size
    with suppress(Exception):  # each store's library has errors of its own; some web servers do not say
        return store.filesystem.size(url)
    return None


def _counted_by_img2dataset(stats: str, store: Store | None) -> int | None:
    try:
        content = Path(stats).read_bytes() if store is None else store.whole(stats)
        return int(json.loads(content)["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_listing(folder: Path, records: Sequence[dict], replaces: str = "") -> Path:
    """Add records to a folder's `shards.json`; records of names that match `replaces` are dropped. Returns its path."""
    listing, names = folder / LISTING, {record["name"] for record in records}
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # several sets may lie in one folder
        kept = read_listing(str(listing)) if listing.exists() else []
        kept = [one for one in kept if one["name"] not in names and not (replaces and fnmatch(one["name"], replaces))]
        save_listing(listing, [*kept, *records])
    finally:
        os.close(descriptor)
    return listing


def save_listing(listing: Path, records: Sequence[dict]) -> None:
    """Replace a listing; one line a shard."""
    lines = ",\n".join("  " + json.dumps(record) for record in sorted(records, key=lambda record: record["name"]))
    write_text(listing, f'{{"version": {VERSION}, "shards": [\n{lines}\n]}}\n')
