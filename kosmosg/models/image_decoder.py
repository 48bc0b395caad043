"""What the project knows of an image decoder: a small interface, and the table of its implementations.

As `from_pretrained` returns it, an image decoder is frozen and in eval mode; the gradient of its prediction reaches
the condition (eq. 9). It owns everything that differs between families: the condition it reads, how time is scaled, the
sign of its prediction, the scale and shift of its latents. Training, dry run, grids, pipeline and evaluation know this
interface alone, so another decoder is one class and one line in `kosmosg.models.build.IMAGE_DECODERS`.

Shapes: `B` batch, `H×W` image pixels, `c×h×w` latents, `Q` condition tokens, `C` condition width.
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
    """Base of the image decoders. Only the `parts` needed are loaded: its text side, its image side or all."""

    spec: ConditionSpec
    scheduler: Any
    title: ClassVar[str]
    """The family's name, for tables."""
    words_apart: ClassVar[bool] = True
    """Whether a caption's ids are those of its words, each tokenised alone, as CLIP's."""
    # By the names that diffusers' pipelines of the family have for them.
    networks: ClassVar[dict[str, Any]]
    """Classes of the image side: the denoiser, then the autoencoder. The constructor takes them, and `scheduler`."""
    text_models: ClassVar[dict[str, Any]]
    """Classes of the text models, `text_encoder` …; each has a tokenizer of its own, `tokenizer` …"""
    unneeded: ClassVar[dict[str, Any]] = {}
    """Arguments that build these pipelines without what is not used here, as a safety checker."""
    call_options: ClassVar[dict[str, Any]] = {}
    """Arguments of their calls, so that they draw the size that is asked for."""
    attention_argument: ClassVar[str] = "cross_attention_kwargs"
    """What their calls name the arguments of the attention layers."""

    @classmethod
    @abstractmethod
    def from_pretrained(
        cls, source: str | Path, parts: Parts = "all", torch_dtype: torch.dtype = torch.float32, **options: Any
    ) -> "ImageDecoder":
        """Read the parts from a diffusers folder or hub id; `options` go to diffusers."""

    @classmethod
    @abstractmethod
    def from_config(cls, source: str | Path, parts: Parts = "all") -> "ImageDecoder":
        """The same without weights, for dry runs, which call it under FakeTensorMode: networks then have shapes, but no
        memory. What needs values, as a scheduler's constructor may, is made inside `with_values()`.

        Raises:
            ValueError: a hub id whose sizes are not known here.
        """

    @classmethod
    @abstractmethod
    def read_scheduler(cls, source: str | Path) -> Any:
        """The scheduler of a diffusers folder or hub id: what the denoiser was trained with.

        Raises:
            ValueError: the family does not train with it.
        """

    @classmethod
    def text_parts(cls) -> tuple[str, ...]:
        """The text models and their tokenizers."""
        return (*cls.text_models, *(name.replace("text_encoder", "tokenizer") for name in cls.text_models))

    @classmethod
    def absent_parts(cls) -> dict[str, Any]:
        """What diffusers' pipelines of the family are given in place of parts that prompt embeddings make needless."""
        return {**dict.fromkeys(cls.text_parts()), **cls.unneeded}

    @classmethod
    def unconditional_of(cls, index: Mapping[str, Any]) -> Literal["prompt", "zeros"]:
        """`ConditionSpec.unconditional`, as a folder's model_index.json has it."""
        return "prompt"

    def freeze(self) -> Self:
        """No weight trains any more, and all modules are in eval mode."""
        return self.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode whatever the surrounding module does."""
        return super().train(False)

    # Text side: what stage 2 aligns with.
    @property
    @abstractmethod
    def has_text_model(self) -> bool:
        """Whether the text side is loaded."""

    def clean(self, text: str) -> str:
        """A caption as `tokenize` reads it."""
        return text

    @abstractmethod
    def tokenize(self, texts: Sequence[str], *, truncation: bool = True, clean: bool = True) -> Tensor:
        """Captions → ids B×T of the decoder's own text model.

        Args:
            truncation: cut captions that are too long.
            clean: apply `clean` to each caption first.

        Raises:
            ValueError: a caption is too long and `truncation` is False.
        """

    @abstractmethod
    def text_condition(self, text_ids: Tensor) -> Condition:
        """Ids B×T → what the decoder itself would read for these captions: t of eq. 5. No gradient."""

    # Image side: what stage 3 trains through.
    @abstractmethod
    def latent_shape(self, targets: Tensor) -> tuple[int, int, int]:
        """c×h×w of the latents of images or moments.

        Raises:
            ValueError: sides that the VAE cannot divide evenly.
        """

    @abstractmethod
    def moments(self, images: Tensor) -> Tensor:
        """Images B×3×H×W in [-1, 1] → what of them is cached: the parameters of the VAE's posterior. No gradient."""

    @abstractmethod
    def are_moments(self, targets: Tensor) -> bool:
        """Whether `targets` are moments rather than images."""

    @abstractmethod
    def latents(self, targets: Tensor, noise: Tensor) -> Tensor:
        """Images or moments of B images → scaled latents n·B×c×h×w, those of one image together. No gradient.

        Args:
            noise: the posterior's standard normal draw, n·B×c×h×w.
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents → images B×3×H×W, about -1 … 1. No gradient."""

    @abstractmethod
    def timesteps(self, uniform: Tensor) -> Tensor:
        """Draws B from [0, 1) → training timesteps, by the quantiles of the distribution the decoder trains with."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t, what the decoder is given at these timesteps (eq. 1)."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The decoder's prediction for z_t B×c×h×w, of the shape of `training_target`.

        Raises:
            ValueError: the condition is not of the decoder's form.
        """

    @abstractmethod
    def training_target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What `predict` should give: the noise for eq. 8."""

    def loss_weights(self, timesteps: Tensor, weighting: TimestepWeighting, snr_gamma: float | None = None) -> Tensor:
        """w(t) of eq. 8, B.

        Args:
            snr_gamma: γ of min-SNR-γ, in place of a `weighting`.

        Raises:
            ValueError: a weighting that the decoder does not have.
        """
        if snr_gamma is not None:
            raise ValueError(f"recipe.snr_gamma={snr_gamma} is not defined for {type(self).__name__}.")
        if weighting != "uniform":
            raise ValueError(f"recipe.timestep_weighting={weighting!r} is not defined for {type(self).__name__}.")
        return torch.ones(len(timesteps), device=timesteps.device)

    # Sampling, by diffusers' own pipeline of the family.
    @abstractmethod
    def image_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width in pixels of images to draw: as given, and for None what the decoder was trained on.

        Raises:
            ValueError: sides that the decoder cannot draw.
        """

    @abstractmethod
    def diffusers_pipeline(self) -> Any:
        """diffusers' pipeline over these networks, to be driven by `pipeline_arguments`."""

    @staticmethod
    @abstractmethod
    def pipeline_arguments(condition: Condition, unconditional: Condition) -> dict[str, Any]:
        """The conditions as keyword arguments of that pipeline, in the order of its `encode_prompt`."""

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network that predicts, a diffusers model."""

    @property
    @abstractmethod
    def autoencoder(self) -> Any:
        """The network whose latents it draws, a diffusers model: what cached latents depend on."""

    def drop_encoder(self) -> Self:
        """Without the part of the autoencoder that only encodes: targets must then be moments."""
        self.autoencoder.encoder = None
        return self

    def check(self, condition: Condition) -> None:
        """Refuse a condition of another form.

        Raises:
            ValueError: names what differs.
        """
        width = condition.states.shape[-1]
        if width != self.spec.width:
            raise ValueError(
                f"the condition is {width} wide but the image decoder reads {self.spec.width}: model.aligner.width "
                "must be the decoder's. Is it another image decoder than the model was aligned with?"
            )
        pooled = None if condition.pooled is None else condition.pooled.shape[-1]
        if (condition.mask is not None and not self.spec.masked) or pooled != self.spec.pooled:
            raise ValueError(
                f"the condition has mask {condition.mask is not None} and a pooled vector of width {pooled}; "
                f"{type(self).__name__} reads {self.spec.masked} and {self.spec.pooled}."
            )
