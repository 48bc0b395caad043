"""How much each image of a prompt counts, which part of it is read, and hints about prompts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from kosmosg.cli import main
from kosmosg.generation import read_parameters
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.steering import hints, masked

RED, BLUE = Image.new("RGB", (70, 80), "red"), Image.new("RGB", (64, 64), "blue")
PROMPT = "<i> in the suit of <i>"


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    pipe = KosmosGPipeline.from_pretrained(tiny_pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def encode(pipe, prompt=PROMPT, images=(RED, BLUE), **options):
    return pipe.encode_prompt(prompt, images=list(images), **options)[0]


def test_weight_1_changes_nothing_and_0_is_the_prompt_without_the_image(pipe):
    whole, first = encode(pipe), encode(pipe, "<i> in the suit of", [RED])
    assert torch.equal(encode(pipe, image_weights=[1, 1]), whole)
    assert torch.equal(encode(pipe, image_weights=[1, 0]), first)
    assert torch.equal(encode(pipe, image_weights=[0, 0]), encode(pipe, "in the suit of", []))
    segments = [RED, " in the suit of ", BLUE]
    assert torch.equal(encode(pipe, segments, (), image_weights=[1, 0]), encode(pipe, "<i> in the suit of ", [RED]))


def test_between_them_the_share_of_the_image_is_scaled_and_beyond_1_it_grows(pipe):
    whole, without_blue, without_red = encode(pipe), encode(pipe, "<i> in the suit of ", [RED]), None
    for weight in (0.25, 0.5, 2.0):
        expected = without_blue + weight * (whole - without_blue)
        torch.testing.assert_close(encode(pipe, image_weights=[1, weight]), expected, rtol=0, atol=1e-5)
    without_red = encode(pipe, "in the suit of <i>", [BLUE])
    both = whole - 0.5 * (whole - without_blue) - 0.25 * (whole - without_red)
    torch.testing.assert_close(encode(pipe, image_weights=[0.75, 0.5]), both, rtol=0, atol=1e-5)


def test_a_batch_has_a_list_for_each_prompt(pipe):
    prompts, images = ["a dog", PROMPT], [[], [RED, BLUE]]
    found = pipe.encode_prompt(prompts, images=images, image_weights=[[], [1, 0.5]])[0]
    torch.testing.assert_close(found[1:], encode(pipe, image_weights=[1, 0.5]), rtol=0, atol=1e-5)
    for weights, message in (
        ([[], [1]], "prompt 1: 1 image weights for 2 images"),
        ([1, 0.5], "1 lists for 2 prompts"),
        ([[], [1, -1]], "prompt 1: the image weight -1 is not allowed"),
        ([[], [1, float("nan")]], "image weight nan"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.encode_prompt(prompts, images=images, image_weights=weights)


def test_a_mask_leaves_the_subject_on_white_in_a_square(pipe):
    image, mask = Image.new("RGB", (60, 40), "green"), Image.new("L", (60, 40))
    ImageDraw.Draw(image).rectangle((10, 5, 19, 34), fill="red")
    ImageDraw.Draw(mask).rectangle((10, 5, 19, 34), fill=255)
    cut = np.asarray(masked(image, mask))
    assert cut.shape == (30, 30, 3)
    assert (cut[:, 10:20] == (255, 0, 0)).all() and (cut[:, :10] == 255).all() and (cut[:, 20:] == 255).all()
    expected = encode(pipe, "<i> in the snow", [masked(image, mask)])
    assert torch.equal(encode(pipe, "<i> in the snow", [image], image_masks=[mask]), expected)
    assert torch.equal(encode(pipe, image_masks=[None, None]), encode(pipe))
    for wrong, message in (
        ([Image.new("L", (60, 40))], "leaves nothing"),
        ([Image.new("L", (6, 4), 255)], "the same size"),
        ([], "0 image masks"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(pipe, "<i> in the snow", [image], image_masks=wrong)


def test_hints_name_what_may_be_wrong():
    assert hints("<i> in the snow", [BLUE.size]) == []
    (leading,) = hints("a photo of a <i> in the snow", [BLUE.size])
    assert "'<i> in the snow'" in leading
    assert hints("a dog beside <i>", [BLUE.size]) == []
    (wide,) = hints("<i>", [(100, 40)])
    assert "Image 1 is 100×40" in wide
    (unnamed,) = hints("<i>", [BLUE.size] * 2)
    assert "1 placeholders <i> and 2 images" in unnamed
    (long,) = hints("<i>" + " in the snow" * 20, [BLUE.size])
    assert "has 61 words" in long


def test_weights_and_masks_of_the_command_line_are_drawn_kept_and_checked(tiny_pipeline, pipe, tmp_path, capsys):
    RED.save(tmp_path / "red.png")
    half = Image.new("L", RED.size)
    half.paste(255, (0, 0, RED.width // 2, RED.height))
    half.save(tmp_path / "half.png")
    Image.new("L", (9, 9), 255).save(tmp_path / "small.png")
    command = ["generate", str(tiny_pipeline), "<i> in the snow", "--images", str(tmp_path / "red.png"), "--steps", "2"]
    masks = {name: ["--image-masks", str(tmp_path / f"{name}.png")] for name in ("half", "small")}
    for name, given, options in (
        ("weighted", ["--image-weights", "0.5"], {"image_weights": [0.5]}),
        ("masked", masks["half"], {"image_masks": [half]}),
    ):
        assert main([*command, "--output", str(tmp_path / name), *given]) == 0
        drawn = pipe("<i> in the snow", [RED], **options, seeds=[0], num_inference_steps=2).images[0]
        with Image.open(tmp_path / name / "image-0.png") as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(drawn)).max() <= 1
    assert read_parameters(tmp_path / "weighted" / "image-0.png")["image_weights"] == [0.5]
    assert read_parameters(tmp_path / "masked" / "image-0.png")["image_masks"][0]["file"] == "half.png"
    for given, told in (
        (["--image-weights", "1"], "--overwrite"),  # another image is there
        (["--image-weights", "0.5", "1"], "2 image weights for 1 images"),
        ([*masks["half"], str(tmp_path / "half.png")], "2 image masks for 1 images"),
        (masks["small"], "red.png': the mask is (9, 9) pixels"),
    ):
        assert main([*command, "--output", str(tmp_path / "weighted"), *given]) == 2
        assert told in capsys.readouterr().err
    assert main([*command, "--lint"]) == 0
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": "a <i>", "images": ["red.png"], "image_weights": [0.5]}))
    assert main(["generate", str(tiny_pipeline), "--manifest", str(lines), "--lint"]) == 1
    assert "line 1: The prompt begins with 'a'" in capsys.readouterr().out
