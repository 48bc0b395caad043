"""Schema of a run's length, devices and intervals, and the Lightning trainer it describes."""

import logging
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import lightning
import transformers

from lightning_modules.scale.batch_layout import BatchLayout
from lightning_modules.scale.strategies import build_strategy


@dataclass
class TrainerConfig:
    max_steps: int = 1000
    """Updates of the weights; the learning rate reaches 0 there."""
    max_flops: float | None = None
    """Training compute in place of max_steps, so that unlike models train equally dear: as many updates as cost so many
    FLOPs over all processes, see lightning_modules/estimate/compute.py."""
    val_every: int = 100
    """Updates between validations, each over data.validation_samples rows of the held-out shards, if there are any."""
    checkpoint_every: int = 100
    """Updates between checkpoints; one is also written at the end and on Ctrl-C or SIGTERM."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints are kept."""
    log_every: int = 10
    """Updates between rows of the log."""
    global_batch_size: int | None = None
    """Rows of one update over all devices, a multiple of data.batch_size × devices × num_nodes: as many forward passes
    are accumulated. null: one pass."""
    accelerator: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    devices: int = 1
    """Processes on each node, one a device; 0 for as many as the launcher started there, or as there are."""
    num_nodes: int = 1
    """Machines."""
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    """single: one device; ddp: whole copies; fsdp2: parameters sharded over all processes; auto: single on one device,
    fsdp2 beyond."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    """Of weights and activations; the optimiser's states follow the weights. 16-mixed, with loss scaling, is for cards
    without bf16."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, all but matrix products and attention, or
    whole layers."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    max_skipped_steps: int = 10
    """Updates of a run that may be skipped because loss or gradient is not finite; one more stops it."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.max_flops is not None and self.max_flops <= 0:
            raise ValueError(f"trainer.max_flops is {self.max_flops}; allowed: above 0, or null")
        for name, least in (("devices", 0), ("num_nodes", 1), ("max_skipped_steps", 0), ("global_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"trainer.{name} is {value}; allowed: {least} or more")
        if self.strategy == "single" and (self.devices > 1 or self.num_nodes > 1):
            raise ValueError(
                f"trainer.strategy is single, but trainer.devices is {self.devices} and trainer.num_nodes "
                f"{self.num_nodes}; allowed beyond one device: auto, ddp, fsdp2"
            )


def build_trainer(config: TrainerConfig, layout: BatchLayout, **options: Any) -> lightning.Trainer:
    """The trainer; `options` are its callbacks, loggers and folder."""
    return lightning.Trainer(
        max_epochs=-1,
        max_steps=config.max_steps,
        accelerator=config.accelerator,
        devices=layout.processes // config.num_nodes,
        num_nodes=config.num_nodes,
        strategy=build_strategy(config.strategy, config.accelerator, layout.processes),
        precision=config.precision,
        accumulate_grad_batches=layout.accumulate,
        val_check_interval=config.val_every * layout.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        # The order of samples is a pure function of their number; a sampler put in by Lightning would break it.
        use_distributed_sampler=False,
        enable_model_summary=False,
        **options,
    )


def quieten_libraries() -> None:
    """No advertisements, loading bars and warnings about our own intentions between our own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")  # Lightning's own
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    warnings.filterwarnings(
        "ignore", message="FSDP2-wrapped module .* returned a view tensor"
    )  # never changed in place
    warnings.filterwarnings("ignore", message=r"Found \d+ module.* in eval mode")  # those that are frozen
