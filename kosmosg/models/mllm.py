"""The multimodal language model: image tower → resampler → causal decoder (paper section 2.1, Fig. 2).

Notable: image features enter before the embeddings are scaled by sqrt(D), so they are scaled too; the output of the
final LayerNorm at *every* position is what AlignerNet reads; the output matrix is the input embedding.

Shapes: `B` batch, `L` tokens, `D` width, `I` images of the whole batch in reading order, `K` slots per image.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from kosmosg.models.decoder import CausalDecoder
from kosmosg.models.resampler import Resampler
from kosmosg.models.storage import StrictWeights
from kosmosg.models.vision import VisionTower
from kosmosg.prompt import PromptBatch

MAX_TOKENS = 2048  # the longest sequence of the language model's training (tokens_per_sample)


class MLLM(StrictWeights, ModelMixin, ConfigMixin):
    """Interleaved ids and images → hidden states. Sizes of the paper: section 3.2.

    Args:
        vision_config: fields of `transformers.CLIPVisionConfig`.
        image_tokens: `K`, latents of the resampler.
        dropout: on embeddings, after each attention and feed-forward, on the resampler's attention weights.
        xpos: see `positions.XPos`; the released model leaves it off.
        bos_id: `<s>`, of which the null condition consists.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        ffn_width: int,
        image_tokens: int,
        vision_config: dict,
        dropout: float = 0.1,
        xpos: bool = False,
        pad_id: int = 1,
        bos_id: int = 0,
    ):
        super().__init__()
        self.vision = VisionTower(vision_config)
        self.resampler = Resampler(self.vision.width, width, heads, image_tokens, dropout)
        self.decoder = CausalDecoder(vocab_size, width, layers, heads, ffn_width, dropout, xpos, pad_id)

    @property
    def output_matrix(self) -> Tensor:
        """The tied output matrix vocab_size×D."""
        return self.decoder.embed_tokens.weight

    def image_features(self, images: Tensor) -> Tensor:
        """Preprocessed images I×3×S×S → I×K×D."""
        return self.resampler(self.vision(images))

    def embed(self, batch: PromptBatch, features: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """Input of the first layer, B×L×D; `features` I×K×D spares the images their way through the tower. See
        `CausalDecoder.forward` for `documents`.

        Raises:
            ValueError: the number of image slots is not K times the number of images.
        """
        if batch.images is not None and features is None:
            features = self.image_features(batch.images)
        # On a GPU the count would cost a synchronisation in every step; PromptEncoder.collate has checked it. A
        # subclass of Tensor may have no values to count, as in a dry run.
        if batch.image_mask.device.type == "cpu" and type(batch.image_mask) is Tensor:
            images = 0 if batch.images is None else len(batch.images)
            slots = int(batch.image_mask.sum())
            if slots != images * self.config.image_tokens:
                raise ValueError(
                    f"the batch has {slots} image slots but {images} images of {self.config.image_tokens} slots "
                    "each; build it with PromptEncoder(image_tokens=mllm.config.image_tokens)."
                )
        return self.decoder.embed(batch.ids, batch.padding, batch.image_mask, features, documents)

    def forward(self, batch: PromptBatch, features: Tensor | None = None, separate_documents: bool = False) -> Tensor:
        """Hidden states B×L×D: the final LayerNorm's output at every position, `<s>` and image slots included.

        Args:
            features: I×K×D, what `image_features` gave for the batch's images, where it is known already.
            separate_documents: each `<s>` in a row begins a document, whose states become those of the document alone:
                attention stays within it and positions begin anew.
        """
        documents = (batch.ids == self.config.bos_id).cumsum(dim=1) if separate_documents else None
        return self.decoder(self.embed(batch, features, documents), documents)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, …×vocab_size. Stage 1 only."""
        return F.linear(hidden, self.output_matrix)

    def null_prompt(self) -> PromptBatch:
        """The prompt of the null condition: `<s>` alone."""
        ids = torch.full((1, 1), self.config.bos_id, device=self.device)
        nowhere = torch.zeros_like(ids, dtype=torch.bool)
        return PromptBatch(ids=ids, image_mask=nowhere, images=None, padding=nowhere)
