"""What `train.py` refuses: the arguments, and the words that its answer must contain."""

from collections.abc import Callable
from pathlib import Path

import pytest

import train
from tests.lightning_modules.miniature import KEYS
from tests.lightning_modules.runs import run

LANGUAGE = "model.language_model={qwen2_5_vl} init_from=null"
REFUSALS = (
    # any stage
    ("alignment", "stage=aligment", "stage is 'aligment'; allowed: language_modelling, alignment, instruction_tuning"),
    ("alignment", "optimizer.lrr=1", "Key 'lrr' not in 'OptimizerConfig'. Did you mean: 'lr'?"),
    ("alignment", "recipe.mse_weigth=1", "Did you mean one of: 'mse_weight', 'rec_weight'?"),
    ("alignment", "init_from=nowhere", "'nowhere' holds no model"),
    ("alignment", "trainer.max_steps=0", "trainer.max_steps is 0; allowed: 1 or more"),
    ("alignment", "trainer.strategy=dp", "expected one of ['auto', 'single', 'ddp', 'fsdp2']"),
    ("alignment", "trainer.strategy=single trainer.devices=2", "trainer.strategy is single, but trainer.devices is 2"),
    ("alignment", "trainer.global_batch_size=6", "trainer.global_batch_size is 6, but data.micro_batch_size 4"),
    *(
        ("alignment", f"optimizer.{key}={value}", f"optimizer.{key} is ")
        for key, value in (
            *(("lr", 0), ("betas", "[0.9,1.0]"), ("eps", 0), ("weight_decay", -1), ("max_grad_norm", 0)),
            ("warmup_steps", -1),
        )
    ),
    *(
        ("alignment", f"hardware.{key}={value}", f"hardware.{key} is ")
        for key, value in (("device", "abacus"), ("utilization", 0), ("memory_gib", -1), ("prompt_tokens", -1))
    ),
    *(
        ("alignment", f"grids.{key}={value}", f"grids.{key} is ")
        for key, value in (("guidance_scale", "nan"), ("seed", -1), ("steps", 0), ("every", -1))
    ),
    # data and caches
    ("alignment", "data.captions.shards=nowhere/train-*.tar", "nowhere/train-*.tar"),
    ("alignment", "data.validation_sources=[caption]", "data.validation_sources names ['caption']; allowed: captions"),
    ("alignment", "data.cached_states=float32 recipe.variant=masked grids.every=2", "set grids.every=0"),
    ("instruction_tuning", "data.aspect_ratio_multiple=12", "multiples of 8"),
    # models
    ("alignment", "model.mllm.ffn_width=48", "ffn_width is 64 there and 48 in the configuration"),
    ("alignment", "model.aligner.num_queries=5", "model.aligner.num_queries is 5, but the text model"),
    ("alignment", "model.hidden_layer=3", "model.hidden_layer=3 and model.max_image_pixels=None are not allowed"),
    ("language_modelling", LANGUAGE, "has learned language already"),
    ("alignment", f"{LANGUAGE} model.max_image_pixels=0", "model.max_image_pixels=0 is not allowed"),
    ("alignment", f"{LANGUAGE} model.hidden_layer=9", "model.hidden_layer=9 is not allowed"),
    ("instruction_tuning", "model.language_model={qwen2_5_vl}", "holds a MLLM, not a VisionLanguageModel"),
    ("alignment", "model.language_model=nobody/nothing dry_run=true", "whose sizes a dry run does not know"),
    ("alignment", "model.language_model={empty} init_from=null", "cannot be read"),
    ("alignment", "model.image_decoder={xl}", "model.aligner.pooled_width is None, but"),
    ("instruction_tuning", "model.image_decoder={xl}", "model.aligner.pooled_width is None, but"),
    # weighting of timesteps
    ("instruction_tuning", "recipe.snr_gamma=0", "recipe.snr_gamma is 0.0; allowed: null, or above 0"),
    ("instruction_tuning", "recipe.snr_gamma=5 recipe.timestep_weighting=sds", "allowed: snr_gamma with uniform alone"),
    (
        "instruction_tuning",
        "recipe.timestep_weighting=velocity model.image_decoder={2.1}",
        "is not defined for an image decoder that predicts the velocity",
    ),
)
STATES, STAGE_3 = "data.cached_states=float32", "data.cached_latents=float32 data.cached_vision=float32"
MASKED = f"{STATES} recipe.variant=masked recipe.length_buckets=2"
NOT_CACHED = (
    ("alignment", f"{MASKED} recipe.trainable=all recipe.rec_weight=0", "recipe.trainable is all"),
    ("alignment", f"{MASKED} recipe.frozen_dropout=true", "recipe.frozen_dropout is True"),
    ("alignment", f"{STATES} recipe.variant=released recipe.length_buckets=1", "recipe.variant is released"),
    ("alignment", f"{MASKED} data.constructed.shards=x", "constructed.shards=x is not allowed with cached_states"),
    ("alignment", f"{MASKED} init_from=null", "init_from is null"),
    ("instruction_tuning", f"{STAGE_3} recipe.vision_training.blocks=-1", "recipe.vision_training.blocks is -1"),
    ("instruction_tuning", f"{STAGE_3} init_from=null", "init_from is null"),
    ("instruction_tuning", f"{STAGE_3} model.language_model=Qwen/Qwen3-VL-4B-Instruct", "the paper's MLLM"),
    ("instruction_tuning", "", "no data.cached_… is set"),
)


@pytest.fixture
def places(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], list[str]]:
    """Arguments with the folders that stand in them."""
    names = ("qwen2_5_vl", "xl", "2.1")

    def fill(arguments: str) -> list[str]:
        found = arguments.replace("{empty}", str(tmp_path))
        for name in (name for name in names if f"{{{name}}}" in arguments):
            found = found.replace(f"{{{name}}}", str(tiny_folder(name)))
        return found.split()

    return fill


def test_arguments_that_are_refused(
    places: Callable[[str], list[str]],
    configs: dict[str, Path],
    subtests: pytest.Subtests,
    capsys: pytest.CaptureFixture,
) -> None:
    for stage, arguments, words in REFUSALS:
        with subtests.test(arguments):
            assert run(configs[stage], *places(arguments)) == 2
            assert words in capsys.readouterr().err
    for stage, arguments, words in NOT_CACHED:
        with subtests.test(f"cache {arguments}"):
            assert train.main(["cache", str(configs[stage]), *arguments.split()]) == 2
            assert words in capsys.readouterr().err


def test_a_run_of_another_language_model_is_refused(
    tiny_folder: Callable[[str], Path], configs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given, model = f"model.language_model={tiny_folder('qwen2_5_vl')}", tmp_path / "model"
    decoder = [f"model.image_decoder={tiny_folder('xl')}", *KEYS["xl"]]
    arguments = [*decoder, given, "init_from=null", "data.max_pieces=100", "trainer.max_steps=1"]
    assert run(configs["alignment"], *arguments, f"run={model}") == 0
    other = f"model.language_model={tiny_folder('qwen3_vl')}"
    assert run(configs["instruction_tuning"], *decoder, other, f"init_from={model}") == 2
    error = capsys.readouterr().err
    assert "source is " in error and str(tiny_folder("qwen3_vl")) in error
