"""Stable Diffusion in miniature: a VAE from 32 px to 8×8 latents of sixteen channels, and a U-Net on them.

The U-Net predicts noise under the tiny CLIP's text, as SD v1.5 does.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from datamodules.toyland.pretrained.data import Pool, pixels
from datamodules.toyland.pretrained.training import fit
from datamodules.toyland.scene import SIZE
from kosmosg.losses import TimestepWeighting, timestep_weights

CAPTION_DROP = 0.1
KL_WEIGHT = 1e-3
EDGE_WEIGHT = 0.15
LATENT_NOISE = 0.1
"""In units of the scaled latents' standard deviation."""


def build_autoencoder() -> AutoencoderKL:
    blocks = (32, 64, 64)
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=16,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        norm_num_groups=8,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: an L1 on them keeps outlines sharp, which plain L1 blurs."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def train_autoencoder(
    pool: Pool, checkpoint: Path, *, steps: int, batch_size: int, lr: float, seed: int
) -> AutoencoderKL:
    """L1 on pixels and on edges, with a light pull of the latents towards a unit normal."""
    torch.manual_seed(seed)
    vae = build_autoencoder().to(memory_format=torch.channels_last)
    draws = torch.Generator().manual_seed(seed)

    def loss(step: int):
        images = pixels(pool.images[torch.randint(len(pool), (batch_size,), generator=draws)])
        moments = vae.quant_conv(vae.encoder(images.contiguous(memory_format=torch.channels_last)))
        mean, logvar = moments.chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws)
        output = vae.decoder(vae.post_quant_conv(latents))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error, psnr = reconstruction_error(output, images)
        return error + KL_WEIGHT * kl, {"psnr": psnr, "kl": kl.item()}

    fit(checkpoint, [vae], loss, draws, steps=steps, lr=lr, weight_decay=0.0, average=0.995)
    spread = torch.cat([moments(vae, pool, start)[0] for start in range(0, min(len(pool), 1024), 128)]).std()
    vae.register_to_config(scaling_factor=round(float(1 / spread), 5))
    return vae


def train_decoder(
    vae: AutoencoderKL, pool: Pool, checkpoint: Path, *, steps: int, batch_size: int, lr: float, seed: int
) -> None:
    """Go on with the decoder alone, as SD's own ft-MSE decoder was made: latents, and so the U-Net, stay as they are.

    Latents get a little more noise than their posterior has, because those that come from a U-Net are not exact.
    """
    torch.manual_seed(seed)
    draws = torch.Generator().manual_seed(seed)
    means, spreads = zip(*(moments(vae, pool, start) for start in range(0, len(pool), 128)), strict=True)
    mean, spread = (
        torch.cat(means),
        (torch.cat(spreads).square() + (LATENT_NOISE / vae.config.scaling_factor) ** 2) ** 0.5,
    )

    def loss(step: int):
        rows = torch.randint(len(pool), (batch_size,), generator=draws)
        latents = mean[rows] + spread[rows] * torch.randn((batch_size, *mean.shape[1:]), generator=draws)
        output = vae.decoder(vae.post_quant_conv(latents))
        error, psnr = reconstruction_error(output, pixels(pool.images[rows]))
        return error, {"psnr": psnr}

    decoder = [vae.post_quant_conv, vae.decoder]
    fit(checkpoint, decoder, loss, draws, steps=steps, lr=lr, weight_decay=0.0, average=0.995)


def reconstruction_error(output: Tensor, images: Tensor) -> tuple[Tensor, float]:
    """Pixels and edges; and the peak signal-to-noise ratio in dB."""
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(images), strict=True))
    squared = (output - images).square().mean()
    psnr = 10 * torch.log10(4 / squared.detach())  # the range is 2 wide
    return F.l1_loss(output, images) + 2 * squared + EDGE_WEIGHT * edge, psnr.item()


@torch.no_grad()
def moments(vae: AutoencoderKL, pool: Pool, start: int, count: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior of some of the pool's images."""
    posterior = vae.encode(pixels(pool.images[start : start + count])).latent_dist
    return posterior.mean, posterior.std


def scheduler() -> DDPMScheduler:
    """SD v1.5's schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def build_unet(latent_channels: int, condition_width: int, **differences: Any) -> UNet2DConditionModel:
    blocks = (64, 96)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=blocks,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(blocks),
        up_block_types=("CrossAttnUpBlock2D",) * len(blocks),
        cross_attention_dim=condition_width,
        attention_head_dim=4,
        norm_num_groups=16,
        **differences,
    )


def train_unet(
    pool: Pool,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    checkpoint: Path,
    *,
    weighting: TimestepWeighting,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    unet: UNet2DConditionModel | None = None,
) -> UNet2DConditionModel:
    """Eq. 3 with captions dropped for guidance; every step samples latents anew from their moments.

    Args:
        weighting: of eq. 8's w(t), see `kosmosg.losses.timestep_weights`; uniform is SD v1.5's.
        unet: go on with this one.
    """
    torch.manual_seed(seed)
    noise_schedule = scheduler()
    means, spreads = zip(*(moments(vae, pool, start) for start in range(0, len(pool), 128)), strict=True)
    mean, spread = torch.cat(means), torch.cat(spreads)
    length = tokenizer.model_max_length
    ids = torch.tensor(tokenizer(pool.captions, padding="max_length", truncation=True, max_length=length).input_ids)
    null = torch.tensor(tokenizer([""], padding="max_length", max_length=length).input_ids)
    if unet is None:
        unet = build_unet(mean.shape[1], text_encoder.config.hidden_size)
    unet.train()
    weight = timestep_weights(noise_schedule.alphas_cumprod, weighting)
    draws = torch.Generator().manual_seed(seed)

    def loss(step: int):
        rows = torch.randint(len(pool), (batch_size,), generator=draws)
        noise = torch.randn((batch_size, *mean.shape[1:]), generator=draws)
        latents = mean[rows] + spread[rows] * torch.randn(noise.shape, generator=draws)
        timesteps = torch.randint(noise_schedule.config.num_train_timesteps, (batch_size,), generator=draws)
        noisy = noise_schedule.add_noise(latents * vae.config.scaling_factor, noise, timesteps)
        dropped = torch.rand(batch_size, generator=draws) < CAPTION_DROP
        with torch.no_grad():
            condition = text_encoder(input_ids=torch.where(dropped[:, None], null, ids[rows])).last_hidden_state
        error = (unet(noisy, timesteps, condition).sample - noise).square().mean((1, 2, 3))
        return (weight[timesteps] * error).mean(), {"unweighted": error.mean().item()}

    fit(checkpoint, [unet], loss, draws, steps=steps, lr=lr, average=0.998)
    return unet
