"""Stage 1, multimodal language modelling (paper section 2.1): next-token cross-entropy on text tokens.

Trained: the decoder with its embeddings, the resampler, the end of the image tower. Frozen: the rest of the tower.

Shapes: `B` batch, `L` tokens, `I` images of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kosmosg.losses import IGNORED_LABEL, LOSS_CHUNK, language_modelling_loss
from kosmosg.models.build import build_mllm
from kosmosg.models.mllm import MLLM
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageExperiment, StageModule, save_mllm
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.runs.trained_weights import VisionTraining, train_mllm
from lightning_modules.scale.sharding import with_blank_image_row


@dataclass
class LanguageModellingRecipe:
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Which part of the image tower trains."""
    separate_documents: bool = False
    """Documents of one packed row neither read each other nor share positions; with false they do, as usual."""
    loss_chunk: int | None = LOSS_CHUNK
    """Positions whose logits stand in memory at once; null for all of the batch. The loss is the same."""

    def __post_init__(self) -> None:
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(f"recipe.loss_chunk is {self.loss_chunk}; allowed: 1 or more, or null")


class LanguageModellingModule(StageModule):
    """Batches: `prompt` PromptBatch and `labels` B×L int64, the token to predict at each position, -100 ignored."""

    def __init__(self, mllm: MLLM, recipe: LanguageModellingRecipe, optimizer: OptimizerConfig, seed: int):
        super().__init__(optimizer, seed)
        self.mllm, self.recipe = mllm, recipe
        self._pass_tokens: list[Tensor] = []  # of the update under way, pass by pass
        train_mllm(mllm, recipe.vision_training)

    @classmethod
    def build(cls, experiment: StageExperiment, tokenizer: Tokenizer) -> "LanguageModellingModule":
        mllm = build_mllm(experiment.model, tokenizer, experiment.init_from)
        return cls(mllm, experiment.recipe, experiment.optimizer, experiment.seed)

    def sharded_networks(self) -> Sequence[nn.Module]:
        return (self.mllm,)

    def loss(self, prompt: PromptBatch, labels: Tensor) -> Tensor:
        """Mean next-token cross-entropy over the labels that count; 0 without any."""
        rows, length = labels.shape
        if self.meets_others and prompt.images is None:
            prompt = with_blank_image_row(prompt, self.mllm)
        hidden = self.mllm(prompt, separate_documents=self.recipe.separate_documents)
        loss = language_modelling_loss(
            hidden[:rows, :length], self.mllm.output_matrix, labels, chunk=self.recipe.loss_chunk
        )
        return loss + 0 * hidden[rows:].sum()

    def batch_loss(self, batch: Any) -> Tensor:
        return self.loss(batch.prompt, batch.labels)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch.prompt, batch.labels) * self._token_share(batch.labels)
        self.log_losses("train", {"loss": loss}, len(batch.prompt))
        return loss * self._against_first_pass()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """val/loss over all rows; over rows with images, val/caption_loss and the same with each image replaced by its
        neighbour in the batch, val/caption_loss_wrong_image: their distance says how much the images are read."""
        prompt, labels = batch.prompt, batch.labels
        self._log_loss("loss", prompt, labels)
        if not self.any_process(prompt.images is not None and len(prompt.images) > 1):
            return
        with_images = prompt.image_mask.any(dim=1, keepdim=True)
        labels = labels.masked_fill(~with_images, IGNORED_LABEL)
        self._log_loss("caption_loss", prompt, labels)
        self._log_loss("caption_loss_wrong_image", wrong_images(prompt), labels)

    def _token_share(self, labels: Tensor) -> Tensor | float:
        """This process's share of the counted labels, times the processes: the mean over processes of the product with
        their own means is the mean over all tokens."""
        processes, passes = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if processes == passes == 1:
            return 1.0
        tokens = (labels != IGNORED_LABEL).sum()
        everywhere = self.trainer.strategy.reduce(tokens.clone(), reduce_op="sum").clamp(min=1)
        self._pass_tokens = [*([] if self.forward_pass % passes == 0 else self._pass_tokens), everywhere]
        return tokens * processes / everywhere

    def pass_weight(self) -> float | Tensor:
        """The tokens of the present forward pass, over all processes."""
        return self._pass_tokens[-1] if self._pass_tokens else 1.0

    def _against_first_pass(self) -> Tensor | float:
        """Tokens of this pass beside those of the update's first: an update is a mean over tokens, however many passes
        it is made of. How many tokens there are in all is known at its end alone, see finish_gradients."""
        return self._pass_tokens[-1] / self._pass_tokens[0] if len(self._pass_tokens) > 1 else 1.0

    def finish_gradients(self, gradients: list[Tensor]) -> None:
        """From the mean over passes, weighed against the first, to the mean over all tokens."""
        if len(self._pass_tokens) > 1:
            factor = len(self._pass_tokens) * self._pass_tokens[0] / torch.stack(self._pass_tokens).sum()
            for gradient in gradients:
                gradient.mul_(factor)

    def save_model(self, folder: Path, tokenizer: Tokenizer) -> None:
        """mllm/ and tokenizer/."""
        save_mllm(self.mllm, tokenizer, folder)

    def _log_loss(self, name: str, prompt: PromptBatch, labels: Tensor) -> None:
        self.log_losses("val", {name: self.loss(prompt, labels)}, int((labels != IGNORED_LABEL).sum()))


def wrong_images(prompt: PromptBatch) -> PromptBatch:
    """The batch with its images moved on by one place, so that every slot shows another image."""
    return replace(prompt, images=None if prompt.images is None else prompt.images.roll(1, dims=0))
