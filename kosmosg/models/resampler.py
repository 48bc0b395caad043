"""The resampler: attentive pooling of an image's patch tokens into K embeddings (paper section 2.1).

Notable: one linear map and one cross-attention, without norm, residual, feed-forward or further layers; the latents are
also keys (released-code.md, "Resampler").

Shapes: `I` images, `T` tokens of the vision encoder per image, `K` latents, `D` MLLM width.
"""

import math

import torch
from torch import Tensor, nn

from kosmosg.models.transformer import Attention


class Resampler(nn.Module):
    """Pool the tokens of an image by K learned latents that attend to them.

    Args:
        input_width: width of the vision encoder's tokens.
        width: `D`.
        latents: `K`.
        dropout: dropout of the attention weights.
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
        """Tokens I×T×input_width → I×K×D."""
        tokens = self.projection(tokens)
        latents = self.latents.type_as(tokens).expand(tokens.shape[0], -1, -1)
        return self.attention(latents, torch.cat([tokens, latents], dim=1))
