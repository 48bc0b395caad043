"""Sampling with the recorded starting latents: three samplers at three guidance scales, and a decoded image.

Latents are computed in double precision: over 50 steps, guidance 7.5 multiplies the rounding of single precision, which
depends on the processor, to the size of the tolerance.
"""

import copy
import re
from functools import partial

import pytest
import torch

from kosmosg.prompt import PromptBatch
from kosmosg.sampling import DiffusionSampler

SAMPLERS = {"dpms": "dpm", "ddim": "ddim", "pndm": "pndm"}


@pytest.fixture(scope="module")
def sampler(decoder):
    return DiffusionSampler(decoder)


@pytest.fixture(scope="module")
def double_model(final):
    return copy.deepcopy(final.model).double()


@pytest.fixture(scope="module")
def double_sampler(decoder):
    return DiffusionSampler(copy.deepcopy(decoder).double())


def recorded_order(tensor, images):
    """Ours: images of one prompt together. Recorded: prompts tiled, p0, p1, …, p0, p1, …"""
    return tensor.unflatten(0, (images, -1)).transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def conditions(recording, model, negative="sample.negative_short"):
    ids, prompts = recording.inputs[negative], recording.prompts("sample")
    prompts.images = prompts.images.to(next(model.parameters()).dtype)
    nowhere = torch.zeros_like(ids, dtype=torch.bool)
    null = model.condition(PromptBatch(ids=ids, image_mask=nowhere, images=None, padding=nowhere))
    return model.condition(prompts), null


@pytest.mark.parametrize(
    ("negative", "name"),
    [("sample.negative_short", "cond_no_negative"), ("sample.negative_long", "cond_with_negative")],
)
def test_conditions(recording, final, negative, name):
    images = recording.config["sampler"]["num_images_per_prompt"]
    condition, null = conditions(recording, final.model, negative)
    laid_out = torch.cat([null.states.expand(2 * images, -1, -1), condition.states.repeat(images, 1, 1)])
    recording.assert_activation(laid_out, f"sample.{name}")


def sample(recording, model, sampler, name, guidance, output_type):
    settings = recording.config["sampler"]
    images = settings["num_images_per_prompt"]
    condition, null = conditions(recording, model)
    latents = recorded_order(recording.inputs["sample.init_latents"], images)
    ours = sampler(
        condition,
        null,
        num_images_per_prompt=images,
        num_inference_steps=settings["steps"],
        guidance_scale=guidance,
        sampler=SAMPLERS[name],
        latents=latents.to(next(model.parameters()).dtype),
        output_type=output_type,
    )
    assert sampler.pipeline.scheduler.timesteps.tolist() == recording.facts["sampler_timesteps"][name]
    return torch.as_tensor(ours), images


def guidance_scales(recording, name):
    prefix = f"sample.{name}.g"
    return [
        float(key.removeprefix(prefix).removesuffix(".latents"))
        for key in recording.outputs
        if key.startswith(prefix) and key.endswith(".latents")
    ]


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents(recording, double_model, double_sampler, name):
    scales = guidance_scales(recording, name)
    assert sorted(scales) == sorted(recording.config["sampler"]["guidance"])
    for guidance in scales:
        ours, images = sample(recording, double_model, double_sampler, name, guidance, "latent")
        view = partial(recorded_order, images=images)
        recording.assert_activation(ours.float(), f"sample.{name}.g{guidance}.latents", view)


def test_image(recording, final, sampler):
    pattern = re.compile(r"sample\.(\w+)\.g([\d.]+)\.image_hwc01")
    recorded = [match for match in map(pattern.fullmatch, recording.outputs) if match]
    assert recorded
    for match in recorded:
        ours, images = sample(recording, final.model, sampler, match[1], float(match[2]), "np")
        recording.assert_activation(ours, match[0], partial(recorded_order, images=images))
