"""Configuration of Toyland's data: sizes and properties of the samples. Values are in configs/toyland/data.yaml."""

from dataclasses import dataclass, field


def _check(owner: str, values: dict[str, int | float], *, least: int = 0, most: float | None = None) -> None:
    for name, value in values.items():
        if value < least or (most is not None and value > most):
            allowed = f"at least {least}" if most is None else f"in {least} … {most:g}"
            raise ValueError(f"{owner}{name}={value} must be {allowed}.")


@dataclass
class Shards:
    """Shards of one kind of sample."""

    train: int = 1000
    """Training samples."""
    val: int = 256
    """Held-out samples, with other subjects."""

    def __post_init__(self):
        _check(f"{type(self).__name__.lower()}.", {"train": self.train, "val": self.val}, least=1)


@dataclass
class Text(Shards):
    """Stories of a few sentences."""


@dataclass
class Captions(Shards):
    """Images with captions."""

    told: float = 0.5
    """Share of captions that describe the subjects' looks (0 … 1)."""

    def __post_init__(self):
        super().__post_init__()
        _check("captions.", {"told": self.told}, most=1)


@dataclass
class Interleaved(Shards):
    """Documents of texts and images."""


@dataclass
class Constructed(Shards):
    """Captions with crops of their entities, and the scene as target."""

    with_article: float = 0.5
    """Share of captions with articles, "a cat" instead of "cat" as in DreamBench's prompts (0 … 1)."""
    other_render: float = 0.5
    """Probability that an entity's crops come from another image of the same subject (0 … 1)."""
    told: float = 0.0
    """Share of captions that describe the subjects' looks (0 … 1); descriptions always do."""

    def __post_init__(self):
        super().__post_init__()
        shares = {"with_article": self.with_article, "other_render": self.other_render, "told": self.told}
        _check("constructed.", shares, most=1)


@dataclass
class Edit(Shards):
    """Images, instructions and edited images."""


@dataclass
class DreamBench:
    """Held-out subjects for the evaluation."""

    objects: int = 21
    """Number of objects."""
    live: int = 9
    """Number of animals."""
    images: int = 4
    """Images per subject; the first one is the input of models."""

    def __post_init__(self):
        _check("dreambench.", {"objects": self.objects, "live": self.live})
        _check("dreambench.", {"images": self.images}, least=1)
        if self.objects + self.live < 1:
            raise ValueError("dreambench.objects=0 and dreambench.live=0 leave no subject.")


@dataclass
class Coco:
    """New scenes with one caption each, for the evaluation."""

    images: int = 2000
    """Number of images; every other caption describes the subjects' looks."""

    def __post_init__(self):
        _check("coco.", {"images": self.images}, least=2)


@dataclass
class ToylandData:
    """Configuration of `python -m datamodules.toyland`."""

    output: str = "data/toyland"
    """Folder for shards/, dreambench/ and coco/."""
    seed: int = 0
    """Seed of all subjects, scenes and texts."""
    processes: int | None = None
    """Number of worker processes; null: one per CPU core. The data do not depend on it."""
    samples_per_shard: int = 1000
    """Samples per shard."""
    text: Text = field(default_factory=lambda: Text(train=6000))
    """Text corpus."""
    captions: Captions = field(default_factory=lambda: Captions(train=7000))
    """Image-caption pairs."""
    interleaved: Interleaved = field(default_factory=lambda: Interleaved(train=1500))
    """Interleaved documents."""
    constructed: Constructed = field(default_factory=lambda: Constructed(train=8000))
    """Composition samples (paper Fig. 4)."""
    edit: Edit = field(default_factory=lambda: Edit(train=6000))
    """Edit samples, as in InstructPix2Pix."""
    dreambench: DreamBench = field(default_factory=DreamBench)
    """Held-out subjects."""
    coco: Coco = field(default_factory=Coco)
    """Held-out scenes."""

    def __post_init__(self):
        _check("", {"seed": self.seed})
        _check("", {"samples_per_shard": self.samples_per_shard}, least=1)
        if self.processes is not None:
            _check("", {"processes": self.processes}, least=1)
