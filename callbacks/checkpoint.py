"""Checkpoints that are complete or absent, and a stop that loses nothing.

Every checkpoint is a new folder (lightning_modules/runs/checkpoint_folder.py); older ones are removed after it stands.
One that cannot be written, on a full disk say, is told loudly and training goes on. Ctrl-C and SIGTERM, to any process,
end the step that is under way, save, and raise RunInterruptedError, so that the command can say how to go on.
"""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from callbacks.metrics_file import MetricsFile
from lightning_modules.runs.checkpoint_folder import CheckpointWriteError, checkpoint_name, remove_old

logger = logging.getLogger(__name__)


class RunInterruptedError(Exception):
    """The run was asked to stop by `signal`. `step` updates are done and saved, or where not, `saved` of them."""

    def __init__(self, step: int, signal_number: int, saved: int):
        where = f"and saved after step {step}"
        if saved != step:
            where = f"after step {step}, BUT SAVED AFTER STEP {saved} ALONE"
        super().__init__(f"Stopped {where}. The same command goes on from there.")
        self.step, self.signal, self.saved = step, signal_number, saved


class StepCheckpoint(Checkpoint):
    """Saves `folder/step-00000500` every `every` updates, after the last one and before a stop; keeps `keep`."""

    def __init__(self, folder: Path, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep
        self.requested: int | None = None
        self._stopping = False
        self._due = False
        self._saved_step = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._saved_step = trainer.global_step  # where it was resumed
        # After Lightning has set its own: its SIGTERM handler would exit with status 0 and without saving.
        try:
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # only the main thread may set handlers; elsewhere nobody sends signals to us
            self._handlers = {}

    # What lies before a checkpoint is never logged again, so the log must have it by then: the update's row, which
    # Lightning writes after this hook, and that of a validation which comes next.
    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        step = trainer.global_step
        self._stopping = trainer.strategy.reduce_boolean_decision(self.requested is not None, all=False)
        self._due = step % self.every == 0 or step == trainer.max_steps
        validates = loop._should_check_val_fx(trainer.fit_loop._data_fetcher) and not loop.val_loop.skip
        if self._stopping or (self._due and not validates):
            write_row(trainer)
            self.save(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._due and not trainer.sanity_checking:
            self.save(trainer)

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        if self._stopping:  # not before: a validation that is due would not be made up for
            raise RunInterruptedError(trainer.global_step, self.requested or signal.SIGTERM, self._saved_step)
        # Lightning's count of rows misses one where a validation was due when it was saved and is not now.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint of this step, then remove all but the latest."""
        step, self._due = trainer.global_step, False
        if step == self._saved_step:
            return
        try:
            trainer.save_checkpoint(
                self.folder / checkpoint_name(step), weights_only=False
            )  # with the optimiser's state
        except CheckpointWriteError as error:
            if trainer.is_global_zero:
                stands = f"the one of step {self._saved_step} stands" if self._saved_step else "there is none yet"
                logger.error("NO CHECKPOINT of step %d: %s; %s, training goes on.", step, error, stands)
            return
        self._saved_step = step
        if trainer.is_global_zero:
            try:
                remove_old(self.folder, self.keep)
            except OSError as error:
                logger.error("an old checkpoint could not be removed: %s", error)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # pressed twice: stop at once, the last checkpoint stands
        self.requested = number


def write_row(trainer: lightning.Trainer) -> None:
    """The present update's row into the run's metrics.csv, where Lightning's own will join it."""
    connector = trainer._logger_connector
    if trainer.is_global_zero and connector.should_update_logs:
        row = {name: float(value) for name, value in connector.metrics["log"].items()}
        for file in trainer.loggers:
            if isinstance(file, MetricsFile):
                file.log_metrics(row, trainer.fit_loop.epoch_loop._batches_that_stepped)
