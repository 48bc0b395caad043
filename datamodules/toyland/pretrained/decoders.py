"""Train two more tiny image decoders: python -m datamodules.toyland.pretrained.decoders [key=value …]

A Stable Diffusion XL with Toyland's VAE and CLIP, and a Sana with its own autoencoder and a random Gemma. They show
that KOSMOS-G works with other families of decoders (make toyland-decoders); the miniature uses Stable Diffusion.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLPipeline,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
)

from datamodules.toyland.pretrained.data import Pool, draw_pool, pixels
from datamodules.toyland.pretrained.stable_diffusion import CAPTION_DROP, build_unet, reconstruction_error, scheduler
from datamodules.toyland.pretrained.training import fit
from kosmosg.condition import Condition
from kosmosg.config import load_config
from kosmosg.files import replaced
from kosmosg.losses import TimestepWeighting
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.sana import INSTRUCTION, Sana
from kosmosg.models.stable_diffusion_xl import SIZE_NUMBERS, StableDiffusionXL

WEIGHTS = Path(__file__).parents[1] / "weights"
WIDTH = 64
"""Width of Sana's condition."""


@dataclass
class Recipe:
    """Configuration of the training."""

    output: str = "runs/toyland/decoders"
    work: str = "data/toyland/pretrained"
    """Folder of cached images and checkpoints."""
    pictures: int = 10_000
    autoencoder_steps: int = 1000
    """Steps of 16 images for Sana's autoencoder."""
    steps: int = 4000
    """Steps of 32 images for the U-Net of SDXL."""
    sana_steps: int = 2000
    """Steps of 32 images for Sana's transformer; they take twice as long."""
    seed: int = 0


def main(arguments: list[str]) -> None:
    recipe = load_config(arguments, Recipe)
    output, work = Path(recipe.output), Path(recipe.work)
    digest = f"{recipe.pictures}-{recipe.autoencoder_steps}-{recipe.steps}-{recipe.sana_steps}-{recipe.seed}"
    builders = {"stable_diffusion_xl": stable_diffusion_xl, "sana": sana}
    for name, build in builders.items():
        if (output / name).exists():
            continue
        pool = draw_pool(work, recipe.pictures, recipe.seed, looks_share=0.8)
        torch.manual_seed(recipe.seed)
        decoder, pipeline = build(pool, work / f"{name}_autoencoder-{digest}.pt", recipe)
        # w(t) as in Toyland's stage 3; flow matching supports only uniform weights.
        weighting: TimestepWeighting = "uniform" if name == "sana" else "velocity"
        steps = recipe.sana_steps if name == "sana" else recipe.steps
        train_denoiser(decoder, pool, weighting, work / f"{name}-{digest}.pt", steps, recipe.seed)
        with replaced(output / name) as temporary:
            pipeline.save_pretrained(temporary)
        print(f"wrote {output / name}", flush=True)


