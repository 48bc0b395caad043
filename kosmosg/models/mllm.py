"""The multimodal language model: vision encoder → resampler → causal decoder (paper section 2.1, Fig. 2).

`MultimodalLM` is the interface that stages, dry run and pipeline use; `MLLM` implements the paper's model. Notable:
image features replace token embeddings before these are scaled by sqrt(D), so they are scaled too; AlignerNet reads the
output of the final LayerNorm at *every* position; the output matrix is the input embedding.

Shapes: `B` batch, `L` tokens, `D` width, `I` images of the batch in reading order, `K` tokens per image, `S` pixels per
side, `V` vocabulary.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from kosmosg.image_processing import ClipImageTransform
from kosmosg.models.decoder import CausalDecoder
from kosmosg.models.resampler import Resampler
from kosmosg.models.storage import StrictWeights
from kosmosg.models.vision import VisionEncoder
from kosmosg.prompt import EncodedPrompt, PackedImages, PromptBatch, PromptEncoder
from kosmosg.tokenizer import Tokenizer

MAX_TOKENS = 2048  # sequence length of the language model's training (tokens_per_sample)


@dataclass
class VisionTraining:
    """The trainable part of the vision encoder (paper section 3.2: "only the last layer")."""

    blocks: int = 1
    """Number of trainable blocks, counted from the last; -1 for the whole encoder."""
    final_norm: bool = True
    """Whether the LayerNorm after the last block is trainable."""

    def __post_init__(self) -> None:
        if self.blocks < -1:
            raise ValueError(f"vision_training.blocks is {self.blocks}; allowed: -1 (all) or at least 0")


class MultimodalLM(nn.Module):
    """The interface of a multimodal language model.

    Attributes:
        width: `D`.
        max_tokens: maximum length of a prompt.
        device: device of the weights.
        decoder: the causal language model.
    """

    decoder: Any
    width: int
    max_tokens: int
    device: torch.device

    @abstractmethod
    def encoder(self, tokenizer: Any, max_length: int | None = None) -> PromptEncoder:
        """Return an encoder of prompts for this model."""

    @abstractmethod
    def hidden_states(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Return the hidden states B×L×D and their padding, bool B×L, True at padding.

        With sharded weights, all ranks must call it equally often, and each time either all or none with images.
        """

    @abstractmethod
    def unconditional_prompt(self) -> PromptBatch:
        """Return the prompt whose condition is the null condition, one row."""

    @abstractmethod
    def dummy_image_prompt(self, usual: bool = False) -> PromptBatch:
        """Return a one-row batch with one blank image, for batches without any: see `StageModule.with_dummy_image`.

        Args:
            usual: give the image a typical size, for dry runs of models that read images of any size.
        """

    @abstractmethod
    def set_trainable(self, vision: VisionTraining) -> None:
        """Make all weights trainable except the frozen part of the vision encoder.

        Raises:
            ValueError: `vision.blocks` exceeds the number of blocks.
        """


class MLLM(StrictWeights, MultimodalLM, ModelMixin, ConfigMixin):
    """The paper's MLLM: hidden states of interleaved text and images. Paper section 3.2 gives the sizes.

    Args:
        vocab_size: `V`.
        width: `D`.
        image_tokens: `K`, the number of latents of the resampler.
        vision_config: fields of `transformers.CLIPVisionConfig`.
        dropout: dropout on embeddings, after each attention and feed-forward, and on the resampler's attention weights.
        xpos: use xPos, see `positions.XPos`. The released model does not.
        bos_id: id of `<s>`, which alone is the unconditional prompt.
        image_fit: how images are made square, see `ClipImageTransform`.
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
        image_fit: str = "crop",
    ):
        super().__init__()
        self.vision = VisionEncoder(vision_config)
        self.resampler = Resampler(self.vision.width, width, heads, image_tokens, dropout)
        self.decoder = CausalDecoder(vocab_size, width, layers, heads, ffn_width, dropout, xpos, pad_id)
        self.width, self.max_tokens = width, MAX_TOKENS

    @property
    def output_matrix(self) -> Tensor:
        """The output matrix V×D, tied to the token embedding."""
        return self.decoder.embed_tokens.weight

    def image_features(self, images: Tensor) -> Tensor:
        """Encode images: preprocessed pixels I×3×S×S → I×K×D."""
        return self.resampler(self.vision(images))

    def embed(self, batch: PromptBatch, documents: Tensor | None = None) -> Tensor:
        """Return the input of the first layer, B×L×D; see `CausalDecoder.forward` for `documents`.

        Raises:
            ValueError: the number of image tokens is not K times the number of images.
        """
        assert not isinstance(batch.images, PackedImages)
        features = None if batch.images is None else self.image_features(batch.images)
        # Checked on the CPU only: on a GPU it would synchronise in every step, and PromptEncoder.collate checks it too.
        # Subclasses of Tensor, as used in dry runs, may have no values.
        if batch.image_mask.device.type == "cpu" and type(batch.image_mask) is Tensor:
            images = 0 if batch.images is None else len(batch.images)
            tokens = int(batch.image_mask.sum())
            if tokens != images * self.config.image_tokens:
                raise ValueError(
                    f"the batch has {tokens} image tokens but {images} images of {self.config.image_tokens} tokens "
                    "each; build it with PromptEncoder(image_tokens=mllm.config.image_tokens)."
                )
        return self.decoder.embed(batch.ids, batch.padding, batch.image_mask, features, documents)

    def forward(self, batch: PromptBatch, separate_documents: bool = False) -> Tensor:
        """Return the hidden states B×L×D: the output of the final LayerNorm at every position.

        Args:
            separate_documents: treat each `<s>` in a row as the start of a new document. Attention does not cross
                documents and positions restart, so the states are those of each document alone.
        """
        documents = (batch.ids == self.config.bos_id).cumsum(dim=1) if separate_documents else None
        return self.decoder(self.embed(batch, documents), documents)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of the next token, …×V. Used in stage 1 only."""
        return F.linear(hidden, self.output_matrix)

    def encoder(self, tokenizer: Tokenizer, max_length: int | None = None) -> PromptEncoder:
        transform = ClipImageTransform(self.vision.image_size, self.config.image_fit)
        return PromptEncoder(tokenizer, transform, self.config.image_tokens, max_length)

    def hidden_states(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        return self(batch), batch.padding

    def unconditional_prompt(self) -> PromptBatch:
        """`<s>` alone (released-code.md, "Stage-3 loss")."""
        return PromptBatch.stack([EncodedPrompt([self.config.bos_id], None, [])], self.config.pad_id)

    def dummy_image_prompt(self, usual: bool = False) -> PromptBatch:
        """`<s>` and a blank image."""
        tokens = self.config.image_tokens
        # Lists, because tensors have no values in a dry run.
        mask = [False] + [True] * tokens
        row = EncodedPrompt([self.config.bos_id] * (1 + tokens), mask, [self.vision.blank()])
        return PromptBatch.stack([row], self.config.pad_id)

    def set_trainable(self, vision: VisionTraining) -> None:
        clip = self.vision.clip
        blocks = clip.encoder.layers
        if vision.blocks > len(blocks):
            raise ValueError(
                f"vision_training.blocks is {vision.blocks}, but the vision encoder has {len(blocks)} blocks"
            )
        self.requires_grad_(True)
        clip.requires_grad_(vision.blocks == -1)
        for block in list(blocks)[len(blocks) - vision.blocks :] if vision.blocks > 0 else []:
            block.requires_grad_(True)
        clip.post_layernorm.requires_grad_(vision.final_norm)
