"""One caption for each image, by BLIP-2 (paper section 3.1)."""

import torch
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from datamodules.curation.models import GREEDY, find_device, load_image_processor, load_model, load_part
from datamodules.curation.rows import Batch, row_image
from datamodules.curation.stage_config import Caption


class Blip2Captions:
    """`image` → `caption`, without a prompt and greedily."""

    def __init__(self, config: Caption, device: str):
        self.config, self.device = config, find_device(device)
        self.model = load_model(Blip2ForConditionalGeneration, config, self.device)
        self.processor = load_image_processor(config)
        self.tokenizer = load_part(AutoTokenizer, config)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Caption the batch's images."""
        pixels = self.processor([row_image(row) for row in batch], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.model.dtype)
        ids = self.model.generate(pixel_values=pixels, max_new_tokens=self.config.max_new_tokens, **GREEDY)
        if not self.model.config.text_config.is_encoder_decoder:
            # A decoder gives back what it was fed: the image's tokens and <s>.
            ids = ids[:, self.model.config.num_query_tokens + 1 :]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [row | {"caption": " ".join(text.split())} for row, text in zip(batch, texts, strict=True)]
