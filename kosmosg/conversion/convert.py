"""A released checkpoint → a model folder in diffusers' layout. All is checked before anything is written.

mllm/ tokenizer/                                    every checkpoint
aligner/                                            stage 2 and final
aligner_decoder/ text_encoder/                      stage 2
unet/ vae/ scheduler/ model_index.json              final, or with the decoder's
conversion.json README.md                           what was done; a model card
"""

from pathlib import Path
from typing import Any

import diffusers

from kosmosg.conversion.atomic import require_free, written
from kosmosg.conversion.checkpoint import Checkpoint
from kosmosg.conversion.clip import convert_clip, is_public_clip
from kosmosg.conversion.errors import ConversionError
from kosmosg.conversion.parts import PIPELINE, write_part
from kosmosg.conversion.plan import compare_decoder, find_tokenizer, plan_ours, plan_stable_diffusion
from kosmosg.conversion.record import RECORD, describe, model_card, write_json
from kosmosg.conversion.stable_diffusion import StableDiffusion
from kosmosg.conversion.weights import DTYPES

MODEL_INDEX = {
    "_class_name": "KosmosGPipeline",
    "_diffusers_version": diffusers.__version__,
    "mllm": ["kosmosg.models.mllm", "MLLM"],
    "aligner": ["kosmosg.models.aligner", "AlignerEncoder"],
    "tokenizer": ["kosmosg.tokenizer", "Tokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
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
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write `folder` and return what conversion.json records.

    Args:
        checkpoint: a released checkpoint; or the state dict of a public CLIP, whose image tower becomes a
            CLIPVisionModel folder.
        decoder: Stable Diffusion folder or hub id: configurations, noise schedule, and weights that are lacking.
        spm, dictionary: the released SentencePiece model and dictionary; by default those beside the checkpoint.
        dtype: float32, float16 or bfloat16; as in the checkpoint if not given.
        vision_heads, aligner_heads: by default width / 64.
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
    if is_public_clip(path):
        flags = {"--decoder": decoder, "--spm": spm, "--dict": dictionary, "--aligner-heads": aligner_heads}
        given = [flag for flag, value in flags.items() if value is not None]
        if given:
            raise ConversionError(
                f"'{path}' holds a public CLIP's weights, for which {', '.join(given)} means nothing."
            )
        return convert_clip(path, target, dtype, vision_heads)
    source = Checkpoint.read(path)
    source.require_whole(decoder is not None)
    if source.stage == "stage1" and decoder is not None:
        raise ConversionError(f"'{path}' is of stage 1, which has no AlignerNet to steer --decoder with; leave it out.")
    tokenizer = find_tokenizer(source, spm, dictionary)
    ids = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id}
    stable_diffusion = StableDiffusion.find(decoder)
    parts = plan_ours(source, ids, vision_heads, aligner_heads)
    parts |= plan_stable_diffusion(source, stable_diffusion, parts)
    scheduler = stable_diffusion.scheduler() if "unet" in parts else None
    record = {
        **describe(path, source.stage, source.header, parts, dtype),
        "left_out": source.left_out,
        "vocabulary": len(tokenizer),
        "decoder": compare_decoder(stable_diffusion, parts),
        "header": {"flavour": source.header.flavour, "values": source.header.values},
    }
    with written(target) as beside:
        for name, part in parts.items():
            write_part(beside / name, part.model, part.weights, DTYPES.get(str(dtype)))
        tokenizer.save_pretrained(beside / "tokenizer")
        if scheduler is not None:
            scheduler.save_pretrained(beside / "scheduler")
        record["pipeline"] = all((beside / name).is_dir() for name in PIPELINE)
        if record["pipeline"]:
            write_json(beside / "model_index.json", MODEL_INDEX)
        write_json(beside / RECORD, record)
        (beside / "README.md").write_text(model_card(record), encoding="utf-8")
    return record
