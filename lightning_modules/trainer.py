"""The `trainer` configuration, the division of an optimizer step into micro-batches, and Lightning's `Trainer`."""

import logging
import os
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import diffusers
import lightning
import torch
import transformers

from lightning_modules.checkpointing import build_strategy


@dataclass
class TrainerConfig:
    max_steps: int = 1000
    """Number of optimizer steps; the learning rate decays to 0 at the last."""
    val_every: int = 100
    """Steps between validations on data.validation_samples held-out samples, if the data has any."""
    checkpoint_every: int = 100
    """Steps between checkpoints. A checkpoint is also written at the end, on Ctrl-C and on SIGTERM."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep; older ones are deleted."""
    log_every: int = 10
    """Steps between logged metrics, in metrics.csv and W&B."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all ranks, a multiple of data.micro_batch_size × devices × num_nodes, reached by
    gradient accumulation. null: one micro-batch per rank."""
    accelerator: str = "auto"
    """cpu, cuda, mps, or auto for the best available."""
    devices: int = 1
    """Devices per node, one rank each. 0: as many ranks as the launcher started per node, or all devices."""
    num_nodes: int = 1
    """Number of nodes."""
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    """single: one device; ddp: replicated parameters; fsdp2: parameters sharded over all ranks; auto: single on one
    device, fsdp2 on several."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    """Precision of weights and activations; optimizer states have that of the weights. 16-mixed uses loss scaling and
    is for GPUs without bf16."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes instead of keeping: nothing, all but matrix products and attention, or whole
    layers."""
    frozen_storage: Literal["float32", "bfloat16", "float8"] = "float32"
    """Storage of frozen linear and convolution weights. bfloat16 does not change results under bf16-mixed. float8
    applies to the denoiser; other networks then use bfloat16. The autoencoder and sharded networks stay float32."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    max_skipped_steps: int = 10
    """Steps that may be skipped in a run because loss or gradient is not finite; one more stops the run."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; allowed: 1 or more")
        for name, minimum in (("devices", 0), ("num_nodes", 1), ("max_skipped_steps", 0), ("global_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"trainer.{name} is {value}; allowed: {minimum} or more")
        if self.frozen_storage != "float32" and self.precision == "bf16-true":
            raise ValueError(
                f"trainer.frozen_storage is {self.frozen_storage}, but with trainer.precision=bf16-true all weights "
                "are bfloat16; allowed: float32"
            )
        if self.strategy == "single" and (self.devices > 1 or self.num_nodes > 1):
            raise ValueError(
                f"trainer.strategy is single, but trainer.devices is {self.devices} and trainer.num_nodes "
                f"{self.num_nodes}; allowed on several devices: auto, ddp, fsdp2"
            )

    def is_sharded(self, world_size: int) -> bool:
        """Whether FSDP2 shards the trainable networks over the ranks."""
        return self.strategy == "fsdp2" or (self.strategy == "auto" and world_size > 1)


@dataclass(frozen=True)
class BatchLayout:
    """Division of an optimizer step: global_batch = micro_batch_size × world_size × micro_batches.

    Attributes:
        micro_batch_size: rows that go through the networks together on one rank.
        world_size: ranks on all nodes, one per device.
        micro_batches: gradient accumulation, micro-batches per optimizer step on each rank.
    """

    micro_batch_size: int
    world_size: int
    micro_batches: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch_size * self.world_size * self.micro_batches

    def __str__(self) -> str:
        return (
            f"{self.global_batch} rows per step = {self.micro_batch_size} rows × {self.world_size} devices × "
            f"{self.micro_batches} micro-batches"
        )


def batch_layout(micro_batch_size: int, config: TrainerConfig) -> BatchLayout:
    """Divide the rows of an optimizer step.

    Raises:
        ValueError: `global_batch_size` is not a multiple of one micro-batch per rank (names values that are), or the
            launcher started a different number of ranks than configured.
    """
    world_size = count_devices(config) * config.num_nodes
    rows, global_batch = micro_batch_size * world_size, config.global_batch_size
    if global_batch is None or global_batch % rows == 0:
        return BatchLayout(micro_batch_size, world_size, 1 if global_batch is None else global_batch // rows)
    per_device, rest = divmod(global_batch, world_size)
    if rest:
        nearest = [value for value in (global_batch - rest, global_batch - rest + world_size) if value > 0]
        advice = f"it is not a multiple of {world_size} devices; the nearest that are: {nearest}"
    else:
        divisors = [size for size in range(1, per_device + 1) if per_device % size == 0]
        nearest = sorted(divisors, key=lambda size: abs(size - micro_batch_size))[:5]
        advice = f"with these devices data.micro_batch_size may be {', '.join(map(str, sorted(nearest)))}"
    raise ValueError(
        f"trainer.global_batch_size is {global_batch}, but data.micro_batch_size {micro_batch_size} × {world_size} "
        f"devices = {rows} rows do not divide it: {advice}."
    )


def count_devices(config: TrainerConfig) -> int:
    """Devices per node. With `trainer.devices=0`: the ranks per node that the launcher started, or all devices.

    Raises:
        ValueError: torchrun or SLURM started a different number of ranks than configured.
    """
    for launcher, (world, local) in {
        "torchrun": ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),
        "SLURM": ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE"),
    }.items():
        started, per_node = os.environ.get(world, ""), os.environ.get(local, "")
        if not (started.isdecimal() and per_node.isdecimal()):
            continue
        devices = config.devices or int(per_node)
        if int(started) > 1 and int(started) != devices * config.num_nodes:
            raise ValueError(
                f"{launcher} started {started} ranks, {per_node} a node, but trainer.devices is {devices} and "
                f"trainer.num_nodes is {config.num_nodes}, which makes {devices * config.num_nodes}; they must agree."
            )
        return devices
    return config.devices or (1 if config.accelerator == "cpu" else max(1, torch.accelerator.device_count()))


def build_trainer(config: TrainerConfig, world_size: int, **options: Any) -> lightning.Trainer:
    """Build Lightning's trainer; `options` are its callbacks, loggers and folder."""
    strategy = "fsdp2" if config.is_sharded(world_size) else config.strategy
    return lightning.Trainer(
        max_epochs=-1,
        max_steps=config.max_steps,
        accelerator=config.accelerator,
        devices=world_size // config.num_nodes,
        num_nodes=config.num_nodes,
        strategy=build_strategy(strategy, config.accelerator, world_size),
        precision=config.precision,
        # For Lightning the whole run is one epoch, with a batch for each optimizer step.
        val_check_interval=min(config.val_every, config.max_steps),
        limit_val_batches=1.0 if config.val_every <= config.max_steps else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        # The data loader divides the samples among the ranks itself.
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # callbacks/progress.py
        **options,
    )


def configure_logging() -> None:
    """Silence advertisements, loading bars and warnings about intended behaviour, in this process."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for message in (
        ".*isinstance.treespec, LeafSpec.*",  # from Lightning's own code
        "torch.distributed is disabled, unavailable or uninitialized",
        "FSDP2-wrapped module .* returned a view tensor",  # it is never modified in place
        r"Found \d+ module.* in eval mode",  # the frozen networks
    ):
        warnings.filterwarnings("ignore", message=message)
