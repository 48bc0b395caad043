"""The systems of the tables that make images: Stable Diffusion from text, KOSMOS-G before and after stage 3."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from evaluation.generation import Batch, Generate, System
from evaluation.protocol import Sampling
from evaluation.provenance import hash_json
from evaluation.requests import EvaluationError
from evaluation.resizing import truncated
from evaluation.weights import IMAGE_PARTS, TEXT_PARTS, hash_parts, stable_diffusion_folder
from kosmosg.acceleration import Acceleration, accelerate
from kosmosg.config import RUN_CONFIG
from kosmosg.models.storage import CONFIG_FILE, find_model
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.prompt import parse_prompt
from kosmosg.sampling import DiffusionSampler, seeded

REAL_IMAGES = "Real images"
COPY_OF_INPUT = "Copy of the input"
STABLE_DIFFUSION = "Stable Diffusion (text)"
BEFORE_STAGE_3 = "KOSMOS-G before stage 3"
AFTER_STAGE_3 = "KOSMOS-G after stage 3"
TABLE_ORDER = (REAL_IMAGES, COPY_OF_INPUT, STABLE_DIFFUSION, BEFORE_STAGE_3, AFTER_STAGE_3)
MODEL_PARTS = ("mllm", "aligner", "tokenizer")
STAGES = {BEFORE_STAGE_3: "alignment", AFTER_STAGE_3: "instruction_tuning"}


def stable_diffusion_system(weights: str, device: torch.device, acceleration: Acceleration | None = None) -> System:
    """Stable Diffusion as it is, on the prompt with the class word.

    Args:
        weights: a Stable Diffusion folder or hub id.
    """
    folder = stable_diffusion_folder(weights)

    def load() -> Generate:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            dtype=torch.float32,  # whatever precision the files are stored in
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).to(device)
        pipeline.set_progress_bar_config(disable=True)
        accelerate(pipeline.unet, pipeline.vae, acceleration or Acceleration())
        sampler = DiffusionSampler(pipeline.unet, pipeline.vae, pipeline.scheduler)

        def generate(batch: Batch, sampling: Sampling) -> list[Image.Image]:
            pipeline.scheduler = sampler.scheduler(sampling.sampler)
            images = pipeline(
                batch.prompts,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.image_size,
                width=sampling.image_size,
                generator=seeded(batch.seeds, len(batch.seeds), None, None),
                output_type=output_type(sampling),
                return_dict=False,
            )[0]
            return as_bytes(images)

        return generate

    return System(STABLE_DIFFUSION, load, hash_parts(folder, TEXT_PARTS + IMAGE_PARTS), reads_images=False)


def kosmosg_system(
    name: str, folder: str, image_decoder: str, device: torch.device, acceleration: Acceleration | None = None
) -> System:
    """KOSMOS-G, fed the interleaved prompt.

    Args:
        name: BEFORE_STAGE_3 or AFTER_STAGE_3.
        folder: a model folder, or the run folder of the stage that the name says.
        image_decoder: the Stable Diffusion folder or hub id that it was aligned with.

    Raises:
        FileNotFoundError: there is no finished model.
        EvaluationError: a run of another stage, or a model that was aligned with another Stable Diffusion.
    """
    require_stage(name, Path(folder))
    model, decoder = find_model(folder), stable_diffusion_folder(image_decoder)
    require_fit(name, model, decoder)

    def load() -> Generate:
        pipeline = KosmosGPipeline.from_pretrained(model, image_decoder=decoder).to(device)
        accelerate(pipeline.unet, pipeline.vae, acceleration or Acceleration())

        def generate(batch: Batch, sampling: Sampling) -> list[Image.Image]:
            images = pipeline.sampler(
                unique_conditions(pipeline, batch),
                pipeline.null_condition,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                sampler=sampling.sampler,
                seeds=batch.seeds,
                height=sampling.image_size,
                width=sampling.image_size,
                output_type=output_type(sampling),
            )
            return as_bytes(images)

        return generate

    return System(
        name, load, hash_json([hash_parts(model, MODEL_PARTS), hash_parts(decoder, IMAGE_PARTS)]), reads_images=True
    )


def output_type(sampling: Sampling) -> Literal["np", "pil"]:
    """Floats where the protocol scores what was in memory; else what diffusers would save, whose bytes are rounded."""
    return "np" if sampling.storage == "memory" else "pil"


def as_bytes(images: list[Image.Image] | np.ndarray) -> list[Image.Image]:
    """What a pipeline gave; floats B×H×W×3 in [0, 1] are truncated."""
    return [truncated(image) for image in images] if isinstance(images, np.ndarray) else images


def unique_conditions(pipeline: KosmosGPipeline, batch: Batch) -> Tensor:
    """Conditions B×Q×C; a prompt that occurs several times in the batch, with other seeds, is encoded once."""
    keys = [
        (prompt, tuple(id(image) for image in images))
        for prompt, images in zip(batch.prompts, batch.images, strict=True)
    ]
    first: dict[tuple, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    segments = [parse_prompt(batch.prompts[i], batch.images[i]) for i in first.values()]
    rows = {key: row for row, key in enumerate(first)}
    condition, _ = pipeline.encode_prompt(segments)
    return condition[[rows[key] for key in keys]]


def require_stage(name: str, folder: Path) -> None:
    """Refuse a run folder of another stage than the row's.

    Raises:
        EvaluationError: says which stage was run and which is needed.
    """
    file = folder / RUN_CONFIG
    if not file.is_file():
        return
    stage = OmegaConf.select(OmegaConf.load(file), "stage")
    if stage != STAGES[name]:
        raise EvaluationError(
            f"{name}: '{folder}' is a run of stage '{stage}', but this row needs a run of stage '{STAGES[name]}'."
        )


def require_fit(name: str, model: Path, decoder: Path) -> None:
    """Refuse, before anything is generated, a model whose conditions the U-Net cannot read.

    Raises:
        FileNotFoundError: the model has no AlignerNet: it is of stage 1.
        EvaluationError: names both widths.
    """
    if not (model / "aligner" / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{name}: '{model}' has no aligner/{CONFIG_FILE}, as after stage 1; this row needs a model "
            "of a later stage."
        )
    width = json.loads((model / "aligner" / CONFIG_FILE).read_text(encoding="utf-8"))["width"]
    read = json.loads((decoder / "unet" / CONFIG_FILE).read_text(encoding="utf-8"))["cross_attention_dim"]
    if width != read:
        raise EvaluationError(
            f"{name}: '{model}' makes conditions of width {width}, but the U-Net of '{decoder}' reads {read}: it is a "
            "checkpoint of another model. Set models.image_decoder to the Stable Diffusion it was aligned with."
        )
