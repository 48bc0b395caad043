"""AlignerNet: M maps the MLLM's states into Stable Diffusion's text space, N maps back (paper section 2.2).

Notable: learned queries enter the decoders, so lengths match whatever they are; M masks padded keys, N masks
nothing unless told to; no dropout. N exists in stage 2 only (released-code.md, "AlignerNet M", "AlignerNet N"). Without
encoder layers (Table 2, "12-Layers Decoder") what stands in their place is the last norm of the encoder alone.
`LinearAligner` is what remains without AlignerNet.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `Q` queries of M, `C` condition width, `P` width of a pooled
vector.
"""

from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from kosmosg.condition import Condition
from kosmosg.models.storage import StrictWeights, load_part, saved_class
from kosmosg.models.transformer import (
    LAYER_NORM_EPS,
    decoder_gain,
    encoder_gain,
    magneto_scale,
    self_attention_gain,
    transformer_layers,
)

FIRST_POSITION = 2  # the released tables are read from row 2 on; rows 0 and 1 are never used


class AlignerEncoder(StrictWeights, ModelMixin, ConfigMixin):
    """M: states B×L×D → condition B×Q×C, eq. 5.

    Args:
        input_width: `D`.
        width: `C`, also the width of all layers.
        encoder_layers: 0 leaves a decoder alone.
        num_queries: `Q`, the length of Stable Diffusion's text condition.
        max_positions: rows of the position table; the longest prompt has two fewer tokens.
        pooled_width: `P`, of the pooled vector that some decoders read beside the states; it has a query of its own, as
            CLIP's is read from a token of its own. None for no pooled vector.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        input_width: int,
        width: int,
        ffn_width: int,
        heads: int,
        encoder_layers: int,
        decoder_layers: int,
        num_queries: int,
        max_positions: int,
        pooled_width: int | None = None,
    ):
        super().__init__()
        self.input_projection = nn.Linear(input_width, width)
        self.positions = nn.Embedding(max_positions, width)
        self.encoder = transformer_layers(encoder_layers, width, heads, ffn_width)
        self.encoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.queries = nn.Parameter(torch.randn(num_queries + (pooled_width is not None), width))
        self.decoder = transformer_layers(decoder_layers, width, heads, ffn_width, cross_attention=True)
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pooled_head = None if pooled_width is None else nn.Linear(width, pooled_width)
        if encoder_layers:
            magneto_scale(self.encoder, encoder_gain(encoder_layers, decoder_layers))
        magneto_scale(self.decoder, decoder_gain(decoder_layers))

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt."""
        return self.config.max_positions - FIRST_POSITION

    def encode(self, hidden: Tensor, padding: Tensor) -> Tensor:
        """Encoder half: hidden B×L×D → B×L×C; what stands at padding is meaningless."""
        x = self.input_projection(hidden)
        x = x + position_rows(self.positions, hidden.shape[1])
        x = x * ~padding[..., None]
        mask = ~padding[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask=mask)
        return self.encoder_norm(x)

    def forward(self, hidden: Tensor, padding: Tensor) -> Condition:
        """Hidden B×L×D, padding bool B×L (True at padding) → condition, states B×Q×C, pooled B×P.

        Raises:
            ValueError: the prompt is longer than the position table.
        """
        memory = self.encode(hidden, padding)
        memory_mask = ~padding[:, None, None, :]
        x = self.queries.type_as(memory).expand(hidden.shape[0], -1, -1)
        for layer in self.decoder:
            x = layer(x, memory, memory_mask=memory_mask)
        x = self.decoder_norm(x)
        if self.pooled_head is None:
            return Condition(x)
        return Condition(x[:, :-1], pooled=self.pooled_head(x[:, -1]))


