"""Protocols: all settings that scores depend on. Scores are comparable only under equal protocols.

Each YAML in `configs/protocols/` is a protocol. Its identity is `name@version#task+sampling`: the fingerprint of the
requests and their scoring, then that of the sampling of our images. Fingerprints cover all fields that differ from
their defaults, so overriding a value gives another identity, while a new field leaves published identities unchanged
(and a default must never change). Settings that change scores at most by rounding are in `evaluation/config.py`.
"""

import hashlib
import json
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from omegaconf import MISSING

FINGERPRINT_DIGITS = 8


@dataclass
class Sampling:
    sampler: Literal["dpm", "ddim", "pndm"] = "dpm"
    """dpm is DPM-Solver++ of order 2 (midpoint), diffusers' DPMSolverMultistepScheduler."""
    steps: int = 100
    """Denoising steps."""
    guidance_scale: float = 7.5
    """w of eq. 4; without a negative prompt."""
    image_size: int = 512
    """Side of the generated images in pixels."""
    storage: Literal["memory", "png", "jpeg"] = "png"
    """Bytes that are scored. memory: 255·x truncated, as in scripts that score while sampling; png: 255·x rounded, as
    in saved files; jpeg: the latter at quality 95."""
    seed: int = 0
    """Seed from which the seeds of all images are derived."""
    noise_period: int | None = None
    """Prompts this far apart share their noise, as in scripts that reset the seed for each batch; null: no sharing."""

    def __post_init__(self) -> None:
        require_at_least(self, "sampling", 1, "steps", "image_size", "noise_period")
        require_at_least(self, "sampling", 0, "guidance_scale")


@dataclass
class Preprocessing:
    resize: int = 224
    """Shorter side after resizing (by PIL, with antialiasing), in pixels."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Interpolation of the resize."""
    crop: int = 224
    """Side of the centre crop, in pixels."""
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Subtracted from pixels in [0, 1]."""
    std: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """Divisor after the subtraction."""

    def __post_init__(self) -> None:
        require_at_least(self, "preprocessing", 1, "resize", "crop")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(
                    f"preprocessing.{name}={getattr(self, name)} is not allowed; it must have 3 numbers, RGB."
                )


@dataclass
class Encoder:
    weights: str = MISSING
    """A transformers folder or hub id."""
    preprocessing: Preprocessing | None = None
    """null uses the folder's preprocessor_config.json."""


@dataclass
class FeatureNetwork(Encoder):
    network: Literal["resnet", "inception"] = "resnet"
    """inception takes a single weight file, .pth or .safetensors."""

    def __post_init__(self) -> None:
        if self.network == "inception" and self.preprocessing is not None:
            raise ValueError(
                "coco.fid.preprocessing is not allowed with coco.fid.network=inception, which does its own "
                "resizing and scaling; resizes before it are coco.real_resize and coco.generated_resize."
            )


@dataclass
class VisionJudge(Encoder):
    revision: str | None = None
    """Commit of a hub id, which pins the judge; null if `weights` is a folder."""
    max_new_tokens: int = 256
    """Maximum length of an answer."""

    def __post_init__(self) -> None:
        if self.preprocessing is not None:
            raise ValueError("vlm.preprocessing is not allowed; a vision-language judge uses its own processor.")


@dataclass
class Detector(Encoder):
    threshold: float = 0.3
    """Minimum confidence of an object."""
    counting_threshold: float = 0.9
    """Minimum confidence for prompts with the tag `counting`."""
    max_objects: int = 16
    """Maximum number of objects of a class; the most confident are used."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Detector labels by class name of the metadata, where they differ."""
    position_threshold: float = 0.1
    """Minimum distance between the centres of two objects, as a share of their sizes."""


@dataclass
class Resize:
    size: int = 256
    """Shorter side after resizing, and side of the centre crop, in pixels."""
    library: Literal["tensor", "pil"] = "tensor"
    """tensor: torch's interpolate on [0, 1], then 255·x truncated to bytes as in torchmetrics; pil: PIL on bytes."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of the resize."""
    antialias: bool = False
    """Antialiasing when shrinking. torchvision's default for tensors has changed from false to true."""

    def __post_init__(self) -> None:
        require_at_least(self, "resize", 1, "size")
        if self.library == "pil" and not self.antialias:
            raise ValueError("resize.antialias=false is not allowed with resize.library=pil; PIL always antialiases.")


