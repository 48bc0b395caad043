"""Exponential moving average (EMA) of the trainable weights.

The average is float32, sharded like the weights, saved in checkpoints under `ema.`, and exported as the finished model
unless `ema.export` is false.
"""

from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lightning_modules.base import StageModule
from lightning_modules.checkpointing import empty_average, trainable_parameters
from lightning_modules.optimizer import local


@dataclass
class EmaConfig:
    decay: float = 0.0
    """Decay per step, limited to (1 + n) / (10 + n) at step n; 0: no average."""
    export: bool = True
    """Export the average as the finished model, instead of the last weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; allowed: in [0, 1), 0 for no average")

    @property
    def exported(self) -> bool:
        """Whether there is an average and it is exported."""
        return self.decay > 0 and self.export


class WeightAverage(Callback):
    """Updates the average after every optimizer step that was not skipped."""

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: StageModule) -> None:
        if not self.average:
            for name, parameter in trainable_parameters(pl_module).items():
                self.average[name] = empty_average(parameter).copy_(parameter.detach())

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: StageModule, *_: Any) -> None:
        if pl_module.guard.skipping:
            return
        decay = min(self.decay, (1 + trainer.global_step) / (10 + trainer.global_step))
        parameters = trainable_parameters(pl_module)
        old = [local(tensor) for tensor in self.average.values()]
        new = [local(parameters[name].detach()).float() for name in self.average]
        torch._foreach_lerp_(old, new, 1 - decay)

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ema"] = dict(self.average)

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.average = checkpoint["ema"]
