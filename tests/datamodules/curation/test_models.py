"""The real model stages on tiny models in the real folder layouts, from a folder of images to trained-on shards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from datamodules.curation.config import Caption, Curation, Entities, Safety
from datamodules.curation.models import AskLanguageModel, Blip2Captions, SafetyFilter
from datamodules.curation.rows import Batch, new_row
from datamodules.errors import DataError
from datamodules.images import encode_png, load
from kosmosg.config import load_config
from tests.conftest import REPOSITORY
from tests.datamodules.curation import tiny_models, world
from tests.lightning_modules import miniature

OPEN_IMAGES = REPOSITORY / "configs" / "curation" / "open_images.yaml"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_models.write_all(tmp_path_factory.mktemp("models"))


def photo(number: int) -> Image.Image:
    noise = np.random.default_rng(number).integers(0, 255, (6, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((90, 60), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(7):
        photo(i).save(folder / f"{i}.jpg", quality=90)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    Image.new("RGB", (20, 90)).save(folder / "small.png")
    return folder


@pytest.fixture(scope="module")
def curated(models, photos, tmp_path_factory) -> Path:
    """By the paper's configuration with other models and sizes."""
    arguments = [str(OPEN_IMAGES), f"input.images={photos}", f"output={tmp_path_factory.mktemp('curated') / 'set'}"]
    arguments += ["image.side=48", "image.min_side=32", "crops.min_side=4", "crops.max_area=1", "crops.threshold=0.05"]
    arguments += ["input.chunk_size=4", "entities.chat_template=null"]
    for name, folder in models.items():
        arguments += [f"{name}.model={folder}", f"{name}.dtype=float32", f"{name}.batch_size=2"]
    return world.curate_here(load_config(arguments, Curation))


def test_photos_become_samples_by_the_four_models(curated, photos):
    counts = world.counts(curated)
    assert counts["images"] == 9 and counts["written"] == 7
    assert counts["failed"] == {"unreadable_image": 1} and counts["filtered"] == {"image_too_small": 1}
    found = world.samples(curated)
    for sample, record in found:
        assert sample.caption == tiny_models.CAPTION
        assert [entity.text for entity in sample.entities] == ["dog", "car"]
        assert sample.target.name == "target.jpg" and load(sample.target).size == (48, 48)
        assert record["source"] == {"shard": photos.name, "key": f"{record['source']['key'][0]}.jpg"}
    shown = np.asarray(load(found[0][0].target), float)
    expected = np.asarray(photo(0).crop((15, 0, 75, 60)).resize((48, 48), Image.Resampling.LANCZOS), float)
    assert np.abs(shown - expected).mean() < 6  # JPEG twice


def test_captions_and_answers_do_not_depend_on_the_neighbours(models):
    rows = [new_row("s", str(i)) | {"number": i} | {"image": encode_png(photo(i))} for i in range(3)]
    captioner = Blip2Captions(Caption(model=str(models["caption"]), dtype="float32"), "cpu")
    together = captioner(rows)
    assert [row["caption"] for row in together] == [row["caption"] for one in rows for row in captioner([one])]
    asker = AskLanguageModel(Entities(model=str(models["entities"]), dtype="float32"), "cpu")
    captions = ["a dog", "a very long caption of a car " * 4, "x {caption} {}"]
    asked: Batch = [row | {"caption": caption} for row, caption in zip(rows, captions, strict=True)]
    assert [row["answer"] for row in asker(asked)] == [tiny_models.ANSWER] * 3
    assert captions[2] in asker.prompt(captions[2])


def test_a_checker_and_a_classifier_filter(tmp_path):
    for strict, kept in ((True, 0), (False, 2)):
        folder = tiny_models.write_safety_checker(tmp_path / str(strict), strict=strict)
        assert unsafe(folder).count(None) == kept
    folder = tiny_models.write_classifier(tmp_path / "classifier", unsafe=0.4)
    assert unsafe(folder) == [None, None]
    assert unsafe(folder, threshold=0.3) == ["unsafe_image", "unsafe_image"]
    with pytest.raises(DataError, match="normal, nsfw"):
        unsafe(folder, blocked_labels=["porn"])


def unsafe(folder: Path, **options) -> list[str | None]:
    rows = [new_row("s", str(i)) | {"number": i} | {"image": encode_png(photo(i))} for i in range(2)]
    judged = SafetyFilter(Safety(model=str(folder), dtype="float32", **options), "cpu")(rows)
    return [row.get("dropped", {}).get("reason") for row in judged]


def test_code_that_comes_with_a_model_is_never_run(tmp_path, models):
    folder = shutil.copytree(models["entities"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "strange"}
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match=r"entities\.model=.*code of its own, which is never run"):
        AskLanguageModel(Entities(model=str(folder)), "cpu")
    assert not (tmp_path / "ran").exists()


def test_a_chat_template_is_the_models_or_the_configurations(models, tmp_path):
    """The shipped configuration has MPT's."""
    folder = shutil.copytree(models["entities"], tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"entities\.chat_template"):
        AskLanguageModel(Entities(model=str(folder)), "cpu")
    entities = load_config([str(OPEN_IMAGES)], Curation).entities
    entities.model, entities.dtype = str(folder), "float32"
    prompt = AskLanguageModel(entities, "cpu").prompt("a dog")
    assert prompt.startswith("Below is an instruction") and prompt.endswith("Things:\n\n### Response:\n")
    assert "### Instruction:\nBelow is the caption" in prompt


@pytest.mark.slow
def test_stage_3_trains_on_curated_shards(curated, configs, tmp_path):
    pattern = str(curated / "train-*.tar")
    sources = [f"data.constructed.{key}={pattern}" for key in ("shards", "validation")]
    alone = ["data.edit.shards=''", "data.captions.shards=''"]
    assert train.main([str(configs["instruction_tuning"]), *sources, *alone]) == 0
    losses = [float(loss) for _, loss in miniature.losses(tmp_path / "instruction_tuning") if loss]
    assert len(losses) == 4 and np.isfinite(losses).all()
