"""Targets near their own aspect ratio: rows of one size go through the image decoder together, in the order that the
run has anyway. Input images that are not square: cropped or padded, as the model folder says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.training_utils import generate_aspect_ratio_buckets
from PIL import Image

import train
from datamodules.sample import CaptionSample, ConstructedSample, EditSample, Entity
from datamodules.shard_writer import ShardWriter
from kosmosg.batches import InstructionBatch
from kosmosg.condition import Condition
from kosmosg.config import load_config
from kosmosg.image_processing import ClipImageTransform, TargetTransform
from kosmosg.models.build import load_image_decoder
from kosmosg.models.kosmosg import KosmosG, load_tokenizer
from lightning_modules.base import StageModule, build_stage
from tests import tiny
from tests.lightning_modules import miniature
from tests.lightning_modules.runs import back_to, finish, numbers, samples

SIDES = ((64, 64), (100, 50), (50, 90), (120, 64))  # width, height
MULTIPLE = 16
OPTIONS = [f"data.aspect_ratio_multiple={MULTIPLE}"]


def picture(number: int) -> Image.Image:
    return miniature.picture(number).resize(SIDES[number % len(SIDES)])


@pytest.fixture
def config(configs: dict[str, Path], tmp_path: Path) -> Path:
    """Stage 3 over images of several sizes."""
    kinds: dict[str, Any] = {
        "constructed": lambda i: ConstructedSample(
            "a fish and a dog in the garden",
            [Entity(word, picture(i), picture(i + 1)) for word in ("fish", "dog")],
            picture(i + 2),
            key=f"k{i}",
        ),
        "edit": lambda i: EditSample("a fish", "make it night", picture(i), picture(i + 3), key=f"e{i}"),
        "captions": lambda i: CaptionSample("a cat", picture(i), key=f"c{i}"),
    }
    values = yaml.safe_load(configs["instruction_tuning"].read_text())
    for kind, make in kinds.items():
        with ShardWriter(tmp_path / kind, "train", samples_per_shard=5) as writer:
            for i in range(miniature.SAMPLES):
                writer.write(make(i))
        values["data"][kind]["shards"] = str(tmp_path / kind / "train-*.tar")
    values["data"]["constructed"]["validation"] = str(tmp_path / "constructed" / "train-*.tar")
    file = tmp_path / "aspect_ratios.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_an_image_is_cropped_to_the_nearest_aspect_ratio() -> None:
    transform = TargetTransform(512, 64)
    assert transform.sizes == generate_aspect_ratio_buckets(512, 64) and (512, 512) in transform.sizes
    for (width, height), expected in {
        (512, 512): (512, 512),
        (1024, 512): (384, 704),
        (600, 900): (640, 448),
        (50, 2000): (704, 384),
    }.items():
        assert tuple(transform(Image.new("RGB", (width, height))).shape) == (3, *expected)
    image = miniature.picture(3)
    assert torch.equal(TargetTransform(48, 16)(image), TargetTransform(48)(image))
    # Of a wide image the middle: its left and right ends are cut off.
    wide = Image.new("RGB", (300, 100), "black")
    wide.paste("white", (45, 0, 255, 100))
    assert TargetTransform(64, 16)(wide).min() == 1.0


@pytest.mark.slow
def test_ranks_and_a_resume_with_workers_read_one_sequence(
    config: Path, tmp_path: Path, record_samples: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, run = "instruction_tuning", [*OPTIONS, "trainer.checkpoint_every=2"]
    sizes: list[int] = []
    begun = StageModule.training_step

    def count(self: StageModule, step: list[InstructionBatch], batch_idx: int) -> Any:
        sizes.extend(len({target.shape for target in batch.targets}) for batch in step)
        return begun(self, step, batch_idx)

    monkeypatch.setattr(StageModule, "training_step", count)
    arguments = [str(config), f"run={tmp_path / 'one'}", "data.micro_batch_size=4", "trainer.global_batch_size=4"]
    assert train.main([*arguments, *run, "data.validation_samples=8", "model.mllm.dropout=0"]) == 0
    assert max(sizes) > 2
    expected = numbers(tmp_path / "one", stage)
    sharded = [*run, "trainer.strategy=fsdp2", "recipe.length_buckets=2"]
    finish(2, config, tmp_path / "two", *sharded)
    back_to(tmp_path / "two", 2)
    finish(1, config, tmp_path / "two", *run, "recipe.length_buckets=2", "data.num_workers=2")
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    for row, other in zip(expected, numbers(tmp_path / "two", stage), strict=True):
        assert other[:-1] == pytest.approx(row[:-1], rel=1e-4)


def test_the_loss_of_a_batch_is_the_mean_of_its_rows_whatever_their_sizes(config: Path) -> None:
    options = ["recipe.timesteps_per_sample=2", "recipe.timestep_sampling=low_discrepancy"]
    experiment: Any = load_config([str(config), *OPTIONS, *options], train.stage_schema)
    tokenizer = train.build_tokenizer(experiment.model)
    module: Any = build_stage(experiment.module, experiment, tokenizer).eval()
    data = experiment.datamodule.build(
        experiment.data, module.mllm.encoder(tokenizer), experiment.model.image_size, module.image_decoder
    )
    data.setup()
    batch = data.train_dataset[range(6)]
    assert isinstance(batch.targets, list)
    together = module.losses(batch)["loss"]
    rows = [module.losses(batch.rows([row]))["loss"] for row in range(6)]
    torch.testing.assert_close(together, torch.stack(rows).mean())
    assert {tuple(image.size) for image in module.reference_images(batch, None)} == {
        (target.shape[2], target.shape[1]) for target in batch.targets
    }


def test_latents_are_cached_in_their_sizes(config: Path, tmp_path: Path) -> None:
    cached = [*OPTIONS, "data.cached_latents=float32", "data.cached_vision=float32"]
    assert train.main(["cache", str(config), *cached]) == 0
    for name, given in (("pixels", OPTIONS), ("cached", cached)):
        assert train.main([str(config), f"run={tmp_path / name}", *given]) == 0
    rows = [numbers(tmp_path / name, "instruction_tuning") for name in ("pixels", "cached")]
    for row, other in zip(*rows, strict=True):
        assert other == pytest.approx(row, rel=1e-5)
    assert train.main([str(config), f"run={tmp_path / 'squares'}", *cached[1:]]) == 2


def test_sdxl_is_told_the_size_of_each_target(tmp_path: Path) -> None:
    decoder: Any = load_image_decoder(tiny.write_stable_diffusion_xl(tmp_path), "images")
    told = []
    decoder.unet.register_forward_pre_hook(
        lambda _, __, keywords: told.append(keywords["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    condition = Condition(torch.zeros(2, tiny.QUERIES, decoder.spec.width), pooled=torch.zeros(2, decoder.spec.pooled))
    decoder.predict(torch.zeros(2, 4, 6, 10), torch.tensor([1, 2]), condition)
    assert told[0].tolist() == [[48, 80, 0, 0, 48, 80]] * 2


def test_input_images_are_prepared_as_the_model_was_trained(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Padded: the key is in the model folder, from which prompts are encoded; cached states are those of one way."""
    vision, fit = "data.cached_vision=float32", "model.mllm.image_fit=pad"
    assert train.main(["cache", str(config), vision, fit]) == 0
    run = [str(config), f"run={tmp_path / 'run'}", "trainer.max_steps=2", "trainer.val_every=2", vision]
    assert train.main([*run, fit]) == 0
    model = KosmosG.from_pretrained(tmp_path / "run")
    encoder = model.mllm.encoder(load_tokenizer(tmp_path / "run" / "model" / "tokenizer"))
    wide = Image.new("RGB", (100, 50), "black")
    (shown,) = encoder(["a ", wide]).images
    assert torch.equal(shown, ClipImageTransform(tiny.IMAGE_SIZE, "pad")(wide))
    white = (shown[0] == shown[0].max()).all(dim=1).sum().item()
    assert white == tiny.IMAGE_SIZE // 2
    assert train.main([*run, f"run={tmp_path / 'other'}"]) == 2
    assert "images is 64×64, pad there and 64×64, crop here" in capsys.readouterr().err
