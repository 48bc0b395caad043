"""Encode prompts of interleaved text and images (paper section 2.1; released-code.md, "Sequence format").

A sequence is `<s> text <image> token×K </image> text …`. The K image tokens also have the id of `<image>`; a mask marks
them. Users write a prompt as text with one `<i>` per image, or as a list of strings and images.

Shapes: `B` batch, `L` tokens, `I` images of the batch in reading order, `K` tokens per image, `S` pixels per side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from kosmosg.image_processing import CLIP_MEAN, CLIP_STD, ClipImageTransform, to_images
from kosmosg.tokenizer import Tokenizer

PLACEHOLDER = "<i>"
Segment = str | Image.Image | Tensor
Prompt = str | Sequence[Segment]
ImageInput = Image.Image | Tensor


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the model can read."""


@dataclass
class PackedImages:
    """Concatenated images of different sizes, as the processor of a vision-language model returns them.

    Attributes:
        inputs: the network's arguments by name, images concatenated along the first dimension.
        counts: number of entries of each image along that dimension, by name.
        ids: token ids of each image in a prompt, from its first image token to its last; other tokens may be among
            them.
    """

    inputs: dict[str, Tensor]
    counts: dict[str, list[int]]
    ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def cat(cls, parts: Sequence["PackedImages"]) -> "PackedImages":
        """Concatenate images; see `cat_padded` for sizes that differ."""
        inputs = {name: cat_padded([part.inputs[name] for part in parts]) for name in parts[0].inputs}
        counts = {name: [count for part in parts for count in part.counts[name]] for name in inputs}
        return cls(inputs, counts, [ids for part in parts for ids in part.ids])

    def take(self, index: Sequence[int]) -> "PackedImages":
        """Select images, in the order of `index`."""
        inputs = {}
        for name, tensor in self.inputs.items():
            ends = list(accumulate(self.counts[name]))
            entries = [entry for image in index for entry in range(ends[image] - self.counts[name][image], ends[image])]
            inputs[name] = tensor[torch.tensor(entries, device=tensor.device)]
        counts = {name: [count[image] for image in index] for name, count in self.counts.items()}
        return PackedImages(inputs, counts, [self.ids[image] for image in index])

    def map(self, function: Callable[[Tensor], Tensor]) -> "PackedImages":
        """Apply a function to each tensor."""
        return replace(self, inputs={name: function(tensor) for name, tensor in self.inputs.items()})


