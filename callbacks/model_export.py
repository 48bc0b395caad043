"""At the end of a stage: its result as a model folder, and the mark that the run is complete."""

from collections.abc import Callable

import lightning
from lightning.pytorch.callbacks import Callback

from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageModule
from lightning_modules.runs.checkpoint_folder import checkpoint_name
from lightning_modules.runs.consolidation import load_whole
from lightning_modules.runs.run_folder import RunFolder, RunFolderError


class ModelExport(Callback):
    """Writes `model/` and `finished.json`.

    Args:
        run: where to.
        tokenizer: goes into the model folder.
        rebuild: gives the stage's module afresh. Parameters sharded over processes are in no process whole, and an
            average is not in the module, so the tensors are then read from the last checkpoint into a fresh module.
        average: export the average of the weights.
    """

    def __init__(self, run: RunFolder, tokenizer: Tokenizer, rebuild: Callable[[], StageModule], average: bool = False):
        self.run, self.tokenizer, self.rebuild, self.average = run, tokenizer, rebuild, average

    def on_fit_end(self, trainer: lightning.Trainer, pl_module: StageModule) -> None:
        if not trainer.is_global_zero or trainer.global_step < trainer.max_steps:
            return
        module = self._whole(pl_module)
        self.run.write_model(lambda folder: module.save_model(folder, self.tokenizer))
        self.run.mark_finished(step=trainer.global_step, max_steps=trainer.max_steps)

    def _whole(self, module: StageModule) -> StageModule:
        if module.device_mesh is None and not self.average:
            return module
        checkpoint = self.run.checkpoints / checkpoint_name(module.trainer.global_step)
        if not checkpoint.is_dir():
            raise RunFolderError(
                f"the last checkpoint, '{checkpoint}', could not be written, so the model cannot be put together from "
                "it. Make room, and start the same command again: it goes on from the checkpoint before."
            )
        return load_whole(checkpoint, self.rebuild(), self.average)
