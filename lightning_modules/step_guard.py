"""Updates whose loss or gradient is not finite: skipped on all processes, counted, named, and bounded.

A NaN on one process reaches the gradients of all, and with them every weight for good. The weights stay those of the
update before, the schedule and the order of samples go on, and `skipped_steps.jsonl` in the run folder names samples.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor

logger = logging.getLogger(__name__)
SKIPPED_FILE = "skipped_steps.jsonl"
NAMED_SAMPLES = 16  # of each update in messages; the file names all


class TooManySkippedStepsError(RuntimeError):
    """More updates were skipped than trainer.max_skipped_steps allows."""


class StepGuard:
    """Watches the forward passes of an update.

    Attributes:
        skipped: updates skipped since the run began; checkpoints keep it.
        skipping: whether the update under way is skipped.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self.skipping = False
        self._samples: list[list[str]] = []
        self._finite: list[Tensor] = []

    def begin_update(self) -> None:
        """Forget the forward passes of the update before."""
        self.skipping = False
        self._samples, self._finite = [], []

    def begin_pass(self, batch: Any) -> None:
        """Remember which samples a forward pass reads."""
        report = getattr(batch, "report", None)
        self._samples.append(list(report.samples) if report is not None else [])

    def see(self, loss: Tensor) -> None:
        """Remember whether a pass's loss is finite, without waiting for the device."""
        self._finite.append(loss.detach().isfinite().all())

    def losses_are_finite(self) -> bool:
        """Whether all losses of this process's passes are."""
        return not self._finite or bool(torch.stack(self._finite).all())

    def skip(self, update: int, norm: float, run: Path, most: int) -> None:
        """Record update number `update` as skipped. All processes call it together.

        Args:
            norm: of the gradient.
            run: folder of skipped_steps.jsonl.
            most: how many updates of a run may be skipped.

        Raises:
            TooManySkippedStepsError: on all processes alike; names the samples of this update and of those before.
        """
        self.skipping = True
        self.skipped += 1
        record = {"update": update, "grad_norm": norm, "processes": gather(self._of_this_process())}
        if not distributed.is_initialized() or distributed.get_rank() == 0:
            with open(run / SKIPPED_FILE, "a") as file:
                file.write(json.dumps(without_nan(record)) + "\n")
            logger.warning(
                "skipped update %d: %s (%d skipped so far, trainer.max_skipped_steps is %d)",
                update,
                describe(record),
                self.skipped,
                most,
            )
        if self.skipped > most:
            raise TooManySkippedStepsError(
                f"{self.skipped} updates had a loss or gradient that is not finite; trainer.max_skipped_steps is "
                f"{most}. The last, update {update}: {describe(record)}. All are in '{run / SKIPPED_FILE}'; the "
                "weights are finite and the last checkpoint stands. Look at these samples, or lower optimizer.lr."
            )

    def _of_this_process(self) -> dict[str, Any]:
        """The samples of the passes whose loss is not finite; of all passes where only the gradient is not."""
        finite = [bool(flag) for flag in self._finite]
        bad = [samples for samples, good in zip(self._samples, finite, strict=False) if not good]
        passes = bad or self._samples
        return {"loss_is_finite": not bad, "samples": [sample for samples in passes for sample in samples]}


def describe(record: dict[str, Any]) -> str:
    """What was not finite where, and the samples to look at."""
    losses = {rank: found for rank, found in enumerate(record["processes"]) if not found["loss_is_finite"]}
    samples = [
        sample for found in (losses or dict(enumerate(record["processes"]))).values() for sample in found["samples"]
    ]
    more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
    what = (
        f"loss of process {', '.join(map(str, losses))}" if losses else f"gradient, whose norm is {record['grad_norm']}"
    )
    return f"{what}; samples {', '.join(samples[:NAMED_SAMPLES])}{more}"


def gather(value: Any) -> list[Any]:
    """`value` of every process, in order."""
    if not distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: the norm as text where it is none."""
    norm = record["grad_norm"]
    return {**record, "grad_norm": norm if math.isfinite(norm) else str(norm)}
