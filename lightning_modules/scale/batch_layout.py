"""The global batch: what an update reads, however many devices there are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Where launchers say how many processes they started.
WORLD_SIZES = {"torchrun": ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "SLURM": ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE")}


@dataclass(frozen=True)
class BatchLayout:
    """global_batch = batch_size × processes × accumulate.

    Attributes:
        batch_size: rows of a forward pass on one device.
        processes: one a device, over all machines.
        accumulate: forward passes of an update.
    """

    batch_size: int
    processes: int
    accumulate: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.processes * self.accumulate

    def __str__(self) -> str:
        return (
            f"{self.global_batch} rows an update = {self.batch_size} a device × {self.processes} devices × "
            f"{self.accumulate} passes"
        )


def batch_layout(batch_size: int, global_batch_size: int | None, devices: int, num_nodes: int) -> BatchLayout:
    """The layout of `data.batch_size` and `trainer.{global_batch_size, devices, num_nodes}`; null: one pass.

    Raises:
        ValueError: the global batch is no multiple of a pass; names the factors and what would do.
    """
    processes = devices * num_nodes
    rows = batch_size * processes
    if global_batch_size is None:
        return BatchLayout(batch_size, processes, 1)
    if global_batch_size % rows == 0:
        return BatchLayout(batch_size, processes, global_batch_size // rows)
    share, rest = divmod(global_batch_size, processes)
    if rest:
        lower = global_batch_size - rest
        options = [value for value in (lower, lower + processes) if value > 0]
        advice = f"no data.batch_size divides it among {processes} devices; the nearest that can be divided: {options}"
    else:
        fitting = [size for size in range(1, share + 1) if share % size == 0]
        below = [size for size in fitting if size <= batch_size][-3:]
        above = [size for size in fitting if size > batch_size][:2]
        advice = f"with these devices data.batch_size may be {', '.join(map(str, below + above))}"
    raise ValueError(
        f"trainer.global_batch_size is {global_batch_size}, but one pass is data.batch_size {batch_size} × "
        f"trainer.devices {devices} × trainer.num_nodes {num_nodes} = {rows} rows, which does not divide it: {advice}."
    )


def count_devices(devices: int, num_nodes: int, accelerator: str, environment: Mapping[str, str] = os.environ) -> int:
    """`trainer.devices`, where 0 stands for all: as many as the launcher started on a node, or as the machine has.

    Raises:
        ValueError: a launcher started another number of processes than the configuration says.
    """
    for launcher, (world, local) in WORLD_SIZES.items():
        if not environment.get(local, "").isdecimal() or not environment.get(world, "").isdecimal():
            continue
        started, per_node = int(environment[world]), int(environment[local])
        devices = devices or per_node
        if started > 1 and started != devices * num_nodes:
            raise ValueError(
                f"{launcher} started {started} processes, {per_node} a node, but trainer.devices is {devices} and "
                f"trainer.num_nodes {num_nodes}, which make {devices * num_nodes}; give the same to both."
            )
        return devices
    if devices:
        return devices
    return 1 if accelerator == "cpu" else max(1, torch.accelerator.device_count())
