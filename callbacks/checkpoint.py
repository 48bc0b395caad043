"""Save checkpoints periodically, and on Ctrl-C or SIGTERM before stopping the run.

Both happen between two steps, after the metrics of the last step and of its validation were logged. If a checkpoint
cannot be written, for example on a full disk, the error is logged and training continues. On a signal to any rank, the
current step is finished, a checkpoint saved and RunInterruptedError raised.
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
    """The run was stopped by `signal` after `step` steps; the last checkpoint is of step `saved`."""

    def __init__(self, step: int, signal_number: int, saved: int):
        where = f"and saved after step {step}"
        if saved != step:
            where = f"after step {step}, BUT THE LAST CHECKPOINT IS OF STEP {saved}"
        super().__init__(f"Stopped {where}. The same command resumes from there.")
        self.step, self.signal, self.saved = step, signal_number, saved


class StepCheckpoint(Checkpoint):
    """Saves `folder/step-00000500` every `every` steps, after the last step and before a stop; keeps `keep` of them."""

    def __init__(self, folder: Path, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep
        self.requested: int | None = None
        self._step = self._saved_step = 0
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._step = self._saved_step = trainer.global_step
        # Replaces Lightning's SIGTERM handler, which exits with status 0 and without saving.
        try:
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not in the main thread, where signal handlers cannot be set
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
                f"the last checkpoint could not be written to '{self.folder}', so the model cannot be exported. Make "
                "room, and start the same command again: it resumes from the previous checkpoint."
            )

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: lightning.Trainer) -> bool:
        """Save a checkpoint of this step and remove old ones; returns whether it was saved."""
        step = trainer.global_step
        if step == self._saved_step:
            return True
        for log in trainer.loggers:
            log.save()
        try:
            trainer.save_checkpoint(self.folder / checkpoint_name(step), weights_only=False)
        except CheckpointWriteError as error:
            if trainer.is_global_zero:
                last = f"that of step {self._saved_step} is intact" if self._saved_step else "there is no earlier one"
                logger.error("NO CHECKPOINT of step %d: %s; %s.", step, error, last)
            return False
        self._saved_step = step
        if trainer.is_global_zero:
            try:
                remove_old(self.folder, self.keep)
            except OSError as error:
                logger.error("An old checkpoint could not be removed: %s", error)
        return True

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise RunInterruptedError(self._step, number, self._saved_step)  # second Ctrl-C: stop at once
        self.requested = number
