"""Vision-language models of transformers as the MLLM: their states, their prompts, what trains, how they are stored."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2Config

from kosmosg.conversion import ConversionError, export_checkpoint, inspect_model
from kosmosg.models.aligner import AlignerEncoder
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.mllm import VisionTraining
from kosmosg.models.vision_language_model import LanguageProcessor, ProcessorEncoder, VisionLanguageModel
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.prompt import PackedImages, PromptBatch, PromptTooLongError
from tests import tiny

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava_onevision")
SIZES = ((48, 32), (32, 32), (24, 60))  # none is as another one after the processor


def picture(number: int) -> Image.Image:
    source = torch.Generator().manual_seed(number)
    width, height = SIZES[number]
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=source).byte().numpy())


PROMPTS: list[list[Any]] = [
    ["a dog ", picture(0), " in the suit of ", picture(1)],
    ["a cat"],
    [picture(2), " at night"],
    [picture(1), picture(2)],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: tiny.write_language_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def model(folder: Path) -> VisionLanguageModel:
    return VisionLanguageModel.load(folder).eval()


@pytest.fixture
def encoder(folder: Path, model: VisionLanguageModel) -> ProcessorEncoder:
    return model.encoder(LanguageProcessor.from_pretrained(folder))


def batch_of(encoder: ProcessorEncoder, prompts: list[list[Any]] = PROMPTS) -> PromptBatch:
    return encoder.collate([encoder(prompt) for prompt in prompts])


def test_states_are_transformers_own(folder: Path, encoder: ProcessorEncoder) -> None:
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    given = []
    for prompt in PROMPTS:
        batch = batch_of(encoder, [prompt])
        types = {"mm_token_type_ids": batch.image_mask.long()} if "qwen" in folder.name else {}
        images = {} if batch.images is None else batch.images.inputs
        with torch.no_grad():
            states = theirs(input_ids=batch.ids, **types, **images, output_hidden_states=True).hidden_states
        given.append((batch, states))
    for layer in (-1, 1, 0, 3):
        ours = VisionLanguageModel.load(folder, hidden_layer=layer).eval()
        for batch, states in given:
            with torch.no_grad():
                found, padding = ours.hidden_states(batch)
            assert torch.equal(found, states[layer]) and found.shape[-1] == ours.width and not padding.any()


def test_prompts_are_those_of_the_models_own_processor(folder: Path, encoder: ProcessorEncoder) -> None:
    """Ids and pixels, around what is put before every prompt and around images."""
    processor, words = encoder.processor, encoder.processor.tokenizer
    marks = ("<|vision_start|>", "<|vision_end|>") if "qwen" in folder.name else ("", "")
    image = processor.image_token.join(marks)
    for number, (before, after) in ((0, ("a dog ", " in the snow")), (2, ("", ""))):
        given = processor(text=[f"<|endoftext|>{before}{image}{after}"], images=[picture(number)], return_tensors="pt")
        batch = batch_of(encoder, [[before, picture(number), after]])
        assert torch.equal(batch.ids, given["input_ids"])
        assert torch.equal(batch.image_mask, batch.ids == words.convert_tokens_to_ids(processor.image_token))
        assert batch.images is not None and set(batch.images.inputs) <= set(given)
        assert all(torch.equal(value, given[name]) for name, value in batch.images.inputs.items())
    if "qwen" in folder.name:  # LLaVA-OneVision takes several images at another size than one
        given = processor(text=[f"{image}b{image}"], images=[picture(0), picture(2)], return_tensors="pt")
        batch = batch_of(encoder, [[picture(0), "b", picture(2)]])
        assert torch.equal(batch.ids[:, 1:], given["input_ids"])
        assert all(torch.equal(value, given[name]) for name, value in batch.images.inputs.items())


def test_a_batch_is_its_prompts_one_by_one(model: VisionLanguageModel, encoder: ProcessorEncoder) -> None:
    batch = batch_of(encoder)
    assert len({len(ids) for ids in batch.images.ids}) == 3 and len(set(batch.lengths)) == 4
    with torch.no_grad():
        states, padding = model.hidden_states(batch)
        for row, prompt in enumerate(PROMPTS):
            [alone] = model(batch_of(encoder, [prompt]))
            torch.testing.assert_close(states[row, : len(alone)], alone, rtol=0, atol=1e-5)
            assert padding[row].tolist() == [False] * len(alone) + [True] * (states.shape[1] - len(alone))
        batch.ids[batch.padding] = 5
        torch.testing.assert_close(model(batch)[~padding], states[~padding], rtol=0, atol=1e-5)


# Batches.
def assert_same(found: PromptBatch, expected: PromptBatch) -> None:
    for name in ("ids", "image_mask", "padding"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert (found.lengths, found.images_per_row) == (expected.lengths, expected.images_per_row)
    assert (found.images is None) == (expected.images is None)
    if found.images is None:
        return
    assert found.images.ids == expected.images.ids and found.images.counts == expected.images.counts
    for name, value in expected.images.inputs.items():
        theirs = found.images.inputs[name]
        if value.shape[1:] != theirs.shape[1:]:  # taken from a batch, images keep what fills them up
            theirs = theirs[:, : value.shape[1]]
        assert torch.equal(theirs, value), name


@pytest.mark.parametrize("index", [[1], [3, 0], [2, 1, 2]])
def test_rows_and_joined_batches_are_those_of_their_prompts(index: list[int], encoder: ProcessorEncoder) -> None:
    batch = batch_of(encoder)
    chosen = batch.rows(index)
    assert_same(chosen, batch_of(encoder, [PROMPTS[row] for row in index]))
    assert_same(chosen.join(batch), batch_of(encoder, [*(PROMPTS[row] for row in index), *PROMPTS]))
    for copy in (pickle.loads(pickle.dumps(batch)), batch_of(pickle.loads(pickle.dumps(encoder)))):
        assert_same(copy, batch)
    assert batch.to("meta").images.inputs["pixel_values"].device.type == "meta"


def test_other_images_bring_their_own_tokens(encoder: ProcessorEncoder) -> None:
    rolled = batch_of(encoder).roll_images()
    words = [["a dog ", picture(2), " in the suit of ", picture(0)], ["a cat"], [picture(1), " at night"]]
    assert_same(rolled, batch_of(encoder, [*words, [picture(2), picture(1)]]))


def test_prompts_are_described(encoder: ProcessorEncoder) -> None:
    described = encoder.describe(batch_of(encoder))
    texts = ["a dog <i> in the suit of <i>", "a cat", "<i> at night", "<i> <i>"]
    assert [text for text, _ in described] == texts and [len(images) for _, images in described] == [2, 0, 1, 2]
    plain = Image.new("RGB", (32, 32), (200, 30, 90))
    half = Image.new("RGB", (32, 32), (0, 0, 0))
    half.paste(plain.crop((0, 0, 32, 16)))
    [(_, [shown])] = encoder.describe(batch_of(encoder, [[half]]))
    colours = [shown.getpixel((shown.width // 2, row)) for row in (2, shown.height - 3)]
    assert all(abs(a - b) <= 3 for a, b in zip(colours[0], (200, 30, 90), strict=True)) and max(colours[1]) <= 3


# Prompts.
def test_special_tokens_in_a_text_are_characters(encoder: ProcessorEncoder) -> None:
    for token in tiny.QWEN_TOKENS:
        encoded = encoder([f"a {token} b"])
        assert not torch.as_tensor(encoded.image_mask).any() and len(encoded) == 1 + len(f"a {token} b")
        assert encoder.captions([f"a {token} b"])[0].ids == encoded.ids.tolist()
    assert encoder.captions([]) == []


def test_images_that_are_refused_or_made_smaller(
    folder: Path, encoder: ProcessorEncoder, model: VisionLanguageModel
) -> None:
    with pytest.raises(TypeError, match=r"a prompt segment is Tensor; allowed are str and PIL images"):
        encoder([torch.zeros(3, 8, 8)])
    with pytest.raises(ValueError, match="an image of 1000×5 pixels is not allowed"):
        encoder([Image.new("RGB", (1000, 5))])
    smaller = ProcessorEncoder(LanguageProcessor.from_pretrained(folder), max_image_pixels=16 * 16, max_length=40)
    large = Image.new("RGB", (64, 64))
    assert_same(batch_of(smaller, [[large]]), batch_of(encoder, [[large.resize((16, 16))]]))
    with pytest.raises(PromptTooLongError, match=r"has 43 tokens \(0 of 0 images\) but at most 40"):
        smaller(["a" * 42])
    closed = encoder(["a"], eos=True)
    assert closed.ids[-1] == encoder.processor.tokenizer.eos_token_id and len(closed) == 3


def test_unconditional_prompt_and_blank_image(model: VisionLanguageModel, encoder: ProcessorEncoder) -> None:
    assert_same(model.unconditional_prompt(), batch_of(encoder, [[]]))
    blank = model.dummy_image_prompt()
    assert blank.images_per_row == [1] and int(blank.image_mask.sum()) == blank.lengths[0] - 1
    with torch.no_grad():
        alone, joined = model(batch_of(encoder, [["a cat"]])), model(batch_of(encoder, [["a cat"]]).join(blank))
    torch.testing.assert_close(joined[:1, : alone.shape[1]], alone, rtol=0, atol=1e-5)


# What trains.
@pytest.mark.parametrize(("blocks", "layer"), [(0, -1), (1, -1), (-1, -1), (1, 2)])
def test_what_trains_gets_a_gradient_and_nothing_else_does(
    blocks: int, layer: int, folder: Path, encoder: ProcessorEncoder
) -> None:
    model = VisionLanguageModel.load(folder, hidden_layer=layer)
    model.set_trainable(VisionTraining(blocks=blocks))
    model(batch_of(encoder)).square().sum().backward()
    encoder_blocks = 0
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name
    tower = model.network.get_encoder(modality="image")
    trained = {name for name, parameter in tower.named_parameters() if parameter.requires_grad}
    for number in range(2):
        part = [name for name in trained if f"blocks.{number}." in name or f"encoder.layers.{number}." in name]
        encoder_blocks += bool(part)
    assert encoder_blocks == (2 if blocks == -1 else blocks)
    assert any("embed" in name for name in trained) == (blocks == -1)
    assert model.network.get_decoder().layers[-1].mlp.up_proj.weight.requires_grad == (layer == -1)
    with pytest.raises(ValueError, match=r"vision_training.blocks is 3, but the vision encoder has 2 blocks"):
        model.set_trainable(VisionTraining(blocks=3))


# Folders.
def model_of(folder: Path, train: bool) -> KosmosG:
    mllm = VisionLanguageModel.load(folder, max_image_pixels=900)
    mllm.requires_grad_(train)
    if train:
        with torch.no_grad():
            mllm.network.get_decoder().norm.weight.mul_(1.5)
    return KosmosG(mllm, AlignerEncoder(input_width=mllm.width, num_queries=tiny.QUERIES, **tiny.aligner_sizes()))


@pytest.mark.parametrize(
    ("folder", "trained"), [("qwen2_5_vl", False), *((family, True) for family in FAMILIES)], indirect=["folder"]
)
def test_a_model_folder_holds_trained_weights_and_names_frozen_ones(
    trained: bool, folder: Path, tmp_path: Path, tiny_stable_diffusion: Path
) -> None:
    model = model_of(folder, trained).eval()
    model.save_pretrained(tmp_path / "model", LanguageProcessor.from_pretrained(folder))
    stored = list((tmp_path / "model" / "mllm").rglob("*.safetensors"))
    assert bool(stored) == trained
    assert json.loads((tmp_path / "model" / "mllm" / "config.json").read_text())["source"] == str(folder)
    found = inspect_model(tmp_path / "model")
    assert ("mllm" in found["parts"]) == trained and found["sizes"]["mllm"]["source"] == str(folder)
    assert found["missing for the pipeline"] == ["unet", "vae", "scheduler"]
    with pytest.raises(ConversionError, match="holds a VisionLanguageModel, which released checkpoints have no place"):
        export_checkpoint(tmp_path / "model", tmp_path / "released.pt")
    pipe = KosmosGPipeline.from_pretrained(tmp_path / "model", image_decoder=tiny_stable_diffusion)
    prompt, null = pipe.encode_prompt(PROMPTS)
    with torch.no_grad():
        batch = batch_of(model.mllm.encoder(LanguageProcessor.from_pretrained(folder)))
        assert torch.equal(prompt, model.condition(batch).states)
        assert torch.equal(pipe.null_condition.states, model.null_condition().states)
    pipe.save_pretrained(tmp_path / "whole")  # weights that trained once are kept, though they do not train now
    assert bool(list((tmp_path / "whole" / "mllm").rglob("*.safetensors"))) == trained
    whole = KosmosGPipeline.from_pretrained(tmp_path / "whole", unet=None, vae=None)
    assert all(map(torch.equal, whole.encode_prompt(PROMPTS), (prompt, null)))


def test_a_frozen_model_whose_weights_are_gone_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = model_of(folders["qwen2_5_vl"], train=False)
    model.save_pretrained(tmp_path, LanguageProcessor.from_pretrained(folders["qwen2_5_vl"]))
    file = tmp_path / "mllm" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "source": str(tmp_path / "gone")}))
    with pytest.raises(ValueError, match=r"language_model='.*gone' cannot be read"):
        KosmosG.from_pretrained(tmp_path)


def test_either_naming_of_weights_is_read(folder: Path, model: VisionLanguageModel, tmp_path: Path) -> None:
    """That of the hub's files, which transformers writes, and that of its modules."""
    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    theirs.save_pretrained(tmp_path, save_original_format=False)
    names = {name for file in (folder, tmp_path) for name in load_file(file / "model.safetensors")}
    assert "model.language_model.norm.weight" in names
    assert ("model.norm.weight" in names) == ("qwen2" in folder.name)
    read, expected = VisionLanguageModel.load(tmp_path).state_dict(), model.state_dict()
    assert read.keys() == expected.keys() and all(torch.equal(read[name], expected[name]) for name in read)


