"""Schema of a run's length, devices and intervals, and the Lightning trainer it describes."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import lightning
import transformers
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy


@dataclass
class TrainerConfig:
    max_steps: int = 1000
    """Updates of the weights; the learning rate reaches 0 there."""
    max_flops: float | None = None
    """Training compute in place of max_steps, so that unlike models train equally dear: as many updates as cost so many
    FLOPs over all processes, see lightning_modules/compute.py."""
    val_every: int = 100
    """Updates between validations, each over data.validation_samples rows of the held-out shards, if there are any."""
    checkpoint_every: int = 100
    """Updates between checkpoints; one is also written at the end and on Ctrl-C or SIGTERM."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    log_every: int = 10
    """Updates between rows of the log."""
    accumulate: int = 1
    """Forward passes for one update; the batch of an update is data.batch_size × processes × this."""
    accelerator: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    devices: int = 1
    """Processes on each node, one a device; 0 for all devices."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "ddp", "fsdp2"] = "auto"
    """auto: one process alone, several by ddp; ddp: whole copies; fsdp2: parameters sharded over all processes."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    """Of weights and activations; the optimiser's states follow the weights."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "checkpoint_every", "keep_checkpoints", "log_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.max_flops is not None and self.max_flops <= 0:
            raise ValueError(f"trainer.max_flops is {self.max_flops}; allowed: above 0, or null")
        for name, least in (("devices", 0), ("num_nodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; allowed: {least} or more")


def build_trainer(config: TrainerConfig, **options: Any) -> lightning.Trainer:
    """The trainer; `options` are its callbacks, loggers and folder."""
    return lightning.Trainer(
        max_epochs=-1,
        max_steps=config.max_steps,
        accelerator=config.accelerator,
        devices=config.devices or "auto",
        num_nodes=config.num_nodes,
        strategy=build_strategy(config),
        precision=config.precision,
        accumulate_grad_batches=config.accumulate,
        val_check_interval=config.val_every * config.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        # The order of samples is a pure function of their number; a sampler put in by Lightning would break it.
        use_distributed_sampler=False,
        enable_model_summary=False,
        **options,
    )


def build_strategy(config: TrainerConfig) -> Strategy | str:
    """The strategy of `trainer.strategy`. Several processes without a choice take ddp."""
    if config.strategy == "fsdp2":
        return ModelParallelStrategy(
            data_parallel_size=max(1, config.devices) * config.num_nodes if config.devices else "auto",
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    several = config.devices != 1 or config.num_nodes > 1
    # A batch without images leaves the image tower and the resampler without gradients on that process.
    return DDPStrategy(find_unused_parameters=True) if config.strategy == "ddp" or several else "auto"


def quieten_libraries() -> None:
    """No advertisements, loading bars and warnings about our own intentions between our own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own
    warnings.filterwarnings("ignore", message=r"Found \d+ module.* in eval mode")  # those that are frozen
