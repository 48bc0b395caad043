"""A protocol is everything that makes a number: two numbers compare only where their protocols are equal.

One YAML under `configs/protocols/` writes a protocol; every field below enters its fingerprint, so that a value changed
on the command line gives another protocol, `name@version#fingerprint`. What cannot change a number but by rounding
(where files lie, batch size, device) stands in `evaluation/config.py` instead.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Literal

from omegaconf import MISSING

FINGERPRINT_DIGITS = 8


@dataclass
class Sampling:
    sampler: Literal["dpm", "ddim", "pndm"] = "dpm"
    """dpm is DPM-Solver++ of order 2 (midpoint), as diffusers' DPMSolverMultistepScheduler."""
    steps: int = 100
    """Denoising steps."""
    guidance_scale: float = 7.5
    """w of eq. 4; no negative prompt."""
    image_size: int = 512
    """Side of the generated images in pixels."""
    storage: Literal["png", "jpeg"] = "png"
    """How images are stored before they are scored; jpeg is of quality 95."""
    seed: int = 0
    """What every image's own seed is derived from."""
    noise_period: int | None = None
    """Prompts this far apart share their noise, as with scripts that reset the seed for every batch; null: none do."""

    def __post_init__(self) -> None:
        for name in ("steps", "image_size"):
            _require_at_least("sampling", name, getattr(self, name), 1)
        _require_at_least("sampling", "guidance_scale", self.guidance_scale, 0)
        if self.noise_period is not None:
            _require_at_least("sampling", "noise_period", self.noise_period, 1)


@dataclass
class Preprocessing:
    resize: int = 224
    """Shorter side after resizing, in pixels; by PIL, which antialiases."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of the resize."""
    crop: int = 224
    """Side of the centre crop, in pixels."""
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Subtracted from pixels in [0, 1]."""
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """Divides them then."""

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            _require_at_least("preprocessing", name, getattr(self, name), 1)
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"preprocessing.{name}={getattr(self, name)} is not allowed; it has 3 numbers, RGB.")


@dataclass
class Encoder:
    weights: str = MISSING
    """A transformers folder or hub id."""
    preprocessing: Preprocessing | None = None
    """null: as the folder's own preprocessor_config.json says."""


@dataclass
class FeatureNetwork(Encoder):
    network: str = "resnet"
    """An entry of `evaluation.encoders.FEATURE_NETWORKS`."""


@dataclass
class Subject:
    class_noun: str = MISSING
    """The word that a prompt names it by."""
    kind: str = MISSING
    """Which list of templates it takes: object or live."""
    kept_image: str = MISSING
    """File name of the one image that the model is given."""


@dataclass
class Templates:
    original: list[str] = field(default_factory=list)
    """Scored (CLIP-T) and fed to text-only systems; `{}` is the class word."""
    modified: list[str] = field(default_factory=list)
    """Fed to KOSMOS-G; `{}` is the image."""

    def __post_init__(self) -> None:
        if len(self.original) != len(self.modified):
            raise ValueError(
                f"prompts have {len(self.original)} original but {len(self.modified)} modified templates; each "
                "template has both."
            )
        for template in (*self.original, *self.modified):
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} once, where the subject goes.")


@dataclass
class Protocol:
    name: str = MISSING
    """Under which the numbers are published, for example dreambench/kosmosg."""
    version: int = 1
    """Raised with every change of what the name means."""
    sampling: Sampling = field(default_factory=Sampling)
    """How images are made and stored."""
    clip: Encoder | None = None
    """CLIP-I and CLIP-T; the mean of pair cosines, clamped at 0 after averaging."""


@dataclass
class DreamBenchProtocol(Protocol):
    images_per_prompt: int = 4
    """Each with a seed of its own."""
    references: Literal["kept_image", "all"] = "kept_image"
    """What subject fidelity is measured against: the image that was given, or every real image of the subject."""
    fed: Literal["image", "class_and_image"] = "image"
    """What stands for `{}` in the fed prompt: `<i>`, or the class word before it."""
    facts: str | None = None
    """JSON of subjects and prompts, relative to the data set's folder, where the protocol does not hold them itself."""
    subjects: dict[str, Subject] = field(default_factory=dict)
    """By folder name."""
    prompts: dict[str, Templates] = field(default_factory=dict)
    """By kind of subject."""
    max_subjects: int | None = None
    """Only this many, spread evenly over the list; for trials."""
    max_templates: int | None = None
    """Only this many of each list, spread evenly; for trials."""
    dino: Encoder | None = None
    """CLS output; the mean of pair cosines, clamped at 0 after averaging."""

    def __post_init__(self) -> None:
        _require_at_least("dreambench", "images_per_prompt", self.images_per_prompt, 1)
        for name in ("max_subjects", "max_templates"):
            if getattr(self, name) is not None:
                _require_at_least("dreambench", name, getattr(self, name), 1)
        if bool(self.facts) == bool(self.subjects or self.prompts):
            raise ValueError(
                "dreambench: give the subjects and prompts either as 'facts' (a JSON file) or as 'subjects' and "
                f"'prompts', not {'both' if self.facts else 'neither'}."
            )


@dataclass
class CocoProtocol(Protocol):
    captions: int = 30_000
    """Annotations drawn with Python's `random.Random(caption_seed).sample`; an image can occur more than once."""
    caption_seed: int = 0
    """Of that draw, and of the split into halves."""
    references: Literal["all", "half"] = "all"
    """Real side of FID: all images, or a random half; the other half then gives the row of real images."""
    fid: FeatureNetwork | None = None
    """Feature network of FID; torchmetrics' arithmetic in double precision."""

    def __post_init__(self) -> None:
        _require_at_least("coco", "captions", self.captions, 2)


def identity(protocol: Protocol) -> str:
    """`name@version#fingerprint`: equal exactly where every field is equal."""
    written = json.dumps(asdict(protocol), sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(written.encode()).hexdigest()[:FINGERPRINT_DIGITS]
    return f"{protocol.name}@{protocol.version}#{digest}"


def _require_at_least(section: str, name: str, value: float, least: float) -> None:
    if value < least:
        raise ValueError(f"{section}.{name}={value} is not allowed; it must be at least {least}.")
