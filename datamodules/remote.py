"""Object stores through fsspec: whole shards, one request each, retried within bounds, on the disk while they are read.

Only protocols that the configuration names are opened, and of these only stores: `pipe:` and chains of protocols
(`a::b`) are never among them. Each process opens its own connections, so forked and spawned workers share none.
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
LONGEST_PAUSE = 30.0
YOUNG = 60  # seconds
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LARGEST_LISTING = 256 * 1024 * 1024


@dataclass
class RemoteConfig:
    """Object stores that shards may be read from. Credentials belong in the environment, where each store looks."""

    protocols: list[str] = field(default_factory=list)
    """Protocols that may be read: s3, gs, az, abfs, hf, oss, https, http; empty: local files only."""
    options: dict[str, dict[str, Any]] = field(default_factory=dict, metadata={"secret": True})
    """fsspec's options by protocol, e.g. {s3: {anon: true}}. Records keep `${oc.env:NAME}` as it is written and show
    other text and numbers as ***."""
    spool_folder: str = "~/.cache/kosmosg/spool"
    """Folder for shards while they are read: at most 2 × data.window of them for each lane and source."""
    retries: int = 5
    """Further attempts after a failed request."""
    pause: float = 0.5
    """Seconds before the second attempt; doubled for each further one, at most 30."""
    timeout: float = 600.0
    """Seconds that one request, of a whole shard, may take."""
    connections: int = 8
    """Shards that one process fetches at the same time."""

    def __post_init__(self):
        for protocol in [*self.protocols, *self.options]:
            if protocol not in STORES:
                raise ValueError(f"remote protocol '{protocol}' is not allowed; allowed are {', '.join(STORES)}.")
        for name, least in (("retries", 0), ("pause", 0), ("timeout", 0.001), ("connections", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"remote.{name}={getattr(self, name)} must be at least {least}.")


class Store:
    """One protocol's store. What fails for good (not found, not allowed, no package) is not tried again."""

    def __init__(self, protocol: str, config: RemoteConfig):
        self.protocol, self.config = protocol, config
        self._process, self._system = -1, None

    def whole(self, url: str) -> bytes:
        """A listing.

        Raises:
            FileNotFoundError: it is absent.
            OSError: the store does not give it, also when asked again.
            ShardError: it is too large for one.
        """
        with self.local(url, LARGEST_LISTING) as path:
            return path.read_bytes()

    @contextmanager
    def local(self, url: str, limit: int | None = None) -> Iterator[Path]:
        """An object as a temporary file. Raises OSError as `get`."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "object"
            self.get(url, path, limit)
            yield path

    def get(self, url: str, path: Path, limit: int | None = None) -> None:
        """Fetch an object.

        Args:
            limit: most bytes it may have.

        Raises:
            FileNotFoundError: it is absent.
            OSError: the store does not give it, also when asked again, or it has more bytes.
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
            except Exception as error:  # each store's library has errors of its own
                if isinstance(error, OSError) and error.errno in NO_ROOM:
                    raise ShardError(_no_room(path.parent, error)) from error
                if attempt == self.config.retries:
                    raise OSError(f"{url}: {type(error).__name__}: {error}") from error
                logger.info("%s: %s: %s; trying again in %.1f s", url, type(error).__name__, error, pause)
                time.sleep(min(pause, LONGEST_PAUSE))
                pause *= 2

    @property
    def filesystem(self) -> Any:
        """This process's connection. Raises ShardError: the protocol's package is not installed."""
        if self._process != os.getpid():
            try:
                options = self.config.options.get(self.protocol, {})
                if self.protocol in ("http", "https"):  # aiohttp itself would end a request after five minutes
                    from aiohttp import ClientTimeout

                    options = {"client_kwargs": {"timeout": ClientTimeout(total=self.config.timeout)}} | options
                self._system = fsspec.filesystem(self.protocol, skip_instance_cache=True, **options)
            except ImportError as error:
                raise ShardError(f"URLs of '{self.protocol}' need another package: {error}.") from error
            self._process = os.getpid()
        return self._system

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_process": -1, "_system": None}


