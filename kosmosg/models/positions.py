"""Position encodings: sinusoids added to the embeddings, and xPos, which the released model does not use.

Shapes: `B` batch, `L` tokens, `D` width, `H` heads, `d` width of one head.
"""

import math

import torch
from torch import Tensor

PERIOD = 10_000.0
XPOS_SCALE_BASE = 512
XPOS_DECAY = 0.4
XPOS_TRAINED_LENGTH = 2048


def sinusoidal_positions(
    padding: Tensor, width: int, pad_id: int, dtype: torch.dtype, documents: Tensor | None = None
) -> Tensor:
    """Return sinusoids B×L×D, sines then cosines, zero at padding (released-code.md, "Positions").

    Only real tokens are counted. The first one has index `pad_id + 1`, because the released code indexes its table like
    a vocabulary whose padding row is zero.

    Args:
        padding: bool B×L, True at padding.
        documents: index of each token's document, B×L, non-decreasing along a row; positions restart with each.
    """
    half = width // 2
    first = pad_id + 1
    indices = torch.arange(first, first + padding.shape[1], device=padding.device, dtype=torch.float32)
    frequencies = torch.exp(
        torch.arange(half, device=padding.device, dtype=torch.float32) * -(math.log(PERIOD) / (half - 1))
    )
    angles = indices[:, None] * frequencies[None, :]
    table = torch.cat([angles.sin(), angles.cos()], dim=1).to(dtype)
    rank = (~padding).cumsum(dim=1) - 1
    if documents is not None:
        starts = torch.ones_like(padding)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        rank = rank - rank.masked_fill(~starts, 0).cummax(dim=1).values
    return table[rank.clamp(min=0)] * ~padding[..., None]


class XPos:
    """xPos for sequences of L = `length`: rotate adjacent pairs of channels, and let attention decay with distance.

    The angle at position p is p · 10000^(-2i/d). Queries are multiplied and keys divided by ((2i + 0.4 d) / 1.4 d)^(n /
    512), where n counts from -ceil(L/2). Beyond 2048 tokens queries are also scaled by ln p / ln 2048. The released
    training sets the flag but never applies it (released-code.md, "Positions").
    """

    def __init__(self, length: int, head_width: int, device: torch.device):
        pairs = torch.arange(0, head_width, 2, device=device, dtype=torch.float32)
        positions = torch.arange(length, device=device, dtype=torch.float32)
        angles = positions[:, None] * PERIOD ** (-pairs / head_width)
        steps = positions - math.ceil(length / 2)
        decay = ((pairs + XPOS_DECAY * head_width) / ((1 + XPOS_DECAY) * head_width)) ** (
            steps[:, None] / XPOS_SCALE_BASE
        )
        growth = torch.ones_like(positions)
        if length > XPOS_TRAINED_LENGTH:
            growth = (positions.log() / math.log(XPOS_TRAINED_LENGTH)).clamp(min=1.0)
        self.sine, self.cosine = angles.sin(), angles.cos()
        self.query_factor, self.key_factor = decay * growth[:, None], 1 / decay

    def __call__(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate and scale queries and keys B×H×L×d."""
        return self._rotate(queries, self.query_factor), self._rotate(keys, self.key_factor)

    def _rotate(self, states: Tensor, factor: Tensor) -> Tensor:
        even, odd = states[..., 0::2].float(), states[..., 1::2].float()
        rotated = torch.stack([even * self.cosine - odd * self.sine, odd * self.cosine + even * self.sine], dim=-1)
        return (rotated * factor[..., None]).flatten(-2).type_as(states)
