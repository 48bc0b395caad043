"""The schema of `configs/model/*.yaml`: all sizes of the model, and where its pretrained parts lie."""

from dataclasses import dataclass, field
from typing import Literal

from omegaconf import MISSING

from kosmosg.image_processing import ImageFit

ACTIVATIONS = ("quick_gelu", "gelu")


def require_positive(config: object, section: str, *names: str, least: int = 1) -> None:
    """Refuse sizes below `least`, by key."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise ValueError(f"{section}.{name}={value} is not allowed; it must be at least {least}.")


def require_heads(section: str, width: int, heads: int) -> None:
    """Refuse heads that do not divide the width, by key."""
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
    """What is done to an image of a prompt that is not square: crop its middle, or pad it with white."""
    resampler_gain: float = 1.0
    """Factor on the initial weights of the resampler's input projection. The image tokens have length 1, so that with 1
    (the released code) they enter about √(3 · vision.width) times smaller than the latents beside them."""
    dropout: float = 0.1
    """On embeddings, after each attention and feed-forward, on the resampler's attention weights."""
    xpos: bool = False
    """Rotate and decay queries and keys; the released model does not."""
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
    """linear: one linear map at every position in AlignerNet's place; of the sizes it has width and num_queries."""
    width: int = 768
    """Width of the condition, C: what the U-Net's cross-attention reads."""
    heads: int = 12
    """Attention heads."""
    ffn_width: int = 3072
    """Width of the feed-forward."""
    encoder_layers: int = 12
    """Encoder layers of M; 0 leaves its decoder alone."""
    decoder_layers: int = 12
    """Decoder layers of M."""
    num_queries: int = 77
    """Length of the condition, Q: what the CLIP text model gives."""
    max_positions: int = 32768
    """Rows of the position table; prompts have two tokens fewer at most."""
    pooled_width: int | None = None
    """Width of a pooled vector beside the condition, where the image decoder reads one, as SDXL; not for linear."""

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
    """Encoder layers of N, which come after its decoder; 0 leaves its decoder alone."""
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
    """Folder with sentencepiece.bpe.model and dict.txt; a language_model has its own."""
    image_size: int = 512
    """Side of the target images and of generated ones, in pixels."""
    mllm: MLLMConfig = field(default_factory=MLLMConfig)
    """The multimodal language model."""
    language_model: str | None = None
    """Folder or hub id of a vision-language model of transformers, which takes the MLLM's place; null for none."""
    hidden_layer: int = -1
    """Which of its `hidden_states` the aligner reads: -1 for the last, 0 for the embeddings."""
    max_image_pixels: int | None = None
    """Larger images of a prompt are made smaller before its processor prepares them; null for its own limit."""
    aligner: AlignerConfig = field(default_factory=AlignerConfig)
    """M of AlignerNet."""
    aligner_decoder: AlignerDecoderConfig = field(default_factory=AlignerDecoderConfig)
    """N of AlignerNet, stage 2 only."""
    image_decoder: str = MISSING
    """Stable Diffusion folder or hub id."""
    vision_weights: str | None = None
    """CLIP folder or hub id whose vision encoder stage 1 starts from; null for random weights."""

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
