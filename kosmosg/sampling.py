"""Conditions to images: diffusers' own pipeline of the image decoder, driven through prompt embeddings.

Notable: no sampler of ours. The three schedulers are set as the released code's (released-code.md, "Evaluation"):
DPM-Solver++ of order 2 ends at its smallest sigma, not at zero; DDIM and PNDM step from a leading spacing.

Shapes: `B` conditions, `n` images for each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from numbers import Integral
from operator import index
from typing import Any, Literal, TypeVar

import diffusers
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from kosmosg.condition import Condition
from kosmosg.models.image_decoder import ImageDecoder

Module = TypeVar("Module", bound=nn.Module)
OFFLOAD_HOOKS = ("_hf_hook", "_diffusers_hook")  # of accelerate and of diffusers
SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any]]] = {
    "dpm": (
        DPMSolverMultistepScheduler,
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "final_sigmas_type": "sigma_min",
            "timestep_spacing": "linspace",
            "lower_order_final": True,
        },
    ),
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False, "timestep_spacing": "leading"}),
}
STEPS_OFFSET = 1  # Stable Diffusion was trained so that timestep 1, not 0, is the cleanest one sampled
# What a sampler takes from the image decoder's own scheduler file.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)


# diffusers' schedulers that sample from a network which predicts noise. Flow matching, EDM's preconditioning, SASolver
# and inversion need another network or another loop.
SCHEDULERS = (
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
LARGEST_SEED = 2**64 - 1


@dataclass
class Acceleration:
    """How the frozen image decoder is run. Results are the same but for rounding."""

    channels_last: bool = False
    """Keep weights and activations of convolutions with their channels last, as tensor cores read them."""
    compile: bool = False
    """Compile the denoiser; the first batch of every size then takes a minute or more."""


def accelerate(denoiser: Module, vae: nn.Module | None, acceleration: Acceleration) -> Module:
    """Apply `acceleration` in place; returns the denoiser."""
    if acceleration.channels_last:
        for network in filter(None, (denoiser, vae)):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if acceleration.compile:
        denoiser.compile()
    return denoiser


def scheduler_class(sampler: str) -> type[SchedulerMixin]:
    """The diffusers scheduler behind a name.

    Args:
        sampler: a key of `SAMPLERS`, or one of `SCHEDULERS`.

    Raises:
        ValueError: a name that is not allowed, or whose scheduler needs a package that is not installed.
    """
    if sampler in SAMPLERS:
        return SAMPLERS[sampler][0]
    if sampler not in SCHEDULERS:
        raise ValueError(
            f"sampler={sampler!r} is not allowed; allowed: {', '.join(SAMPLERS)}, or of diffusers' schedulers "
            f"{', '.join(SCHEDULERS)}."
        )
    kind = getattr(diffusers, sampler)
    # In place of a class whose requirements are not met, diffusers has a dummy that names them.
    if missing := [package for package in getattr(kind, "_backends", ()) if find_spec(package) is None]:
        raise ValueError(f"sampler={sampler!r} needs the package {', '.join(missing)}, which is not installed.")
    return kind


def build_scheduler(sampler: str, trained_with: Any) -> Any:
    """A fresh scheduler over the noise schedule of `trained_with`.

    Args:
        sampler: see `scheduler_class`. Those of `SAMPLERS` are set as the released code's; the others take their
            settings from `trained_with`. Over flow matching there is "dpm" alone, as Sana ships it.

    Raises:
        ValueError: see `scheduler_class`.
    """
    kind: Any = scheduler_class(sampler)
    config = trained_with.config
    if is_flow(trained_with):
        if sampler != "dpm":
            raise ValueError(f"sampler={sampler!r} is not allowed for flow matching; allowed: dpm.")
        shift = config.get("flow_shift", config.get("shift", 1.0))
        flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
        return kind(num_train_timesteps=config.num_train_timesteps, **flow)
    if sampler not in SAMPLERS:
        return kind.from_config(trained_with.config)
    schedule = {name: trained_with.config[name] for name in NOISE_SCHEDULE if name in trained_with.config}
    return kind(**schedule, **SAMPLERS[sampler][1], steps_offset=STEPS_OFFSET)


def is_flow(scheduler: Any) -> bool:
    """Whether it samples from networks trained by flow matching."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


