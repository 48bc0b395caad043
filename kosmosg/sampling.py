"""Draw images from conditions with the diffusers pipeline of the image decoder.

Notable: samplers are diffusers' schedulers. "dpm", "ddim" and "pndm" have the settings of the released code
(released-code.md, "Evaluation"): DPM-Solver++ of order 2 ends at its smallest sigma, not at zero; DDIM and PNDM use
leading timestep spacing.

Shapes: `B` conditions, `n` images per condition.
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
OFFLOAD_HOOKS = ("_hf_hook", "_diffusers_hook")  # attributes set by accelerate and by diffusers
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
STEPS_OFFSET = 1  # Stable Diffusion samples down to timestep 1, not 0
# Settings that a sampler takes from the image decoder's own scheduler.
NOISE_SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
)
# diffusers' schedulers for networks that predict noise. Schedulers for flow matching, EDM, SASolver and inversion are
# missing, because they need another network or another sampling loop.
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
    """Optimizations of the frozen image decoder; they change results only by rounding."""

    channels_last: bool = False
    """Use the channels-last memory format for convolutions, which is faster on tensor cores."""
    compile: bool = False
    """Compile the denoiser; the first batch of each size then takes a minute or more."""


def accelerate(denoiser: Module, vae: nn.Module | None, acceleration: Acceleration) -> Module:
    """Apply optimizations in place and return the denoiser."""
    if acceleration.channels_last:
        for network in filter(None, (denoiser, vae)):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if acceleration.compile:
        denoiser.compile()
    return denoiser


def scheduler_class(sampler: str) -> type[SchedulerMixin]:
    """Return the diffusers scheduler class of a sampler name.

    Args:
        sampler: a key of `SAMPLERS`, or one of `SCHEDULERS`.

    Raises:
        ValueError: the name is unknown, or the scheduler needs a package that is not installed.
    """
    if sampler in SAMPLERS:
        return SAMPLERS[sampler][0]
    if sampler not in SCHEDULERS:
        raise ValueError(
            f"sampler={sampler!r} is not allowed; allowed: {', '.join(SAMPLERS)}, or one of diffusers' schedulers "
            f"{', '.join(SCHEDULERS)}."
        )
    kind = getattr(diffusers, sampler)
    # diffusers replaces classes whose requirements are missing by dummies that name them.
    if missing := [package for package in getattr(kind, "_backends", ()) if find_spec(package) is None]:
        raise ValueError(f"sampler={sampler!r} needs the package {', '.join(missing)}, which is not installed.")
    return kind


def build_scheduler(sampler: str, trained_with: Any) -> Any:
    """Build a scheduler with the noise schedule of the scheduler `trained_with`.

    Args:
        sampler: see `scheduler_class`. `SAMPLERS` have the settings of the released code; other schedulers take theirs
            from `trained_with`. For flow matching only "dpm" is supported, with the settings of Sana.

    Raises:
        ValueError: the sampler is not allowed, see `scheduler_class`.
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
    """Return whether a scheduler is for networks trained by flow matching."""
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or bool(scheduler.config.get("use_flow_sigmas"))


class DiffusionSampler:
    """Draw images from conditions, of AlignerNet or of the decoder's own text model.

    Args:
        decoder: the image decoder. Its scheduler defines the noise schedule and is the default sampler.
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
        """Build a scheduler, see `build_scheduler`; None returns the decoder's own."""
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
        """Draw B·n images with guidance ε̂ = uncond + w (cond − uncond) (eq. 4); those of one condition are adjacent.

        Args:
            condition: B rows.
            unconditional: the condition that guidance steers away from, 1 row or B.
            guidance_scale: w. Up to 1, guidance is off.
            sampler: see `build_scheduler`; None for the decoder's own scheduler.
            seeds: one per image, B·n. Each image then depends only on its seed, not on the batch.
            generator: draws the initial noise if there are no seeds.
            latents: initial noise B·n×c×h×w instead of drawn noise.
            height, width: pixels; by default the size that the decoder was trained on.
            others: as in `diffusers.StableDiffusionPipeline`.

        Raises:
            ValueError: a value is not allowed, the number of seeds is not B·n, or the condition does not match the
                decoder.
        """
        timesteps = self.given_scheduler.config.num_train_timesteps
        check_numbers(num_inference_steps, guidance_scale, num_images_per_prompt, timesteps)
        height, width = self.decoder.image_size(height, width)
        self.decoder.check(condition)
        prompts = len(condition.states)
        images = prompts * num_images_per_prompt
        self.pipeline.scheduler = self.scheduler(sampler)
        denoiser = self.decoder.denoiser
        # With CPU offload the weights are not on the execution device. Asking the pipeline takes milliseconds.
        offloaded = any(hasattr(denoiser, hook) for hook in OFFLOAD_HOOKS)
        device = self.pipeline._execution_device if offloaded else denoiser.device
        placement = {"device": device, "dtype": denoiser.dtype}
        if len(unconditional.states) != prompts:
            unconditional = unconditional.repeat_interleave(prompts)
        if self.decoder.spec.masked and num_images_per_prompt > 1:
            # SanaPipeline repeats states and masks in different orders, so repeat both here.
            condition = condition.repeat_interleave(num_images_per_prompt)
            unconditional = unconditional.repeat_interleave(num_images_per_prompt)
            num_images_per_prompt = 1
        attention = {} if cross_attention_kwargs is None else {self.decoder.attention_argument: cross_attention_kwargs}
        return self.pipeline(
            **self.decoder.pipeline_arguments(condition.to(**placement), unconditional.to(**placement)),
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
    """Check the numeric arguments of sampling.

    Args:
        timesteps: number of training timesteps; some schedulers return NaN for more steps.

    Raises:
        ValueError: an argument is not allowed; names it.
    """
    for name, value in (
        ("num_inference_steps", num_inference_steps),
        ("num_images_per_prompt", num_images_per_prompt),
    ):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r} is not allowed; allowed: integers of at least 1.")
    if timesteps is not None and num_inference_steps > timesteps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} is not allowed; allowed: at most {timesteps}, the number of "
            "timesteps that the image decoder was trained with."
        )
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale={guidance_scale} is not allowed; allowed: finite numbers.")


def seeded(
    seeds: Sequence[int], images: int, generator: torch.Generator | list[torch.Generator] | None, latents: Tensor | None
) -> list[torch.Generator]:
    """Return one generator per image, on the CPU, so that a seed gives the same noise on every device."""
    try:
        numbers = [index(seed) for seed in seeds]
    except TypeError as error:
        raise ValueError(f"seeds={seeds!r} is not allowed; allowed: a list of {images} integers.") from error
    if wrong := [seed for seed in numbers if not 0 <= seed <= LARGEST_SEED]:
        raise ValueError(f"seeds contains {wrong[0]}; allowed: integers from 0 to 2^64 - 1.")
    if generator is not None or latents is not None:
        raise ValueError("seeds were given together with a generator or latents; choose one source of noise.")
    if len(numbers) != images:
        raise ValueError(f"{len(numbers)} seeds were given for {images} images; each image needs one.")
    return [torch.Generator().manual_seed(seed) for seed in numbers]
