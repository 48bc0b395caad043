"""Prompts with several images in the forms of today's public sets, converted, checked and read by stage 3."""

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamodules.checks.sheet import parts_of
from datamodules.images import load
from kosmosg.config import ConfigError
from tests.datamodules.sources import published
from tests.datamodules.sources.published import checked, convert, samples

COLOURS = [published.picture(number).getpixel((1, 1)) for number in range(6)]


def hub(number: int) -> dict:
    return {"bytes": published.jpeg(number), "path": f"{number}.jpg"}


def shown(sample: Any) -> list:
    """The texts, and which of `COLOURS` each image has; the target last."""
    items = [*sample.segments, sample.target]
    return [item if isinstance(item, str) else nearest(load(item).getpixel((1, 1))) for item in items]


def nearest(colour: Any) -> int:
    return min(range(6), key=lambda i: sum(abs(a - b) for a, b in zip(COLOURS[i], colour, strict=True)))


def metaquery_instruct(folder: Path) -> list[str]:
    rows = [{"source_images": [hub(0), hub(1)], "prompt": "Both at sea", "target_image": hub(2)}]
    published.write(folder / "train-00000.parquet", published.parquet(rows))
    return []


def subjects_200k(folder: Path) -> list[str]:
    pair = Image.new("RGB", (2 * (published.SIDE + 16), published.SIDE + 16), "white")
    for i in (0, 1):
        pair.paste(published.picture(i), (8 + i * (published.SIDE + 16), 8))
    stream = io.BytesIO()
    pair.save(stream, "PNG")
    description = {"item": "a fish", "description_0": "left", "description_1": "at sea"}
    rows = [{"image": {"bytes": stream.getvalue(), "path": None}, "description": description}]
    published.write(folder / "a.parquet", published.parquet(rows))
    return ["inputs=[image]", "prompt=description.description_1", "target_half=right", "half_margin=8"]


def uno_1m(folder: Path) -> list[str]:
    row = {"img_path1": "split1/a.png", "img_path2": "split1/b.png", "caption": {"img_path2": "at sea"}}
    published.write(folder / "labels/split1.json", json.dumps([row]))
    (folder / "images").mkdir()
    with tarfile.open(folder / "images/split1.tar", "w") as tar:
        for number, name in enumerate("ab"):
            published.add(tar, f"split1/{name}.png", published.jpeg(number))
    return ["inputs=[img_path1]", "target=img_path2", "prompt=caption.img_path2"]


def omnigen(folder: Path) -> list[str]:
    """X2I2 and Echo-4o: JSON lines with paths."""
    row = {
        "task_type": "x",
        "instruction": "Both at sea",
        "input_images": ["a/0.jpg", "a/1.jpg"],
        "output_image": "2.jpg",
    }
    published.write(folder / "train.jsonl", published.jsonl([row]))
    with zipfile.ZipFile(folder / "images.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"{'a/' if number < 2 else ''}{number}.jpg", published.jpeg(number))
    return ["prompt=instruction", "inputs=[input_images]", "target=output_image"]


SETS = {
    metaquery_instruct: [0, 1, "Both at sea", 2],
    subjects_200k: [0, "at sea", 1],
    uno_1m: [0, "at sea", 1],
    omnigen: [0, 1, "Both at sea", 2],
}


@pytest.mark.parametrize("write", SETS, ids=lambda write: write.__name__)
def test_public_sets_fit(write, tmp_path: Path) -> None:
    settings = write(tmp_path / "in")
    convert("instructions", tmp_path / "in", tmp_path / "out", *settings)
    (sample,) = samples(tmp_path / "out")
    assert shown(sample) == SETS[write]
    assert {load(item).size for item in sample.segments if not isinstance(item, str)} == {(published.SIDE,) * 2}
    found = checked(tmp_path / "out", kind="instruction")
    assert (found["good"], found["images"]) == (1, sum(not isinstance(item, str) for item in SETS[write]))
    assert len(parts_of(sample)) == len(SETS[write])


PLACEHOLDERS = [
    ("a <image> at sea", None, [0, 1, "a <image> at sea", 2]),
    ("a <image> and <image>at sea", "<image>", ["a", 0, "and", 1, "at sea", 2]),
    ("a <image> at sea", "<image>", [1, "a", 0, "at sea", 2]),
    ("<img2> on <img1>, as <img2>", r"<img(\d+)>", [1, "on", 0, ", as", 1, 2]),
    ("[image 1] at sea", r"\[image (\d+)\]", [1, 0, "at sea", 2]),
    ("</s> <image> <i>", "<nothing>", [0, 1, "</s> <image> <i>", 2]),
    ("a <image><image><image>", "<image>", "invalid_placeholder"),
    ("a <img3> at sea", r"<img(\d+)>", "invalid_placeholder"),
    ("a <img0> at sea", r"<img(\d+)>", "invalid_placeholder"),
    (f"a <img{'9' * 5000}> at sea", r"<img(\d+)>", "invalid_placeholder"),
    ("  ", None, "empty_text"),
    ("<image> <image>", "<image>", "empty_text"),
]


def test_images_take_the_places_of_placeholders(tmp_path: Path, subtests: pytest.Subtests) -> None:
    row = {"source_images": ["0.jpg", "1.jpg"], "target_image": "2.jpg"}
    for number in range(3):
        published.write(tmp_path / f"in/{number}.jpg", published.jpeg(number))
    for number, (prompt, placeholder, expected) in enumerate(PLACEHOLDERS):
        with subtests.test(prompt[:40]):
            published.write(
                tmp_path / "in/a.jsonl", published.jsonl([row | {"prompt": prompt}, row | {"prompt": "good"}])
            )
            output = tmp_path / "out" / str(number)
            done = convert("instructions", tmp_path / "in", output, f"placeholder={placeholder or 'null'}")
            if isinstance(expected, str):
                assert done.dropped == {expected: 1} and done.samples == 1
            else:
                assert shown(samples(output)[0]) == expected


def test_a_row_that_misses_an_image_or_a_column_is_dropped(tmp_path: Path) -> None:
    good = {"prompt": "a fish", "source_images": None, "target_image": "0.jpg"}
    rows = {
        "missing_image": good | {"source_images": ["0.jpg", "none.jpg"]},
        "missing_column": {"prompt": "a fish", "target_image": "0.jpg"},
        "invalid_field": good | {"target_image": None},
        "unreadable_image": good | {"target_image": "a.jsonl"},
    }
    published.write(tmp_path / "in/a.jsonl", published.jsonl([*rows.values(), good]))
    published.write(tmp_path / "in/0.jpg", published.jpeg(0))
    done = convert("instructions", tmp_path / "in", tmp_path / "out")
    assert done.dropped == dict.fromkeys(rows, 1) and shown(samples(tmp_path / "out")[0]) == ["a fish", 0]


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    for setting, message in {
        "placeholder=(": "not a regular expression",
        r"placeholder=<(img)(\d)>": "at most one group",
        "target_half=top": "left or right",
        "half_margin=-1": "at least 0",
    }.items():
        with pytest.raises(ConfigError, match=message):
            convert("instructions", tmp_path, tmp_path / "out", setting)
