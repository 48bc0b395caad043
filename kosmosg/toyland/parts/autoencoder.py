"""The VAE in miniature: 32 px to 8×8 latents of six channels."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from kosmosg.toyland.parts.pool import Pool, pixels
from kosmosg.toyland.parts.training import fit
from kosmosg.toyland.scene import SIZE

KL_WEIGHT = 1e-3
EDGE_WEIGHT = 0.15
LATENT_NOISE = 0.1
"""In units of the scaled latents' standard deviation."""


def build_autoencoder() -> AutoencoderKL:
    blocks = (32, 64, 64)
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=6,
        block_out_channels=blocks,
        down_block_types=("DownEncoderBlock2D",) * len(blocks),
        up_block_types=("UpDecoderBlock2D",) * len(blocks),
        layers_per_block=1,
        norm_num_groups=8,
    )


def edges(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels: an L1 on them keeps outlines sharp, which plain L1 blurs."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def train_autoencoder(pool: Pool, *, steps: int, batch_size: int, lr: float, seed: int) -> AutoencoderKL:
    """L1 on pixels and on edges, with a light pull of the latents towards a unit normal."""
    torch.manual_seed(seed)
    vae = build_autoencoder()
    draws = torch.Generator().manual_seed(seed)

    def loss(step: int):
        images = pixels(pool.images[torch.randint(len(pool), (batch_size,), generator=draws)])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(images)).float()
            mean, logvar = moments.chunk(2, dim=1)
            logvar = logvar.clamp(-30, 20)
            latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=draws)
            output = vae.decoder(vae.post_quant_conv(latents)).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        error, psnr = reconstruction_error(output, images)
        return error + KL_WEIGHT * kl, {"psnr": psnr, "kl": kl.item()}

    fit("vae", [vae], loss, steps=steps, lr=lr, weight_decay=0.0, average=0.995)
    spread = torch.cat([moments(vae, pool, start)[0] for start in range(0, 1024, 128)]).std()
    vae.register_to_config(scaling_factor=round(float(1 / spread), 5))
    return vae


def train_decoder(vae: AutoencoderKL, pool: Pool, *, steps: int, batch_size: int, lr: float, seed: int) -> None:
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
        with torch.autocast("cpu", torch.bfloat16):
            output = vae.decoder(vae.post_quant_conv(latents)).float()
        error, psnr = reconstruction_error(output, pixels(pool.images[rows]))
        return error, {"psnr": psnr}

    decoder = [vae.post_quant_conv, vae.decoder]
    fit("decoder", decoder, loss, steps=steps, lr=lr, weight_decay=0.0, average=0.995)


def reconstruction_error(output: Tensor, images: Tensor) -> tuple[Tensor, float]:
    """Pixels and edges; and the peak signal-to-noise ratio in dB."""
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(images), strict=True))
    squared = (output - images).square().mean()
    psnr = 10 * torch.log10(4 / squared.detach())  # the range is 2 wide
    return F.l1_loss(output, images) + 2 * squared + EDGE_WEIGHT * edge, psnr.item()


@torch.no_grad()
def moments(vae: AutoencoderKL, pool: Pool, start: int, count: int = 128) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the posterior of some of the pool's pictures."""
    posterior = vae.encode(pixels(pool.images[start : start + count])).latent_dist
    return posterior.mean, posterior.std
