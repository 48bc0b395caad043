"""A pattern of the configuration → the shards that it names."""

import re
from glob import glob
from pathlib import Path

from webdataset.shardlists import expand_urls

from datamodules.errors import ShardError
from datamodules.storage.remote import ObjectStore, RemoteConfig
from datamodules.storage.shard_files import Descriptors, LocalFile, RemoteFile, ShardFile

SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*):")


def find_shards(pattern: str, remote: RemoteConfig | None = None) -> list[ShardFile]:
    """A path, a glob or a brace list, local or in a store that `remote` allows → files, in order of name.

    Raises:
        ShardError: a protocol that is not allowed, or nothing is there.
    """
    remote = remote or RemoteConfig()
    scheme = SCHEME.match(pattern)
    if "|" in pattern or "::" in pattern or (scheme and scheme[1] not in remote.protocols):
        allowed = f"the protocols {', '.join(remote.protocols)} are" if remote.protocols else "none is"
        raise ShardError(
            f"'{pattern}' is not a local path, and of URLs {allowed} allowed. Add its protocol to "
            "data.remote.protocols if it is an object store, or copy or mount the shards."
        )
    if scheme is None:
        descriptors = Descriptors()
        return [LocalFile(path, descriptors) for path in expand_pattern(pattern)]
    store = ObjectStore(scheme[1], remote)
    return [RemoteFile(url, store) for url in expand_urls_of(pattern, store)]


def expand_urls_of(pattern: str, store: ObjectStore) -> list[str]:
    """A URL with braces, and with `*` where the store can list, → URLs. Raises ShardError: nothing is there."""
    urls: list[str] = []
    for url in expand_urls(pattern):
        if "*" not in url:
            urls.append(url)
            continue
        if store.protocol in ("http", "https"):
            raise ShardError(f"'{pattern}': a web server lists nothing; write the shards as a brace list.")
        try:
            found = store.glob(url)
        except OSError as error:
            raise ShardError(f"'{pattern}' cannot be listed: {error}.") from error
        if not found:
            raise ShardError(f"no shard at '{url}' (pattern '{pattern}').")
        urls += found
    return sorted(set(urls))


def expand_pattern(pattern: str) -> list[Path]:
    """A path, a glob or a brace list (`data/captions-{000000..000009}.tar`) → existing files, in order of name.

    Raises:
        ShardError: not a local path, or nothing is there.
    """
    if SCHEME.match(pattern) or "|" in pattern:
        raise ShardError(f"'{pattern}' is not a local path; copy or mount the shards.")
    paths: list[Path] = []
    for name in expand_urls(pattern):
        found = sorted(glob(name)) if any(character in name for character in "*?[") else [name]
        missing = [path for path in found if not Path(path).is_file()] if found else [name]
        if missing:
            raise ShardError(f"no shard at '{missing[0]}' (pattern '{pattern}'). {what_is_there(Path(missing[0]))}")
        paths += map(Path, found)
    if not paths:
        raise ShardError("the pattern of shards is empty; give a path, a glob or a brace list.")
    return sorted(set(paths))


def what_is_there(path: Path) -> str:
    """The shards in the folder of a missing one, for its message."""
    folder = path.parent
    if not folder.is_dir():
        return f"The folder '{folder}' does not exist."
    tars = sorted(entry.name for entry in folder.glob("*.tar"))
    shown = ", ".join(tars[:5]) + (f" and {len(tars) - 5} more" if len(tars) > 5 else "")
    return f"'{folder}' holds {shown}." if tars else f"'{folder}' holds no .tar file."
