"""Training compute: runs of unlike models are made equally dear by their FLOPs, which no machine changes.

An update's FLOPs are those of its forward and backward passes through all networks, frozen ones included, counted by
torch: matrix products, convolutions and attention. They are counted once, on held-out batches of the training size.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from lightning import LightningDataModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.base import StageModule
from lightning_modules.runs.run_folder import RunFolder
from lightning_modules.scale.batch_layout import BatchLayout

COUNTED_BATCHES = 8  # prompts differ in length, and so do batches in their FLOPs


def affordable_updates(
    max_flops: float, layout: BatchLayout, run: RunFolder, module: StageModule, data: LightningDataModule
) -> int:
    """The length of a run that `trainer.max_flops` sets. Raises ValueError: not one update, or nothing to count on."""

    def count() -> int:
        data.setup()
        return flops_of_update(module, data.val_dataloader(), layout)

    return run.updates(max_flops, count)


def flops_of_update(module: StageModule, batches: Iterable[Any], layout: BatchLayout) -> int:
    """Mean FLOPs of an update over all processes and accumulated passes, from the first of `batches`.

    Raises:
        ValueError: there are no batches.
    """
    counts = [flops_of_batch(module.train(), batch) for batch in itertools.islice(batches, COUNTED_BATCHES)]
    if not counts:
        raise ValueError("trainer.max_flops needs held-out data to count on: set validation= of a source in data")
    return round(sum(counts) / len(counts)) * layout.accumulate * layout.processes


def flops_of_batch(module: StageModule, batch: Any) -> int:
    """FLOPs of one forward and backward pass. Gradients and random state are left as they were found: none."""
    # Fused attention of the CPU is counted as nothing; as matrix products it is counted everywhere alike.
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.batch_loss(batch).backward()
    module.zero_grad(set_to_none=True)
    return counter.get_total_flops()
