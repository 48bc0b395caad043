"""`kosmosg generate`, through its command line."""

import io
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image

from kosmosg.cli import main
from kosmosg.generation import read_parameters
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.sampling import build_scheduler
from tests import tiny
from tests.conftest import REPOSITORY


@pytest.fixture
def model(tiny_pipeline):
    return tiny_pipeline


@pytest.fixture
def images(tmp_path):
    for name, colour in (("dog", "sienna"), ("hero", "navy")):
        Image.new("RGB", (70, 80), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def generate(*arguments):
    return main(["generate", "--steps", "2", *map(str, arguments)])


def pixels(file):
    with Image.open(file) as image:
        return np.asarray(image)


def assert_drawn(file, expected):
    assert np.abs(pixels(file).astype(int) - np.asarray(expected)).max() <= 1


def test_a_prompt_is_drawn_as_the_pipeline_draws_it(model, images, capsys):
    prompt, dog, hero = "<i> in the suit of <i>", images / "dog.png", images / "hero.png"
    options = ("--output", images / "out", "--count", "2", "--seed", "5", "--guidance", "3", "--sampler", "ddim")
    assert generate(model, prompt, "--images", dog, hero, *options) == 0
    assert "2 images are in" in capsys.readouterr().out
    files = sorted((images / "out").iterdir())
    assert [file.name for file in files] == ["image-5.png", "image-6.png"]
    pipe = KosmosGPipeline.from_pretrained(model)
    pictures = [Image.open(dog), Image.open(hero)]
    settings = {"num_inference_steps": 2, "guidance_scale": 3.0, "sampler": "ddim", "seeds": [5, 6]}
    expected = pipe(prompt, pictures, num_images_per_prompt=2, **settings).images
    for file, image in zip(files, expected, strict=True):
        assert_drawn(file, image)
    parameters = read_parameters(files[1])
    assert (parameters["prompt"], parameters["seed"], parameters["sampler"]) == (prompt, 6, "ddim")
    assert [image["file"] for image in parameters["images"]] == ["dog.png", "hero.png"] and parameters["model"]


def test_the_shipped_miniature_draws_at_once(tmp_path):
    """Each of its example subjects, without training."""
    examples = sorted((REPOSITORY / "datamodules" / "toyland" / "examples").glob("*.png"))
    assert len(examples) == 8
    lines = [{"prompt": "<i> on the beach", "images": [str(file)], "name": file.stem} for file in examples]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert generate("toyland", "--manifest", tmp_path / "prompts.jsonl", "--output", tmp_path / "out") == 0
    drawn = [pixels(file) for file in sorted((tmp_path / "out").iterdir())]
    assert [image.shape for image in drawn] == [(32, 32, 3)] * 8
    assert len({image.tobytes() for image in drawn}) == 8


def test_a_photo_is_turned_upright(model, images):
    photo, exif = Image.fromarray(np.arange(70 * 80 * 3, dtype=np.uint8).reshape(80, 70, 3)), Image.Exif()
    photo.save(images / "upright.png")
    exif[0x0112] = 8  # as a camera held sideways writes it: to be turned by 90 degrees
    photo.transpose(Image.Transpose.ROTATE_270).save(images / "sideways.png", exif=exif)
    for name in ("upright", "sideways"):
        assert generate(model, "<i>", "--images", images / f"{name}.png", "--output", images / name, "--seed", "1") == 0
    (one,), (other,) = ((images / name).glob("*.png") for name in ("upright", "sideways"))
    assert (pixels(one) == pixels(other)).all()


def write_manifest(folder, *lines):
    file = folder / "prompts.jsonl"
    texts = (line if isinstance(line, str | bytes) else json.dumps(line) for line in lines)
    file.write_bytes(b"\n".join(text.encode() if isinstance(text, str) else text for text in texts))
    return file


LINES = [
    {"prompt": "<i> in the snow", "images": ["dog.png"], "name": "dog", "count": 2},
    "",
    {"prompt": "<i> and <i>", "images": ["dog.png", "hero.png"], "negative_prompt": "a boat", "seed": 7},
    {"prompt": "a red fish"},
]
FILES = ["000003-7.png", "000004-0.png", "dog-0.png", "dog-1.png"]


def test_a_manifest_goes_on_where_it_was(model, images, capsys, monkeypatch):
    manifest, out = write_manifest(images, *LINES), images / "out"
    arguments = (model, "--manifest", manifest, "--output", out, "--batch-size", "3")
    assert generate(*arguments) == 0
    assert sorted(file.name for file in out.iterdir()) == FILES
    first = {name: (out / name).read_bytes() for name in FILES}
    (out / "dog-1.png").unlink()
    assert generate(*arguments) == 0
    assert "3 of 4 images exist already" in capsys.readouterr().out
    assert_drawn(out / "dog-1.png", Image.open(io.BytesIO(first["dog-1.png"])))
    monkeypatch.setattr(KosmosGPipeline, "from_pretrained", None)  # nothing left: the model is not even loaded
    assert generate(*arguments) == 0
    assert {name: (out / name).read_bytes() for name in FILES if name != "dog-1.png"}.items() <= first.items()


def test_files_made_otherwise_are_not_replaced_unasked(model, images, capsys):
    arguments = (model, "a red fish", "--output", images / "out")
    assert generate(*arguments) == 0
    before = (images / "out" / "image-0.png").read_bytes()
    assert generate(*arguments, "--guidance", "2") == 2
    assert "its guidance_scale is 6.0 instead of 2.0; --overwrite" in capsys.readouterr().err
    assert (images / "out" / "image-0.png").read_bytes() == before
    assert generate(*arguments, "--guidance", "2", "--overwrite") == 0
    assert (images / "out" / "image-0.png").read_bytes() != before
    Image.new("RGB", (4, 4)).save(images / "out" / "image-1.png")
    assert generate(*arguments, "--seed", "1") == 2
    assert "was not made by this command" in capsys.readouterr().err


BAD = [
    ("{", ""),
    ([1], "a line is list"),
    ({"prompt": "a", "seeds": 1}, r"unknown keys ['seeds']; allowed: prompt, images"),
    ({}, "the key 'prompt' is missing"),
    ({"prompt": " "}, "prompt is empty"),
    ({"prompt": "<i>"}, "the prompt has 1 placeholders <i> but 0 images"),
    ({"prompt": "<i>", "images": ["cat.png"]}, "cat.png' cannot be read"),
    ({"prompt": "<i>", "images": ["text.png"]}, "text.png' cannot be read"),
    ({"prompt": "<i>", "images": ["cut.jpg"]}, "cut.jpg' cannot be read"),
    ({"prompt": "<i>", "images": ["float.tif"]}, "float.tif' cannot be read: an image of mode 'F'"),
    ({"prompt": "<i>", "images": ["huge.png"]}, "huge.png' cannot be read"),
    ({"prompt": "<i>", "images": ["strip.png"]}, "strip.png': an image of 2×400 pixels"),
    ({"prompt": "a", "count": 0}, "count=0"),
    ({"prompt": "a", "seed": "x"}, "seed='x'; allowed: int"),
    ({"prompt": "a", "seed": 2**64}, "seeds in 0 … 2^64 - 1"),
    ({"prompt": "a", "name": "../a"}, "name='../a' is not allowed; allowed: a plain file name"),
    ({"prompt": "a", "name": "x" * 300}, "is not allowed; allowed: a plain file name"),
    ({"prompt": "a", "name": "a\0b"}, "is not allowed; allowed: a plain file name"),
    ({"prompt": "a", "count": 10**11}, "count=100000000000 and seed=0; allowed: count in 1 … 1,000,000"),
    ('{"prompt": "a \\ud83d dog"}', r"prompt is not valid text: it has '\ud83d'"),
    ({"prompt": "a", "negative_prompt": "\udc00"}, "negative_prompt is not valid text"),
    ({"prompt": "<i>", "images": ["\ud83d"]}, "the image"),
    ("[" * 100_000, "maximum recursion depth exceeded"),
    (b'{"prompt": "a d\xf6g"}', "'utf-8' codec can't decode byte 0xf6"),
]


def write_bad_images(folder):
    (folder / "text.png").write_text("no image")
    stream = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(stream, "JPEG")
    (folder / "cut.jpg").write_bytes(stream.getvalue()[:-500])
    Image.new("F", (8, 8)).save(folder / "float.tif")
    Image.new("L", (2, 400)).save(folder / "strip.png")
    content = bytearray((folder / "strip.png").read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)  # more pixels than memory, by its header
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "huge.png").write_bytes(content)


