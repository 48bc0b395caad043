"""Stage 1, multimodal language modelling (paper section 2.1): next-token cross-entropy on text tokens.

Trained: the decoder with its embeddings, the resampler, the end of the image tower. Frozen: the rest of the tower.

Shapes: `B` batch, `L` tokens, `I` images of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from kosmosg.losses import IGNORED_LABEL, language_modelling_loss
from kosmosg.models.build import build_mllm
from kosmosg.models.mllm import MLLM
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageExperiment, StageModule, save_mllm
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.trained_weights import VisionTraining, train_mllm


@dataclass
class LanguageModellingRecipe:
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Which part of the image tower trains."""


class LanguageModellingModule(StageModule):
    """Batches: `prompt` PromptBatch and `labels` B×L int64, the token to predict at each position, -100 ignored."""

    def __init__(self, mllm: MLLM, recipe: LanguageModellingRecipe, optimizer: OptimizerConfig, seed: int):
        super().__init__(optimizer, seed)
        self.mllm = mllm
        train_mllm(mllm, recipe.vision_training)

    @classmethod
    def build(cls, experiment: StageExperiment, tokenizer: Tokenizer) -> "LanguageModellingModule":
        mllm = build_mllm(experiment.model, tokenizer, experiment.init_from)
        return cls(mllm, experiment.recipe, experiment.optimizer, experiment.seed)

    def sharded_networks(self) -> Sequence[nn.Module]:
        return (self.mllm,)

    def loss(self, prompt: PromptBatch, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy over the labels that count."""
        return language_modelling_loss(self.mllm(prompt), self.mllm.output_matrix, labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch.prompt, batch.labels)
        self.log_losses("train", {"loss": loss}, len(batch.prompt))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """val/loss over all rows; over rows with images, val/caption_loss and the same with each image replaced by its
        neighbour in the batch, val/caption_loss_wrong_image: their distance says how much the images are read."""
        self._log_loss("loss", batch.prompt, batch.labels)
        images = batch.prompt.images
        if images is None or len(images) < 2:
            return
        with_images = batch.prompt.image_mask.any(dim=1, keepdim=True)
        labels = batch.labels.masked_fill(~with_images, IGNORED_LABEL)
        self._log_loss("caption_loss", batch.prompt, labels)
        self._log_loss("caption_loss_wrong_image", wrong_images(batch.prompt), labels)

    def save_model(self, folder: Path, tokenizer: Tokenizer) -> None:
        """mllm/ and tokenizer/."""
        save_mllm(self.mllm, tokenizer, folder)

    def _log_loss(self, name: str, prompt: PromptBatch, labels: Tensor) -> None:
        tokens = int((labels != IGNORED_LABEL).sum())
        if tokens:
            self.log_losses("val", {name: self.loss(prompt, labels)}, tokens)


def wrong_images(prompt: PromptBatch) -> PromptBatch:
    """The batch with its images moved on by one place, so that every slot shows another image."""
    return replace(prompt, images=None if prompt.images is None else prompt.images.roll(1, dims=0))
