"""Stage 1 of the recorded set: image tower, resampler, embeddings, every layer, hidden states and logits."""

import pytest
import torch

from kosmosg.conversion import convert_public_vision


def layer_outputs(layers, run):
    """Outputs of `layers` in order while `run()` runs."""
    outputs: list[torch.Tensor] = []
    handles = [layer.register_forward_hook(lambda module, args, output: outputs.append(output)) for layer in layers]
    with torch.no_grad():
        result = run()
    for handle in handles:
        handle.remove()
    return outputs, result


def test_image_tower(recording, stage1):
    clip, images = stage1.mllm.vision.clip, recording.inputs["interleaved.images"]
    layers = [clip.pre_layrnorm, *clip.encoder.layers, clip.post_layernorm]
    outputs, tokens = layer_outputs(layers, lambda: stage1.mllm.vision(images))
    # CLIPVisionModel also pools the class token through the final norm, before ours over all tokens.
    outputs = [output for output in outputs if output.dim() == 3]
    names = ["ln_pre", *(f"block{i}" for i in range(recording.config["vision"]["layers"])), "ln_post"]
    for name, output in zip(names, outputs, strict=True):
        recording.assert_activation(output, f"stage1.vit.{name}")
    recording.assert_activation(tokens, "stage1.vit.tokens")


def test_public_image_tower(recording, stage1):
    fresh = recording.load("stage1").mllm.vision
    public = torch.load(recording.folder / "model" / "vit_pretrained.pt", weights_only=True)
    fresh.clip.load_state_dict(convert_public_vision(public), strict=True)
    expected = recording.outputs["vit_pretrained.tokens"]
    with torch.no_grad():
        tokens = fresh(recording.inputs["interleaved.images"][: len(expected)])
    recording.assert_activation(tokens, "vit_pretrained.tokens")


@torch.no_grad()
def test_image_features_and_embeddings(recording, stage1):
    batch = recording.prompts("interleaved")
    features = stage1.mllm.image_features(batch.images)
    recording.assert_activation(features.flatten(0, 1), "stage1.interleaved.image_features")
    recording.assert_activation(stage1.mllm.embed(batch), "stage1.interleaved.embed_out")


def test_every_layer(recording, stage1):
    batch = recording.prompts("interleaved")
    outputs, hidden = layer_outputs(stage1.mllm.decoder.layers, lambda: stage1.mllm(batch))
    assert len(outputs) == recording.config["llm"]["layers"]
    for number, output in enumerate(outputs):
        recording.assert_activation(output, f"stage1.interleaved.layer{number}_out")
    recording.assert_activation(hidden, "stage1.interleaved.hidden")
    recording.assert_activation(stage1.mllm.logits(hidden).detach(), "stage1.interleaved.logits")


@torch.no_grad()
@pytest.mark.parametrize("name", ["text", "text_long"])
def test_text_alone(recording, stage1, name):
    hidden = stage1.mllm(recording.prompts(name))
    recording.assert_activation(hidden, f"stage1.{name}.hidden")
    if name == "text":
        recording.assert_activation(stage1.mllm.logits(hidden), "stage1.text.logits")


@torch.no_grad()
def test_null_prompt(recording, stage1):
    recording.assert_activation(stage1.mllm(stage1.mllm.unconditional_prompt()), "stage1.null_hidden")


@torch.no_grad()
def test_xpos_variant(recording, stage1):
    switched = recording.load("stage1", xpos=True).mllm
    batch = recording.prompts("interleaved")
    hidden = switched(batch)
    recording.assert_activation(hidden, "xpos_variant.interleaved.hidden")
    assert (hidden - stage1.mllm(batch)).abs().max() > 0.01


@torch.no_grad()
def test_padding_does_not_reach_real_tokens(recording, stage1):
    batch = recording.prompts("text")
    length = int((~batch.padding[0]).sum())
    alone = type(batch)(
        ids=batch.ids[:1, :length],
        image_mask=batch.image_mask[:1, :length],
        images=None,
        padding=batch.padding[:1, :length],
    )
    torch.testing.assert_close(stage1.mllm(alone)[0], stage1.mllm(batch)[0, :length], rtol=0, atol=1e-5)