def test_bad_lines_are_named_before_the_model_is_loaded(model, images, capsys, monkeypatch):
    write_bad_images(images)
    manifest = write_manifest(images, *(line for line, _ in BAD), {"prompt": "a dog"})
    arguments = (model, "--manifest", manifest, "--output", images / "out")
    with monkeypatch.context() as patch:
        patch.setattr(KosmosGPipeline, "from_pretrained", None)
        assert generate(*arguments) == 2
    heard = capsys.readouterr()
    for number, (line, (_, told)) in enumerate(zip(heard.out.splitlines(), BAD, strict=True), 1):
        assert line.startswith(f"{manifest}, line {number}: ") and told in line
    assert f"{len(BAD)} lines of" in heard.err and "Traceback" not in heard.err and not (images / "out").exists()
    assert generate(*arguments, "--skip-bad") == 1
    assert [file.name for file in (images / "out").iterdir()] == [f"{len(BAD) + 1:06d}-0.png"]
    assert f"{len(BAD)} lines were skipped" in capsys.readouterr().out


def test_prompts_that_are_too_long_are_named_before_anything_is_drawn(model, images, capsys):
    long = "a dog " * 500
    lines = [{"prompt": "a dog", "name": "good"}, {"prompt": long}, {"prompt": "a", "negative_prompt": long}]
    arguments = (model, "--manifest", write_manifest(images, *lines), "--output", images / "out")
    assert generate(*arguments) == 2
    told = capsys.readouterr().out
    assert "line 2: prompt: the prompt has" in told and "line 3: negative_prompt: the prompt has" in told
    assert not (images / "out").exists()
    assert generate(*arguments, "--skip-bad") == 1
    assert [file.name for file in (images / "out").iterdir()] == ["good-0.png"]


