"""metrics.csv of a run folder: one row a step, on disk at once, going on where a resumed run goes on.

Lightning's CSVLogger deletes the file that is there when a run is resumed; this one keeps the rows before the step of
the checkpoint and drops those after it, which will be written again.
"""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Logger that writes `file`; `first_step` is the resumed update, 0 for a fresh run."""

    def __init__(self, file: Path, first_step: int = 0):
        super().__init__()
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.is_file():
            with open(file, newline="") as source:
                self.rows = [row for row in csv.DictReader(source) if int(row["step"]) < first_step]
        self.columns = list(dict.fromkeys(["step", *(name for row in self.rows for name in row)]))
        self._started = False

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
        """Append a row; values of the step of the last row join it."""
        step = step if step is not None else len(self.rows)
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        new = [name for name in values if name not in self.columns]
        same_step = bool(self.rows) and int(self.rows[-1]["step"]) == step
        if same_step:
            self.rows[-1] = {**self.rows[-1], **values}
        else:
            self.rows.append({"step": step, **values})
        self.columns += new
        if new or same_step or not self._started:
            self._rewrite()
        else:
            with open(self.file, "a", newline="") as target:
                csv.DictWriter(target, self.columns).writerow(self.rows[-1])

    def _rewrite(self) -> None:
        beside = self.file.with_name(f".{self.file.name}")
        with open(beside, "w", newline="") as target:
            writer = csv.DictWriter(target, self.columns)
            writer.writeheader()
            writer.writerows(self.rows)
        beside.replace(self.file)
        self._started = True
