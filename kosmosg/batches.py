"""What each stage's DataModule hands to its LightningModule: micro-batches, and a list of them for an optimizer step.

Shapes: `B` rows, `L` tokens, `Q` positions of the image decoder's text model, `H×W` target pixels.
"""

from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from kosmosg.condition import Condition
from kosmosg.prompt import PromptBatch

Batch = TypeVar("Batch", bound="MicroBatch")


@dataclass
class ReadReport:
    """What was read for one micro-batch; travels with it from the data worker to the training process.

    Attributes:
        samples: `shard/key` of each row, for messages and for comparing orders.
        sources: name of the source of each row.
        reads: samples opened, usable or not.
        errors: why the others were not usable.
    """

    samples: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    reads: int = 0
    errors: list[Any] = field(default_factory=list)

    def __add__(self, other: "ReadReport") -> "ReadReport":
        return ReadReport(
            self.samples + other.samples,
            self.sources + other.sources,
            self.reads + other.reads,
            self.errors + other.errors,
        )


@dataclass(kw_only=True)
class MicroBatch:
    """Rows that go through the networks together. A stage adds its tensors, one row each.

    Attributes:
        indices: place of each row in the run's global order. Noise, timesteps and condition dropout are drawn by it,
            so that they do not depend on how a step is divided.
        counted: how many rows count in a validation, the first ones; the others only keep the ranks in step.
    """

    prompt: PromptBatch
    indices: list[int] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)
    counted: int | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self: Batch, index: list[int]) -> Batch:
        """Some rows. What was read for the whole batch stays whole: `report`, and `counted`."""
        values: dict[str, Any] = {"prompt": self.prompt.rows(index)}
        if self.indices:
            values["indices"] = [self.indices[row] for row in index]
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), Tensor):
                values[item.name] = value[index]
            elif isinstance(value, Condition):
                values[item.name] = value.rows(index)
            elif is_tensors(value):
                values[item.name] = [value[row] for row in index]
        return replace(self, **values)

    def to(self: Batch, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self: Batch) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU need not block."""
        return self._map("pin_memory")

    def _map(self: Batch, method: str, *arguments: Any, **keywords: Any) -> Batch:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {
            name: getattr(value, method)(*arguments, **keywords)
            for name, value in values.items()
            if isinstance(value, Tensor | PromptBatch | Condition)
        }
        for name, value in values.items():
            if is_tensors(value):
                moved[name] = [getattr(tensor, method)(*arguments, **keywords) for tensor in value]
        return replace(self, **moved)


@dataclass(kw_only=True)
class LanguageModellingBatch(MicroBatch):
    """Stage 1. `labels` B×L int64: `labels[:, t]` is the token after `ids[:, t]`, or -100 where it is not learned."""

    labels: Tensor

    def rows(self, index: list[int]) -> "LanguageModellingBatch":
        """Some rows, cut to their own longest as the prompts are."""
        chosen = super().rows(index)
        return replace(chosen, labels=chosen.labels[:, : chosen.prompt.ids.shape[1]])


@dataclass(kw_only=True)
class AlignmentBatch(MicroBatch):
    """Stage 2.

    Attributes:
        text_ids: B×Q int64, the captions for the image decoder's text model; None where its states were cached.
        states: B×L×D, the MLLM's cached states, zero at padding. The prompts then have lengths, but no ids.
        target: t of eq. 5, cached.
    """

    text_ids: Tensor | None = None
    states: Tensor | None = None
    target: Condition | None = None

    def rows(self, index: list[int]) -> "AlignmentBatch":
        """Some rows, cut to their own longest as the prompts are."""
        chosen = super().rows(index)
        cut = None if chosen.states is None else chosen.states[:, : chosen.prompt.ids.shape[1]]
        return replace(chosen, states=cut)


@dataclass(kw_only=True)
class InstructionBatch(MicroBatch):
    """Stage 3.

    Attributes:
        targets: B×3×H×W float32 in [-1, 1], or their cached latents: the VAE's moments B×8×h×w. Where they are not of
            one size, a list of B.
        text_ids: captions of the targets for the image decoder's text model, B×Q int64, -1 in rows without one; None
            where no loss reads them.
    """

    targets: Tensor | list[Tensor]
    text_ids: Tensor | None = None


def is_tensors(value: Any) -> bool:
    """Whether it is a list of tensors, one row each."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)
