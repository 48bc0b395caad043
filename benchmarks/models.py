"""The project's own networks at a benchmark's size, with random weights from its seed."""

from dataclasses import replace

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from kosmosg.models.text_target import TextTarget
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.config import BenchmarkConfig
from kosmosg.conversion.stable_diffusion_v1_5 import SCHEDULER, TEXT_ENCODER, UNET, VAE
from kosmosg.models.aligner import AlignerDecoder, AlignerEncoder
from kosmosg.models.build import build_aligner, build_aligner_decoder, build_mllm
from kosmosg.models.image_decoder import ImageDecoder
from kosmosg.models.mllm import MLLM


class Vocabulary:
    """What building the MLLM asks of a tokenizer."""

    pad_id, bos_id = 1, 0
    first_word, image_id, image_end_id = 8, 6, 7

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


class Parts:
    """The networks, built when first asked for and then kept: all ways of doing the work share their weights."""

    def __init__(self, config: BenchmarkConfig):
        self.config, self.device = config, config.torch_device()

    def mllm(self) -> MLLM:
        # Dropout is off in every way: what is compared is arithmetic, and the losses must be equal.
        model = replace(self.config.model, vision_weights=None)
        model = replace(model, mllm=replace(model.mllm, dropout=0.0))
        return self._placed(lambda: build_mllm(model, Vocabulary(self.config.vocabulary)))  # type: ignore[arg-type]

    def aligner(self) -> AlignerEncoder:
        return self._placed(lambda: build_aligner(self.config.model))

    def aligner_decoder(self) -> AlignerDecoder:
        return self._placed(lambda: build_aligner_decoder(self.config.model))

    def text_target(self) -> TextTarget:
        text = CLIPTextConfig(**{**TEXT_ENCODER, **self.config.text_encoder})
        return TextTarget(self._placed(lambda: CLIPTextModel(text)), None)

    def unet(self) -> UNet2DConditionModel:
        return self._placed(lambda: UNet2DConditionModel.from_config({**UNET, **self.config.unet}))

    def vae(self) -> AutoencoderKL:
        return self._placed(lambda: AutoencoderKL.from_config({**VAE, **self.config.vae}))

    def image_decoder(self) -> ImageDecoder:
        return ImageDecoder(self.unet(), self.vae(), scheduler())

    def _placed(self, build) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            return build().to(self.device)


def scheduler() -> DDPMScheduler:
    """Stable Diffusion v1.5's noise schedule."""
    settings = {name: value for name, value in SCHEDULER.items() if not name.startswith("_")}
    kept = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    return DDPMScheduler(**{name: settings[name] for name in kept})
