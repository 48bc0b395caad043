"""Stage 2 of the recorded set: M, N, the CLIP target, both losses, gradients and what trains."""

import pytest
import torch

from kosmosg.condition import Condition
from kosmosg.conversion import our_name
from kosmosg.losses import reconstruction_loss, text_losses
from tests.parity.conftest import GRADIENT_FLOOR, GRADIENT_NORMS

BATCHES = ["text", "text_long", "interleaved"]


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_aligner(recording, stage2, name):
    recorded, batch = recording.outputs[f"stage2.{name}.m_encoder_out"], recording.prompts(name)
    hidden = stage2.mllm(batch)
    assert recorded.shape[1] == batch.ids.shape[1]
    recording.assert_activation(stage2.aligner.encode(hidden, batch.padding), f"stage2.{name}.m_encoder_out")
    recording.assert_activation(stage2.aligner(hidden, batch.padding).states, f"stage2.{name}.m_out")


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_text_encoder(recording, decoder, name):
    target = decoder.text_condition(recording.inputs[f"{name}.clip_tokens"])
    recording.assert_activation(target.states, f"stage2.{name}.clip_target")


@torch.no_grad()
@pytest.mark.parametrize("name", BATCHES)
def test_aligner_decoder_and_losses(recording, stage2, decoder, name):
    """Of the recorded M(s) and s."""
    condition = Condition(recording.outputs[f"stage2.{name}.m_out"])
    hidden, padding = recording.outputs[f"stage1.{name}.hidden"], recording.prompts(name).padding
    decoded = stage2.aligner_decoder.decode(condition.states, hidden.shape[1])
    recording.assert_activation(decoded, f"stage2.{name}.n_decoder_out")
    reconstruction = stage2.aligner_decoder(condition, hidden.shape[1])
    recording.assert_activation(reconstruction, f"stage2.{name}.n_out")
    target = decoder.text_condition(recording.inputs[f"{name}.clip_tokens"])
    recording.assert_loss(text_losses(condition, target).mean(), f"stage2.{name}.mse_loss")
    loss = reconstruction_loss(hidden, reconstruction, condition.states.shape[1], padding)
    recording.assert_loss(loss, f"stage2.{name}.rec_loss")


def test_gradients(recording, stage2, decoder):
    """Of M and N; where M is not in the set, those of N with M(s) as recorded."""
    padding = recording.prompts("text").padding
    hidden = recording.outputs["stage1.text.hidden"]
    parts = {"aligner": stage2.aligner, "aligner_decoder": stage2.aligner_decoder}
    parts = {name: part for name, part in parts.items() if part is not None}
    for part in parts.values():
        part.zero_grad()
    if stage2.aligner is None:
        condition = Condition(recording.outputs["stage2.text.m_out"])
    else:
        condition = stage2.aligner(hidden, padding)
    reconstruction = stage2.aligner_decoder(condition, hidden.shape[1])
    with torch.no_grad():
        target = decoder.text_condition(recording.inputs["text.clip_tokens"])
    loss = text_losses(condition, target).mean()
    loss = loss + reconstruction_loss(hidden, reconstruction, condition.states.shape[1], padding)
    recording.assert_loss(loss.detach(), "stage2.text.total_loss")
    loss.backward()

    gradients = {(part, name): p.grad for part, model in parts.items() for name, p in model.named_parameters()}
    assert_gradients(recording, gradients, "stage2")
    trainable = {our_name(name) for name in recording.facts["stage2_trainable"]}
    assert set(gradients) == {name for name in trainable if name[0] in parts}


def assert_gradients(recording, gradients, stage, scale=1.0):
    """Every recorded norm and every recorded gradient; `scale` undoes what the recorded loss was multiplied by."""
    norms = recording.facts[f"{stage}_grad_norms"]
    norms = {name: norm for name, norm in norms.items() if our_name(name) in gradients}
    assert len(norms) > 100
    for name, norm in norms.items():
        ours = gradients[our_name(name)].norm().item() * scale
        assert ours == pytest.approx(norm, rel=GRADIENT_NORMS, abs=GRADIENT_FLOOR), name
    prefixes = (f"{stage}.text.grad.", f"{stage}.grad.")
    recorded = {key: key.removeprefix(p) for key in recording.outputs for p in prefixes if key.startswith(p)}
    assert recorded
    for key, name in recorded.items():
        recording.assert_gradient(gradients[our_name(name)] * scale, key)
