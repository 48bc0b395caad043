"""Stable Diffusion as the image decoder: frozen, latents and text by its own networks, refusals."""

from itertools import product

import pytest
import torch

from kosmosg.condition import Condition
from kosmosg.losses import diffusion_loss
from kosmosg.models.stable_diffusion import StableDiffusion
from tests import tiny


@pytest.fixture(scope="module")
def decoder(tiny_stable_diffusion):
    return StableDiffusion.from_pretrained(tiny_stable_diffusion)


def random_images(count):
    return torch.rand(count, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1


def test_it_is_frozen_but_lets_gradients_through(decoder):
    surrounding = torch.nn.ModuleList([decoder]).train()
    assert surrounding.training and not any(module.training for module in decoder.modules())
    states = torch.randn(2, tiny.QUERIES, tiny.CONDITION_WIDTH, requires_grad=True)
    images = random_images(2)
    assert decoder.latent_shape(images) == (4, tiny.LATENT_SIZE, tiny.LATENT_SIZE)
    latents = decoder.latents(images, noise=torch.randn(2, *decoder.latent_shape(images)))
    assert latents.shape[1:] == decoder.latent_shape(images) and not latents.requires_grad
    timesteps = decoder.timesteps(torch.tensor([0.0109, 0.99999]))
    assert timesteps.tolist() == [10, 999]
    noise = torch.randn_like(latents)
    noisy = decoder.add_noise(latents, noise, timesteps)
    target = decoder.training_target(latents, noise, timesteps)
    diffusion_loss(decoder.predict(noisy, timesteps, Condition(states)), target).backward()
    assert (states.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


def test_latents_are_the_scaled_posterior(decoder):
    images = random_images(1)
    posterior = decoder.vae.encode(images).latent_dist
    factor = decoder.vae.config.scaling_factor
    zeros, ones = torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean)
    torch.testing.assert_close(decoder.latents(images, noise=zeros), posterior.mean * factor)
    torch.testing.assert_close(decoder.latents(images, noise=ones), (posterior.mean + posterior.std) * factor)
    two = random_images(2)
    several = decoder.latents(two, noise=torch.cat([zeros, ones, ones, zeros]))
    once = torch.cat([decoder.latents(image[None], noise) for image, noise in product(two, (zeros, ones))])
    torch.testing.assert_close(several[:2], once[:2])
    torch.testing.assert_close(several[2:], once[2:].flip(0))
    moments = decoder.moments(two)
    assert decoder.are_moments(moments) and not decoder.are_moments(two)
    assert decoder.latent_shape(moments) == decoder.latent_shape(two)
    torch.testing.assert_close(decoder.latents(moments, noise=torch.cat([zeros] * 4))[::2], once[::2])
    assert decoder.decode(once).shape == (4, *two.shape[1:])


def test_errors(decoder):
    mask, sample = torch.ones(1, 3, dtype=torch.bool), type(decoder.scheduler)(prediction_type="sample")
    narrow, latents = Condition(torch.zeros(1, 3, 16)), torch.zeros(1, 4, 8, 8)
    for refused, told in (
        (lambda: decoder.predict(latents, torch.tensor([0]), narrow), "16 wide but the image decoder reads 32"),
        (lambda: decoder.check(Condition(torch.zeros(1, 3, 32), mask=mask)), "has mask True"),
        (lambda: decoder.moments(torch.zeros(1, 3, 60, 64)), "multiples of 8"),
        (lambda: decoder.image_size(-8, None), "height=-8"),
        (lambda: decoder.image_size(None, 60), "width=60"),
        (lambda: decoder.image_size(0, 64), "height=0"),
        (lambda: StableDiffusion(decoder.unet, decoder.vae, sample), "prediction_type='sample'.*'epsilon'"),
    ):
        with pytest.raises(ValueError, match=told):
            refused()


def test_text_side(tiny_stable_diffusion):
    decoder = StableDiffusion.from_pretrained(tiny_stable_diffusion, "text")
    assert decoder.unet is decoder.vae is None and not any(p.requires_grad for p in decoder.parameters())
    ids = decoder.tokenize(["a red fish", "b"])
    assert ids.shape == (2, tiny.QUERIES)
    assert (decoder.spec.tokens, decoder.spec.width) == (tiny.QUERIES, tiny.CONDITION_WIDTH)
    assert ids[1].tolist()[2:] == [decoder.tokenizer.eos_token_id] * (tiny.QUERIES - 2)
    states = decoder.text_condition(ids).states
    assert states.shape == (2, tiny.QUERIES, tiny.CONDITION_WIDTH) and not states.requires_grad
    assert (states[1, 5] - states[1, 6]).abs().max() > 0  # padding is read, position by position
    long = "a very long caption about a fish"
    assert decoder.tokenize([long]).shape == (1, tiny.QUERIES)
    with pytest.raises(ValueError, match=r"28 .*24"):
        decoder.tokenize([long], truncation=False)


def test_conditions():
    mask = torch.tensor([[True, False], [True, True]])
    condition = Condition(torch.randn(2, 2, 3), mask, torch.randn(2, 5))
    other = Condition(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 5))
    replaced = condition.replace_where(torch.tensor([True, False]), other)
    for ours, kept, new in zip(replaced, condition, other, strict=True):
        assert torch.equal(ours[1], kept[1]) and torch.equal(ours[:1], new)
    for ours, kept in zip(Condition.cat([condition.rows([1]), condition.rows([0])]), condition, strict=True):
        assert torch.equal(ours, kept.flip(0))
    repeated = condition.repeat_interleave(2)
    assert torch.equal(repeated.states[1], condition.states[0]) and torch.equal(repeated.mask[2], mask[1])
    half = condition.to(torch.float16)
    assert (half.states.dtype, half.mask.dtype, half.pooled.dtype) == (torch.float16, torch.bool, torch.float16)
