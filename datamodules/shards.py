"""Resolve patterns to shards, and read and write their listings (`shards.json`).

A listing records the name, size and number of samples of each shard, so that a training run can start without opening
any shard. `ShardWriter` writes it; for shards of other programs, `kosmosg data index` does.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
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
WILDCARD = re.compile(r"[*?\[]")


class ListingError(ShardError):
    """A file is not a valid listing."""


class ShardList:
    """The shards that match a pattern, sorted by name.

    Attributes:
        urls: paths, or URLs of an object store or web server.
        samples, bytes: int64, one value per shard.
        checksums: SHA-256 of each shard in hexadecimal digits, "" where unknown.
        store: reads the URLs; None for local files.
        identity: hash of names, sizes and checksums. Folders are left out, so that a set may be moved.
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
        """Number of samples in all shards."""
        return int(self.samples.sum())

    @property
    def paths(self) -> list[Path]:
        """Local paths of the shards. Raises ShardError if they are in an object store."""
        if self.store is not None:
            raise ShardError(f"'{self.pattern}' is in an object store; caches are kept beside local shards only.")
        return [Path(url) for url in self.urls]


def list_shards(pattern: str, remote: RemoteConfig | None = None) -> ShardList:
    """List the shards of a path, folder, glob, brace list or `shards.json`, local or of a protocol in `remote`.

    Raises:
        ShardError: the protocol is not allowed, no shard matches, or shards and `shards.json` disagree.
    """
    remote, expanded = remote or RemoteConfig(), os.path.expanduser(pattern)
    store = open_store(pattern, remote)
    if pattern.endswith(".json"):
        records = read_listing(expanded, store)
        folder, names = expanded.rpartition("/")[0], [record["name"] for record in records]
        urls = [name if SCHEME.match(name) else os.path.join(folder, _quoted(name, store)) for name in names]
        store = store or (open_store(urls[0], remote) if urls else None)
        for url in urls:
            scheme = SCHEME.match(url)
            if (scheme and scheme[1]) != (store and store.protocol):
                raise ShardError(
                    f"'{pattern}' lists shards of several places, '{urls[0]}' and '{url}'; one place is allowed."
                )
            if store is None and not os.path.isfile(url):
                raise ShardError(f"'{url}' is listed in '{pattern}' but is missing. {_describe_folder(url)}")
    else:
        urls, records = _remote(pattern, store) if store is not None else _local(pattern)
    if not records:
        raise ShardError(f"no shard at '{pattern}'. {'' if store else _describe_folder(pattern)}".rstrip())
    # Unquoted, so that a set has the same order on a web server as on a disk.
    plain = unquote if store is not None and store.protocol in WEB else str
    shards = sorted(dict(zip(urls, records, strict=True)).items(), key=lambda item: plain(item[0]))
    if not sum(record["samples"] for _, record in shards):
        raise ShardError(f"all {len(shards)} shards of '{pattern}' are empty.")
    return ShardList(pattern, [url for url, _ in shards], [record for _, record in shards], store)


def find_tars(pattern: str) -> list[Path]:
    """Find the existing tars of a local path, folder, glob or brace list, sorted by name; they need not be listed.

    Raises:
        ShardError: the pattern is not a local path, or no tar matches.
    """
    if SCHEME.match(pattern) or "|" in pattern:
        raise ShardError(f"'{pattern}' is not a local path.")
    tars: set[Path] = set()
    for name in _names(pattern):
        if os.path.isdir(name):
            paths = [path for path in Path(name).iterdir() if path.suffix == ".tar" and not path.name.startswith(".")]
        else:
            paths = [Path(path) for path in ([name] if os.path.lexists(name) else glob(name, recursive=True))]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ShardError(f"no shard at '{name}' (pattern '{pattern}'). {_describe_folder(name)}")
        tars.update(paths)
    if not tars:
        raise ShardError("the pattern of shards is empty; give a path, a folder, a glob or a brace list.")
    return sorted(tars, key=lambda path: path.parts)  # comparing whole paths takes five times as long


