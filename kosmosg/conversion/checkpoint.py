"""A released checkpoint: which stage wrote it, its header, its parts' weights, and the sizes of the parts.

Sizes are read from the shapes of the tensors. Heads leave no trace in a shape: the language model's are in the header,
the image tower's and AlignerNet's in none; these are the width / 64, as in every released part, unless they are given.
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
RELEASED_ACTIVATION = "quick_gelu"  # of the image tower; OpenAI's CLIP
OUR_SECTION = "kosmosg"  # of a header: what `export` adds because the released headers have no place for it
# Names under which a part that is missing would be found.
PREFIXES = {
    "mllm": "gpt_model.*, img_model.*, img_connector.*",
    "aligner": "aligner.encoder_proj.*, aligner.encoder_query, aligner.encoder.*",
    "unet": "diffusion_unet.unet.*",
    "vae": "vae.vae.*",
}


@dataclass
class Header:
    """Settings of a checkpoint: `args`, flat, or `cfg`, nested; and how each size was decided."""

    flavour: str
    values: Mapping[str, Any]
    decided: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Header":
        """The header that a checkpoint has, empty if it has none."""
        found = ((name, checkpoint[name]) for name in ("cfg", "args") if isinstance(checkpoint.get(name), dict))
        return cls(*next(found, ("cfg", {})))

    def get(self, name: str, section: str = "model") -> Any:
        """A setting of the flat header, or of a section of the nested one; None where there is none."""
        nested = self.values.get(section)
        if isinstance(nested, Mapping) and name in nested:
            return nested[name]
        return None if section == OUR_SECTION else self.values.get(name)

    def language_model_heads(self, width: int) -> int:
        """`decoder_attention_heads`. Raises ConversionError: no whole number that divides `width`."""
        heads = self.get("decoder_attention_heads")
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ConversionError(
                f"the checkpoint's header ('args' or 'cfg') has decoder_attention_heads={heads!r}; it must be a whole "
                "number of at least 1, for the language model's heads are known from there alone."
            )
        if width % heads:
            raise ConversionError(f"the header's decoder_attention_heads={heads} do not divide the width {width}.")
        self.decided["mllm.heads"] = f"{heads}, from the header"
        return heads

    def heads(self, part: str, width: int, given: int | None, flag: str) -> int:
        """The flag, else what `export` noted, else width / 64. Raises ConversionError: they do not divide the width."""
        noted = self.get(f"{part}_heads", OUR_SECTION)
        if given is not None:
            heads, reason = given, f"from {flag}"
        elif noted is not None:
            heads, reason = int(noted), "from the header"
        elif width % HEAD_WIDTH == 0:
            heads, reason = width // HEAD_WIDTH, f"width {width} / {HEAD_WIDTH}"
        else:
            raise ConversionError(
                f"{part}: its heads are in no header, and its width {width} is no multiple of {HEAD_WIDTH}, the width "
                f"of one head in the released model; give {flag}."
            )
        if heads < 1 or width % heads:
            raise ConversionError(f"{part}: {heads} heads ({reason}) do not divide its width {width}; give {flag}.")
        self.decided[f"{part}.heads"] = f"{heads}, {reason}"
        return heads

    def dropout(self) -> float:
        dropout = self.get("dropout")
        known = isinstance(dropout, (int, float))
        self.decided["mllm.dropout"] = f"{dropout}, from the header" if known else f"{RELEASED_DROPOUT}, not told"
        return float(dropout) if known else RELEASED_DROPOUT


@dataclass(frozen=True)
class Checkpoint:
    """Weights by part, and names that are known and not needed."""

    path: Path
    header: Header
    parts: Mapping[str, Weights]
    left_out: list[str]

    @classmethod
    def read(cls, path: str | Path) -> "Checkpoint":
        """Learn everything but the values.

        Raises:
            FileNotFoundError: no such file.
            ConversionError: see `read_checkpoint`, `convert_state`.
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
        """Refuse parts that no stage writes together.

        Args:
            decoder: whether a U-Net or VAE that is missing comes from elsewhere.

        Raises:
            ConversionError: names the part that is missing.
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
    """The stage after which a model has `parts`."""
    if "aligner_decoder" in parts:
        return "stage2"
    return "final" if "aligner" in parts else "stage1"


def open_part(path: Path, part: str) -> dict[str, Tensor]:
    """One part's tensors, mapped anew."""
    return rename(read_checkpoint(path)["model"]).parts[part]


def mllm_sizes(shapes: Shapes, header: Header, ids: Mapping[str, int], vision_heads: int | None) -> dict[str, Any]:
    """Arguments of `MLLM`.

    Args:
        ids: pad_id and bos_id of the tokenizer.

    Raises:
        ConversionError: a tensor that tells a size is missing, the header tells other sizes, heads are not known.
    """
    vocab_size, width = shape(shapes, "mllm", "decoder.embed_tokens.weight")
    layers = count(shapes, "decoder.layers")
    ffn_width, _ = shape(shapes, "mllm", "decoder.layers.0.feed_forward.fc1.weight")
    image_tokens, _ = shape(shapes, "mllm", "resampler.latents")
    told = {"decoder_embed_dim": width, "decoder_layers": layers, "decoder_ffn_embed_dim": ffn_width}
    told["latent_query_num"] = image_tokens
    if wrong := [key for key, size in told.items() if header.get(key) not in (None, size)]:
        different = "; ".join(f"{key}={header.get(key)} but the tensors {told[key]}" for key in wrong)
        raise ConversionError(f"the checkpoint's header is another model's: {different}.")
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
    """Fields of `transformers.CLIPVisionConfig`, as `kosmosg.models.build.vision_config` gives them."""
    width = shape(shapes, "vision", "embeddings.class_embedding")[0]
    patch = shape(shapes, "vision", "embeddings.patch_embedding.weight")[-1]
    rows = shape(shapes, "vision", "embeddings.position_embedding.weight")[0]
    side = math.isqrt(rows - 1)  # the first row is the class token's
    if side * side != rows - 1:
        raise ConversionError(f"the image tower has {rows} positions, which are not 1 and the patches of a square.")
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
    """Arguments of `AlignerEncoder`, M (part aligner), or `AlignerDecoder`, N (aligner_decoder)."""
    if part == "aligner":
        width, input_width = shape(shapes, part, "input_projection.weight")
        own = {"input_width": input_width, "num_queries": shape(shapes, part, "queries")[0]}
    else:
        output_width, width = shape(shapes, part, "output_projection.weight")
        own = {"output_width": output_width}
    return {
        **own,
        "width": width,
        "ffn_width": shape(shapes, part, "encoder.0.feed_forward.fc1.weight")[0],
        "heads": header.heads(part, width, heads, "--aligner-heads"),
        "encoder_layers": count(shapes, "encoder"),
        "decoder_layers": count(shapes, "decoder"),
        "max_positions": shape(shapes, part, "positions.weight")[0],
    }


def shape(shapes: Shapes, part: str, name: str) -> tuple[int, ...]:
    """The shape of a tensor without which a part's sizes are unknown. Raises ConversionError: it is missing."""
    if name not in shapes:
        ours = ("mllm", f"vision.clip.{name}") if part == "vision" else (part, name)
        raise ConversionError(f"{part}: the checkpoint lacks '{released_name(*ours)}', which tells its sizes.")
    return shapes[name]


def count(shapes: Shapes, stack: str) -> int:
    """Layers of a stack, by the highest number; one left out is found when names are compared."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
