"""The MAGNETO causal decoder over embeddings (paper section 2.1; released-code.md, "LM layers").

Notable: no padding mask anywhere. Padding stands on the right, so causality keeps it from every real token.
Documents packed into one row read each other unless they are told apart.
"""

import math

from torch import Tensor, nn

from kosmosg.models.positions import XPos, sinusoidal_positions
from kosmosg.models.transformer import (
    LAYER_NORM_EPS,
    magneto_scale,
    self_attention_gain,
    transformer_layers,
)


class CausalDecoder(nn.Module):
    """Token embeddings, sinusoidal positions, causal layers, final LayerNorm.

    Args:
        dropout: on the embeddings, after each attention and after each feed-forward.
        xpos: rotate queries and keys; False is what the released model computes.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        ffn_width: int,
        dropout: float,
        xpos: bool,
        pad_id: int,
    ):
        super().__init__()
        self.pad_id, self.xpos, self.head_width = pad_id, xpos, width // heads
        self.embed_tokens = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        self.embed_scale = math.sqrt(width)
        self.dropout = nn.Dropout(dropout)
        self.layers = transformer_layers(layers, width, heads, ffn_width, dropout=dropout)
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        nn.init.normal_(self.embed_tokens.weight, std=width**-0.5)
        nn.init.zeros_(self.embed_tokens.weight[pad_id])
        magneto_scale(self.layers, self_attention_gain(layers))

    def embed(
        self,
        ids: Tensor,
        padding: Tensor,
        image_mask: Tensor,
        image_features: Tensor | None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Input of the first layer, B×L×D: image features take their slots, then all is scaled and positioned.

        Args:
            image_features: I×K×D in reading order, or None when no slot is masked.
            documents: see `forward`; positions then begin anew with every document.
        """
        x = self.embed_tokens(ids)
        if image_features is not None:
            x = x.masked_scatter(image_mask[..., None], image_features.to(x.dtype))
        x = x * self.embed_scale + sinusoidal_positions(padding, x.shape[-1], self.pad_id, x.dtype, documents)
        return self.dropout(x)

    def forward(self, embeddings: Tensor, documents: Tensor | None = None) -> Tensor:
        """Embeddings B×L×D → hidden states B×L×D after the final LayerNorm.

        Args:
            documents: number of the document that each token belongs to, B×L, rising along a row. Tokens then attend
                within their own alone.
        """
        xpos = XPos(embeddings.shape[1], self.head_width, embeddings.device) if self.xpos else None
        x = embeddings
        mask = None
        if documents is not None:
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        for layer in self.layers:
            x = layer(x, mask=mask, causal=mask is None, xpos=xpos)
        return self.norm(x)
