"""A released checkpoint → a model folder in diffusers' layout. All is checked before anything is written.

mllm/ tokenizer/                                    every checkpoint
aligner/                                            stage 2 and final
aligner_decoder/ text_encoder/                      stage 2
unet/ vae/ scheduler/ model_index.json pipeline.py  final, or with the decoder's
conversion.json README.md                           what was done; a model card

The image tower of a public CLIP (`ViT-L-14`, a plain state dict) becomes a folder of transformers' CLIPVisionModel;
a Kosmos-2 folder, a model folder after stage 1 (kosmos2.py).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from torch import Tensor

from kosmosg.conversion.checkpoint import Checkpoint, Header, aligner_sizes, mllm_sizes, shape, vision_sizes
from kosmosg.conversion.kosmos2 import convert_kosmos2, is_kosmos2
from kosmosg.conversion.names import EMBEDDING, convert_public_vision
from kosmosg.conversion.parts import OURS, PIPELINE, RECORD, build, require_exact, require_free, write_part
from kosmosg.conversion.reader import ConversionError, read_data
from kosmosg.conversion.record import PUBLISHED, PlannedPart, describe, model_card
from kosmosg.conversion.stable_diffusion import StableDiffusion
from kosmosg.conversion.weights import DTYPES, Weights
from kosmosg.files import replaced, write_json, write_text
from kosmosg.pipeline import write_index
from kosmosg.tokenizer import DICTIONARY_FILE, SENTENCEPIECE_FILE, Tokenizer

MODEL_INDEX = {
    "_diffusers_version": diffusers.__version__,
    "mllm": ["kosmosg.models.mllm", "MLLM"],
    "aligner": ["kosmosg.models.aligner", "AlignerEncoder"],
    "tokenizer": ["kosmosg.tokenizer", "Tokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "transformer": [None, None],
    "family": "StableDiffusionPipeline",
    "unconditional": "prompt",
}


def convert_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    decoder: str | Path | None = None,
    spm: str | Path | None = None,
    dictionary: str | Path | None = None,
    dtype: str | None = None,
    vision_heads: int | None = None,
    aligner_heads: int | None = None,
    keep_grounding: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `folder` and return what conversion.json records.

    Args:
        checkpoint: a released checkpoint; or the state dict of a public CLIP, whose image tower becomes a
            CLIPVisionModel folder; or a folder or hub id of a Kosmos-2 in transformers' format.
        decoder: Stable Diffusion folder or hub id: configurations, noise schedule, and weights that are lacking.
        spm, dictionary: the released SentencePiece model and dictionary; by default those beside the checkpoint.
        dtype: float32, float16 or bfloat16; as in the checkpoint if not given.
        vision_heads, aligner_heads: by default width / 64.
        keep_grounding: keep Kosmos-2's grounding tokens.
        overwrite: replace a model folder.

    Raises:
        FileNotFoundError: a file is missing.
        ConversionError: a file that is not what it should be, parts that do not fit, or `folder` exists.
    """
    path, target = Path(checkpoint), Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}.")
    if target.is_file():
        raise ConversionError(f"'{target}' is a file; name the folder to write.")
    inputs = [path, *(Path(given) for given in (decoder, spm, dictionary) if given is not None)]
    require_free(target, overwrite, inputs)
    flags = {"--decoder": decoder, "--spm": spm, "--dict": dictionary, "--aligner-heads": aligner_heads}
    if is_kosmos2(checkpoint):
        require_unset(
            f"'{path}' is no checkpoint file but a folder or hub id", {**flags, "--vision-heads": vision_heads}
        )
        return convert_kosmos2(checkpoint, target, dtype, keep_grounding)
    require_unset(f"'{path}' is a file and no Kosmos-2", {"--keep-grounding": keep_grounding or None})
    if is_public_clip(data := read_data(path)):
        require_unset(f"'{path}' holds a public CLIP's weights", flags)
        return convert_clip(path, data, target, dtype, vision_heads)
    del data  # and its mapping
    source = Checkpoint.read(path)
    source.require_whole(decoder is not None)
    if source.stage == "stage1" and decoder is not None:
        raise ConversionError(f"'{path}' is of stage 1, which has no AlignerNet to steer --decoder with; leave it out.")
    tokenizer = find_tokenizer(source, spm, dictionary)
    stable_diffusion = StableDiffusion.find(decoder)
    parts = plan_ours(source, {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id}, vision_heads, aligner_heads)
    parts |= plan_stable_diffusion(source, stable_diffusion, parts)
    scheduler = stable_diffusion.scheduler() if "unet" in parts else None
    record = {
        **describe([path], source.stage, source.header, parts, dtype),
        "left_out": source.left_out,
        "vocabulary": len(tokenizer),
        "decoder": compare_decoder(stable_diffusion, parts),
        "header": {"flavour": source.header.flavour, "values": source.header.values},
        "pipeline": {*PIPELINE} <= {*parts, "tokenizer", "scheduler"},
    }
    with replaced(target) as temporary:
        for name, part in parts.items():
            write_part(temporary / name, part.model, part.weights, DTYPES.get(str(dtype)))
        tokenizer.save_pretrained(temporary / "tokenizer")
        if scheduler is not None:
            scheduler.save_pretrained(temporary / "scheduler")
        if record["pipeline"]:
            write_index(temporary, MODEL_INDEX)
        write_json(temporary / RECORD, record)
        write_text(temporary / "README.md", model_card(record))
    return record