def cat_padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenate along the first dimension; other dimensions are zero-padded to the largest size."""
    largest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]

    def pad(tensor: Tensor) -> Tensor:
        missing = [target - size for target, size in zip(largest, tensor.shape[1:], strict=True)]
        return F.pad(tensor, [side for count in reversed(missing) for side in (0, count)]) if any(missing) else tensor

    return torch.cat([pad(tensor) for tensor in tensors])


@dataclass
class EncodedPrompt:
    """One prompt: ids L int64; image_mask L bool, True at image tokens, None if none; images in reading order,
    float32 3×S×S or a `PackedImages` of one image."""

    ids: Tensor | list[int]
    image_mask: Tensor | list[bool] | None
    images: Sequence[Tensor | PackedImages]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class PromptBatch:
    """Prompts padded on the right.

    Attributes:
        ids: B×L int64, `pad_id` at padding.
        image_mask: B×L bool, True at image tokens.
        images: I×3×S×S, cached states of the vision encoder I×T×width, or `PackedImages`; None without images.
        padding: B×L bool, True at padding.
        lengths: tokens of each row without padding. A list on the host like `images_per_row`, so that splitting a batch
            does not wait for the GPU; both are computed by default.
        images_per_row: images of each row.
    """

    ids: Tensor
    image_mask: Tensor
    images: Tensor | PackedImages | None
    padding: Tensor
    lengths: list[int] = None  # type: ignore[assignment]
    images_per_row: list[int] = None  # type: ignore[assignment]
    pad_id: int = 1

    def __post_init__(self) -> None:
        if self.lengths is None:
            self.lengths = (~self.padding).sum(dim=1).tolist()
        if self.images_per_row is None:
            # Each image is one run of the mask, because `</image>` follows its tokens.
            before = F.pad(self.image_mask, (1, 0))[:, :-1]
            self.images_per_row = (self.image_mask & ~before).sum(dim=1).tolist()

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def stack(cls, rows: Sequence[EncodedPrompt], pad_id: int, length: int | None = None) -> "PromptBatch":
        """Pad rows on the right to `length`, by default to the longest row.

        Raises:
            ValueError: there are no rows.
        """
        if not rows:
            raise ValueError("PromptBatch.stack got no prompts; a batch holds at least one.")
        lengths = [len(row) for row in rows]
        # numpy, because a tensor per caption would take as long as reading the caption in stage 2.
        shape = (len(rows), length or max(lengths))
        ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row.ids
            if row.image_mask is not None:
                mask[number, : len(row)] = row.image_mask
        images: list[Any] = [image for row in rows for image in row.images]
        packed = None
        if images:
            packed = torch.stack(images) if isinstance(images[0], Tensor) else PackedImages.cat(images)
        padding = np.arange(shape[1])[None, :] >= np.array(lengths)[:, None]
        return cls(
            torch.from_numpy(ids),
            torch.from_numpy(mask),
            packed,
            torch.from_numpy(padding),
            lengths,
            [len(row.images) for row in rows],
            pad_id,
        )

    def rows(self, index: Sequence[int]) -> "PromptBatch":
        """Select rows in the order of `index`, with their images, cut to the longest of them."""
        length = max(self.lengths[row] for row in index)
        ends = list(accumulate(self.images_per_row))
        chosen = [image for row in index for image in range(ends[row] - self.images_per_row[row], ends[row])]
        rows = torch.tensor(index, device=self.ids.device)
        images = None
        if isinstance(self.images, PackedImages) and chosen:
            images = self.images.take(chosen)
        elif isinstance(self.images, Tensor) and chosen:
            images = self.images[torch.tensor(chosen, device=self.images.device)]
        return PromptBatch(
            self.ids[rows, :length],
            self.image_mask[rows, :length],
            images,
            self.padding[rows, :length],
            [self.lengths[row] for row in index],
            [self.images_per_row[row] for row in index],
            self.pad_id,
        )

    def join(self, other: "PromptBatch") -> "PromptBatch":
        """Append the rows of another batch, for example the unconditional prompt."""
        other = other.to(self.ids.device)
        length = max(self.ids.shape[1], other.ids.shape[1])

        def joined(name: str, value: int | bool) -> Tensor:
            tensors = (getattr(self, name), getattr(other, name))
            return torch.cat([F.pad(tensor, (0, length - tensor.shape[1]), value=value) for tensor in tensors])

        images: list[Any] = [part.images for part in (self, other) if part.images is not None]
        packed = None
        if images:
            packed = torch.cat(images) if isinstance(images[0], Tensor) else PackedImages.cat(images)
        return PromptBatch(
            joined("ids", self.pad_id),
            joined("image_mask", False),
            packed,
            joined("padding", True),
            self.lengths + other.lengths,
            self.images_per_row + other.images_per_row,
            self.pad_id,
        )

    def replace_images(self, images: Tensor | PackedImages | None) -> "PromptBatch":
        """Replace the images in order; packed images of another size also replace the tokens of the old image."""
        if images is None or isinstance(images, Tensor):
            return replace(self, images=images)
        assert isinstance(self.images, PackedImages)
        rows, first = [], 0
        for row, count in enumerate(self.images_per_row):
            ids, mask, end = [], [], 0
            old_ids, old_mask = (part[row, : self.lengths[row]].tolist() for part in (self.ids, self.image_mask))
            for image in range(first, first + count):
                start = old_mask.index(True, end)
                image_ids = images.ids[image]
                ids += [*old_ids[end:start], *image_ids]
                mask += [*old_mask[end:start], *(token == image_ids[0] for token in image_ids)]
                end = start + len(self.images.ids[image])
            row_images = [images.take([image]) for image in range(first, first + count)]
            rows.append(EncodedPrompt(ids + old_ids[end:], mask + old_mask[end:], row_images))
            first += count
        return PromptBatch.stack(rows, self.pad_id).to(self.ids.device)

    def roll_images(self) -> "PromptBatch":
        """Shift the images by one, so that every prompt is paired with a mismatched image."""
        if isinstance(self.images, PackedImages):
            return self.replace_images(self.images.take([(i - 1) % len(self.images) for i in range(len(self.images))]))
        return self.replace_images(None if self.images is None else self.images.roll(1, dims=0))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PromptBatch":
        """Move the batch to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PromptBatch":
        """Copy the batch to page-locked memory, for asynchronous copies to a GPU."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "PromptBatch":
        images = function(self.images) if isinstance(self.images, Tensor) else None
        return replace(
            self,
            ids=function(self.ids),
            image_mask=function(self.image_mask),
            images=self.images.map(function) if isinstance(self.images, PackedImages) else images,
            padding=function(self.padding),
        )


class PromptEncoder:
    """Encode segments of text and images as ids, an image mask and preprocessed images.

    Args:
        image_transform: preprocessing of PIL images. Image tensors must have its `size`.
        image_tokens: `K`.
        max_length: maximum number of tokens of a prompt, special symbols included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_transform: ClipImageTransform,
        image_tokens: int,
        max_length: int | None = None,
    ):
        self.tokenizer, self.image_transform = tokenizer, image_transform
        self.image_tokens, self.max_length = image_tokens, max_length

    def __call__(self, segments: Sequence[Segment], *, eos: bool = False) -> EncodedPrompt:
        """Encode one prompt; `eos` appends `</s>`, which ends the documents of stage 1.

        Raises:
            PromptTooLongError: the prompt has more than `max_length` tokens.
            ValueError: an image tensor has the wrong size.
            TypeError: a segment is neither text nor an image.
        """
        tokenizer = self.tokenizer
        ids, mask = [tokenizer.bos_id], [False]
        images: list[Tensor] = []
        for segment in segments:
            if isinstance(segment, str):
                piece_ids = tokenizer.encode(segment)
                ids += piece_ids
                mask += [False] * len(piece_ids)
                continue
            images.append(self._preprocess(segment))
            ids += [tokenizer.image_id] * (1 + self.image_tokens) + [tokenizer.image_end_id]
            mask += [False] + [True] * self.image_tokens + [False]
        if eos:
            ids.append(tokenizer.eos_id)
            mask.append(False)
        if self.max_length is not None and len(ids) > self.max_length:
            raise PromptTooLongError(
                f"the prompt has {len(ids)} tokens ({len(images)} images of {self.image_tokens + 2} each) but at most "
                f"{self.max_length} are allowed; shorten the text or use fewer images."
            )
        return EncodedPrompt(torch.tensor(ids), torch.tensor(mask), images)

    def collate(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """Join prompts to a batch, padded to the longest.

        Raises:
            ValueError: there are no prompts, or a prompt does not have K image tokens per image.
        """
        for number, prompt in enumerate(prompts):
            tokens = 0 if prompt.image_mask is None else int(torch.as_tensor(prompt.image_mask).sum())
            if tokens != len(prompt.images) * self.image_tokens:
                raise ValueError(
                    f"prompt {number} has {tokens} image tokens for {len(prompt.images)} images; each image needs "
                    f"{self.image_tokens}."
                )
        return PromptBatch.stack(prompts, self.tokenizer.pad_id)

    def captions(self, texts: Sequence[str]) -> list[EncodedPrompt]:
        """Encode prompts without images, several times as fast as one by one."""
        bos = self.tokenizer.bos_id
        return [EncodedPrompt([bos, *ids], None, []) for ids in self.tokenizer.encode_batch(texts)]

    def describe(self, batch: PromptBatch) -> list[tuple[str, list[Image.Image]]]:
        """Decode each prompt into its text, with `<i>` per image, and its images (none if the batch has states)."""
        described: list[tuple[str, list[Image.Image]]] = []
        pixels = batch.images if isinstance(batch.images, Tensor) and batch.images.ndim == 4 else None
        images = [] if pixels is None else to_images(pixels, CLIP_MEAN, CLIP_STD)
        for row, count in enumerate(batch.images_per_row):
            described.append((self._text_of(batch.ids[row].tolist()), images[:count]))
            images = images[count:]
        return described

    def blank_image(self, file: str) -> ImageInput:
        """Return a blank image that takes as many tokens as the image in `file`, for counting tokens."""
        return torch.zeros(3, self.image_transform.size, self.image_transform.size)

    def _text_of(self, ids: list[int]) -> str:
        tokenizer = self.tokenizer
        text, pieces = "", []
        special = {tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.image_id}
        for token in ids:
            if token == tokenizer.image_end_id:
                text += f"{tokenizer.decode(pieces)} {PLACEHOLDER} "
                pieces = []
            elif token not in special:
                pieces.append(token)
        return (text + tokenizer.decode(pieces)).strip()

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
                f"an image tensor is {tuple(segment.shape)} but must be (3, {size}, {size}); pass a PIL image or "
                f"preprocess it with ClipImageTransform(size={size})."
            )
        return segment.float()


