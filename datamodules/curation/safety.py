"""Unsafe images are left out (paper section 3.1 filters inappropriate content)."""

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import AutoConfig, AutoModelForImageClassification

from datamodules.curation.models import find_device, load_image_processor, load_model, load_part
from datamodules.curation.rows import Batch, drop, row_image
from datamodules.curation.stage_config import Safety
from datamodules.errors import DataError


class SafetyFilter:
    """Drops images that Stable Diffusion's safety checker or a classifier calls unsafe (`unsafe_image`)."""

    def __init__(self, config: Safety, device: str):
        self.config, self.device = config, find_device(device)
        architectures = load_part(AutoConfig, config).architectures or []
        self.is_checker = StableDiffusionSafetyChecker.__name__ in architectures
        kind = StableDiffusionSafetyChecker if self.is_checker else AutoModelForImageClassification
        self.model = load_model(kind, config, self.device)
        self.processor = load_image_processor(config)
        self.blocked = [] if self.is_checker else self._blocked_classes()

    def _blocked_classes(self) -> list[int]:
        names = {name.lower(): number for number, name in self.model.config.id2label.items()}
        unknown = [label for label in self.config.blocked_labels if label.lower() not in names]
        if unknown or not self.config.blocked_labels:
            raise DataError(
                f"safety.blocked_labels={self.config.blocked_labels} must be labels of '{self.config.model}', which "
                f"has {', '.join(names)}."
            )
        return [names[label.lower()] for label in self.config.blocked_labels]

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Batch:
        """Keep the safe images."""
        pixels = self.processor([row_image(row) for row in batch], return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.device, self.model.dtype)
        if self.is_checker:
            # It also blackens images; those it is given here are nobody's.
            _, unsafe = self.model(clip_input=pixels, images=[np.zeros(1) for _ in batch])
            details = [f"'{self.config.model}'" for _ in batch]
        else:
            shares = self.model(pixel_values=pixels).logits.float().softmax(-1)[:, self.blocked].sum(-1).tolist()
            unsafe = [share >= self.config.threshold for share in shares]
            details = [f"'{self.config.model}' {share:.3f}" for share in shares]
        rows = zip(batch, unsafe, details, strict=True)
        return [drop(row, "unsafe_image", detail) if bad else row for row, bad, detail in rows]
