"""A protocol is everything that makes a number: two numbers compare only where their protocols are equal.

One YAML under `configs/protocols/` writes a protocol; every field below that is not at its default enters its identity,
`name@version#task+sampling`, so that a value changed on the command line gives another protocol, and a new field leaves
published ones alone. (A default is therefore never changed.) The first fingerprint is of what is asked and how it is
scored, whoever made the images; the second of how ours are sampled. What cannot change a number but by rounding (where
files lie, batch size, device) stands in `evaluation/config.py` instead.
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
    """dpm is DPM-Solver++ of order 2 (midpoint), as diffusers' DPMSolverMultistepScheduler."""
    steps: int = 100
    """Denoising steps."""
    guidance_scale: float = 7.5
    """w of eq. 4; no negative prompt."""
    image_size: int = 512
    """Side of the generated images in pixels."""
    storage: Literal["memory", "png", "jpeg"] = "png"
    """What is scored. memory: bytes cut from floats (255·x truncated), as in scripts that score while they sample; png:
    bytes rounded, as in saved files; jpeg: these at quality 95."""
    seed: int = 0
    """What every image's own seed is derived from."""
    noise_period: int | None = None
    """Prompts this far apart share their noise, as with scripts that reset the seed for every batch; null: none do."""

    def __post_init__(self) -> None:
        require_at_least(self, "sampling", 1, "steps", "image_size", "noise_period")
        require_at_least(self, "sampling", 0, "guidance_scale")


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
        require_at_least(self, "preprocessing", 1, "resize", "crop")
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
    network: Literal["resnet", "inception"] = "resnet"
    """inception has one weight file, .pth or .safetensors."""

    def __post_init__(self) -> None:
        if self.network == "inception" and self.preprocessing is not None:
            raise ValueError(
                "coco.fid.preprocessing is not allowed with coco.fid.network=inception, which resizes to 299 px and "
                "scales by itself; what comes before it is coco.real_resize and coco.generated_resize."
            )


@dataclass
class VisionJudge(Encoder):
    revision: str | None = None
    """Commit of a hub id, so that the judge stays the same; null where `weights` is a folder."""
    max_new_tokens: int = 256
    """Of an answer."""

    def __post_init__(self) -> None:
        if self.preprocessing is not None:
            raise ValueError("vlm.preprocessing is not allowed; a judge's own processor shows it the images.")


@dataclass
class Detector(Encoder):
    threshold: float = 0.3
    """Least confidence of an object."""
    counting_threshold: float = 0.9
    """In its place for prompts of the tag `counting`."""
    max_objects: int = 16
    """The most confident ones of each class."""
    aliases: dict[str, str] = field(default_factory=dict)
    """The detector's label of a class that it calls otherwise than the metadata do."""
    position_threshold: float = 0.1
    """Share of both objects' sizes by which their centres must be apart."""


@dataclass
class Resize:
    size: int = 256
    """Shorter side after resizing, and side of the centre crop that follows, in pixels."""
    library: Literal["tensor", "pil"] = "tensor"
    """tensor: torch's interpolate on [0, 1], 255·x truncated to bytes as torchmetrics does; pil: PIL on bytes."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the resize."""
    antialias: bool = False
    """Whether shrinking averages over what it leaves out. Tensors in torchvision: not by default once, now they do."""

    def __post_init__(self) -> None:
        require_at_least(self, "resize", 1, "size")
        if self.library == "pil" and not self.antialias:
            raise ValueError("resize.antialias=false is not allowed with resize.library=pil; PIL always antialiases.")


