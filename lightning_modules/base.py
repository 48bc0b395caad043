"""What the three stages share: optimiser, clipping, skipped updates, frozen parts, random draws, sharding.

Logged at every `trainer.log_every` updates: train/loss (of the whole update, accumulated passes too), lr, grad_norm
(before clipping), skipped_steps. Lightning numbers updates from 0: the row of step n is of update n + 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning
import torch
from torch import Tensor, nn

from kosmosg.models.mllm import MLLM
from kosmosg.models.model_config import ModelConfig
from kosmosg.tokenizer import Tokenizer
from lightning_modules.optimizer import OptimizerConfig, build_optimizer
from lightning_modules.randomness import derive_seed, sample_numbers
from lightning_modules.runs.trained_weights import CheckpointMismatchError
from lightning_modules.scale.sharding import shard
from lightning_modules.step_guard import StepGuard


class StageExperiment(Protocol):
    """What a stage reads of an experiment's configuration."""

    module: ClassVar[type["StageModule"]]
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

    Attributes:
        guard: skips updates that are not finite.
        max_skipped_steps: how many it may skip in a run.
        global_batch: rows of an update; a resumed run must have the same.
    """

    def __init__(self, optimizer: OptimizerConfig, seed: int):
        super().__init__()
        self.optimizer_config, self.seed = optimizer, seed
        self.guard, self.max_skipped_steps = StepGuard(), 10
        self.global_batch: int | None = None
        self._update_sums: dict[str, Tensor] = {}
        self._update_weight: float | Tensor = 0.0

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

    @property
    def meets_others(self) -> bool:
        """Whether other processes train along: all must then use the same networks, see `with_blank_image_row`."""
        return self._trainer is not None and self.trainer.world_size > 1

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
            shard(self.sharded_networks(), self.device_mesh, self.trainer.precision)

    def configure_optimizers(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer, schedule = build_optimizer(trained, self.optimizer_config, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip the norm over all trained parameters, whole or sharded, and log what it was; or skip the update.

        Raises:
            TooManySkippedStepsError: see `StepGuard.skip`.
        """
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.finish_gradients([parameter.grad for parameter in parameters if parameter.grad is not None])
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        # The norm is one number for all processes; a loss is each process's own.
        losses_are_finite = not self.any_process(not self.guard.losses_are_finite())
        if not (losses_are_finite and bool(norm.isfinite())):
            for parameter in parameters:
                parameter.grad = None
            if not (losses_are_finite and self._loss_scale_will_shrink()):
                update = self.trainer.global_step + 1
                self.guard.skip(update, float(norm), Path(self.trainer.default_root_dir), self.max_skipped_steps)
        self.log("grad_norm", norm)
        self.log("lr", optimizer.param_groups[0]["lr"])
        self.log("skipped_steps", float(self.guard.skipped))

    def finish_gradients(self, gradients: list[Tensor]) -> None:
        """What is due between the last backward pass of an update and the clipping; nothing by default."""

    def _loss_scale_will_shrink(self) -> bool:
        """With fp16, a gradient that overflows is the loss scaler's daily work, as long as it has room to shrink."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler is not None and scaler.get_scale() > 1

    def on_train_start(self) -> None:
        self.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout draws from the global generator. Seeded for every batch, it needs no saving and resume is exact.
        torch.manual_seed(derive_seed(self.seed, "dropout", self.forward_pass, self.trainer.global_rank))
        if self.forward_pass % self.trainer.accumulate_grad_batches == 0:
            self.guard.begin_update()
            self._update_sums, self._update_weight = {}, 0.0
        self.guard.begin_pass(batch)

    def on_before_backward(self, loss: Tensor) -> None:
        self.guard.see(loss)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["stage"] = type(self).__name__
        checkpoint["skipped_steps"] = self.guard.skipped
        checkpoint["accumulate"] = self.trainer.accumulate_grad_batches
        checkpoint["global_batch"] = self.global_batch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the counts; the loop's are in forward passes, of which an update may now have more or fewer.

        Raises:
            CheckpointMismatchError: the checkpoint is another stage's, or its updates read another number of rows.
        """
        if checkpoint.get("stage") != type(self).__name__:
            raise CheckpointMismatchError(
                f"the checkpoint is of {checkpoint.get('stage')}, this is {type(self).__name__}: use another run folder"
            )
        if checkpoint["global_batch"] != self.global_batch:
            raise CheckpointMismatchError(
                f"an update of the checkpoint reads {checkpoint['global_batch']} rows, one of this run would read "
                f"{self.global_batch}: set trainer.global_batch_size={checkpoint['global_batch']}, and data.batch_size "
                "to what a device holds."
            )
        self.guard.skipped = checkpoint["skipped_steps"]
        now = self.trainer.accumulate_grad_batches
        if checkpoint["accumulate"] != now:
            count_passes_anew(checkpoint["loops"]["fit_loop"], checkpoint["accumulate"], now)

    def log_losses(self, prefix: str, losses: dict[str, Tensor], weight: int) -> None:
        """Log `prefix`/name for each loss, a mean over processes; `weight` is what this batch counts in validation.

        Every process must log the same names in a validation; one without anything to say gives weight 0.
        """
        if prefix == "train":
            self._log_update(losses)
            return
        for name, value in losses.items():
            self.log(
                f"{prefix}/{name}",
                value,
                on_step=False,
                on_epoch=True,
                batch_size=weight,
                sync_dist=True,
                add_dataloader_idx=False,
            )

    def pass_weight(self) -> float | Tensor:
        """What the loss of the present forward pass counts in its update's; passes are alike by default."""
        return 1.0

    def _log_update(self, losses: dict[str, Tensor]) -> None:
        """Log the mean over the passes of an update so far; the last pass's row is the update's."""
        weight = self.pass_weight()
        self._update_weight = self._update_weight + weight
        for name, value in losses.items():
            self._update_sums[name] = self._update_sums.get(name, 0.0) + value.detach() * weight
            mean = self._update_sums[name] / self._update_weight
            self.log(f"train/{name}", mean, prog_bar=name == "loss", on_step=True, on_epoch=False, sync_dist=True)


def build_stage(experiment: StageExperiment, tokenizer: Tokenizer) -> StageModule:
    """The stage's module. Weights that no file holds are drawn anew from the seed, so that every start has the same:
    a frozen part with random weights is in no checkpoint."""
    lightning.seed_everything(experiment.seed, verbose=False)
    return experiment.module.build(experiment, tokenizer)


def count_passes_anew(fit_loop: dict[str, Any], before: int, now: int) -> None:
    """Turn the counts of forward passes in a saved loop's state from `before` passes an update into `now`."""
    progress = fit_loop["epoch_loop.batch_progress"]
    for counts in (progress["total"], progress["current"]):
        open_passes = counts["ready"] - counts["completed"]  # saved before Lightning closes the last one
        for name in ("ready", "started", "processed"):
            counts[name] = counts[name] // before * now
        counts["completed"] = counts["ready"] - open_passes


def save_mllm(mllm: MLLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write mllm/ and tokenizer/: the model folder of stage 1, which has no aligner yet."""
    mllm.save_pretrained(folder / "mllm")
    tokenizer.save_pretrained(folder / "tokenizer")
