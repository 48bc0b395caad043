"""Stable Diffusion XL as an image decoder (Podell et al. 2023, arXiv 2307.01952).

Notable: the U-Net reads the concatenated penultimate states of two CLIP text models, the pooled vector of the second,
and six numbers: original height and width, top and left of the crop, target height and width. Training and sampling
both use the numbers of an uncropped image of the target size. The null condition is zeros unless the folder says
otherwise.

Shapes: `B` batch, `Q` condition tokens (77), `C` condition width (768 + 1280), `P` width of the pooled vector (1280).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from kosmosg.condition import Condition, ConditionSpec
from kosmosg.models.image_decoder import Parts
from kosmosg.models.published import decoder_configs
from kosmosg.models.stable_diffusion import StableDiffusion

SIZE_NUMBERS = 6


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL behind the interface of `ImageDecoder`; see `StableDiffusion`.

    Raises:
        ValueError: as `StableDiffusion`, or the two tokenizers have different vocabularies.
    """

    title = "Stable Diffusion XL"
    text_models: ClassVar = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    pipeline_options: ClassVar = {"add_watermarker": False}
    embedding = "text_time"

    def __init__(self, *, text_encoder_2: Any = None, tokenizer_2: CLIPTokenizer | None = None, **networks: Any):
        super().__init__(**networks)
        self.text_encoder_2, self.tokenizer_2 = text_encoder_2, tokenizer_2
        if self.unet is None:
            width = self.text_encoder.config.hidden_size + text_encoder_2.config.hidden_size
            pooled = text_encoder_2.config.projection_dim
        else:
            config = self.unet.config
            width = config.cross_attention_dim
            pooled = config.projection_class_embeddings_input_dim - SIZE_NUMBERS * config.addition_time_embed_dim
        self.spec = ConditionSpec(self.spec.tokens, width, pooled=pooled, unconditional="zeros")
        self.end_id: Any = 0
        self.pad_id: Any = 0
        if tokenizer_2 is not None:
            if tokenizer_2.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError("tokenizer and tokenizer_2 of the image decoder have different vocabularies.")
            self.end_id, self.pad_id = self.tokenizer.eos_token_id, tokenizer_2.pad_token_id

    @classmethod
    def from_pretrained(
        cls, source: str | Path, parts: Parts = "all", torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "StableDiffusionXL":
        decoder = super().from_pretrained(source, parts, torch_dtype, **options)
        return decoder.with_index(StableDiffusionXLPipeline.load_config(str(source)))  # type: ignore[attr-defined]

    @classmethod
    def from_config(cls, source: str | Path, parts: Parts = "all") -> "StableDiffusionXL":
        decoder = super().from_config(source, parts)
        return decoder.with_index(decoder_configs(source, ("model_index",))["model_index"])  # type: ignore[attr-defined]

    @classmethod
    def unconditional_of(cls, index: Mapping[str, Any]) -> Literal["prompt", "zeros"]:
        default = "zeros" if index.get("force_zeros_for_empty_prompt", True) else "prompt"
        return index.get("unconditional", default)  # folders of KosmosGPipeline have this key

    def with_index(self, index: Any) -> "StableDiffusionXL":
        """Set the null condition from model_index.json."""
        self.spec = replace(self.spec, unconditional=self.unconditional_of(index))
        return self

    @torch.no_grad()
    def text_condition(self, text_ids: Tensor) -> Condition:
        """Return both models' penultimate states and the pooled vector of the second."""
        padding = (text_ids == self.end_id).cumsum(1).cumsum(1) > 1  # the second tokenizer has another padding token
        first = self.text_encoder(input_ids=text_ids, output_hidden_states=True)
        second = self.text_encoder_2(input_ids=text_ids.masked_fill(padding, self.pad_id), output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return Condition(states, pooled=second.text_embeds)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode as the parent class, without autocast: in float16 the activations of this VAE overflow."""
        with torch.autocast(images.device.type, enabled=False):
            return super().moments(images)

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.check(condition)
        assert condition.pooled is not None
        dtype = self.unet.dtype
        height, width = (side * self.downscale for side in noisy.shape[-2:])
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=dtype, device=noisy.device)
        return self.unet(
            noisy.to(dtype),
            timesteps,
            encoder_hidden_states=condition.states.to(dtype),
            added_cond_kwargs={"text_embeds": condition.pooled.to(dtype), "time_ids": time_ids.expand(len(noisy), -1)},
        ).sample

    def diffusers_pipeline(self) -> Any:
        scheduler: Any = DDPMScheduler.from_config(self.scheduler.config)  # replaced at each call
        return StableDiffusionXLPipeline(unet=self.unet, vae=self.vae, scheduler=scheduler, **self.absent_parts())

    @staticmethod
    def pipeline_arguments(condition: Condition, unconditional: Condition) -> dict[str, Any]:
        return {
            "prompt_embeds": condition.states,
            "negative_prompt_embeds": unconditional.states,
            "pooled_prompt_embeds": condition.pooled,
            "negative_pooled_prompt_embeds": unconditional.pooled,
        }
