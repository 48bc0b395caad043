"""The constructor arguments of the parts, from the shapes of their tensors and the checkpoint's header.

Heads leave no trace in a shape. The language model's are in the header; the image tower's and AlignerNet's are in none
and follow from the width of one head, 64 in every released part, unless they are given.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.names import released_name
from kosmosg.conversion.weights import Shapes
from kosmosg.models.build import LAYER_NORM_EPS

HEAD_WIDTH = 64
RELEASED_DROPOUT = 0.1
RELEASED_ACTIVATION = "quick_gelu"  # of the image tower; OpenAI's CLIP
OUR_SECTION = "kosmosg"  # of a header: what `export` adds because the released headers have no place for it


@dataclass
class Header:
    """Settings of a checkpoint: `args`, flat, or `cfg`, nested; and how each size was decided."""

    flavour: str
    values: Mapping[str, Any]
    decided: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> "Header":
        """The header that a checkpoint has, empty if it has none."""
        for flavour in ("cfg", "args"):
            if isinstance(checkpoint.get(flavour), dict):
                return cls(flavour, checkpoint[flavour])
        return cls("cfg", {})

    def get(self, name: str, section: str = "model") -> Any:
        """A setting of the flat header, or of a section of the nested one; None where there is none."""
        nested = self.values.get(section)
        if isinstance(nested, Mapping) and name in nested:
            return nested[name]
        return None if section == OUR_SECTION else self.values.get(name)

    def language_model_heads(self) -> int:
        """`decoder_attention_heads`.

        Raises:
            ConversionError: the header has no such whole number.
        """
        heads = self.get("decoder_attention_heads")
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
            raise ConversionError(
                f"the checkpoint's header ('args' or 'cfg') has decoder_attention_heads={heads!r}; it must be a whole "
                "number of at least 1, for the language model's heads are known from there alone."
            )
        self.decided["mllm.heads"] = f"{heads}, from the header"
        return heads

    def heads(self, part: str, width: int, given: int | None, flag: str) -> int:
        """The flag, else what `export` noted, else width / 64.

        Raises:
            ConversionError: 64 does not divide the width, or the heads do not.
        """
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
    told = {
        "decoder_embed_dim": width,
        "decoder_layers": layers,
        "decoder_ffn_embed_dim": ffn_width,
        "latent_query_num": image_tokens,
    }
    wrong = [f"{key}={header.get(key)} but the tensors {size}" for key, size in told.items()
             if header.get(key) not in (None, size)]  # fmt: skip
    if wrong:
        raise ConversionError(f"the checkpoint's header is another model's: {'; '.join(wrong)}.")
    heads = header.language_model_heads()
    if width % heads:
        raise ConversionError(f"the header's decoder_attention_heads={heads} do not divide the width {width}.")
    clip = {name.removeprefix("vision.clip."): s for name, s in shapes.items() if name.startswith("vision.clip.")}
    return {
        "vocab_size": vocab_size,
        "width": width,
        "layers": layers,
        "heads": heads,
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


def aligner_sizes(shapes: Shapes, header: Header, heads: int | None) -> dict[str, Any]:
    """Arguments of `AlignerEncoder`, M."""
    width, input_width = shape(shapes, "aligner", "input_projection.weight")
    return {
        "input_width": input_width,
        "num_queries": shape(shapes, "aligner", "queries")[0],
        **half_sizes(shapes, header, heads, "aligner", width),
    }


def aligner_decoder_sizes(shapes: Shapes, header: Header, heads: int | None) -> dict[str, Any]:
    """Arguments of `AlignerDecoder`, N."""
    output_width, width = shape(shapes, "aligner_decoder", "output_projection.weight")
    return {"output_width": output_width, **half_sizes(shapes, header, heads, "aligner_decoder", width)}


def half_sizes(shapes: Shapes, header: Header, heads: int | None, part: str, width: int) -> dict[str, Any]:
    """Arguments that M and N share."""
    return {
        "width": width,
        "ffn_width": shape(shapes, part, "encoder.0.feed_forward.fc1.weight")[0],
        "heads": header.heads(part, width, heads, "--aligner-heads"),
        "encoder_layers": count(shapes, "encoder"),
        "decoder_layers": count(shapes, "decoder"),
        "max_positions": shape(shapes, part, "positions.weight")[0],
    }


def shape(shapes: Shapes, part: str, name: str) -> tuple[int, ...]:
    """The shape of a tensor without which a part's sizes are unknown.

    Raises:
        ConversionError: it is missing.
    """
    if name not in shapes:
        ours = ("mllm", f"vision.clip.{name}") if part == "vision" else (part, name)
        raise ConversionError(f"{part}: the checkpoint lacks '{released_name(*ours)}', which tells its sizes.")
    return shapes[name]


def count(shapes: Shapes, stack: str) -> int:
    """Layers of a stack, by the highest number; one left out is found when names are compared."""
    numbers = [int(match[1]) for name in shapes if (match := re.match(rf"{re.escape(stack)}\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1
