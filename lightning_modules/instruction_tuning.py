"""Stage 3, instruction tuning by score distillation (paper section 2.3): eq. 8 through the frozen image decoder.

C = M(MLLM(prompt)); L_diff = E[w(t)‖ε_θ(z_t; C, t) − ε‖²]. The gradient reaches M and the MLLM through the denoiser's
Jacobian (eq. 9). With probability 0.1 a sample's whole condition gives way to the null condition, which carries
gradients too: it is computed as one more row of the same batch. Trainable: M, decoder, resampler, end of the vision
encoder. Frozen: image decoder, rest of the vision encoder.

With `recipe.mse_weight` above 0, L_mse of stage 2 stays as a second term, towards the text of the target's caption.

With `recipe.trainable: aligner` and captions alone this is the end-to-end alignment of section 4.3: eq. 3 in place of
stage 2's losses, the MLLM frozen (configs/ablations/end_to_end_with_alignernet.yaml).

Shapes: `B` batch, `n` timesteps of each sample, `L` tokens, `Q` queries, `C` condition width, `H` target pixels.
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
    usual_shape,
)
from lightning_modules.length_buckets import length_buckets
from lightning_modules.lora import add_lora, merge_lora
from lightning_modules.optimizer import OptimizerConfig
from lightning_modules.randomness import DiffusionDraws, draw_diffusion

PROMPT_TOKENS, PROMPT_IMAGES = 160, 2


@dataclass
class InstructionTuningRecipe:
    trainable: Literal["all", "aligner"] = "all"
    """all: the MLLM and the aligner; aligner: the MLLM is frozen, without dropout, as in stage 2."""
    new_aligner: bool = False
    """Start the aligner from random weights; only the MLLM is then read from init_from."""
    condition_dropout: float = 0.1
    """Probability that a sample's condition is replaced by the null condition."""
    timesteps_per_sample: int = 1
    """Timesteps and noises drawn for each condition; more make its gradient steadier at the denoiser's cost alone."""
    timestep_sampling: Literal["independent", "low_discrepancy"] = "independent"
    """low_discrepancy: spread evenly over each batch, for a steadier gradient of the same expectation."""
    timestep_weighting: TimestepWeighting = "uniform"
    """w(t) of eq. 8: 1 (the released code), 1 − ᾱ_t (DreamFusion's σ_t²), or 1/ᾱ_t, at most 25 (as v-prediction)."""
    snr_gamma: float | None = None
    """γ of min-SNR-γ, in place of timestep_weighting: w(t) = min(SNR, γ)/SNR, or /(SNR + 1) where the decoder predicts
    the velocity; 5 is usual."""
    mse_weight: float = 0.0
    """Weight of L_mse (eq. 5) to the text model's states of the target's caption, where it is known in words; above 0,
    the text model is loaded, too. Not in the paper."""
    vision_training: VisionTraining = field(default_factory=VisionTraining)
    """Which part of the vision encoder trains."""
    lora_rank: int = 0
    """Above 0, the language model's linear maps train by updates of this rank (LoRA); the rest of it is frozen."""
    length_buckets: int = 1
    """Parts of similar length into which prompts are split to compute their conditions, to save padding. The loss is
    the same, except that dropout draws other numbers."""

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
                f"recipe.lora_rank is {self.lora_rank} with recipe.trainable={self.trainable}; allowed: 0, or with "
                "all 1 or more"
            )
        if not self.mse_weight >= 0:
            raise ValueError(f"recipe.mse_weight is {self.mse_weight}; allowed: 0 or more")
        if not 0 <= self.condition_dropout < 1:
            raise ValueError(f"recipe.condition_dropout is {self.condition_dropout}; allowed: in [0, 1)")