def test_models_and_layers_that_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    language, damaged, less = (tmp_path / name for name in ("language", "damaged", "less"))
    Qwen2Config(hidden_size=8, num_hidden_layers=1).save_pretrained(language)
    weights = load_file(folders["qwen2_5_vl"] / "model.safetensors")
    for folder in (damaged, less):
        folder.mkdir()
        (folder / "config.json").write_text((folders["qwen2_5_vl"] / "config.json").read_text())
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    del weights["model.norm.weight"]
    save_file(weights, less / "model.safetensors", {"format": "pt"})
    for folder, options, told in (
        (language, {}, r"is a qwen2; allowed: models of transformers that read images and text"),
        (folders["qwen2_5_vl"], {"hidden_layer": 4}, r"model.hidden_layer=4 is not allowed; .* -4 … 3"),
        (damaged, {}, "1 weights with NaN or infinite values"),
        (less, {}, "1 missing_keys, such as"),
    ):
        with pytest.raises(ValueError, match=told):
            VisionLanguageModel.load(folder, **options)


def test_packed_images_of_other_sizes_are_filled_up() -> None:
    one = PackedImages({"x": torch.ones(1, 2, 3)}, {"x": [1]}, [[7]])
    two = PackedImages({"x": torch.ones(2, 3, 2)}, {"x": [2]}, [[7, 7]])
    both = PackedImages.cat([one, two])
    assert both.inputs["x"].shape == (3, 3, 3) and both.inputs["x"].sum() == 6 + 12 and len(both) == 2
    assert torch.equal(both.take([1]).inputs["x"][:, :, :2], two.inputs["x"])
