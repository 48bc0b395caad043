import pytest
import torch
from kosmosg.models.text_target import TextTarget

from kosmosg.losses import diffusion_loss
from kosmosg.models.image_decoder import ImageDecoder
from tests import tiny


@pytest.fixture(scope="module")
def decoder(tiny_stable_diffusion):
    return ImageDecoder.from_pretrained(tiny_stable_diffusion)


def test_it_is_frozen_but_lets_gradients_through(decoder):
    surrounding = torch.nn.ModuleList([decoder]).train()
    assert surrounding.training and not any(module.training for module in decoder.modules())
    condition = torch.randn(2, tiny.QUERIES, tiny.CONDITION_WIDTH, requires_grad=True)
    images = torch.rand(2, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1
    latents = decoder.latents(images)
    assert latents.shape == (2, 4, tiny.LATENT_SIZE, tiny.LATENT_SIZE) and not latents.requires_grad
    noise, timesteps = torch.randn_like(latents), torch.tensor([10, decoder.num_timesteps - 1])
    diffusion_loss(decoder(decoder.add_noise(latents, noise, timesteps), timesteps, condition), noise).backward()
    assert (condition.grad.flatten(1).norm(dim=1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in decoder.parameters())


def test_latents_are_the_scaled_posterior(decoder):
    images = torch.rand(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) * 2 - 1
    posterior = decoder.vae.encode(images).latent_dist
    factor = decoder.vae.config.scaling_factor
    zeros, ones = torch.zeros_like(posterior.mean), torch.ones_like(posterior.mean)
    torch.testing.assert_close(decoder.latents(images, noise=zeros), posterior.mean * factor)
    torch.testing.assert_close(decoder.latents(images, noise=ones), (posterior.mean + posterior.std) * factor)
    several = decoder.latents(images.repeat(2, 1, 1, 1), noise=torch.cat([zeros, ones, ones, zeros]))
    once = torch.cat([decoder.latents(images, noise=noise) for noise in (zeros, ones, ones, zeros)])
    torch.testing.assert_close(several, once)
    one, two = (decoder.latents(images, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, decoder.latents(images, noise=zeros))


def test_errors(decoder):
    with pytest.raises(ValueError, match="16 wide but the U-Net reads 32"):
        decoder(torch.zeros(1, 4, 8, 8), torch.tensor([0]), torch.zeros(1, 3, 16))
    with pytest.raises(ValueError, match="multiples of 8"):
        decoder.latents(torch.zeros(1, 3, 60, 64))
    velocity = type(decoder.scheduler)(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="'v_prediction'"):
        ImageDecoder(decoder.unet, decoder.vae, velocity)


def test_text_target(tiny_stable_diffusion):
    target = TextTarget.from_pretrained(tiny_stable_diffusion).train()
    assert not any(module.training for module in target.modules())
    assert not any(parameter.requires_grad for parameter in target.parameters())
    ids = target.tokenize(["a red fish", "b"])
    assert ids.shape == (2, tiny.QUERIES) and (target.length, target.width) == (tiny.QUERIES, tiny.CONDITION_WIDTH)
    end = target.tokenizer.eos_token_id
    assert ids[1].tolist()[2:] == [end] * (tiny.QUERIES - 2)
    states = target(ids)
    assert states.shape == (2, tiny.QUERIES, tiny.CONDITION_WIDTH) and not states.requires_grad
    assert (states[1, 5] - states[1, 6]).abs().max() > 0  # padding is read, position by position
    long = "a very long caption about a fish"
    assert target.tokenize([long]).shape == (1, tiny.QUERIES)
    with pytest.raises(ValueError, match="at most 24 are allowed"):
        target.tokenize([long], truncation=False)
