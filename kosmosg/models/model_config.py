"""Schema of `configs/model/*.yaml`: sizes of the model and sources of its pretrained parts."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from kosmosg.image_processing import ImageFit

ACTIVATIONS = ("quick_gelu", "gelu")


def require_positive(config: object, section: str, *names: str, least: int = 1) -> None:
    """Raise a ValueError that names the key of a size below `least`."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{section}.{name}={value} is not allowed; it must be at least {least}.")


def require_heads(section: str, width: int, heads: int) -> None:
    """Raise a ValueError if the heads do not divide the width."""
    if width % heads:
        raise ValueError(f"{section}.heads={heads} does not divide {section}.width={width}.")


@dataclass
class VisionConfig:
    image_size: int = 224
    """Side of the square images in a prompt, in pixels."""
    patch_size: int = 14
    """Side of a patch, in pixels."""
    width: int = 1024
    """Width of the image tokens."""
    layers: int = 24
    """Transformer blocks."""
    heads: int = 16
    """Attention heads."""
    ffn_width: int = 4096
    """Width of the feed-forward."""
    activation: str = "quick_gelu"
    """quick_gelu (OpenAI's CLIP) or gelu."""

    def __post_init__(self) -> None:
        section = "model.mllm.vision"
        require_positive(self, section, "image_size", "patch_size", "width", "layers", "heads", "ffn_width")
        require_heads(section, self.width, self.heads)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"{section}.image_size={self.image_size} is not a multiple of patch_size={self.patch_size}."
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"{section}.activation={self.activation!r} is unknown; allowed: {', '.join(ACTIVATIONS)}.")


@dataclass
class MLLMConfig:
    width: int = 2048
    """Width of the hidden states, D."""
    layers: int = 24
    """Decoder layers."""
    heads: int = 32
    """Attention heads of the decoder and of the resampler."""
    ffn_width: int = 8192
    """Width of the feed-forward."""
    image_tokens: int = 64
    """Image tokens of one image in the prompt, K."""
    image_fit: ImageFit = "crop"
    """How images of a prompt are made square: crop the centre, or pad with white."""
    resampler_gain: float = 1.0
    """Factor on the initial weights of the resampler's input projection. With 1, as in the released code, the projected
    image tokens, which have unit length, are about √(3 · vision.width) times smaller than the resampler's latents."""
    dropout: float = 0.1
    """Dropout on embeddings, after each attention and feed-forward, and on the resampler's attention weights."""
    xpos: bool = False
    """Use xPos position encodings; the released model does not."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision encoder."""

    def __post_init__(self) -> None:
        require_positive(self, "model.mllm", "width", "layers", "heads", "ffn_width", "image_tokens")
        require_heads("model.mllm", self.width, self.heads)
        if not self.resampler_gain > 0:
            raise ValueError(f"model.mllm.resampler_gain={self.resampler_gain} is not allowed; it must be above 0.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.mllm.dropout={self.dropout} is not allowed; it must be in [0, 1).")


@dataclass
class AlignerConfig:
    kind: Literal["alignernet", "linear"] = "alignernet"
    """linear: a linear map at each position instead of AlignerNet; it uses only width and num_queries."""
    width: int = 768
    """Width of the condition, C: that of the image decoder's cross-attention."""
    heads: int = 12
    """Attention heads."""
    ffn_width: int = 3072
    """Width of the feed-forward."""
    encoder_layers: int = 12
    """Encoder layers of M; 0 for a decoder only."""
    decoder_layers: int = 12
    """Decoder layers of M."""
    num_queries: int = 77
    """Length of the condition, Q: that of the image decoder's text condition."""
    max_positions: int = 32768
    """Rows of the position table; the longest prompt has two tokens fewer."""
    pooled_width: int | None = None
    """Width of the pooled vector for image decoders that read one, such as SDXL; not supported by linear."""

    def __post_init__(self) -> None:
        section = "model.aligner"
        require_positive(self, section, "width", "heads", "ffn_width", "decoder_layers", "num_queries", "max_positions")
        require_positive(self, section, "encoder_layers", least=0)
        require_heads(section, self.width, self.heads)
        if self.pooled_width is not None:
            require_positive(self, section, "pooled_width")
            if self.kind == "linear":
                raise ValueError(f"{section}.pooled_width={self.pooled_width} is not allowed for kind=linear.")


@dataclass
class AlignerDecoderConfig:
    heads: int = 12
    """Attention heads; the width is the aligner's."""
    ffn_width: int = 3072
    """Width of the feed-forward."""
    encoder_layers: int = 12
    """Encoder layers of N, which follow its decoder; 0 for a decoder only."""
    decoder_layers: int = 12
    """Decoder layers of N."""
    max_positions: int = 32768
    """Rows of the query table and of the position table."""

    def __post_init__(self) -> None:
        section = "model.aligner_decoder"
        require_positive(self, section, "heads", "ffn_width", "decoder_layers", "max_positions")
        require_positive(self, section, "encoder_layers", least=0)


@dataclass
class ModelConfig:
    tokenizer: str = MISSING
    """Folder with sentencepiece.bpe.model and dict.txt; not used with language_model, which has its own."""
    image_size: int = 512
    """Side of target images and generated images, in pixels."""
    mllm: MLLMConfig = field(default_factory=MLLMConfig)
    """The multimodal language model."""
    language_model: str | None = None
    """Folder or hub id of a vision-language model of transformers that replaces the MLLM; null for none."""
    hidden_layer: int = -1
    """Index of the `hidden_states` of language_model that the aligner reads: -1 for the last, 0 for the embeddings."""
    max_image_pixels: int | None = None
    """Maximum area of a prompt's images with language_model; larger ones are resized; null for its own limit."""
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    """M of AlignerNet."""
    aligner_decoder: AlignerDecoderConfig = field(default_factory=AlignerDecoderConfig)
    """N of AlignerNet, stage 2 only."""
    image_decoder: str = MISSING
    """Folder or hub id of a diffusers pipeline: Stable Diffusion 1.x, 2.x, XL or Sana."""
    vision_weights: str | None = None
    """CLIP folder or hub id that initialises the vision encoder in stage 1; null for random weights."""

    def __post_init__(self) -> None:
        require_positive(self, "model", "image_size")
        if self.max_image_pixels is not None:
            require_positive(self, "model", "max_image_pixels")
        if self.language_model is None and (self.hidden_layer, self.max_image_pixels) != (-1, None):
            raise ValueError(
                f"model.hidden_layer={self.hidden_layer} and model.max_image_pixels={self.max_image_pixels} are not "
                "allowed without model.language_model; allowed: -1 and null."
            )
        if self.aligner.width % self.aligner_decoder.heads:
            raise ValueError(
                f"model.aligner_decoder.heads={self.aligner_decoder.heads} does not divide "
                f"model.aligner.width={self.aligner.width}."
            )
