"""Steering the images of a prompt without training: how much each counts, which part of it, and hints about prompts.

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

FAR_FROM_SQUARE = 1.5  # longer side by shorter: more than a third of the image is cut off
MOST_WORDS = 60  # about 75 tokens of CLIP, the longest caption that alignment reads
LEADING = re.compile(r"^\s*(an? photo of|an?|the)\s*(an?\s|the\s)?\s*(?=<i>)", re.IGNORECASE)


def weighted_condition(
    prompts: Sequence[list[Segment]],
    weights: Sequence[Sequence[float]],
    condition: Callable[[Sequence[list[Segment]]], Condition],
) -> Condition:
    """C + Σ (wᵢ − 1)(C − Cᵢ), Cᵢ being the condition of the prompt without its image i.

    So each image's share of the condition is scaled. With all weights 1 nothing else is computed; an image of weight 0
    is taken out of the prompt first, as if it had never stood there.

    Args:
        prompts: as `read_prompts` gives them.
        weights: of each prompt's images, in order, 0 or more.
        condition: prompts → their conditions, B×Q×C.

    Raises:
        ValueError: weights unlike images, or one that is not allowed; names the prompt.
    """
    rows, owners = [], []
    for number, (segments, given) in enumerate(zip(prompts, weights, strict=True)):
        places = [place for place, segment in enumerate(segments) if is_image(segment)]
        if len(given) != len(places):
            raise ValueError(f"prompt {number}: {len(given)} image weights for {len(places)} images; give one each.")
        if wrong := [weight for weight in given if not (math.isfinite(weight) and weight >= 0)]:
            raise ValueError(f"prompt {number}: the image weight {wrong[0]} is not allowed; allowed: 0 or more.")
        gone = [place for place, weight in zip(places, given, strict=True) if weight == 0]
        rows.append(without(segments, gone))
        scaled = [(place, weight) for place, weight in zip(places, given, strict=True) if weight not in (0, 1)]
        owners += [(number, weight - 1, without(segments, [*gone, place])) for place, weight in scaled]
    found = condition([*rows, *(segments for _, _, segments in owners)])
    whole = found.rows(slice(0, len(rows)))
    states, pooled = whole.states.clone(), None if whole.pooled is None else whole.pooled.clone()
    for row, (number, change, _) in enumerate(owners, len(rows)):
        states[number] += change * (whole.states[number] - found.states[row])
        if pooled is not None and whole.pooled is not None and found.pooled is not None:
            pooled[number] += change * (whole.pooled[number] - found.pooled[row])
    return whole._replace(states=states, pooled=pooled)


def without(segments: Sequence[Segment], places: Sequence[int]) -> list[Segment]:
    """A prompt without the images at these places; the texts around one become one text."""
    left: list[Segment] = []
    joined = False
    for place, segment in enumerate(segments):
        if place in places:
            joined = True
        elif joined and isinstance(segment, str) and left and isinstance(left[-1], str):
            left[-1], joined = f"{left[-1].rstrip()} {segment.lstrip()}", False
        else:
            left.append(segment.lstrip() if joined and isinstance(segment, str) and not left else segment)
            joined = False
    return left


def masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """What `mask` (any mode, white where the subject is) leaves of an image, on white, cut to a square around it, as
    constructed samples' crops are.

    Raises:
        ValueError: the mask is of another size, or leaves nothing.
    """
    image, chosen = rgb(image), mask.convert("L").point([255 * (value > 127) for value in range(256)])
    if chosen.size != image.size:
        raise ValueError(f"the mask is {chosen.size} pixels but its image {image.size}; allowed: the same size.")
    box = chosen.getbbox()
    if box is None:
        raise ValueError("the mask leaves nothing of its image; it must be white where the subject is.")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    square = Image.new("RGB", (side, side), "white")
    place = ((side - right + left) // 2, (side - bottom + top) // 2)
    square.paste(image.crop(box), place, chosen.crop(box))
    return square


def with_masks(prompts: Sequence[list[Segment]], masks: Sequence[Sequence[Any]]) -> list[list[Segment]]:
    """Each prompt's images as its masks leave them; None leaves one whole.

    Raises:
        ValueError: masks unlike images, a mask that does not fit, or one for an image that is preprocessed.
    """
    changed = []
    for number, (segments, given) in enumerate(zip(prompts, masks, strict=True)):
        left = list(given)
        if len(left) != sum(map(is_image, segments)):
            raise ValueError(f"prompt {number}: {len(left)} image masks for its images; give one each, or None.")
        row: list[Segment] = []
        for segment in segments:
            mask = left.pop(0) if is_image(segment) else None
            if mask is None:
                row.append(segment)
                continue
            if not (isinstance(segment, Image.Image) and isinstance(mask, Image.Image)):
                raise ValueError(f"prompt {number}: an image mask and its image must be PIL images.")
            try:
                row.append(masked(segment, mask))
            except ValueError as error:
                raise ValueError(f"prompt {number}: {error}") from error
        changed.append(row)
    return changed


def hints(prompt: str, sizes: Sequence[tuple[int, int]], numbers: Sequence[int] = ()) -> list[str]:
    """What may be wrong with a prompt, in sentences; none of it keeps it from being drawn but the first.

    Args:
        sizes: (width, height) of its images, in order.
        numbers: what the images are called; 1, 2, … if not given.
    """
    found = []
    if (places := prompt.count(PLACEHOLDER)) != len(sizes):
        found.append(f"The prompt has {places} placeholders {PLACEHOLDER} and {len(sizes)} images; each needs one.")
    if match := LEADING.match(prompt):
        found.append(
            f"The prompt begins with {match.group().strip()!r} before an image. The released model was asked without "
            f"it: {LEADING.sub('', prompt)!r}."
        )
    if (words := len(prompt.split())) > MOST_WORDS:
        found.append(f"The prompt has {words} words; captions in training have about {MOST_WORDS} at most.")
    for number, (width, height) in dict(zip(numbers or range(1, len(sizes) + 1), sizes, strict=True)).items():
        if max(width, height) > FAR_FROM_SQUARE * min(width, height):
            found.append(
                f"Image {number} is {width}×{height} pixels. The paper's MLLM reads the square in its middle: crop "
                "it to the subject."
            )
    return found
