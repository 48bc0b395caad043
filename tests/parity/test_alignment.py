"""Stage 2 of the recorded set: M, N, the CLIP target, both losses, gradients and what trains."""

import pytest
import torch

from kosmosg.conversion import our_name
from kosmosg.losses import reconstruction_loss, text_losses
from tests.parity.conftest import GRADIENT_FLOOR, GRADIENT_NORMS

BATCHES = ["text", "text_long", "interleaved"]


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_aligner_and_losses(recording, stage2, decoder, name):
    batch = recording.prompts(name)
    hidden = stage2.mllm(batch)
    encoded = stage2.aligner.encode(hidden, batch.padding)
    recording.assert_activation(encoded, f"stage2.{name}.m_encoder_out")
    condition = stage2.aligner(hidden, batch.padding)
    recording.assert_activation(condition.states, f"stage2.{name}.m_out")
    target = decoder.text_condition(recording.inputs[f"{name}.clip_tokens"])
    recording.assert_activation(target.states, f"stage2.{name}.clip_target")
    length = batch.ids.shape[1]
    recording.assert_activation(stage2.aligner_decoder.decode(condition.states, length), f"stage2.{name}.n_decoder_out")
    reconstruction = stage2.aligner_decoder(condition, length)
    recording.assert_activation(reconstruction, f"stage2.{name}.n_out")
    recording.assert_loss(text_losses(condition, target).mean(), f"stage2.{name}.mse_loss")
    rec = reconstruction_loss(hidden, reconstruction, condition.states.shape[1], batch.padding)
    recording.assert_loss(rec, f"stage2.{name}.rec_loss")


def test_gradients(recording, stage2, decoder):
    batch = recording.prompts("text")
    with torch.no_grad():
        hidden = stage2.mllm(batch)
        target = decoder.text_condition(recording.inputs["text.clip_tokens"])
    parts = {"aligner": stage2.aligner, "aligner_decoder": stage2.aligner_decoder}
    for part in parts.values():
        part.zero_grad()
    condition = stage2.aligner(hidden, batch.padding)
    reconstruction = stage2.aligner_decoder(condition, batch.ids.shape[1])
    loss = text_losses(condition, target).mean()
    loss = loss + reconstruction_loss(hidden, reconstruction, condition.states.shape[1], batch.padding)
    recording.assert_loss(loss.detach(), "stage2.text.total_loss")
    loss.backward()

    gradients = {(part, name): p.grad for part, model in parts.items() for name, p in model.named_parameters()}
    assert_gradients(recording, gradients, "stage2")
    assert set(gradients) == {our_name(name) for name in recording.facts["stage2_trainable"]}


def assert_gradients(recording, gradients, stage, scale=1.0):
    """Every recorded norm and every recorded gradient; `scale` undoes what the recorded loss was multiplied by."""
    norms = recording.facts[f"{stage}_grad_norms"]
    assert norms
    for name, norm in norms.items():
        ours = gradients[our_name(name)].norm().item() * scale
        assert ours == pytest.approx(norm, rel=GRADIENT_NORMS, abs=GRADIENT_FLOOR), name
    prefixes = (f"{stage}.text.grad.", f"{stage}.grad.")
    recorded = {key: key.removeprefix(p) for key in recording.outputs for p in prefixes if key.startswith(p)}
    assert recorded
    for key, name in recorded.items():
        recording.assert_gradient(gradients[our_name(name)] * scale, key)


def test_recorded_text_encoder_is_the_checkpoints(recording, stage2, decoder):
    ours = decoder.text_encoder.state_dict()
    recorded = stage2.converted.parts["text_encoder"]
    assert {name.removeprefix("text_model.") for name in recorded} == {n.removeprefix("text_model.") for n in ours}
    for name, tensor in ours.items():
        key = name if name in recorded else f"text_model.{name}"
        torch.testing.assert_close(recorded[key], tensor, rtol=0, atol=0)
