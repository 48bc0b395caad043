"""The frozen image decoder: Stable Diffusion's U-Net and VAE (paper section 2.2), from diffusers.

Notable: nothing here ever trains or leaves eval mode, but the gradient of the prediction reaches the condition
through the U-Net (eq. 9).

Shapes: `B` batch, `H` image pixels, `h` latent pixels, `Q` condition tokens, `C` condition width.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn


class ImageDecoder(nn.Module):
    """U-Net, VAE and the noise schedule they were trained with.

    Args:
        scheduler: gives ᾱ_t and the number of training timesteps; it must predict noise.

    Raises:
        ValueError: the scheduler's prediction is not noise.
    """

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: DDPMScheduler):
        super().__init__()
        if scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"the image decoder's scheduler has prediction_type={scheduler.config.prediction_type!r}; the "
                "diffusion loss (eq. 8) predicts noise: use a Stable Diffusion with 'epsilon', as v1.5."
            )
        self.unet, self.vae, self.scheduler = unet, vae, scheduler
        self.requires_grad_(False)
        self.train(False)

    @classmethod
    def from_pretrained(
        cls, stable_diffusion: str | Path, torch_dtype: torch.dtype = torch.float32, **options
    ) -> "ImageDecoder":
        """Read unet/, vae/ and scheduler/ of a Stable Diffusion folder or hub id; `options` go to diffusers."""
        options = {"dtype": torch_dtype, **options}
        return cls(
            UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet", **options),
            AutoencoderKL.from_pretrained(stable_diffusion, subfolder="vae", **options),
            DDPMScheduler.from_pretrained(stable_diffusion, subfolder="scheduler"),
        )

    def train(self, mode: bool = True) -> "ImageDecoder":
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    @property
    def condition_width(self) -> int:
        """`C`, what the U-Net's cross-attention reads."""
        return self.unet.config.cross_attention_dim

    @property
    def num_timesteps(self) -> int:
        """Timesteps are drawn from 0 … num_timesteps - 1."""
        return self.scheduler.config.num_train_timesteps

    @property
    def shrinkage(self) -> int:
        """H / h."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def are_moments(self, targets: Tensor) -> bool:
        """Whether targets B×…×H×H are the VAE's moments rather than images."""
        return targets.shape[1] == 2 * self.vae.config.latent_channels

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images B×3×H×H in [-1, 1] → means and log-variances of the VAE's posterior, B×8×h×h.

        Raises:
            ValueError: sides that the VAE cannot halve evenly.
        """
        factor = self.shrinkage
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(
                f"target images are {tuple(images.shape[-2:])} but the VAE needs sides that are multiples of {factor}."
            )
        return self.vae.encode(images.to(self.vae.dtype)).latent_dist.parameters

    @torch.no_grad()
    def latents(self, targets: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Images B×3×H×H in [-1, 1], or their moments B×8×h×h → a sample of the VAE's posterior, scaled, B×4×h×h.

        Args:
            noise: the posterior's standard normal draw, B×4×h×h; drawn from `generator` where not given. With B·n
                rows it gives n samples of each image, which is encoded once; those of one image stand together.

        Raises:
            ValueError: sides that the VAE cannot halve evenly.
        """
        moments = targets if self.are_moments(targets) else self.moments(targets)
        posterior = DiagonalGaussianDistribution(moments)
        if noise is None:
            noise = torch.randn(posterior.mean.shape, generator=generator, device=targets.device)
        mean, std = (
            moment.repeat_interleave(len(noise) // len(targets), 0) for moment in (posterior.mean, posterior.std)
        )
        return (mean + std * noise.to(mean.dtype)) * self.vae.config.scaling_factor

    @torch.no_grad()
    def mean_images(self, moments: Tensor) -> Tensor:
        """The images that the posteriors' means stand for, B×3×H×H, about -1 … 1: targets to look at."""
        return self.vae.decode(DiagonalGaussianDistribution(moments).mean.to(self.vae.dtype)).sample

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t = sqrt(ᾱ_t) z_0 + sqrt(1 − ᾱ_t) ε (eq. 1)."""
        return self.scheduler.add_noise(latents, noise, timesteps)

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """ε_θ(z_t; C, t): noisy latents B×4×h×h, timesteps B, condition B×Q×C → B×4×h×h.

        Raises:
            ValueError: the condition is not as wide as the U-Net's cross-attention.
        """
        if condition.shape[-1] != self.condition_width:
            raise ValueError(
                f"the condition is {condition.shape[-1]} wide but the U-Net reads {self.condition_width}: the "
                "aligner's width must be the image decoder's cross_attention_dim. Is it another Stable Diffusion?"
            )
        dtype = self.unet.dtype
        return self.unet(noisy.to(dtype), timesteps, encoder_hidden_states=condition.to(dtype)).sample
