"""The vision encoder: CLIP's vision transformer without its projection.

Notable: the final LayerNorm runs over all tokens, the class token too, and each is then scaled to length one
(released-code.md, "Image tower"); the paper mentions neither.
"""

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
        self.clip = CLIPVisionModel(CLIPVisionConfig(**config))

    @property
    def width(self) -> int:
        return self.clip.config.hidden_size

    @property
    def image_size(self) -> int:
        """Pixels on a side of the square images that the encoder reads."""
        return self.clip.config.image_size  # type: ignore[return-value]

    def forward(self, images: Tensor) -> Tensor:
        """Preprocessed images I×3×S×S → tokens I×(1 + patches)×width, each of length one.

        Raises:
            ValueError: the images are not 3×S×S.
        """
        expected = (3, self.image_size, self.image_size)
        if tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"images are {tuple(images.shape[1:])} but the vision encoder reads {expected} (channels, height, "
                f"width); preprocess them with ClipImageTransform(size={self.image_size})."
            )
        tokens = self.clip(images.to(self.clip.dtype)).last_hidden_state
        return F.normalize(self.clip.post_layernorm(tokens), dim=-1)
