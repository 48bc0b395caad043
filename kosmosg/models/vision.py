"""The vision encoder: CLIP's vision transformer without its projection.

Notable: the final LayerNorm runs over all tokens, the class token too, and each is then scaled to length one
(released-code.md, "Vision encoder"); the paper mentions neither.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class VisionEncoder(nn.Module):
    """transformers' CLIPVisionModel, all tokens normalised.

    Args:
        config: fields of `transformers.CLIPVisionConfig`.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.clip: Any = CLIPVisionModel(CLIPVisionConfig(**config))
        self.blocks: int | None = None

    @property
    def width(self) -> int:
        return self.clip.config.hidden_size

    @property
    def image_size(self) -> int:
        """Pixels on a side of the square images that the encoder reads."""
        return self.clip.config.image_size  # type: ignore[return-value]

    def keep_blocks(self, blocks: int) -> None:
        """Let go of all before the last `blocks` blocks: the encoder then reads the states before them alone.

        Names of weights stay what they were.
        """
        self.blocks, layers = blocks, self.clip.encoder.layers
        self.clip.embeddings = self.clip.pre_layrnorm = None
        for number in range(len(layers) - blocks):
            layers[number] = nn.Identity()

    def blank(self) -> Tensor:
        """What a blank image is to the encoder: 3×S×S, or its states (1 + patches)×width."""
        if self.blocks is None:
            return torch.zeros(3, self.image_size, self.image_size)
        return torch.zeros(1 + (self.image_size // self.clip.config.patch_size) ** 2, self.width)

    def states_before(self, images: Tensor, blocks: int) -> Tensor:
        """Images I×3×S×S → the states I×(1 + patches)×width that the last `blocks` blocks read."""
        clip = self.clip
        states = clip.pre_layrnorm(clip.embeddings(images.to(clip.dtype)))
        for layer in clip.encoder.layers[: len(clip.encoder.layers) - blocks]:
            states = layer(states, None)
        return states

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images I×3×S×S, or after `keep_blocks` the states before those → tokens I×(1 + patches)×width,
        each of length one.

        Raises:
            ValueError: the images are not 3×S×S.
        """
        if self.blocks is not None:
            tokens = images.to(self.clip.dtype)
            for layer in self.clip.encoder.layers[-self.blocks :] if self.blocks else ():
                tokens = layer(tokens, None)
            return F.normalize(self.clip.post_layernorm(tokens), dim=-1)
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images are {tuple(images.shape[1:])} but the vision encoder reads {expected} (channels, height, "
                f"width); preprocess them with ClipImageTransform(size={self.image_size})."
            )
        tokens = self.clip(images.to(self.clip.dtype)).last_hidden_state
        return F.normalize(self.clip.post_layernorm(tokens), dim=-1)
