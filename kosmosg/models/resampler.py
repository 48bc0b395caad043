"""The resampler: attentive pooling of image tokens into a fixed number of embeddings.

Notable: one linear map and one cross-attention, with no norm, residual, feed-forward or stacking; the latents are
keys too (released-code.md, "Resampler"; the paper calls it attentive pooling, section 2.1).
"""

import math

import torch
from torch import Tensor, nn

from kosmosg.models.transformer import Attention


class Resampler(nn.Module):
    """`latents` learned queries read the image tokens.

    Args:
        input_width: of the image tokens.
        width: `D`, of the MLLM.
        dropout: of the attention weights, in training.
    """

    def __init__(self, input_width: int, width: int, heads: int, latents: int, dropout: float):
        super().__init__()
        self.projection = nn.Linear(input_width, width)
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.attention = Attention(width, heads, sub_norm=False, dropout=dropout)
        for linear in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj):
            nn.init.xavier_uniform_(linear.weight, gain=1 / math.sqrt(2))
        nn.init.xavier_uniform_(self.attention.out_proj.weight)
        nn.init.zeros_(self.attention.out_proj.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Image tokens I×S×input_width → I×latents×D."""
        tokens = self.projection(tokens)
        latents = self.latents.type_as(tokens).expand(tokens.shape[0], -1, -1)
        return self.attention(latents, torch.cat([tokens, latents], dim=1))
