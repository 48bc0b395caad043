"""Object stores through fsspec: bytes by range request, retried within bounds; nothing but reading.

Only protocols that the configuration names are opened, and of these only stores: `pipe:` and chains of protocols
(`a::b`) are never among them. Each process opens its own connections, so forked and spawned workers share none.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem

from datamodules.errors import ShardError

logger = logging.getLogger(__name__)
T = TypeVar("T")

STORES = ("s3", "gs", "az", "abfs", "hf", "oss", "https", "http", "memory")
LONGEST_PAUSE = 30.0


@dataclass
class RemoteConfig:
    """Object stores that shards may be read from. Credentials belong in the environment, where each store looks."""

    protocols: list[str] = field(default_factory=list)
    """Which may be read: s3, gs, az, abfs, hf, oss, https, http; empty: local files only."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"secret": True})
    """fsspec's options by protocol, e.g. {s3: {anon: true}}. Records keep `${oc.env:NAME}` as it is written and show
    other text and numbers as ***."""
    index_folder: str = "~/.cache/kosmosg/shard-indexes"
    """Where indexes of shards that come without one are kept."""
    retries: int = 5
    """Further attempts at a request that failed."""
    pause: float = 0.5
    """Seconds before the second attempt; doubled for each further one, at most 30."""
    timeout: float = 60.0
    """Seconds that one request may take."""
    connections: int = 16
    """Requests of one process at the same time."""

    def __post_init__(self):
        for protocol in [*self.protocols, *self.options]:
            if protocol not in STORES:
                raise ValueError(f"remote protocol '{protocol}' is not allowed; allowed are {', '.join(STORES)}.")
        for name, least in (("retries", 0), ("pause", 0), ("timeout", 0.001), ("connections", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"remote.{name}={getattr(self, name)} must be at least {least}.")


class ObjectStore:
    """One protocol's store. What fails for good (not found, not allowed, no package) is not tried again."""

    def __init__(self, protocol: str, config: RemoteConfig):
        self.protocol, self.config = protocol, config
        self._process = -1
        self._system: Any = None
        self._pool: ThreadPoolExecutor | None = None

    def read(self, url: str, begin: int, end: int) -> bytes:
        """Bytes begin … end-1; fewer where the object ends.

        Raises:
            OSError: the store does not give them, also when asked again.
        """
        content = self._call("cat_file", url, start=begin, end=end)
        if len(content) > end - begin:
            raise ShardError(f"the server of '{url}' does not answer range requests; copy the shards to a local disk.")
        return content

    def info(self, url: str) -> dict[str, Any]:
        """Size and, where the store has one, a tag that changes with the content. Raises OSError as `read`."""
        return self._call("info", url)

    def glob(self, url: str) -> list[str]:
        """URLs that match, sorted."""
        return sorted(self.filesystem.unstrip_protocol(path) for path in self._call("glob", url))

    def whole(self, url: str, limit: int) -> bytes | None:
        """A small object, None if it is absent. Raises OSError as `read`, ShardError for one above `limit` bytes."""
        try:
            if self.info(url)["size"] > limit:
                raise ShardError(f"'{url}' has more than {limit} bytes.")
            return self._call("cat_file", url)
        except FileNotFoundError:
            return None

    def each(self, function: Callable[..., T], *arguments: Sequence) -> list[T]:
        """`map`, with as many requests at a time as are allowed."""
        self._own()
        assert self._pool is not None
        return list(self._pool.map(function, *arguments))

    @property
    def filesystem(self) -> Any:
        """This process's connection."""
        self._own()
        return self._system

    def _own(self) -> None:
        if self._process == os.getpid():
            return
        try:
            options = self.config.options.get(self.protocol, {})
            self._system = fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
        except ImportError as error:
            raise ShardError(f"URLs of '{self.protocol}' need another package: {error}.") from error
        self._pool = ThreadPoolExecutor(self.config.connections)
        self._process = os.getpid()

    def _call(self, method: str, url: str, **options: Any) -> Any:
        system = self.filesystem
        if isinstance(system, AsyncFileSystem):
            options["timeout"] = self.config.timeout
        pause = self.config.pause
        for attempt in range(self.config.retries + 1):
            try:
                return getattr(system, method)(url, **options)
            except (FileNotFoundError, PermissionError, ImportError):
                raise
            except Exception as error:  # each store's library has errors of its own
                if attempt == self.config.retries:
                    raise OSError(f"{url}: {type(error).__name__}: {error}") from error
                logger.info("%s: %s: %s; trying again in %.1f s", url, type(error).__name__, error, pause)
                time.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_process": -1, "_system": None, "_pool": None}
