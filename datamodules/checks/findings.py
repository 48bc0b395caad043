"""What a check found: sums that add up over parts of the shards."""

from collections import Counter
from dataclasses import dataclass, field

from datamodules.checks.histogram import SIDE_EDGES, TOKEN_EDGES, Histogram
from datamodules.errors import SampleError
from datamodules.sample import SCHEMA_VERSION

EXAMPLES = 5
"""Unusable samples of each reason that are named."""


@dataclass
class Findings:
    """Counts of what was looked at; `samples` is `good` and all that was `dropped`.

    Args:
        unit: what the histograms of texts count.
    """

    unit: str
    samples: int = 0
    good: int = 0
    images: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)
    captions: Histogram = field(init=False)
    documents: Histogram = field(init=False)
    sides: Histogram = field(init=False)

    def __post_init__(self):
        self.captions = Histogram(self.unit, TOKEN_EDGES)
        self.documents = Histogram(self.unit, TOKEN_EDGES)
        self.sides = Histogram("pixels of the shorter side", SIDE_EDGES)

    def drop(self, error: SampleError, count: int = 1) -> None:
        """Count samples that cannot be used for one reason, and keep the first few errors."""
        self.samples += count
        self.dropped[error.reason] += count
        listed = self.examples.setdefault(error.reason, [])
        if len(listed) < EXAMPLES:
            listed.append({"shard": error.shard, "key": error.key, "detail": error.detail})

    def __iadd__(self, other: "Findings") -> "Findings":
        self.samples += other.samples
        self.good += other.good
        self.images += other.images
        self.dropped += other.dropped
        self.kinds += other.kinds
        for reason, listed in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine += listed[: EXAMPLES - len(mine)]
        self.captions += other.captions
        self.documents += other.documents
        self.sides += other.sides
        return self

    def record(self) -> dict:
        """Plain values for JSON."""
        return {
            "schema": SCHEMA_VERSION,
            "samples": self.samples,
            "good": self.good,
            "dropped": dict(self.dropped.most_common()),
            "kinds": dict(self.kinds.most_common()),
            "images": self.images,
            "caption_tokens": self.captions.record(),
            "document_tokens": self.documents.record(),
            "image_sides": self.sides.record(),
            "examples": self.examples,
        }