def parse_prompt(text: str, images: Sequence[Image.Image | Tensor] = ()) -> list[Segment]:
    """Split a text at its placeholders `<i>` and insert the images there.

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


def read_prompts(prompts: Prompt | Sequence[Prompt], images: Sequence[Any] | None) -> list[list[Segment]]:
    """Convert the prompts and images of `KosmosGPipeline.__call__` to one list of segments per prompt.

    Raises:
        ValueError: there are no prompts, a prompt is empty, or images do not match the placeholders.
    """
    if is_image(images) or isinstance(images, str):
        raise ValueError("images= is not a list; allowed: a list of images, or for a batch one list per prompt.")
    if isinstance(prompts, str) or any(not isinstance(item, str) and is_image(item) for item in prompts):
        batch, image_lists = [prompts], [images or ()]
    else:
        batch, image_lists = list(prompts), list(images) if images is not None else [()] * len(prompts)
        if not batch:
            raise ValueError("got no prompts; at least one is needed.")
        if len(image_lists) != len(batch) or any(is_image(item) for item in image_lists):
            raise ValueError(
                f"a batch of {len(batch)} prompts needs images as a list of {len(batch)} lists, one for each prompt."
            )
    return [read_prompt(prompt, list(image_lists[number]), number) for number, prompt in enumerate(batch)]  # type: ignore[arg-type]


def read_prompt(prompt: Prompt, images: Sequence[ImageInput], number: int) -> list[Segment]:
    """Convert one prompt to segments; `number` is its position in the batch, for messages."""
    if others := [image for image in images if not is_image(image)]:
        raise ValueError(
            f"prompt {number}: images= holds {others[0]!r}; allowed: PIL images and preprocessed tensors 3×S×S."
        )
    if isinstance(prompt, str):
        try:
            segments = parse_prompt(prompt, images)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from error
    elif images:
        raise ValueError(f"prompt {number} is a list of segments, which contains its images; do not pass images=.")
    else:
        segments = list(prompt)
    if not any(is_image(segment) or str(segment).strip() for segment in segments):
        raise ValueError(f"prompt {number} is empty; give text, an image or both.")
    return segments


def is_image(item: object) -> bool:
    return isinstance(item, (Image.Image, Tensor))


def check_negative_prompt(text: str) -> str:
    """Return the text unchanged.

    Raises:
        ValueError: the text has a placeholder; negative prompts take no images.
    """
    if PLACEHOLDER in text:
        raise ValueError(f"negative_prompt={text!r} has a placeholder {PLACEHOLDER}; allowed: text without images.")
    return text
