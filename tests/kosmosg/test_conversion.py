"""Strictness of the name mapping; that it is right is shown in tests/parity."""

import argparse
import pickle

import pytest
import torch

from kosmosg.conversion import convert_public_vision, convert_state, our_name, read_checkpoint

EMBEDDING, PROJECTION = "gpt_model.decoder.embed_tokens.weight", "gpt_model.decoder.output_projection.weight"


@pytest.mark.parametrize(
    ("released", "ours"),
    [
        (
            "gpt_model.decoder.layers.11.self_attn.inner_attn_ln.bias",
            "decoder.layers.11.self_attention.inner_norm.bias",
        ),
        ("aligner.encoder_proj.layers.3.ffn.fc1.weight", "encoder.3.feed_forward.fc1.weight"),
        ("aligner.encoder.layers.3.encoder_attn.q_proj.weight", "decoder.3.cross_attention.q_proj.weight"),
        ("img_model.visual.conv1.weight", "vision.clip.embeddings.patch_embedding.weight"),
        ("vae.vae.encoder.conv_in.weight", "encoder.conv_in.weight"),
    ],
)
def test_names(released, ours):
    assert our_name(released)[1] == ours


@pytest.mark.parametrize(
    "name",
    [
        "gpt_model.decoder.layers.0.self_attn.relative.weight",
        "gpt_model.decoder.layers.0.ffn.fc3.weight",
        "aligner.encoder_extra",
        "optimizer.state",
    ],
)
def test_unknown_names_are_errors(name):
    with pytest.raises(ValueError, match=f"1 names .*{name}"):
        convert_state({EMBEDDING: torch.zeros(2, 2), name: torch.zeros(1)})


def test_unneeded_names_are_listed():
    buffer = "gpt_model.decoder.self_attn_sope.scale"
    converted = convert_state({EMBEDDING: torch.zeros(2, 2), PROJECTION: torch.zeros(2, 2), buffer: torch.zeros(1)})
    assert sorted(converted.unneeded) == sorted([PROJECTION, buffer])
    assert list(converted.parts) == ["mllm"] and list(converted.parts["mllm"]) == ["decoder.embed_tokens.weight"]


def test_untied_embeddings_are_refused():
    with pytest.raises(ValueError, match="ties them"):
        convert_state({EMBEDDING: torch.zeros(2, 2), PROJECTION: torch.ones(2, 2)})


def test_fused_attention_is_split_in_order():
    fused = torch.arange(6.0)[:, None].expand(6, 2)
    state = {"visual.transformer.resblocks.0.attn.in_proj_weight": fused, "visual.proj": fused, "logit_scale": fused}
    converted = convert_public_vision(state)
    rows = [converted[f"encoder.layers.0.self_attn.{name}_proj.weight"][:, 0].tolist() for name in "qkv"]
    assert rows == [[0, 1], [2, 3], [4, 5]] and len(converted) == 3
    with pytest.raises(ValueError, match=r"visual\.novel"):
        convert_public_vision({"visual.novel": fused})


class Malicious:
    def __reduce__(self):
        return print, ("unpickled",)


def test_only_data_is_unpickled(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save({"args": argparse.Namespace(lr=[0.1]), "model": {"a": torch.ones(1)}}, path)
    assert read_checkpoint(path)["args"].lr == [0.1]
    torch.save({"args": Malicious(), "model": {}}, path)
    with pytest.raises(pickle.UnpicklingError, match="print"):
        read_checkpoint(path)
    assert "unpickled" not in capsys.readouterr().out
    torch.save({"weights": {}}, path)
    with pytest.raises(ValueError, match="no 'model'"):
        read_checkpoint(path)
