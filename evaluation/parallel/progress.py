"""Progress with the time left: a bar on a terminal, a line now and then in a file or pipe."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evaluation.parallel.processes import ProcessError

LOOK_SECONDS, LINE_EVERY_SECONDS = 0.5, 60.0


@contextmanager
def progress(
    label: str, total: int, there: int, made: Callable[[], int], console: Console, *, passing: bool = False
) -> Iterator[None]:
    """Show how many of `total` are done while the body runs; `passing` leaves nothing behind.

    Images come in bursts, a batch at once, minutes apart: the time left follows from all that was made since the
    start, not from the last burst.

    Args:
        there: done before.
        made: how many more are done by now, by all processes.
    """
    kind = _Bar if console.is_terminal else _Lines
    shown = kind(label, total, there, console, passing)
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            with suppress(ProcessError):  # the body is told of it as well
                shown.update(made())

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
        shown.update(made())
    finally:
        ended.set()
        watcher.join()
        shown.end()


def time_left(seconds: float, made: int, missing: int) -> str:
    """`0:02:10` at the speed so far; `-:--:--` before anything was made."""
    if missing == 0:
        return "0:00:00"
    if made == 0:
        return "-:--:--"
    hours, rest = divmod(round(seconds / made * missing), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


class _Bar:
    def __init__(self, label: str, total: int, there: int, console: Console, passing: bool):
        self.there, self.total, self.started = there, total, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
            console=console,
            transient=passing,
        )
        self.task = self.bar.add_task(label, total=total, completed=there, left=self._left(0))
        self.bar.start()

    def update(self, made: int) -> None:
        self.bar.update(self.task, completed=self.there + made, left=self._left(made))

    def end(self) -> None:
        self.bar.stop()

    def _left(self, made: int) -> str:
        return time_left(time.monotonic() - self.started, made, self.total - self.there - made)


class _Lines:
    def __init__(self, label: str, total: int, there: int, console: Console, passing: bool):
        self.label, self.total, self.there, self.console = label, total, there, console
        self.passing, self.made = passing, 0
        self.started = self.told = time.monotonic()

    def update(self, made: int) -> None:
        self.made = made
        if time.monotonic() - self.told >= LINE_EVERY_SECONDS:
            self._tell()

    def end(self) -> None:
        if not self.passing:
            self._tell()

    def _tell(self) -> None:
        self.told = time.monotonic()
        left = time_left(self.told - self.started, self.made, self.total - self.there - self.made)
        line = f"{self.label} {self.there + self.made}/{self.total}  {left} left"
        self.console.print(line, highlight=False, soft_wrap=True)
