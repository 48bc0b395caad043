"""Show progress and remaining time: a progress bar on a terminal, otherwise a line every 15 seconds."""

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 15.0


class RunProgress(Callback):
    """Shows the finished optimizer steps, the time left and the loss."""

    def __init__(self, stage: str, console: Console | None = None):
        self.stage, self.console = stage, console or Console(file=sys.stdout)
        self._bar: Progress | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._first_step, self._started, self._last_line = trainer.global_step, time.monotonic(), time.monotonic()
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
            self._bar = Progress(*columns, *left, console=self.console)
            self._bar.add_task(self.stage, total=trainer.max_steps, completed=trainer.global_step, loss="")
            self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        # The loss is that of this rank.
        done, last, loss = trainer.global_step, trainer.max_steps, f"loss {float(outputs['loss']):.4g}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, loss=loss)
        elif done == last or time.monotonic() - self._last_line >= LINE_EVERY_SECONDS:
            self._last_line = time.monotonic()
            seconds = (self._last_line - self._started) / max(1, done - self._first_step) * (last - done)
            left = f"{round(seconds) // 3600}:{round(seconds) // 60 % 60:02d}:{round(seconds) % 60:02d} left"
            line = f"{self.stage} {done}/{last}  {left}  {loss}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()
