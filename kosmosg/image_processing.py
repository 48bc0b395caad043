"""Convert PIL images to model inputs, bit for bit as the released code (released-code.md, "Image preprocessing").

Values are computed in float64 and rounded once at the end, as in the released code.
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
LONGEST_ASPECT = 100  # a longer strip, resized by its shorter side, would need gigabytes before it is cropped
TRANSPOSES = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Entries of `Image.info` that may hold an orientation; `Image.transpose` copies them.
EXIF_KEYS = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")


class ClipImageTransform:
    """Prepare images for the vision encoder: bicubic resize, centre crop or padding, CLIP's mean and deviation.

    Args:
        size: `S`, pixels per side.
        fit: "crop" resizes the shorter side to S and crops the centre; "pad" resizes the longer side to S and pads
            with white.
    """

    def __init__(self, size: int = 224, fit: ImageFit = "crop"):
        self.size, self.fit = size, fit

    def __str__(self) -> str:
        return f"{self.size}×{self.size}, {self.fit}"

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode → float32 3×S×S."""
        fitted = padded if self.fit == "pad" else cropped
        bands = fitted(image, (self.size, self.size), Image.Resampling.BICUBIC).split()
        pixels = torch.empty(3, self.size, self.size)
        for channel, band, mean, deviation in zip(pixels.numpy(), bands, CLIP_MEAN, CLIP_STD, strict=True):
            channel[:] = (np.asarray(band, dtype=np.float64) / 255.0 - mean) / deviation
        return pixels


class TargetTransform:
    """Prepare images for the VAE: bilinear resize, centre crop, values in [-1, 1].

    Args:
        size: `S`, pixels per side of square images.
        multiple: choose the size nearest to the image's aspect ratio, from 1:2 to 2:1, with an area of about S² and
            sides that are multiples of this. None for squares only.

    Attributes:
        sizes: possible output sizes (height, width).
    """

    def __init__(self, size: int = 512, multiple: int | None = None):
        self.size, self.multiple, self.sizes = size, multiple, [(size, size)]
        if multiple is not None:
            # Imported here, because it takes seconds and most users of this file do not need it.
            from diffusers.training_utils import generate_aspect_ratio_buckets

            self.sizes = generate_aspect_ratio_buckets(size, multiple)

    def __str__(self) -> str:
        if self.multiple is None:
            return f"{self.size}×{self.size}, crop"
        return f"{self.size}² in multiples of {self.multiple}, crop"

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image of any mode → float32 3×H×W in [-1, 1], where H×W is one of `sizes`."""
        image = rgb(image)
        size = self.sizes[0] if self.multiple is None else self._nearest(image)
        # (2x - 255) / 255 in float32 equals x / 127.5 - 1 rounded from float64 for all 256 values, in half the time.
        bands = cropped(image, size, Image.Resampling.BILINEAR).split()
        pixels = torch.empty(3, *size)
        for channel, band in zip(pixels.numpy(), bands, strict=True):
            channel[:] = np.asarray(band)
        return pixels.mul_(2).sub_(255).div_(255)

    def _nearest(self, image: Image.Image) -> tuple[int, int]:
        from diffusers.training_utils import find_nearest_bucket

        return self.sizes[find_nearest_bucket(image.height, image.width, self.sizes) or 0]


def read_image(file: str | Path) -> Image.Image:
    """Read and decode an image file as RGB.

    Raises:
        ValueError: the file is missing, not a regular file, of another format, damaged, too large, or cannot be
            converted to RGB; names the file.
    """
    try:
        if not Path(file).is_file():
            raise ValueError("does not exist, or is not a regular file")
        with Image.open(file, formats=FORMATS) as image:
            return rgb(image)
    except Exception as error:  # Pillow's decoders raise many exception types on damaged files
        raise ValueError(f"the image '{file}' cannot be read: {error}") from error


def cropped(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Resize an image to cover (height, width) and crop the centre; RGB. Errors as `resizable`."""
    image = resizable(image)
    height, width = size
    # The other side is truncated, not rounded, as in the released code: one pixel would shift the crop.
    if height * image.width >= width * image.height:
        resized = max(width, int(height * image.width / image.height)), height
    else:
        resized = width, max(height, int(width * image.height / image.width))
    if resized != image.size:
        image = image.resize(resized, resampling)
    left, top = round((resized[0] - width) / 2.0), round((resized[1] - height) / 2.0)
    return image.crop((left, top, left + width, top + height))


def padded(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """Resize an image to fit into (height, width) and pad it with white; RGB. Errors as `resizable`."""
    return ImageOps.pad(resizable(image), (size[1], size[0]), resampling, "white")


def resizable(image: Image.Image) -> Image.Image:
    """Return the image in RGB.

    Raises:
        ValueError: the image has no pixels, is too long for its width, or cannot be converted to RGB.
    """
    image = rgb(image)
    width, height = image.size
    shorter = min(width, height)
    if not shorter or max(width, height) > LONGEST_ASPECT * shorter:
        raise ValueError(
            f"an image of {width}×{height} pixels is not allowed; allowed: at least one pixel and a longer side of at "
            f"most {LONGEST_ASPECT} times the shorter."
        )
    return image


def rgb(image: Image.Image, turn: bool = True) -> Image.Image:
    """Convert an image to RGB. Transparent pixels become white, the background of segmented subjects.

    Args:
        turn: apply the EXIF orientation.

    Raises:
        ValueError: values of the image's mode have no fixed range, for example floating point.
    """
    if turn:
        image = upright(image)
    if image.mode in ("F", "I"):
        raise ValueError(
            f"an image of mode {image.mode!r} has no fixed range of values, so its brightness in RGB is unknown; "
            "allowed: modes of 8 or 16 bits. Scale it to 8 bits first."
        )
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        values = np.asarray(image)
        opaque = values != image.info.get("transparency", -1)
        return Image.fromarray(np.where(opaque, values >> 8, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        colour = image.info.get("transparency")
        if isinstance(colour, tuple) and max(colour) > 255:  # a 16-bit PNG, whose pixels Pillow reads as 8 bits
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in colour)
        elif image.mode == "L" and isinstance(colour, int):
            image = image.copy()
            image.info["transparency"] = scaled_key(np.unique(np.asarray(image)), colour)
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def scaled_key(values: np.ndarray, key: int) -> int:
    """Scale the transparent grey level of a PNG to the range of the pixels' `values`.

    Pillow scales the pixels of 2- and 4-bit PNGs to 8 bits, but not the transparency key, and does not report the
    number of bits. Without scaling, the key would match no pixel.
    """
    for levels in (4, 16):
        if key < levels and not (values % (step := 255 // (levels - 1))).any():
            return key * step
    return key


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation of an image and remove it; invalid EXIF data are ignored."""
    image.load()  # Pillow turns TIFF files and reads the orientation of PNG files only when loading
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the data are untrusted, and Pillow raises many exception types
        return image
    if orientation not in TRANSPOSES:
        return image
    turned = image.transpose(TRANSPOSES[orientation])
    for key in EXIF_KEYS:
        turned.info.pop(key, None)
    return turned


def to_images(
    pixels: Tensor, mean: Sequence[float] = (0.5,) * 3, std: Sequence[float] = (0.5,) * 3
) -> list[Image.Image]:
    """Convert normalised tensors B×3×H×W, by default in [-1, 1], to PIL images."""
    shape = (1, 3, 1, 1)
    values = pixels.float().cpu() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in (values.clamp(0, 1) * 255).round().byte()]
