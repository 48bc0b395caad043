"""The sample schema: what is encoded is decoded. What is wrong with samples is in bad_inputs.py."""

import pytest

from datamodules.errors import SampleError
from datamodules.images import Limits, StoredImage, load
from datamodules.sample import KINDS, EditSample, ImageSample, InstructionSample, decode
from tests.datamodules import worlds


def test_every_kind_comes_back_as_it_was() -> None:
    image, other = worlds.image(1), worlds.image(2)
    several = EditSample("a", "b", image, other, more=[(other, image)])
    assert set(several.encode()) == {"json", "source.png", "target.png", "1.source.png", "1.target.png"}
    samples = [
        *(make(3)[2] for make in (worlds.texts, worlds.captions, worlds.interleaved, worlds.constructed, worlds.edits)),
        *(several, ImageSample(image), InstructionSample(["a", image], other)),
    ]
    assert {sample.kind for sample in samples} == KINDS.keys()
    for sample in samples:
        members = sample.encode()
        again = decode(members, "s.tar", "k", kind=sample.kind)
        assert type(again) is KINDS[sample.kind] is type(sample)
        assert again.encode() == members
        assert (again.shard, again.key) == ("s.tar", "k")


def test_images_come_back_pixel_for_pixel() -> None:
    sample = decode(worlds.constructed(2)[1].encode(), "s", "k")
    assert load(sample.target).getpixel((3, 3)) == (1, 0, 7) and load(sample.target).mode == "RGB"
    assert [load(entity.white).getpixel((0, 0))[0] for entity in sample.entities] == [2, 4]


def test_what_is_missing_and_too_large_is_named_with_its_place() -> None:
    instruction = InstructionSample(["a", worlds.image(0)], worlds.image(1)).encode()
    for members, reason in (
        ({"json": b'{"kind": "image"}'}, "missing_member"),
        ({name: content for name, content in instruction.items() if name != "target.png"}, "missing_member"),
        ({name: content for name, content in instruction.items() if name != "0.png"}, "missing_member"),
        (InstructionSample([worlds.image(0)], worlds.image(1)).encode(), "empty_text"),
    ):
        with pytest.raises(SampleError, match=r"s\.tar") as caught:
            decode(members, "s.tar", "k7")
        assert (caught.value.reason, caught.value.key) == (reason, "k7")
    with pytest.raises(SampleError, match="image_too_large"):
        StoredImage(worlds.png(), "png", "s", "k", Limits(max_pixels=100)).load()