def _no_room(folder: Path, error: OSError) -> str:
    return (
        f"shards cannot be written to '{folder}': {error}. data.remote.spool_folder must be a folder that can be "
        "written to, with room for 2 × data.window shards of each lane and source."
    )


class _TooLargeError(OSError):
    pass


class _Bounded(Callback):
    """Ends a transfer that brings more than was announced."""

    def __init__(self, url: str, limit: int | None):
        super().__init__()
        self.url, self.limit = url, limit

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.limit is not None and self.value > self.limit:
            raise _TooLargeError(f"{self.url} has more than the {self.limit} bytes that are listed or allowed")


class Spool:
    """Shards of a store on the local disk, in a folder of this process, as long as they are wanted.

    Args:
        urls, sizes: of all shards of the set; a shard has the number of its place there.
    """

    def __init__(self, store: Store, urls: list[str], sizes: Any):
        self.store, self.urls, self.sizes = store, urls, sizes
        self._forget()

    def want(self, numbers: Iterable[int]) -> list[Path]:
        """Begin to fetch these shards, in this order; delete all others and return where they were.

        Raises:
            ShardError: the spool folder cannot be written to.
        """
        self._open()
        assert self._pool is not None and self._folder is not None
        wanted = dict.fromkeys(numbers)
        deleted = [self._delete(number) for number in self._fetched.keys() - wanted.keys()]
        for number in wanted:
            if number not in self._fetched:
                self._count += 1  # a name of its own: an unwanted transfer may still be writing
                path = self._folder / f"{number}-{self._count}.tar"
                self._fetched[number] = path, self._pool.submit(self._fetch, number, path)
        return deleted

    def path(self, number: int) -> Path:
        """Where a wanted shard is, once it is. Raises OSError: it could not be fetched. Raises ShardError as `get`."""
        return self._fetched[number][1].result()

    def _fetch(self, number: int, path: Path) -> Path:
        size = int(self.sizes[number])
        self.store.get(self.urls[number], path, size)
        if path.stat().st_size != size:
            raise OSError(f"{self.urls[number]} has {path.stat().st_size} bytes where {size} are listed")
        return path

    def _delete(self, number: int) -> Path:
        path, future = self._fetched.pop(number)
        if not future.cancel():
            future.add_done_callback(lambda _: path.unlink(missing_ok=True))  # at once, if it is done
        return path

    def _open(self) -> None:
        if self._process == os.getpid():
            return
        self._forget()
        root = Path(self.store.config.spool_folder).expanduser()
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(root)
            self._folder = Path(tempfile.mkdtemp(dir=root))
            self._lock = _locked(self._folder)
        except OSError as error:
            raise ShardError(_no_room(root, error)) from error
        # Runs in workers, too, where atexit's functions do not.
        Finalize(self, shutil.rmtree, (self._folder,), {"ignore_errors": True}, exitpriority=1)
        self._pool, self._process = ThreadPoolExecutor(self.store.config.connections), os.getpid()

    def _forget(self) -> None:
        self._process, self._count = -1, 0
        self._folder: Path | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._fetched: dict[int, tuple[Path, Future[Path]]] = {}

    def __getstate__(self) -> dict:
        return {"store": self.store, "urls": self.urls, "sizes": self.sizes}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)


def _locked(folder: Path) -> Any:
    """Says that this process lives; the lock goes with the process."""
    lock = open(folder / "lock", "w")  # noqa: SIM115 - held as long as the process uses the folder
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def _remove_abandoned(root: Path) -> None:
    """Remove folders of processes that were killed."""
    for folder in root.iterdir():
        # A new one may not be locked yet.
        with suppress(OSError), open(folder / "lock", "r+") as lock:
            if time.time() - os.fstat(lock.fileno()).st_mtime < YOUNG:
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
