"""Stage 1, multimodal language modelling (paper section 2.1): next-token cross-entropy on the text tokens.

Trained: the MLLM's language decoder with its embeddings, its resampler and the end of its vision encoder. Frozen: the
rest of the vision encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kosmosg.batches import LanguageModellingBatch
from kosmosg.losses import IGNORED_LABEL, LOSS_CHUNK, language_modelling_loss
from kosmosg.models.build import build_mllm, load_image_decoder
from kosmosg.models.mllm import MLLM, VisionTraining
from kosmosg.models.storage import save_model
from kosmosg.prompt import PromptBatch
from lightning_modules.base import (
    LoadDecoder,
    PromptShape,
    PromptTokenizer,
    StageExperiment,
    StageModule,
    fake_prompts,
)
from lightning_modules.optimizer import OptimizerConfig

IMAGE_SHARE = 0.36  # average share of image tokens in a packed row: 11 images in 2,048 tokens


@dataclass
class LanguageModellingRecipe:
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Trainable part of the vision encoder."""
    separate_documents: bool = False
    """Restrict attention to each document of a packed row and restart its positions; false: rows are one sequence."""
    loss_chunk: int | None = LOSS_CHUNK
    """Number of positions whose logits are in memory at once; null: all of the micro-batch. The loss is the same."""

    def __post_init__(self) -> None:
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(f"recipe.loss_chunk is {self.loss_chunk}; allowed: 1 or more, or null")


class LanguageModellingModule(StageModule):
    """Stage 1: see `LanguageModellingBatch`. The loss of an optimizer step is the mean over all its text tokens."""

    Recipe = LanguageModellingRecipe
    image_decoder = None

    def __init__(self, mllm: MLLM, recipe: LanguageModellingRecipe, optimizer: OptimizerConfig, seed: int):
        super().__init__(optimizer, seed)
        self.mllm, self.recipe = mllm, recipe
        mllm.set_trainable(recipe.vision_training)

    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: PromptTokenizer, load_decoder: LoadDecoder = load_image_decoder
    ) -> "LanguageModellingModule":
        if experiment.model.language_model is not None:
            raise ValueError(
                f"model.language_model='{experiment.model.language_model}' has learned language already: stage "
                "language_modelling trains only the paper's MLLM. Leave the key out, or start with stage alignment."
            )
        mllm: Any = build_mllm(experiment.model, tokenizer, experiment.init_from)
        return cls(mllm, experiment.recipe, experiment.optimizer, experiment.seed)

    def sharded_modules(self) -> Sequence[nn.Module]:
        return (self.mllm,)

    def count(self, batch: Any) -> int:
        """Number of tokens to predict."""
        return int((batch.labels != IGNORED_LABEL).sum())

    def losses(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.loss(batch.prompt, batch.labels)}

    def loss(self, prompt: PromptBatch, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy over the labels that are not ignored; 0 if there are none."""
        rows, length = labels.shape
        prompt = self.with_dummy_image(prompt, self.mllm)
        hidden = self.mllm(prompt, separate_documents=self.recipe.separate_documents)
        output_matrix, chunk = self.mllm.output_matrix, self.recipe.loss_chunk
        loss = language_modelling_loss(hidden[:rows, :length], output_matrix, labels, chunk)
        return loss + 0 * hidden[rows:].sum()

    def validation_losses(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """`loss`; for rows with images also `caption_loss`, and `caption_loss_mismatched_images` with each image
        replaced by the next in the batch. The gap between the two shows how much the MLLM uses the images."""
        prompt, labels = batch.prompt, batch.labels
        losses = {"loss": (self.loss(prompt, labels), self.count(batch))}
        if self.any_rank(prompt.images is not None and len(prompt.images) > 1):
            labels = labels.masked_fill(~prompt.image_mask.any(dim=1, keepdim=True), IGNORED_LABEL)
            tokens = int((labels != IGNORED_LABEL).sum())
            losses["caption_loss"] = (self.loss(prompt, labels), tokens)
            losses["caption_loss_mismatched_images"] = (self.loss(prompt.roll_images(), labels), tokens)
        return losses

    def prompt_shape(self, experiment: StageExperiment) -> PromptShape:
        tokens = experiment.data.sequence_length
        return PromptShape(tokens, int(IMAGE_SHARE * tokens / (experiment.model.mllm.image_tokens + 2)))

    def fake_batch(self, rows: int, shape: PromptShape, image_size: int) -> LanguageModellingBatch:
        prompt = fake_prompts(self.mllm, rows, shape)
        return LanguageModellingBatch(prompt=prompt, labels=torch.zeros_like(prompt.ids), indices=list(range(rows)))

    def save_model(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        """Write mllm/ and tokenizer/."""
        save_model(folder, tokenizer, mllm=self.mllm)