MISTAKES = [
    (("a dog", "--manifest", "x.jsonl"), "either a prompt or --manifest"),
    ((), "either a prompt or --manifest"),
    (("--manifest", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
    (("a dog", "--batch-size", "0"), "--batch-size is 0"),
    (("a dog", "--sampler", "euler"), "sampler='euler' is not allowed"),
    (("a dog", "--sampler", "FlowMatchEulerDiscreteScheduler"), "is not allowed"),
    (("a dog", "--guidance", "nan"), "guidance_scale=nan is not allowed"),
    (("a dog", "--height", "-8"), "height=-8 is not allowed"),
    (("a dog", "--width", "65"), "width=65 are not allowed"),
    (("a dog", "--seed", "18446744073709551616"), "seeds in 0 … 2^64 - 1"),
    (("a dog", "--negative-prompt", "<i>"), "has a placeholder <i>; allowed: text without images"),
    (("a dog", "--count", "0"), "count=0"),
    (("a dog", "--device", "gpu"), "--device 'gpu' cannot be used"),
    (("a dog", "--device", "cuda:99"), "--device 'cuda:99' cannot be used"),
    (("a dog", "--device", "meta"), "--device 'meta' cannot be used"),
    (("--manifest", "x.jsonl", "--seed", "0", "--count", "2"), "--seed, --count belong to a prompt"),
    (("--manifest", "x.jsonl", "--images", "a.png"), "--images belong to a prompt"),
    (("--manifest", "x.jsonl", "--negative-prompt", ""), "--negative-prompt belong to a prompt"),
    (("a dog", "--skip-bad"), "--skip-bad belongs to --manifest"),
    (("a dog", "--steps", "1001"), "num_inference_steps=1001 is not allowed; allowed: at most 1000"),
]


def test_mistakes(model, images, tiny_model, capsys):
    write_manifest(images, {"prompt": "a", "name": "x"}, {"prompt": "b", "name": "x"})
    shutil.copytree(tiny_model, images / "run" / "model")
    for arguments, told in (
        *(((model, *arguments), told) for arguments, told in MISTAKES),
        ((model, "--manifest", images / "prompts.jsonl"), "the name 'x' is given twice"),
        ((images, "a dog"), "holds no model"),
    ):
        assert generate(*arguments, "--output", images / "out") == 2, arguments
        heard = capsys.readouterr()
        assert told in heard.err + heard.out and not (images / "out").exists(), arguments
    for text in ("model: [", "model: {image_decoder: '${oc.env:NOT_SET_ANYWHERE}'}"):
        (images / "run" / "config.yaml").write_text(text)
        assert generate(images / "run", "a dog", "--output", images / "out") == 2
        assert "config.yaml' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "link", "file", "below a file"])
def test_a_place_that_is_taken_is_named_before_the_model_is_loaded(model, tmp_path, capsys, monkeypatch, kind):
    monkeypatch.setattr(KosmosGPipeline, "from_pretrained", None)
    output, place = tmp_path / "out", tmp_path / "out" / "image-0.png"
    if kind == "folder":
        place.mkdir(parents=True)
    elif kind == "link":
        output.mkdir()
        place.symlink_to(tmp_path / "nowhere.png")
    else:
        output.write_text("text")
        output, place = (output, output) if kind == "file" else (output / "deeper", output)
    assert generate(model, "a dog", "--output", output, "--overwrite") == 2
    assert f"'{place}'" in capsys.readouterr().err


def test_an_input_whose_name_is_no_text(model, tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/d\xf6g.png")
    Image.new("RGB", (70, 80), "sienna").save(name)
    assert generate(model, "<i>", "--images", name, "--output", tmp_path / "out") == 0
    assert read_parameters(tmp_path / "out" / "image-0.png")["images"][0]["file"] == "d\ufffdg.png"


@pytest.fixture
def added(model, images):
    pipe = KosmosGPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    sizes = {"conditioning_channels": 3, "conditioning_embedding_out_channels": (16, 32, 96)}
    ControlNetModel.from_unet(pipe.unet, **sizes).save_pretrained(images / "other")
    controlnet, lora = tiny.write_controlnet_and_lora(images, pipe.unet)
    return pipe, ControlNetModel.from_pretrained(controlnet).eval(), lora


def test_controlnet_initial_image_and_lora_are_drawn_as_the_pipeline_composes_them(model, images, added, capsys):
    pipe, controlnet, lora = added
    command = [model, "<i> in the snow", "--images", images / "dog.png", "--seed", "5"]
    control = ["--controlnet", images / "controlnet", "--control-image", images / "hero.png", "--control-scale", "0.5"]
    initial = ["--init-image", images / "hero.png", "--strength", "0.5", "--sampler", "ddim"]
    embeddings = pipe.embeddings("<i> in the snow", [Image.open(images / "dog.png")])
    hero = Image.new("RGB", (64, 64), "navy")
    shared = {"num_inference_steps": 2, "guidance_scale": 6.0}
    scheduler = build_scheduler("ddim", pipe.scheduler)
    of_control = {"image": [hero], "controlnet_conditioning_scale": 0.5}
    of_start = {"image": [hero], "strength": 0.5}
    of_both = {**of_start, "control_image": [hero], "controlnet_conditioning_scale": 0.5}
    cases = [
        (control, StableDiffusionControlNetPipeline, {"controlnet": controlnet}, of_control),
        (initial, StableDiffusionImg2ImgPipeline, {"scheduler": scheduler}, of_start),
        (
            [*control, *initial],
            StableDiffusionControlNetImg2ImgPipeline,
            {"scheduler": scheduler, "controlnet": controlnet},
            of_both,
        ),
    ]
    for number, (options, kind, parts, inputs) in enumerate(cases):
        out = images / str(number)
        assert generate(*command, *options, "--output", out) == 0
        composed = pipe.compose(kind, **parts)
        composed.set_progress_bar_config(disable=True)
        expected = composed(**embeddings, **inputs, **shared, generator=torch.Generator().manual_seed(5)).images[0]
        assert_drawn(out / "image-5.png", expected)
        parameters = read_parameters(out / "image-5.png")
        assert ("controlnet" in parameters) == ("--controlnet" in options)
        assert parameters.get("init_image", {"strength": 0.5})["strength"] == 0.5
    assert generate(*command, "--lora", lora, "--lora-scales", "0.5", "--output", images / "lora") == 0
    pipe.load_lora_weights(lora, adapter_name="style")
    pipe.set_adapters("style", 0.5)
    expected = pipe("<i> in the snow", [Image.open(images / "dog.png")], seeds=[5], num_inference_steps=2).images[0]
    assert_drawn(images / "lora" / "image-5.png", expected)
    assert read_parameters(images / "lora" / "image-5.png")["loras"][0]["scale"] == 0.5
    for wrong, message in (
        (["--control-image", images / "hero.png"], "a control image needs --controlnet"),
        (["--init-image", images / "hero.png", "--strength", "0.1"], "strength=0.1 of 2 steps is less than one step"),
        (["--init-image", images / "hero.png", "--strength", "1.5"], "strength=1.5 is not allowed"),
        (["--init-image", images / "none.png"], "none.png"),
        ([*control, "--controlnet", images / "other"], "downscales images by 4; the image decoder needs 8"),
        (["--lora-scales", "1"], "1 --lora-scales for 0 files"),
        (["--lora", images / "dog.png"], "--lora '"),
    ):
        assert generate(*command, *wrong, "--output", images / "none") == 2
        assert message in capsys.readouterr().err
    lines = [{"prompt": "<i>", "images": ["dog.png"]}, {"prompt": "a dog", "init_image": "hero.png", "strength": 1}]
    manifest = ["--manifest", write_manifest(images, *lines), "--output", images / "lines"]
    assert generate(model, *manifest) == 0
    assert sorted(file.name for file in (images / "lines").iterdir()) == ["000001-0.png", "000002-0.png"]
