"""The vision encoder: CLIP's vision transformer without its projection.

Notable: all tokens, the class token included, pass the final LayerNorm and are then scaled to unit length
(released-code.md, "Vision encoder"); the paper mentions neither.

Shapes: `I` images, `S` pixels per side, `T` tokens per image (1 + patches).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel


class VisionEncoder(nn.Module):
    """CLIPVisionModel of transformers with normalised output tokens.

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
        """`S`."""
        return self.clip.config.image_size  # type: ignore[return-value]

    def keep_last_blocks(self, blocks: int) -> None:
        """Delete everything before the last `blocks` blocks, so that `forward` reads their cached input states.

        The names of the remaining weights do not change.
        """
        self.blocks, layers = blocks, self.clip.encoder.layers
        self.clip.embeddings = self.clip.pre_layrnorm = None
        for number in range(len(layers) - blocks):
            layers[number] = nn.Identity()

    def blank(self) -> Tensor:
        """Return a blank image 3×S×S, or blank states T×width after `keep_last_blocks`."""
        if self.blocks is None:
            return torch.zeros(3, self.image_size, self.image_size)
        return torch.zeros(1 + (self.image_size // self.clip.config.patch_size) ** 2, self.width)

    def input_of_last_blocks(self, images: Tensor, blocks: int) -> Tensor:
        """Images I×3×S×S → input states I×T×width of the last `blocks` blocks."""
        clip = self.clip
        states = clip.pre_layrnorm(clip.embeddings(images.to(clip.dtype)))
        for layer in clip.encoder.layers[: len(clip.encoder.layers) - blocks]:
            states = layer(states, None)
        return states

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images I×3×S×S, or after `keep_last_blocks` states I×T×width → unit-length tokens I×T×width.

        Raises:
            ValueError: the images are not 3×S×S.
        """
        if self.blocks is None:
            expected = (3, self.image_size, self.image_size)
            if tuple(images.shape[1:]) != expected:
                raise ValueError(
                    f"images are {tuple(images.shape[1:])} but the vision encoder reads {expected} (channels, height, "
                    f"width); preprocess them with ClipImageTransform(size={self.image_size})."
                )
            tokens = self.clip(images.to(self.clip.dtype)).last_hidden_state
        else:
            tokens = images.to(self.clip.dtype)
            for layer in self.clip.encoder.layers[len(self.clip.encoder.layers) - self.blocks :]:
                tokens = layer(tokens, None)
        return F.normalize(self.clip.post_layernorm(tokens), dim=-1)
