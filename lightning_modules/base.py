"""What the three stages share: optimiser, clipping, frozen parts, checkpoints, random draws, sharding.

Logged at every `trainer.log_every` updates: train/loss, lr, grad_norm (before clipping). Lightning numbers updates
from 0: the row of step n is of update n + 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning
import torch
from torch import Tensor, nn

from kosmosg.models.mllm import MLLM
from kosmosg.models.model_config import ModelConfig
from kosmosg.tokenizer import Tokenizer
from lightning_modules.optimizer import OptimizerConfig, build_optimizer
from lightning_modules.randomness import derive_seed, sample_numbers
from lightning_modules.sharding import shard
from lightning_modules.trained_weights import check_trained, keep_trained


class StageExperiment(Protocol):
    """What a stage reads of an experiment's configuration."""

    model: ModelConfig
    recipe: Any
    optimizer: OptimizerConfig
    init_from: str | None
    seed: int


class StageModule(lightning.LightningModule):
    """Base of the stages.

    Args:
        optimizer: schema of the optimiser.
        seed: of all random draws of the run.
    """

    def __init__(self, optimizer: OptimizerConfig, seed: int):
        super().__init__()
        self.optimizer_config, self.seed = optimizer, seed
        self.strict_loading = False  # checkpoints lack what is frozen; on_load_checkpoint checks exactly

    @classmethod
    def build(cls, experiment: "StageExperiment", tokenizer: Tokenizer) -> "StageModule":
        """The module with the networks that the configuration describes; `init_from` holds the stage before."""
        raise NotImplementedError

    def frozen_networks(self) -> Sequence[nn.Module]:
        """Networks that stay in eval mode."""
        return ()

    def sharded_networks(self) -> Sequence[nn.Module]:
        """Networks that fsdp2 shards; the others are whole on every process. Each must be run by calling it."""
        return ()

    def save_model(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Write the stage's result as a model folder."""
        raise NotImplementedError

    def batch_loss(self, batch: Any) -> Tensor:
        """The training loss of a batch, with draws of its own: for what looks at a step from outside of a run."""
        raise NotImplementedError

    @property
    def forward_pass(self) -> int:
        """Number of this forward pass since the run began, from 0; accumulated passes count singly."""
        accumulation = self.trainer.accumulate_grad_batches
        position = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1
        return self.trainer.global_step * accumulation + position % accumulation

    def train_numbers(self, rows: int) -> range:
        """Numbers of the samples in this rank's batch, independent of how the global batch is split."""
        return sample_numbers(self.forward_pass, self.trainer.world_size, self.trainer.global_rank, rows)

    def any_process(self, flag: bool) -> bool:
        """Whether `flag` holds on any process. All must ask alike: what they then do together must be the same."""
        return self.trainer.strategy.reduce_boolean_decision(flag, all=False)

    def train(self, mode: bool = True) -> "StageModule":
        """Training mode for what trains; frozen networks stay in eval mode, without dropout."""
        super().train(mode)
        for network in self.frozen_networks():
            network.train(False)
        return self

    def configure_model(self) -> None:
        """Shard over the device mesh when the strategy has one. Idempotent."""
        if self.device_mesh is not None:
            shard(self.sharded_networks(), self.device_mesh)

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer, schedule = build_optimizer(trained, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm over all trained parameters, and log what it was.

        Raises:
            FloatingPointError: the norm is not finite; the weights are still those of the last good update.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # Mixed fp16 may overflow and its scaler then skips the step; elsewhere nothing heals a NaN.
        if not norm.isfinite() and self.trainer.precision != "16-mixed":
            raise FloatingPointError(
                f"the gradient's norm is {norm.item()} at step {self.trainer.global_step}: lower optimizer.lr or look "
                "at the samples of this step; the last checkpoint is intact."
            )
        self.log("grad_norm", norm)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def on_train_start(self) -> None:
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout draws from the global generator. Seeded for every batch, it needs no saving and resume is exact.
        torch.manual_seed(derive_seed(self.seed, "dropout", self.forward_pass, self.trainer.global_rank))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = keep_trained(self, checkpoint["state_dict"])
        checkpoint["stage"] = type(self).__name__

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "state_dict" in checkpoint:  # a sharded strategy has loaded the tensors by now, and checked them itself
            check_trained(self, checkpoint["state_dict"], f"the {checkpoint.get('stage', 'unknown')} checkpoint")

    def log_losses(self, prefix: str, losses: dict[str, Tensor], weight: int) -> None:
        """Log `prefix`/name for each loss, a mean over processes; `weight` is what this batch counts in validation.

        Every process must log the same names in a validation; one without anything to say gives weight 0.
        """
        training = prefix == "train"
        for name, value in losses.items():
            self.log(
                f"{prefix}/{name}",
                value,
                prog_bar=training and name == "loss",
                on_step=training,
                on_epoch=not training,
                batch_size=weight,
                sync_dist=True,
                add_dataloader_idx=False,
            )


def save_mllm(mllm: MLLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write mllm/ and tokenizer/: the model folder of stage 1, which has no aligner yet."""
    mllm.save_pretrained(folder / "mllm")
    tokenizer.save_pretrained(folder / "tokenizer")
