"""Checkpoints that are complete or absent, and a stop that loses nothing.

Every checkpoint is a new file, written beside, fsynced and renamed; older ones are removed after that. Ctrl-C and
SIGTERM end the step that is under way, save, and raise RunInterruptedError, so that the command can say how to go on.
"""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint

from lightning_modules.run_folder import CHECKPOINT_PATTERN


class RunInterruptedError(Exception):
    """The run was asked to stop and has saved. `step` updates are done; `signal` asked for it."""

    def __init__(self, step: int, signal_number: int):
        super().__init__(f"stopped after step {step}")
        self.step, self.signal = step, signal_number


class StepCheckpoint(Checkpoint):
    """Saves `folder/step-00000500.ckpt` every `every` updates, after the last one and before a stop; keeps `keep`."""

    def __init__(self, folder: Path, every: int, keep: int):
        self.folder, self.every, self.keep = folder, every, keep
        self.requested: int | None = None
        self._stopping = False
        self._saved_step = -1
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        # After Lightning has set its own: its SIGTERM handler would exit with status 0 and without saving.
        try:
            self._handlers = {
                number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # only the main thread may set handlers; elsewhere nobody sends signals to us
            self._handlers = {}

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        step = trainer.global_step
        self._stopping = trainer.strategy.reduce_boolean_decision(self.requested is not None, all=False)
        if self._stopping or step % self.every == 0 or step == trainer.max_steps:
            self.save(trainer)

    # The log has the row of the saved step only after on_train_batch_end, hence the stop in the next hook there is.
    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stop(trainer)

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._stop(trainer)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def save(self, trainer: lightning.Trainer) -> None:
        """Write the checkpoint of this step, then remove all but the latest."""
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        final = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        beside = self.folder / f".{final.name}"
        trainer.save_checkpoint(beside, weights_only=False)  # with the optimiser's state and the position
        if trainer.is_global_zero:
            _sync(beside)
            beside.replace(final)
            _sync(self.folder)
            for old in sorted(self.folder.glob(CHECKPOINT_PATTERN))[: -self.keep]:
                old.unlink()
        trainer.strategy.barrier("checkpoint in place")

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # pressed twice: stop at once, the last checkpoint stands
        self.requested = number

    def _stop(self, trainer: lightning.Trainer) -> None:
        if self._stopping:
            raise RunInterruptedError(trainer.global_step, self.requested or signal.SIGTERM)


def _sync(path: Path) -> None:
    """Make a file's content or a folder's entries survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
