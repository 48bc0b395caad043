"""Networks of transformers that look at images for the page: a CLIPSeg that finds what a word names.

Shapes: `S` pixels that the network reads, `H×W` of its answer.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPSegForImageSegmentation

from kosmosg.models.storage import load_network

FOUND = 0.5  # probability from which a pixel belongs to the subject


class Segmenter:
    """A CLIPSeg, `CIDAS/clipseg-rd64-refined` or one in a folder.

    Raises:
        ValueError: weights of another network.
    """

    def __init__(self, source: str | Path, device: str = "cpu"):
        self.model: Any = load_network(CLIPSegForImageSegmentation, source).eval()
        self.model.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.processor = AutoImageProcessor.from_pretrained(source, backend="pil")

    @torch.inference_mode()
    def __call__(self, image: Image.Image, words: str) -> Image.Image:
        """White where `words` are seen, of the image's size, mode L; black throughout where they are not."""
        length = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer([words], truncation=True, max_length=length, return_tensors="pt")
        pixels = self.processor(image, return_tensors="pt")
        logits = self.model(**text.to(self.model.device), **pixels.to(self.model.device)).logits.float()
        heat = Image.fromarray((logits.reshape(logits.shape[-2:]).sigmoid() * 255).round().byte().cpu().numpy())
        # The processor squeezes an image to S×S, so stretching is the way back.
        return heat.resize(image.size, Image.Resampling.BILINEAR).point([255 * (v > 255 * FOUND) for v in range(256)])
