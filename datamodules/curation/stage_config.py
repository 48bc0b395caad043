"""The stages' parts of the configuration: which models are asked and what is left out."""

from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.entities import COLOURS

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


def check(owner: str, values: dict[str, float], least: float, most: float | None = None) -> None:
    """Raises ValueError naming key, value and what is allowed."""
    for name, value in values.items():
        if value < least or (most is not None and value > most):
            allowed = f"at least {least:g}" if most is None else f"in {least:g} … {most:g}"
            raise ValueError(f"{owner}.{name}={value} must be {allowed}.".removeprefix("."))


@dataclass
class Pool:
    """The workers of one group of stages under Ray."""

    actors: int = 1
    """Processes."""
    cpus: float = 1
    """Cores for each; whole ones are also the threads of its arithmetic, with either engine."""
    gpus: float = 0
    """GPUs for each; fractions share one."""

    def __post_init__(self):
        check("pool", {"actors": self.actors}, 1)
        check("pool", {"cpus": self.cpus, "gpus": self.gpus}, 0)

    @property
    def threads(self) -> int:
        """Threads of arithmetic on the CPU."""
        return max(1, int(self.cpus))


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
    """Samples at once; batches are cut inside a chunk, so they do not depend on the engine."""
    pool: Pool = field(default_factory=Pool)
    """Its workers under Ray."""

    def __post_init__(self):
        check(type(self).__name__.lower(), {"batch_size": self.batch_size}, 1)


@dataclass
class Safety(Model):
    """Leaves out images that a classifier calls unsafe, before anything else is done with them."""

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
        check("safety", {"threshold": self.threshold}, 0, 1)


@dataclass
class Caption(Model):
    """One caption for each image."""

    by: Literal["blip2", "given", "toyland"] = "blip2"
    """Who says it: BLIP-2, the input's own txt, or Toyland's ground truth."""
    model: str = "Salesforce/blip2-opt-6.7b"
    """A BLIP-2 of transformers; the paper's is the default."""
    max_new_tokens: int = 30
    """Longest caption in tokens; decoding is greedy."""

    def __post_init__(self):
        super().__post_init__()
        check("caption", {"max_new_tokens": self.max_new_tokens}, 1)


@dataclass
class TextFilter:
    """Captions that are left out."""

    blocked: list[str] = field(default_factory=list)
    """Words and phrases; a caption in which one stands as whole words, in any case, is left out. Empty: off."""
    min_words: int = 3
    """Shorter captions are left out."""
    max_words: int = 60
    """Longer ones too."""
    max_repeats: int = 2
    """A caption in which the same three words in a row stand more often comes of a decoder that runs in a circle."""

    def __post_init__(self):
        check("text_filter", {"min_words": self.min_words, "max_words": self.max_words}, 1)
        check("text_filter", {"max_repeats": self.max_repeats}, 1)


@dataclass
class Entities(Model):
    """The things that a caption names."""

    by: Literal["language_model", "toyland"] = "language_model"
    """Who names them: a chat model, or Toyland's ground truth."""
    model: str = "mosaicml/mpt-7b-instruct"
    """A causal language model of transformers that follows instructions; the paper's is the default."""
    prompt: str = PROMPT
    """What it is asked; {caption} stands for the caption."""
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
        check("entities", {"max_new_tokens": self.max_new_tokens, "max_words": self.max_words}, 1)
        check("entities", {"max_entities": self.max_entities}, 1)
        if "{caption}" not in self.prompt:
            raise ValueError("entities.prompt must hold {caption}, which stands for the caption.")


@dataclass
class Masks(Model):
    """A heat map of each entity."""

    by: Literal["clipseg", "toyland"] = "clipseg"
    """Who draws it: CLIPSeg, or Toyland's ground truth."""
    model: str = "CIDAS/clipseg-rd64-refined"
    """A CLIPSeg of transformers."""


@dataclass
class Crops:
    """How a heat map becomes a mask and two crops; which are left out."""

    threshold: float = 0.3
    """Heat above which a pixel belongs to the entity (0 … 1); the released code's value."""
    dilation: float = 0.01
    """Side of the square by which the mask grows, in image sides (0: none); the released code's value."""
    min_area: float = 0.005
    """Smallest mask, in parts of the image."""
    max_area: float = 0.95
    """Largest mask, in parts of the image: above it nothing was told apart."""
    min_side: int = 24
    """Smallest crop in pixels."""

    def __post_init__(self):
        shares = {name: getattr(self, name) for name in ("threshold", "dilation", "min_area", "max_area")}
        check("crops", shares, 0, 1)
        check("crops", {"min_side": self.min_side}, 1)


@dataclass
class Toyland:
    """Toyland's ground truth: which scenes the input's pictures are, and how badly the true masks are told."""

    seed: int = 0
    """The data's own seed (configs/toyland/data.yaml)."""
    split: str = "train"
    """Which of Toyland's caption shards the pictures come from: their prefix."""
    heat_side: int = 64
    """Side of the heat maps in pixels."""
    blur: float = 0.02
    """Standard deviation of the blur, in image sides."""
    noise: float = 0.05
    """Standard deviation of the noise on the heat."""
    specks: int = 2
    """Spots elsewhere that are as hot as the entity, for the largest region to leave out."""

    def __post_init__(self):
        check("toyland", {"heat_side": self.heat_side}, 8)
        check("toyland", {"blur": self.blur, "noise": self.noise, "specks": self.specks, "seed": self.seed}, 0)