@dataclass
class KID:
    subsets: int = 100
    """Draws of `subset_size` images from each side, without repetition within a draw; KID is their mean."""
    subset_size: int = 1000
    """Images in a draw."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        require_at_least(self, "kid", 2, "subsets", "subset_size")


@dataclass
class Subject:
    class_noun: str = MISSING
    """The word that a prompt names it by."""
    kind: str = MISSING
    """Which list of templates it takes: object or live."""
    kept_image: str = MISSING
    """File name of the one image that the model is given."""
    labels: dict[str, str] = field(default_factory=dict)
    """What the judge should see of it, by label group, as `{"kind": "cat", "colour": "red", "pattern": "stripes"}`."""


@dataclass
class Templates:
    original: list[str] = field(default_factory=list)
    """Scored (CLIP-T) and fed to text-only systems; `{}` is the class word."""
    modified: list[str] = field(default_factory=list)
    """Fed to KOSMOS-G; `{}` is the image."""
    labels: list[dict[str, str]] = field(default_factory=list)
    """What the words of each template ask for, as `{"light": "at night"}`, before the subject's own label of that
    group; empty, or as many as there are templates."""

    def __post_init__(self) -> None:
        if len(self.original) != len(self.modified):
            raise ValueError(
                f"prompts have {len(self.original)} original but {len(self.modified)} modified templates; each "
                "template has both."
            )
        if self.labels and len(self.labels) != len(self.original):
            raise ValueError(
                f"prompts have {len(self.original)} templates but {len(self.labels)} labels; each template has its "
                "own, {} where its words ask for nothing that the judge knows."
            )
        for template in (*self.original, *self.modified):
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must hold {{}} once, where the subject goes.")

    def rows(self) -> list[tuple[str, str, dict[str, str]]]:
        """(original, modified, labels) of each template."""
        return list(zip(self.original, self.modified, self.labels or [{} for _ in self.original], strict=True))


@dataclass
class Pairs:
    original: str = MISSING
    """Fed to text-only systems; the two `{}` are the class words."""
    modified: str = MISSING
    """Fed to KOSMOS-G; the two `{}` are the images."""
    subjects: list[list[str]] = field(default_factory=list)
    """Folder names of each pair: left, right; of two kinds by their labels."""

    def __post_init__(self) -> None:
        for name in ("original", "modified"):
            if getattr(self, name).count("{}") != 2:
                raise ValueError(f"pairs.{name}={getattr(self, name)!r} must hold {{}} twice, where the subjects go.")
        if wrong := [pair for pair in self.subjects if len(pair) != 2]:
            raise ValueError(f"pairs.subjects has {wrong[0]}; each pair names two subjects.")


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
    upright: bool = False
    """Score photos turned as their EXIF orientation says; the published scripts score the pixels as they are stored."""


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
    pairs: Pairs | None = None
    """Images of two subjects, one input each, which the judge looks at half by half; drawn only where there is one."""
    max_subjects: int | None = None
    """Only this many, spread evenly over the list; for trials."""
    max_templates: int | None = None
    """Only this many of each list, spread evenly; for trials."""
    dino: Encoder | None = None
    """CLS output; the mean of pair cosines, clamped at 0 after averaging."""
    judge: Encoder | None = None
    """Classifier that names what is to be seen and tells individuals apart, measured where the facts have labels; it
    must not be a network that a model looks through, nor share its weights."""

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
    """Annotations drawn with Python's `random.Random(caption_seed).sample`; an image can occur more than once."""
    caption_seed: int | None = 0
    """Of that draw, and of the split into halves; null where a caption_list leaves nothing to draw."""
    caption_list: str | None = None
    """JSON list of {"file_name", "caption"} in the data set's folder, taken whole and in order instead of a draw."""
    references: Literal["all", "half", "listed"] = "all"
    """Real side of FID: all images; a random half, the other half then giving the row of real images; or the image of
    every taken caption, as often as it is taken."""
    real_resize: Resize | None = None
    """Of real images before FID's network; null: they are given as they are."""
    generated_resize: Resize | None = None
    """Of generated images before FID's network; null: they are given at their own size."""
    fid: FeatureNetwork | None = None
    """Feature network of FID and KID; torchmetrics' arithmetic in double precision."""
    kid: KID | None = None
    """Beside FID, from the same features: the kernel (x·y / F + 1)³; null leaves it out."""

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
    """`name@version#task+sampling`: equal exactly where every field is equal."""
    told = _told(protocol)
    sampling = told.pop("sampling", {})
    # The size of the images is part of what is asked.
    task = told | {"image_size": protocol.sampling.image_size}
    return f"{protocol.name}@{protocol.version}#{_fingerprint(task)}+{_fingerprint(sampling)}"


def task_of(identity: str) -> str:
    """`name@version#task`: what images of another model's, or photos, are scored under."""
    return identity.partition("+")[0]


def _told(value: Any) -> Any:
    """Plain values, of dataclasses the fields that are not at their defaults."""
    if is_dataclass(value):
        return {f.name: _told(found) for f in fields(value) if (found := getattr(value, f.name)) != _default(f)}
    if isinstance(value, dict):
        return {key: _told(inner) for key, inner in value.items()}
    return [_told(inner) for inner in value] if isinstance(value, list) else value


def _default(of: Any) -> Any:
    return of.default if of.default_factory is NO_DEFAULT else of.default_factory()


def _fingerprint(told: dict[str, Any]) -> str:
    written = json.dumps(told, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(written.encode()).hexdigest()[:FINGERPRINT_DIGITS]


def require_at_least(config: Any, section: str, least: float, *names: str) -> None:
    """Raises ValueError: a field has a value below `least`; null is none."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            key = f"{section}.{name}".lstrip(".")
            raise ValueError(f"{key}={value} is not allowed; it must be at least {least}.")
