"""Interleaved text and images as one sequence (paper section 2.1; golden README, "Sequence format").

`<s> text <image> slot×K </image> text …`: the slots hold the id of `<image>` too and are marked by a mask.

Shapes: `B` batch, `L` tokens, `I` images of the batch in reading order, `K` slots per image, `S` pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from kosmosg.image_processing import UnderstandingTransform
from kosmosg.tokenizer import Tokenizer

PLACEHOLDER = "<i>"
Segment = str | Image.Image | Tensor


class PromptTooLongError(ValueError):
    """A prompt has more tokens than allowed."""


@dataclass
class EncodedPrompt:
    """One prompt: ids (L,) int64, image_mask (L,) bool, images: float32 3×S×S each."""

    ids: Tensor
    image_mask: Tensor
    images: list[Tensor]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PromptBatch:
    """Prompts padded on the right: ids B×L int64; image_mask B×L, padding B×L bool; images I×3×S×S or None."""

    ids: Tensor
    image_mask: Tensor
    images: Tensor | None
    padding: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """The batch on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PromptBatch":
        """The batch in page-locked memory, from which copies to a GPU need not block."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PromptBatch":
        return PromptBatch(
            ids=function(self.ids),
            image_mask=function(self.image_mask),
            images=None if self.images is None else function(self.images),
            padding=function(self.padding),
        )


class PromptEncoder:
    """Segments of text and images → ids, mask and preprocessed images.

    Args:
        image_transform: applied to PIL images; its `size` is what tensors must have.
        image_tokens: `K`.
        max_length: the most tokens a prompt may have, special symbols included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_transform: UnderstandingTransform,
        image_tokens: int,
        max_length: int | None = None,
    ):
        self.tokenizer, self.image_transform = tokenizer, image_transform
        self.image_tokens, self.max_length = image_tokens, max_length

    def __call__(self, segments: Sequence[Segment], *, eos: bool = False) -> EncodedPrompt:
        """Encode one prompt; `eos` closes it with `</s>` (documents of stage 1; prompts stay open).

        Raises:
            PromptTooLongError: more than `max_length` tokens.
            ValueError: an image tensor of another size.
            TypeError: a segment that is neither text nor image.
        """
        tokenizer = self.tokenizer
        ids, slots = [tokenizer.bos_id], [False]
        images: list[Tensor] = []
        for segment in segments:
            if isinstance(segment, str):
                piece_ids = tokenizer.encode(segment)
                ids += piece_ids
                slots += [False] * len(piece_ids)
                continue
            images.append(self._preprocess(segment))
            ids += [tokenizer.image_id] * (1 + self.image_tokens) + [tokenizer.image_end_id]
            slots += [False] + [True] * self.image_tokens + [False]
        if eos:
            ids.append(tokenizer.eos_id)
            slots.append(False)
        if self.max_length is not None and len(ids) > self.max_length:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens ({len(images)} images of {self.image_tokens + 2} each) but at most "
                f"{self.max_length} are allowed; shorten the text or use fewer images."
            )
        return EncodedPrompt(torch.tensor(ids), torch.tensor(slots), images)

    def collate(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """Pad on the right to the longest prompt.

        Raises:
            ValueError: no prompts, or a prompt whose slots do not fit its images.
        """
        if not prompts:
            raise ValueError("collate got no prompts; a batch holds at least one.")
        for number, prompt in enumerate(prompts):
            slots = int(prompt.image_mask.sum())
            if slots != len(prompt.images) * self.image_tokens:
                raise ValueError(
                    f"prompt {number} has {slots} image slots for {len(prompt.images)} images; each image takes "
                    f"{self.image_tokens}."
                )
        shape = (len(prompts), max(len(prompt) for prompt in prompts))
        ids = torch.full(shape, self.tokenizer.pad_id)
        image_mask = torch.zeros(shape, dtype=torch.bool)
        padding = torch.ones(shape, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = prompt.ids
            image_mask[row, : len(prompt)] = prompt.image_mask
            padding[row, : len(prompt)] = False
        images = [image for prompt in prompts for image in prompt.images]
        return PromptBatch(ids, image_mask, torch.stack(images) if images else None, padding)

    def _preprocess(self, segment: Image.Image | Tensor) -> Tensor:
        if isinstance(segment, Image.Image):
            return self.image_transform(segment)
        if not isinstance(segment, Tensor):
            raise TypeError(
                f"a prompt segment is {type(segment).__name__}; allowed are str, PIL images and preprocessed image "
                "tensors 3×S×S."
            )
        size = self.image_transform.size
        if tuple(segment.shape) != (3, size, size):
            raise ValueError(
                f"an image tensor is {tuple(segment.shape)} but must be (3, {size}, {size}); pass the PIL image or "
                f"preprocess it with UnderstandingTransform(size={size})."
            )
        return segment.float()


def parse_prompt(text: str, images: Sequence[Image.Image | Tensor] = ()) -> list[Segment]:
    """`"<i> in the suit of <i>"` and two images → segments in reading order.

    Raises:
        ValueError: the number of placeholders is not the number of images.
    """
    texts = text.split(PLACEHOLDER)
    if len(texts) - 1 != len(images):
        raise ValueError(
            f"the prompt {text!r} has {len(texts) - 1} placeholders {PLACEHOLDER} but {len(images)} images were given; "
            "each image needs one."
        )
    segments: list[Segment] = [texts[0]]
    for image, following in zip(images, texts[1:], strict=True):
        segments += [image, following]
    return [segment for segment in segments if not isinstance(segment, str) or segment]
