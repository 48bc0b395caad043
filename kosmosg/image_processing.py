"""PIL images to model inputs, as recorded from the released code (released-code.md, "Image preprocessing").

Values are those of float64 arithmetic rounded once, at the end: that is how the released code computes its inputs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

ImageFit = Literal["crop", "pad"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LONGEST_ASPECT = 100  # resized by its shorter side, a longer strip would need gigabytes before it is cropped
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where Pillow keeps an orientation; `Image.transpose` copies them all.
EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class ClipImageTransform:
    """What the vision encoder reads: bicubic, centre crop or padding, CLIP's mean and deviation.

    Args:
        size: pixels on a side, `S`.
        fit: an image that is not square is cropped, its shorter side S, or padded with white, its longer side S.
    """

    def __init__(self, size: int = 224, fit: ImageFit = "crop"):
        self.size, self.fit = size, fit

    def __str__(self) -> str:
        return f"{self.size}×{self.size}, {self.fit}"

    def __call__(self, image: Image.Image) -> Tensor:
        """Any PIL image → float32 3×S×S."""
        fitted = padded if self.fit == "pad" else cropped
        bands = fitted(image, (self.size, self.size), Image.Resampling.BICUBIC).split()
        pixels = torch.empty(3, self.size, self.size)
        for channel, band, mean, deviation in zip(pixels.numpy(), bands, CLIP_MEAN, CLIP_STD, strict=True):
            channel[:] = (np.asarray(band, dtype=np.float64) / 255.0 - mean) / deviation
        return pixels


class TargetTransform:
    """What the VAE reads: bilinear, centre crop, [-1, 1].

    Args:
        size: pixels on a side, `S`.
        multiple: for sizes near an image's own aspect ratio, from 1:2 to 2:1: their area is about S², and their sides
            are multiples of this. None for squares alone.

    Attributes:
        sizes: (height, width) of what it gives.
    """

    def __init__(self, size: int = 512, multiple: int | None = None):
        self.size, self.multiple, self.sizes = size, multiple, [(size, size)]
        if multiple is not None:
            # Not at the top: it takes seconds, and processes that only decode or draw images import this file, too.
            from diffusers.training_utils import generate_aspect_ratio_buckets

            self.sizes = generate_aspect_ratio_buckets(size, multiple)

    def __str__(self) -> str:
        squares = self.multiple is None
        return f"{self.size}×{self.size}, crop" if squares else f"{self.size}² in multiples of {self.multiple}, crop"

    def __call__(self, image: Image.Image) -> Tensor:
        """Any PIL image → float32 3×H×W in [-1, 1], of one of `sizes`."""
        image = rgb(image)
        size = self.sizes[0] if self.multiple is None else self._nearest(image)
        # (2x - 255)/255 in float32 is x/127.5 - 1 rounded from float64 for each of the 256 values, and half the time.
        bands = cropped(image, size, Image.Resampling.BILINEAR).split()
        pixels = torch.empty(3, *size)
        for channel, band in zip(pixels.numpy(), bands, strict=True):
            channel[:] = np.asarray(band)
        return pixels.mul_(2).sub_(255).div_(255)

    def _nearest(self, image: Image.Image) -> tuple[int, int]:
        from diffusers.training_utils import find_nearest_bucket

        return self.sizes[find_nearest_bucket(image.height, image.width, self.sizes) or 0]


def read_image(file: str | Path) -> Image.Image:
    """A file as an RGB image, decoded whole.

    Raises:
        ValueError: it is missing, not a regular file, of another format, damaged, too large, or has no meaning in RGB;
            names the file.
    """
    try:
        if not Path(file).is_file():
            raise ValueError("does not exist, or is not a regular file")
        with Image.open(file, formats=FORMATS) as image:
            return rgb(image)
    except Exception as error:  # decoders of Pillow raise many kinds on damaged files
        raise ValueError(f"the image '{file}' cannot be read: {error}") from error


def cropped(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Resized to cover (height, width), centre crop; RGB.

    Raises:
        ValueError: the image has no pixels, is too long for its width, or has no meaning in RGB.
    """
    image = readable(image, size)
    height, width = size
    # The other side is cut off, not rounded: one pixel would shift the crop.
    if height * image.width >= width * image.height:
        resized = max(width, int(height * image.width / image.height)), height
    else:
        resized = width, max(height, int(width * image.height / image.width))
    if resized != image.size:
        image = image.resize(resized, resampling)
    left, top = round((resized[0] - width) / 2.0), round((resized[1] - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def padded(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Resized to fit into (height, width), white around it; RGB. Errors as `cropped`."""
    return ImageOps.pad(readable(image, size), (size[1], size[0]), resampling, "white")


def readable(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image in RGB, if it can be resized; see `cropped`."""
    image = rgb(image)
    width, height = image.size
    shorter = min(width, height)
    if not shorter or max(width, height) > LONGEST_ASPECT * shorter:
        raise ValueError(
            f"an image of {width}×{height} pixels cannot be resized to {size[1]}×{size[0]}; allowed: at least one "
            f"pixel and a longer side of at most {LONGEST_ASPECT} times the shorter."
        )
    return image


def rgb(image: Image.Image, turn: bool = True) -> Image.Image:
    """The image in RGB. Transparent pixels become white, the background of the cut-out subjects.

    Args:
        turn: as the EXIF orientation says.

    Raises:
        ValueError: a mode whose values have no fixed range, as floating point.
    """
    if turn:
        image = upright(image)
    if image.mode in ("F", "I"):
        raise ValueError(
            f"an image of mode {image.mode!r} has no fixed range of values, so its brightness in RGB is unknown; scale "
            "it to 8 bits first. Allowed: modes of 8 or 16 bits."
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image)
        opaque = values != image.info.get("transparency", -1)
        return Image.fromarray(np.where(opaque, values >> 8, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colour = image.info.get("transparency")
        if isinstance(colour, tuple) and max(colour) > 255:  # of a PNG of 16 bits, whose pixels Pillow reads as 8
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in colour)
        elif image.mode == "L" and isinstance(colour, int):
            image = image.copy()
            image.info["transparency"] = scaled_key(np.unique(np.asarray(image)), colour)
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def scaled_key(values: np.ndarray, key: int) -> int:
    """The transparent grey on the scale of the pixels' `values`.

    Pillow scales the pixels of a PNG of 2 or 4 bits to 8, but not the key, and does not keep the number of bits. Left
    unscaled, the key would then equal no pixel.
    """
    for levels in (4, 16):
        if key < levels and not (values % (step := 255 // (levels - 1))).any():
            return key * step
    return key


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, which it then no longer carries.

    Broken EXIF data are ignored.
    """
    image.load()  # TIFF files are turned, and PNG files learn their orientation, only then
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the data are the camera's, or anybody's
        return image
    if orientation not in TURNS:
        return image
    turned = image.transpose(TURNS[orientation])
    for key in EXIF_KEYS:
        turned.info.pop(key, None)
    return turned


def to_images(
    pixels: Tensor, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> list[Image.Image]:
    """Normalised tensors B×3×H×W as PIL images, by default from [-1, 1]."""
    shape = (1, 3, 1, 1)
    values = pixels.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in (values.clamp(0, 1) * 255).round().byte()]
