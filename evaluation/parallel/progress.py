"""Progress with the time left: a bar on a terminal, a line now and then in a file or pipe."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_SECONDS = 60.0


@contextmanager
def progress(
    label: str, total: int, there: int, console: Console, *, passing: bool = False
) -> Iterator[Callable[[int], None]]:
    """A function to tell how many more than `there` of `total` are done by now; `passing` leaves nothing behind.

    Images come in bursts, a batch at once, minutes apart: the time left follows from all that was made since the
    start, not from the last burst.
    """
    started = told = time.monotonic()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left {task.fields[left]}"),
        console=console,
        transient=passing,
        disable=not console.is_terminal,
    )
    task = bar.add_task(label, total=total, completed=there, left="-:--:--")

    def left(made: int) -> str:
        return time_left(time.monotonic() - started, made, total - there - made)

    def line(made: int) -> None:
        nonlocal told
        told = time.monotonic()
        console.print(f"{label} {there + made}/{total}  {left(made)} left", highlight=False, soft_wrap=True)

    last = 0

    def update(made: int) -> None:
        nonlocal last
        last = made
        bar.update(task, completed=there + made, left=left(made))
        if not console.is_terminal and time.monotonic() - told >= LINE_EVERY_SECONDS:
            line(made)

    with bar:
        try:
            yield update
        finally:
            if not (console.is_terminal or passing):
                line(last)


def time_left(seconds: float, made: int, missing: int) -> str:
    """`0:02:10` at the speed so far; `-:--:--` before anything was made."""
    if missing == 0:
        return "0:00:00"
    if made == 0:
        return "-:--:--"
    hours, rest = divmod(round(seconds / made * missing), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
