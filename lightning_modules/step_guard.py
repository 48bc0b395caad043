"""Skip optimizer steps whose loss or gradient is not finite, on all ranks, up to `trainer.max_skipped_steps` per run.

A NaN on one rank would reach the gradients of all ranks and destroy the weights. A skipped step leaves weights and
optimizer states unchanged, while learning rate schedule and data go on. Its samples are listed in the run folder's
`skipped_steps.jsonl`.
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
NAMED_SAMPLES = 16  # samples named in a message; the file has all


class TooManySkippedStepsError(RuntimeError):
    """More steps were skipped than `trainer.max_skipped_steps` allows."""


class StepGuard:
    """Collects whether the losses of a step's micro-batches are finite, and records skipped steps.

    Attributes:
        limit: maximal number of skipped steps in a run.
        skipped: number of steps skipped since the run began; saved in checkpoints.
        skipping: whether the current step is skipped.
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit, self.skipped, self.skipping = limit, 0, False
        self._samples: list[list[str]] = []
        self._finite: list[Tensor] = []

    def begin_step(self, step: Sequence[MicroBatch]) -> None:
        """Reset the state for a new step."""
        self.skipping, self._finite = False, []
        self._samples = [batch.report.samples for batch in step]

    def observe(self, loss: Tensor) -> None:
        """Record whether a micro-batch's loss is finite, without waiting for the device."""
        self._finite.append(loss.detach().isfinite().all())

    def losses_are_finite(self) -> bool:
        """Whether all losses of this rank and step are finite."""
        return bool(torch.stack(self._finite).all())

    def skip(self, step: int, norm: float, run: Path) -> None:
        """Record optimizer step `step` with gradient norm `norm` as skipped. All ranks must call it together.

        Raises:
            TooManySkippedStepsError: on all ranks; names the samples.
        """
        self.skipping, self.skipped = True, self.skipped + 1
        bad = [samples for samples, finite in zip(self._samples, self._finite, strict=True) if not finite]
        record = {"loss_is_finite": not bad, "samples": [name for samples in bad or self._samples for name in samples]}
        ranks = gather(record)
        bad_ranks = [rank for rank, record in enumerate(ranks) if not record["loss_is_finite"]]
        records = [ranks[rank] for rank in bad_ranks] or ranks
        samples = [name for record in records for name in record["samples"]]
        cause = f"loss of rank {', '.join(map(str, bad_ranks))}" if bad_ranks else f"gradient norm {norm}"
        more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
        description = f"step {step}: {cause} is not finite; samples {', '.join(samples[:NAMED_SAMPLES])}{more}"
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            try:
                with open(run / SKIPPED_FILE, "a", encoding="utf-8") as file:  # JSON has no NaN
                    file.write(json.dumps({"step": step, "grad_norm": str(norm), "ranks": ranks}) + "\n")
            except OSError as error:  # for example a full disk
                logger.error("'%s' could not be written: %s; training continues.", run / SKIPPED_FILE, error)
            logger.warning("Skipped %s (%d skipped so far, at most %d)", description, self.skipped, self.limit)
        if self.skipped > self.limit:
            raise TooManySkippedStepsError(
                f"{self.skipped} steps had a loss or gradient that is not finite; trainer.max_skipped_steps is "
                f"{self.limit}. The last was {description}. '{run / SKIPPED_FILE}' lists all of them. The weights are "
                "finite and the last checkpoint is usable: inspect these samples, or lower optimizer.lr."
            )


def gather(value: Any) -> list[Any]:
    """Gather `value` from all ranks, in order of rank."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
