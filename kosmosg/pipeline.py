"""Interleaved prompts to images, with a trained model.

    pipe = KosmosGPipeline.from_pretrained("runs/instruction_tuning", image_decoder="…/stable-diffusion")
    pipe("<i> in the suit of <i>", images=[dog, hero], seeds=[0])
    pipe([["a ", dog, " in the snow"], "a red boat"], num_images_per_prompt=2)

Shapes: `B` prompts, `n` images for each, `Q` condition tokens, `C` condition width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kosmosg.image_processing import UnderstandingTransform
from kosmosg.models.kosmosg import KosmosG
from kosmosg.models.storage import find_model
from kosmosg.prompt import PromptEncoder, Segment, parse_prompt
from kosmosg.sampling import DiffusionSampler
from kosmosg.tokenizer import Tokenizer

Picture = Image.Image | Tensor
Prompt = str | Sequence[Segment]


class KosmosGPipeline:
    """A model, its tokenizer and a sampler.

    Raises:
        ValueError: parts that do not fit each other.
    """

    def __init__(self, model: KosmosG, tokenizer: Tokenizer, sampler: DiffusionSampler):
        sizes = model.mllm.config
        if len(tokenizer) != sizes.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} ids but the MLLM's vocabulary {sizes.vocab_size}.")
        if model.aligner.config.width != sampler.condition_width:
            raise ValueError(
                f"the aligner's conditions are {model.aligner.config.width} wide but the U-Net reads "
                f"{sampler.condition_width}: the model was aligned with another Stable Diffusion."
            )
        self.model, self.tokenizer, self.sampler = model, tokenizer, sampler
        self.encoder = PromptEncoder(
            tokenizer, UnderstandingTransform(model.mllm.vision.image_size), sizes.image_tokens
        )
        self._null_condition: Tensor | None = None

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        image_decoder: str | Path | None = None,
        torch_dtype: torch.dtype = torch.float32,
    ) -> "KosmosGPipeline":
        """Read a model folder or run folder, and a Stable Diffusion folder or hub id.

        Args:
            image_decoder: may be left out if unet/, vae/ and scheduler/ lie in the model folder.

        Raises:
            FileNotFoundError: a part is missing.
        """
        folder = find_model(folder)
        if image_decoder is None:
            if not (folder / "unet").is_dir():
                raise FileNotFoundError(
                    f"'{folder}' holds no unet/; name the Stable Diffusion it was trained with as image_decoder=."
                )
            image_decoder = folder
        return cls(
            KosmosG.from_pretrained(folder, torch_dtype).requires_grad_(False),
            Tokenizer.from_pretrained(folder / "tokenizer"),
            DiffusionSampler.from_pretrained(image_decoder, torch_dtype),
        )

    def to(self, device: torch.device | str) -> "KosmosGPipeline":
        """Move all parts."""
        self.model.to(device)
        self.sampler.to(device)
        self._null_condition = None
        return self

    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        images: Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        **sampling: Any,
    ) -> list[Image.Image]:
        """B·n images, those of one prompt together.

        Args:
            prompts: text with a `<i>` for each image; or segments of text and images, one prompt, known by an image
                in the list; or a list of either, a batch.
            images: those of the placeholders, in order; for a batch of prompts, a list of lists.
            negative_prompt: what to steer away from, one for all or one each; empty means the null condition.
            sampling: num_images_per_prompt, num_inference_steps, guidance_scale, sampler ("dpm", "ddim", "pndm"),
                seeds, generator, latents, height, width, output_type, progress: see `DiffusionSampler`.

        Raises:
            ValueError: placeholders unlike images, an empty prompt, seeds unlike images, an unknown sampler.
        """
        condition = self.encode_prompt(prompts, images=images)
        return self.sampler(condition, self.encode_negative(negative_prompt, len(condition)), **sampling)

    def encode_prompt(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        images: Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
    ) -> Tensor:
        """Conditions B×Q×C; see `__call__`."""
        return self._condition(read_prompts(prompts, images))

    def encode_negative(self, negative_prompt: str | Sequence[str] | None, count: int) -> Tensor:
        """What guidance steers away from: 1×Q×C, or B×Q×C where each prompt has its own."""
        if not negative_prompt:
            return self.null_condition
        if isinstance(negative_prompt, str):
            return self._condition([[negative_prompt]])
        if len(negative_prompt) != count:
            raise ValueError(
                f"{len(negative_prompt)} negative prompts were given for {count} prompts; give one, or one each."
            )
        return self._condition([[text] for text in negative_prompt])

    @property
    def null_condition(self) -> Tensor:
        """The condition of `<s>` alone, 1×Q×C; kept while the model is frozen, as `from_pretrained` leaves it."""
        if any(parameter.requires_grad for parameter in self.model.parameters()):
            return self._condition([[]])
        if self._null_condition is None:
            self._null_condition = self._condition([[]])
        return self._null_condition

    @torch.no_grad()
    def _condition(self, prompts: Sequence[Sequence[Segment]]) -> Tensor:
        batch = self.encoder.collate([self.encoder(segments) for segments in prompts])
        with evaluating(self.model):
            return self.model.condition(batch.to(self.model.mllm.device))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; outside, every submodule is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
