"""Where each entity is, as a heat map, by CLIPSeg (paper section 3.1)."""

import numpy as np
import torch
from transformers import AutoTokenizer, CLIPSegForImageSegmentation

from datamodules.curation.models import find_device, load_image_processor, load_model, load_part
from datamodules.curation.rows import Batch, encode_grey, row_image
from datamodules.curation.stage_config import Masks


class ClipSegHeat:
    """`entities` → a `heat` map for each: the probability of its pixels in 255ths, at the model's own resolution."""

    def __init__(self, config: Masks, device: str):
        self.config, self.device = config, find_device(device)
        self.model = load_model(CLIPSegForImageSegmentation, config, self.device)
        self.processor = load_image_processor(config)
        self.tokenizer = load_part(AutoTokenizer, config)

    def __call__(self, batch: Batch) -> Batch:
        """Segment every entity of the batch's images; pairs of image and word are what the model sees at once."""
        pixels = self.processor([row_image(row) for row in batch], return_tensors="pt")["pixel_values"]
        pairs = [(i, entity["text"]) for i, row in enumerate(batch) for entity in row["entities"]]
        heats: list[bytes] = []
        for begin in range(0, len(pairs), self.config.batch_size):
            some = pairs[begin : begin + self.config.batch_size]
            maps = self.heat(pixels[[i for i, _ in some]], [word for _, word in some])
            heats += [encode_grey(values) for values in maps]
        given = iter(heats)
        return [row | {"entities": [entity | {"heat": next(given)} for entity in row["entities"]]} for row in batch]

    @torch.inference_mode()
    def heat(self, pixels: torch.Tensor, words: list[str]) -> np.ndarray:
        """Pixels N×3×S×S and a word for each → N×H×W uint8."""
        limit = self.model.config.text_config.max_position_embeddings
        text = self.tokenizer(words, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        logits = self.model(
            input_ids=text["input_ids"].to(self.device),
            attention_mask=text["attention_mask"].to(self.device),
            pixel_values=pixels.to(self.device, self.model.dtype),
        ).logits
        logits = logits.reshape(len(words), *logits.shape[-2:])  # a single pair comes without the first dimension
        return (logits.float().sigmoid() * 255).round().byte().cpu().numpy()
