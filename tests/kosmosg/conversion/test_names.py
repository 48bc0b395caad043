"""Strictness of the name mapping; that it is right is shown in tests/parity."""

import json
from dataclasses import dataclass

import pytest
import torch

from kosmosg.config import load_config
from kosmosg.conversion import convert_public_vision, convert_state, our_name, released_name
from kosmosg.conversion.names import is_unneeded
from kosmosg.models.build import build_aligner, build_aligner_decoder, build_mllm
from kosmosg.models.model_config import ModelConfig
from tests.kosmosg.conversion.conftest import EMBEDDING, PROJECTION


@dataclass
class Full:
    model: ModelConfig


class Vocabulary:
    """What builders read of a tokenizer, of the released number of ids."""

    pad_id, bos_id = 1, 0

    def __len__(self):
        return 64007


def test_names_and_shapes_of_the_full_size(recorded):
    """The paper's sizes under our names, turned back, are the released checkpoints' names and shapes."""
    released = json.loads((recorded / "keys_full.json").read_text())
    config = load_config(["configs/model/kosmosg.yaml", "model.vision_weights=null"], Full).model
    with torch.device("meta"):
        parts = {
            ("mllm", "mllm"): build_mllm(config, Vocabulary()),
            ("aligner", "aligner_M"): build_aligner(config),
            ("aligner_decoder", "aligner_N"): build_aligner_decoder(config),
        }
    for (part, theirs), module in parts.items():
        ours = {released_name(part, name): list(tensor.shape) for name, tensor in module.state_dict().items()}
        assert ours == {name: shape for name, shape in released[theirs].items() if not is_unneeded(name)}
        assert all(our_name(released_name(part, name)) == (part, name) for name in module.state_dict())
    counts = [sum(p.numel() for p in module.parameters()) for module in parts.values()]
    assert counts == [1_662_375_936, 225_461_760, 250_569_728]  # the paper's
    assert released_name("mllm", "decoder.novel") is None


def test_unneeded_names_are_listed_and_unknown_ones_refused():
    buffer, embedding = "gpt_model.decoder.self_attn_sope.scale", torch.zeros(2, 2)
    converted = convert_state({EMBEDDING: embedding, PROJECTION: embedding, buffer: torch.zeros(1)})
    assert sorted(converted.unneeded) == sorted([PROJECTION, buffer])
    assert list(converted.parts) == ["mllm"] and list(converted.parts["mllm"]) == ["decoder.embed_tokens.weight"]
    for name in (
        "gpt_model.decoder.layers.0.self_attn.relative.weight",
        "gpt_model.decoder.layers.0.ffn.fc3.weight",
        "aligner.encoder_extra",
        "optimizer.state",
    ):
        with pytest.raises(ValueError, match=f"1 of .*{name}"):
            convert_state({EMBEDDING: embedding, name: torch.zeros(1)})


def test_fused_attention_is_split_in_order():
    fused = torch.arange(6.0)[:, None].expand(6, 2)
    state = {"visual.transformer.resblocks.0.attn.in_proj_weight": fused, "visual.proj": fused, "logit_scale": fused}
    converted = convert_public_vision(state)
    rows = [converted[f"encoder.layers.0.self_attn.{name}_proj.weight"][:, 0].tolist() for name in "qkv"]
    assert rows == [[0, 1], [2, 3], [4, 5]] and len(converted) == 3
    with pytest.raises(ValueError, match=r"visual\.novel"):
        convert_public_vision({"visual.novel": fused})


def test_a_tensor_under_its_old_and_its_new_name():
    names = [f"vae.vae.decoder.mid_block.attentions.0.{name}.weight" for name in ("proj_attn", "to_out.0")]
    assert our_name(names[0]) == our_name(names[1])
    with pytest.raises(ValueError, match="twice"):
        convert_state({name: torch.zeros(1) for name in names})
