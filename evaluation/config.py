"""The schema of `configs/**/evaluation.yaml`: which protocols, which models, where files lie."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING

from evaluation.benchmarks import BENCHMARKS, Protocols, tables_of
from evaluation.images.provenance import encoder_path
from evaluation.protocols.protocol import Encoder, Protocol, require_at_least
from evaluation.scores.bootstrap import Bootstrap
from evaluation.tracking import Tracking
from kosmosg.sampling import Acceleration


@dataclass
class Models:
    image_decoder: str | None = None
    """Diffusers folder or hub id: the text-only row, and the image decoder of all rows of KOSMOS-G; null: other models'
    images alone are scored."""
    before_stage_3: str | None = None
    """Run or model folder of the alignment stage; null leaves the row out."""
    after_stage_3: str | None = None
    """Run or model folder of the instruction tuning stage; null leaves the row out."""
    runs: list[str] = field(default_factory=list)
    """Run folders, or patterns as `runs/ablations/*/*` for all finished ones: a row each, named after the run's
    ablation and seed; tables gather the seeds."""
    external: dict[str, str] = field(default_factory=dict)
    """Other models by name: folders of images that they made for our requests, see evaluation/images/external.py."""

    def __post_init__(self) -> None:
        if self.image_decoder is None:
            for name in ("before_stage_3", "after_stage_3", "runs"):
                if getattr(self, name):
                    raise ValueError(f"models.{name} is not allowed without models.image_decoder, which it steers.")


@dataclass
class Curve:
    """Fidelity against editability on DreamBench: rows of the table made again at other guidance scales."""

    guidance_scales: list[float] = field(default_factory=list)
    """Points of the curve; none leaves it out."""
    systems: list[str] = field(default_factory=list)
    """Rows that have a curve, by their names in the table; empty takes all that are made."""
    max_subjects: int | None = None
    """Only this many, spread evenly; null as in the protocol."""
    max_templates: int | None = None
    """Only this many of each list, spread evenly; null as in the protocol."""
    images_per_prompt: int | None = None
    """null as in the protocol."""

    def __post_init__(self) -> None:
        for scale in self.guidance_scales:
            if scale < 0 or self.guidance_scales.count(scale) > 1:
                raise ValueError(
                    f"curve.guidance_scales={self.guidance_scales} is not allowed; they are at least 0, each once."
                )
        require_at_least(self, "curve", 1, "max_subjects", "max_templates", "images_per_prompt")


@dataclass
class Gallery:
    subjects: int = 8
    """Shown in the report, spread over the data set."""
    templates: int = 6
    """Shown for each subject, spread over its list."""
    swap_prompts: list[str] = field(default_factory=lambda: ["<i> on the beach", "<i> in the snow"])
    """Each is drawn for every shown subject from the same noise, so that only the input image differs."""
    pair_prompt: str | None = "<i> and <i> in the snow"
    """Drawn for each pair of `pair_subjects` in the two slots, from the same noise; null leaves the grid out."""
    pair_subjects: int = 4
    """Sides of that grid."""

    def __post_init__(self) -> None:
        require_at_least(self, "gallery", 1, "subjects", "templates", "pair_subjects")
        for prompt in self.swap_prompts:
            _require_images("swap_prompts", prompt, 1)
        if self.pair_prompt is not None:
            _require_images("pair_prompt", self.pair_prompt, 2)


@dataclass
class EvaluationConfig(Protocols):
    output: str = MISSING
    """Folder for images, scores, tables and the report."""
    data: dict[str, str | None] = field(default_factory=dict)
    """The folder of each benchmark's data set, by the benchmark's name: dreambench has one folder for each subject, as
    google/dreambooth's `dataset/`; coco has annotations/ and val2014/; others: docs/evaluation.md."""
    models: Models = field(default_factory=Models)
    """What is evaluated."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    """Intervals."""
    gallery: Gallery = field(default_factory=Gallery)
    """Pictures of the report."""
    curve: Curve = field(default_factory=Curve)
    """Fidelity against editability over guidance scales."""
    batch_size: int = 50
    """Images made at once."""
    encoder_batch_size: int = 100
    """Images looked at once by a metric's network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU if there is one; of several processes on a machine, each its own."""
    acceleration: Acceleration = field(default_factory=Acceleration)
    """How the image decoder is run; images are the same but for rounding."""
    local_weights: dict[str, str] = field(default_factory=dict)
    """Folders and files that stand for what a protocol names: Inception's weight file; hub ids, where no network is."""
    reference_features: str | None = None
    """Folder that keeps the features of FID's real side, for evaluations to share; null: references/ in the output."""
    judge_answers: str | None = None
    """Folder that keeps the raw answers of vision-language judges, for evaluations to share; null: answers/ in the
    output."""
    wandb: Tracking = field(default_factory=Tracking)
    """Weights & Biases."""

    def __post_init__(self) -> None:
        require_at_least(self, "", 1, "batch_size", "encoder_batch_size")
        protocols = self.protocols()
        if not protocols:
            raise ValueError(
                "there is nothing to evaluate: extend a protocol, for example protocols/dreambench/toyland."
            )
        if unknown := sorted(set(self.data) - set(BENCHMARKS)):
            raise ValueError(f"data.{unknown[0]} is not allowed; benchmarks are: {', '.join(BENCHMARKS)}.")
        if self.curve.guidance_scales and "dreambench" not in protocols:
            raise ValueError(
                f"curve.guidance_scales={self.curve.guidance_scales} is not allowed without a dreambench protocol."
            )
        for name, protocol in protocols.items():
            if self.data.get(name) is None:
                raise ValueError(f"data.{name} has no value; set it to the data set's folder.")
            for _, metrics in tables_of(name):
                for need in (need for metric in metrics if not metric.optional for need in metric.needs):
                    encoder = need.partition("_")[0]
                    if getattr(protocol, encoder, None) is None:
                        raise ValueError(f"{name}.{encoder} has no value; a protocol names its encoders.")

    def protocols(self) -> dict[str, Protocol]:
        """Of the benchmarks that are asked for, by name."""
        return {name: found for name in BENCHMARKS if (found := getattr(self, name)) is not None}

    def folder_of(self, benchmark: str) -> Path:
        """Where the data set of a benchmark lies."""
        return Path(str(self.data[benchmark]))

    def torch_device(self, local_rank: int = 0) -> torch.device:
        """The device that `device` means in the process of that number on this machine; GPUs are dealt out in turn."""
        if self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))

    def encoder_path(self, encoder: Encoder) -> Path:
        """Folder or file of the weights that a protocol names. Raises FileNotFoundError."""
        weights = self.local_weights.get(encoder.weights, encoder.weights)
        return encoder_path(weights, getattr(encoder, "revision", None))


def _require_images(key: str, prompt: str, count: int) -> None:
    if prompt.count("<i>") != count:
        raise ValueError(f"gallery.{key}: {prompt!r} must hold <i> {count} times.")
