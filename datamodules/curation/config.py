"""Configuration of a curation: input, models, filters and output. Values are in configs/curation/."""

from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.entities import COLOURS
from datamodules.images import Limits

EXECUTION = ("output", "ray", "device", "max_bad_share", "min_bad_count", "sheet")
"""Keys that do not affect the content of the shards. Neither does `pool`."""

PROMPT = """\
Below is the caption of a photo. List the things in it that could be cut out of the photo: people, animals and \
objects in front. Leave out places, backgrounds, weather, colours and materials. Copy each thing's noun from the \
caption letter by letter, without article and adjectives. Answer with one line, the nouns separated by commas. If \
there is nothing to list, answer: none.

Caption: a small brown dog and a child with a kite on the beach
Things: dog, child, kite

Caption: a foggy valley at sunrise
Things: none

Caption: {caption}
Things:"""


def check_range(config: Any, section: str, least: float, most: float | None = None, *names: str) -> None:
    """Raise ValueError if one of the named values is out of range."""
    for name in names:
        value = getattr(config, name)
        if value < least or (most is not None and value > most):
            allowed = f"at least {least:g}" if most is None else f"in {least:g} … {most:g}"
            raise ValueError(f"{section}.{name}={value} must be {allowed}.".removeprefix("."))


@dataclass
class Input:
    """The input: either `images` or `shards`."""

    images: str | None = None
    """Folder. All jpg, png and webp files below it are read, sorted by path, except for hidden files and links to the
    outside."""
    shards: str | None = None
    """Path, glob or brace list of tars with one image per sample, as img2dataset writes them."""
    chunk_size: int = 1000
    """Images per chunk. The samples of a chunk become one output shard."""
    limits: Limits = field(default_factory=Limits)
    """Upper limits for one image."""

    def __post_init__(self):
        check_range(self, "input", 1, None, "chunk_size")


@dataclass
class Stored:
    """How images and crops are stored."""

    side: int = 512
    """Side in pixels to which the centre square is resized. The released code also crops to the centre square first."""
    min_side: int = 384
    """Drop images whose width or height has fewer pixels."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    """Format of targets and crops."""
    quality: int = 95
    """Quality of JPEG and WebP, 1 … 100."""

    def __post_init__(self):
        check_range(self, "image", 8, None, "side")
        check_range(self, "image", 1, None, "min_side")
        check_range(self, "image", 1, 100, "quality")


@dataclass
class Pool:
    """The Ray actors of one model."""

    actors: int = 1
    """Number of processes, each with its own copy of the model."""
    cpus: float = 1
    """Cores per actor; rounded down, also its number of threads."""
    gpus: float = 0
    """GPUs per actor; with fractions, actors share a GPU."""

    def __post_init__(self):
        check_range(self, "pool", 1, None, "actors")
        check_range(self, "pool", 0, None, "cpus", "gpus")


@dataclass
class Model:
    """A stage with a model."""

    model: str = ""
    """Folder or Hub id."""
    revision: str | None = None
    """Commit, branch or tag on the Hub; set a commit for reproducibility."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Precision of the weights and of the computation."""
    batch_size: int = 32
    """Samples per batch. A batch never spans chunks, so the result does not depend on the workers."""
    pool: Pool = field(default_factory=Pool)
    """Workers that run the model."""

    def __post_init__(self):
        check_range(self, type(self).__name__.lower(), 1, None, "batch_size")


@dataclass
class Safety(Model):
    """The first stage: drops images that a classifier considers unsafe."""

    enabled: bool = True
    """Enable the filter."""
    model: str = "CompVis/stable-diffusion-safety-checker"
    """Stable Diffusion's safety checker, or any image classifier of transformers (AutoModelForImageClassification)."""
    blocked_labels: list[str] = field(default_factory=lambda: ["nsfw"])
    """Unsafe labels of a classifier. The safety checker has its own thresholds."""
    threshold: float = 0.5
    """With a classifier, an image is unsafe if the blocked labels have at least this total probability (0 … 1)."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "safety", 0, 1, "threshold")


@dataclass
class Caption(Model):
    """Captioning."""

    by: Literal["blip2", "given", "toyland"] = "blip2"
    """blip2: BLIP-2; given: the txt files of the input; toyland: Toyland's ground truth."""
    model: str = "Salesforce/blip2-opt-6.7b"
    """A BLIP-2 model of transformers; the default is the paper's."""
    max_new_tokens: int = 30
    """Maximum length of a caption in tokens; decoding is greedy."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "caption", 1, None, "max_new_tokens")


@dataclass
class TextFilter:
    """Which captions are dropped."""

    blocked: list[str] = field(default_factory=list)
    """Drop captions that contain one of these words or phrases, as whole words and ignoring case."""
    min_words: int = 3
    """Drop shorter captions."""
    max_words: int = 60
    """Drop longer captions."""
    max_repeats: int = 2
    """Drop captions that contain the same three consecutive words more often, as from a decoder in a loop."""

    def __post_init__(self):
        check_range(self, "text_filter", 1, None, "min_words", "max_words", "max_repeats")


@dataclass
class Entities(Model):
    """Extraction of the entities that a caption mentions."""

    by: Literal["language_model", "toyland"] = "language_model"
    """language_model: a chat model; toyland: Toyland's ground truth."""
    model: str = "mosaicml/mpt-7b-instruct"
    """An instruction-tuned causal language model of transformers; the default is the paper's."""
    prompt: str = PROMPT
    """Instruction, in which {caption} is replaced by the caption."""
    chat_template: str | None = None
    """Jinja chat template; null uses the tokenizer's own (MPT's tokenizer has none)."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""
    max_new_tokens: int = 48
    """Maximum length of an answer in tokens; decoding is greedy."""
    max_words: int = 4
    """Maximum length of an entity in words; longer parts of an answer are ignored as prose."""
    max_entities: int = 8
    """Maximum number of entities per caption; the first ones of the answer are used."""
    ignored_words: list[str] = field(default_factory=lambda: list(COLOURS))
    """Words that are never entities, because a crop cannot show them, such as "red"."""

    def __post_init__(self):
        super().__post_init__()
        check_range(self, "entities", 1, None, "max_new_tokens", "max_words", "max_entities")
        if "{caption}" not in self.prompt:
            raise ValueError("entities.prompt must contain {caption}, which is replaced by the caption.")


@dataclass
class Masks(Model):
    """Segmentation: a heat map of each entity."""

    by: Literal["clipseg", "toyland"] = "clipseg"
    """clipseg: CLIPSeg; toyland: Toyland's ground truth."""
    model: str = "CIDAS/clipseg-rd64-refined"
    """A CLIPSeg model of transformers."""


