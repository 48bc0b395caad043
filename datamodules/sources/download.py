"""Many images by URL into a folder: a few at once, each host left in peace, resumed, and told what is dead.

    FOLDER/ab/NAME            each image under the first two letters of its name
    FOLDER/failures.jsonl     one line for every failure: name, url, reason, whether it is for good
    FOLDER/download.json      counts of the last run, by reason and by host

What is there is not fetched again; what is gone for good is not asked for again.
"""

import heapq
import json
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from datamodules.folder_lock import held
from datamodules.sources.download_config import DownloadConfig
from datamodules.sources.fetching import FetchError, Wanted, fetch
from kosmosg.files import write_text

WINDOW = 10_000
"""Rows of the list that are looked at ahead, so that one slow host does not hold up the others."""
FAILURES, SUMMARY = "failures.jsonl", "download.json"
WORST_HOSTS = 20


@dataclass
class Download:
    """What one run did.

    Attributes:
        there: images that stood already; `known_dead` those that an earlier run found gone for good.
        failed: by reason; `hosts` the same by host.
    """

    listed: int = 0
    there: int = 0
    fetched: int = 0
    bytes: int = 0
    known_dead: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    hosts: dict[str, Counter[str]] = field(default_factory=dict)

    def summary(self) -> dict:
        """For download.json and --json; the hosts with most failures first."""
        worst = sorted(self.hosts.items(), key=lambda item: (-item[1].total(), item[0]))[:WORST_HOSTS]
        return {
            "listed": self.listed,
            "there": self.there,
            "fetched": self.fetched,
            "bytes": self.bytes,
            "known_dead": self.known_dead,
            "failed": dict(self.failed.most_common()),
            "failed_by_host": {host: dict(reasons.most_common()) for host, reasons in worst},
        }


@dataclass
class _Host:
    waiting: deque[tuple[Wanted, int]] = field(default_factory=deque)
    under_way: int = 0
    ready: float = 0.0
    queued: bool = False
    given_up: str | None = None


