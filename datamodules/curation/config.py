"""What a curation reads, which models it asks, what it drops and where it writes; values in configs/curation/."""

from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.entities import COLOURS
from datamodules.images import Limits

EXECUTION = ("output", "ray", "device", "max_bad_share", "min_bad_count", "sheet")
"""Keys on which the content of the shards does not depend; neither does it on `pool`."""

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


def check(config: Any, section: str, least: float, most: float | None = None, *names: str) -> None:
    """Raises ValueError naming key, value and what is allowed."""
    for name in names:
        value = getattr(config, name)
        if value < least or (most is not None and value > most):
            allowed = f"at least {least:g}" if most is None else f"in {least:g} … {most:g}"
            raise ValueError(f"{section}.{name}={value} must be {allowed}.".removeprefix("."))


@dataclass
class Input:
    """Where the images are; one of `images` and `shards`."""

    images: str | None = None
    """A folder; every jpg, png and webp below it is read, in order of path. Dot files and links out of it are not."""
    shards: str | None = None
    """Path, glob or brace list of tars with one image a sample, such as img2dataset writes."""
    chunk_size: int = 1000
    """Images of a chunk; what is kept of them is one output shard."""
    limits: Limits = field(default_factory=Limits)
    """What one image may cost."""

    def __post_init__(self):
        check(self, "input", 1, None, "chunk_size")


@dataclass
class Stored:
    """The images as they are stored; crops are encoded alike."""

    side: int = 512
    """Pixels: the centre square, as the released code cuts it before all else, is resized to it."""
    min_side: int = 384
    """Pixels; images with a smaller width or height are dropped."""
    format: Literal["jpg", "png", "webp"] = "jpg"
    """Of targets and crops."""
    quality: int = 95
    """Of JPEG and WebP, 1 … 100."""

    def __post_init__(self):
        check(self, "image", 8, None, "side")
        check(self, "image", 1, None, "min_side")
        check(self, "image", 1, 100, "quality")


@dataclass
class Pool:
    """The Ray actors that hold one model."""

    actors: int = 1
    """Processes."""
    cpus: float = 1
    """Cores for each; whole ones are also the threads that it computes with."""
    gpus: float = 0
    """GPUs for each; fractions share one."""

    def __post_init__(self):
        check(self, "pool", 1, None, "actors")
        check(self, "pool", 0, None, "cpus", "gpus")


@dataclass
class Model:
    """A stage that asks a model."""

    model: str = ""
    """Folder or Hub id."""
    revision: str | None = None
    """Commit, branch or tag on the Hub; name a commit to be able to repeat the curation."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    """Of its weights and arithmetic."""
    batch_size: int = 32
    """Samples at once; batches are cut inside a chunk, so they do not depend on the workers."""
    pool: Pool = field(default_factory=Pool)
    """Its workers."""

    def __post_init__(self):
        check(self, type(self).__name__.lower(), 1, None, "batch_size")


@dataclass
class Safety(Model):
    """Drops images that a classifier calls unsafe, before anything else is done with them."""

    enabled: bool = True
    """Whether images are classified."""
    model: str = "CompVis/stable-diffusion-safety-checker"
    """Stable Diffusion's safety checker, or any image classifier of transformers (AutoModelForImageClassification)."""
    blocked_labels: list[str] = field(default_factory=lambda: ["nsfw"])
    """Of a classifier: labels that are unsafe. The safety checker has its own thresholds."""
    threshold: float = 0.5
    """Of a classifier: an image is unsafe if blocked labels have at least this probability together (0 … 1)."""

    def __post_init__(self):
        super().__post_init__()
        check(self, "safety", 0, 1, "threshold")


@dataclass
class Caption(Model):
    """One caption for each image."""

    by: Literal["blip2", "given", "toyland"] = "blip2"
    """BLIP-2, the input's own txt, or Toyland's ground truth."""
    model: str = "Salesforce/blip2-opt-6.7b"
    """A BLIP-2 of transformers; the paper's is the default."""
    max_new_tokens: int = 30
    """Longest caption in tokens; decoding is greedy."""

    def __post_init__(self):
        super().__post_init__()
        check(self, "caption", 1, None, "max_new_tokens")


