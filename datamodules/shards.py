"""Sets of shards: what a pattern names, and how many samples each shard holds, from the `shards.json` beside them.

A start reads `shards.json` alone and opens no shard. Our writer makes it (datamodules/shard_writer.py); shards of other
programs get theirs from `kosmosg data index`.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from fnmatch import fnmatch
from functools import cache
from glob import escape, glob
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from webdataset.shardlists import expand_urls

from datamodules.errors import ShardError
from datamodules.remote import RemoteConfig, Store
from datamodules.tar import BLOCK, OpenFiles, Tar, find_samples
from kosmosg.files import write_text

LISTING = "shards.json"
VERSION = 1
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")
WEB = ("http", "https")
WILD = re.compile(r"[*?\[]")


class ListingError(ShardError):
    """What should be a listing is none."""


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
    remote, given = remote or RemoteConfig(), os.path.expanduser(pattern)
    store = open_store(pattern, remote)
    if pattern.endswith(".json"):
        records = read_listing(given, store)
        folder, names = given.rpartition("/")[0], [record["name"] for record in records]
        urls = [name if SCHEME.match(name) else os.path.join(folder, _quoted(name, store)) for name in names]
        store = store or (open_store(urls[0], remote) if urls else None)
        for url in urls:
            scheme = SCHEME.match(url)
            if (scheme and scheme[1]) != (store and store.protocol):
                raise ShardError(
                    f"'{pattern}' lists shards of several places, '{urls[0]}' and '{url}'; one is allowed."
                )
            if store is None and not os.path.isfile(url):
                raise ShardError(f"'{url}' is listed in '{pattern}' but is missing. {what_is_there(url)}")
    else:
        urls, records = _remote(pattern, store) if store is not None else _local(pattern)
    if not records:
        raise ShardError(f"no shard at '{pattern}'. {'' if store else what_is_there(pattern)}".rstrip())
    plain = unquote if store is not None and store.protocol in WEB else str  # the same order in every place
    kept = sorted(dict(zip(urls, records, strict=True)).items(), key=lambda item: plain(item[0]))
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
    for name in _names(pattern):
        if os.path.isdir(name):
            paths = [path for path in Path(name).iterdir() if path.suffix == ".tar" and not path.name.startswith(".")]
        else:
            paths = [Path(path) for path in ([name] if os.path.lexists(name) else glob(name, recursive=True))]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ShardError(f"no shard at '{name}' (pattern '{pattern}'). {what_is_there(name)}")
        found.update(paths)
    if not found:
        raise ShardError("the pattern of shards is empty; give a path, a folder, a glob or a brace list.")
    return sorted(found, key=lambda path: path.parts)  # comparing paths takes five times as long


def find_listed(pattern: str) -> dict[Path, dict]:
    """Records of all shards that a local pattern names and that a `shards.json` beside them lists, also of those that
    are missing. Raises ShardError: a listing is none."""
    found: dict[Path, dict] = {}

    @cache
    def records(folder: Path) -> dict[str, dict]:
        listing = folder / LISTING
        return {record["name"]: record for record in (read_listing(str(listing)) if listing.is_file() else [])}

    for name in _names(pattern):
        folder, last = os.path.split(name)
        if os.path.isdir(name):
            folders, last = [Path(name)], "*"
        elif os.path.lexists(name):
            found |= {Path(name): record for record in [records(Path(folder)).get(last)] if record}
            continue
        else:
            folders = [Path(listing).parent for listing in glob(os.path.join(folder, LISTING), recursive=True)]
        for beside in folders:
            found |= {beside / one: record for one, record in records(beside).items() if fnmatch(one, last)}
    return found


def _names(pattern: str) -> list[str]:
    """Paths and globs of a brace list. What exists under a name is meant by it, whatever characters it has."""
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    folder, last = os.path.split(pattern)
    if os.path.isdir(folder):
        return [os.path.join(escape(folder) if WILD.search(name) else folder, name) for name in expand_urls(last)]
    return expand_urls(pattern)


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
    found, listed = find_tars(pattern), find_listed(pattern)
    for path in found:
        if path not in listed:
            listing = path.parent / LISTING
            read_listing(str(listing))  # raises where there is none
            raise ShardError(f"'{path}' is not listed in '{listing}'. {_remedy(pattern)}")
    for path in sorted(listed.keys() - set(found)):
        if not path.is_file():
            raise ShardError(
                f"'{path}' is listed in '{path.parent / LISTING}' but is missing (pattern '{pattern}'). "
                f"{what_is_there(str(path))}"
            )
    return [str(path) for path in found], [listed[path] for path in found]


def _remote(pattern: str, store: Store) -> tuple[list[str], list[dict]]:
    urls, records = [], []
    folders: dict[str, dict[str, dict]] = {}
    for url in expand_urls(pattern):
        address, _, query = url.partition("?") if store.protocol in WEB else (url, "", "")
        if address.endswith(".tar"):
            folder, _, name = address.rpartition("/")
            name = unquote(name) if store.protocol in WEB else name
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
            urls.append(f"{folder}/{_quoted(one, store)}" + (f"?{query}" if query else ""))
            records.append(listed[one])
    return urls, records


def _quoted(name: str, store: Store | None) -> str:
    """A listed name as it stands in a URL of the web, where a blank, `%` or `#` would end it or mean something else."""
    return quote(name) if store is not None and store.protocol in WEB else name


def read_listing(listing: str, store: Store | None = None) -> list[dict]:
    """Records of a listing.

    Raises:
        ShardError: it is absent, or of a newer version.
        ListingError: it is no listing.
    """
    try:
        content = Path(listing).read_bytes() if store is None else store.whole(listing)
    except FileNotFoundError:
        raise ShardError(f"there is no '{listing}', which tells how many samples each shard holds. "
                         f"{_remedy(listing.rpartition('/')[0])}") from None  # fmt: skip
    except OSError as error:
        raise ShardError(f"'{listing}' cannot be read: {error}.") from error
    try:
        found = json.loads(content)
        version, records = found.get("version", VERSION), found["shards"]
        wrong = _wrong(records) if type(version) is int else f"version is {version!r:.100}; it must be int"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        version, wrong = VERSION, f"{error!r:.200}"
    if type(version) is int and version > VERSION:
        raise ShardError(f"'{listing}' has version {version}; this software reads up to {VERSION}. Update it.")
    if wrong:
        raise ListingError(f"'{listing}' is not a list of shards: {wrong}. {_remedy(listing.rpartition('/')[0])}")
    return records


def _wrong(records: list[dict]) -> str:
    """What is not as a listing has it, "" if nothing."""
    names: set[str] = set()
    for number, record in enumerate(records):
        for key, kind in (("name", str), ("samples", int), ("bytes", int), ("sha256", str)):
            if key not in record and key != "sha256":
                return f"shard {number} has no '{key}'"
            if key in record and type(record[key]) is not kind:
                return f"{key} of shard {number} is {record[key]!r:.100}; it must be {kind.__name__}"
        name, samples, size = record["name"], record["samples"], record["bytes"]
        if not name or "\0" in name or name in names:
            return f"name of shard {number} is {name!r:.100}; it must be a path or a URL that is not listed yet"
        if not 0 <= samples <= size // BLOCK:
            return f"samples of '{name}' is {samples}; {size} bytes hold 0 … {max(size, 0) // BLOCK}"
        names.add(name)
    return ""


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
    if count is None or size is None or not 0 <= count <= size // BLOCK:
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
        count = json.loads(content)["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if type(count) is int else None


def write_listing(folder: Path, records: Sequence[dict], replaces: Callable[[str], object] | None = None) -> Path:
    """Add records to a folder's `shards.json`, whose path is returned; drop those whose name `replaces` is true of."""
    listing, names = folder / LISTING, {record["name"] for record in records}
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # several sets may lie in one folder
        kept = read_listing(str(listing)) if listing.exists() else []
        kept = [one for one in kept if one["name"] not in names and not (replaces and replaces(one["name"]))]
        save_listing(listing, [*kept, *records])
    finally:
        os.close(descriptor)
    return listing


def save_listing(listing: Path, records: Sequence[dict]) -> None:
    """Replace a listing; one line a shard."""
    lines = ",\n".join("  " + json.dumps(record) for record in sorted(records, key=lambda record: record["name"]))
    write_text(listing, f'{{"version": {VERSION}, "shards": [\n{lines}\n]}}\n')
