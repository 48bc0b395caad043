"""Samples and prompt tokens per second, over all processes; validation, checkpoints and pictures do not count."""

import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class Throughput(Callback):
    """Logs samples_per_second and tokens_per_second with every row of the log. Padding is no token."""

    def __init__(self) -> None:
        self._restart()

    def on_train_batch_start(self, *_: Any) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self._samples += len(batch.prompt) * trainer.world_size
        tokens = (~batch.prompt.padding).sum() * trainer.world_size
        # Stays on the device until a row is due, so that counting does not wait for the GPU.
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        if trainer._logger_connector.should_update_logs:
            tokens = float(self._tokens)
            seconds = time.perf_counter() - self._since
            pl_module.log("samples_per_second", self._samples / seconds, prog_bar=True)
            pl_module.log("tokens_per_second", tokens / seconds)
            self._restart()

    def on_validation_start(self, *_: Any) -> None:
        self._restart()

    def _restart(self) -> None:
        self._since: float | None = None
        self._samples = 0
        self._tokens: Tensor | None = None
