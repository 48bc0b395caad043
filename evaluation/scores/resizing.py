"""What each side of FID goes through before the feature network: library and rounding are part of the number.

Sizes are torchvision's, which the field's scripts use: the longer side is cut off to whole pixels, the crop's corner
rounded to the nearest pixel, halves to even.
"""

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from evaluation.protocols.protocol import Resize


def resize(image: Image.Image, stated: Resize | None) -> Image.Image:
    """Shorter side to `stated.size`, then the centre crop of that side; None: the image as it is."""
    if stated is None:
        return image
    width, height = image.size
    short = min(width, height)
    width, height = int(stated.size * width / short), int(stated.size * height / short)
    resized = (by_pil if stated.library == "pil" else by_tensor)(image, width, height, stated)
    left, top = round((width - stated.size) / 2), round((height - stated.size) / 2)
    return resized.crop((left, top, left + stated.size, top + stated.size))


def by_pil(image: Image.Image, width: int, height: int, stated: Resize) -> Image.Image:
    return image.resize((width, height), Image.Resampling[stated.interpolation.upper()])


def by_tensor(image: Image.Image, width: int, height: int, stated: Resize) -> Image.Image:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    pixels = interpolate(
        pixels[None], (height, width), mode=stated.interpolation, align_corners=False, antialias=stated.antialias
    )
    # Clamped because bicubic weights overshoot.
    return truncated(pixels[0].clamp(0, 1).permute(1, 2, 0).numpy())


def truncated(pixels: np.ndarray) -> Image.Image:
    """H×W×3 in [0, 1] → bytes as torchmetrics makes them with normalize=True: 255·x, not rounded."""
    return Image.fromarray((pixels * 255).astype(np.uint8))
