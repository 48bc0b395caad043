"""MLLMs and image decoders, each named by one line: trained in stages 2 and 3, exported, read, sampled."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml

from kosmosg.models.build import load_image_decoder
from kosmosg.models.kosmosg import KosmosG, load_tokenizer
from kosmosg.sampling import DiffusionSampler
from tests import tiny
from tests.lightning_modules.miniature import KEYS, losses, picture
from tests.lightning_modules.runs import assert_same_training, back_to, finish, run, weights

# All pairs; three of them, with each model once, without --slow. The paper's MLLM is in test_image_decoders.py.
FAST = (("qwen2_5_vl", "1.5"), ("qwen3_vl", "xl"), ("llava_onevision", "sana"))
PAIRS = [
    pytest.param(*pair, marks=[] if pair in FAST else [pytest.mark.slow])
    for pair in product(("qwen2_5_vl", "qwen3_vl", "llava_onevision"), ("1.5", "xl", "sana"))
]


@pytest.fixture
def named(tiny_folder: Callable[[str], Path]) -> Callable[[str, str], list[str]]:
    """Arguments for a pair."""

    def arguments(language: str, decoder: str) -> list[str]:
        models = [f"model.language_model={tiny_folder(language)}", f"model.image_decoder={tiny_folder(decoder)}"]
        return [*models, *KEYS.get(decoder, []), "init_from=null", "data.max_pieces=100"]

    return arguments


@pytest.mark.parametrize(("language", "decoder"), PAIRS)
def test_pairs_train_resume_and_sample(
    language: str,
    decoder: str,
    named: Callable[[str, str], list[str]],
    tiny_folder: Callable[[str], Path],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    """Two steps of stage 2 with the MLLM frozen, then of stage 3 with all that trains, from what it wrote; before XL by
    LoRA."""
    lora = ["recipe.lora_rank=2"] if decoder == "xl" else []
    arguments = [*named(language, decoder), "model.hidden_layer=-2", "model.max_image_pixels=4096"]
    arguments += ["trainer.max_steps=2", "trainer.val_every=2", "trainer.activation_checkpointing=selective"]
    folders = [tmp_path / "stage-2", tmp_path / "stage-3"]
    assert run(configs["alignment"], *arguments, f"run={folders[0]}") == 0
    arguments += [f"init_from={folders[0]}", f"run={folders[1]}", *lora, "trainer.checkpoint_every=1"]
    assert run(configs["instruction_tuning"], *arguments) == 0
    stored = [bool(list((folder / "model" / "mllm").rglob("*.safetensors"))) for folder in folders]
    assert stored == [False, True]
    before, after = (KosmosG.from_pretrained(folder) for folder in folders)
    first = dict(before.mllm.named_parameters())
    changed = {
        name.split(".")[1] for name, value in after.mllm.named_parameters() if not torch.equal(value, first[name])
    }
    assert "language_model" in changed
    rows, trained = losses(folders[1]), weights(folders[1])
    back_to(folders[1], 1)
    assert run(configs["instruction_tuning"], *arguments) == 0
    assert losses(folders[1]) == rows and len(rows) == 2 and weights(folders[1]) == trained
    encoder = after.mllm.encoder(load_tokenizer(folders[1] / "model" / "tokenizer"))
    batch = encoder.collate([encoder(["a ", picture(0), " in the snow"])])
    sampler = DiffusionSampler(load_image_decoder(tiny_folder(decoder), "images"))
    with torch.no_grad():
        condition, null = after.condition(batch), after.null_condition()
        drawn = sampler(condition, sampler.decoder.spec.null(null), seeds=[0], num_inference_steps=2, output_type="pt")
    assert drawn.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) and drawn.isfinite().all()


def test_a_language_model_trains_in_stage_2_on_prompts_with_and_without_images(
    named: Callable[[str, str], list[str]], configs: dict[str, Path], tmp_path: Path
) -> None:
    config = yaml.safe_load(configs["alignment"].read_text())
    config["data"]["constructed"] = yaml.safe_load(configs["instruction_tuning"].read_text())["data"]["constructed"]
    config["recipe"] = {"trainable": "all", "rec_weight": 0.0, "variant": "masked", "length_buckets": 2}
    config["grids"] = {"every": 2, "prompts": 2, "steps": 2}
    file = tmp_path / "image_alignment.yaml"
    file.write_text(yaml.safe_dump(config))
    arguments = [*named("qwen3_vl", "sana"), "data.max_clip_tokens=40", "model.max_image_pixels=4096"]
    arguments += ["recipe.new_aligner=true", "trainer.max_steps=2", f"run={tmp_path / 'run'}"]
    assert run(file, *arguments) == 0
    assert len(losses(tmp_path / "run")) == 2 and (tmp_path / "run" / "grids" / "step-00000002.png").is_file()
    assert list((tmp_path / "run" / "model" / "mllm").rglob("*.safetensors"))


@pytest.mark.slow
def test_two_ranks_train_a_language_model_like_one(
    named: Callable[[str, str], list[str]], configs: dict[str, Path], tmp_path: Path
) -> None:
    """In stage 3, where ranks read prompts with images and without."""
    options = [*named("qwen3_vl", "1.5"), "recipe.new_aligner=true", "model.max_image_pixels=1024"]
    options += ["trainer.checkpoint_every=4"]
    finish(1, configs["instruction_tuning"], tmp_path / "one", *options)
    for strategy in ("ddp", "fsdp2"):
        finish(2, configs["instruction_tuning"], tmp_path / strategy, *options, f"trainer.strategy={strategy}")
        assert_same_training(tmp_path / "one", tmp_path / strategy, "instruction_tuning")
