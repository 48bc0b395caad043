"""Exponential moving average of the trainable weights, as each rank holds them: whole or sharded.

The average is float32, is in every checkpoint under `ema.`, and is what the finished model holds unless told otherwise.
It is a pure function of the optimizer steps, so any number of ranks finds the same.
"""

from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_modules.base import StageModule
from lightning_modules.checkpointing import empty_average, trainable_parameters


@dataclass
class EmaConfig:
    decay: float = 0.0
    """Share of the old average that a step keeps, less in the first steps: at most (1 + n) / (10 + n). 0: none."""
    export: bool = True
    """Whether the finished model holds the average instead of the last weights."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"ema.decay is {self.decay}; allowed: in [0, 1), 0 for no average")

    @property
    def exported(self) -> bool:
        """Whether the model folder holds an average."""
        return self.decay > 0 and self.export


class WeightAverage(Callback):
    """Keeps the average with `decay`."""

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


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the average of parts is the part of the average."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
