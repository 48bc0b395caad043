"""Resizes equal a direct computation, and the variants of published scripts differ."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from evaluation.protocols.protocol import Resize
from evaluation.scores.encoders import resize, truncated
from tests.evaluation import tiny_world

WIDTH, HEIGHT = 427, 640  # a usual portrait of val2014
LONG = 383  # int(256 · 640 / 427), the longer side after resizing
TOP = 64  # round((383 - 256) / 2), half to even


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    smooth = np.asarray(tiny_world.picture(1).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    return Image.fromarray(((noise.astype(int) + 3 * smooth) // 4).astype(np.uint8))


def test_tensor_resize(photo: Image.Image) -> None:
    for antialias in [False, True]:
        for interpolation in ["bilinear", "bicubic"]:
            pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None].float() / 255
            expected = interpolate(pixels, (LONG, 256), mode=interpolation, antialias=antialias)[0, :, TOP : TOP + 256]
            expected = (expected.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            assert np.array_equal(np.asarray(resize(photo, Resize(256, "tensor", interpolation, antialias))), expected)


def test_pil_resize(photo: Image.Image) -> None:
    for interpolation in ["bilinear", "bicubic"]:
        small = photo.resize((256, LONG), Image.Resampling[interpolation.upper()]).crop((0, TOP, 256, TOP + 256))
        assert np.array_equal(np.asarray(resize(photo, Resize(256, "pil", interpolation, True))), np.asarray(small))


def test_bilinear_without_antialias_equals_its_formula() -> None:
    """At half size, each pixel is the truncated mean of four; computed without interpolate."""
    pixels = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    means = pixels.reshape(256, 2, 256, 2, 3).astype(np.float64).mean((1, 3))
    small = np.asarray(resize(Image.fromarray(pixels), Resize(256, "tensor", "bilinear", False))).astype(int)
    whole = np.isclose(means, np.round(means))  # float32 may fall just below a whole number
    assert np.array_equal(small[~whole], np.floor(means[~whole])) and np.abs(small - means).max() <= 1


def test_every_choice_changes_pixels(photo: Image.Image) -> None:
    variants = [
        Resize(256, library, interpolation, antialias)
        for library, antialias in (("tensor", False), ("tensor", True), ("pil", True))
        for interpolation in ("bilinear", "bicubic")
    ]
    pixels = [np.asarray(resize(photo, each)).astype(int) for each in variants]
    pairs = [(a, b) for a in range(len(pixels)) for b in range(a)]
    assert min(np.abs(pixels[a] - pixels[b]).mean() for a, b in pairs) > 0.1


def test_landscape_and_small_images() -> None:
    landscape = Image.new("RGB", (640, 480), "red")
    landscape.paste("blue", (0, 0, 320, 480))
    cut = np.asarray(resize(landscape, Resize(256, "pil", "bilinear", True)))
    assert cut.shape == (256, 256, 3)
    assert tuple(cut[0, 126]) == (0, 0, 255) and tuple(cut[0, 130]) == (255, 0, 0), "the crop is central"
    assert resize(Image.new("RGB", (30, 20)), Resize(256)).size == (256, 256), "small images are enlarged"
    assert resize(landscape, None) is landscape


def test_floats_are_truncated_to_bytes() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    assert np.array_equal(np.asarray(truncated(values.astype(np.float32) / 255)), values)
    assert np.asarray(truncated(np.full((1, 1, 3), 0.999, np.float32))).max() == 254
