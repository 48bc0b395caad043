"""What each stage's DataModule gives to its LightningModule.

`B` rows, `L` tokens, `Q` positions of the CLIP text model, `H×W` target pixels.
"""

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from datamodules.report import ReadReport
from kosmosg.prompt import PromptBatch

IGNORED = -100


class Movable:
    """A dataclass of tensors and prompts that moves as one."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        """The batch on another device."""
        return self._map("to", device, non_blocking=non_blocking)

    def pin_memory(self):
        """The batch in page-locked memory, from which copies to a GPU need not block."""
        return self._map("pin_memory")

    def __len__(self) -> int:
        return len(self.prompt)  # type: ignore[attr-defined]

    def _map(self, method: str, *arguments, **keywords):
        values = {item.name: getattr(self, item.name) for item in fields(self)}  # type: ignore[arg-type]
        return replace(
            self,  # type: ignore[type-var]
            **{
                name: getattr(value, method)(*arguments, **keywords)
                for name, value in values.items()
                if isinstance(value, Tensor | PromptBatch)
            },
        )


@dataclass
class LanguageModellingBatch(Movable):
    """Stage 1. `labels` B×L int64: `labels[:, t]` is the token after `ids[:, t]`, or -100 where it is not learned."""

    prompt: PromptBatch
    labels: Tensor
    report: ReadReport = field(default_factory=ReadReport)


@dataclass
class AlignmentBatch(Movable):
    """Stage 2. `clip_ids` B×Q int64: the same captions for the CLIP text model."""

    prompt: PromptBatch
    clip_ids: Tensor
    report: ReadReport = field(default_factory=ReadReport)


@dataclass
class InstructionBatch(Movable):
    """Stage 3. `targets` B×3×H×W float32 in [-1, 1], or the VAE's `moments` of them, B×8×h×w."""

    prompt: PromptBatch
    targets: Tensor | None
    moments: Tensor | None = None
    report: ReadReport = field(default_factory=ReadReport)
