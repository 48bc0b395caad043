"""The causal language model of the MLLM: a MAGNETO decoder (paper section 2.1; released-code.md, "LM layers").

Notable: there is no padding mask. Padding is on the right, so causal attention never reaches it from a real token.
Documents packed into one row attend to each other unless `documents` is given.

Shapes: `B` batch, `L` tokens, `D` width, `I` images, `K` tokens per image.
"""

import math

from torch import Tensor, nn

from kosmosg.models.positions import XPos, sinusoidal_positions
from kosmosg.models.transformer import LAYER_NORM_EPS, magneto_scale, self_attention_gain, transformer_layers


class CausalDecoder(nn.Module):
    """Token embeddings, sinusoidal positions, causal layers, final LayerNorm.

    Args:
        dropout: dropout on the embeddings, after each attention and after each feed-forward.
        xpos: use xPos, see `positions.XPos`. The released model does not.
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
        """Return the input of the first layer, B×L×D: embeddings with image features, scaled, plus positions.

        Args:
            image_features: I×K×D in reading order; they replace the embeddings where `image_mask` is True.
            documents: see `forward`; positions restart with every document.
        """
        x = self.embed_tokens(ids)
        if image_features is not None:
            x = x.masked_scatter(image_mask[..., None], image_features.to(x.dtype))
        x = x * self.embed_scale + sinusoidal_positions(padding, x.shape[-1], self.pad_id, x.dtype, documents)
        return self.dropout(x)

    def forward(self, embeddings: Tensor, documents: Tensor | None = None) -> Tensor:
        """Embeddings B×L×D → hidden states B×L×D after the final LayerNorm.

        Args:
            documents: index of each token's document, B×L, non-decreasing along a row. Attention then does not cross
                documents.
        """
        xpos = XPos(embeddings.shape[1], self.head_width, embeddings.device) if self.xpos else None
        x = embeddings
        mask = None
        if documents is not None:
            mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        for layer in self.layers:
            x = layer(x, mask=mask, causal=mask is None, xpos=xpos)
        return self.norm(x)
