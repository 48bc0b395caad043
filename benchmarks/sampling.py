"""Sampling: the project's sampler against diffusers' StableDiffusionPipeline on the same U-Net and conditions."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from benchmarks.comparison import Comparison
from benchmarks.config import BenchmarkConfig, read_config
from benchmarks.models import Parts, scheduler
from kosmosg.acceleration import Acceleration, accelerate
from kosmosg.sampling import ABSENT_PARTS, DiffusionSampler, build_scheduler, seeded

GUIDANCE_SCALE = 7.5


def measure(arguments: Sequence[str]) -> dict[str, Any]:
    """See `benchmarks`."""
    return comparison(read_config(arguments)).measure()


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """In place, whatever diffusers would rather keep in float32."""
    return nn.Module.to(network, dtype)


def comparison(config: BenchmarkConfig) -> Comparison:
    """Default, diffusers, levers, scaling over images at once and steps."""
    parts, stage = Parts(config), config.sampling
    unet, vae = (cast(network.eval(), config.dtype) for network in (parts.unet(), parts.vae()))
    aligner, device = config.model.aligner, config.torch_device()
    noise = torch.Generator().manual_seed(config.seed)
    condition = torch.randn(stage.prompts, aligner.num_queries, aligner.width, generator=noise)
    null = torch.randn(1, aligner.num_queries, aligner.width, generator=noise)
    condition, null = (states.to(device, config.dtype) for states in (condition, null))
    sides = {"height": config.model.image_size, "width": config.model.image_size}

    def sampler(acceleration: Acceleration, dtype: torch.dtype = config.dtype) -> DiffusionSampler:
        copies = cast(copy.deepcopy(unet), dtype), cast(copy.deepcopy(vae), dtype)
        return DiffusionSampler(accelerate(*copies, acceleration), copies[1], scheduler())

    def sampled(with_sampler: DiffusionSampler, prompts: int = stage.prompts, steps: int = stage.steps, **options: Any):
        states = condition[:1].expand(prompts, -1, -1) if prompts != stage.prompts else condition
        return lambda: with_sampler(
            states,
            null,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            seeds=range(prompts),
            output_type="pt",
            **sides,
            **options,
        )

    theirs = StableDiffusionPipeline(unet=unet, vae=vae, scheduler=build_scheduler("dpm", scheduler()), **ABSENT_PARTS)
    theirs.set_progress_bar_config(disable=True)

    def diffusers_own() -> Any:
        return theirs(
            prompt_embeds=condition,
            negative_prompt_embeds=null.expand(stage.prompts, -1, -1),
            num_inference_steps=stage.steps,
            guidance_scale=GUIDANCE_SCALE,
            generator=seeded(range(stage.prompts), stage.prompts, None, None),
            output_type="pt",
            return_dict=False,
            **sides,
        )[0]

    how = Acceleration(channels_last=stage.channels_last, compile=stage.compile)
    default, plain, last = sampler(how), sampler(Acceleration()), sampler(Acceleration(channels_last=True))
    half = sampler(how, torch.bfloat16)
    levers = {
        "without acceleration": sampled(plain),
        "channels last": sampled(last),
        "bfloat16": sampled(half),
        "fast: the second half without guidance (other pictures)": sampled(default, fast_unguided_share=0.5),
    }
    if stage.compile:
        levers["compiled U-Net"] = sampled(sampler(Acceleration(compile=True)))
    ours = sampled(default)
    return Comparison(
        name="sampling",
        config=config,
        ours=ours,
        theirs=diffusers_own,
        against="diffusers' StableDiffusionPipeline",
        items=stage.prompts,
        unit="images",
        training=False,
        levers=levers,
        axes={
            "images at once": {count: lambda count=count: sampled(default, prompts=count) for count in (1, 2, 4)},
            "steps": {
                count: lambda count=count: sampled(default, steps=count) for count in (stage.steps, 2 * stage.steps)
            },
        },
        facts={
            "steps": stage.steps,
            "pixels": config.model.image_size,
            "guidance": GUIDANCE_SCALE,
            "acceleration": f"channels_last={how.channels_last}, compile={how.compile}",
            "largest difference of a pixel in 0 … 1": f"{float((ours() - diffusers_own()).abs().max()):.1e}",
        },
    )
