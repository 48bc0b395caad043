"""Checkpoints that are complete or absent, and a stop that loses nothing.

Both come between two steps, when the log has the rows of the first one, validation included. A checkpoint that cannot
be written, on a full disk say, is reported loudly and training goes on. Ctrl-C and SIGTERM, to any rank, end the step
that is under way, save, and raise RunInterruptedError, so that the command can say how to resume.
"""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from lightning_modules.checkpointing import CheckpointWriteError, checkpoint_name, remove_old

logger = logging.getLogger(__name__)


class RunInterruptedError(Exception):
    """The run was asked to stop by `signal`. `step` steps are done and saved, or where not, `saved` of them."""

    def __init__(self, step: int, signal_number: int, saved: int):
        where = f"and saved after step {step}"
        if saved != step:
            where = f"after step {step}, BUT ONLY SAVED AFTER STEP {saved}"
        super().__init__(f"Stopped {where}. The same command resumes from there.")
        self.step, self.signal, self.saved = step, signal_number, saved


class StepCheckpoint(Checkpoint):
    """Saves `folder/step-00000500` every `every` steps, after the last one and before a stop; keeps `keep`."""

    def __init__(self, folder: Path, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep
        self.requested: int | None = None
        self._step = self._saved_step = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = self._saved_step = trainer.global_step  # where it was resumed
        # After Lightning has set its own: its SIGTERM handler would exit with status 0 and without saving.
        try:
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # only the main thread may set handlers; elsewhere nobody sends signals to us
            self._handlers = {}

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._step = step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(self.requested is not None, all=False)
        if stop or step % self.every == 0:
            self.save(trainer)
        if stop:
            raise RunInterruptedError(step, self.requested or signal.SIGTERM, self._saved_step)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        if not self.save(trainer):
            raise CheckpointWriteError(
                f"the last checkpoint could not be written to '{self.folder}', so the model cannot be exported from "
                "it. Make room, and start the same command again: it resumes from the checkpoint before."
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: lightning.Trainer) -> bool:
        """Write the checkpoint of this step and remove old ones; whether there is one now."""
        step = trainer.global_step
        if step == self._saved_step:
            return True
        for log in trainer.loggers:
            log.save()
        try:
            trainer.save_checkpoint(self.folder / checkpoint_name(step), weights_only=False)
        except CheckpointWriteError as error:
            if trainer.is_global_zero:
                left = f"the one of step {self._saved_step} is intact" if self._saved_step else "there is none yet"
                logger.error("NO CHECKPOINT of step %d: %s; %s.", step, error, left)
            return False
        self._saved_step = step
        if trainer.is_global_zero:
            try:
                remove_old(self.folder, self.keep)
            except OSError as error:
                logger.error("an old checkpoint could not be removed: %s", error)
        return True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise RunInterruptedError(self._step, number, self._saved_step)  # pressed twice: stop at once
        self.requested = number
