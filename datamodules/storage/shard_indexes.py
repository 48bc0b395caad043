"""Manifests and indexes of shards: found beside them, else made once and kept."""

import fcntl
import hashlib
import json
import re
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path

from datamodules.errors import ShardError
from datamodules.storage.remote import RemoteConfig
from datamodules.storage.shard_files import LocalFile, RemoteFile, ShardFile
from datamodules.storage.shard_patterns import what_is_there
from datamodules.storage.tar_index import ShardIndex, index_name
from kosmosg.files import write_bytes

MANIFEST_PATTERN = "*.manifest.json"
NUMBERED = re.compile(r"-\d{6}\.tar$")
LARGEST_MANIFEST = 256 * 1024 * 1024


def listed_shards(pattern: str, files: list[ShardFile]) -> dict[str, dict]:
    """What the manifests beside the shards say of them: path or URL → samples, bytes, sha256.

    Raises:
        ShardError: a manifest that is none, or a shard of the pattern that it lists and that is missing.
    """
    listed: dict[str, dict] = {}
    for folder in sorted({file.path.parent for file in files if isinstance(file, LocalFile)}):
        for manifest in sorted(folder.glob(MANIFEST_PATTERN)):
            records = _records(manifest.read_bytes(), str(manifest))
            listed |= {str(folder / name): record for name, record in records.items()}
    if lost := sorted(path for path in listed if fnmatch(path, pattern) and not Path(path).is_file()):
        raise ShardError(
            f"'{lost[0]}' is in its manifest but is missing (pattern '{pattern}'). {what_is_there(Path(lost[0]))}"
        )
    remote = [file for file in files if isinstance(file, RemoteFile)]
    # A store need not be able to list, so the name is made from the shards'.
    manifests = {NUMBERED.sub(".manifest.json", file.url) for file in remote if NUMBERED.search(file.url)}
    for url in sorted(manifests):
        folder = url.rpartition("/")[0]
        content = remote[0].store.whole(url, LARGEST_MANIFEST)
        records = _records(content, url) if content is not None else {}
        listed |= {f"{folder}/{name}": record for name, record in records.items()}
    for file in remote:
        file.listed = listed.get(file.url)
    return listed


def find_indexes(files: list[ShardFile], listed: dict[str, dict], remote: RemoteConfig) -> list[ShardIndex]:
    """The index of each shard.

    Raises:
        ShardError: not a tar, unreachable, or larger than its manifest says.
    """
    if files and isinstance(files[0], RemoteFile):
        folder = Path(remote.index_folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return files[0].store.each(lambda file: _remote_index(file, file.listed, folder), files)
    return [_local_index(file, listed.get(str(file))) for file in files if isinstance(file, LocalFile)]


def _local_index(file: LocalFile, listed: dict | None) -> ShardIndex:
    """The index that the writer left, else one made now and kept beside the shard if the folder is writable."""
    beside = file.path.with_name(index_name(file.name))
    index = ShardIndex.read(beside)
    if listed is not None and file.size > listed["bytes"]:
        raise ShardError(
            f"'{file}' has {file.size} bytes but its manifest says {listed['bytes']}: it was written anew. Write the "
            f"whole set again, or remove the manifest to read the shard as it is."
        )
    # One of the older form, without the captions' places, is made anew, but not from a shard that lost its end.
    if index is not None and _fits(index, listed, file.size) and (index.texts is not None or index.size > file.size):
        return index
    index = ShardIndex.scan(file)
    _keep(index, beside)
    return index


def _remote_index(file: RemoteFile, listed: dict | None, folder: Path) -> ShardIndex:
    """The index of the cache, else the one beside the shard, else one made by reading through the shard once."""
    name = hashlib.sha256(f"{file.url}\n{file.size}\n{file.tag()}".encode()).hexdigest()[:40]
    cached = folder / f"{name}.index.npy"
    index = ShardIndex.read(cached)
    if index is not None and _fits(index, listed, file.size):
        return index
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the processes of a node would else all read the same shard through
        index = ShardIndex.read(cached)
        if index is None or not _fits(index, listed, file.size):
            try:
                beside = file.store.whole(file.url.rpartition("/")[0] + "/" + index_name(file.name), LARGEST_MANIFEST)
            except OSError as error:
                raise ShardError(f"the index of '{file}' cannot be read: {error}.") from error
            index = ShardIndex.from_bytes(beside) if beside is not None else None
            if index is None or not _fits(index, listed, file.size):
                index = ShardIndex.scan(file)
            _keep(index, cached)
    return index


def _fits(index: ShardIndex, listed: dict | None, size: int) -> bool:
    # A shard shorter than its manifest says lost samples; the writer's index lets them be counted one by one.
    return index.size == (listed["bytes"] if listed else size) and (listed is None or len(index) == listed["samples"])


def _keep(index: ShardIndex, path: Path) -> None:
    with suppress(OSError):  # a read-only data folder: the index lives in memory alone
        write_bytes(path, index.to_bytes())


def _records(content: bytes, manifest: str) -> dict[str, dict]:
    try:
        shards = json.loads(content)["shards"]
        return {shard["name"]: {name: shard[name] for name in ("samples", "bytes", "sha256")} for shard in shards}
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(f"'{manifest}' is not a manifest of shards ({error!r}); write the set again.") from error
