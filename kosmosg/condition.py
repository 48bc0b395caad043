"""The condition that an image decoder reads, and its format.

Shapes: `B` batch, `Q` condition tokens, `C` condition width, `P` width of the pooled vector.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ConditionSpec:
    """The format of an image decoder's condition.

    Attributes:
        tokens: `Q`.
        width: `C`.
        masked: whether the decoder reads an attention mask; without a mask it attends to all states.
        pooled: `P`, or None for decoders without a pooled vector.
        unconditional: the null condition, which classifier-free guidance steers away from: the condition of the
            unconditional prompt, or zeros.
    """

    tokens: int
    width: int
    masked: bool = False
    pooled: int | None = None
    unconditional: Literal["prompt", "zeros"] = "prompt"

    def null(self, unconditional: "Condition") -> "Condition":
        """Return the null condition, given the condition of the unconditional prompt."""
        if self.unconditional == "prompt":
            return unconditional
        return unconditional._map(torch.zeros_like)


class Condition(NamedTuple):
    """What AlignerNet gives the image decoder: states B×Q×C; mask bool B×Q, True where the decoder attends, None for
    everywhere; pooled vector B×P or None."""

    states: Tensor
    mask: Tensor | None = None
    pooled: Tensor | None = None

    def with_mask(self) -> "Condition":
        """Add a mask that allows all states, if there is none."""
        if self.mask is not None:
            return self
        return self._replace(mask=torch.ones(self.states.shape[:2], dtype=torch.bool, device=self.states.device))

    def spread(self, tokens: int) -> "Condition":
        """Repeat the unmasked states evenly, in order, to get exactly `tokens` states without a mask.

        Cross-attention has no positions, so its output is unchanged if the number of unmasked states divides `tokens`,
        and close to it otherwise. This gives AlignerNet, which predicts no mask, a target of fixed length. With more
        unmasked states than `tokens`, some are skipped evenly.
        """
        if self.mask is None:
            return self
        counts = self.mask.sum(dim=1, keepdim=True)
        order = (~self.mask).long().argsort(dim=1, stable=True)  # unmasked states first
        index = order.gather(1, torch.arange(tokens, device=order.device) * counts // tokens)
        return self._replace(
            states=self.states.gather(1, index[..., None].expand(-1, -1, self.states.shape[2])), mask=None
        )

    def rows(self, index: slice | Sequence[int] | Tensor) -> "Condition":
        """Select rows."""
        return self._map(lambda tensor: tensor[index])

    def repeat_interleave(self, times: int) -> "Condition":
        """Repeat each row `times` times; copies of a row are adjacent."""
        return self._map(lambda tensor: tensor.repeat_interleave(times, dim=0))

    def to(self, *arguments, **options) -> "Condition":
        """Move or cast as `torch.Tensor.to`; the mask keeps its dtype."""
        states, mask, pooled = self
        return Condition(
            states.to(*arguments, **options),
            None if mask is None else mask.to(states.to(*arguments, **options).device),
            None if pooled is None else pooled.to(*arguments, **options),
        )

    def pin_memory(self) -> "Condition":
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def replace_where(self, chosen: Tensor, other: "Condition") -> "Condition":
        """Replace the rows where `chosen` (B, bool) is True by those of `other`, which has one row or B."""

        def merge(own: Tensor | None, new: Tensor | None) -> Tensor | None:
            if own is None or new is None:
                return own
            return torch.where(chosen.view(-1, *[1] * (own.ndim - 1)), new, own)

        return Condition(*(merge(own, new) for own, new in zip(self, other, strict=True)))  # type: ignore[arg-type]

    @staticmethod
    def cat(conditions: Sequence["Condition"]) -> "Condition":
        """Concatenate the rows of several conditions."""
        columns: list[Any] = [
            None if column[0] is None else torch.cat(column) for column in zip(*conditions, strict=True)
        ]  # type: ignore[arg-type]
        return Condition(*columns)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Condition":
        states, mask, pooled = self
        return Condition(
            function(states), None if mask is None else function(mask), None if pooled is None else function(pooled)
        )
