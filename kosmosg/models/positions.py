"""Where a token stands: sinusoids added to the embeddings, and xPos, a switch the released model leaves off.

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
    """Sinusoids B×L×D: first half sines, second half cosines; zero at padding (released-code.md, "Positions").

    Positions are counted over the real tokens. The first one has index `pad_id + 1`, because the table of the
    released code is indexed like a vocabulary whose padding row is zero.

    Args:
        padding: bool B×L, True at padding.
        documents: number of each token's document, B×L, rising along a row; positions begin anew with each.
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
        begins = torch.ones_like(padding)
        begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
        rank = rank - rank.masked_fill(~begins, 0).cummax(dim=1).values
    return table[rank.clamp(min=0)] * ~padding[..., None]


class XPos:
    """xPos for sequences of `length`: rotates adjacent pairs of queries and keys, and lets far pairs decay.

    Rotation p · 10000^(-2i/d); decay ((2i + 0.4 d) / 1.4 d)^(n / 512), n counted from -ceil(L/2); queries times
    decay, keys divided by it. Beyond 2048 tokens queries also grow by ln p / ln 2048. The released training asks
    for it by flag but never applies it (released-code.md, "Positions").
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
        """Queries and keys B×H×L×d, rotated and scaled."""
        return self._rotate(queries, self.query_factor), self._rotate(keys, self.key_factor)

    def _rotate(self, states: Tensor, factor: Tensor) -> Tensor:
        even, odd = states[..., 0::2].float(), states[..., 1::2].float()
        rotated = torch.stack([even * self.cosine - odd * self.sine, odd * self.cosine + even * self.sine], dim=-1)
        return (rotated * factor[..., None]).flatten(-2).type_as(states)
