"""Images as the vision encoder and the image decoder read them."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from kosmosg.image_processing import CLIP_MEAN, CLIP_STD, ClipImageTransform, TargetTransform, rgb


def test_uniform_colours():
    image = Image.new("RGB", (90, 70), (255, 0, 51))
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    pixels, target = ClipImageTransform(32)(image), TargetTransform(48)(image)
    assert pixels.shape == (3, 32, 32) and target.shape == (3, 48, 48)
    assert pixels.dtype == target.dtype == torch.float32
    torch.testing.assert_close(pixels.mean(dim=(1, 2)), expected)
    torch.testing.assert_close(target[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]))


def test_the_centre_is_kept():
    for size in [(64, 20), (20, 64)]:
        pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        rows, columns = (slice(22, 42), slice(None)) if size[1] == 64 else (slice(None), slice(22, 42))
        pixels[rows, columns] = 255
        assert TargetTransform(20)(Image.fromarray(pixels)).min() == 1.0


def test_modes_are_read_as_rgb_and_transparency_is_white():
    white, red = Image.new("RGB", (8, 8), "white"), (255, 0, 0)
    for mode in ["L", "P", "CMYK", "1"]:
        assert TargetTransform(8)(white.convert(mode)).min() == 1.0
    assert TargetTransform(8)(Image.new("RGBA", (8, 8), (*red, 0))).min() == 1.0
    assert TargetTransform(8)(Image.new("RGBA", (8, 8), (*red, 255)))[1].max() == -1.0
    wide = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert wide.mode == "I;16" and np.asarray(rgb(wide))[0, :, 0].tolist() == [0, 1, 255]
    with pytest.raises(ValueError, match="0×5 pixels"):
        TargetTransform(8)(Image.new("RGB", (0, 5)))


def grey_png(bits: int, row: list[int], key: int) -> Image.Image:
    """One row of grey pixels with a transparent value, as `bits` on a pixel."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    packed = int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(len(row) * bits // 8)
    header = struct.pack(">IIBBBBB", len(row), 1, bits, 0, 0, 0, 0)
    parts = [
        (b"IHDR", header),
        (b"tRNS", struct.pack(">H", key)),
        (b"IDAT", zlib.compress(b"\0" + packed)),
        (b"IEND", b""),
    ]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)))


def test_a_transparent_grey_becomes_white():
    for loaded in [False, True]:
        for bits, row, key, seen in [
            (1, [0, 1] * 4, 0, [255, 255] * 4),
            (2, [0, 1, 2, 3], 1, [0, 255, 170, 255]),
            (2, [0, 1, 2, 3], 0, [255, 85, 170, 255]),
            (4, [0, 1, 7, 15], 7, [0, 17, 255, 255]),
            (4, [0, 5, 10, 15], 5, [0, 255, 170, 255]),
            (8, [0, 17, 51, 3], 3, [0, 17, 51, 255]),
            (8, [0, 16, 17, 3], 16, [0, 255, 17, 3]),
            (16, [0, 256, 512, 65535], 512, [0, 1, 255, 255]),
        ]:
            image = grey_png(bits, row, key)
            if loaded:
                image.load()
            assert np.asarray(rgb(image))[0, :, 0].tolist() == seen


def test_every_value_of_a_target_is_that_of_double_precision():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    ours = TargetTransform(16)(Image.fromarray(np.stack([levels] * 3, axis=-1)))
    expected = (levels / 127.5 - 1.0).astype(np.float32)
    assert all(np.array_equal(channel.numpy(), expected) for channel in ours)
