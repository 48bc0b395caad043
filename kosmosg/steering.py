"""Weight or mask the images of a prompt, without training, and check prompts for common mistakes.

Shapes: `B` prompts, `Q` condition tokens, `C` condition width.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from kosmosg.condition import Condition
from kosmosg.image_processing import rgb
from kosmosg.prompt import PLACEHOLDER, Segment, is_image

MAX_ASPECT_RATIO = 1.5  # beyond it, the centre crop cuts off more than a third of the image
MAX_WORDS = 60  # about 75 CLIP tokens, the longest caption in alignment
LEADING = re.compile(r"^\s*(an? photo of|an?|the)\s*(an?\s|the\s)?\s*(?=<i>)", re.IGNORECASE)


def weighted_condition(
    prompts: Sequence[list[Segment]],
    weights: Sequence[Sequence[float]],
    condition: Callable[[Sequence[list[Segment]]], Condition],
) -> Condition:
    """Return C + Σ (wᵢ − 1)(C − Cᵢ), where Cᵢ is the condition of the prompt without image i.

    This scales each image's contribution to the condition. Weights of 1 cost nothing; images with weight 0 are removed
    from the prompt first.

    Args:
        prompts: as returned by `read_prompts`.
        weights: for each prompt, the weights of its images in order, 0 or more.
        condition: computes the conditions of prompts, B×Q×C.

    Raises:
        ValueError: weights and images differ in number, or a weight is negative or not finite.
    """
    rows, ablations = [], []  # an ablation is a prompt without one of its images
    for number, (segments, given) in enumerate(zip(prompts, weights, strict=True)):
        places = [place for place, segment in enumerate(segments) if is_image(segment)]
        if len(given) != len(places):
            raise ValueError(f"prompt {number}: {len(given)} image weights for {len(places)} images; give one each.")
        if wrong := [weight for weight in given if not (math.isfinite(weight) and weight >= 0)]:
            raise ValueError(f"prompt {number}: the image weight {wrong[0]} is not allowed; allowed: 0 or more.")
        removed = [place for place, weight in zip(places, given, strict=True) if weight == 0]
        rows.append(without(segments, removed))
        scaled = [(place, weight) for place, weight in zip(places, given, strict=True) if weight not in (0, 1)]
        ablations += [(number, weight - 1, without(segments, [*removed, place])) for place, weight in scaled]
    conditions = condition([*rows, *(segments for _, _, segments in ablations)])
    whole = conditions.rows(slice(0, len(rows)))
    states, pooled = whole.states.clone(), None if whole.pooled is None else whole.pooled.clone()
    for row, (number, change, _) in enumerate(ablations, len(rows)):
        states[number] += change * (whole.states[number] - conditions.states[row])
        if pooled is not None and whole.pooled is not None and conditions.pooled is not None:
            pooled[number] += change * (whole.pooled[number] - conditions.pooled[row])
    return whole._replace(states=states, pooled=pooled)


def without(segments: Sequence[Segment], places: Sequence[int]) -> list[Segment]:
    """Remove the images at some places of a prompt, and join the texts around each."""
    result: list[Segment] = []
    joined = False
    for place, segment in enumerate(segments):
        if place in places:
            joined = True
        elif joined and isinstance(segment, str) and result and isinstance(result[-1], str):
            result[-1], joined = f"{result[-1].rstrip()} {segment.lstrip()}", False
        else:
            result.append(segment.lstrip() if joined and isinstance(segment, str) and not result else segment)
            joined = False
    return result


def masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Put the subject on white and crop to a square around it, as in the constructed training samples.

    Args:
        mask: white where the subject is; any mode, the size of the image.

    Raises:
        ValueError: the mask has another size or no white.
    """
    image, subject = rgb(image), mask.convert("L").point([255 * (value > 127) for value in range(256)])
    if subject.size != image.size:
        raise ValueError(f"the mask is {subject.size} pixels but the image {image.size}; they must be the same size.")
    box = subject.getbbox()
    if box is None:
        raise ValueError("the mask leaves nothing of the image; it must be white where the subject is.")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side), "white")
    place = ((side - right + left) // 2, (side - bottom + top) // 2)
    square.paste(image.crop(box), place, subject.crop(box))
    return square


def with_masks(prompts: Sequence[list[Segment]], masks: Sequence[Sequence[Any]]) -> list[list[Segment]]:
    """Apply masks to the images of each prompt (see `masked`); None leaves an image unchanged.

    Raises:
        ValueError: masks and images differ in number, or a mask does not fit or its image is not a PIL image.
    """
    results = []
    for number, (segments, given) in enumerate(zip(prompts, masks, strict=True)):
        if len(given) != (count := sum(map(is_image, segments))):
            raise ValueError(f"prompt {number}: {len(given)} image masks for {count} images; give one each, or None.")
        result, remaining = list(segments), iter(given)
        for place, segment in enumerate(segments):
            if not is_image(segment) or (mask := next(remaining)) is None:
                continue
            if not (isinstance(segment, Image.Image) and isinstance(mask, Image.Image)):
                raise ValueError(f"prompt {number}: a masked image and its mask must be PIL images.")
            try:
                result[place] = masked(segment, mask)
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from error
        results.append(result)
    return results


def hints(prompt: str, sizes: Sequence[tuple[int, int]], numbers: Sequence[int] = ()) -> list[str]:
    """Return hints about likely mistakes in a prompt, as sentences.

    Args:
        sizes: (width, height) of the images, in order.
        numbers: numbers of the images in the hints; by default 1, 2, …
    """
    result = []
    if (places := prompt.count(PLACEHOLDER)) != len(sizes):
        result.append(f"The prompt has {places} placeholders {PLACEHOLDER} and {len(sizes)} images; they must match.")
    if match := LEADING.match(prompt):
        result.append(
            f"The prompt begins with {match.group().strip()!r} before an image. The released model was prompted "
            f"without it; try {LEADING.sub('', prompt)!r}."
        )
    if (words := len(prompt.split())) > MAX_WORDS:
        result.append(f"The prompt has {words} words; training captions have at most about {MAX_WORDS}.")
    for number, (width, height) in dict(zip(numbers or range(1, len(sizes) + 1), sizes, strict=True)).items():
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            result.append(
                f"Image {number} is {width}×{height} pixels. The paper's model sees only the central square; crop the "
                "image to the subject."
            )
    return result
