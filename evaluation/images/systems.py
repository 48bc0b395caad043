"""Systems that generate images: the image decoder from text, KOSMOS-G before and after stage 3, training runs."""

import glob
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

from evaluation.images.generation import Batch, Generate, System
from evaluation.images.provenance import decoder_folder, hash_json, hash_parts, image_parts
from evaluation.protocols.benchmark import COPY_OF_INPUT, REAL_IMAGES, EvaluationError
from evaluation.protocols.protocol import Sampling
from evaluation.scores.encoders import truncated
from kosmosg.condition import Condition
from kosmosg.config import RUN_CONFIG
from kosmosg.models.build import IMAGE_DECODERS, image_decoder_class
from kosmosg.models.storage import CONFIG_FILE, find_model
from kosmosg.pipeline import KosmosGPipeline
from kosmosg.prompt import parse_prompt
from kosmosg.sampling import Acceleration, accelerate, build_scheduler, seeded

TEXT_SYSTEMS = {kind: f"{kind.title} (text)" for kind in IMAGE_DECODERS.values()}
BEFORE_STAGE_3 = "KOSMOS-G before stage 3"
AFTER_STAGE_3 = "KOSMOS-G after stage 3"
TABLE_ORDER = (REAL_IMAGES, COPY_OF_INPUT, *TEXT_SYSTEMS.values(), BEFORE_STAGE_3, AFTER_STAGE_3)
FINISHED = "finished.json"
MAX_CACHED_CONDITIONS = 256
"""Sufficient because requests are ordered by subject and prompt."""
MODEL_PARTS = ("mllm", "aligner", "tokenizer")
STAGES = {BEFORE_STAGE_3: "alignment", AFTER_STAGE_3: "instruction_tuning"}


def text_system(weights: str, device: torch.device, acceleration: Acceleration | None = None) -> System:
    """Return the unmodified image decoder as a text-to-image system: diffusers' own pipeline on the class word.

    Args:
        weights: a diffusers folder or hub id.
    """
    folder = decoder_folder(weights)
    kind = image_decoder_class(folder)

    def load() -> Generate:
        # Always float32, whatever precision the files are stored in.
        options: Any = {"dtype": torch.float32, **kind.pipeline_options}
        pipeline: Any = DiffusionPipeline.from_pretrained(folder, **options).to(device)
        pipeline.set_progress_bar_config(disable=True)
        denoiser, vae = (getattr(pipeline, name) for name in kind.networks)
        accelerate(denoiser, vae, acceleration or Acceleration())
        trained_with = pipeline.scheduler

        def generate(batch: Batch, sampling: Sampling) -> list[Image.Image]:
            pipeline.scheduler = build_scheduler(sampling.sampler, trained_with)
            images = pipeline(
                batch.prompts,
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                height=sampling.image_size,
                width=sampling.image_size,
                generator=seeded(batch.seeds, len(batch.seeds), None, None),
                output_type=output_type(sampling),
                return_dict=False,
                **kind.call_options,
            )[0]
            return as_bytes(images)

        return generate

    parts = kind.text_parts() + image_parts(folder)
    return System(TEXT_SYSTEMS[kind], load, hash_parts(folder, parts), reads_images=False)


