"""Turn constructed samples into prompts in which each entity's words are followed by its segmented image.

Matching and the order of entities and random draws follow the released code (released-code.md, "Open-images rows"), so
that recorded draws reproduce recorded tokens. With `drop: per_entity`, the words of each entity are dropped
independently, as in the paper (section 3.1).
"""

import re
from dataclasses import dataclass, field
from typing import Literal, Protocol

from datamodules.errors import FilteredSample
from datamodules.images import SampleImage
from datamodules.sample import ConstructedSample, Entity

OBJECT_END = re.compile(r"[ ,.!?;:)\]}]")
COLOURS = (
    "beige", "black", "blue", "brown", "cyan", "gold", "golden", "gray", "green", "grey", "magenta", "maroon", "navy",
    "orange", "pink", "purple", "red", "silver", "tan", "teal", "turquoise", "violet", "white", "yellow",
)  # fmt: skip


class Draws(Protocol):
    """The random numbers of one sample: `random.Random`, or recorded draws in a test."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def randint(self, a: int, b: int) -> int:
        """Uniform in a … b, both included."""
        ...


@dataclass
class EntityRules:
    """How a caption and its entities become a prompt."""

    drop: Literal["per_caption", "per_entity"] = "per_entity"
    """Drop the words of all entities of a caption together (released code), or of each entity independently (paper,
    section 3.1)."""
    drop_probability: float = 0.5
    """Probability that the words are dropped (0 … 1)."""
    background_probability: float = 0.5
    """Probability that an entity is shown with its background instead of on white (0 … 1)."""
    ignored_words: tuple[str, ...] = field(default=COLOURS)
    """Entities that never get an image, because a crop cannot show them, such as "red"."""

    def __post_init__(self):
        for name in ("drop_probability", "background_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"entities.{name}={getattr(self, name)} must lie in 0 … 1.")
        if self.drop not in ("per_caption", "per_entity"):
            raise ValueError(f"entities.drop='{self.drop}' must be per_caption or per_entity.")
        self.ignored_words = tuple(self.ignored_words)


def entity_segments(sample: ConstructedSample, rules: EntityRules, draws: Draws) -> list[str | SampleImage]:
    """Interleave a caption with the images of its entities. If no entity is found, the caption is the only segment.

    Order of the draws: with `per_caption`, one for the words of all entities, then one per image; with `per_entity`,
    one for the words and one for the image of each entity.

    Raises:
        FilteredSample: `nothing_before_object`, only with `per_caption`: no text precedes the image. The released code
            skips such rows. With `per_entity`, the prompt begins with the image.
    """
    released = rules.drop == "per_caption"
    drop = released and draws.random() < rules.drop_probability
    segments: list[str | SampleImage] = []
    rest = sample.caption
    for entity, word in match_entities(sample.caption, sample.entities, rules.ignored_words):
        match = word.search(rest)
        if match is None:  # its words were part of an earlier entity's
            continue
        if not released:
            drop = draws.random() < rules.drop_probability
        end = OBJECT_END.search(rest, match.end())
        stop = end.start() if end else len(rest)
        text = rest[: match.start() if drop else stop]
        if released and not text:
            raise FilteredSample("nothing_before_object", sample.shard, sample.key, f"caption {sample.caption!r:.80}")
        if text:
            segments.append(text if text.endswith(" ") else text + " ")
        with_background = draws.random() > 1 - rules.background_probability
        segments.append(entity.background if with_background else entity.white)
        rest = rest[stop:]
    return [*segments, rest] if rest else segments


def match_entities(caption: str, entities: list[Entity], ignored: tuple[str, ...]) -> list[tuple[Entity, re.Pattern]]:
    """Return the entities found in the caption with their patterns, sorted by the end of their first match.

    Ignored words are skipped, and so are ambiguous ones that also occur in another entity ("dog" beside "hot dog").
    """
    matches = []
    for entity in entities:
        word = re.compile(rf"\b{re.escape(entity.text)}\b", re.IGNORECASE)
        match = word.search(caption)
        ambiguous = sum(bool(word.search(other.text)) for other in entities) > 1
        if match and not ambiguous and entity.text.lower() not in ignored:
            matches.append((match.end(), entity, word))
    return [(entity, word) for _, entity, word in sorted(matches, key=lambda item: item[0])]
