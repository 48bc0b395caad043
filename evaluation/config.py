"""Configuration of an evaluation: protocols, models, data folders, and what the report shows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from omegaconf import MISSING

from evaluation.benchmarks import BENCHMARKS, METRICS, Protocols
from evaluation.images.provenance import encoder_path
from evaluation.protocols.protocol import Encoder, Protocol, require_at_least
from evaluation.scores.bootstrap import Bootstrap
from evaluation.tracking import Tracking
from kosmosg.sampling import Acceleration


@dataclass
class Models:
    image_decoder: str | None = None
    """Diffusers folder or hub id of the image decoder of all KOSMOS-G rows, which is also a text-only row by itself.
    null scores images of other models only."""
    before_stage_3: str | None = None
    """Run or model folder of the alignment stage; null omits the row."""
    after_stage_3: str | None = None
    """Run or model folder of the instruction tuning stage; null omits the row."""
    runs: list[str] = field(default_factory=list)
    """Run folders, or patterns such as `runs/ablations/*/*` for all finished runs. Rows are named after ablation and
    seed; tables average over seeds."""
    external: dict[str, str] = field(default_factory=dict)
    """Other models by name: folders of images that they made for our requests, see evaluation/images/external.py."""

    def __post_init__(self) -> None:
        if self.image_decoder is None:
            for name in ("before_stage_3", "after_stage_3", "runs"):
                if getattr(self, name):
                    raise ValueError(f"models.{name} is not allowed without models.image_decoder.")


@dataclass
class Curve:
    """Fidelity against editability on DreamBench: systems sampled again at other guidance scales."""

    guidance_scales: list[float] = field(default_factory=list)
    """Points of the curve; an empty list omits it."""
    systems: list[str] = field(default_factory=list)
    """Systems on the curve, by their names in the table; an empty list selects all that generate images."""
    max_subjects: int | None = None
    """Maximum number of subjects, evenly spaced in the list; null uses the protocol's."""
    max_templates: int | None = None
    """Maximum number of templates of each list, evenly spaced; null uses the protocol's."""
    images_per_prompt: int | None = None
    """Images per prompt; null uses the protocol's."""

    def __post_init__(self) -> None:
        for scale in self.guidance_scales:
            if scale < 0 or self.guidance_scales.count(scale) > 1:
                raise ValueError(
                    f"curve.guidance_scales={self.guidance_scales} is not allowed; they must be unique and at least 0."
                )
        require_at_least(self, "curve", 1, "max_subjects", "max_templates", "images_per_prompt")


@dataclass
class Gallery:
    subjects: int = 8
    """Subjects in the report, evenly spaced in the data set."""
    templates: int = 6
    """Templates shown for each subject, evenly spaced in its list."""
    swap_prompts: list[str] = field(default_factory=lambda: ["<i> on the beach", "<i> in the snow"])
    """Each prompt is sampled for all shown subjects from the same noise, so that only the input image differs."""
    pair_prompt: str | None = "<i> and <i> in the snow"
    """Sampled for all ordered pairs of `pair_subjects` subjects from the same noise; null omits the grid."""
    pair_subjects: int = 4
    """Rows and columns of that grid."""

    def __post_init__(self) -> None:
        require_at_least(self, "gallery", 1, "subjects", "templates", "pair_subjects")
        prompts = [("swap_prompts", prompt, 1) for prompt in self.swap_prompts]
        for key, prompt, count in [*prompts, ("pair_prompt", self.pair_prompt, 2)]:
            if prompt is not None and prompt.count("<i>") != count:
                raise ValueError(f"gallery.{key}: {prompt!r} must hold <i> {count} times.")


@dataclass
class EvaluationConfig(Protocols):
    output: str = MISSING
    """Folder for images, scores, tables and the report."""
    data: dict[str, str | None] = field(default_factory=dict)
    """Folder of each benchmark's data set by the benchmark's name. dreambench: one folder for each subject, as
    google/dreambooth's `dataset/`. coco: annotations/ and val2014/. Others: docs/evaluation.md."""
    models: Models = field(default_factory=Models)
    """Models to evaluate."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    """Confidence intervals."""
    gallery: Gallery = field(default_factory=Gallery)
    """Image grids of the report."""
    curve: Curve = field(default_factory=Curve)
    """Fidelity against editability over guidance scales."""
    batch_size: int = 50
    """Images generated in a batch."""
    encoder_batch_size: int = 100
    """Images in a batch of a metric's network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses a GPU if there is one; each local rank uses its own."""
    acceleration: Acceleration = field(default_factory=Acceleration)
    """Optimizations of the image decoder; images change by rounding only."""
    local_weights: dict[str, str] = field(default_factory=dict)
    """Local folders and files that replace weights named by a protocol: Inception's weight file, or hub ids when
    offline."""
    reference_features: str | None = None
    """Folder of cached features of FID's real images, which several evaluations can share; null: references/ in the
    output."""
    judge_answers: str | None = None
    """Folder of cached answers of vision-language judges, which several evaluations can share; null: answers/ in the
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
            required = (metric for table in BENCHMARKS[name].tables for metric in METRICS[table] if not metric.optional)
            for encoder in (network.partition("_")[0] for metric in required for network in metric.needs):
                if getattr(protocol, encoder, None) is None:
                    raise ValueError(f"{name}.{encoder} has no value; a protocol names its encoders.")

    def protocols(self) -> dict[str, Protocol]:
        """Return the protocols of the selected benchmarks by name."""
        return {name: protocol for name in BENCHMARKS if (protocol := getattr(self, name)) is not None}

    def folder_of(self, benchmark: str) -> Path:
        """Return the data set's folder of a benchmark."""
        return Path(str(self.data[benchmark]))

    def torch_device(self, local_rank: int = 0) -> torch.device:
        """Return the device of a local rank; ranks are distributed round-robin over the GPUs of their node."""
        if self.device == "cpu" or (self.device == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        return torch.device("cuda", local_rank % max(1, torch.cuda.device_count()))

    def encoder_path(self, encoder: Encoder) -> Path:
        """Return the folder or file of an encoder's weights. Raises FileNotFoundError."""
        weights = self.local_weights.get(encoder.weights, encoder.weights)
        return encoder_path(weights, getattr(encoder, "revision", None))
