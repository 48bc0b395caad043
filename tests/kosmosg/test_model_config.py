"""Sizes: every shipped model YAML builds, and the full one has the paper's parameter counts and names' shapes."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from kosmosg.config import ConfigError, load_config
from kosmosg.models.build import build_aligner, build_aligner_decoder, build_mllm
from kosmosg.models.model_config import ModelConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "model"
FULL_VOCABULARY = 64007


@dataclass
class Schema:
    model: ModelConfig = field(default_factory=ModelConfig)


class Vocabulary:
    """What builders read of a tokenizer."""

    pad_id, bos_id = 1, 0

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


def build(name: str, vocabulary: int = FULL_VOCABULARY, *overrides: str) -> tuple:
    config = load_config([str(CONFIGS / name), *overrides], Schema).model
    config = dataclasses.replace(config, vision_weights=None)
    with torch.device("meta"):
        return build_mllm(config, Vocabulary(vocabulary)), build_aligner(config), build_aligner_decoder(config)


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_full_size_has_the_papers_parameter_counts():
    assert [parameters(part) for part in build("kosmosg.yaml")] == [1_662_375_936, 225_461_760, 250_569_728]


def test_full_size_has_the_released_shapes(recorded):
    released = json.loads((recorded / "keys_full.json").read_text())
    mllm, aligner, decoder = build("kosmosg.yaml")
    ours = [tuple(p.shape) for part in (aligner, decoder) for p in part.parameters()]
    theirs = [tuple(s) for group in ("aligner_M", "aligner_N") for s in released[group].values()]
    assert sorted(ours) == sorted(theirs)
    uncounted = {"gpt_model.decoder.output_projection.weight", *released["buffers_in_state_dict"]}
    theirs = [tuple(shape) for name, shape in released["mllm"].items() if name not in uncounted]
    assert sorted(tuple(p.shape) for p in mllm.parameters()) == sorted(theirs)


# Those of vision-language models name published weights; their sizes are the dry run's test.
OURS = sorted(path.name for path in CONFIGS.glob("*.yaml") if "language_model:" not in path.read_text())


@pytest.mark.parametrize("name", OURS)
def test_every_shipped_model_builds(name):
    mllm, aligner, decoder = build(name, vocabulary=100)
    assert aligner.config.input_width == mllm.config.width == decoder.config.output_width


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.mllm.heads=3", "model.mllm.heads=3 does not divide model.mllm.width=128"),
        ("model.mllm.vision.patch_size=7", "not a multiple of patch_size=7"),
        ("model.mllm.vision.activation=relu", "allowed: quick_gelu, gelu"),
        ("model.mllm.dropout=1.5", "model.mllm.dropout=1.5"),
        ("model.aligner.num_queries=0", "model.aligner.num_queries=0"),
        ("model.aligner_decoder.heads=7", "model.aligner_decoder.heads=7"),
        ("model.mllm.widht=64", "width"),
    ],
)
def test_wrong_values_are_named(override, told):
    with pytest.raises(ConfigError, match=told):
        build("toyland.yaml", 100, override)
