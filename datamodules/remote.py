"""Read shards from object stores through fsspec. Shards are downloaded whole, with retries, and deleted after use.

Only protocols of `STORES` that the configuration lists are opened; `pipe:` and chained protocols (`a::b`) are never
allowed. Each process opens its own connections, so that forked and spawned workers share none.
"""

import errno
import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem
from fsspec.callbacks import Callback

from datamodules.errors import ShardError

logger = logging.getLogger(__name__)

STORES = ("s3", "gs", "az", "abfs", "hf", "oss", "https", "http", "memory")
MAX_PAUSE = 30.0  # seconds
MIN_AGE = 60  # seconds
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
MAX_LISTING_BYTES = 256 * 1024 * 1024


@dataclass
class RemoteConfig:
    """Object stores from which shards may be read. Each store takes its credentials from the environment."""

    protocols: list[str] = field(default_factory=list)
    """Allowed protocols: s3, gs, az, abfs, hf, oss, https, http; empty: local files only."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"secret": True})
    """fsspec's options by protocol, e.g. {s3: {anon: true}}. Recorded configurations keep `${oc.env:NAME}` as written
    and mask other values as ***."""
    spool_folder: str = "~/.cache/kosmosg/spool"
    """Folder for downloaded shards while they are read: at most 2 × data.window per lane and source."""
    retries: int = 5
    """Further attempts after a failed request."""
    pause: float = 0.5
    """Seconds before the second attempt; doubled for each further one, at most 30."""
    timeout: float = 600.0
    """Maximum duration in seconds of one request, which downloads a whole shard."""
    connections: int = 8
    """Shards that one process downloads at the same time."""

    def __post_init__(self):
        for protocol in [*self.protocols, *self.options]:
            if protocol not in STORES:
                raise ValueError(f"remote protocol '{protocol}' is not allowed; allowed are {', '.join(STORES)}.")
        for name, least in (("retries", 0), ("pause", 0), ("timeout", 0.001), ("connections", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"remote.{name}={getattr(self, name)} must be at least {least}.")


class Store:
    """The object store of one protocol. Permanent errors (not found, not allowed, no package) are not retried."""

    def __init__(self, protocol: str, config: RemoteConfig):
        self.protocol, self.config = protocol, config
        self._process, self._system = -1, None

    def read(self, url: str) -> bytes:
        """Return the content of a listing. Raises errors as `get` does, OSError also if it is too large."""
        with self.local(url, MAX_LISTING_BYTES) as path:
            return path.read_bytes()

    @contextmanager
    def local(self, url: str, limit: int | None = None) -> Iterator[Path]:
        """Download an object to a temporary file. Raises errors as `get` does."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "object"
            self.get(url, path, limit)
            yield path

    def get(self, url: str, path: Path, limit: int | None = None) -> None:
        """Download an object.

        Args:
            limit: maximum size in bytes.

        Raises:
            FileNotFoundError: the object does not exist.
            OSError: all attempts failed, or the object is larger than `limit`.
            ShardError: the disk is full or read-only.
        """
        system, options = self.filesystem, {}
        if isinstance(system, AsyncFileSystem):
            options["timeout"] = self.config.timeout
        pause = self.config.pause
        for attempt in range(self.config.retries + 1):
            try:
                system.get_file(url, str(path), callback=_Bounded(url, limit), **options)  # type: ignore[arg-type]
                return
            except (FileNotFoundError, PermissionError, ImportError, _TooLargeError):
                raise
            except Exception as error:  # the errors depend on the store's library
                if isinstance(error, OSError) and error.errno in WRITE_ERRORS:
                    raise ShardError(_cannot_write(path.parent, error)) from error
                if attempt == self.config.retries:
                    raise OSError(f"{url}: {type(error).__name__}: {error}") from error
                logger.info("%s: %s: %s; trying again in %.1f s", url, type(error).__name__, error, pause)
                time.sleep(min(pause, MAX_PAUSE))
                pause *= 2

    @property
    def filesystem(self) -> Any:
        """The fsspec file system of this process. Raises ShardError if the protocol's package is not installed."""
        if self._process != os.getpid():
            try:
                options = self.config.options.get(self.protocol, {})
                if self.protocol in ("http", "https"):  # aiohttp's default timeout is five minutes
                    from aiohttp import ClientTimeout

                    options = {"client_kwargs": {"timeout": ClientTimeout(total=self.config.timeout)}} | options
                self._system = fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
            except ImportError as error:
                raise ShardError(f"URLs of '{self.protocol}' need another package: {error}.") from error
            self._process = os.getpid()
        return self._system

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_process": -1, "_system": None}


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"shards cannot be written to '{folder}': {error}. data.remote.spool_folder must be a folder that is "
        "writable and has space for 2 × data.window shards per lane and source."
    )


