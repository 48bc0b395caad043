"""Stage 3, instruction tuning by score distillation (paper section 2.3): eq. 8 through the frozen U-Net.

C = M(MLLM(prompt)); L_diff = E[w(t)‖ε_θ(z_t; C, t) − ε‖²]. The gradient reaches M and the MLLM through the U-Net's
Jacobian (eq. 9). With probability 0.1 a sample's whole condition gives way to the null condition, which carries
gradients too: it is computed as one more row of the same batch. Targets are images, or the VAE's moments of them, read
from disk (datamodules/moments). Trained: M, decoder, resampler, end of the image
tower. Frozen: U-Net, VAE, rest of the tower.

With `recipe.trains: aligner` and captions alone this is the end-to-end alignment of section 4.3: eq. 3 in place of
stage 2's losses, the MLLM frozen (configs/ablations/end_to_end_with_alignernet.yaml).

Shapes: `B` batch, `L` tokens, `I` images of the batch, `Q` queries, `C` condition width, `H` target pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kosmosg.losses import TimestepWeighting, diffusion_loss, timestep_weights
from kosmosg.models.aligner import Aligner
from kosmosg.models.build import build_aligner, build_mllm
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import KosmosG, drop_condition
from kosmosg.models.mllm import MLLM
from kosmosg.prompt import PromptBatch
from kosmosg.tokenizer import Tokenizer
from lightning_modules.base import StageExperiment, StageModule
from lightning_modules.language_modelling import wrong_images
from lightning_modules.length_groups import LengthGroups
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.randomness import DiffusionDraws, draw_diffusion
from lightning_modules.runs.trained_weights import VisionTraining, train_mllm
from lightning_modules.scale.sharding import with_blank_image_row


@dataclass
class InstructionTuningRecipe:
    trains: Literal["all", "aligner"] = "all"
    """aligner: the MLLM is frozen, without dropout, as in stage 2."""
    new_aligner: bool = False
    """Start the aligner from random weights; init_from then gives the MLLM alone."""
    condition_drop: float = 0.1
    """Probability that a sample's condition is replaced by the null condition."""
    draws_per_sample: int = 1
    """Timesteps and noises drawn for each condition; more make its gradient steadier at the U-Net's cost alone."""
    timesteps: Literal["independent", "even"] = "independent"
    """even: spread evenly over each batch, for a steadier gradient of the same expectation."""
    timestep_weighting: TimestepWeighting = "uniform"
    """w(t) of eq. 8: 1 (the released code), 1 − ᾱ_t (DreamFusion's σ_t²), or 1/ᾱ_t, at most 25 (as v-prediction)."""
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Which part of the image tower trains."""
    length_groups: int = 1
    """Parts of like length in which a batch's conditions are computed; the loss is the same, though dropout's draws are
    not."""

    def __post_init__(self) -> None:
        if self.length_groups < 1:
            raise ValueError(f"recipe.length_groups is {self.length_groups}; allowed: 1 or more")
        if not 0 <= self.condition_drop < 1:
            raise ValueError(f"recipe.condition_drop is {self.condition_drop}; allowed: in [0, 1)")
        if self.draws_per_sample < 1:
            raise ValueError(f"recipe.draws_per_sample is {self.draws_per_sample}; allowed: 1 or more")


class InstructionTuningModule(StageModule):
    """Batches: `prompt` PromptBatch, and `targets` B×3×H×H in [-1, 1] or their `moments` B×8×h×h.

    Raises:
        ValueError: M is not as wide as the U-Net's cross-attention.
    """

    def __init__(
        self,
        mllm: MLLM,
        aligner: Aligner,
        image_decoder: ImageDecoder,
        recipe: InstructionTuningRecipe,
        optimizer: OptimizerConfig,
        seed: int,
    ):
        super().__init__(optimizer, seed)
        if aligner.config.width != image_decoder.condition_width:
            raise ValueError(
                f"model.aligner.width is {aligner.config.width}, but the U-Net of model.image_decoder reads conditions "
                f"of width {image_decoder.condition_width}"
            )
        self.mllm, self.aligner, self.image_decoder = mllm, aligner, image_decoder
        self.recipe = recipe
        if recipe.trains == "all":
            train_mllm(mllm, recipe.vision_training)
        else:
            mllm.requires_grad_(False)
        aligner.requires_grad_(True)

    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: Tokenizer, image_decoder: ImageDecoder | None = None
    ) -> "InstructionTuningModule":
        return cls(
            build_mllm(experiment.model, tokenizer, experiment.init_from),
            build_aligner(experiment.model, None if experiment.recipe.new_aligner else experiment.init_from),
            image_decoder or ImageDecoder.from_pretrained(experiment.model.image_decoder),
            experiment.recipe,
            experiment.optimizer,
            experiment.seed,
        )

    def frozen_networks(self) -> Sequence[nn.Module]:
        return (self.image_decoder,) if self.recipe.trains == "all" else (self.image_decoder, self.mllm)

    def sharded_networks(self) -> Sequence[nn.Module]:
        return (self.mllm, self.aligner)

    def sample_losses(self, prompt: PromptBatch, targets: Tensor, draws: DiffusionDraws, drop: float) -> Tensor:
        """L_diff of each draw, B·n for n draws of each sample, those of one sample together.

        Args:
            targets: images, or the VAE's moments of them.
        """
        rows = len(prompt)
        each = len(draws.timesteps) // rows
        conditions = self.conditions(with_null_row(prompt, self.mllm.config.bos_id, self.mllm.config.pad_id))
        repeated = conditions[:rows].repeat_interleave(each, dim=0)
        condition = drop_condition(repeated, conditions[rows:], draws.uniform, drop)
        latents = self.image_decoder.latents(targets, draws.posterior)
        noisy = self.image_decoder.add_noise(latents, draws.noise, draws.timesteps)
        prediction = self.image_decoder(noisy, draws.timesteps, condition)
        return diffusion_loss(prediction, draws.noise, self.weights(draws.timesteps), reduction="none")

    def conditions(self, prompt: PromptBatch) -> Tensor:
        """C of each prompt, B×Q×C."""
        groups = LengthGroups(prompt, self.recipe.length_groups)
        # Sharded networks are gathered in every call; whole copies compare their gradients once.
        reads_images = self.meets_others and (self.device_mesh is not None or prompt.images is None)
        return groups.join([self._group_conditions(part, reads_images) for part in groups.parts])

    def _group_conditions(self, prompt: PromptBatch, reads_images: bool) -> Tensor:
        blank = reads_images and prompt.images is None
        batch = with_blank_image_row(prompt, self.mllm) if blank else prompt
        conditions = self.aligner(self.mllm(batch), batch.padding)
        return conditions[: len(prompt)] + 0 * conditions[len(prompt) :].sum()

    def weights(self, timesteps: Tensor) -> Tensor:
        """w(t) of eq. 8, B."""
        alphas = self.image_decoder.scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        return timestep_weights(alphas, self.recipe.timestep_weighting)

    def batch_loss(self, batch: Any) -> Tensor:
        return self._training_loss(batch, range(len(batch.prompt)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self._training_loss(batch, self.train_numbers(len(batch.prompt)))
        self.log_losses("train", {"loss": loss}, len(batch.prompt))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """val/diffusion_loss on draws that never change; over samples with images also with each image replaced by
        its neighbour in the batch, val/diffusion_loss_wrong_image, beside val/diffusion_loss_with_image."""
        rows = len(batch.prompt)
        first = (batch_idx * self.trainer.world_size + self.trainer.global_rank) * rows
        targets = given_targets(batch)
        draws = self._draws("validation", range(first, first + rows), targets)
        targets = targets if self.image_decoder.are_moments(targets) else self.image_decoder.moments(targets)
        right = self.sample_losses(batch.prompt, targets, draws, drop=0.0)
        self.log_losses("val", {"diffusion_loss": right.mean()}, rows)
        images = batch.prompt.images
        if not self.any_process(images is not None and len(images) > 1):
            return
        wrong = self.sample_losses(wrong_images(batch.prompt), targets, draws, drop=0.0)
        with_image = batch.prompt.image_mask.any(dim=1)
        count = int(with_image.sum())
        losses = {
            "diffusion_loss_with_image": right[with_image].sum() / max(1, count),
            "diffusion_loss_wrong_image": wrong[with_image].sum() / max(1, count),
        }
        self.log_losses("val", losses, count)

    def save_model(self, folder: Path, tokenizer: Tokenizer) -> None:
        """mllm/, aligner/ and tokenizer/."""
        KosmosG(self.mllm, self.aligner).save_pretrained(folder, tokenizer)

    def _training_loss(self, batch: Any, numbers: range) -> Tensor:
        each = self.recipe.draws_per_sample
        targets = given_targets(batch)
        draws = self._draws("train", range(numbers.start * each, numbers.stop * each), targets)
        return self.sample_losses(batch.prompt, targets, draws, self.recipe.condition_drop).mean()

    def _draws(self, purpose: str, numbers: range, targets: Tensor) -> DiffusionDraws:
        decoder = self.image_decoder
        side = targets.shape[-1] // (1 if decoder.are_moments(targets) else decoder.shrinkage)
        shape = (decoder.vae.config.latent_channels, side, side)
        even = self.recipe.timesteps == "even"
        draws = draw_diffusion(self.seed, purpose, numbers, shape, decoder.num_timesteps, even)
        return draws.to(self.device)


def given_targets(batch: Any) -> Tensor:
    """The batch's target images, or the VAE's moments of them where these were read."""
    return batch.targets if batch.moments is None else batch.moments


def with_null_row(prompt: PromptBatch, bos_id: int, pad_id: int) -> PromptBatch:
    """The batch with one more row, `<s>` alone: its condition is the null condition (golden README, "Stage-3 loss")."""
    row = torch.full_like(prompt.ids[:1], pad_id)
    row[:, 0] = bos_id
    padding = torch.ones_like(prompt.padding[:1])
    padding[:, 0] = False
    return replace(
        prompt,
        ids=torch.cat([prompt.ids, row]),
        image_mask=F.pad(prompt.image_mask, (0, 0, 0, 1)),
        padding=torch.cat([prompt.padding, padding]),
    )
