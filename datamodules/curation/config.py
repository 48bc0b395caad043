"""What a curation reads, where it writes and who works; values in configs/curation/."""

from dataclasses import dataclass, field
from typing import Literal

from datamodules.curation.stage_config import (
    Caption,
    Crops,
    Entities,
    Masks,
    Pool,
    Safety,
    TextFilter,
    Toyland,
    check,
)
from datamodules.images import Limits

EXECUTION = ("output", "engine", "ray", "device", "max_bad_share", "min_bad_count", "report")
"""Keys on which the content of the shards does not depend."""


@dataclass
class Input:
    """Where the images are; one of `images` and `shards`."""

    images: str | None = None
    """A folder; every jpg, png and webp below it is read, in order of path."""
    shards: str | None = None
    """Path, glob or brace list of tars with one image a sample: image-only, or caption shards as img2dataset writes."""
    chunk_size: int = 1000
    """Images worked on as one; what is left of them is one output shard."""
    limits: Limits = field(default_factory=Limits)
    """What one image may cost."""

    def __post_init__(self):
        check("input", {"chunk_size": self.chunk_size}, 1)


@dataclass
class Stored:
    """The images as they are stored; crops are encoded alike."""

    side: int = 512
    """Pixels: the centre square, as the released code cuts it before all else, is resized to it."""
    min_side: int = 384
    """Pixels; images with a smaller width or height are left out."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    """Of targets and crops."""
    quality: int = 95
    """Of JPEG and WebP, 1 … 100."""

    def __post_init__(self):
        check("image", {"side": self.side}, 8)
        check("image", {"min_side": self.min_side}, 1)
        check("image", {"quality": self.quality}, 1, 100)


@dataclass
class Ray:
    """The Ray engine."""

    address: str | None = None
    """Of a running cluster ("auto" finds one); null starts Ray on this machine alone."""
    cpus: int | None = None
    """Cores that a Ray started here counts on; null takes those there are, more lets the pools share them."""
    prepare: Pool = field(default_factory=Pool)
    """Workers that read, decode and resize."""
    write: Pool = field(default_factory=Pool)
    """Workers that cut and write."""


@dataclass
class Report:
    """The report of a finished curation."""

    images: int = 9_000_000
    """To how many images the cost is extrapolated; the paper's count (section 3.1)."""
    sheet: int = 16
    """Samples on the contact sheet; 0 draws none."""

    def __post_init__(self):
        check("report", {"images": self.images, "sheet": self.sheet}, 0)


@dataclass
class Curation:
    """Everything that `python -m datamodules.curation` needs."""

    output: str = "data/constructed"
    """Folder of the shards; on a cluster, one that all machines share."""
    prefix: str = "train"
    """Of the shards' names."""
    seed: int = 0
    """Of every draw."""
    engine: Literal["local", "ray"] = "local"
    """Who works: this process, or Ray Data."""
    device: str = "auto"
    """Of the models: cpu, cuda, or auto, which is a GPU where there is one."""
    max_bad_share: float = 0.05
    """Largest share of images that may fail (unreadable, model failed, answer unparsable), 0 … 1."""
    min_bad_count: int = 100
    """Fewer failures never stop the job."""
    input: Input = field(default_factory=Input)
    """Images."""
    image: Stored = field(default_factory=Stored)
    """Preparation."""
    safety: Safety = field(default_factory=Safety)
    """Image filter."""
    caption: Caption = field(default_factory=Caption)
    """Captioner."""
    text_filter: TextFilter = field(default_factory=TextFilter)
    """Caption filter."""
    entities: Entities = field(default_factory=Entities)
    """Entity extraction."""
    masks: Masks = field(default_factory=Masks)
    """Segmentation."""
    crops: Crops = field(default_factory=Crops)
    """Cutting."""
    toyland: Toyland = field(default_factory=Toyland)
    """Ground truth, where a stage asks for it."""
    ray: Ray = field(default_factory=Ray)
    """The Ray engine."""
    report: Report = field(default_factory=Report)
    """What is told at the end."""

    def __post_init__(self):
        check("", {"seed": self.seed, "min_bad_count": self.min_bad_count}, 0)
        check("", {"max_bad_share": self.max_bad_share}, 0, 1)
        if (self.input.images is None) == (self.input.shards is None):
            raise ValueError("give one of input.images (a folder of images) and input.shards (tars).")
        if self.crops.min_side > self.image.side:
            raise ValueError(f"crops.min_side={self.crops.min_side} must be at most image.side={self.image.side}.")
        if self.caption.by == "given" and self.input.shards is None:
            raise ValueError("caption.by=given needs input.shards: images in a folder have no captions.")
