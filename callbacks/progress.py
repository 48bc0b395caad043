"""Progress of a run with the time left: a bar on a terminal, a line now and then in a file or pipe."""

import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_SECONDS = 15.0


class RunProgress(ProgressBar):
    """Counts updates up to `trainer.max_steps` under the name of the stage."""

    def __init__(self, stage: str, console: Console | None = None):
        super().__init__()
        self.stage = stage
        self.console = console or Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._first_step, self._started, self._last_line = trainer.global_step, time.monotonic(), time.monotonic()
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
            )
            self._bar.add_task(self.stage, total=trainer.max_steps, completed=trainer.global_step, metrics="")
            self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            metrics = self._metrics(trainer, pl_module)
            self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, metrics=metrics)
        elif self._enabled and self._line_is_due(trainer):
            self._last_line = time.monotonic()
            line = f"{self.stage} {trainer.global_step}/{trainer.max_steps}  {self._time_left(trainer)} left"
            self.console.print(f"{line}  {self._metrics(trainer, pl_module)}", highlight=False, soft_wrap=True)

    def on_train_end(self, *_: Any) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line_is_due(self, trainer: lightning.Trainer) -> bool:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return False
        last = trainer.global_step == trainer.max_steps
        return last or time.monotonic() - self._last_line >= LINE_EVERY_SECONDS

    def _time_left(self, trainer: lightning.Trainer) -> str:
        done = max(1, trainer.global_step - self._first_step)
        seconds = (time.monotonic() - self._started) / done * (trainer.max_steps - trainer.global_step)
        hours, rest = divmod(round(seconds), 3600)
        return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"

    def _metrics(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> str:
        shown = {name: value for name, value in self.get_metrics(trainer, pl_module).items() if name != "v_num"}
        return "  ".join(f"{name.removeprefix('train/')} {float(value):.4g}" for name, value in shown.items())
