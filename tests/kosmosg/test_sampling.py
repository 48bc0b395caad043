"""Conditions to images: which samplers and numbers are allowed, and optimizations that keep the images or say not."""

from copy import deepcopy

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from kosmosg.condition import Condition
from kosmosg.models.stable_diffusion import StableDiffusion
from kosmosg.sampling import SCHEDULERS, Acceleration, DiffusionSampler, accelerate, build_scheduler
from tests import tiny

STEPS = 4


def sampled(drawing: DiffusionSampler, **options) -> Tensor:
    noise = torch.Generator().manual_seed(3)
    states = torch.randn(2, tiny.QUERIES, tiny.CONDITION_WIDTH, generator=noise)
    options = {"num_inference_steps": STEPS, "seeds": [5], "output_type": "pt", **options}
    return drawing(Condition(states[:1]), Condition(states[1:]), **options)


@pytest.fixture(scope="module")
def sampler(tiny_stable_diffusion) -> DiffusionSampler:
    return DiffusionSampler(StableDiffusion.from_pretrained(tiny_stable_diffusion, "images"))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_that_is_allowed_finds_what_the_noise_says(name, sampler) -> None:
    """A network that knows the image: every allowed scheduler must arrive there."""
    if hasattr(getattr(diffusers, name), "_backends"):
        pytest.skip("needs a package that is not installed")
    sampled(sampler, sampler=name)
    trained_with = sampler.given_scheduler
    scheduler, image = build_scheduler(name, trained_with), torch.full((1, 4, 8, 8), 0.7)
    scheduler.set_timesteps(20)
    latents = torch.randn(image.shape) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        given = scheduler.scale_model_input(latents, timestep)
        signal = np.interp(float(timestep), np.arange(1000), trained_with.alphas_cumprod)
        noise = (given - signal**0.5 * image) / (1 - signal) ** 0.5
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    assert (latents - image).abs().max() < 0.3


REFUSED = [
    ({"sampler": "euler"}, "sampler='euler' is not allowed; allowed: dpm, ddim, pndm, or one of diffusers'"),
    ({"sampler": "FlowMatchEulerDiscreteScheduler"}, "is not allowed"),
    ({"sampler": "SASolverScheduler"}, "is not allowed"),
    ({"sampler": "DDIMInverseScheduler"}, "is not allowed"),
    ({"sampler": "DPMSolverSDEScheduler"}, "'DPMSolverSDEScheduler' needs the package a_missing_package"),
    ({"seeds": 3}, "seeds=3 is not allowed; allowed: a list of 1 integers"),
    ({"seeds": ["a"]}, "seeds=.*is not allowed"),
    ({"seeds": [-1]}, r"seeds contains -1; allowed: integers from 0 to 2\^64 - 1"),
    ({"seeds": [2**64]}, "seeds contains 18446744073709551616"),
    ({"height": -8}, "height=-8 and width=None are not allowed; allowed: positive multiples of 8"),
    ({"width": 100}, "width=100"),
    ({"guidance_scale": float("nan")}, "guidance_scale=nan is not allowed"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    ({"num_inference_steps": 1001}, "num_inference_steps=1001 is not allowed; allowed: at most 1000"),
]


def test_what_is_not_allowed_is_named(sampler, monkeypatch) -> None:
    dummy = type("DPMSolverSDEScheduler", (), {"_backends": ["torch", "a_missing_package"]})
    monkeypatch.setattr(diffusers, "DPMSolverSDEScheduler", dummy)
    for options, told in REFUSED:
        with pytest.raises(ValueError, match=told):
            sampled(sampler, **options)


def test_a_side_that_is_not_given_is_the_models_own(sampler) -> None:
    for given, size in [({"width": 96}, (64, 96)), ({"height": 32}, (32, 64)), ({}, (64, 64))]:
        assert sampled(sampler, **given).shape[-2:] == size


def test_channels_last_keeps_the_images(sampler) -> None:
    plain, decoder = sampled(sampler), deepcopy(sampler.decoder)
    accelerate(decoder.unet, decoder.vae, Acceleration(channels_last=True))
    weight = decoder.unet.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    torch.testing.assert_close(sampled(DiffusionSampler(decoder)), plain, rtol=0, atol=1e-4)
