"""Log the metrics of optimizer steps, and write them to the run folder's metrics.csv.

Metrics are train/*, lr, grad_norm (before clipping), skipped_steps, samples_per_second and tokens_per_second over all
ranks, logged with the number of finished optimizer steps. Throughput includes the wait for data, but not validation,
checkpoints, grids or padding tokens.
"""

import csv
import io
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from kosmosg.files import flush, write_text

log = logging.getLogger(__name__)


class StepMetrics(Callback):
    """Logs metrics every `every` steps. Must be the first callback, so that the time of others is not measured and
    metrics are logged before a checkpoint is saved."""

    def __init__(self, every: int):
        self.every = every
        self._samples = self._tokens = 0
        self._seconds = 0.0

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, *_: Any) -> None:
        self._seconds += time.perf_counter() - pl_module.waiting_since

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, step: Any, batch_idx: int
    ) -> None:
        self._seconds += time.perf_counter() - pl_module.step_began
        self._samples += sum(len(batch) for batch in step) * trainer.world_size
        self._tokens += sum(sum(batch.prompt.lengths) for batch in step) * trainer.world_size
        if trainer.global_step % self.every:
            return
        metrics = pl_module.step_metrics() | {
            "samples_per_second": self._samples / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
        }
        self._samples, self._tokens, self._seconds = 0, 0, 0.0
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)


class MetricsFile(Logger):
    """Writes `file`, with one row per logged step, immediately. A resumed run drops rows after its `first_step`. If the
    disk is full, the error is logged and the rows are written as soon as there is room."""

    def __init__(self, file: Path, first_step: int = 0):
        super().__init__()
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            self.rows = [row for row in read_rows(file) if int(row["step"]) <= first_step]
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        self._appendable = False

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, or add the values to the last row if it is of the same step."""
        same_step = bool(self.rows) and int(self.rows[-1]["step"]) == step
        if same_step:
            self.rows[-1] |= metrics
        else:
            self.rows.append({"step": step, **metrics})
        new = [name for name in metrics if name not in self.columns]
        self.columns += new
        try:
            if new or same_step or not self._appendable:
                write_text(self.file, as_csv(self.columns, self.rows, header=True))
            else:
                with open(self.file, "a", newline="", encoding="utf-8") as target:
                    target.write(as_csv(self.columns, self.rows[-1:]))
            self._appendable = True
        except OSError as error:
            self._appendable = False
            log.error("'%s' could not be written: %s; training continues.", self.file, error)

    @rank_zero_only
    def save(self) -> None:
        """Flush the rows to disk. Called before a checkpoint is saved, so that rows are never behind a checkpoint."""
        if self._appendable:
            try:
                flush(self.file)
            except OSError as error:
                log.error("'%s' could not be written: %s; training continues.", self.file, error)


def as_csv(columns: list[str], rows: list[dict[str, Any]], header: bool = False) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_rows(file: Path) -> list[dict[str, str]]:
    """Read the complete rows of metrics.csv. Rows damaged by a power cut are dropped with a warning."""
    header, *lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    columns = next(csv.reader([header]), [])
    rows = [row for row in map(partial(read_row, columns), lines[:-1]) if row is not None]
    if len(rows) < len(lines) - 1 or lines[-1:] != [""]:  # a complete last row ends with a line break
        log.warning("'%s' is damaged: keeping %d of its %d rows.", file, len(rows), sum(map(bool, lines)))
    return rows


def read_row(columns: list[str], line: str) -> dict[str, str] | None:
    """Parse a line into values by column; returns None if it is not a valid row."""
    values = line.split(",")
    row = dict(zip(columns, values, strict=False))
    try:
        [float(value) for value in filter(None, values)]
    except ValueError:
        return None
    return row if len(values) == len(columns) and row.get("step", "").isdecimal() else None
