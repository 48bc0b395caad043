"""The forms in which a user may write prompts, read as lists of segments.

A prompt is text with a `<i>` for each image, or a list of strings and images; a batch is a list of either.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from kosmosg.prompt import Segment, parse_prompt

Picture = Image.Image | Tensor
Prompt = str | Sequence[Segment]


def read_prompts(prompts: Prompt | Sequence[Prompt], images: Sequence[Any] | None) -> list[list[Segment]]:
    """The forms of `KosmosGPipeline.__call__` as lists of segments.

    Raises:
        ValueError: nothing to draw, or images that fit no placeholders; a batch's error names the prompt.
    """
    if isinstance(prompts, str) or any(not isinstance(item, str) and is_picture(item) for item in prompts):
        batch, pictures = [prompts], [images or ()]
    else:
        batch, pictures = list(prompts), list(images) if images is not None else [()] * len(prompts)
        if not batch:
            raise ValueError("no prompts were given; give at least one.")
        if len(pictures) != len(batch) or any(is_picture(item) for item in pictures):
            raise ValueError(
                f"a batch of {len(batch)} prompts needs images as a list of {len(batch)} lists, one for each prompt."
            )
    return [read_prompt(prompt, list(pictures[number]), number) for number, prompt in enumerate(batch)]


def read_prompt(prompt: Prompt, images: Sequence[Picture], number: int) -> list[Segment]:
    """One prompt as segments; `number` is its place in the batch."""
    if isinstance(prompt, str):
        try:
            segments = parse_prompt(prompt, images)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
    elif images:
        raise ValueError(f"prompt {number} is a list of segments, which holds its images itself; give no images=.")
    else:
        segments = list(prompt)
    if not any(is_picture(segment) or str(segment).strip() for segment in segments):
        raise ValueError(f"prompt {number} is empty; give text, an image or both.")
    return segments


def is_picture(item: object) -> bool:
    return isinstance(item, (Image.Image, Tensor))
