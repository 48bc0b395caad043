"""Read a released checkpoint: its stage, header, weights by part, and the sizes of the parts.

Sizes follow from the shapes of tensors, except for attention heads: those of the language model are in the header,
those of the vision encoder and AlignerNet are not recorded. By default they are width / 64, as in all released models.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kosmosg.conversion.names import released_name, rename, require_tied
from kosmosg.conversion.reader import ConversionError, read_checkpoint
from kosmosg.conversion.weights import Shapes, Weights
from kosmosg.models.build import LAYER_NORM_EPS

STAGES = {"stage1": "stage 1", "stage2": "stage 2", "final": "final"}
HEAD_WIDTH = 64
RELEASED_DROPOUT = 0.1
RELEASED_ACTIVATION = "quick_gelu"  # activation of the vision encoder, OpenAI's CLIP
OUR_SECTION = "kosmosg"  # header section in which `export` stores what released headers do not contain
# Names of each part's tensors, for messages about missing parts.
PREFIXES = {
    "mllm": "gpt_model.*, img_model.*, img_connector.*",
    "aligner": "aligner.encoder_proj.*, aligner.encoder_query, aligner.encoder.*",
    "unet": "diffusion_unet.unet.*",
    "vae": "vae.vae.*",
}


@dataclass
class Header:
    """Settings of a checkpoint, flat (`args`) or nested (`cfg`), and how each undocumented size was decided."""

    flavour: str
    values: Mapping[str, Any]
    decided: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Header":
        """Return the header of a checkpoint, empty if it has none."""
        headers = ((name, checkpoint[name]) for name in ("cfg", "args") if isinstance(checkpoint.get(name), dict))
        return cls(*next(headers, ("cfg", {})))

    def get(self, name: str, section: str = "model") -> Any:
        """Return a setting of the flat header or of a section of the nested one, or None."""
        nested = self.values.get(section)
        if isinstance(nested, Mapping) and name in nested:
            return nested[name]
        return None if section == OUR_SECTION else self.values.get(name)

    def language_model_heads(self, width: int) -> int:
        """Return `decoder_attention_heads`. Raises ConversionError unless it is an integer that divides `width`."""
        heads = self.get("decoder_attention_heads")
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ConversionError(
                f"the checkpoint's header ('args' or 'cfg') has decoder_attention_heads={heads!r}; it must be an "
                "integer of at least 1, because nothing else tells the heads of the language model."
            )
        if width % heads:
            raise ConversionError(f"the header's decoder_attention_heads={heads} does not divide the width {width}.")
        self.decided["mllm.heads"] = f"{heads}, from the header"
        return heads

    def heads(self, part: str, width: int, given: int | None, flag: str) -> int:
        """Return the heads of the flag, else those stored by `export`, else width / 64. Raises ConversionError."""
        stored = self.get(f"{part}_heads", OUR_SECTION)
        if given is not None:
            heads, reason = given, f"from {flag}"
        elif stored is not None:
            heads, reason = int(stored), "from the header"
        elif width % HEAD_WIDTH == 0:
            heads, reason = width // HEAD_WIDTH, f"width {width} / {HEAD_WIDTH}"
        else:
            raise ConversionError(
                f"{part}: the header does not contain its heads, and its width {width} is not a multiple of "
                f"{HEAD_WIDTH}, the width of a head in the released model; give {flag}."
            )
        if heads < 1 or width % heads:
            raise ConversionError(f"{part}: {heads} heads ({reason}) do not divide its width {width}; give {flag}.")
        self.decided[f"{part}.heads"] = f"{heads}, {reason}"
        return heads

    def dropout(self) -> float:
        dropout = self.get("dropout")
        known = isinstance(dropout, (int, float))
        self.decided["mllm.dropout"] = f"{dropout}, from the header" if known else f"{RELEASED_DROPOUT}, the default"
        return float(dropout) if known else RELEASED_DROPOUT


@dataclass(frozen=True)
class Checkpoint:
    """The header of a released checkpoint, its weights by part, and the names of unneeded tensors."""

    path: Path
    header: Header
    parts: Mapping[str, Weights]
    left_out: list[str]

    @classmethod
    def read(cls, path: str | Path) -> "Checkpoint":
        """Read everything except the values of the weights.

        Raises:
            FileNotFoundError: the file does not exist.
            ConversionError: see `read_checkpoint` and `convert_state`.
        """
        path = Path(path)
        checkpoint = read_checkpoint(path)
        try:
            converted = rename(checkpoint["model"])
            require_tied(checkpoint["model"])
        except ConversionError as error:
            raise ConversionError(f"'{path}': {error}") from error
        parts = {part: Weights.of(path, partial(open_part, path, part)) for part in converted.parts}
        return cls(path, Header.of(checkpoint), parts, sorted(converted.unneeded))

    @property
    def stage(self) -> str:
        """stage1, stage2 or final."""
        return stage_of(self.parts)

    def require_whole(self, decoder: bool) -> None:
        """Check that the parts are those of one stage.

        Args:
            decoder: whether a missing U-Net or VAE is provided by `--decoder`.

        Raises:
            ConversionError: a part is missing, or parts of different stages are mixed.
        """
        needed = {"mllm"} if set(self.parts) == {"mllm"} else {"mllm", "aligner"}
        if not decoder and {"unet", "vae"} & set(self.parts):
            needed |= {"unet", "vae"}
        for part in sorted(needed - set(self.parts)):
            give = "; give --decoder, which has one" if part in ("unet", "vae") else ""
            raise ConversionError(
                f"'{self.path}' lacks the part {part} ({PREFIXES[part]}); it holds {', '.join(self.parts)}{give}."
            )
        if "aligner_decoder" in self.parts and {"unet", "vae"} & set(self.parts):
            raise ConversionError(
                f"'{self.path}' holds aligner_decoder, which stage 2 writes, and a U-Net or VAE, which stage 3 writes; "
                "no released checkpoint has both."
            )


def stage_of(parts: Mapping[str, object]) -> str:
    """Return the stage that writes these parts."""
    if "aligner_decoder" in parts:
        return "stage2"
    return "final" if "aligner" in parts else "stage1"


def open_part(path: Path, part: str) -> dict[str, Tensor]:
    """Memory-map the tensors of one part."""
    return rename(read_checkpoint(path)["model"]).parts[part]


def mllm_sizes(shapes: Shapes, header: Header, ids: Mapping[str, int], vision_heads: int | None) -> dict[str, Any]:
    """Return the arguments of `MLLM`.

    Args:
        ids: pad_id and bos_id of the tokenizer.

    Raises:
        ConversionError: a tensor is missing, the header contradicts the tensors, or the heads are unknown.
    """
    vocab_size, width = shape(shapes, "mllm", "decoder.embed_tokens.weight")
    layers = count(shapes, "decoder.layers")
    ffn_width, _ = shape(shapes, "mllm", "decoder.layers.0.feed_forward.fc1.weight")
    image_tokens, _ = shape(shapes, "mllm", "resampler.latents")
    sizes = {"decoder_embed_dim": width, "decoder_layers": layers, "decoder_ffn_embed_dim": ffn_width}
    sizes["latent_query_num"] = image_tokens
    if wrong := [key for key, size in sizes.items() if header.get(key) not in (None, size)]:
        different = "; ".join(f"{key}={header.get(key)} but the tensors have {sizes[key]}" for key in wrong)
        raise ConversionError(f"the checkpoint's header belongs to another model: {different}.")
    clip = {name.removeprefix("vision.clip."): s for name, s in shapes.items() if name.startswith("vision.clip.")}
    return {
        "vocab_size": vocab_size,
        "width": width,
        "layers": layers,
        "heads": header.language_model_heads(width),
        "ffn_width": ffn_width,
        "image_tokens": image_tokens,
        "vision_config": vision_sizes(clip, header, vision_heads),
        "dropout": header.dropout(),
        "xpos": False,
        **ids,
    }


def vision_sizes(shapes: Shapes, header: Header, heads: int | None) -> dict[str, Any]:
    """Return the fields of `transformers.CLIPVisionConfig`, as `kosmosg.models.build.vision_config` does."""
    width = shape(shapes, "vision", "embeddings.class_embedding")[0]
    patch = shape(shapes, "vision", "embeddings.patch_embedding.weight")[-1]
    rows = shape(shapes, "vision", "embeddings.position_embedding.weight")[0]
    side = math.isqrt(rows - 1)  # without the class token
    if side * side != rows - 1:
        raise ConversionError(f"the vision encoder has {rows} positions; allowed: 1 + a square number of patches.")
    return {
        "image_size": side * patch,
        "patch_size": patch,
        "hidden_size": width,
        "num_hidden_layers": count(shapes, "encoder.layers"),
        "num_attention_heads": header.heads("vision", width, heads, "--vision-heads"),
        "intermediate_size": shape(shapes, "vision", "encoder.layers.0.mlp.fc1.weight")[0],
        "hidden_act": RELEASED_ACTIVATION,
        "layer_norm_eps": LAYER_NORM_EPS,
    }


def aligner_sizes(part: str, shapes: Shapes, header: Header, heads: int | None) -> dict[str, Any]:
    """Return the arguments of `AlignerEncoder` (part aligner, M) or `AlignerDecoder` (part aligner_decoder, N)."""
    if part == "aligner":
        width, input_width = shape(shapes, part, "input_projection.weight")
        sizes = {"input_width": input_width, "num_queries": shape(shapes, part, "queries")[0]}
    else:
        output_width, width = shape(shapes, part, "output_projection.weight")
        sizes = {"output_width": output_width}
    return {
        **sizes,
        "width": width,
        "ffn_width": shape(shapes, part, "encoder.0.feed_forward.fc1.weight")[0],
        "heads": header.heads(part, width, heads, "--aligner-heads"),
        "encoder_layers": count(shapes, "encoder"),
        "decoder_layers": count(shapes, "decoder"),
        "max_positions": shape(shapes, part, "positions.weight")[0],
    }


def shape(shapes: Shapes, part: str, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor that determines sizes. Raises ConversionError if it is missing."""
    if name not in shapes:
        ours = ("mllm", f"vision.clip.{name}") if part == "vision" else (part, name)
        raise ConversionError(f"{part}: the checkpoint lacks '{released_name(*ours)}', which determines its sizes.")
    return shapes[name]


def count(shapes: Shapes, stack: str) -> int:
    """Return the number of layers of a stack, by the highest index; `require_exact` finds missing layers."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