def stable_diffusion_xl(pool: Pool, checkpoint: Path, recipe: Recipe) -> tuple[ImageDecoder, Any]:
    """Build the decoder. Both text models are those of the tiny CLIP; the condition has a width of 2·128."""
    own = WEIGHTS / "stable-diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(own / "tokenizer")
    first = CLIPTextModel.from_pretrained(own / "text_encoder", dtype=torch.float32)
    second = CLIPTextModelWithProjection.from_pretrained(WEIGHTS / "clip", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(own / "vae", dtype=torch.float32)
    numbers, pooled = 32, second.config.projection_dim
    unet = build_unet(
        vae.config.latent_channels,
        2 * first.config.hidden_size,
        addition_embed_type="text_time",
        addition_time_embed_dim=numbers,
        projection_class_embeddings_input_dim=pooled + SIZE_NUMBERS * numbers,
    )
    parts = {"unet": unet, "vae": vae, "text_encoder": first, "text_encoder_2": second, "scheduler": scheduler(),
             "tokenizer": tokenizer, "tokenizer_2": tokenizer}  # fmt: skip
    return StableDiffusionXL(**parts), StableDiffusionXLPipeline(**parts, add_watermarker=False)


def sana(pool: Pool, checkpoint: Path, recipe: Recipe) -> tuple[ImageDecoder, Any]:
    """Build the decoder: 8×8 latents of 16 channels for 32 px; Gemma is random, which suffices as a text encoder."""
    tokenizer = word_tokenizer([INSTRUCTION, *pool.captions])
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vae = train_autoencoder(pool, checkpoint, recipe)
    transformer = SanaTransformer2DModel(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_attention_heads=6,
        attention_head_dim=32,
        num_layers=6,
        num_cross_attention_heads=6,
        cross_attention_head_dim=32,
        cross_attention_dim=192,
        caption_channels=WIDTH,
        sample_size=8,
    )
    parts = {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
             "text_encoder": Gemma2Model(gemma), "tokenizer": tokenizer}  # fmt: skip
    return Sana(**parts), SanaPipeline(**parts)


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the lower-cased words of `texts`."""
    splitter = tokenizers.pre_tokenizers.Whitespace()
    words = {word for text in set(texts) for word, _ in splitter.pre_tokenize_str(text.lower())}
    names = ["<pad>", "<bos>", "<unk>", *sorted(words)]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    model.normalizer = tokenizers.normalizers.Lowercase()
    model.pre_tokenizer = splitter
    model.post_processor = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


def train_autoencoder(pool: Pool, checkpoint: Path, recipe: Recipe) -> AutoencoderDC:
    """Train Sana's autoencoder like Toyland's VAE, without a posterior."""
    sizes: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_block_types": "ResBlock", f"{half}_block_out_channels": (32, 64, 64)}
        sizes |= {f"{half}_layers_per_block": (1,) * 3, f"{half}_qkv_multiscales": ((),) * 3}
    vae = AutoencoderDC(latent_channels=16, **sizes)
    draws = torch.Generator().manual_seed(recipe.seed)

    def loss(step: int):
        images = pixels(pool.images[torch.randint(len(pool), (16,), generator=draws)])
        error, psnr = reconstruction_error(vae.decode(vae.encode(images).latent).sample, images)
        return error, {"psnr": psnr}

    steps = recipe.autoencoder_steps
    fit(checkpoint, [vae], loss, draws, steps=steps, lr=2e-3, weight_decay=0.0, average=0.995)
    with torch.no_grad():
        spread = vae.encode(pixels(pool.images[:1024])).latent.std()
    vae.register_to_config(scaling_factor=round(float(1 / spread), 5))
    return vae


def train_denoiser(
    decoder: ImageDecoder, pool: Pool, weighting: TimestepWeighting, checkpoint: Path, steps: int, seed: int
) -> None:
    """Train a decoder's denoiser on captions through the interface that stage 3 uses."""
    moments = torch.cat([decoder.moments(pixels(images)) for images in pool.images.split(128)])
    conditions = text_conditions(decoder, pool.captions)
    null = decoder.spec.null(text_conditions(decoder, [""], conditions.states.shape[1]))
    shape = decoder.latent_shape(moments)
    draws = torch.Generator().manual_seed(seed)

    def loss(step: int):
        rows = torch.randint(len(pool), (32,), generator=draws)
        noise, drawn = torch.randn((2, len(rows), *shape), generator=draws)
        latents, timesteps = decoder.latents(moments[rows], drawn), decoder.timesteps(torch.rand(32, generator=draws))
        dropped = torch.rand(len(rows), generator=draws) < CAPTION_DROP
        condition = conditions.rows(rows).replace_where(dropped, null)
        predicted = decoder.predict(decoder.add_noise(latents, noise, timesteps), timesteps, condition)
        error = (predicted - decoder.training_target(latents, noise, timesteps)).square().mean((1, 2, 3))
        return (decoder.loss_weights(timesteps, weighting) * error).mean(), {"unweighted": error.mean().item()}

    fit(checkpoint, [decoder.denoiser], loss, draws, steps=steps, lr=1e-3, average=0.998)


def text_conditions(decoder: ImageDecoder, captions: list[str], length: int | None = None) -> Condition:
    """Return the conditions of captions. Those with a mask are cut to `length` states (None: the longest caption)."""
    ids = decoder.tokenize(captions)
    conditions = Condition.cat([decoder.text_condition(some) for some in ids.split(64)])
    if conditions.mask is None:
        return conditions
    length = length or int(conditions.mask.any(0).nonzero().max()) + 1
    return conditions._replace(states=conditions.states[:, :length].clone(), mask=conditions.mask[:, :length])


if __name__ == "__main__":
    main(sys.argv[1:])
