"""Lightning modules that learn nothing and remember what they read."""

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


class Recorder(lightning.LightningModule):
    """Learns nothing; remembers which samples came at which optimizer step, and their places in the global order."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[str]] = {}
        self.indices: dict[int, list[list[int]]] = {}
        self.validated: list[str] = []

    def training_step(self, step, number):
        self.seen[number] = [name for batch in step for name in batch.report.samples]
        self.indices[number] = [batch.indices for batch in step]
        return self.weight.sum()

    def validation_step(self, batch, number):
        self.validated += batch.report.samples[: batch.counted]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class EagerRecorder(Recorder):
    """Asks for the length of the run before the checkpoint is restored, which builds the loader early."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


def fit(folder, data, steps, recorder=None, checkpoint=None, micro_batches=1, **options):
    recorder, data.micro_batches = recorder or Recorder(), micro_batches
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)],
        **({"limit_val_batches": 0} | options),
    )
    trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint)
    return recorder
