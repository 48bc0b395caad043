"""Stage 3 of the recorded set: conditions, VAE moments, noise, the U-Net, the loss with recorded draws, gradients."""

import pytest
import torch
from transformers import CLIPTextModel

from kosmosg.conversion import our_name
from kosmosg.losses import diffusion_loss
from kosmosg.models.stable_diffusion import StableDiffusion
from tests.parity.test_alignment import assert_gradients

DROP_PROBABILITY = 0.1


def condition_after_drop(recording, final):
    condition = final.model.condition(recording.prompts("interleaved"))
    dropped = recording.inputs["stage3.drop_uniform"] < DROP_PROBABILITY
    return condition.replace_where(dropped, final.model.null_condition())


def noisy_latents(recording, decoder):
    latents = decoder.latents(recording.inputs["stage3.target_images"], noise=recording.inputs["stage3.vae_noise"])
    noise, timesteps = recording.inputs["stage3.noise"], recording.inputs["stage3.timesteps"]
    return latents, decoder.add_noise(latents, noise, timesteps)


@torch.no_grad()
def test_conditions(recording, final):
    batch = recording.prompts("interleaved")
    features = final.mllm.image_features(batch.images)
    recording.assert_activation(features.flatten(0, 1), "stage3.interleaved.image_features")
    hidden = final.mllm(batch)
    recording.assert_activation(hidden, "stage3.interleaved.hidden")
    recording.assert_activation(final.aligner(hidden, batch.padding).states, "stage3.interleaved.m_out")
    recording.assert_activation(final.mllm(final.mllm.unconditional_prompt()), "stage3.null_hidden")
    recording.assert_activation(final.model.null_condition().states, "stage3.null_m_out")
    if not recording.reduced:
        recording.assert_activation(condition_after_drop(recording, final).states, "stage3.condition_after_drop")


@torch.no_grad()
def test_latents(recording, decoder):
    posterior = decoder.vae.encode(recording.inputs["stage3.target_images"]).latent_dist
    recording.assert_activation(posterior.mean, "stage3.vae_mean")
    recording.assert_activation(posterior.logvar, "stage3.vae_logvar")
    latents, noisy = noisy_latents(recording, decoder)
    recording.assert_activation(latents, "stage3.latents")
    recording.assert_activation(noisy, "stage3.noisy_latents")


def test_loss_and_gradients(recording, final, decoder):
    final.model.zero_grad()
    _, noisy = noisy_latents(recording, decoder)
    condition = condition_after_drop(recording, final)
    prediction = decoder.predict(noisy, recording.inputs["stage3.timesteps"], condition)
    recording.assert_activation(prediction.detach(), "stage3.unet_pred")
    noise = recording.inputs["stage3.noise"]
    recording.assert_loss(diffusion_loss(prediction, noise, reduction="none").detach(), "stage3.per_sample_mse")
    loss = diffusion_loss(prediction, noise)
    samples = recording.facts["stage3_sample_size"]
    recording.assert_loss(loss.detach() * samples, "stage3.diff_loss")

    loss.backward()
    parts = {"mllm": final.mllm, "aligner": final.aligner}
    gradients = {(part, name): p.grad for part, model in parts.items() for name, p in model.named_parameters()}
    # The recorded loss is a sum over samples, ours a mean: what the released code divides by later.
    assert_gradients(recording, gradients, "stage3", scale=samples)
    trainable = {our_name(name) for name in recording.facts["stage3_trainable"]} - {None}
    frozen = {
        key
        for key in gradients
        if key[1].startswith("vision.")
        and "post_layernorm" not in key[1]
        and f"layers.{recording.config['vision']['layers'] - 1}." not in key[1]
    }
    assert trainable == set(gradients) - frozen
    assert all(parameter.grad is None for parameter in decoder.parameters())


def test_stable_diffusions_folder_is_the_checkpoints(recording, decoder):
    """What a recorded folder holds in diffusers' and transformers' own files."""
    if recording.reduced:
        pytest.skip("the reduced set has these weights once")
    theirs = StableDiffusion.from_pretrained(recording.stable_diffusion, "images")
    text = CLIPTextModel.from_pretrained(recording.stable_diffusion, subfolder="text_encoder")
    for ours, own in ((decoder.unet, theirs.unet), (decoder.vae, theirs.vae), (decoder.text_encoder, text)):
        states = ours.state_dict(), own.state_dict()
        assert set(states[0]) == set(states[1])
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), name
