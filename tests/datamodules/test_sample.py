import io
import json
import pickle
import struct
import zlib

import pytest
from PIL import Image

from datamodules.errors import SampleError
from datamodules.images import Limits, StoredImage, load
from datamodules.sample import KINDS, CaptionSample, decode
from tests.datamodules import worlds


class Marker:
    """Unpickling this makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_every_kind_comes_back_as_it_was():
    for make in [worlds.texts, worlds.captions, worlds.interleaved, worlds.constructed, worlds.edits]:
        sample = make(3)[2]
        members = sample.encode()
        again = decode(members, "s.tar", "k", kind=sample.kind)
        assert type(again) is KINDS[sample.kind] is type(sample)
        assert again.encode() == members
        assert (again.shard, again.key) == ("s.tar", "k")


def test_images_come_back_pixel_for_pixel():
    sample = decode(worlds.constructed(2)[1].encode(), "s", "k")
    assert load(sample.target).getpixel((3, 3)) == (1, 0, 7)
    assert [load(entity.white).getpixel((0, 0))[0] for entity in sample.entities] == [2, 4]
    assert load(sample.target).mode == "RGB"


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes whose header promises many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


def test_unusual_images_become_rgb():
    for content in [
        encoded(Image.new("CMYK", (9, 7)), "JPEG"),
        encoded(Image.new("L", (1, 1)), "PNG"),
        encoded(Image.new("P", (9, 7)), "PNG"),
        encoded(Image.new("RGBA", (9, 7)), "WEBP"),
        encoded(Image.new("I;16", (9, 7)), "PNG"),
        encoded(Image.new("RGB", (9, 7)), "WEBP", save_all=True, append_images=[Image.new("RGB", (9, 7), "red")]),
    ]:
        sample = decode({"txt": b"a dog", "jpg": content}, "s", "k")  # the suffix may lie
        assert load(sample.image).mode == "RGB"


def test_unusable_images_are_named():
    for content, reason in [
        (b"", "unreadable_image"),
        (b"not an image", "unreadable_image"),
        (encoded(worlds.image(3, 200), "JPEG")[:500], "unreadable_image"),
        (worlds.png()[:60], "unreadable_image"),
        (encoded(Image.new("RGB", (4, 4)), "GIF"), "unreadable_image"),
        (bomb(20_000, 20_000), "image_too_large"),
        (bomb(9_000, 9_000), "image_too_large"),
        (bomb(1, 60_000), "extreme_aspect_ratio"),
    ]:
        sample = decode({"txt": b"a dog", "png": content}, "s.tar", "k7")
        with pytest.raises(SampleError) as caught:
            load(sample.image)
        assert (caught.value.reason, caught.value.shard, caught.value.key) == (reason, "s.tar", "k7")


def record(**fields) -> dict[str, bytes]:
    return {"json": json.dumps(fields).encode()}


def test_unusable_samples_are_named():
    for members, reason in [
        ({}, "missing_member"),
        ({"png": b""}, "missing_member"),
        ({"txt": b"\xff\xfe"}, "not_utf8"),
        ({"txt": b"  \n"}, "empty_caption"),
        ({"json": b"{"}, "invalid_json"),
        ({"json": b"[1]"}, "invalid_json"),
        ({"json": b"[" * 100_000}, "invalid_json"),
        ({"json": b"\xff"}, "not_utf8"),
        (record(kind="video"), "wrong_kind"),
        (record(kind=["text"]), "wrong_kind"),
        (record(), "wrong_kind"),
        (record(kind="text"), "invalid_field"),
        (record(kind="text", text=" "), "empty_text"),
        (record(kind="interleaved", segments=[]), "empty_text"),
        (record(kind="interleaved", segments=[3]), "invalid_field"),
        (record(kind="interleaved", segments="a dog"), "invalid_field"),
        (record(kind="interleaved", segments=[{"image": "0.png"}]), "missing_member"),
        (record(kind="constructed", caption="a dog", entities=[{"text": "dog"}]), "missing_member"),
        (record(kind="constructed", caption="a dog", entities=["dog"]), "invalid_field"),
        (record(kind="constructed", caption="", entities=[]) | {"target.png": b""}, "empty_caption"),
        (record(kind="constructed", caption="a", entities=[]), "missing_member"),
        (record(kind="edit", caption="a", instruction=""), "empty_text"),
        (record(kind="edit", caption="a", instruction="b"), "missing_member"),
        (record(kind="edit", caption=1, instruction="b"), "invalid_field"),
    ]:
        with pytest.raises(SampleError) as caught:
            decode(members, "s.tar", "k")
        assert caught.value.reason == reason and "s.tar" in str(caught.value)


def test_the_kind_that_a_source_expects_is_held():
    with pytest.raises(SampleError, match="reads 'edit'"):
        decode(worlds.texts(1)[0].encode(), "s", "k", kind="edit")


def test_a_pickle_is_refused_and_never_run(tmp_path):
    for name in ["pkl", "pyd", "extra.pickle", "pt", "state.pth", "x.pkl.gz"]:
        marker = tmp_path / "marker"
        members = CaptionSample("a dog", worlds.image(0)).encode() | {name: pickle.dumps(Marker(marker))}
        with pytest.raises(SampleError, match=f"refused_member.*{name}"):
            decode(members, "s", "k")
        assert not marker.exists()


def test_odd_text_is_only_text():
    for text in ("a <image> of a dog </image>", "nul \0 inside", "кошка 😀", "x" * 100_000):
        assert decode({"txt": text.encode()}, "s", "k").caption == text


def test_members_that_the_schema_does_not_know_are_ignored():
    sample = decode({"txt": b"a dog", "npy": b"\x93NUMPY", "json": b"not json"}, "s", "k")
    assert sample.caption == "a dog" and sample.image is None


def test_limits_are_checked():
    with pytest.raises(ValueError, match="max_pixels"):
        Limits(max_pixels=0)
    with pytest.raises(SampleError, match="image_too_large"):
        StoredImage(worlds.png(), "png", "s", "k", Limits(max_pixels=100)).load()
