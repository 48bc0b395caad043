"""What an image decoder reads, and the form in which it wants it.

Shapes: `B` batch, `Q` condition tokens, `C` condition width, `P` width of the pooled vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConditionSpec:
    """The form of an image decoder's condition.

    Attributes:
        tokens: `Q`.
        width: `C`.
        masked: whether the decoder reads a mask of the states that count; a condition without one counts whole.
        pooled: `P`, or None for decoders without a pooled vector.
        unconditional: what classifier-free guidance steers away from: the condition of the unconditional prompt, or
            zeros.
    """

    tokens: int
    width: int
    masked: bool = False
    pooled: int | None = None
    unconditional: Literal["prompt", "zeros"] = "prompt"

    def null(self, unconditional: "Condition") -> "Condition":
        """The null condition, of the rows of the unconditional prompt's."""
        if self.unconditional == "prompt":
            return unconditional
        return unconditional._map(torch.zeros_like)


class Condition(NamedTuple):
    """states B×Q×C; mask bool B×Q, True where a state counts, or None where all do; pooled B×P or None."""

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def with_mask(self) -> "Condition":
        """With a mask, of all states where there is none."""
        if self.mask is not None:
            return self
        return self._replace(mask=torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device))

    def spread(self, tokens: int) -> "Condition":
        """`tokens` states without a mask: those that count in their order, each repeated as often as the others or once
        more; with fewer `tokens` than count, some are skipped evenly. As it is, where all count.

        Attention over them, which knows no positions, is what it was over those that count where their number divides
        `tokens`, and close to it elsewhere. A network that gives no mask can be taught these states.
        """
        if self.mask is None:
            return self
        counts = self.mask.sum(dim=1, keepdim=True)
        order = (~self.mask).long().argsort(dim=1, stable=True)  # those that count first
        places = order.gather(1, torch.arange(tokens, device=order.device) * counts // tokens)
        return self._replace(
            states=self.states.gather(1, places[..., None].expand(-1, -1, self.states.shape[2])), mask=None
        )

    def rows(self, index: slice | Sequence[int] | Tensor) -> "Condition":
        """Some rows."""
        return self._map(lambda tensor: tensor[index])

    def repeat_interleave(self, times: int) -> "Condition":
        """Each row `times` times, those of one row together."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, *arguments, **options) -> "Condition":
        """As `torch.Tensor.to`; a mask keeps its dtype."""
        states, mask, pooled = self
        return Condition(
            states.to(*arguments, **options),
            None if mask is None else mask.to(states.to(*arguments, **options).device),
            None if pooled is None else pooled.to(*arguments, **options),
        )

    def pin_memory(self) -> "Condition":
        """In page-locked memory."""
        return self._map(Tensor.pin_memory)

    def replace_where(self, chosen: Tensor, other: "Condition") -> "Condition":
        """Rows where `chosen` (bool, B) is True give way to `other`, of one row or B."""

        def merged(ours: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            if ours is None or theirs is None:
                return ours
            return torch.where(chosen.view(-1, *[1] * (ours.ndim - 1)), theirs, ours)

        return Condition(*(merged(ours, theirs) for ours, theirs in zip(self, other, strict=True)))  # type: ignore[arg-type]

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """The rows of all, in order."""
        columns: list[Any] = [
            None if column[0] is None else torch.cat(column) for column in zip(*conditions, strict=True)
        ]  # type: ignore[arg-type]
        return Condition(*columns)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        states, mask, pooled = self
        return Condition(
            function(states), None if mask is None else function(mask), None if pooled is None else function(pooled)
        )