def convert_clip(path: Path, data: Mapping, target: Path, dtype: str | None, heads: int | None) -> dict[str, Any]:
    """A public CLIP's image tower → a CLIPVisionModel folder, which `model.vision_weights` may name."""

    def tower() -> dict[str, Tensor]:
        return convert_public_vision(read_data(path))

    weights, header = Weights.of(path, tower), Header("cfg", {})
    model = build("vision", vision_sizes(weights.shapes, header, heads))
    require_exact("vision", model, weights)
    record = describe([path], "clip", header, {"vision": PlannedPart(model, weights, "checkpoint")}, dtype)
    record["left_out"] = sorted(name for name in data if not name.startswith("visual.") or name == "visual.proj")
    with replaced(target) as temporary:
        write_part(temporary, model, weights, DTYPES.get(str(dtype)))
        write_json(temporary / RECORD, record)
    return record


def require_unset(what: str, flags: Mapping[str, Any]) -> None:
    """Raises ConversionError: a flag is given that means nothing for the source."""
    if given := [flag for flag, value in flags.items() if value is not None]:
        raise ConversionError(f"{what}, for which {', '.join(given)} means nothing.")


def is_public_clip(data: Any) -> bool:
    return isinstance(data, Mapping) and "model" not in data and any(str(name).startswith("visual.") for name in data)


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
    except (ValueError, OSError) as error:
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
    header, planned = source.header, {}
    if aligner_heads is not None and "aligner" not in source.parts:
        raise ConversionError(f"'{source.path}' has no AlignerNet, for which --aligner-heads means nothing.")
    for name in filter(source.parts.__contains__, OURS):
        weights = source.parts[name]
        try:
            if name == "mllm":
                sizes = mllm_sizes(weights.shapes, header, ids, vision_heads)
            else:
                sizes = aligner_sizes(name, weights.shapes, header, aligner_heads)
        except ConversionError as error:
            raise ConversionError(f"'{source.path}': {error}") from error
        model = build(name, sizes)
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
        width = ours["aligner"].model.config.width
        key = {"unet": "cross_attention_dim", "text_encoder": "hidden_size"}.get(name)
        if key and (theirs := getattr(model.config, key)) != width:
            raise ConversionError(f"M's conditions are {width} wide but {name}'s {key} is {theirs}.{decoder.hint()}")
        require_exact(name, model, weights, decoder.hint())
        planned[name] = PlannedPart(model, weights, "checkpoint" if name in source.parts else "decoder")
    return planned


def compare_decoder(decoder: StableDiffusion, parts: Mapping[str, PlannedPart]) -> dict[str, Any] | None:
    """Whether the checkpoint's own weights are the decoder's, by part; None where there is nothing of a decoder."""
    compared = {}
    for name in (name for name in parts if name not in OURS):
        if parts[name].source == "decoder":
            compared[name] = "taken from it"
        else:
            theirs = decoder.weights(name)
            compared[name] = "not compared" if theirs is None else parts[name].weights.compare(theirs)
    return {"name": decoder.name or PUBLISHED, **compared} if compared else None
