"""Stage 3, instruction tuning (paper section 2.3): the frozen image decoder's diffusion loss trains M and the MLLM.

With C = M(MLLM(prompt)), the loss is L_diff = E[w(t)‖ε_θ(z_t; C, t) − ε‖²] (eq. 8). Its gradient reaches M and the MLLM
through the denoiser's Jacobian (eq. 9). For classifier-free guidance, the condition of a sample is replaced by the null
condition with probability 0.1; the null condition is one more row of the batch and receives gradients as well. Trained:
M, the language decoder, the resampler and the end of the vision encoder. Frozen: the image decoder and the rest of the
vision encoder.

With `recipe.mse_weight` above 0, L_mse of stage 2 (eq. 5) is added, with the target's caption as the text.

With `recipe.trainable: aligner` and captions alone this is the end-to-end alignment of section 4.3: the MLLM is frozen
and eq. 3 replaces stage 2's losses (configs/ablations/end_to_end_with_alignernet.yaml).

Shapes: `B` batch, `n` timesteps per sample, `L` tokens, `Q` queries, `C` condition width, `H` target pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from kosmosg.batches import InstructionBatch
from kosmosg.condition import Condition
from kosmosg.image_processing import to_images
from kosmosg.losses import TimestepWeighting, diffusion_loss, text_losses
from kosmosg.models.aligner import Aligner
from kosmosg.models.build import (
    build_aligner,
    build_mllm,
    image_decoder_class,
    load_image_decoder,
    mllm_fingerprint,
)
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import MLLM, MultimodalLM, VisionTraining
from kosmosg.models.storage import fingerprint
from kosmosg.prompt import PromptBatch
from lightning_modules.base import (
    CacheEncoder,
    LoadDecoder,
    PromptShape,
    PromptTokenizer,
    Sample,
    StageExperiment,
    StageModule,
    fake_prompts,
    typical_shape,
)
from lightning_modules.length_buckets import length_buckets
from lightning_modules.lora import add_lora, merge_lora
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.randomness import DiffusionDraws, draw_diffusion

PROMPT_TOKENS, PROMPT_IMAGES = 160, 2


@dataclass
class InstructionTuningRecipe:
    trainable: Literal["all", "aligner"] = "all"
    """all: the MLLM and the aligner; aligner: the aligner alone, with the MLLM frozen in eval mode as in stage 2."""
    new_aligner: bool = False
    """Start the aligner from random weights; false: load it from init_from."""
    condition_dropout: float = 0.1
    """Probability that a sample's condition is replaced by the null condition."""
    timesteps_per_sample: int = 1
    """Timesteps and noises per condition; more reduce the gradient's variance and cost only denoiser passes."""
    timestep_sampling: Literal["independent", "low_discrepancy"] = "independent"
    """low_discrepancy: spread evenly over each batch, which reduces the variance of the gradient without bias."""
    timestep_weighting: TimestepWeighting = "uniform"
    """w(t) of eq. 8: 1 (the released code), 1 − ᾱ_t (DreamFusion's σ_t²), or 1/ᾱ_t, at most 25 (as v-prediction)."""
    snr_gamma: float | None = None
    """γ of min-SNR-γ, in place of timestep_weighting: w(t) = min(SNR, γ)/SNR, or min(SNR, γ)/(SNR + 1) if the decoder
    predicts the velocity; 5 is usual."""
    mse_weight: float = 0.0
    """Weight of L_mse (eq. 5) between the condition and the text model's states of the target's caption, for samples
    that have one. Above 0, the text model is loaded, too. Not in the paper."""
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Trainable part of the vision encoder."""
    lora_rank: int = 0
    """Above 0: train LoRA of this rank on the language model's linear layers, and freeze the rest of it."""
    length_buckets: int = 1
    """Number of parts of similar length that prompts are split into to compute their conditions, to save padding. The
    loss is the same, except that dropout draws different numbers."""

    def __post_init__(self) -> None:
        for name in ("length_buckets", "timesteps_per_sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"recipe.{name} is {getattr(self, name)}; allowed: 1 or more")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"recipe.snr_gamma is {self.snr_gamma}; allowed: null, or above 0")
        if self.snr_gamma is not None and self.timestep_weighting != "uniform":
            raise ValueError(
                f"recipe.snr_gamma is {self.snr_gamma} and recipe.timestep_weighting {self.timestep_weighting}; "
                "allowed: snr_gamma with uniform alone"
            )
        if self.lora_rank < 0 or (self.lora_rank and self.trainable != "all"):
            raise ValueError(
                f"recipe.lora_rank is {self.lora_rank} with recipe.trainable={self.trainable}; allowed: 0, or 1 and "
                "more with recipe.trainable=all"
            )
        if not self.mse_weight >= 0:
            raise ValueError(f"recipe.mse_weight is {self.mse_weight}; allowed: 0 or more")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"recipe.condition_dropout is {self.condition_dropout}; allowed: in [0, 1)")


