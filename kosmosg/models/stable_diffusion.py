"""Stable Diffusion 1.x as an image decoder (paper section 2.2): U-Net, VAE and CLIP text model from diffusers.

Notable: the text states are not masked. CLIP's padding is its end token and counts, as in Stable Diffusion itself.
Captions are cleaned as by the public CLIP tokenizer, which transformers' tokenizer does not do.

Shapes: `B` batch, `H×W` image pixels, `h×w` latent pixels, `Q` condition tokens (77), `C` condition width (768).
"""

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from kosmosg.condition import Condition, ConditionSpec
from kosmosg.losses import TimestepWeighting, timestep_weights
from kosmosg.models.image_decoder import ImageDecoder, Parts, with_values
from kosmosg.models.storage import load_network

CONFIG_FILES = {
    "unet": "unet/config.json",
    "vae": "vae/config.json",
    "text_encoder": "text_encoder/config.json",
    "scheduler": "scheduler/scheduler_config.json",
}
DOWNSCALE = 8
# Parts of diffusers' Stable Diffusion pipelines that prompt embeddings make needless.
ABSENT_PARTS: dict[str, Any] = {
    "text_encoder": None,
    "tokenizer": None,
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}


class EmbeddedStableDiffusion(StableDiffusionPipeline):
    """diffusers' pipeline without a text encoder, to which it would hand down the scale of LoRA layers."""

    def encode_prompt(self, *arguments: Any, lora_scale: float | None = None, **options: Any) -> tuple:
        return super().encode_prompt(*arguments, **options)


