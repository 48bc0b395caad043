"""Stable Diffusion 1.x and 2.x as an image decoder (paper section 2.2): U-Net, VAE and CLIP text model of diffusers.

Notable: the U-Net predicts the noise, or in 2.1 at 768 pixels the velocity (Salimans and Ho 2022, arXiv 2202.00512), as
set in the scheduler's configuration. The condition has no mask: the U-Net attends to CLIP's padding too. Captions are
cleaned as by OpenAI's CLIP tokenizer, which the tokenizer of transformers does not do.

Shapes: `B` batch, `H×W` image pixels, `c×h×w` latents, `Q` condition tokens (77), `C` condition width (768; in 2.x
1024).
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import ftfy
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kosmosg.condition import Condition, ConditionSpec
from kosmosg.losses import TimestepWeighting, min_snr_weights, timestep_weights
from kosmosg.models.image_decoder import ImageDecoder, Parts, with_values
from kosmosg.models.published import decoder_configs
from kosmosg.models.storage import load_network

DOWNSCALE = 8


class EmbeddedStableDiffusion(StableDiffusionPipeline):
    """StableDiffusionPipeline without a text encoder, which would fail when it passes the LoRA scale to it."""

    def encode_prompt(self, *arguments: Any, lora_scale: float | None = None, **options: Any) -> tuple:
        return super().encode_prompt(*arguments, **options)


class StableDiffusion(ImageDecoder):
    """Stable Diffusion behind the interface of `ImageDecoder`. Components may be None if no method needs them.

    Args:
        scheduler: provides ᾱ_t, the number of training timesteps and the prediction type, noise or velocity.

    Raises:
        ValueError: the prediction type is not supported, or the U-Net is of another family.
    """

    title = "Stable Diffusion"
    networks: ClassVar = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    text_models: ClassVar = {"text_encoder": CLIPTextModel}
    pipeline_options: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    embedding: ClassVar[str | None] = None
    """`addition_embed_type` in the U-Net's configuration: what it embeds in addition to the timestep."""

    def __init__(
        self,
        unet: Any = None,  # Any, because diffusers types the configurations of its models as dictionaries
        vae: Any = None,
        scheduler: Any = None,
        text_encoder: Any = None,
        tokenizer: CLIPTokenizer | None = None,
    ):
        super().__init__()
        self.prediction: Any = None if scheduler is None else scheduler.config.get("prediction_type")
        if scheduler is not None and self.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"the image decoder's scheduler, a {type(scheduler).__name__}, has prediction_type="
                f"{self.prediction!r}; allowed: 'epsilon' (eq. 8) and 'v_prediction'."
            )
        if unet is not None and unet.config.addition_embed_type != self.embedding:
            raise ValueError(
                f"the U-Net has addition_embed_type={unet.config.addition_embed_type!r}, but {self.title}'s has "
                f"{self.embedding!r}: it belongs to another family, which model_index.json should name."
            )
        self.unet: Any = unet
        self.vae: Any = vae
        self.text_encoder: Any = text_encoder
        self.tokenizer: Any = tokenizer
        self.scheduler: Any = scheduler
        # The noise schedule of training, independent of the scheduler used for sampling.
        self.schedule: Any = None if scheduler is None else DDPMScheduler.from_config(scheduler.config)
        tokens = 77 if text_encoder is None else text_encoder.config.max_position_embeddings
        network: Any = text_encoder if unet is None else unet
        width = network.config.hidden_size if unet is None else network.config.cross_attention_dim
        self.spec = ConditionSpec(tokens, width)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, parts: Parts = "all", torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "StableDiffusion":
        networks: dict[str, Any] = {}
        options = {"dtype": torch_dtype, **options}
        if parts != "text":
            networks = {name: load_network(kind, source, name, **options) for name, kind in cls.networks.items()}
            networks["scheduler"] = cls.read_scheduler(source)
        if parts != "images":
            for part, kind in cls.text_models.items():
                networks[part] = load_network(kind, source, part, dtype=torch_dtype)
                tokenizer = part.replace("text_encoder", "tokenizer")
                networks[tokenizer] = CLIPTokenizer.from_pretrained(source, subfolder=tokenizer)
        return cls(**networks).freeze()

    @classmethod
    def read_scheduler(cls, source: str | Path) -> Any:
        return DDPMScheduler.from_pretrained(source, subfolder="scheduler")

    @classmethod
    def from_config(cls, source: str | Path, parts: Parts = "all") -> "StableDiffusion":
        configs = decoder_configs(source, (*cls.networks, "scheduler", *cls.text_models))
        networks: dict[str, Any] = {}
        if parts != "text":
            networks = {name: kind.from_config(configs[name]) for name, kind in cls.networks.items()}
            with with_values():
                networks["scheduler"] = DDPMScheduler.from_config(configs["scheduler"])
        if parts != "images":
            for part, kind in cls.text_models.items():
                networks[part] = kind(CLIPTextConfig(**configs[part]))
        return cls(**networks).freeze()

    @property
    def has_text_model(self) -> bool:
        return self.text_encoder is not None

    def clean(self, text: str) -> str:
        """Clean a caption as OpenAI's CLIP tokenizer: fix encoding errors, ligatures, full-width letters and curly
        quotes, unescape HTML entities twice, collapse whitespace, convert to lower case."""
        if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy is slow and leaves other texts unchanged
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return re.sub(r"\s+", " ", text).strip().lower()

    def tokenize(self, texts: Sequence[str], *, truncation: bool = True, clean: bool = True) -> Tensor:
        length = self.spec.tokens
        if clean:
            texts = [self.clean(text) for text in texts]
        ids = self.tokenizer(list(texts), padding="max_length", truncation=truncation, max_length=length).input_ids
        for text, row in zip(texts, ids, strict=True):
            if len(row) > length:
                raise ValueError(f"the caption {text!r} has {len(row)} CLIP tokens; allowed: at most {length}.")
        return torch.tensor(ids)

    @torch.no_grad()
    def text_condition(self, text_ids: Tensor) -> Condition:
        """Return the last hidden states after the final norm."""
        return Condition(self.text_encoder(input_ids=text_ids).last_hidden_state)

    @property
    def downscale(self) -> int:
        """H / h."""
        return DOWNSCALE if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        size = self.unet.config.sample_size
        size = (size, size) if isinstance(size, int) else size
        sides = [
            trained * self.downscale if side is None else side
            for side, trained in zip((height, width), size, strict=True)
        ]
        if any(side < 1 or side % self.downscale for side in sides):
            raise ValueError(
                f"height={height} and width={width} are not allowed; allowed: positive multiples of {self.downscale}."
            )
        return sides[0], sides[1]

    def latent_shape(self, targets: Tensor) -> tuple[int, int, int]:
        factor = 1 if self.are_moments(targets) else self.downscale
        height, width = targets.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"target images are {(height, width)} but the VAE needs sides that are multiples of {factor}."
            )
        return self.vae.config.latent_channels, height // factor, width // factor

    def are_moments(self, targets: Tensor) -> bool:
        return targets.shape[1] == 2 * self.vae.config.latent_channels

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return means and log-variances, B×2c×h×w."""
        self.latent_shape(images)
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def latents(self, targets: Tensor, noise: Tensor) -> Tensor:
        posterior = DiagonalGaussianDistribution(targets if self.are_moments(targets) else self.moments(targets))
        times = len(noise) // len(targets)
        mean, std = posterior.mean.repeat_interleave(times, 0), posterior.std.repeat_interleave(times, 0)
        return (mean + std * noise.to(mean.dtype)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Return timesteps uniform in 0 … num_train_timesteps − 1, int64."""
        return (uniform * self.schedule.config.num_train_timesteps).long()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(ᾱ_t) z_0 + sqrt(1 − ᾱ_t) ε (eq. 1)."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """ε_θ(z_t; C, t), or v_θ."""
        self.check(condition)
        dtype = self.unet.dtype
        return self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=condition.states.to(dtype)).sample

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """ε, or v = sqrt(ᾱ_t) ε − sqrt(1 − ᾱ_t) z_0."""
        return noise if self.prediction == "epsilon" else self.schedule.get_velocity(latents, noise, timesteps)

    def loss_weights(self, timesteps: Tensor, weighting: TimestepWeighting, snr_gamma: float | None = None) -> Tensor:
        """Return w(t) of eq. 8, B. Weightings other than uniform are defined for ε, min-SNR-γ also for v."""
        alphas = self.schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        if snr_gamma is not None:
            return min_snr_weights(alphas, snr_gamma, self.prediction)
        if weighting != "uniform" and self.prediction != "epsilon":
            raise ValueError(
                f"recipe.timestep_weighting={weighting!r} is not defined for an image decoder that predicts the "
                "velocity; allowed: 'uniform', or recipe.snr_gamma."
            )
        return timestep_weights(alphas, weighting)

    def diffusers_pipeline(self) -> Any:
        # Replaced at each call; these settings avoid deprecation warnings of diffusers.
        scheduler: Any = DDPMScheduler.from_config(self.scheduler.config, steps_offset=1, clip_sample=False)
        return EmbeddedStableDiffusion(unet=self.unet, vae=self.vae, scheduler=scheduler, **self.absent_parts())

    @staticmethod
    def pipeline_arguments(condition: Condition, unconditional: Condition) -> dict[str, Any]:
        return {"prompt_embeds": condition.states, "negative_prompt_embeds": unconditional.states}

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.vae

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self.unet
