"""Strictness of the name mapping; that it is right is shown in tests/parity."""

import json
from dataclasses import dataclass

import pytest
import torch

from kosmosg.config import load_config
from kosmosg.conversion import convert_public_vision, convert_state, our_name, released_name
from kosmosg.conversion.names import is_unneeded
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.build import build_aligner, build_aligner_decoder, build_mllm
from kosmosg.models.mllm import MLLM
from kosmosg.models.model_config import ModelConfig
from kosmosg.tokenizer import Tokenizer
from tests import tiny


@dataclass
class Full:
    model: ModelConfig


EMBEDDING, PROJECTION = "gpt_model.decoder.embed_tokens.weight", "gpt_model.decoder.output_projection.weight"


@pytest.fixture
def our_names():
    """(part, name) of every tensor of MLLM, M and N."""
    parts = {
        "mllm": MLLM(vocab_size=20, **tiny.mllm_sizes()),
        "aligner": AlignerEncoder(input_width=tiny.WIDTH, num_queries=tiny.QUERIES, **tiny.aligner_sizes()),
        "aligner_decoder": AlignerDecoder(output_width=tiny.WIDTH, **tiny.aligner_sizes()),
    }
    return [(part, name) for part, module in parts.items() for name in module.state_dict()]


def test_names():
    for released, ours in [
        (
            "gpt_model.decoder.layers.11.self_attn.inner_attn_ln.bias",
            "decoder.layers.11.self_attention.inner_norm.bias",
        ),
        ("aligner.encoder_proj.layers.3.ffn.fc1.weight", "encoder.3.feed_forward.fc1.weight"),
        ("aligner.encoder.layers.3.encoder_attn.q_proj.weight", "decoder.3.cross_attention.q_proj.weight"),
        ("img_model.visual.conv1.weight", "vision.clip.embeddings.patch_embedding.weight"),
        ("vae.vae.encoder.conv_in.weight", "encoder.conv_in.weight"),
    ]:
        assert our_name(released)[1] == ours


def test_unknown_names_are_errors():
    for name in [
        "gpt_model.decoder.layers.0.self_attn.relative.weight",
        "gpt_model.decoder.layers.0.ffn.fc3.weight",
        "aligner.encoder_extra",
        "optimizer.state",
    ]:
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


def test_released_name_is_the_inverse(our_names):
    for part, name in our_names:
        assert our_name(released_name(part, name)) == (part, name)
    assert released_name("mllm", "decoder.novel") is None


def test_old_names_of_the_vaes_attention():
    for old in ["query", "key", "value", "proj_attn"]:
        new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}[old]
        stem = "decoder.mid_block.attentions.0"
        assert our_name(f"vae.vae.{stem}.{old}.weight") == ("vae", f"{stem}.{new}.weight")
        both = {f"vae.vae.{stem}.{name}.weight": torch.zeros(1) for name in (old, new)}
        with pytest.raises(ValueError, match="twice"):
            convert_state(both)


def test_names_and_shapes_of_the_full_size(shared):
    """The paper's sizes under our names, turned back, are the released checkpoints' names and shapes."""
    recorded = json.loads((shared / "golden" / "keys_full.json").read_text())
    config = load_config(["configs/model/kosmosg.yaml"], Full).model
    config.vision_weights = None
    tokenizer = Tokenizer.from_pretrained(shared / "golden" / "tokenizer")
    with torch.device("meta"):
        parts = {
            ("mllm", "mllm"): build_mllm(config, tokenizer),
            ("aligner", "aligner_M"): build_aligner(config),
            ("aligner_decoder", "aligner_N"): build_aligner_decoder(config),
        }
    for (part, theirs), module in parts.items():
        ours = {released_name(part, name): list(tensor.shape) for name, tensor in module.state_dict().items()}
        assert ours == {name: shape for name, shape in recorded[theirs].items() if not is_unneeded(name)}
    counts = [sum(p.numel() for p in module.parameters()) for module in parts.values()]
    totals = recorded["param_counts"]
    assert counts == [totals[n] for n in ("mllm_total", "aligner_M_encoder_half", "aligner_N_decoder_half")]