class StableDiffusion(ImageDecoder):
    """See `ImageDecoder`. Methods that need a part that is None cannot be used.

    Args:
        scheduler: gives ᾱ_t and the number of training timesteps; it must be one for networks that predict noise.

    Raises:
        ValueError: it is not.
    """

    def __init__(
        self,
        unet: Any = None,  # UNet2DConditionModel, AutoencoderKL, …: diffusers types their configs as dictionaries
        vae: Any = None,
        scheduler: Any = None,
        text_encoder: Any = None,
        tokenizer: CLIPTokenizer | None = None,
    ):
        super().__init__()
        prediction = None if scheduler is None else scheduler.config.get("prediction_type")
        if scheduler is not None and prediction != "epsilon":
            raise ValueError(
                f"the image decoder's scheduler, a {type(scheduler).__name__}, has prediction_type={prediction!r}; "
                "allowed: 'epsilon', as in Stable Diffusion 1.5, whose U-Net predicts the noise (eq. 8)."
            )
        self.unet: Any = unet
        self.vae: Any = vae
        self.text_encoder: Any = text_encoder
        self.tokenizer: Any = tokenizer
        self.scheduler: Any = scheduler
        # The schedule that the U-Net was trained with, whatever scheduler samples.
        self.schedule: Any = None if scheduler is None else DDPMScheduler.from_config(scheduler.config)
        tokens = 77 if text_encoder is None else text_encoder.config.max_position_embeddings
        network: Any = text_encoder if unet is None else unet
        reads = network.config.hidden_size if unet is None else network.config.cross_attention_dim
        self.spec = ConditionSpec(tokens, reads)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, parts: Parts = "all", torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "StableDiffusion":
        networks: dict[str, Any] = {}
        options = {"dtype": torch_dtype, **options}
        if parts != "text":
            networks["unet"] = load_network(UNet2DConditionModel, source, "unet", **options)
            networks["vae"] = load_network(AutoencoderKL, source, "vae", **options)
            networks["scheduler"] = DDPMScheduler.from_pretrained(source, subfolder="scheduler")
        if parts != "images":
            networks["text_encoder"] = load_network(CLIPTextModel, source, "text_encoder", dtype=torch_dtype)
            networks["tokenizer"] = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer")
        return cls(**networks).freeze()

    @classmethod
    def from_config(cls, source: str | Path, parts: Parts = "all") -> "StableDiffusion":
        from kosmosg.conversion import stable_diffusion_v1_5  # which needs the models

        folder, networks = Path(source), {}
        if folder.is_dir():
            configs = {name: json.loads((folder / file).read_text()) for name, file in CONFIG_FILES.items()}
        elif str(source) == stable_diffusion_v1_5.HUB_ID:
            configs = stable_diffusion_v1_5.CONFIGS
        else:
            raise ValueError(
                f"model.image_decoder is '{source}', whose sizes a dry run does not know; allowed: a folder, or "
                f"'{stable_diffusion_v1_5.HUB_ID}'"
            )
        if parts != "text":
            networks["unet"] = UNet2DConditionModel.from_config(configs["unet"])
            networks["vae"] = AutoencoderKL.from_config(configs["vae"])
            with with_values():
                networks["scheduler"] = DDPMScheduler.from_config(configs["scheduler"])
        if parts != "images":
            networks["text_encoder"] = CLIPTextModel(CLIPTextConfig(**configs["text_encoder"]))
        return cls(**networks).freeze()

    def clean(self, text: str) -> str:
        """As the public CLIP tokenizer: mojibake, ligatures, full-width letters and curly quotes are fixed, HTML
        entities unescaped twice, blanks collapsed, letters lower-cased."""
        if "&" in text or not (text.isascii() and text.isprintable()):  # ftfy, which is slow, changes nothing else
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return re.sub(r"\s+", " ", text).strip().lower()

    def tokenize(self, texts: Sequence[str], *, truncation: bool = True, clean: bool = True) -> Tensor:
        length = self.spec.tokens
        if clean:
            texts = [self.clean(text) for text in texts]
        ids = self.tokenizer(list(texts), padding="max_length", truncation=truncation, max_length=length).input_ids
        for text, row in zip(texts, ids, strict=True):
            if len(row) > length:
                raise ValueError(f"the caption {text!r} has {len(row)} CLIP tokens; at most {length} are allowed.")
        return torch.tensor(ids)

    @torch.no_grad()
    def text_condition(self, text_ids: Tensor) -> Condition:
        """The last hidden state after its final norm."""
        return Condition(self.text_encoder(input_ids=text_ids).last_hidden_state)

    @property
    def downscale(self) -> int:
        """H / h; Stable Diffusion's own without a VAE."""
        return DOWNSCALE if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        own = self.unet.config.sample_size
        own = (own, own) if isinstance(own, int) else own
        sides = [
            trained * self.downscale if side is None else side
            for side, trained in zip((height, width), own, strict=True)
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
        """Means and log-variances, B×2c×h×w."""
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
        """Uniform in 0 … num_train_timesteps − 1, int64."""
        return (uniform * self.schedule.config.num_train_timesteps).long()

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(ᾱ_t) z_0 + sqrt(1 − ᾱ_t) ε (eq. 1)."""
        return self.schedule.add_noise(latents, noise, timesteps)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """ε_θ(z_t; C, t)."""
        self.check(condition)
        dtype = self.unet.dtype
        return self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=condition.states.to(dtype)).sample

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        return noise

    def loss_weights(self, timesteps: Tensor, weighting: TimestepWeighting) -> Tensor:
        return timestep_weights(self.schedule.alphas_cumprod.to(timesteps.device)[timesteps], weighting)

    def diffusers_pipeline(self) -> Any:
        # The scheduler is set at each call; this one is only in settings that diffusers does not find fault with.
        quiet: Any = DDPMScheduler.from_config(self.scheduler.config, steps_offset=1, clip_sample=False)
        return EmbeddedStableDiffusion(unet=self.unet, vae=self.vae, scheduler=quiet, **ABSENT_PARTS)

    def pipeline_arguments(self, condition: Condition, unconditional: Condition) -> dict[str, Any]:
        return {"prompt_embeds": condition.states, "negative_prompt_embeds": unconditional.states}

    @property
    def autoencoder(self) -> AutoencoderKL:
        return self.vae

    @property
    def denoiser(self) -> UNet2DConditionModel:
        return self.unet
