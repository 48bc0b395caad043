"""Optimizer steps whose loss or gradient is not finite: skipped on all ranks, counted, named, and bounded.

A NaN on one rank reaches the gradients of all, and with them every weight for good. A skipped step leaves the weights
as they are; schedule and order of samples go on, and `skipped_steps.jsonl` in the run folder names the samples.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

from kosmosg.batches import MicroBatch

logger = logging.getLogger(__name__)
SKIPPED_FILE = "skipped_steps.jsonl"
NAMED_SAMPLES = 16  # of each step in messages; the file names all


class TooManySkippedStepsError(RuntimeError):
    """More steps were skipped than trainer.max_skipped_steps allows."""


class StepGuard:
    """Watches the micro-batches of a step.

    Attributes:
        limit: how many steps of a run may be skipped.
        skipped: steps skipped since the run began; checkpoints keep it.
        skipping: whether the last step was skipped.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit, self.skipped, self.skipping = limit, 0, False
        self._samples: list[list[str]] = []
        self._finite: list[Tensor] = []

    def begin_step(self, step: Sequence[MicroBatch]) -> None:
        """Forget the step before."""
        self.skipping, self._finite = False, []
        self._samples = [batch.report.samples for batch in step]

    def observe(self, loss: Tensor) -> None:
        """Remember whether a micro-batch's loss is finite, without waiting for the device."""
        self._finite.append(loss.detach().isfinite().all())

    def losses_are_finite(self) -> bool:
        """Whether all losses of this rank are."""
        return bool(torch.stack(self._finite).all())

    def skip(self, step: int, norm: float, run: Path) -> None:
        """Record optimizer step `step`, of gradient norm `norm`, as skipped. All ranks call it together.

        Raises:
            TooManySkippedStepsError: on all ranks alike; names the samples.
        """
        self.skipping, self.skipped = True, self.skipped + 1
        bad = [samples for samples, finite in zip(self._samples, self._finite, strict=True) if not finite]
        mine = {"loss_is_finite": not bad, "samples": [name for samples in bad or self._samples for name in samples]}
        ranks = gather(mine)
        with_bad_loss = [rank for rank, found in enumerate(ranks) if not found["loss_is_finite"]]
        chosen = [ranks[rank] for rank in with_bad_loss] or ranks
        samples = [name for found in chosen for name in found["samples"]]
        what = f"loss of rank {', '.join(map(str, with_bad_loss))}" if with_bad_loss else f"gradient norm {norm}"
        more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
        found = f"{what} in step {step}; samples {', '.join(samples[:NAMED_SAMPLES])}{more}"
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            try:
                with open(run / SKIPPED_FILE, "a", encoding="utf-8") as file:  # JSON has no NaN
                    file.write(json.dumps({"step": step, "grad_norm": str(norm), "ranks": ranks}) + "\n")
            except OSError as error:  # a full disk, say
                logger.error("'%s' could not be written: %s; training goes on.", run / SKIPPED_FILE, error)
            logger.warning("skipped: %s (%d skipped so far, at most %d)", found, self.skipped, self.limit)
        if self.skipped > self.limit:
            raise TooManySkippedStepsError(
                f"{self.skipped} steps had a loss or gradient that is not finite; trainer.max_skipped_steps is "
                f"{self.limit}. The last: {found}. All are in '{run / SKIPPED_FILE}'. The weights are finite and the "
                "last checkpoint is usable: look at these samples, or lower optimizer.lr."
            )


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in order."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