class InstructionTuningModule(StageModule):
    """Stage 3: see the module docstring and `InstructionBatch`.

    Raises:
        ValueError: M's width or pooled width differs from the image decoder's, or the decoder does not support the
            timestep weighting.
    """

    Recipe = InstructionTuningRecipe
    draws_images = True
    cached_latents = False

    def __init__(
        self,
        mllm: MultimodalLM,
        aligner: Aligner,
        image_decoder: ImageDecoder,
        recipe: InstructionTuningRecipe,
        optimizer: OptimizerConfig,
        seed: int,
    ):
        super().__init__(optimizer, seed)
        spec = image_decoder.spec
        for key, value, expected in (
            ("width", aligner.config.width, spec.width),
            ("pooled_width", getattr(aligner.config, "pooled_width", None), spec.pooled),
        ):
            if value != expected:
                raise ValueError(f"model.aligner.{key} is {value}, but model.image_decoder reads {expected}")
        image_decoder.loss_weights(
            image_decoder.timesteps(torch.zeros(1)), recipe.timestep_weighting, recipe.snr_gamma
        )  # raises ValueError now rather than in the first step
        self.mllm, self.aligner, self.image_decoder, self.recipe = mllm, aligner, image_decoder, recipe
        if recipe.trainable == "all":
            mllm.set_trainable(recipe.vision_training)
            if recipe.lora_rank:
                add_lora(mllm, recipe.lora_rank)
        else:
            mllm.requires_grad_(False)
        aligner.requires_grad_(True)

    @classmethod
    def build(
        cls, experiment: StageExperiment, tokenizer: PromptTokenizer, load_decoder: LoadDecoder = load_image_decoder
    ) -> "InstructionTuningModule":
        model, recipe, data = experiment.model, experiment.recipe, experiment.data
        mllm: Any = build_mllm(model, tokenizer, experiment.init_from)
        aligner = build_aligner(model, None if recipe.new_aligner else experiment.init_from)
        decoder = load_decoder(model.image_decoder, "all" if recipe.mse_weight else "images")
        module = cls(mllm, aligner, decoder, recipe, experiment.optimizer, experiment.seed)
        if data.cached_vision:
            require_frozen_vision(experiment)
            mllm.vision.keep_last_blocks(recipe.vision_training.blocks)
        if data.cached_latents:
            decoder.drop_encoder()
        module.cached_latents = bool(data.cached_latents)
        return module

    @classmethod
    def cached_networks(cls, experiment: StageExperiment) -> dict[str, dict[str, str]]:
        model, data, caches = experiment.model, experiment.data, {}
        if data.cached_latents:
            _, autoencoder = image_decoder_class(model.image_decoder).networks
            caches["latents"] = {"network": fingerprint(model.image_decoder, autoencoder)}
        if data.cached_vision:
            require_frozen_vision(experiment)
            frozen_layers = model.mllm.vision.layers - experiment.recipe.vision_training.blocks

            def is_frozen(name: str) -> bool:
                _, _, layer = name.partition("vision.clip.encoder.layers.")
                before = not layer or int(layer.partition(".")[0]) < frozen_layers
                return name.startswith("vision.clip.") and "post_layernorm" not in name and before

            network = mllm_fingerprint(model, experiment.init_from, is_frozen)["network"]
            caches["vision"] = {"network": network, "layer": str(frozen_layers)}
        return caches

    def cache_encoders(self) -> dict[str, CacheEncoder]:
        def latents(images: list[Tensor]) -> list[dict[str, Tensor]]:
            device = next(self.image_decoder.autoencoder.parameters()).device
            return [{"moments": moments} for moments in self.moments([image.to(device) for image in images])]

        encoders = {"latents": CacheEncoder(self.image_decoder.autoencoder, latents)}
        if isinstance(self.mllm, MLLM):
            vision, blocks = self.mllm.vision, self.recipe.vision_training.blocks

            def states(images: list[Tensor]) -> list[dict[str, Tensor]]:
                device = vision.clip.post_layernorm.weight.device
                return [{"states": row} for row in vision.input_of_last_blocks(torch.stack(images).to(device), blocks)]

            encoders["vision"] = CacheEncoder(vision, states)
        return encoders

    @property
    def model(self) -> KosmosG:
        """MLLM and aligner as one network."""
        return KosmosG(self.mllm, self.aligner)

    def frozen_modules(self) -> Sequence[nn.Module]:
        return (self.image_decoder,) if self.recipe.trainable == "all" else (self.image_decoder, self.mllm)

    def sharded_modules(self) -> Sequence[nn.Module]:
        return (self.mllm, self.aligner)

    def sample_losses(
        self, condition: Condition, null: Condition, targets: Tensor, draws: DiffusionDraws, dropout: float
    ) -> Tensor:
        """L_diff (eq. 8) of each draw, B·n; the n draws of a sample are consecutive.

        Args:
            condition, null: see `conditions`.
            targets: images, or their moments (the VAE's posterior), all of one size.
            draws: draws for B·n timesteps.
            dropout: probability that a condition is replaced by the null condition.
        """
        decoder, rows = self.image_decoder, len(condition.states)
        repeated = condition.repeat_interleave(len(draws.time) // rows)
        dropped = repeated.replace_where(draws.dropout < dropout, null)
        timesteps = decoder.timesteps(draws.time)
        latents = decoder.latents(targets, draws.posterior)
        noisy = decoder.add_noise(latents, draws.noise, timesteps)
        prediction = decoder.predict(noisy, timesteps, dropped)
        target = decoder.training_target(latents, draws.noise, timesteps)
        weights = decoder.loss_weights(timesteps, self.recipe.timestep_weighting, self.recipe.snr_gamma)
        return diffusion_loss(prediction, target, weights, reduction="none")

    def conditions(self, prompt: PromptBatch) -> tuple[Condition, Condition]:
        """C = M(MLLM(prompt)) of each prompt, and the null condition, a single row."""
        with_null = self.image_decoder.spec.unconditional == "prompt"
        rows = len(prompt)
        if with_null:
            prompt = prompt.join(self.mllm.unconditional_prompt().to(prompt.ids.device))
        buckets = length_buckets(prompt.lengths, self.recipe.length_buckets)
        # The vision encoder must run once, to get a gradient; in every call if networks are sharded.
        dummy_image = self.recipe.trainable == "all" and prompt.images is None
        if len(buckets) == 1:
            conditions = self.condition(prompt, self.mllm, self.aligner, dummy_image or self.is_sharded)
        else:
            parts = [
                self.condition(
                    prompt.rows(bucket), self.mllm, self.aligner, self.is_sharded or (dummy_image and not number)
                )
                for number, bucket in enumerate(buckets)
            ]
            order = torch.tensor([row for bucket in buckets for row in bucket], device=prompt.ids.device).argsort()
            conditions = Condition.cat(parts).rows(order)
        if not with_null:
            return conditions, self.image_decoder.spec.null(conditions.rows(slice(0, 1)))
        return conditions.rows(slice(0, rows)), conditions.rows(slice(rows, None))

    def diffusion_losses(
        self, purpose: str, batch: InstructionBatch, conditions: tuple[Condition, Condition], dropout: float = 0.0
    ) -> Tensor:
        """`sample_losses` of a batch with its own draws. Rows are grouped by target size, so that each group goes
        through the decoder together."""
        condition, null = conditions
        if isinstance(batch.targets, Tensor):
            return self.sample_losses(condition, null, batch.targets, self.draws(purpose, batch), dropout)
        losses: dict[int, Tensor] = {}
        for rows, targets in group_by_size(batch.targets):
            draws = self.draws(purpose, replace(batch, targets=targets, indices=[batch.indices[row] for row in rows]))
            group = self.sample_losses(condition.rows(rows), null, targets, draws, dropout)
            losses |= zip(rows, group.view(len(rows), -1), strict=True)
        return torch.cat([losses[row] for row in range(len(batch))])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """`loss`; with L_mse also its terms, `diffusion_loss` (eq. 8) and `mse_loss` (eq. 5)."""
        recipe, conditions = self.recipe, self.conditions(batch.prompt)
        diffusion = self.diffusion_losses("train", batch, conditions, recipe.condition_dropout).mean()
        if not recipe.mse_weight:
            return {"loss": diffusion}
        mse = self.text_loss(conditions[0], batch.text_ids)
        return {"loss": diffusion + recipe.mse_weight * mse, "diffusion_loss": diffusion, "mse_loss": mse}

    def text_loss(self, condition: Condition, text_ids: Tensor) -> Tensor:
        """L_mse (eq. 5), a mean over all rows. Rows without a caption contribute 0, so that the step's loss does not
        depend on how it is divided into micro-batches."""
        target = self.image_decoder.text_condition(text_ids.clamp(min=0))
        return (text_losses(condition, target) * (text_ids[:, 0] >= 0)).mean()

    def draws(self, purpose: str, batch: InstructionBatch) -> DiffusionDraws:
        """n timesteps and noises for each row, seeded by its index."""
        count = self.recipe.timesteps_per_sample if purpose == "train" else 1
        assert isinstance(batch.targets, Tensor)
        shape = self.image_decoder.latent_shape(batch.targets)
        indices = [index * count + number for index in batch.indices for number in range(count)]
        low_discrepancy = self.recipe.timestep_sampling == "low_discrepancy"
        return draw_diffusion(self.seed, purpose, indices, shape, low_discrepancy).to(self.device)

    def validation_losses(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """`diffusion_loss`, with the same draws in every validation; for samples with images also
        `diffusion_loss_with_image`, and `diffusion_loss_mismatched_images` with each image replaced by the next one."""
        batch = replace(batch, targets=self.moments(batch.targets))
        matched = self.diffusion_losses("validation", batch, self.conditions(batch.prompt))
        losses = {"diffusion_loss": (matched.mean(), len(batch))}
        images = batch.prompt.images
        if self.any_rank(images is not None and len(images) > 1):
            mismatched = self.diffusion_losses("validation", batch, self.conditions(batch.prompt.roll_images()))
            rows = [row for row, count in enumerate(batch.prompt.images_per_row) if count]
            losses["diffusion_loss_with_image"] = (matched[rows].sum() / max(1, len(rows)), len(rows))
            losses["diffusion_loss_mismatched_images"] = (mismatched[rows].sum() / max(1, len(rows)), len(rows))
        return losses

    def moments(self, targets: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Moments (the VAE's posterior) of target images; cached moments are returned as they are."""
        if isinstance(targets, list):
            by_row = {
                row: value
                for rows, group in group_by_size(targets)
                for row, value in zip(rows, self.moments(group), strict=True)
            }
            return [by_row[row] for row in range(len(targets))]
        return targets if self.image_decoder.are_moments(targets) else self.image_decoder.moments(targets)

    def prompt_shape(self, experiment: StageExperiment) -> PromptShape:
        return typical_shape(self.mllm, PROMPT_TOKENS, PROMPT_IMAGES)

    def fake_batch(self, rows: int, shape: PromptShape, image_size: int) -> InstructionBatch:
        prompt = fake_prompts(self.mllm, rows, shape)
        targets = torch.zeros(rows, 3, image_size, image_size, device=prompt.ids.device)
        if self.cached_latents:
            channels, *sides = self.image_decoder.latent_shape(targets)
            targets = targets.new_zeros(rows, channels, *sides)
            if not self.image_decoder.are_moments(targets):  # means and log-variances
                targets = targets.repeat(1, 2, 1, 1)
        text_ids = None
        if self.recipe.mse_weight:
            text_ids = torch.zeros(rows, self.image_decoder.spec.tokens, dtype=torch.int64, device=prompt.ids.device)
        return InstructionBatch(prompt=prompt, targets=targets, text_ids=text_ids, indices=list(range(rows)))

    def reference_images(self, batch: Any, sample: Sample) -> list[Image.Image]:
        """The target images of the samples."""
        targets, decoder = batch.targets, self.image_decoder
        if isinstance(targets, list):
            singles = (replace(batch, targets=target[None]) for target in targets)
            return [image for single in singles for image in self.reference_images(single, sample)]
        if decoder.are_moments(targets):
            noise = torch.zeros(len(targets), *decoder.latent_shape(targets), device=self.device)
            targets = decoder.decode(decoder.latents(targets.to(self.device), noise))
        return to_images(targets)

    def save_model(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        """Write mllm/, aligner/ and tokenizer/. LoRA is merged into the weights, so training cannot continue."""
        merge_lora(self.mllm)
        self.model.save_pretrained(folder, tokenizer)


def group_by_size(targets: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Group targets by size; returns the rows and the stacked targets of each group."""
    rows: dict[torch.Size, list[int]] = {}
    for row, target in enumerate(targets):
        rows.setdefault(target.shape, []).append(row)
    return [(group, torch.stack([targets[row] for row in group])) for _, group in sorted(rows.items())]


def require_frozen_vision(experiment: StageExperiment) -> None:
    """Check that vision states can be cached: the MLLM is the paper's, and a part of its vision encoder is frozen.

    Raises:
        ValueError: a key has a value that is not allowed with `data.cached_vision`.
    """
    if experiment.model.language_model is not None:
        raise ValueError("data.cached_vision is set with model.language_model; allowed only with the paper's MLLM")
    if experiment.recipe.vision_training.blocks == -1:
        raise ValueError(
            "recipe.vision_training.blocks is -1, which trains the whole vision encoder; allowed with "
            "data.cached_vision: 0 or more"
        )