class DiffusionSampler:
    """Samples images for conditions, whoever made them: AlignerNet, or the decoder's own text model.

    Args:
        decoder: its scheduler gives the noise schedule it was trained with, and samples where no `sampler` is named.
    """

    def __init__(self, decoder: ImageDecoder):
        self.decoder, self.given_scheduler = decoder, decoder.scheduler
        self.pipeline = decoder.diffusers_pipeline()
        self.pipeline.set_progress_bar_config(disable=True)

    def to(self, device: torch.device | str) -> "DiffusionSampler":
        """Move the decoder's networks."""
        self.pipeline.to(device)
        return self

    def scheduler(self, sampler: str | None) -> SchedulerMixin:
        """A fresh scheduler, see `build_scheduler`; the given one for None."""
        return self.given_scheduler if sampler is None else build_scheduler(sampler, self.given_scheduler)

    def __call__(
        self,
        condition: Condition,
        unconditional: Condition,
        *,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        sampler: str | None = "dpm",
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: Literal["pil", "pt", "np", "latent"] = "pil",
        callback_on_step_end: Callable[..., dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        cross_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """B·n images, those of one condition together: ε̂ = uncond + w (cond − uncond), eq. 4.

        Args:
            condition: of B prompts.
            unconditional: what guidance steers away from, of 1 row or B.
            guidance_scale: w; up to 1, only the condition is computed.
            seeds: one for each image, B·n; an image then depends on its seed alone, not on the batch around it.
            generator: draws the starting noise where there are no seeds.
            latents: starting noise B·n×4×h×w instead of drawn noise.
            height, width: pixels; by default what the decoder was trained on.
            sampler: see `build_scheduler`; None for the scheduler that was given.
            others: as in `diffusers.StableDiffusionPipeline`.

        Raises:
            ValueError: a value that is not allowed, seeds unlike the images, a condition of another form.
        """
        timesteps = self.given_scheduler.config.num_train_timesteps
        check_numbers(num_inference_steps, guidance_scale, num_images_per_prompt, timesteps)
        height, width = self.decoder.image_size(height, width)
        self.decoder.check(condition)
        prompts = len(condition.states)
        images = prompts * num_images_per_prompt
        self.pipeline.scheduler = self.scheduler(sampler)
        denoiser = self.decoder.denoiser
        # Under CPU offload it lies elsewhere than it computes; to ask the pipeline takes milliseconds.
        offloaded = any(hasattr(denoiser, hook) for hook in OFFLOAD_HOOKS)
        device = self.pipeline._execution_device if offloaded else denoiser.device
        placed = {"device": device, "dtype": denoiser.dtype}
        if len(unconditional.states) != prompts:
            unconditional = unconditional.repeat_interleave(prompts)
        if self.decoder.spec.masked and num_images_per_prompt > 1:
            # SanaPipeline repeats states image by image and masks prompt by prompt, so each would get another's mask.
            condition, unconditional = (
                given.repeat_interleave(num_images_per_prompt) for given in (condition, unconditional)
            )
            num_images_per_prompt = 1
        attention = {} if cross_attention_kwargs is None else {self.decoder.attention_argument: cross_attention_kwargs}
        return self.pipeline(
            **self.decoder.pipeline_arguments(condition.to(**placed), unconditional.to(**placed)),
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator if seeds is None else seeded(seeds, images, generator, latents),
            latents=latents,
            height=height,
            width=width,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=list(callback_on_step_end_tensor_inputs),
            return_dict=False,
            **self.decoder.call_options,
            **attention,
        )[0]


def check_numbers(
    num_inference_steps: int, guidance_scale: float, num_images_per_prompt: int = 1, timesteps: int | None = None
) -> None:
    """Refuse numbers that no sampler takes.

    Args:
        timesteps: that the decoder was trained with. Some schedulers would give NaN for more steps.

    Raises:
        ValueError: names the argument.
    """
    for name, value in (
        ("num_inference_steps", num_inference_steps),
        ("num_images_per_prompt", num_images_per_prompt),
    ):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; allowed: integers of at least 1.")
    if timesteps is not None and num_inference_steps > timesteps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is not allowed; allowed: at most {timesteps}, the timesteps "
            "that the image decoder was trained with."
        )
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} is not allowed; allowed: finite numbers.")


def seeded(
    seeds: Sequence[int], images: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
) -> list[torch.Generator]:
    """One generator for each image, on the CPU so that a seed means the same noise on every device."""
    try:
        numbers = [index(seed) for seed in seeds]
    except TypeError as error:
        raise ValueError(f"seeds={seeds!r} is not allowed; allowed: a list of {images} integers.") from error
    if wrong := [seed for seed in numbers if not 0 <= seed <= LARGEST_SEED]:
        raise ValueError(f"seeds has {wrong[0]}; allowed: integers in 0 … 2^64 - 1.")
    if generator is not None or latents is not None:
        raise ValueError("seeds were given together with a generator or latents; choose one source of noise.")
    if len(numbers) != images:
        raise ValueError(f"{len(numbers)} seeds were given for {images} images; each image needs one.")
    return [torch.Generator().manual_seed(seed) for seed in numbers]