class InstructionTuningModule(StageModule):
    """See `InstructionBatch`.

    Raises:
        ValueError: M's condition is not of the image decoder's widths, or the decoder does not have the weighting.
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
        for key, ours, theirs in (
            ("width", aligner.config.width, spec.width),
            ("pooled_width", getattr(aligner.config, "pooled_width", None), spec.pooled),
        ):
            if ours != theirs:
                raise ValueError(f"model.aligner.{key} is {ours}, but model.image_decoder reads {theirs}")
        image_decoder.loss_weights(
            image_decoder.timesteps(torch.zeros(1)), recipe.timestep_weighting, recipe.snr_gamma
        )  # refused here rather than in the first step
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
        model, data, found = experiment.model, experiment.data, {}
        if data.cached_latents:
            _, autoencoder = image_decoder_class(model.image_decoder).networks
            found["latents"] = {"network": fingerprint(model.image_decoder, autoencoder)}
        if data.cached_vision:
            require_frozen_vision(experiment)
            blocks = experiment.recipe.vision_training.blocks
            kept = model.mllm.vision.layers - blocks

            def wanted(name: str) -> bool:
                _, _, layer = name.partition("vision.clip.encoder.layers.")
                frozen = not layer or int(layer.partition(".")[0]) < kept
                return name.startswith("vision.clip.") and "post_layernorm" not in name and frozen

            network = mllm_fingerprint(model, experiment.init_from, wanted)["network"]
            found["vision"] = {"network": network, "layer": str(kept)}
        return found

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
        """L_diff of each draw, B·n, those of one sample together.

        Args:
            condition, null: see `conditions`.
            targets: images, or the VAE's moments of them.
            draws: of B·n timesteps.
            dropout: probability of the null condition.
        """
        decoder, rows = self.image_decoder, len(condition.states)
        repeated = condition.repeat_interleave(len(draws.time) // rows)
        read = repeated.replace_where(draws.dropout < dropout, null)
        timesteps = decoder.timesteps(draws.time)
        latents = decoder.latents(targets, draws.posterior)
        noisy = decoder.add_noise(latents, draws.noise, timesteps)
        prediction = decoder.predict(noisy, timesteps, read)
        target = decoder.training_target(latents, draws.noise, timesteps)
        weights = decoder.loss_weights(timesteps, self.recipe.timestep_weighting, self.recipe.snr_gamma)
        return diffusion_loss(prediction, target, weights, reduction="none")

    def conditions(self, prompt: PromptBatch) -> tuple[Condition, Condition]:
        """C of each prompt, and the null condition, one row."""
        with_null = self.image_decoder.spec.unconditional == "prompt"
        rows = len(prompt)
        if with_null:
            prompt = prompt.join(self.mllm.unconditional_prompt().to(prompt.ids.device))
        buckets = length_buckets(prompt.lengths, self.recipe.length_buckets)
        # Without any image the vision encoder would get no gradient; sharded networks are gathered in every call.
        wants_image = self.recipe.trainable == "all" and prompt.images is None
        if len(buckets) == 1:
            conditions = self.condition(prompt, self.mllm, self.aligner, wants_image or self.is_sharded)
        else:
            parts = [
                self.condition(
                    prompt.rows(bucket), self.mllm, self.aligner, self.is_sharded or (wants_image and not number)
                )
                for number, bucket in enumerate(buckets)
            ]
            places = torch.tensor([row for bucket in buckets for row in bucket], device=prompt.ids.device).argsort()
            conditions = Condition.cat(parts).rows(places)
        if not with_null:
            return conditions, self.image_decoder.spec.null(conditions.rows(slice(0, 1)))
        return conditions.rows(slice(0, rows)), conditions.rows(slice(rows, None))

    def diffusion_losses(
        self, purpose: str, batch: InstructionBatch, conditions: tuple[Condition, Condition], dropout: float = 0.0
    ) -> Tensor:
        """`sample_losses` of a batch with its own draws; rows whose targets are of one size go through the decoder
        together, whatever else is in the batch."""
        condition, null = conditions
        if isinstance(batch.targets, Tensor):
            return self.sample_losses(condition, null, batch.targets, self.draws(purpose, batch), dropout)
        losses: dict[int, Tensor] = {}
        for rows, targets in size_groups(batch.targets):
            draws = self.draws(purpose, replace(batch, targets=targets, indices=[batch.indices[row] for row in rows]))
            found = self.sample_losses(condition.rows(rows), null, targets, draws, dropout)
            losses |= zip(rows, found.view(len(rows), -1), strict=True)
        return torch.cat([losses[row] for row in range(len(batch))])

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """`loss`; with an alignment term also its parts, `diffusion_loss` and `mse_loss`."""
        recipe, conditions = self.recipe, self.conditions(batch.prompt)
        diffusion = self.diffusion_losses("train", batch, conditions, recipe.condition_dropout).mean()
        if not recipe.mse_weight:
            return {"loss": diffusion}
        mse = self.text_loss(conditions[0], batch.text_ids)
        return {"loss": diffusion + recipe.mse_weight * mse, "diffusion_loss": diffusion, "mse_loss": mse}

    def text_loss(self, condition: Condition, text_ids: Tensor) -> Tensor:
        """L_mse of eq. 5, the mean over all rows; those without a caption count 0, so that it is the same however a
        step is divided."""
        target = self.image_decoder.text_condition(text_ids.clamp(min=0))
        return (text_losses(condition, target) * (text_ids[:, 0] >= 0)).mean()

    def draws(self, purpose: str, batch: InstructionBatch) -> DiffusionDraws:
        """n timesteps and noises for each row, by its index."""
        each = self.recipe.timesteps_per_sample if purpose == "train" else 1
        assert isinstance(batch.targets, Tensor)
        shape = self.image_decoder.latent_shape(batch.targets)
        indices = [index * each + number for index in batch.indices for number in range(each)]
        low_discrepancy = self.recipe.timestep_sampling == "low_discrepancy"
        return draw_diffusion(self.seed, purpose, indices, shape, low_discrepancy).to(self.device)

    def validation_losses(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        """`diffusion_loss` on draws that never change; over samples with images also `diffusion_loss_with_image` and
        the same with each image replaced by its neighbour in the batch, `diffusion_loss_mismatched_images`."""
        batch = replace(batch, targets=self.moments(batch.targets))
        right = self.diffusion_losses("validation", batch, self.conditions(batch.prompt))
        losses = {"diffusion_loss": (right.mean(), len(batch))}
        images = batch.prompt.images
        if self.any_rank(images is not None and len(images) > 1):
            wrong = self.diffusion_losses("validation", batch, self.conditions(batch.prompt.roll_images()))
            with_image = torch.tensor([count > 0 for count in batch.prompt.images_per_row], device=right.device)
            count = sum(count > 0 for count in batch.prompt.images_per_row)
            losses["diffusion_loss_with_image"] = (right[with_image].sum() / max(1, count), count)
            losses["diffusion_loss_mismatched_images"] = (wrong[with_image].sum() / max(1, count), count)
        return losses

    def moments(self, targets: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Of targets, if they are not moments already."""
        if isinstance(targets, list):
            found = {
                row: value
                for rows, group in size_groups(targets)
                for row, value in zip(rows, self.moments(group), strict=True)
            }
            return [found[row] for row in range(len(targets))]
        return targets if self.image_decoder.are_moments(targets) else self.image_decoder.moments(targets)

    def prompt_shape(self, experiment: StageExperiment) -> PromptShape:
        return usual_shape(self.mllm, PROMPT_TOKENS, PROMPT_IMAGES)

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
        """The samples' own targets."""
        targets, decoder = batch.targets, self.image_decoder
        if isinstance(targets, list):
            each = (replace(batch, targets=target[None]) for target in targets)
            return [image for one in each for image in self.reference_images(one, sample)]
        if decoder.are_moments(targets):
            noise = torch.zeros(len(targets), *decoder.latent_shape(targets), device=self.device)
            targets = decoder.decode(decoder.latents(targets.to(self.device), noise))
        return to_images(targets)

    def save_model(self, folder: Path, tokenizer: PromptTokenizer) -> None:
        """mllm/, aligner/ and tokenizer/. LoRA's updates are merged, so that the module trains no more."""
        merge_lora(self.mllm)
        self.model.save_pretrained(folder, tokenizer)


def size_groups(targets: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Rows whose targets are of one size, and those targets stacked."""
    rows: dict[torch.Size, list[int]] = {}
    for row, target in enumerate(targets):
        rows.setdefault(target.shape, []).append(row)
    return [(group, torch.stack([targets[row] for row in group])) for _, group in sorted(rows.items())]


def require_frozen_vision(experiment: StageExperiment) -> None:
    """Refuse cached states where what makes them trains, or is not the paper's vision encoder.

    Raises:
        ValueError: names the key.
    """
    if experiment.model.language_model is not None:
        raise ValueError("data.cached_vision is set with model.language_model; allowed: the paper's MLLM")
    if experiment.recipe.vision_training.blocks == -1:
        raise ValueError(
            "recipe.vision_training.blocks is -1, so that the whole vision encoder trains; allowed with "
            "data.cached_vision: 0 or more"
        )