def kosmosg_system(
    name: str, folder: str | Path, image_decoder: str, device: torch.device, acceleration: Acceleration | None = None
) -> System:
    """Return KOSMOS-G of a model or run folder of stage 2 or 3, which reads the interleaved prompt.

    Args:
        name: row name; BEFORE_STAGE_3 and AFTER_STAGE_3 require a run of the matching stage.
        image_decoder: the diffusers folder or hub id that the model was aligned with.

    Raises:
        FileNotFoundError: there is no finished model, or it is of stage 1.
        EvaluationError: the run is of another stage, or the model was aligned with another image decoder.
    """
    config = Path(folder) / RUN_CONFIG
    stage = OmegaConf.select(OmegaConf.load(config), "stage") if config.is_file() else None
    if stage is not None and stage != STAGES.get(name, stage):
        raise EvaluationError(
            f"{name}: '{folder}' is a run of stage '{stage}', but this row needs a run of stage '{STAGES[name]}'."
        )
    model, decoder = find_model(folder), decoder_folder(image_decoder)
    check_widths(name, model, decoder)

    def load() -> Generate:
        pipeline = KosmosGPipeline.from_pretrained(model, image_decoder=decoder).to(device)
        accelerate(pipeline.denoiser, pipeline.vae, acceleration or Acceleration())
        conditions = ConditionCache(pipeline)

        def generate(batch: Batch, sampling: Sampling) -> list[Image.Image]:
            images = pipeline.sampler(
                conditions(batch),
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

    model_hash = hash_json([hash_parts(model, MODEL_PARTS), hash_parts(decoder, image_parts(decoder))])
    return System(name, load, model_hash, reads_images=True)


def run_system(
    folder: Path, image_decoder: str, device: torch.device, acceleration: Acceleration | None = None
) -> System:
    """Return KOSMOS-G of a run folder, named after the ablation (or stage) and seed in its configuration."""
    config = OmegaConf.load(folder / RUN_CONFIG)
    values = {key: OmegaConf.select(config, key) for key in ("ablation", "stage", "seed", "recipe.trainable")}
    stage, seed = "alignment" if values["recipe.trainable"] == "aligner" else values["stage"], values["seed"]
    experiment = values["ablation"] or stage
    system = kosmosg_system(f"{experiment}, seed {seed}", folder, image_decoder, device, acceleration)
    return replace(system, experiment=experiment, stage=stage, seed=seed)


def run_folders(patterns: Sequence[str]) -> list[Path]:
    """Return the finished run folders that match the patterns, without duplicates.

    Raises:
        EvaluationError: a named folder is not a finished run, or no folder matches.
    """
    runs: list[Path] = []
    for pattern in patterns:
        folders = [Path(folder) for folder in sorted(glob.glob(pattern))]
        finished = [folder for folder in folders if (folder / FINISHED).is_file() and (folder / RUN_CONFIG).is_file()]
        if not finished and not glob.has_magic(pattern):
            raise EvaluationError(f"models.runs: '{pattern}' is not a finished run folder.")
        runs += [folder for folder in finished if folder not in runs]
    if patterns and not runs:
        raise EvaluationError(f"models.runs: no finished run folder matches {', '.join(map(repr, patterns))}.")
    return runs


class ConditionCache:
    """LRU cache of the conditions of a pipeline, whose weights must not change.

    Each condition is computed in a batch of one. In a larger batch its last bits would depend on the other prompts, and
    cached images would then depend on what was generated before them.
    """

    def __init__(self, pipeline: KosmosGPipeline, size: int = MAX_CACHED_CONDITIONS):
        self.model, self.encoder, self.device = pipeline.model.eval(), pipeline.encoder, pipeline.device
        self.size = size
        self._conditions: OrderedDict[tuple[str, ...], Condition] = OrderedDict()

    def __call__(self, batch: Batch) -> Condition:
        """Return the conditions of a batch of B prompts."""
        hashes = {id(image): pixel_hash(image) for images in batch.images for image in images}
        rows = []
        for prompt, images in zip(batch.prompts, batch.images, strict=True):
            key = (prompt, *(hashes[id(image)] for image in images))
            if key not in self._conditions:
                self._conditions[key] = self._encode(prompt, images)
                if len(self._conditions) > self.size:
                    self._conditions.popitem(last=False)
            self._conditions.move_to_end(key)
            rows.append(self._conditions[key])
        return Condition.cat(rows)

    @torch.no_grad()
    def _encode(self, prompt: str, images: list[Image.Image]) -> Condition:
        batch = self.encoder.collate([self.encoder(parse_prompt(prompt, images))])
        return self.model.condition(batch.to(self.device))


def pixel_hash(image: Image.Image) -> str:
    """Return a hash of an image's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()


def output_type(sampling: Sampling) -> Literal["np", "pil"]:
    """Return "np" (floats, to be truncated) if the protocol scores images in memory, else "pil" (rounded bytes)."""
    return "np" if sampling.storage == "memory" else "pil"


def as_bytes(images: list[Image.Image] | np.ndarray) -> list[Image.Image]:
    """Return a pipeline's images; floats B×H×W×3 in [0, 1] are truncated to bytes."""
    return [truncated(image) for image in images] if isinstance(images, np.ndarray) else images


def check_widths(name: str, model: Path, decoder: Path) -> None:
    """Check that the image decoder can read the model's conditions.

    Raises:
        FileNotFoundError: the model has no AlignerNet, as after stage 1.
        EvaluationError: the widths differ.
    """
    if not (model / "aligner" / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{name}: '{model}' has no aligner/{CONFIG_FILE}, as after stage 1; this row needs a model of a "
            "later stage."
        )
    aligner = json.loads((model / "aligner" / CONFIG_FILE).read_text(encoding="utf-8"))
    with torch.device("meta"):  # no weights
        spec = image_decoder_class(decoder).from_config(decoder, "images").spec
    for what, ours, theirs in (
        ("conditions", aligner["width"], spec.width),
        ("pooled vectors", aligner.get("pooled_width"), spec.pooled),
    ):
        if ours != theirs:
            raise EvaluationError(
                f"{name}: '{model}' makes {what} of width {ours}, but '{decoder}' reads {theirs}. Set "
                "models.image_decoder to the image decoder that the model was aligned with."
            )
