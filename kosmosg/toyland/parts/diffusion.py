"""The U-Net in miniature: noise prediction on the tiny VAE's latents under the tiny CLIP's text, as SD v1.5."""

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from kosmosg.losses import TimestepWeighting, timestep_weights
from kosmosg.toyland.parts.autoencoder import moments
from kosmosg.toyland.parts.pool import Pool
from kosmosg.toyland.parts.training import fit

CAPTION_DROP = 0.1


def scheduler() -> DDPMScheduler:
    """SD v1.5's schedule."""
    return DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def build_unet(latent_channels: int, condition_width: int) -> UNet2DConditionModel:
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
    )


def train_unet(
    pool: Pool,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
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

    fit(f"unet, {weighting}", [unet], loss, steps=steps, lr=lr, average=0.998)
    return unet
