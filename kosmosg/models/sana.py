"""Sana as an image decoder (Xie et al. 2024, arXiv 2410.10629): linear-attention transformer, DC-AE and Gemma 2.

Notable: flow matching, z_σ = (1 − σ) z_0 + σ ε, with the prediction target ε − z_0. The timestep is σ times the number
of timesteps, shifted towards noise as set in the scheduler's configuration. The autoencoder is deterministic, so no
latents are sampled. The condition has a mask; the null condition is that of the unconditional prompt. As in diffusers'
pipeline, Gemma reads an instruction before each non-empty caption, and the denoiser its first state and the last 299.

Shapes: `B` batch, `H×W` image pixels, `c×h×w` latents, `Q` condition tokens (300), `C` condition width (2304).
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor
from transformers import AutoTokenizer, Gemma2Config, Gemma2Model

from kosmosg.condition import Condition, ConditionSpec
from kosmosg.models.image_decoder import ImageDecoder, Parts, with_values
from kosmosg.models.published import decoder_configs
from kosmosg.models.storage import load_network

TOKENS = 300
INSTRUCTION = "\n".join(inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default)
SCHEDULERS = ("DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler")


class Sana(ImageDecoder):
    """Sana behind the interface of `ImageDecoder`. Components may be None if no method needs them."""

    title = "Sana"
    tokenizes_words = False
    networks: ClassVar = {"transformer": SanaTransformer2DModel, "vae": AutoencoderDC}
    text_models: ClassVar = {"text_encoder": Gemma2Model}
    # Otherwise diffusers draws at the nearest size of the published training and resizes the image.
    call_options: ClassVar = {"use_resolution_binning": False}
    attention_argument = "attention_kwargs"

    def __init__(
        self,
        transformer: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.transformer, self.vae, self.scheduler = transformer, vae, scheduler
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        if tokenizer is not None:
            tokenizer.padding_side = "right"
        width = text_encoder.config.hidden_size if transformer is None else transformer.config.caption_channels
        self.spec = ConditionSpec(TOKENS, width, masked=True)

    @classmethod
    def from_pretrained(
        cls, source: str | Path, parts: Parts = "all", torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "Sana":
        networks: dict[str, Any] = {}
        options = {"dtype": torch_dtype, **options}
        if parts != "text":
            networks = {name: load_network(kind, source, name, **options) for name, kind in cls.networks.items()}
            networks["scheduler"] = cls.read_scheduler(source)
        if parts != "images":
            networks["text_encoder"] = load_network(Gemma2Model, source, "text_encoder", dtype=torch_dtype)
            networks["tokenizer"] = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
        return cls(**networks).freeze()

    @classmethod
    def read_scheduler(cls, source: str | Path) -> Any:
        return flow_scheduler(DPMSOLVER.load_config(source, subfolder="scheduler"))

    @classmethod
    def from_config(cls, source: str | Path, parts: Parts = "all") -> "Sana":
        configs = decoder_configs(source, (*cls.networks, "scheduler", "text_encoder"))
        networks: dict[str, Any] = {}
        if parts != "text":
            networks = {name: kind.from_config(configs[name]) for name, kind in cls.networks.items()}
            with with_values(), torch.device("cpu"):
                networks["scheduler"] = flow_scheduler(configs["scheduler"])
        if parts != "images":
            networks["text_encoder"] = Gemma2Model(Gemma2Config(**configs["text_encoder"]))
        return cls(**networks).freeze()

    @property
    def has_text_model(self) -> bool:
        return self.text_encoder is not None

    def clean(self, text: str) -> str:
        return text.lower().strip()

    def tokenize(self, texts: Sequence[str], *, truncation: bool = True, clean: bool = True) -> Tensor:
        """Tokenise captions, each after the instruction."""
        length = len(self.tokenizer.encode(INSTRUCTION)) + TOKENS - 2
        if clean:
            texts = [self.clean(text) for text in texts]
        prompts = [INSTRUCTION + text if text else text for text in texts]
        ids = self.tokenizer(prompts, padding="max_length", truncation=truncation, max_length=length).input_ids
        for text, row in zip(texts, ids, strict=True):
            if len(row) > length:
                raise ValueError(
                    f"the caption {text!r} and the instruction have {len(row)} tokens; allowed: at most {length}."
                )
        return torch.tensor(ids)

    @torch.no_grad()
    def text_condition(self, text_ids: Tensor) -> Condition:
        """Return Gemma's last hidden states after the final norm, with a mask of their tokens."""
        mask = text_ids != (0 if self.tokenizer is None else self.tokenizer.pad_token_id)
        length, is_dry_run = text_ids.shape[1], type(text_ids) is not Tensor  # tensors of a dry run have no values
        # About half of all positions are padding after the longest caption, where the states are masked: skip them.
        longest = length if is_dry_run else max(1, int(mask.any(dim=0).sum()))
        states = self.text_encoder(text_ids[:, :longest], attention_mask=mask[:, :longest].long()).last_hidden_state
        index = torch.tensor([0, *range(length + 1 - TOKENS, length)], device=mask.device)
        return Condition(states[:, index.clamp(max=longest - 1)], mask[:, index])

    @property
    def downscale(self) -> int:
        """H / h."""
        return 2 ** (len(self.vae.config.encoder_block_out_channels) - 1)

    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        trained = self.transformer.config.sample_size * self.downscale
        sides = trained if height is None else height, trained if width is None else width
        if any(side < 1 or side % self.multiple for side in sides):
            raise ValueError(
                f"height={height} and width={width} are not allowed; allowed: positive multiples of {self.multiple}."
            )
        return sides

    @property
    def multiple(self) -> int:
        """Image sides must be multiples of this number of pixels, for the autoencoder and for diffusers' pipeline."""
        return max(32, self.downscale)

    def latent_shape(self, targets: Tensor) -> tuple[int, int, int]:
        factor = 1 if self.are_moments(targets) else self.downscale
        height, width = targets.shape[-2:]
        if height % factor or width % factor:
            raise ValueError(
                f"target images are {(height, width)} but the autoencoder needs sides that are multiples of {factor}."
            )
        return self.vae.config.latent_channels, height // factor, width // factor

    def are_moments(self, targets: Tensor) -> bool:
        return targets.shape[1] == self.vae.config.latent_channels

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Return the unscaled latents B×c×h×w, because the autoencoder has no posterior."""
        self.latent_shape(images)
        return self.vae.encode(images.to(self.vae.dtype)).latent

    @torch.no_grad()
    def latents(self, targets: Tensor, noise: Tensor) -> Tensor:
        latents = targets if self.are_moments(targets) else self.moments(targets)
        return latents.repeat_interleave(len(noise) // len(targets), 0) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample

    def timesteps(self, uniform: Tensor) -> Tensor:
        """Return N·σ with σ = s u / (1 + (s − 1) u) for the scheduler's shift s and N timesteps; float32."""
        config = self.scheduler.config
        shift = config.get("flow_shift", config.get("shift", 1.0))
        return (config.num_train_timesteps * shift * uniform / (1 + (shift - 1) * uniform)).float()

    def sigmas(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        """Return σ of each timestep, B×1×1×1."""
        return (timesteps / self.scheduler.config.num_train_timesteps).to(latents.dtype)[:, None, None, None]

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        sigmas = self.sigmas(timesteps, latents)
        return (1 - sigmas) * latents + sigmas * noise

    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return ε − z_0."""
        return noise - latents

    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        self.check(condition)
        states, mask, _ = condition.with_mask()
        network, dtype = self.transformer, self.transformer.dtype
        prediction = network(
            noisy.to(dtype),
            encoder_hidden_states=states.to(dtype),
            encoder_attention_mask=mask,
            timestep=timesteps * network.config.timestep_scale,
            return_dict=False,
        )[0].float()
        # Networks that also predict a variance return it in further channels.
        return prediction[:, : network.config.in_channels]

    def diffusers_pipeline(self) -> Any:
        scheduler = type(self.scheduler).from_config(self.scheduler.config)  # replaced at each call
        return SanaPipeline(transformer=self.transformer, vae=self.vae, scheduler=scheduler, **self.absent_parts())

    @staticmethod
    def pipeline_arguments(condition: Condition, unconditional: Condition) -> dict[str, Any]:
        condition, unconditional = condition.with_mask(), unconditional.with_mask()
        return {
            "prompt_embeds": condition.states,
            "prompt_attention_mask": condition.mask,
            "negative_prompt_embeds": unconditional.states,
            "negative_prompt_attention_mask": unconditional.mask,
            "negative_prompt": None,  # the default "" cannot be combined with embeddings
        }

    @property
    def autoencoder(self) -> AutoencoderDC:
        return self.vae

    @property
    def denoiser(self) -> SanaTransformer2DModel:
        return self.transformer


DPMSOLVER: Any = diffusers.DPMSolverMultistepScheduler


def flow_scheduler(config: Any) -> Any:
    """Build the scheduler of a scheduler_config.json.

    Raises:
        ValueError: the scheduler is not for flow matching.
    """
    name = config.get("_class_name")
    flow = name == SCHEDULERS[1] or (config.get("use_flow_sigmas") and config["prediction_type"] == "flow_prediction")
    if name not in SCHEDULERS or not flow:
        raise ValueError(
            f"the image decoder's scheduler is a {name} with use_flow_sigmas={config.get('use_flow_sigmas')} and "
            f"prediction_type={config.get('prediction_type')!r}; allowed for Sana: {SCHEDULERS[1]}, or {SCHEDULERS[0]} "
            "with True and 'flow_prediction'."
        )
    return getattr(diffusers, name).from_config(config)
