"""At the end of a stage: its result as a model folder, and the mark that the run is complete."""

from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageModule
from lightning_modules.run_folder import RunFolder
from lightning_modules.trained_weights import check_trained


class ModelExport(Callback):
    """Writes `model/` and `finished.json`.

    Args:
        run: where to.
        tokenizer: goes into the model folder.
        rebuild: gives the stage's module afresh. Parameters sharded over processes are in no process whole, so the
            trained tensors are then read from the last checkpoint into a fresh module.
    """

    def __init__(self, run: RunFolder, tokenizer: Tokenizer, rebuild: Callable[[], StageModule]):
        self.run, self.tokenizer, self.rebuild = run, tokenizer, rebuild

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: StageModule) -> None:
        if not trainer.is_global_zero or trainer.global_step < trainer.max_steps:
            return
        module = self._whole(pl_module)
        self.run.write_model(lambda folder: module.save_model(folder, self.tokenizer))
        self.run.mark_finished(step=trainer.global_step, max_steps=trainer.max_steps)

    def _whole(self, module: StageModule) -> StageModule:
        if module.device_mesh is None:
            return module
        checkpoint: dict[str, Any] = torch.load(self.run.latest_checkpoint(), map_location="cpu", weights_only=True)
        module = self.rebuild()
        check_trained(module, checkpoint["state_dict"], str(self.run.latest_checkpoint()))
        module.load_state_dict(checkpoint["state_dict"], strict=False)
        return module