def find_listed(pattern: str) -> dict[Path, dict]:
    """Return the records of all shards that match a local pattern and are listed in the `shards.json` of their folder,
    missing shards included. Raises ShardError if a listing is invalid."""
    listed: dict[Path, dict] = {}

    @cache
    def records(folder: Path) -> dict[str, dict]:
        listing = folder / LISTING
        return {record["name"]: record for record in (read_listing(str(listing)) if listing.is_file() else [])}

    for name in _names(pattern):
        folder, last = os.path.split(name)
        if os.path.isdir(name):
            folders, last = [Path(name)], "*"
        elif os.path.lexists(name):
            listed |= {Path(name): record for record in [records(Path(folder)).get(last)] if record}
            continue
        else:
            folders = [Path(listing).parent for listing in glob(os.path.join(folder, LISTING), recursive=True)]
        for parent in folders:
            listed |= {parent / tar: record for tar, record in records(parent).items() if fnmatch(tar, last)}
    return listed


def _names(pattern: str) -> list[str]:
    """Expand a brace list to paths and globs. An existing path is taken literally, whatever characters it contains."""
    pattern = os.path.expanduser(pattern)
    if os.path.lexists(pattern):
        return [pattern]
    folder, last = os.path.split(pattern)
    if os.path.isdir(folder):
        return [os.path.join(escape(folder) if WILDCARD.search(name) else folder, name) for name in expand_urls(last)]
    return expand_urls(pattern)


def _describe_folder(name: str) -> str:
    """List the shards in the folder of a missing one, for its error message."""
    folder = Path(name) if Path(name).is_dir() else Path(name).parent
    if not folder.is_dir():
        return f"The folder '{folder}' does not exist."
    tars = sorted(entry.name for entry in folder.glob("*.tar"))
    shown = ", ".join(tars[:5]) + (f" and {len(tars) - 5} more" if len(tars) > 5 else "")
    return f"'{folder}' contains {shown}." if tars else f"'{folder}' contains no .tar file."


def open_store(pattern: str, remote: RemoteConfig) -> Store | None:
    """Return the store of a pattern of URLs, None if it is local. Raises ShardError if its protocol is not allowed."""
    scheme = SCHEME.match(pattern)
    if "|" in pattern or "::" in pattern or (scheme and scheme[1] not in remote.protocols):
        raise ShardError(
            f"'{pattern}' is not a local path, nor a URL of an allowed protocol (data.remote.protocols: "
            f"{', '.join(remote.protocols) or 'none'}). Add the protocol if it is an object store, or copy or mount "
            "the shards."
        )
    return Store(scheme[1], remote) if scheme else None


def _local(pattern: str) -> tuple[list[str], list[dict]]:
    tars, listed = find_tars(pattern), find_listed(pattern)
    for path in tars:
        if path not in listed:
            listing = path.parent / LISTING
            read_listing(str(listing))  # raises if there is none
            raise ShardError(f"'{path}' is not listed in '{listing}'. {_remedy(pattern)}")
    for path in sorted(listed.keys() - set(tars)):
        if not path.is_file():
            raise ShardError(
                f"'{path}' is listed in '{path.parent / LISTING}' but is missing (pattern '{pattern}'). "
                f"{_describe_folder(str(path))}"
            )
    return [str(path) for path in tars], [listed[path] for path in tars]


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
        if WILDCARD.search(folder):
            raise ShardError(f"'{pattern}': wildcards are allowed only in the last part of a URL.")
        if folder not in folders:
            folders[folder] = {record["name"]: record for record in read_listing(f"{folder}/{LISTING}", store)}
        listed = folders[folder]
        matches = sorted(tar for tar in listed if fnmatch(tar, name)) if WILDCARD.search(name) else [name]
        for match in matches:
            if match not in listed:
                raise ShardError(f"'{url}' is not listed in '{folder}/{LISTING}'. {_remedy(pattern)}")
            urls.append(f"{folder}/{_quoted(match, store)}" + (f"?{query}" if query else ""))
            records.append(listed[match])
    return urls, records


