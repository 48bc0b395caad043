"""Pretrained networks that analyse images: CLIPSeg segments a subject by words, CLIP and DINO compare images.

Shapes: `N` images or texts, `F` features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPSegForImageSegmentation,
    CLIPTokenizer,
    ViTModel,
)

from kosmosg.models.storage import load_network

Preprocess = Callable[[list[Image.Image]], Tensor]
THRESHOLD = 0.5  # minimum probability of the subject's pixels


class Segmenter:
    """Segment images by words with a CLIPSeg, for example `CIDAS/clipseg-rd64-refined`.

    Raises:
        ValueError: the weights do not match the network.
    """

    def __init__(self, source: str | Path, device: str = "cpu"):
        self.model: Any = load_network(CLIPSegForImageSegmentation, source).eval()
        self.model.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")

    @torch.inference_mode()
    def __call__(self, image: Image.Image, words: str) -> Image.Image:
        """Return a mask of the image's size, mode L, white where `words` are recognised."""
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([words], truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(image, return_tensors="pt")
        logits = self.model(**text.to(self.model.device), **pixels.to(self.model.device)).logits.float()
        heat = Image.fromarray((logits.reshape(logits.shape[-2:]).sigmoid() * 255).round().byte().cpu().numpy())
        # Stretch the mask back, because the processor squeezed the image to a square.
        return heat.resize(image.size, Image.Resampling.BILINEAR).point(
            [255 * (v > 255 * THRESHOLD) for v in range(256)]
        )


def own_preprocessing(source: str | Path) -> Preprocess:
    """Return the network's own preprocessing, PIL images → N×3×S×S, with Pillow as backend."""
    processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    return lambda images: processor(images, return_tensors="pt")["pixel_values"]


class CLIPEncoder:
    """Compute projected image and text embeddings with a CLIP.

    Args:
        preprocess: PIL images → N×3×S×S; by default the network's own.

    Raises:
        ValueError: the weights do not match the network.
    """

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", preprocess: Preprocess | None = None):
        self.model: Any = load_network(CLIPModel, source, dtype=torch.float32).eval().requires_grad_(False)
        self.model.to(device)
        self.tokenizer = CLIPTokenizer.from_pretrained(source)
        self.preprocess = preprocess or own_preprocessing(source)
        self.device = device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×F."""
        return self.model.get_image_features(pixel_values=self.preprocess(images).to(self.device)).pooler_output.cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """N texts, cut to the model's maximum length → N×F."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output.cpu()


class DinoEncoder:
    """Compute the class token of a DINO ViT's last layer. Arguments as `CLIPEncoder`."""

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", preprocess: Preprocess | None = None):
        options = {"add_pooling_layer": False, "dtype": torch.float32}
        self.model: Any = load_network(ViTModel, source, **options).eval().requires_grad_(False)
        self.model.to(device)
        self.preprocess = preprocess or own_preprocessing(source)
        self.device = device

    @torch.inference_mode()
    def images(self, images: list[Image.Image]) -> Tensor:
        """N images → N×F."""
        return self.model(pixel_values=self.preprocess(images).to(self.device)).last_hidden_state[:, 0].cpu()


def similarities(
    output: Image.Image,
    inputs: Sequence[Image.Image],
    text: str,
    clip: CLIPEncoder | None = None,
    dino: DinoEncoder | None = None,
) -> dict[str, list[float]]:
    """Return cosine similarities of an image to each input image ("DINO", "CLIP") and to the text ("text").

    A key is missing if its network is None or there is nothing to compare with.
    """
    scores: dict[str, list[float]] = {}
    for name, encoder in (("DINO", dino), ("CLIP", clip)):
        if encoder is not None and inputs:
            features = encoder.images([output, *inputs])
            scores[name] = cosine_similarity(features[:1], features[1:]).tolist()
    if clip is not None and text:
        scores["text"] = cosine_similarity(clip.images([output]), clip.texts([text])).tolist()
    return scores