@dataclass
class TextFilter:
    """Captions that are dropped."""

    blocked: list[str] = field(default_factory=list)
    """Words and phrases; a caption that holds one as whole words, in any case, is dropped. Empty: off."""
    min_words: int = 3
    """Shorter captions are dropped."""
    max_words: int = 60
    """Longer captions are dropped."""
    max_repeats: int = 2
    """A caption that holds the same three words in a row more often comes from a decoder in a loop."""

    def __post_init__(self):
        check(self, "text_filter", 1, None, "min_words", "max_words", "max_repeats")


@dataclass
class Entities(Model):
    """The things that a caption names."""

    by: Literal["language_model", "toyland"] = "language_model"
    """A chat model, or Toyland's ground truth."""
    model: str = "mosaicml/mpt-7b-instruct"
    """A causal language model of transformers that follows instructions; the paper's is the default."""
    prompt: str = PROMPT
    """What it is asked; {caption} is replaced by the caption."""
    chat_template: str | None = None
    """Jinja template of a conversation; null takes the tokenizer's own (MPT's has none)."""
    template_options: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""
    max_new_tokens: int = 48
    """Longest answer in tokens; decoding is greedy."""
    max_words: int = 4
    """Longest entity in words; longer pieces of an answer are prose."""
    max_entities: int = 8
    """Entities kept of one caption, the first ones of the answer."""
    ignored_words: list[str] = field(default_factory=lambda: list(COLOURS))
    """Never entities: a crop does not show "red"."""

    def __post_init__(self):
        super().__post_init__()
        check(self, "entities", 1, None, "max_new_tokens", "max_words", "max_entities")
        if "{caption}" not in self.prompt:
            raise ValueError("entities.prompt must hold {caption}, which is replaced by the caption.")


@dataclass
class Masks(Model):
    """A heat map of each entity."""

    by: Literal["clipseg", "toyland"] = "clipseg"
    """CLIPSeg, or Toyland's ground truth."""
    model: str = "CIDAS/clipseg-rd64-refined"
    """A CLIPSeg of transformers."""


@dataclass
class Crops:
    """How a heat map becomes a mask and two crops, and which are skipped."""

    threshold: float = 0.3
    """Heat above which a pixel belongs to the entity (0 … 1); the released code's value."""
    dilation: float = 0.01
    """Side of the square by which the mask grows, in image sides (0: none); the released code's value."""
    min_area: float = 0.005
    """Smallest mask, as a share of the image."""
    max_area: float = 0.95
    """Largest mask, as a share of the image: above it nothing was told apart."""
    min_side: int = 24
    """Smallest crop in pixels."""

    def __post_init__(self):
        check(self, "crops", 0, 1, "threshold", "dilation", "min_area", "max_area")
        check(self, "crops", 1, None, "min_side")


@dataclass
class Toyland:
    """Toyland's ground truth: which scenes the input's images show."""

    seed: int = 0
    """The data's own seed (configs/toyland/data.yaml)."""
    split: str = "train"
    """Which of Toyland's caption shards the images come from: their prefix."""


@dataclass
class Ray:
    """Where the work is done."""

    address: str | None = None
    """Of a running cluster ("auto" finds one); null starts Ray on this machine alone."""
    cpus: int | None = None
    """Cores that a Ray started here counts on; null takes those there are, more lets the actors share them."""


@dataclass
class Curation:
    """Everything that `python -m datamodules.curation` needs."""

    output: str = "data/constructed"
    """Folder of the shards; on a cluster, one that all nodes share."""
    prefix: str = "train"
    """Of the shards' names."""
    seed: int = 0
    """Of Toyland's heat maps and of the samples on the sheet."""
    device: str = "auto"
    """Of the models: cpu, cuda, or auto, which is a GPU where there is one."""
    max_bad_share: float = 0.05
    """Largest share of images, and of shards, that may fail (unreadable, model failed, answer unparsable), 0 … 1."""
    min_bad_count: int = 100
    """Fewer failed images never stop the job."""
    sheet: int = 16
    """Samples on the contact sheet of the report; 0 draws none."""
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
    """Workers."""

    def __post_init__(self):
        check(self, "", 0, None, "seed", "min_bad_count", "sheet")
        check(self, "", 0, 1, "max_bad_share")
        if (self.input.images is None) == (self.input.shards is None):
            raise ValueError("give one of input.images (a folder of images) and input.shards (tars).")
        if self.crops.min_side > self.image.side:
            raise ValueError(f"crops.min_side={self.crops.min_side} must be at most image.side={self.image.side}.")
        if self.caption.by == "given" and self.input.shards is None:
            raise ValueError("caption.by=given needs input.shards: images in a folder have no captions.")