def _quoted(name: str, store: Store | None) -> str:
    """Quote a listed name for use in an HTTP URL; names in object stores need no quoting."""
    return quote(name) if store is not None and store.protocol in WEB else name


def read_listing(listing: str, store: Store | None = None) -> list[dict]:
    """Return the records of a listing.

    Raises:
        ShardError: the listing is absent or unreadable, or its version is newer than `VERSION`.
        ListingError: the file is not a valid listing.
    """
    try:
        content = Path(listing).read_bytes() if store is None else store.read(listing)
    except FileNotFoundError:
        raise ShardError(f"there is no '{listing}', which lists how many samples each shard holds. "
                         f"{_remedy(listing.rpartition('/')[0])}") from None  # fmt: skip
    except OSError as error:
        raise ShardError(f"'{listing}' cannot be read: {error}.") from error
    try:
        parsed = json.loads(content)
        version, records = parsed.get("version", VERSION), parsed["shards"]
        problem = _find_problem(records) if type(version) is int else f"version is {version!r:.100}; it must be int"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        version, problem = VERSION, f"{error!r:.200}"
    if type(version) is int and version > VERSION:
        raise ShardError(f"'{listing}' has version {version}; this software reads up to {VERSION}. Update it.")
    if problem:
        raise ListingError(f"'{listing}' is not a list of shards: {problem}. {_remedy(listing.rpartition('/')[0])}")
    return records


def _find_problem(records: list[dict]) -> str:
    """Describe the first invalid record, "" if all are valid."""
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


def index_shard(url: str, store: Store | None = None, known: dict | None = None) -> dict:
    """Make the record of a tar.

    The number of samples is read from img2dataset's `_stats.json` in the same folder. Without one, the samples are
    counted, and a remote tar is downloaded for this.

    Args:
        known: an earlier record; if the size is unchanged, samples are not counted again.

    Raises:
        ShardError: the shard cannot be read, is not a tar or holds no sample.
        OSError: the shard is absent or cannot be downloaded.
    """
    address, mark, query = url.partition("?") if store is not None else (url, "", "")
    name = address.rpartition("/")[2]
    size = _size(url, store)
    if known is not None and known["bytes"] == size:
        return known | {"name": name}
    count = _img2dataset_count(f"{address.removesuffix('.tar')}_stats.json{mark}{query}", store)
    if count is None or size is None or not 0 <= count <= size // BLOCK:
        with store.local(url) if store is not None else nullcontext(Path(url)) as path:
            size = path.stat().st_size
            count = sum(1 for _ in find_samples(Tar(path, OpenFiles(), name)))
    return {"name": name, "samples": count, "bytes": size}


def _size(url: str, store: Store | None) -> int | None:
    if store is None:
        return os.stat(url).st_size
    with suppress(Exception):  # the errors depend on the store's library, and some web servers do not report a size
        return store.filesystem.size(url)
    return None


def _img2dataset_count(stats: str, store: Store | None) -> int | None:
    try:
        content = Path(stats).read_bytes() if store is None else store.read(stats)
        count = json.loads(content)["successes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return count if type(count) is int else None


def write_listing(folder: Path, records: Sequence[dict], replaces: Callable[[str], object] | None = None) -> Path:
    """Add records to a folder's `shards.json` and drop earlier ones whose name `replaces` accepts. Returns its path."""
    listing, names = folder / LISTING, {record["name"] for record in records}
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # a folder may contain several sets
        earlier = read_listing(str(listing)) if listing.exists() else []
        earlier = [old for old in earlier if old["name"] not in names and not (replaces and replaces(old["name"]))]
        save_listing(listing, [*earlier, *records])
    finally:
        os.close(descriptor)
    return listing


def save_listing(listing: Path, records: Sequence[dict]) -> None:
    """Write a listing, one line per shard, replacing any earlier one."""
    lines = ",\n".join("  " + json.dumps(record) for record in sorted(records, key=lambda record: record["name"]))
    write_text(listing, f'{{"version": {VERSION}, "shards": [\n{lines}\n]}}\n')
