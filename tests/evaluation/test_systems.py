"""Systems equal the pipelines they use, and refuse models that do not fit."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from evaluation.images import provenance
from evaluation.images.generation import Batch
from evaluation.images.provenance import environment, hash_encoder, hash_files
from evaluation.images.systems import AFTER_STAGE_3, BEFORE_STAGE_3, ConditionCache, kosmosg_system, text_system
from evaluation.protocols.benchmark import EvaluationError
from evaluation.protocols.protocol import Sampling
from evaluation.scores.encoders import truncated
from kosmosg.models.kosmosg import KosmosG
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.sampling import build_scheduler
from tests import tiny
from tests.evaluation import tiny_world

CPU = torch.device("cpu")
SAMPLING = Sampling(sampler="ddim", steps=2, guidance_scale=3.0, image_size=tiny.IMAGE_SIZE)


def test_environment_names_device_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "H100")
    assert environment(CPU)["device"].startswith("CPU, ")
    assert environment(torch.device("cuda", 0))["device"] == "H100"
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    subprocess.run(["git", "init", "-q", tmp_path.parent], check=True)
    assert provenance.git_revision() == "unknown", "the enclosing repository is another project"


def test_encoder_hash_covers_relevant_files(encoders_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(encoders_folder / "dino", tmp_path / "dino")
    before = hash_encoder(folder)
    (folder / "README.md").write_text("not part of the encoder")
    assert hash_encoder(folder) == before == hash_files(folder, folder.glob("*.[js]*"))
    (folder / "config.json").write_text("{}")
    assert hash_encoder(folder) != before


def pixels(images) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=int) for image in images])


def test_text_system_equals_diffusers(tiny_stable_diffusion: Path) -> None:
    prompts, seeds = ["a red fish", "a dog in the snow"], [5, 6]
    made = text_system(str(tiny_stable_diffusion), CPU).load()(Batch(prompts, [[], []], seeds), SAMPLING)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_stable_diffusion, safety_checker=None)
    pipeline.scheduler = build_scheduler("ddim", pipeline.scheduler)
    expected = pipeline(
        prompts,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    ).images
    assert np.array_equal(pixels(made), pixels(expected))


@pytest.mark.parametrize(
    ("write", "pooled", "name", "options"),
    [
        (tiny.write_stable_diffusion_xl, tiny.POOLED_WIDTH, "Stable Diffusion XL (text)", {}),
        (tiny.write_sana, None, "Sana (text)", {"use_resolution_binning": False}),
    ],
)
def test_other_image_decoders(
    write: Callable[[Path], Path],
    pooled: int | None,
    name: str,
    options: dict[str, Any],
    tiny_tokenizer: Path,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    """Text-to-image equals diffusers' pipeline, KOSMOS-G equals ours; a model of another decoder is refused."""
    decoder = write(tmp_path / "decoder")
    model = tiny.write_model(tmp_path / "model", tiny_tokenizer, pooled_width=pooled)
    sampling, batch = replace(SAMPLING, sampler="dpm"), Batch(["a red fish", "a dog"], [[], []], [5, 6])
    shared = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": tiny.IMAGE_SIZE, "width": tiny.IMAGE_SIZE}
    text, ours = text_system(str(decoder), CPU), kosmosg_system(AFTER_STAGE_3, str(model), str(decoder), CPU)
    assert text.name == name and text.model != ours.model
    theirs = DiffusionPipeline.from_pretrained(decoder)
    theirs.scheduler = build_scheduler("dpm", theirs.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in batch.seeds]
    expected = theirs(batch.prompts, generator=generators, **shared, **options).images
    assert np.array_equal(pixels(text.load()(batch, sampling)), pixels(expected))
    pipeline = KosmosGPipeline.from_pretrained(model, decoder)
    expected = pipeline(batch.prompts, seeds=batch.seeds, sampler="dpm", **shared).images
    assert np.abs(pixels(ours.load()(batch, sampling)) - pixels(expected)).max() <= 1
    if pooled:
        with pytest.raises(EvaluationError, match=r"makes pooled vectors of width None, but '.*' reads 10"):
            kosmosg_system(AFTER_STAGE_3, str(tiny_model), str(decoder), CPU)


def test_kosmosg_system_equals_the_pipeline(tiny_model: Path, tiny_stable_diffusion: Path) -> None:
    fish, dog = tiny_world.picture(1), tiny_world.picture(2)
    batch = Batch(["<i> in the snow", "<i> in the snow", "<i> in the snow"], [[fish], [dog], [fish]], [1, 2, 3])
    pipeline = KosmosGPipeline.from_pretrained(tiny_model, image_decoder=tiny_stable_diffusion)
    expected = pipeline(
        batch.prompts,
        images=batch.images,
        num_inference_steps=2,
        guidance_scale=3.0,
        sampler="ddim",
        seeds=batch.seeds,
        height=tiny.IMAGE_SIZE,
        width=tiny.IMAGE_SIZE,
    ).images
    system = kosmosg_system(AFTER_STAGE_3, str(tiny_model), str(tiny_stable_diffusion), CPU)
    made = system.load()(batch, SAMPLING)
    assert np.abs(pixels(made) - pixels(expected)).max() <= 1


