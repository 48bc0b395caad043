"""ImageDecoder: the interface of the frozen diffusion model that draws an image for a condition.

`from_pretrained` returns it frozen and in eval mode; gradients of its prediction reach the condition (eq. 9). A class
defines everything that differs between families: the format of the condition, the scaling of time, the prediction
target, and scale and shift of the latents. All other code uses this interface, so a new family is one class and one
line in `kosmosg.models.build.IMAGE_DECODERS`.

Shapes: `B` batch, `H×W` image pixels, `c×h×w` latents, `Q` condition tokens, `C` condition width, `T` caption tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily as with_values

from kosmosg.condition import Condition, ConditionSpec
from kosmosg.losses import TimestepWeighting

Parts = Literal["all", "text", "images"]
__all__ = ["ImageDecoder", "Parts", "with_values"]


class ImageDecoder(nn.Module):
    """Base class of image decoders. `parts` selects what is loaded: the text models, the image networks or all."""

    spec: ConditionSpec
    scheduler: Any
    title: ClassVar[str]
    """Name of the family, for tables."""
    tokenizes_words: ClassVar[bool] = True
    """Whether the ids of a caption are those of its words, each tokenised alone, as with CLIP."""
    # Keys are component names in the family's diffusers pipelines.
    networks: ClassVar[dict[str, Any]]
    """Classes of the denoiser and the autoencoder, in this order; arguments of the constructor beside `scheduler`."""
    text_models: ClassVar[dict[str, Any]]
    """Classes of the text models, `text_encoder` …; each has its own tokenizer, `tokenizer` …"""
    pipeline_options: ClassVar[dict[str, Any]] = {}
    """Constructor arguments of the diffusers pipeline that disable components such as the safety checker."""
    call_options: ClassVar[dict[str, Any]] = {}
    """Call arguments of the diffusers pipeline, for example to draw exactly the requested size."""
    attention_argument: ClassVar[str] = "cross_attention_kwargs"
    """Name of the call argument with the options of the attention layers."""

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, source: str | Path, parts: Parts = "all", torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "ImageDecoder":
        """Load the parts from a diffusers folder or hub id; `options` are passed to diffusers."""

    @classmethod
    @abstractmethod
    def from_config(cls, source: str | Path, parts: Parts = "all") -> "ImageDecoder":
        """Build the parts without weights, for dry runs.

        Dry runs call it under FakeTensorMode, where networks have shapes but no memory. Wrap code that needs real
        values, such as a scheduler's constructor, in `with_values()`.

        Raises:
            ValueError: the configuration of the hub id is not among `kosmosg.models.published`.
        """

    @classmethod
    @abstractmethod
    def read_scheduler(cls, source: str | Path) -> Any:
        """Load the scheduler that the denoiser was trained with from a diffusers folder or hub id.

        Raises:
            ValueError: the family does not support this scheduler.
        """

    @classmethod
    def text_parts(cls) -> tuple[str, ...]:
        """Return the component names of the text models and their tokenizers."""
        return (*cls.text_models, *(name.replace("text_encoder", "tokenizer") for name in cls.text_models))

    @classmethod
    def absent_parts(cls) -> dict[str, Any]:
        """Return constructor arguments of a diffusers pipeline that reads prompt embeddings and has no text models."""
        return {**dict.fromkeys(cls.text_parts()), **cls.pipeline_options}

    @classmethod
    def unconditional_of(cls, index: Mapping[str, Any]) -> Literal["prompt", "zeros"]:
        """Return `ConditionSpec.unconditional` as set in model_index.json."""
        return "prompt"

    def freeze(self) -> Self:
        """Disable gradients of all weights and switch to eval mode."""
        return self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also if a parent module is set to training mode."""
        return super().train(False)

    # Text models: the alignment target of stage 2.
    @property
    @abstractmethod
    def has_text_model(self) -> bool:
        """Whether the text models are loaded."""

    def clean(self, text: str) -> str:
        """Normalise a caption for `tokenize`."""
        return text

    @abstractmethod
    def tokenize(self, texts: Sequence[str], *, truncation: bool = True, clean: bool = True) -> Tensor:
        """Tokenise captions for the decoder's own text model, B×T.

        Args:
            truncation: cut captions that are too long.
            clean: apply `clean` to each caption first.

        Raises:
            ValueError: a caption is too long and `truncation` is False.
        """

    @abstractmethod
    def text_condition(self, text_ids: Tensor) -> Condition:
        """Return the text models' condition for caption ids B×T: t of eq. 5. No gradient."""

    # Image networks: stage 3 trains through them.
    @abstractmethod
    def latent_shape(self, targets: Tensor) -> tuple[int, int, int]:
        """Return c×h×w of the latents of images or moments.

        Raises:
            ValueError: the sides are not multiples of the VAE's downscaling factor.
        """

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """Encode images B×3×H×W in [-1, 1] as the parameters of the VAE's posterior, which are cached. No gradient."""

    @abstractmethod
    def are_moments(self, targets: Tensor) -> bool:
        """Whether `targets` are moments rather than images."""

    @abstractmethod
    def latents(self, targets: Tensor, noise: Tensor) -> Tensor:
        """Sample n scaled latents n·B×c×h×w for each of B images or moments; those of one image are adjacent.

        No gradient.

        Args:
            noise: standard normal draw of the posterior, n·B×c×h×w.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents B×c×h×w to images B×3×H×W, about -1 … 1. No gradient."""

    @abstractmethod
    def timesteps(self, uniform: Tensor) -> Tensor:
        """Map uniform draws B in [0, 1) to timesteps, by quantiles of the decoder's training distribution."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return z_t, the noisy latents at these timesteps (eq. 1)."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Return the prediction for z_t B×c×h×w, in the shape of `training_target`.

        Raises:
            ValueError: the condition does not match `spec`.
        """

    @abstractmethod
    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of `predict`: for eq. 8 the noise ε."""

    def loss_weights(self, timesteps: Tensor, weighting: TimestepWeighting, snr_gamma: float | None = None) -> Tensor:
        """Return w(t) of eq. 8, B.

        Args:
            snr_gamma: γ of min-SNR-γ, instead of a `weighting`.

        Raises:
            ValueError: the decoder does not support the weighting.
        """
        if snr_gamma is not None:
            raise ValueError(f"recipe.snr_gamma={snr_gamma} is not defined for {type(self).__name__}.")
        if weighting != "uniform":
            raise ValueError(f"recipe.timestep_weighting={weighting!r} is not defined for {type(self).__name__}.")
        return torch.ones(len(timesteps), device=timesteps.device)

    # Sampling, by the family's diffusers pipeline.
    @abstractmethod
    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return height and width in pixels; None stands for the size that the decoder was trained on.

        Raises:
            ValueError: the decoder cannot draw this size.
        """

    @abstractmethod
    def diffusers_pipeline(self) -> Any:
        """Build a diffusers pipeline with these networks, to be called with `pipeline_arguments`."""

    @staticmethod
    @abstractmethod
    def pipeline_arguments(condition: Condition, unconditional: Condition) -> dict[str, Any]:
        """Convert conditions to keyword arguments of that pipeline, in the order of its `encode_prompt`."""

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The U-Net or transformer, a diffusers model."""

    @property
    @abstractmethod
    def autoencoder(self) -> Any:
        """The VAE, a diffusers model; cached latents depend on it."""

    def drop_encoder(self) -> Self:
        """Delete the autoencoder's encoder to save memory; targets must then be moments."""
        self.autoencoder.encoder = None
        return self

    def check(self, condition: Condition) -> None:
        """Check that a condition matches `spec`.

        Raises:
            ValueError: width, mask or pooled vector differ.
        """
        width = condition.states.shape[-1]
        if width != self.spec.width:
            raise ValueError(
                f"the condition is {width} wide but the image decoder reads {self.spec.width}. Use the image decoder "
                "that the model was aligned with, or set model.aligner.width to the decoder's width."
            )
        pooled = None if condition.pooled is None else condition.pooled.shape[-1]
        if (condition.mask is not None and not self.spec.masked) or pooled != self.spec.pooled:
            raise ValueError(
                f"the condition has mask {condition.mask is not None} and a pooled vector of width {pooled}; "
                f"{type(self).__name__} reads {self.spec.masked} and {self.spec.pooled}."
            )
