"""AlignerNet: M maps the MLLM's states to Stable Diffusion's text space, N maps back (paper section 2.2).

Notable: the decoders of M and N read learned queries, so input and output lengths are independent; M masks padded keys,
N does so only on request; there is no dropout. N is used in stage 2 only (released-code.md, "AlignerNet M", "AlignerNet
N"). With `encoder_layers=0` (Table 2, "12-Layers Decoder") only the final norm of the encoder remains. `LinearAligner`
is the baseline without AlignerNet.

Shapes: `B` batch, `L` tokens, `D` MLLM width, `Q` queries of M, `C` condition width, `P` width of a pooled vector.
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

FIRST_POSITION = 2  # rows 0 and 1 of the released position tables are never used


class AlignerEncoder(StrictWeights, ModelMixin, ConfigMixin):
    """M: states s B×L×D → condition M(s) B×Q×C (eq. 5).

    Args:
        input_width: `D`.
        width: `C`, also the width of all layers.
        encoder_layers: number of encoder layers; 0 for a decoder only.
        num_queries: `Q`, the length of Stable Diffusion's text condition.
        max_positions: rows of the position table; the longest prompt has two tokens fewer.
        pooled_width: `P`, the width of the pooled vector that some image decoders also read, or None. It has its own
            query, as CLIP reads it from a token of its own.
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
        """Maximum number of tokens of a prompt."""
        return self.config.max_positions - FIRST_POSITION

    def encode(self, hidden: Tensor, padding: Tensor) -> Tensor:
        """Run the encoder: hidden states B×L×D → B×L×C. Its output at padding is meaningless."""
        x = self.input_projection(hidden)
        x = x + position_embeddings(self.positions, hidden.shape[1])
        x = x * ~padding[..., None]
        mask = ~padding[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask=mask)
        return self.encoder_norm(x)

    def forward(self, hidden: Tensor, padding: Tensor) -> Condition:
        """Map hidden states B×L×D with padding bool B×L (True at padding) to a condition: states B×Q×C, pooled B×P.

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
    """Baseline without AlignerNet: a linear map from states B×L×D to the condition B×Q×C at each position.

    The condition always has Q positions, as those Stable Diffusion was trained with. Longer prompts are cut. Shorter
    ones are padded with a learned vector, as the U-Net also attends to CLIP's padding.

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
        """Map hidden states B×L×D with padding bool B×L (True at padding) to a condition, states B×Q×C."""
        length = min(hidden.shape[1], self.config.num_queries)
        states = self.projection(hidden[:, :length])
        states = torch.where(padding[:, :length, None], self.padding.type_as(states), states)
        rest = self.padding.type_as(states).expand(len(hidden), self.config.num_queries - length, -1)
        return Condition(torch.cat([states, rest], dim=1))


Aligner = AlignerEncoder | LinearAligner
ALIGNERS: dict[str, type[Aligner]] = {"alignernet": AlignerEncoder, "linear": LinearAligner}


def load_aligner(folder: Path, torch_dtype: torch.dtype = torch.float32) -> Aligner:
    """Load the aligner in `folder`, of the class in its configuration; errors as `load_part`."""
    saved = saved_class(folder)
    kinds = {kind.__name__: kind for kind in ALIGNERS.values()}
    return load_part(kinds.get(saved or "", AlignerEncoder), folder, torch_dtype)


class AlignerDecoder(StrictWeights, ModelMixin, ConfigMixin):
    """N: condition M(s) B×Q×C → reconstructed states N(M(s)) B×L×D (eq. 6).

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
        """Run the decoder: the first L = `length` learned queries attend to the condition's states, B×L×C."""
        if length > len(self.queries):
            raise ValueError(f"length={length} exceeds max_positions={len(self.queries)} of the aligner's decoder.")
        x = self.queries[:length].type_as(condition).expand(condition.shape[0], -1, -1)
        mask = None if padding is None else ~padding[:, None, None, :]
        for layer in self.decoder:
            x = layer(x, condition, mask=mask)
        return self.decoder_norm(x)

    def forward(self, condition: Condition, length: int, padding: Tensor | None = None) -> Tensor:
        """Reconstruct the MLLM's states, B×L×D with L = `length`, from the condition.

        Args:
            padding: bool B×L, True at padding, which is masked; the output there is meaningless. If None, padding is
                reconstructed like other positions.

        Raises:
            ValueError: `length` exceeds the tables.
        """
        x = self.decode(condition.states, length, padding)
        x = x + position_embeddings(self.positions, length)
        mask = None if padding is None else ~padding[:, None, None, :]
        for layer in self.encoder:
            x = layer(x, mask=mask)
        return self.output_projection(self.encoder_norm(x))


def position_embeddings(table: nn.Embedding, length: int) -> Tensor:
    """Return the embeddings of the first `length` positions, L×C."""
    if FIRST_POSITION + length > table.num_embeddings:
        raise ValueError(
            f"a sequence of {length} tokens needs {FIRST_POSITION + length} positions but the aligner has "
            f"max_positions={table.num_embeddings}; shorten the prompt or increase aligner.max_positions."
        )
    return table.weight[FIRST_POSITION : FIRST_POSITION + length]