@pytest.mark.parametrize("reads_images", [False, True], ids=["stable-diffusion", "kosmosg"])
def test_memory_storage_truncates_floats(
    tiny_model: Path, tiny_stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch, reads_images: bool
) -> None:
    """255·x is truncated; in files it is rounded."""
    decoder = str(tiny_stable_diffusion)
    system = kosmosg_system(AFTER_STAGE_3, str(tiny_model), decoder, CPU) if reads_images else text_system(decoder, CPU)
    make, batch = system.load(), Batch(["a red fish", "a dog"], [[], []], [5, 6])
    floats: list[np.ndarray] = []
    monkeypatch.setattr("evaluation.images.systems.truncated", lambda image: floats.append(image) or truncated(image))
    memory = pixels(make(batch, replace(SAMPLING, storage="memory")))
    files = pixels(make(batch, SAMPLING))
    assert len(floats) == 2 and np.array_equal(memory, np.floor(np.stack(floats) * np.float32(255)))
    assert np.array_equal(files, (np.stack(floats) * 255).round())
    assert set(np.unique(files - memory)) == {0, 1}


FISH, DOG = tiny_world.picture(1), tiny_world.picture(2)


def test_conditions_belong_to_their_prompts(tiny_model: Path, tiny_stable_diffusion: Path) -> None:
    prompts = ["<i> in the snow", "<i> in the snow", "<i>, red", "<i> in the snow"]
    batch = Batch(prompts, [[FISH], [DOG], [FISH], [FISH]], [0] * 4)
    pipeline = KosmosGPipeline.from_pretrained(tiny_model, image_decoder=tiny_stable_diffusion)
    states, (expected, _) = ConditionCache(pipeline)(batch).states, pipeline.encode_prompt(batch.prompts, batch.images)
    apart = min(float((expected[i] - expected[j]).abs().max()) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert (states - expected).abs().max() < 0.01 * apart
    assert torch.equal(states[0], states[3])


@pytest.mark.parametrize("size", [1, 256])
def test_conditions_do_not_depend_on_earlier_batches(tiny_model: Path, tiny_stable_diffusion: Path, size: int) -> None:
    """Bitwise, because a resumed run has other batches."""
    batch = Batch(["<i> in the snow", "<i> and <i>", "a red fish"], [[FISH], [DOG, FISH], []], [0] * 3)
    pipeline = KosmosGPipeline.from_pretrained(tiny_model, image_decoder=tiny_stable_diffusion)
    whole, conditions = ConditionCache(pipeline, size)(batch), ConditionCache(pipeline, size)
    for row in (2, 1, 0, 2):
        single = Batch([batch.prompts[row]], [[image.copy() for image in batch.images[row]]], [0])
        assert torch.equal(conditions(single).states[0], whole.states[row])


def test_nothing_is_encoded_twice(
    tiny_model: Path, tiny_stable_diffusion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across batches, and for copies of the same image."""
    sizes, condition = [], KosmosG.condition
    monkeypatch.setattr(KosmosG, "condition", lambda self, batch: sizes.append(len(batch)) or condition(self, batch))
    make = kosmosg_system(AFTER_STAGE_3, str(tiny_model), str(tiny_stable_diffusion), CPU).load()
    for prompts in (["<i> in the snow", "<i> in the snow"], ["<i> in the snow", "<i>, red"]):
        make(Batch(prompts, [[FISH.copy()], [FISH.copy()]], [1, 2]), SAMPLING)
    assert sizes == [1, 1, 1], "two prompts and the null condition"


def test_hash_follows_the_weights(tiny_model: Path, tiny_stable_diffusion: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    arguments = (str(tiny_stable_diffusion), CPU)
    same = {kosmosg_system(AFTER_STAGE_3, str(folder), *arguments).model for folder in (tiny_model, copy)}
    assert len(same) == 1
    file = next((copy / "aligner").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert kosmosg_system(AFTER_STAGE_3, str(copy), *arguments).model not in same


def widened(folder: Path) -> None:
    file = folder / "model" / "aligner" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "width": 48}))


REFUSALS = [
    (AFTER_STAGE_3, widened, EvaluationError, "conditions of width 48, but '"),
    (BEFORE_STAGE_3, lambda folder: shutil.rmtree(folder / "model/aligner"), FileNotFoundError, "as after stage 1"),
    (BEFORE_STAGE_3, lambda folder: (folder / "config.yaml").write_text("stage: instruction_tuning\n"), EvaluationError,
     "is a run of stage 'instruction_tuning', but this row needs a run of stage 'alignment'"),
    (AFTER_STAGE_3, lambda folder: (folder / "config.yaml").write_text("stage: alignment\n"), EvaluationError,
     "is a run of stage 'alignment', but this row needs a run of stage 'instruction_tuning'"),
    (AFTER_STAGE_3, lambda folder: shutil.rmtree(folder / "decoder/text_encoder"), FileNotFoundError,
     "text_encoder/ is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "kind", "message"), REFUSALS)
def test_models_that_do_not_fit_are_refused(
    tiny_model: Path, tiny_stable_diffusion: Path, tmp_path: Path, name: str, damage, kind: type, message: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    shutil.copytree(tiny_stable_diffusion, tmp_path / "decoder")
    damage(tmp_path)
    with pytest.raises(kind) as error:
        kosmosg_system(name, tmp_path, str(tmp_path / "decoder"), CPU)
    assert message in str(error.value)