class _TooLargeError(OSError):
    pass


class _Bounded(Callback):
    """Aborts a transfer that exceeds the limit."""

    def __init__(self, url: str, limit: int | None):
        super().__init__()
        self.url, self.limit = url, limit

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.limit is not None and self.value > self.limit:
            raise _TooLargeError(f"{self.url} has more than {self.limit} bytes, which are listed or allowed")


class Spool:
    """Downloads shards to a folder of this process in the background, and deletes them when no longer wanted.

    Args:
        urls, sizes: URL and size in bytes of all shards of the set; shards are named by their index in these lists.
    """

    def __init__(self, store: Store, urls: list[str], sizes: Any):
        self.store, self.urls, self.sizes = store, urls, sizes
        self._reset()

    def want(self, numbers: Iterable[int]) -> list[Path]:
        """Start to download these shards, in this order. Deletes all others and returns their paths.

        Raises:
            ShardError: the spool folder is not writable.
        """
        self._open()
        assert self._pool is not None and self._folder is not None
        wanted = dict.fromkeys(numbers)
        deleted = [self._delete(number) for number in self._fetched.keys() - wanted.keys()]
        for number in wanted:
            if number not in self._fetched:
                self._count += 1  # a unique name, because a cancelled transfer may still be writing
                path = self._folder / f"{number}-{self._count}.tar"
                self._fetched[number] = path, self._pool.submit(self._fetch, number, path)
        return deleted

    def path(self, number: int) -> Path:
        """Wait for a wanted shard and return its path. Raises errors as `Store.get` does."""
        return self._fetched[number][1].result()

    def _fetch(self, number: int, path: Path) -> Path:
        size = int(self.sizes[number])
        self.store.get(self.urls[number], path, size)
        if path.stat().st_size != size:
            raise OSError(f"{self.urls[number]} has {path.stat().st_size} bytes, but {size} are listed")
        return path

    def _delete(self, number: int) -> Path:
        path, future = self._fetched.pop(number)
        if not future.cancel():
            future.add_done_callback(lambda _: path.unlink(missing_ok=True))  # runs now if the transfer is done
        return path

    def _open(self) -> None:
        if self._process == os.getpid():
            return
        self._reset()
        root = Path(self.store.config.spool_folder).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(root)
            self._folder = Path(tempfile.mkdtemp(dir=root))
            self._lock = _locked(self._folder)
        except OSError as error:
            raise ShardError(_cannot_write(root, error)) from error
        # Unlike functions registered with atexit, this also runs in worker processes.
        Finalize(self, shutil.rmtree, (self._folder,), {"ignore_errors": True}, exitpriority=1)
        self._pool, self._process = ThreadPoolExecutor(self.store.config.connections), os.getpid()

    def _reset(self) -> None:
        self._process, self._count = -1, 0
        self._folder: Path | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._fetched: dict[int, tuple[Path, Future[Path]]] = {}

    def __getstate__(self) -> dict:
        return {"store": self.store, "urls": self.urls, "sizes": self.sizes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _locked(folder: Path) -> Any:
    """Lock the folder for as long as this process lives."""
    lock = open(folder / "lock", "w")  # noqa: SIM115 - stays open while the process uses the folder
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _remove_abandoned(root: Path) -> None:
    """Remove the folders of killed processes."""
    for folder in root.iterdir():
        with suppress(OSError), open(folder / "lock", "r+") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime < MIN_AGE:  # a new folder may not be locked yet
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
