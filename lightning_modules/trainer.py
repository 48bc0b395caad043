"""Schema of a run's length, devices and intervals; how a step's rows are divided; the Lightning trainer."""

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
    """Optimizer steps; the learning rate reaches 0 there."""
    val_every: int = 100
    """Steps between validations, each over data.validation_samples rows of the held-out shards, if there are any."""
    checkpoint_every: int = 100
    """Steps between checkpoints; one is also written at the end and on Ctrl-C or SIGTERM."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints that are kept."""
    log_every: int = 10
    """Steps between rows of metrics.csv and W&B."""
    global_batch_size: int | None = None
    """Rows of one optimizer step over all devices, a multiple of data.micro_batch_size × devices × num_nodes; gradients
    of the micro-batches are accumulated. null: one micro-batch on each device."""
    accelerator: str = "auto"
    """cpu, cuda, mps, or auto for the best there is."""
    devices: int = 1
    """Ranks on each node, one a device; 0 for as many as the launcher started there, or as there are."""
    num_nodes: int = 1
    """Nodes."""
    strategy: Literal["auto", "single", "ddp", "fsdp2"] = "auto"
    """single: one device; ddp: whole copies; fsdp2: parameters sharded over all ranks; auto: single on one device,
    fsdp2 beyond."""
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    """Of weights and activations; optimizer states follow the weights. 16-mixed, with loss scaling, is for cards
    without bf16."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping: nothing, all but matrix products and attention, or
    whole layers."""
    frozen_storage: Literal["float32", "bfloat16", "float8"] = "float32"
    """How frozen weights of linear maps and convolutions are kept: bfloat16 changes nothing under bf16-mixed; float8
    is the denoiser's alone, the others' are then bfloat16. The autoencoder's, and those that fsdp2 shards, stay
    float32."""
    compile: bool = False
    """Compile each layer with torch.compile."""
    max_skipped_steps: int = 10
    """Steps of a run that may be skipped because loss or gradient is not finite; one more stops it."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "val_every", "checkpoint_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is {getattr(self, name)}; allowed: 1 or more")
        for name, least in (("devices", 0), ("num_nodes", 1), ("max_skipped_steps", 0), ("global_batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"trainer.{name} is {value}; allowed: {least} or more")
        if self.frozen_storage != "float32" and self.precision == "bf16-true":
            raise ValueError(
                f"trainer.frozen_storage is {self.frozen_storage}, but with trainer.precision=bf16-true all weights "
                "are bfloat16; allowed: float32"
            )
        if self.strategy == "single" and (self.devices > 1 or self.num_nodes > 1):
            raise ValueError(
                f"trainer.strategy is single, but trainer.devices is {self.devices} and trainer.num_nodes "
                f"{self.num_nodes}; allowed beyond one device: auto, ddp, fsdp2"
            )

    def is_sharded(self, world_size: int) -> bool:
        """Whether FSDP2 divides the networks that train among the ranks."""
        return self.strategy == "fsdp2" or (self.strategy == "auto" and world_size > 1)


@dataclass(frozen=True)
class BatchLayout:
    """global_batch = micro_batch_size × world_size × micro_batches.

    Attributes:
        micro_batch_size: rows that go through the networks together on one device.
        world_size: ranks over all nodes, one a device.
        micro_batches: of one optimizer step on each rank.
    """

    micro_batch_size: int
    world_size: int
    micro_batches: int

    @property
    def global_batch(self) -> int:
        return self.micro_batch_size * self.world_size * self.micro_batches

    def __str__(self) -> str:
        return (
            f"{self.global_batch} rows a step = {self.micro_batch_size} a device × {self.world_size} devices × "
            f"{self.micro_batches} micro-batches"
        )


def batch_layout(micro_batch_size: int, config: TrainerConfig) -> BatchLayout:
    """How the rows of a step are divided.

    Raises:
        ValueError: the global batch is not a multiple of a micro-batch on each device, and what would do; or a
            launcher started another number of ranks than the configuration says.
    """
    world_size = count_devices(config) * config.num_nodes
    rows, wanted = micro_batch_size * world_size, config.global_batch_size
    if wanted is None or wanted % rows == 0:
        return BatchLayout(micro_batch_size, world_size, 1 if wanted is None else wanted // rows)
    share, rest = divmod(wanted, world_size)
    if rest:
        near = [value for value in (wanted - rest, wanted - rest + world_size) if value > 0]
        advice = f"no data.micro_batch_size divides it among {world_size} devices; the nearest that can be: {near}"
    else:
        fitting = sorted(
            (size for size in range(1, share + 1) if share % size == 0), key=lambda s: abs(s - micro_batch_size)
        )
        advice = f"with these devices data.micro_batch_size may be {', '.join(map(str, sorted(fitting[:5])))}"
    raise ValueError(
        f"trainer.global_batch_size is {wanted}, but data.micro_batch_size {micro_batch_size} × {world_size} devices = "
        f"{rows} rows do not divide it: {advice}."
    )


def count_devices(config: TrainerConfig) -> int:
    """`trainer.devices`, where 0 stands for all: as many as the launcher started on a node, or as the machine has."""
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
                f"trainer.num_nodes {config.num_nodes}, which make {devices * config.num_nodes}; give the same to both."
            )
        return devices
    return config.devices or (1 if config.accelerator == "cpu" else max(1, torch.accelerator.device_count()))


def build_trainer(config: TrainerConfig, world_size: int, **options: Any) -> lightning.Trainer:
    """The trainer; `options` are its callbacks, loggers and folder."""
    strategy = "fsdp2" if config.is_sharded(world_size) else config.strategy
    return lightning.Trainer(
        max_epochs=-1,
        max_steps=config.max_steps,
        accelerator=config.accelerator,
        devices=world_size // config.num_nodes,
        num_nodes=config.num_nodes,
        strategy=build_strategy(strategy, config.accelerator, world_size),
        precision=config.precision,
        # The whole run is one epoch of Lightning's, whose batches are the optimizer steps.
        val_check_interval=min(config.val_every, config.max_steps),
        limit_val_batches=1.0 if config.val_every <= config.max_steps else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.log_every,
        # The order of samples is a pure function of their index; a sampler put in by Lightning would break it.
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_progress_bar=False,  # callbacks/progress.py
        **options,
    )


def configure_logging() -> None:
    """No advertisements, loading bars and warnings about our own intentions between our own lines."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    for message in (
        ".*isinstance.treespec, LeafSpec.*",  # Lightning's own
        "torch.distributed is disabled, unavailable or uninitialized",
        "FSDP2-wrapped module .* returned a view tensor",  # never changed in place
        r"Found \d+ module.* in eval mode",  # those that are frozen
    ):
        warnings.filterwarnings("ignore", message=message)
