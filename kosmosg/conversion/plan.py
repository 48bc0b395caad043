"""What goes into the folder, and whether it fits: nothing here writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from kosmosg.conversion.checkpoint import Checkpoint
from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.names import EMBEDDING
from kosmosg.conversion.parts import OURS, build, require_exact
from kosmosg.conversion.sizes import aligner_decoder_sizes, aligner_sizes, mllm_sizes, shape
from kosmosg.conversion.stable_diffusion import StableDiffusion
from kosmosg.conversion.weights import Weights
from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE, Tokenizer

PUBLISHED = "published configurations of Stable Diffusion v1.5"


@dataclass(frozen=True)
class PlannedPart:
    """A part that fits: the module without values, the weights, and where they come from."""

    model: nn.Module
    weights: Weights
    source: str


def find_tokenizer(source: Checkpoint, spm: str | Path | None, dictionary: str | Path | None) -> Tokenizer:
    """The tokenizer whose ids the checkpoint's embedding is indexed by.

    Raises:
        ConversionError: a file was neither given nor found, is no tokenizer's, or has another number of ids.
    """
    files = {
        "--spm": Path(spm or source.path.with_name(SENTENCEPIECE_FILE)),
        "--dict": Path(dictionary or source.path.with_name(DICTIONARY_FILE)),
    }
    for flag, file in files.items():
        if not file.is_file():
            raise ConversionError(
                f"'{file}' does not exist. The model's ids mean nothing without its SentencePiece model and "
                f"dictionary: give --spm and --dict, or put {SENTENCEPIECE_FILE} and {DICTIONARY_FILE} beside the "
                f"checkpoint ({flag} is missing)."
            )
    try:
        tokenizer = Tokenizer(files["--spm"], files["--dict"])
    except (ValueError, RuntimeError, OSError) as error:  # sentencepiece tells a file of another kind as any of these
        raise ConversionError(f"'{files['--spm']}' and '{files['--dict']}' are no tokenizer: {error}") from error
    (vocabulary, _) = shape(source.parts["mllm"].shapes, "mllm", "decoder.embed_tokens.weight")
    if len(tokenizer) != vocabulary:
        raise ConversionError(
            f"'{files['--dict']}' gives {len(tokenizer)} ids but '{EMBEDDING}' has {vocabulary} rows: it is another "
            "model's dictionary."
        )
    return tokenizer


def plan_ours(
    source: Checkpoint, ids: Mapping[str, int], vision_heads: int | None, aligner_heads: int | None
) -> dict[str, PlannedPart]:
    """MLLM, M and N, as far as the checkpoint has them.

    Raises:
        ConversionError: names and shapes are not those of the sizes that they tell.
    """
    header = source.header
    sizes = {
        "mllm": lambda shapes: mllm_sizes(shapes, header, ids, vision_heads),
        "aligner": lambda shapes: aligner_sizes(shapes, header, aligner_heads),
        "aligner_decoder": lambda shapes: aligner_decoder_sizes(shapes, header, aligner_heads),
    }
    if aligner_heads is not None and "aligner" not in source.parts:
        raise ConversionError(f"'{source.path}' has no AlignerNet, for which --aligner-heads means nothing.")
    planned = {}
    for name in OURS:
        if name in source.parts:
            weights = source.parts[name]
            try:
                model = build(name, sizes[name](weights.shapes))
            except ConversionError as error:
                raise ConversionError(f"'{source.path}': {error}") from error
            require_exact(name, model, weights)
            planned[name] = PlannedPart(model, weights, "checkpoint")
    width = planned["mllm"].model.config.width
    for name, side in (("aligner", "input_width"), ("aligner_decoder", "output_width")):
        if name in planned and planned[name].model.config[side] != width:
            raise ConversionError(
                f"'{source.path}': {name} is made for states {planned[name].model.config[side]} wide but the MLLM's "
                f"are {width}."
            )
    return planned


def plan_stable_diffusion(
    source: Checkpoint, decoder: StableDiffusion, ours: Mapping[str, PlannedPart]
) -> dict[str, PlannedPart]:
    """U-Net, VAE and text model: the checkpoint's own weights, else the decoder's.

    Raises:
        ConversionError: weights and configuration do not fit each other, or M's width is another.
    """
    wanted = [part for part in ("unet", "vae") if part in source.parts or (decoder.folder and "aligner" in ours)]
    wanted += [part for part in ("text_encoder",) if part in source.parts]
    planned = {}
    for name in wanted:
        weights = source.parts.get(name) or decoder.weights(name)
        if weights is None:
            raise ConversionError(f"--decoder '{decoder.name}' has no weights in {name}/, which the checkpoint lacks.")
        try:
            model = build(name, decoder.config(name))
        except (TypeError, ValueError) as error:
            raise ConversionError(
                f"--decoder '{decoder.name}': no {name} can be built of its config: {error}"
            ) from error
        require_width(name, model, ours["aligner"].model.config.width, decoder)
        require_exact(name, model, weights, decoder.hint())
        planned[name] = PlannedPart(model, weights, "checkpoint" if name in source.parts else "decoder")
    return planned


def require_width(name: str, model: nn.Module, width: int, decoder: StableDiffusion) -> None:
    """Refuse a U-Net or text model of another condition width than M's."""
    key = {"unet": "cross_attention_dim", "text_encoder": "hidden_size"}.get(name)
    theirs = getattr(model.config, key) if key else width
    if theirs != width:
        raise ConversionError(f"M's conditions are {width} wide but {name}'s {key} is {theirs}.{decoder.hint()}")


def compare_decoder(decoder: StableDiffusion, parts: Mapping[str, PlannedPart]) -> dict[str, Any] | None:
    """Whether the checkpoint's own weights are the decoder's, by part; None where there is nothing of a decoder."""
    compared = {}
    for name, part in parts.items():
        if name in OURS:
            continue
        theirs = None if part.source == "decoder" else decoder.weights(name)
        compared[name] = "taken from it" if part.source == "decoder" else "not compared"
        if theirs is not None:
            compared[name] = part.weights.compare(theirs)
    name = decoder.name or PUBLISHED
    return {"name": name, **compared} if compared else None
