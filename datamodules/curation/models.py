"""Stages with a model (paper section 3.1): safety filter, BLIP-2, a chat model, CLIPSeg. All decode greedily.

This module is imported when a stage is built, so that workers without a model do not import transformers.
"""

from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    CLIPSegForImageSegmentation,
)
from transformers.utils.logging import disable_progress_bar

from datamodules.curation.config import Caption, Entities, Masks, Model, Safety
from datamodules.curation.rows import Batch, drop, encode_grey, row_image
from datamodules.errors import DataError

# A model's generation_config.json may set the last three, which would cause warnings without sampling.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


def load_part(kind: Any, config: Model, **options: Any) -> Any:
    """Load a part of a model with `kind.from_pretrained`, never running code that comes with it.

    Raises:
        DataError: it cannot be loaded; the message names the key, the model and the reason.
    """
    try:
        return kind.from_pretrained(config.model, revision=config.revision, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        key = f"{type(config).__name__.lower()}.model='{config.model}'"
        if "trust_remote_code" in str(error):
            raise DataError(f"{key} comes with code of its own, which is never run; use another model.") from error
        raise DataError(f"{key} cannot be loaded as {kind.__name__}: {error}") from error


class ModelStage:
    """A frozen model and its image processor; the PIL backend gives the same pixels with and without torchvision."""

    def __init__(self, kind: Any, config: Model, device: str, *, images: bool = True):
        disable_progress_bar()
        torch.set_num_threads(max(1, int(config.pool.cpus)))  # fixed, because sums of floats depend on it
        if device == "auto":  # Ray shows a worker only its own GPU
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        model = load_part(kind, config, dtype=getattr(torch, config.dtype))
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.processor = load_part(AutoImageProcessor, config, backend="pil") if images else None

    def pixels(self, batch: Batch) -> torch.Tensor:
        """Return the batch's images preprocessed for the model, B×3×S×S."""
        assert self.processor is not None
        pixels = self.processor([row_image(row) for row in batch], return_tensors="pt")["pixel_values"]
        return pixels.to(self.device, self.model.dtype)


class SafetyFilter(ModelStage):
    """Drops images that Stable Diffusion's safety checker or a classifier considers unsafe (`unsafe_image`)."""

    def __init__(self, config: Safety, device: str):
        architectures = load_part(AutoConfig, config).architectures or []
        self.is_checker = StableDiffusionSafetyChecker.__name__ in architectures
        super().__init__(
            StableDiffusionSafetyChecker if self.is_checker else AutoModelForImageClassification, config, device
        )
        self.config = config
        self.blocked = [] if self.is_checker else self._blocked_classes()

    def _blocked_classes(self) -> list[int]:
        names = {name.lower(): number for number, name in self.model.config.id2label.items()}
        blocked = [label.lower() for label in self.config.blocked_labels]
        if not blocked or not names.keys() >= set(blocked):
            raise DataError(
                f"safety.blocked_labels={self.config.blocked_labels} must be labels of '{self.config.model}', which "
                f"has {', '.join(names)}."
            )
        return [names[label] for label in blocked]

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Drop the unsafe images of a batch."""
        pixels = self.pixels(batch)
        if self.is_checker:
            # The checker also blackens the given images, so it gets placeholders.
            _, unsafe = self.model(clip_input=pixels, images=[np.zeros(1) for _ in batch])
        else:
            probability = self.model(pixel_values=pixels).logits.float().softmax(-1)[:, self.blocked].sum(-1)
            unsafe = (probability >= self.config.threshold).tolist()
        detail = f"'{self.config.model}'"
        return [drop(row, "unsafe_image", detail) if bad else row for row, bad in zip(batch, unsafe, strict=True)]


class Blip2Captions(ModelStage):
    """`image` → `caption`, without a prompt."""

    def __init__(self, config: Caption, device: str):
        super().__init__(Blip2ForConditionalGeneration, config, device)
        self.config = config
        self.tokenizer = load_part(AutoTokenizer, config)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Caption the batch's images."""
        pixels = self.pixels(batch)
        ids = self.model.generate(pixel_values=pixels, max_new_tokens=self.config.max_new_tokens, **GREEDY)
        if not self.model.config.text_config.is_encoder_decoder:
            # A decoder-only model also returns its input: the image's tokens and <s>.
            ids = ids[:, self.model.config.num_query_tokens + 1 :]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [row | {"caption": " ".join(text.split())} for row, text in zip(batch, texts, strict=True)]


class AskLanguageModel(ModelStage):
    """`caption` → `answer`, with the model's chat template."""

    def __init__(self, config: Entities, device: str):
        self.config, self.tokenizer = config, load_part(AutoTokenizer, config)
        if config.chat_template is not None:
            self.tokenizer.chat_template = config.chat_template
        if not self.tokenizer.chat_template:
            raise DataError(
                f"entities.model='{config.model}' has no chat template; set entities.chat_template "
                "(configs/curation/open_images.yaml has MPT's)."
            )
        super().__init__(AutoModelForCausalLM, config, device, images=False)
        self.tokenizer.padding_side = "left"  # because the answer must follow the prompt's last token
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Generate answers for the batch's captions."""
        prompts = [self.prompt(row["caption"]) for row in batch]
        encoded = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids, mask = (encoded[name].to(self.device) for name in ("input_ids", "attention_mask"))
        generated = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.config.max_new_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **GREEDY,
        )
        answers = self.tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
        return [row | {"answer": answer} for row, answer in zip(batch, answers, strict=True)]

    def prompt(self, caption: str) -> str:
        """Return the conversation up to the model's answer."""
        message = {"role": "user", "content": self.config.prompt.replace("{caption}", caption)}
        return self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, **self.config.template_options
        )


class ClipSegHeat(ModelStage):
    """`entities` → a `heat` map for each: pixel probabilities scaled to 0 … 255, at the model's resolution."""

    def __init__(self, config: Masks, device: str):
        super().__init__(CLIPSegForImageSegmentation, config, device)
        self.config, self.tokenizer = config, load_part(AutoTokenizer, config)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Segment every entity of the batch's images, with `batch_size` pairs of image and word at a time."""
        pixels = self.pixels(batch)
        pairs = [(i, entity["text"]) for i, row in enumerate(batch) for entity in row["entities"]]
        heat: list[bytes] = []
        for begin in range(0, len(pairs), self.config.batch_size):
            rows, words = zip(*pairs[begin : begin + self.config.batch_size], strict=True)
            heat += map(encode_grey, self.heat(pixels[list(rows)], list(words)))
        maps = iter(heat)
        return [row | {"entities": [entity | {"heat": next(maps)} for entity in row["entities"]]} for row in batch]

    def heat(self, pixels: torch.Tensor, words: list[str]) -> np.ndarray:
        """Return the heat maps N×H×W uint8 of images N×3×S×S and one word for each."""
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(words, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        logits = self.model(
            input_ids=text["input_ids"].to(self.device),
            attention_mask=text["attention_mask"].to(self.device),
            pixel_values=pixels,
        ).logits
        logits = logits.reshape(len(words), *logits.shape[-2:])  # for a single pair, the first dimension is missing
        return (logits.float().sigmoid() * 255).round().byte().cpu().numpy()