@dataclass
class Crops:
    """How a heat map becomes a mask and two crops, and which entities are skipped."""

    threshold: float = 0.3
    """Heat above which a pixel belongs to the entity (0 … 1); the released code's value."""
    dilation: float = 0.01
    """Side of the square that dilates the mask, in image sides (0: none); the released code's value."""
    min_area: float = 0.005
    """Minimum area of a mask, as a share of the image."""
    max_area: float = 0.95
    """Maximum area of a mask, as a share of the image; a larger one does not separate the entity."""
    min_side: int = 24
    """Minimum side of a crop in pixels."""

    def __post_init__(self):
        check_range(self, "crops", 0, 1, "threshold", "dilation", "min_area", "max_area")
        check_range(self, "crops", 1, None, "min_side")


@dataclass
class Toyland:
    """Toyland's ground truth: determines which scene an image of the input shows."""

    seed: int = 0
    """Seed with which the data were drawn (configs/toyland/data.yaml)."""
    split: str = "train"
    """Prefix of the Toyland caption shards that the images come from."""


@dataclass
class Ray:
    """The Ray cluster."""

    address: str | None = None
    """Address of a running cluster ("auto" finds one); null starts Ray on this machine."""
    cpus: int | None = None
    """Number of cores given to Ray if it is started here; null uses all cores, a larger number oversubscribes them."""


@dataclass
class Curation:
    """Configuration of `python -m datamodules.curation`."""

    output: str = "data/constructed"
    """Folder of the shards; on a cluster, all nodes must share it."""
    prefix: str = "train"
    """Prefix of the shards' names."""
    seed: int = 0
    """Seed of Toyland's heat maps and of the choice of samples on the contact sheet."""
    device: str = "auto"
    """Device of the models: cpu, cuda, or auto, which uses a GPU if there is one."""
    max_bad_share: float = 0.05
    """Maximum share of images, and of shards, that may fail (unreadable, model failed, answer unparsable), 0 … 1."""
    min_bad_count: int = 100
    """Fewer failed images than this never stop the job."""
    sheet: int = 16
    """Samples on the contact sheet of the report; 0 draws none."""
    input: Input = field(default_factory=Input)
    """Images."""
    image: Stored = field(default_factory=Stored)
    """Storage of images."""
    safety: Safety = field(default_factory=Safety)
    """Image filter."""
    caption: Caption = field(default_factory=Caption)
    """Captioning."""
    text_filter: TextFilter = field(default_factory=TextFilter)
    """Caption filter."""
    entities: Entities = field(default_factory=Entities)
    """Entity extraction."""
    masks: Masks = field(default_factory=Masks)
    """Segmentation."""
    crops: Crops = field(default_factory=Crops)
    """Masks and crops."""
    toyland: Toyland = field(default_factory=Toyland)
    """Toyland's ground truth, if a stage uses it."""
    ray: Ray = field(default_factory=Ray)
    """Ray cluster."""

    def __post_init__(self):
        check_range(self, "", 0, None, "seed", "min_bad_count", "sheet")
        check_range(self, "", 0, 1, "max_bad_share")
        if (self.input.images is None) == (self.input.shards is None):
            raise ValueError("set exactly one of input.images (a folder of images) and input.shards (tars).")
        if self.crops.min_side > self.image.side:
            raise ValueError(f"crops.min_side={self.crops.min_side} must be at most image.side={self.image.side}.")
        if self.caption.by == "given" and self.input.shards is None:
            raise ValueError("caption.by=given needs input.shards, because images in a folder have no captions.")
