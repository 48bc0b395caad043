"""Convert a released checkpoint to a model folder in diffusers' layout. Everything is checked before writing.

mllm/ tokenizer/                                    all checkpoints
aligner/                                            stage 2 and final
aligner_decoder/ text_encoder/                      stage 2
unet/ vae/ scheduler/ model_index.json pipeline.py  final, or with --decoder
conversion.json README.md                           record of the conversion, and model card

The vision encoder of OpenAI's CLIP (`ViT-L-14`, a state dict) becomes a CLIPVisionModel folder of transformers.
kosmos2.py converts Kosmos-2.
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
    """Convert a checkpoint to a model folder and return the content of conversion.json.

    Args:
        checkpoint: a released checkpoint; or the state dict of OpenAI's CLIP, whose vision encoder becomes a
            CLIPVisionModel folder; or a folder or hub id of Kosmos-2 in the format of transformers.
        folder: folder to write.
        decoder: Stable Diffusion folder or hub id for configurations, noise schedule and missing weights.
        spm, dictionary: the released SentencePiece model and dictionary; by default those beside the checkpoint.
        dtype: float32, float16 or bfloat16; by default the dtype of the checkpoint.
        vision_heads, aligner_heads: number of attention heads; by default width / 64.
        keep_grounding: keep Kosmos-2's grounding tokens.
        overwrite: replace an existing model folder.

    Raises:
        FileNotFoundError: a file is missing.
        ConversionError: a file is invalid, parts do not fit each other, or `folder` exists.
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
        require_unset(f"'{path}' is a folder or hub id, not a checkpoint", {**flags, "--vision-heads": vision_heads})
        return convert_kosmos2(checkpoint, target, dtype, keep_grounding)
    require_unset(f"'{path}' is a file, not a Kosmos-2", {"--keep-grounding": keep_grounding or None})
    if is_public_clip(data := read_data(path)):
        require_unset(f"'{path}' holds weights of CLIP", flags)
        return convert_clip(path, data, target, dtype, vision_heads)
    del data  # releases the memory mapping
    source = Checkpoint.read(path)
    source.require_whole(decoder is not None)
    if source.stage == "stage1" and decoder is not None:
        raise ConversionError(f"'{path}' is of stage 1 and has no AlignerNet, so --decoder is not allowed.")
    tokenizer = find_tokenizer(source, spm, dictionary)
    stable_diffusion = StableDiffusion.find(decoder)
    parts = plan_networks(source, {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id}, vision_heads, aligner_heads)
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
    """Convert the vision encoder of OpenAI's CLIP to a CLIPVisionModel folder for `model.vision_weights`."""

    def read() -> dict[str, Tensor]:
        return convert_public_vision(read_data(path))

    weights, header = Weights.of(path, read), Header("cfg", {})
    model = build("vision", vision_sizes(weights.shapes, header, heads))
    require_exact("vision", model, weights)
    record = describe([path], "clip", header, {"vision": PlannedPart(model, weights, "checkpoint")}, dtype)
    record["left_out"] = sorted(name for name in data if not name.startswith("visual.") or name == "visual.proj")
    with replaced(target) as temporary:
        write_part(temporary, model, weights, DTYPES.get(str(dtype)))
        write_json(temporary / RECORD, record)
    return record


def require_unset(reason: str, flags: Mapping[str, Any]) -> None:
    """Raise a ConversionError if a flag is given that does not apply to the source."""
    if given := [flag for flag, value in flags.items() if value is not None]:
        raise ConversionError(f"{reason}, so {', '.join(given)} does not apply.")


def is_public_clip(data: Any) -> bool:
    return isinstance(data, Mapping) and "model" not in data and any(str(name).startswith("visual.") for name in data)


def find_tokenizer(source: Checkpoint, spm: str | Path | None, dictionary: str | Path | None) -> Tokenizer:
    """Return the tokenizer of the checkpoint.

    Raises:
        ConversionError: a file is missing or invalid, or the number of ids is not that of the embedding.
    """
    files = {
        "--spm": Path(spm or source.path.with_name(SENTENCEPIECE_FILE)),
        "--dict": Path(dictionary or source.path.with_name(DICTIONARY_FILE)),
    }
    for flag, file in files.items():
        if not file.is_file():
            raise ConversionError(
                f"'{file}' does not exist. The conversion needs the model's SentencePiece model and dictionary: give "
                f"--spm and --dict, or put {SENTENCEPIECE_FILE} and {DICTIONARY_FILE} beside the checkpoint ({flag} is "
                "missing)."
            )
    try:
        tokenizer = Tokenizer(files["--spm"], files["--dict"])
    except (ValueError, OSError) as error:
        raise ConversionError(f"'{files['--spm']}' and '{files['--dict']}' are not a tokenizer: {error}") from error
    (vocabulary, _) = shape(source.parts["mllm"].shapes, "mllm", "decoder.embed_tokens.weight")
    if len(tokenizer) != vocabulary:
        raise ConversionError(
            f"'{files['--dict']}' gives {len(tokenizer)} ids but '{EMBEDDING}' has {vocabulary} rows: the dictionary "
            "belongs to another model."
        )
    return tokenizer


def plan_networks(
    source: Checkpoint, ids: Mapping[str, int], vision_heads: int | None, aligner_heads: int | None
) -> dict[str, PlannedPart]:
    """Build MLLM, M and N if the checkpoint has them, and check their weights.

    Raises:
        ConversionError: names and shapes do not fit the sizes derived from them.
    """
    header, planned = source.header, {}
    if aligner_heads is not None and "aligner" not in source.parts:
        raise ConversionError(f"'{source.path}' has no AlignerNet, so --aligner-heads does not apply.")
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
    """Build U-Net, VAE and text model, with weights of the checkpoint or else of `--decoder`.

    Raises:
        ConversionError: weights do not fit the configuration, or the width does not fit M.
    """
    needed = [part for part in ("unet", "vae") if part in source.parts or (decoder.folder and "aligner" in ours)]
    needed += [part for part in ("text_encoder",) if part in source.parts]
    planned = {}
    for name in needed:
        weights = source.parts.get(name) or decoder.weights(name)
        if weights is None:
            raise ConversionError(f"--decoder '{decoder.name}' has no weights in {name}/, which the checkpoint lacks.")
        try:
            model = build(name, decoder.config(name))
        except (TypeError, ValueError) as error:
            raise ConversionError(
                f"--decoder '{decoder.name}': no {name} can be built from its config: {error}"
            ) from error
        width = ours["aligner"].model.config.width
        key = {"unet": "cross_attention_dim", "text_encoder": "hidden_size"}.get(name)
        if key and (theirs := getattr(model.config, key)) != width:
            raise ConversionError(f"M's conditions are {width} wide but {name}'s {key} is {theirs}.{decoder.hint()}")
        require_exact(name, model, weights, decoder.hint())
        planned[name] = PlannedPart(model, weights, "checkpoint" if name in source.parts else "decoder")
    return planned


def compare_decoder(decoder: StableDiffusion, parts: Mapping[str, PlannedPart]) -> dict[str, Any] | None:
    """Compare the weights of Stable Diffusion in the checkpoint with those of `--decoder`; None if there are none."""
    compared = {}
    for name in (name for name in parts if name not in OURS):
        if parts[name].source == "decoder":
            compared[name] = "taken from it"
        else:
            theirs = decoder.weights(name)
            compared[name] = "not compared" if theirs is None else parts[name].weights.compare(theirs)
    return {"name": decoder.name or PUBLISHED, **compared} if compared else None