@dataclass
class KID:
    subsets: int = 100
    """Number of subsets drawn from each side, without replacement within a subset; KID is the mean over subsets."""
    subset_size: int = 1000
    """Images in a subset."""
    seed: int = 0
    """Seed of the subsets."""

    def __post_init__(self) -> None:
        require_at_least(self, "kid", 2, "subsets", "subset_size")


@dataclass
class Subject:
    class_noun: str = MISSING
    """Word for the subject in prompts."""
    kind: str = MISSING
    """Its list of templates: object or live."""
    kept_image: str = MISSING
    """File name of the model's input image."""
    labels: dict[str, str] = field(default_factory=dict)
    """Expected labels by label group, such as `{"kind": "cat", "colour": "red", "pattern": "stripes"}`."""


@dataclass
class Templates:
    original: list[str] = field(default_factory=list)
    """Prompts for CLIP-T and for text-only systems; `{}` is the class word."""
    modified: list[str] = field(default_factory=list)
    """Prompts for KOSMOS-G; `{}` is the image."""
    labels: list[dict[str, str]] = field(default_factory=list)
    """Labels that each template asks for, such as `{"light": "at night"}`, which override the subject's. Empty, or one
    entry per template."""

    def __post_init__(self) -> None:
        if len(self.original) != len(self.modified):
            raise ValueError(
                f"prompts have {len(self.original)} original but {len(self.modified)} modified templates; each "
                "template needs both."
            )
        if self.labels and len(self.labels) != len(self.original):
            raise ValueError(
                f"prompts have {len(self.original)} templates but {len(self.labels)} labels; each template needs "
                "one, {} if it asks for nothing that the judge knows."
            )
        for template in (*self.original, *self.modified):
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} once, where the subject goes.")

    def rows(self) -> list[tuple[str, str, dict[str, str]]]:
        """Return (original, modified, labels) of each template."""
        return list(zip(self.original, self.modified, self.labels or [{} for _ in self.original], strict=True))


@dataclass
class Pairs:
    original: str = MISSING
    """Prompt for text-only systems; the two `{}` are the class words."""
    modified: str = MISSING
    """Prompt for KOSMOS-G; the two `{}` are the images."""
    subjects: list[list[str]] = field(default_factory=list)
    """Folder names of each pair: left, right. Their `kind` labels must differ."""

    def __post_init__(self) -> None:
        for name in ("original", "modified"):
            if getattr(self, name).count("{}") != 2:
                raise ValueError(f"pairs.{name}={getattr(self, name)!r} must hold {{}} twice, where the subjects go.")
        if wrong := [pair for pair in self.subjects if len(pair) != 2]:
            raise ValueError(f"pairs.subjects has {wrong[0]}; each pair must name two subjects.")


@dataclass
class Protocol:
    name: str = MISSING
    """Published name of the protocol, for example dreambench/kosmosg."""
    version: int = 1
    """Incremented when the protocol changes."""
    sampling: Sampling = field(default_factory=Sampling)
    """Sampling and storage of the images."""
    clip: Encoder | None = None
    """Encoder of CLIP-I and CLIP-T: the mean cosine of pairs, clamped at 0 after averaging."""
    upright: bool = False
    """Apply the EXIF orientation of photos before scoring; the published scripts score the pixels as stored."""


