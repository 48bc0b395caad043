"""From a configuration to the model's parts: shipped sizes, weights of earlier stages and of CLIP, refusals."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from kosmosg.config import ConfigError, load_config
from kosmosg.models.build import (
    build_aligner,
    build_aligner_decoder,
    build_mllm,
    image_decoder_class,
    mllm_width,
)
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.model_config import AlignerConfig, AlignerDecoderConfig, MLLMConfig, ModelConfig, VisionConfig
from kosmosg.models.published import QWEN_2_5_VL_3B, STABLE_DIFFUSION_1_5
from kosmosg.models.stable_diffusion_xl import StableDiffusionXL
from kosmosg.models.storage import fingerprint, save_model
from kosmosg.tokenizer import Tokenizer
from tests import tiny
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs" / "model"
# Those of vision-language models name published weights; their sizes are the dry run's test.
OURS = sorted(path.name for path in CONFIGS.glob("*.yaml") if "language_model:" not in path.read_text())


@dataclass
class Schema:
    model: ModelConfig = field(default_factory=ModelConfig)


@pytest.fixture(scope="module")
def tokenizer(tiny_tokenizer):
    return Tokenizer.from_pretrained(tiny_tokenizer)


@pytest.fixture
def config(tiny_tokenizer, tiny_stable_diffusion):
    """The configuration of `tiny_model`."""
    aligner = {**tiny.aligner_sizes(), "num_queries": tiny.QUERIES}
    decoder = {name: size for name, size in tiny.aligner_sizes().items() if name != "width"}
    mllm = tiny.mllm_sizes()
    del mllm["vision_config"]
    vision = VisionConfig(image_size=64, patch_size=16, width=32, layers=2, heads=2, ffn_width=64)
    return ModelConfig(
        tokenizer=str(tiny_tokenizer),
        image_size=tiny.IMAGE_SIZE,
        mllm=MLLMConfig(**mllm, vision=vision),
        aligner=AlignerConfig(**aligner),
        aligner_decoder=AlignerDecoderConfig(**decoder),
        image_decoder=str(tiny_stable_diffusion),
    )


def state(module):
    return torch.cat([parameter.flatten() for parameter in module.parameters()])


def changed(config, part, **values):
    """The configuration with other values of `mllm` or `aligner`."""
    return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})


@pytest.mark.parametrize("name", OURS)
def test_every_shipped_model_builds(name, tokenizer):
    config = dataclasses.replace(load_config([str(CONFIGS / name)], Schema).model, vision_weights=None)
    with torch.device("meta"):
        mllm, aligner, decoder = build_mllm(config, tokenizer), build_aligner(config), build_aligner_decoder(config)
    assert aligner.config.input_width == mllm.config.width == decoder.config.output_width


def test_wrong_sizes_are_named():
    for override, told in (
        ("model.mllm.heads=3", "model.mllm.heads=3 does not divide model.mllm.width=128"),
        ("model.mllm.vision.patch_size=7", "not a multiple of patch_size=7"),
        ("model.mllm.vision.activation=relu", "allowed: quick_gelu, gelu"),
        ("model.mllm.dropout=1.5", "model.mllm.dropout=1.5"),
        ("model.aligner.num_queries=0", "model.aligner.num_queries=0"),
        ("model.aligner_decoder.heads=7", "model.aligner_decoder.heads=7"),
    ):
        with pytest.raises(ConfigError, match=told):
            load_config([str(CONFIGS / "toyland.yaml"), override], Schema)


def test_weights_of_an_earlier_stage(config, tokenizer, tiny_model):
    first, second = (build_mllm(config, tokenizer, init_from=tiny_model) for _ in range(2))
    assert torch.equal(state(first), state(second)) and first.training
    assert not torch.equal(state(first), state(build_mllm(config, tokenizer)))
    assert torch.equal(*(state(build_aligner(config, init_from=tiny_model)) for _ in range(2)))
    undropped = build_mllm(changed(config, "mllm", dropout=0.0), tokenizer, init_from=tiny_model)
    assert torch.equal(state(undropped), state(first))
    assert undropped.config.dropout == undropped.decoder.dropout.p == undropped.resampler.attention.dropout == 0.0


def test_the_resamplers_gain_is_on_initial_weights_alone(config, tokenizer, tiny_model):
    def projection(gain, **options):
        torch.manual_seed(0)
        return build_mllm(changed(config, "mllm", resampler_gain=gain), tokenizer, **options).resampler.projection

    plain, larger = projection(1.0), projection(8.0)
    assert torch.equal(larger.weight, 8 * plain.weight) and torch.equal(larger.bias, plain.bias)
    read = (projection(gain, init_from=tiny_model).weight for gain in (1.0, 8.0))
    assert torch.equal(*read)


def test_another_model_is_refused_by_what_differs(config, tokenizer, tiny_model, tmp_path):
    wider = changed(config, "mllm", ffn_width=96, xpos=True)
    linear = changed(config, "aligner", kind="linear")
    assert {name for name, _ in build_aligner(linear).named_parameters()} == {
        "padding", "projection.bias", "projection.weight"
    }  # fmt: skip
    save_model(tmp_path / "stage1" / "model", tokenizer, mllm=build_mllm(config, tokenizer))
    assert build_mllm(config, tokenizer, init_from=tmp_path / "stage1").config.width == tiny.WIDTH
    for build, error, told in (
        (lambda: build_mllm(wider, tokenizer, tiny_model), ValueError, "ffn_width is 64 there and 96.*xpos is False"),
        (lambda: build_aligner(changed(config, "aligner", num_queries=7), tiny_model), ValueError, "24 there and 7"),
        (lambda: build_aligner(linear, tiny_model), ValueError, "AlignerEncoder, not a LinearAligner"),
        (lambda: build_aligner_decoder(config, tiny_model), FileNotFoundError, "aligner_decoder"),
        (lambda: build_aligner(config, tmp_path / "stage1"), FileNotFoundError, "aligner"),
        (lambda: build_mllm(config, tokenizer, tmp_path), FileNotFoundError, "holds no model"),
    ):
        with pytest.raises(error, match=told):
            build()


def test_a_save_that_fails_leaves_the_old_model_whole(config, tokenizer, tmp_path, monkeypatch):
    first, second = (build_mllm(config, tokenizer) for _ in range(2))
    save_model(tmp_path / "model", tokenizer, mllm=first)
    (tmp_path / "model" / ".mllm.0123456789abcdef.new").mkdir()  # as a killed save leaves it
    monkeypatch.setattr(Tokenizer, "save_pretrained", lambda *_: (tmp_path / "full").read_bytes())
    with pytest.raises(FileNotFoundError):
        save_model(tmp_path / "model", tokenizer, mllm=second)
    assert torch.equal(state(build_mllm(config, tokenizer, init_from=tmp_path)), state(first))
    monkeypatch.undo()
    save_model(tmp_path / "model", tokenizer, mllm=second)
    assert torch.equal(state(build_mllm(config, tokenizer, init_from=tmp_path)), state(second))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["mllm", "tokenizer"]


def test_image_tower_of_a_clip_folder(config, tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": 50, "max_position_embeddings": 8},
            vision_config={**sizes, "image_size": 64, "patch_size": 16},
        )
    )
    clip.save_pretrained(tmp_path)
    config = dataclasses.replace(config, vision_weights=str(tmp_path))
    tower = build_mllm(config, tokenizer).vision.clip
    assert torch.equal(state(tower), state(clip.vision_model))
    other = changed(config, "mllm", vision=dataclasses.replace(config.mllm.vision, patch_size=32))
    with pytest.raises(ValueError, match="patch_size is 16 there and 32"):
        build_mllm(other, tokenizer)


def test_a_fingerprint_is_of_settings_and_weights_however_they_are_stored(tiny_model, tmp_path):
    model = KosmosG.from_pretrained(tiny_model)
    model.mllm.save_pretrained(tmp_path / "whole")
    model.mllm.save_pretrained(tmp_path / "divided", max_shard_size="50KB")
    assert len(list((tmp_path / "divided").glob("*.safetensors"))) > 2
    (tmp_path / "whole" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"never read")
    expected = fingerprint(tiny_model, "mllm")
    assert fingerprint(tmp_path, "whole") != expected  # the part's name counts
    assert {fingerprint(tmp_path / name) for name in ("whole", "divided")} == {fingerprint(tiny_model / "mllm")}
    vision = {"wanted": lambda name: name.startswith("vision.")}
    before = [fingerprint(tmp_path / "whole"), fingerprint(tmp_path / "whole", **vision)]
    with torch.no_grad():
        model.mllm.decoder.embed_tokens.weight[0, 0] += 1
    model.mllm.save_pretrained(tmp_path / "whole")
    after = [fingerprint(tmp_path / "whole"), fingerprint(tmp_path / "whole", **vision)]
    assert before[0] != after[0] and before[1] == after[1]
    for file in (tmp_path / "divided").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="divided' holds none of"):
        fingerprint(tmp_path / "divided")


def test_a_folder_with_the_name_of_a_published_model_is_that_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tiny.write_language_model(Path(QWEN_2_5_VL_3B), "qwen2_5_vl")
    assert mllm_width(ModelConfig(tokenizer="", language_model=str(source))) == 48
    tiny.write_stable_diffusion_xl(Path(STABLE_DIFFUSION_1_5))
    assert image_decoder_class(STABLE_DIFFUSION_1_5) is StableDiffusionXL
