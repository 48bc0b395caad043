"""The MAGNETO transformer layer of the causal decoder and of AlignerNet.

Notable: sub-LN (pre-norm, plus a norm over the concatenated heads and one over the feed-forward width); all linear maps
have a bias; exact GELU in float32; only the resampler applies dropout to attention weights, because the fast attention
kernel of the released code ignores it (released-code.md, "LM layers", "Dropout").

Shapes: `B` batch, `L` queries, `S` keys, `D` width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kosmosg.models.positions import XPos

LAYER_NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head attention; with `sub_norm`, a LayerNorm over the concatenated heads before the output projection.

    Args:
        width: `D`, a multiple of `heads`.
        dropout: dropout of the attention weights.
    """

    def __init__(self, width: int, heads: int, *, sub_norm: bool = True, dropout: float = 0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}.")
        self.heads, self.dropout = heads, dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS) if sub_norm else nn.Identity()
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        xpos: XPos | None = None,
    ) -> Tensor:
        """Let queries B×L×D attend to keys B×S×D; returns B×L×D.

        Args:
            mask: bool, broadcastable to B×heads×L×S, True where attention is allowed.
            xpos: rotation and decay of queries and keys, see `positions.XPos`.
        """
        q, k, v = (
            states.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for states in (self.q_proj(queries), self.k_proj(keys), self.v_proj(keys))
        )
        if xpos is not None:
            q, k = xpos(q, k)
        dropout = self.dropout if self.training else 0.0
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out_proj(self.inner_norm(heads.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """fc1 → exact GELU → LayerNorm over the feed-forward width → fc2."""

    def __init__(self, width: int, ffn_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, ffn_width)
        self.norm = nn.LayerNorm(ffn_width, eps=LAYER_NORM_EPS)
        self.fc2 = nn.Linear(ffn_width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(self.norm(F.gelu(x.float()).type_as(x)))


class TransformerLayer(nn.Module):
    """LN → self-attention → residual; with `cross_attention`, LN → cross-attention → residual; LN → FFN → residual.

    Cross-attention has no inner norm (released-code.md, "AlignerNet M").

    Args:
        dropout: dropout after the output projection of each attention and after fc2.
    """

    def __init__(self, width: int, heads: int, ffn_width: int, *, cross_attention: bool = False, dropout: float = 0.0):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.self_attention = Attention(width, heads)
        if cross_attention:
            self.cross_attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
            self.cross_attention = Attention(width, heads, sub_norm=False)
        self.feed_forward_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.feed_forward = FeedForward(width, ffn_width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        causal: bool = False,
        xpos: XPos | None = None,
    ) -> Tensor:
        """x B×L×D, memory B×S×D (for cross-attention) → B×L×D."""
        normed = self.self_attention_norm(x)
        x = x + self.dropout(self.self_attention(normed, normed, mask=mask, causal=causal, xpos=xpos))
        if memory is not None:
            x = x + self.dropout(self.cross_attention(self.cross_attention_norm(x), memory, mask=memory_mask))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


def transformer_layers(count: int, width: int, heads: int, ffn_width: int, **options) -> nn.ModuleList:
    """Build a stack of `count` layers."""
    return nn.ModuleList(TransformerLayer(width, heads, ffn_width, **options) for _ in range(count))


@torch.no_grad()
def magneto_scale(layers: nn.ModuleList, gain: float) -> None:
    """Multiply weights and biases of fc1, fc2 and the value and output projections of self-attention by `gain`.

    Query and key projections and cross-attention keep PyTorch's initialisation (released-code.md, "Initialisation").
    """
    layer: Any
    for layer in layers:
        scaled = (
            layer.feed_forward.fc1,
            layer.feed_forward.fc2,
            layer.self_attention.v_proj,
            layer.self_attention.out_proj,
        )
        for linear in scaled:
            linear.weight.mul_(gain)
            linear.bias.mul_(gain)


def self_attention_gain(layers: int) -> float:
    """MAGNETO gain of N layers without cross-attention: sqrt(ln 2N)."""
    return math.sqrt(math.log(2 * layers))


def decoder_gain(layers: int) -> float:
    """MAGNETO gain of M layers with cross-attention: sqrt(ln 3M)."""
    return math.sqrt(math.log(3 * layers))


def encoder_gain(encoder_layers: int, decoder_layers: int) -> float:
    """MAGNETO gain of the N encoder layers of an encoder-decoder: sqrt(ln 3M · ln 2N / 3)."""
    return math.sqrt(math.log(3 * decoder_layers) * math.log(2 * encoder_layers) / 3)