@dataclass
class DreamBenchProtocol(Protocol):
    images_per_prompt: int = 4
    """Images per prompt, each with its own seed."""
    references: Literal["kept_image", "all"] = "kept_image"
    """References of subject fidelity: the input image, or all real images of the subject."""
    fed: Literal["image", "class_and_image"] = "image"
    """Replacement of `{}` in prompts for KOSMOS-G: `<i>`, or the class word and `<i>`."""
    facts: str | None = None
    """JSON of subjects and prompts in the data set's folder; null if the protocol has them itself."""
    subjects: dict[str, Subject] = field(default_factory=dict)
    """Subjects by folder name."""
    prompts: dict[str, Templates] = field(default_factory=dict)
    """Templates by kind of subject."""
    pairs: Pairs | None = None
    """Prompts with two subjects, scored by the judge half by half; skipped without a judge."""
    max_subjects: int | None = None
    """Maximum number of subjects, evenly spaced in the list; for trials."""
    max_templates: int | None = None
    """Maximum number of templates of each list, evenly spaced; for trials."""
    dino: Encoder | None = None
    """Encoder of DINO (CLS output): the mean cosine of pairs, clamped at 0 after averaging."""
    judge: Encoder | None = None
    """Classifier that labels images and tells individuals apart, for subjects with labels. It must share no weights
    with a model's vision encoder."""

    def __post_init__(self) -> None:
        require_at_least(self, "dreambench", 1, "images_per_prompt", "max_subjects", "max_templates")
        if bool(self.facts) == bool(self.subjects or self.prompts):
            raise ValueError(
                "dreambench: give the subjects and prompts either as 'facts' (a JSON file) or as 'subjects' and "
                f"'prompts', not {'both' if self.facts else 'neither'}."
            )


@dataclass
class CocoProtocol(Protocol):
    captions: int = 30_000
    """Number of captions, drawn with Python's `random.Random(caption_seed).sample`; images can occur repeatedly."""
    caption_seed: int | None = 0
    """Seed of the caption draw and of the split into halves; must be null with `caption_list`."""
    caption_list: str | None = None
    """JSON list of {"file_name", "caption"} in the data set's folder; all are used, in order, instead of a draw."""
    references: Literal["all", "half", "listed"] = "all"
    """Real images of FID: all; a random half, where the other half is the row of real images; or the image of each
    caption used, with repetition."""
    real_resize: Resize | None = None
    """Resize of real images before FID's network; null keeps their size."""
    generated_resize: Resize | None = None
    """Resize of generated images before FID's network; null keeps their size."""
    fid: FeatureNetwork | None = None
    """Feature network of FID and KID, which torchmetrics computes in double precision."""
    kid: KID | None = None
    """KID from the features of FID, with the kernel (x·y / F + 1)³; null omits it."""

    def __post_init__(self) -> None:
        require_at_least(self, "coco", 2, "captions")
        if (self.caption_list is None) == (self.caption_seed is None):
            raise ValueError(
                f"coco.caption_seed={self.caption_seed} is not allowed with coco.caption_list={self.caption_list}; "
                "captions are either drawn by a seed or listed in a file."
            )
        if self.caption_list is not None and self.references == "half":
            raise ValueError(
                "coco.references=half is not allowed with a coco.caption_list, as no seed halves the images; allowed: "
                "all, listed."
            )
        if self.kid is not None and self.kid.subset_size > self.captions:
            raise ValueError(
                f"coco.kid.subset_size={self.kid.subset_size} is not allowed; it must be at most "
                f"coco.captions={self.captions}."
            )


def identity(protocol: Protocol) -> str:
    """Return `name@version#task+sampling`, equal if and only if all fields are equal."""
    task = _non_defaults(protocol)
    sampling = task.pop("sampling", {})
    # The size of the images is part of the request.
    task["image_size"] = protocol.sampling.image_size
    return f"{protocol.name}@{protocol.version}#{_fingerprint(task)}+{_fingerprint(sampling)}"


def task_of(identity: str) -> str:
    """Return `name@version#task`, the identity of scores whose images were not sampled by the protocol."""
    return identity.partition("+")[0]


def _non_defaults(value: Any) -> Any:
    """Convert to plain values, with only those fields of dataclasses that differ from their defaults."""
    if is_dataclass(value):
        pairs = [(field, getattr(value, field.name)) for field in fields(value)]
        return {field.name: _non_defaults(inner) for field, inner in pairs if inner != _default(field)}
    if isinstance(value, dict):
        return {key: _non_defaults(inner) for key, inner in value.items()}
    return [_non_defaults(inner) for inner in value] if isinstance(value, list) else value


def _default(field: Any) -> Any:
    return field.default if field.default_factory is NO_DEFAULT else field.default_factory()


def _fingerprint(values: dict[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def require_at_least(config: Any, section: str, least: float, *names: str) -> None:
    """Raise ValueError if a field is below `least`; null is allowed."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            key = f"{section}.{name}".lstrip(".")
            raise ValueError(f"{key}={value} is not allowed; it must be at least {least}.")
