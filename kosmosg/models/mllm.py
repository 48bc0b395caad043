"""The multimodal language model: vision encoder → resampler → causal decoder (paper section 2.1, Fig. 2).

`MultimodalLM` is what the stages, the dry run and the pipeline know of it; `MLLM` is the paper's. Notable there: image
features enter before the embeddings are scaled by sqrt(D), so they are scaled too; the output of the final LayerNorm at
*every* position is what AlignerNet reads; the output matrix is the input embedding.

Shapes: `B` batch, `L` tokens, `D` width, `I` images of the whole batch in reading order, `K` tokens per image.
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

MAX_TOKENS = 2048  # the longest sequence of the language model's training (tokens_per_sample)


@dataclass
class VisionTraining:
    """Which part of the vision encoder trains (paper section 3.2: "only the last layer")."""

    blocks: int = 1
    """How many of the last blocks train; -1 is the whole encoder."""
    final_norm: bool = True
    """Whether the LayerNorm after the last block trains."""

    def __post_init__(self) -> None:
        if self.blocks < -1:
            raise ValueError(f"vision_training.blocks is {self.blocks}; allowed: -1 (all), 0, 1, 2, …")


class MultimodalLM(nn.Module):
    """What the project knows of a multimodal language model; another one is one class.

    Attributes:
        width: `D`.
        max_tokens: of the longest prompt.
        device: of its weights.
        decoder: the causal language model in it.
    """

    decoder: Any
    width: int
    max_tokens: int
    device: torch.device

    @abstractmethod
    def encoder(self, tokenizer: Any, max_length: int | None = None) -> PromptEncoder:
        """Encodes prompts as this model reads them."""

    @abstractmethod
    def hidden_states(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """States B×L×D and their padding bool B×L, True where a state is none. Sharding needs every process to call it
        equally often, each time with or without images."""

    @abstractmethod
    def unconditional_prompt(self) -> PromptBatch:
        """The one-row batch whose condition is the null condition."""

    @abstractmethod
    def dummy_image_prompt(self, usual: bool = False) -> PromptBatch:
        """A one-row batch with one blank image, for batches without any: see `StageModule.with_dummy_image`.

        Args:
            usual: of the size that the images of prompts usually have, for dry runs, where the size may differ.
        """

    @abstractmethod
    def set_trainable(self, vision: VisionTraining) -> None:
        """Let all train but the frozen part of the vision encoder.

        Raises:
            ValueError: more blocks asked for than the encoder has.
        """


class MLLM(StrictWeights, MultimodalLM, ModelMixin, ConfigMixin):
    """Interleaved ids and images → hidden states. Sizes of the paper: section 3.2.

    Args:
        vision_config: fields of `transformers.CLIPVisionConfig`.
        image_tokens: `K`, latents of the resampler.
        dropout: on embeddings, after each attention and feed-forward, on the resampler's attention weights.
        xpos: see `positions.XPos`; the released model leaves it off.
        bos_id: `<s>`, of which the null condition consists.
        image_fit: of its prompts' images, see `ClipImageTransform`.
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
        """The tied output matrix vocab_size×D."""
        return self.decoder.embed_tokens.weight

    def image_features(self, images: Tensor) -> Tensor:
        """Preprocessed images I×3×S×S → I×K×D."""
        return self.resampler(self.vision(images))

    def embed(self, batch: PromptBatch, documents: Tensor | None = None) -> Tensor:
        """Input of the first layer, B×L×D; see `CausalDecoder.forward` for `documents`.

        Raises:
            ValueError: the number of image tokens is not K times the number of images.
        """
        assert not isinstance(batch.images, PackedImages)
        features = None if batch.images is None else self.image_features(batch.images)
        # On a GPU the count would cost a synchronisation in every step; PromptEncoder.collate has checked it. A
        # subclass of Tensor may have no values to count, as in a dry run.
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
        """Hidden states B×L×D: the final LayerNorm's output at every position, `<s>` and image tokens included.

        Args:
            separate_documents: each `<s>` in a row begins a document, whose states become those of the document alone:
                attention stays within it and positions begin anew.
        """
        documents = (batch.ids == self.config.bos_id).cumsum(dim=1) if separate_documents else None
        return self.decoder(self.embed(batch, documents), documents)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next token, …×vocab_size. Stage 1 only."""
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
        # Lists, because a tensor of a dry run cannot be read.
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