class LinearAligner(StrictWeights, ModelMixin, ConfigMixin):
    """No AlignerNet: one linear map from states B×L×D to the condition B×Q×C, position by position.

    Notable: the condition has Q positions, as every condition that Stable Diffusion was trained with. A longer prompt
    is cut, and a learned vector fills up a shorter one: CLIP's padding, too, is a state like the others, which the
    U-Net reads unmasked.

    Args:
        input_width: `D`.
        width: `C`.
        num_queries: `Q`.
    """

    config_name = "config.json"
    max_length = None

    @register_to_config
    def __init__(self, input_width: int, width: int, num_queries: int):
        super().__init__()
        self.projection = nn.Linear(input_width, width)
        self.padding = nn.Parameter(torch.randn(width))

    def forward(self, hidden: Tensor, padding: Tensor) -> Condition:
        """Hidden B×L×D, padding bool B×L (True at padding) → condition, states B×Q×C."""
        length = min(hidden.shape[1], self.config.num_queries)
        states = self.projection(hidden[:, :length])
        states = torch.where(padding[:, :length, None], self.padding.type_as(states), states)
        rest = self.padding.type_as(states).expand(len(hidden), self.config.num_queries - length, -1)
        return Condition(torch.cat([states, rest], dim=1))


Aligner = AlignerEncoder | LinearAligner
ALIGNERS: dict[str, type[Aligner]] = {"alignernet": AlignerEncoder, "linear": LinearAligner}


def load_aligner(folder: Path, torch_dtype: torch.dtype = torch.float32) -> Aligner:
    """The aligner in `folder`, of whichever kind its configuration names; errors as `load_part`."""
    saved = saved_class(folder)
    kinds = {kind.__name__: kind for kind in ALIGNERS.values()}
    return load_part(kinds.get(saved or "", AlignerEncoder), folder, torch_dtype)


class AlignerDecoder(StrictWeights, ModelMixin, ConfigMixin):
    """N: condition B×Q×C → reconstructed states B×L×D, eq. 6.

    Args:
        output_width: `D`.
        width: `C`, also the width of all layers.
        max_positions: rows of the query table and of the position table.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        output_width: int,
        width: int,
        ffn_width: int,
        heads: int,
        encoder_layers: int,
        decoder_layers: int,
        max_positions: int,
    ):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(max_positions, width))
        self.decoder = transformer_layers(decoder_layers, width, heads, ffn_width, cross_attention=True)
        self.decoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.positions = nn.Embedding(max_positions, width)
        self.encoder = transformer_layers(encoder_layers, width, heads, ffn_width)
        self.encoder_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.output_projection = nn.Linear(width, output_width)
        magneto_scale(self.decoder, decoder_gain(decoder_layers))
        if encoder_layers:
            magneto_scale(self.encoder, self_attention_gain(encoder_layers))

    def decode(self, condition: Tensor, length: int, padding: Tensor | None = None) -> Tensor:
        """Decoder half: the first `length` learned queries read the condition's states, B×L×C."""
        if length > len(self.queries):
            raise ValueError(f"length={length} exceeds max_positions={len(self.queries)} of the aligner's decoder.")
        x = self.queries[:length].type_as(condition).expand(condition.shape[0], -1, -1)
        mask = None if padding is None else ~padding[:, None, None, :]
        for layer in self.decoder:
            x = layer(x, condition, mask=mask)
        return self.decoder_norm(x)

    def forward(self, condition: Condition, length: int, padding: Tensor | None = None) -> Tensor:
        """Condition → the MLLM's states B×`length`×D.

        Args:
            padding: bool B×length, True beyond a caption's own length: its states are then those of the caption alone,
                and what stands at padding is meaningless. Without it, padding is reconstructed as all else.

        Raises:
            ValueError: `length` is beyond the tables.
        """
        x = self.decode(condition.states, length, padding)
        x = x + position_rows(self.positions, length)
        mask = None if padding is None else ~padding[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask=mask)
        return self.output_projection(self.encoder_norm(x))


def position_rows(table: nn.Embedding, length: int) -> Tensor:
    """Rows for `length` positions, L×C."""
    if FIRST_POSITION + length > table.num_embeddings:
        raise ValueError(
            f"a sequence of {length} tokens needs {FIRST_POSITION + length} positions but the aligner has "
            f"max_positions={table.num_embeddings}; shorten the prompt or raise aligner.max_positions."
        )
    return table.weight[FIRST_POSITION : FIRST_POSITION + length]