class Downloader:
    """Fetches a list into a folder.

    Args:
        clock, sleep: time in seconds, replaced in tests.
    """

    def __init__(
        self,
        folder: Path,
        config: DownloadConfig,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.folder, self.config, self.console, self.clock, self.sleep = folder, config, console, clock, sleep
        self.hosts: dict[str, _Host] = {}
        self.heap: list[tuple[float, str]] = []
        self.waiting = 0
        self.pending: set[str] = set()

    def run(self, images: Iterator[Wanted]) -> Download:
        """Fetch all that is neither there nor known to be dead. May be called again after a kill.

        Raises:
            DataError: another process writes into the folder.
        """
        done = Download()
        with held(self.folder), open(self.folder / FAILURES, "a+", encoding="utf-8") as log:
            dead = set() if self.config.try_dead_again else _dead(log)
            todo = self._todo(images, dead, done)
            columns = (TextColumn("{task.description}"), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
            bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
            with bars as progress, ThreadPoolExecutor(self.config.connections) as pool:
                bar = progress.add_task("download", total=None, told="")
                under_way: dict[Future[bytes], tuple[Wanted, int]] = {}
                more = True
                while more or under_way or self.waiting:
                    more = more and self._fill(todo)
                    self._start(pool, under_way, log, done)
                    self._collect(under_way, log, done)
                    told = f"{done.listed:,} listed, {done.fetched:,} fetched, {done.failed.total():,} failed"
                    progress.update(bar, told=told)
            write_text(self.folder / SUMMARY, json.dumps(done.summary(), indent=1) + "\n")
        return done

    def path_of(self, wanted: Wanted) -> Path:
        """Where an image is kept."""
        return self.folder / wanted.name[:2] / wanted.name

    def _todo(self, images: Iterator[Wanted], dead: set[str], done: Download) -> Iterator[Wanted]:
        for wanted in images:
            if done.listed == self.config.limit:
                return
            done.listed += 1
            if wanted.name in self.pending or self.path_of(wanted).exists():
                done.there += 1
            elif wanted.name in dead:
                done.known_dead += 1
            else:
                self.pending.add(wanted.name)
                yield wanted

    def _fill(self, todo: Iterator[Wanted]) -> bool:
        """Look further down the list; whether there is more."""
        while self.waiting < WINDOW:
            wanted = next(todo, None)
            if wanted is None:
                return False
            self._queue(wanted, 0)
        return True

    def _queue(self, wanted: Wanted, attempt: int, first: bool = False) -> None:
        host = self.hosts.setdefault(wanted.host, _Host())
        (host.waiting.appendleft if first else host.waiting.append)((wanted, attempt))
        self.waiting += 1
        self._offer(wanted.host, host)

    def _offer(self, name: str, host: _Host) -> None:
        if host.waiting and not host.queued and host.under_way < self.config.host_connections:
            host.queued = True
            heapq.heappush(self.heap, (host.ready, name))

    def _start(self, pool: ThreadPoolExecutor, under_way: dict, log: IO[str], done: Download) -> None:
        while self.heap and len(under_way) < self.config.connections and self.heap[0][0] <= self.clock():
            ready, name = heapq.heappop(self.heap)
            host = self.hosts[name]
            host.queued = False
            if host.ready > ready:  # it asked to be left alone meanwhile
                self._offer(name, host)
                continue
            wanted, attempt = host.waiting.popleft()
            self.waiting -= 1
            if host.given_up:
                self._failed(wanted, FetchError("host_given_up", host.given_up, passing=True), log, done)
            else:
                host.under_way += 1
                host.ready = self.clock() + self.config.host_delay
                under_way[pool.submit(fetch, wanted, self.config)] = (wanted, attempt)
            self._offer(name, host)

    def _collect(self, under_way: dict, log: IO[str], done: Download) -> None:
        pause = max(0.0, min(1.0, self.heap[0][0] - self.clock())) if self.heap else 1.0
        if not under_way:
            self.sleep(pause if self.heap else 0)
            return
        full = len(under_way) >= self.config.connections
        finished, _ = wait(under_way, timeout=1.0 if full else pause, return_when=FIRST_COMPLETED)
        for future in finished:
            wanted, attempt = under_way.pop(future)
            host = self.hosts[wanted.host]
            host.under_way -= 1
            try:
                content = future.result()
            except FetchError as error:
                if error.wait is not None:
                    host.ready = max(host.ready, self.clock() + min(error.wait, self.config.max_wait))
                    if error.wait > self.config.max_wait:
                        host.given_up = f"asks to wait {error.wait:.0f} s"
                if error.passing and attempt < self.config.retries and not host.given_up:
                    self._queue(wanted, attempt + 1, first=error.wait is not None)
                else:
                    self._failed(wanted, error, log, done)
            else:
                self._keep(wanted, content)
                self.pending.discard(wanted.name)
                done.fetched += 1
                done.bytes += len(content)
            self._offer(wanted.host, host)

    def _keep(self, wanted: Wanted, content: bytes) -> None:
        path = self.path_of(wanted)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        partial.replace(path)

    def _failed(self, wanted: Wanted, error: FetchError, log: IO[str], done: Download) -> None:
        done.failed[error.reason] += 1
        done.hosts.setdefault(wanted.host, Counter())[error.reason] += 1
        line = {"name": wanted.name, "url": wanted.url, "reason": error.reason, "detail": error.detail}
        log.write(json.dumps(line | {"for_good": not error.passing}, ensure_ascii=True) + "\n")
        log.flush()


def _dead(log: IO[str]) -> set[str]:
    """Names that failed for good in earlier runs. A line that a kill cut off is closed, the next stands alone."""
    log.seek(0)
    dead, line = set(), "\n"
    for line in log:
        try:
            record = json.loads(line)
            dead |= {record["name"]} if record["for_good"] else set()
        except (ValueError, KeyError, TypeError):
            continue
    log.seek(0, os.SEEK_END)
    if not line.endswith("\n"):
        log.write("\n")
    return dead
