"""Micro-batches of the three training stages, passed from a DataModule to a LightningModule.

Shapes: `B` rows, `L` tokens, `T` caption tokens of the image decoder's text model, `H×W` pixels, `c×h×w` latents.
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
    """Statistics of reading one micro-batch, sent with it from the data worker to the training process.

    Attributes:
        samples: `shard/key` of each row, for messages and for comparing orders.
        sources: name of the source of each row.
        reads: number of samples read, including unusable ones.
        errors: the errors of unusable samples.
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
    """Rows that are processed together. Subclasses add the tensors of their stage, with B rows each.

    Attributes:
        indices: position of each row in the global order of the run. It seeds noise, timesteps and condition dropout,
            so that they do not depend on the division of a step into micro-batches.
        counted: number of rows that count in validation, from the first. The others keep the ranks in step.
    """

    prompt: PromptBatch
    indices: list[int] = field(default_factory=list)
    report: ReadReport = field(default_factory=ReadReport)
    counted: int | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    def rows(self: Batch, index: list[int]) -> Batch:
        """Select rows; `report` and `counted` remain those of the whole batch."""
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
        """Move the batch to a device."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self: Batch) -> Batch:
        """Copy the batch to page-locked memory, for asynchronous copies to a GPU."""
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
    """Stage 1. `labels` B×L int64: `labels[:, l]` is the token after `ids[:, l]`, or -100 without a loss."""

    labels: Tensor

    def rows(self, index: list[int]) -> "LanguageModellingBatch":
        """Select rows, cut to the length of the prompts."""
        chosen = super().rows(index)
        return replace(chosen, labels=chosen.labels[:, : chosen.prompt.ids.shape[1]])


@dataclass(kw_only=True)
class AlignmentBatch(MicroBatch):
    """Stage 2.

    Attributes:
        text_ids: B×T int64, captions for the image decoder's text model; None if its conditions are cached.
        states: B×L×D, cached hidden states of the MLLM, zero at padding. The prompts then have lengths, but no ids.
        target: t of eq. 5, if cached.
    """

    text_ids: Tensor | None = None
    states: Tensor | None = None
    target: Condition | None = None

    def rows(self, index: list[int]) -> "AlignmentBatch":
        """Select rows, cut to the length of the prompts."""
        chosen = super().rows(index)
        cut = None if chosen.states is None else chosen.states[:, : chosen.prompt.ids.shape[1]]
        return replace(chosen, states=cut)


@dataclass(kw_only=True)
class InstructionBatch(MicroBatch):
    """Stage 3.

    Attributes:
        targets: B×3×H×W float32 in [-1, 1], or cached moments of the VAE, such as B×2c×h×w. A list of B tensors if
            sizes differ.
        text_ids: B×T int64, captions of the targets for the image decoder's text model, -1 in rows without a caption;
            None if no loss uses them.
    """

    targets: Tensor | list[Tensor]
    text_ids: Tensor | None = None


def is_tensors(value: Any) -> bool:
    """Return whether the value is a list of tensors, one per row."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)
