"""MLLMs and image decoders, each named by one line: trained in stages 2 and 3, exported, read, sampled."""

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from kosmosg.config import load_config
from kosmosg.models.build import load_image_decoder
from kosmosg.models.kosmosg import KosmosG, load_tokenizer
from kosmosg.sampling import DiffusionSampler
from lightning_modules import dry_run
from lightning_modules.dry_run import measure_module
from tests import tiny
from tests.lightning_modules.miniature import KEYS, losses, picture
from tests.lightning_modules.runs import back_to, exported, finish, numbers, run, weights

LANGUAGE = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
# Each MLLM and each image decoder once; all other pairs are slow.
PAIRS = (
    ("kosmosg", "xl"),
    ("qwen2_5_vl", "1.5"),
    ("qwen2_5_vl", "sana"),
    ("qwen3_vl", "xl"),
    ("llava_onevision", "sana"),
)
ALL_PAIRS = [
    pytest.param(*pair, marks=[] if pair in PAIRS else [pytest.mark.slow])
    for pair in product(("kosmosg", *LANGUAGE), ("1.5", "xl", "sana"))
]


@pytest.fixture
def named(tiny_folder: Callable[[str], Path]) -> Callable[[str, str], list[str]]:
    """Arguments for a pair."""

    def arguments(language: str, decoder: str) -> list[str]:
        found = [f"model.image_decoder={tiny_folder(decoder)}", *KEYS.get(decoder, [])]
        if language != "kosmosg":
            found += [f"model.language_model={tiny_folder(language)}", "init_from=null", "data.max_pieces=100"]
        return found

    return arguments


@pytest.mark.parametrize(("language", "decoder"), ALL_PAIRS)
def test_pairs_train_are_exported_and_sample(
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
    arguments = [*named(language, decoder), "trainer.max_steps=2", "trainer.val_every=2"]
    folders = [tmp_path / "stage-2", tmp_path / "stage-3"]
    assert run(configs["alignment"], *arguments, f"run={folders[0]}") == 0
    arguments.append(f"init_from={folders[0]}")
    assert run(configs["instruction_tuning"], *arguments, *lora, f"run={folders[1]}") == 0
    stored = [bool(list((folder / "model" / "mllm").rglob("*.safetensors"))) for folder in folders]
    assert stored == [language == "kosmosg", True]
    before, after = (KosmosG.from_pretrained(folder) for folder in folders)
    first = dict(before.mllm.named_parameters())
    changed = {
        name.split(".")[1] for name, value in after.mllm.named_parameters() if not torch.equal(value, first[name])
    }
    assert changed >= ({"layers" if lora else "embed_tokens"} if language == "kosmosg" else {"language_model"})
    assert not (lora and "embed_tokens" in changed)
    encoder = after.mllm.encoder(load_tokenizer(folders[1] / "model" / "tokenizer"))
    batch = encoder.collate([encoder(["a ", picture(0), " in the snow"])])
    sampler = DiffusionSampler(load_image_decoder(tiny_folder(decoder), "images"))
    with torch.no_grad():
        condition, null = after.condition(batch), after.null_condition()
        drawn = sampler(condition, sampler.decoder.spec.null(null), seeds=[0], num_inference_steps=2, output_type="pt")
    assert drawn.shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE) and drawn.isfinite().all()


@pytest.mark.parametrize("language", LANGUAGE)
def test_a_language_model_resumes_draws_and_dry_runs(
    language: str,
    named: Callable[[str, str], list[str]],
    configs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    """Prompts with images and text alone in one run of image alignment, in which the language model trains."""
    config = yaml.safe_load(configs["alignment"].read_text())
    config["data"]["constructed"] = yaml.safe_load(configs["instruction_tuning"].read_text())["data"]["constructed"]
    config["recipe"] = {"trainable": "all", "rec_weight": 0.0, "variant": "masked", "length_buckets": 2}
    config["grids"] = {"every": 2, "prompts": 2, "steps": 2}
    file = tmp_path / "image_alignment.yaml"
    file.write_text(yaml.safe_dump(config))
    arguments = [*named(language, "sana"), "model.hidden_layer=-2", "model.max_image_pixels=4096"]
    arguments += ["trainer.checkpoint_every=1", "trainer.activation_checkpointing=selective", "data.max_clip_tokens=40"]
    arguments += ["trainer.max_steps=2", "recipe.new_aligner=true"]
    folder = tmp_path / "run"
    assert run(file, *arguments, f"run={folder}") == 0
    assert (folder / "grids" / "step-00000002.png").is_file()
    rows, trained = losses(folder), weights(folder)
    back_to(folder, 1)
    assert run(file, *arguments, f"run={folder}") == 0
    assert losses(folder) == rows and len(rows) == 2 and weights(folder) == trained
    capsys.readouterr()
    assert run(file, *arguments, "dry_run=true", "hardware.prompt_tokens=200") == 0
    assert "fits" in capsys.readouterr().out


@pytest.mark.parametrize("language", LANGUAGE)
def test_a_dry_run_counts_what_runs(
    language: str, named: Callable[[str, str], list[str]], configs: dict[str, Path]
) -> None:
    arguments = [str(configs["instruction_tuning"]), *named(language, "1.5"), "recipe.new_aligner=true"]
    arguments += ["model.max_image_pixels=4096", "hardware.prompt_tokens=200", "hardware.images_per_row=2"]
    experiment = load_config(arguments, train.stage_schema)
    costs = measure_module(experiment)
    module = experiment.module.build(experiment, train.build_tokenizer(experiment.model)).train()
    batch = module.fake_batch(3, costs.shape, experiment.model.image_size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.losses(batch)["loss"].backward()
    assert costs.flops(3) == pytest.approx(
        counter.get_total_flops(), rel=0.1
    )  # of attention, the backward pass computes a product again
    assert dry_run.count(module.mllm, True) == dry_run.count(costs.module.mllm, True) > 0
    assert dry_run.count(module.mllm, False) == dry_run.count(costs.module.mllm, False) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("language", "strategy"), [("qwen3_vl", "fsdp2"), ("qwen2_5_vl", "ddp")])
def test_two_ranks_train_a_language_model_like_one(
    language: str,
    strategy: str,
    named: Callable[[str, str], list[str]],
    configs: dict[str, Path],
    tmp_path: Path,
) -> None:
    """In stage 3, where ranks read prompts with images and without."""
    options = [*named(language, "1.5"), "recipe.new_aligner=true", "model.max_image_pixels=1024"]
    finish(1, configs["instruction_tuning"], tmp_path / "one", *options)
    finish(2, configs["instruction_tuning"], tmp_path / "two", *options, f"trainer.strategy={strategy}")
    one, two = (numbers(tmp_path / name, "instruction_tuning") for name in ("one", "two"))
    assert len(one) == 4
    for row, other in zip(one, two, strict=True):
        assert other[:-1] == pytest.approx(row[:-1], rel=1e-4)
    tensors = exported(tmp_path / "two")
    for name, tensor in exported(tmp_path / "one").items():
        assert torch.allclose(tensors[name], tensor, atol=1e-3), name
