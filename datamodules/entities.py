"""Constructed samples as prompts: each entity's words in the caption are followed by its segmented image.

Matching, order and draws are the released code's (released-code.md, "Open-images rows"), so recorded draws give the
recorded tokens. The paper (section 3.1) drops the words of each entity by itself; that is the other `drop` rule.
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
    """Whose words one draw drops: all of the caption's (released code) or one entity's (paper, section 3.1)."""
    drop_probability: float = 0.5
    """Probability that entity words are dropped (0 … 1)."""
    background_probability: float = 0.5
    """Probability that an entity is shown with its background instead of on white (0 … 1)."""
    ignored_words: tuple[str, ...] = field(default=COLOURS)
    """Entities that are never illustrated: a crop does not show "red"."""

    def __post_init__(self):
        for name in ("drop_probability", "background_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"entities.{name}={getattr(self, name)} must lie in 0 … 1.")
        if self.drop not in ("per_caption", "per_entity"):
            raise ValueError(f"entities.drop='{self.drop}' must be per_caption or per_entity.")
        self.ignored_words = tuple(self.ignored_words)


def entity_segments(sample: ConstructedSample, rules: EntityRules, draws: Draws) -> list[str | SampleImage]:
    """Caption and entities → interleaved segments. A sample of which no entity is found gives its caption alone.

    Draws, in this order: `per_caption`: one for the words of all entities, then one per image; `per_entity`: for each
    entity one for its words and one for its image.

    Raises:
        FilteredSample: `nothing_before_object` - `per_caption` only: nothing would precede the image. The released
            code leaves such rows out; the paper's rule keeps them, with the image at the start.
    """
    released = rules.drop == "per_caption"
    drop = released and draws.random() < rules.drop_probability
    segments: list[str | SampleImage] = []
    rest = sample.caption
    for entity, word in illustrated(sample.caption, sample.entities, rules.ignored_words):
        match = word.search(rest)
        if match is None:  # its word was part of an earlier entity's
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


def illustrated(caption: str, entities: list[Entity], ignored: tuple[str, ...]) -> list[tuple[Entity, re.Pattern]]:
    """The entities that can be placed, by where their first match in the caption ends, with what matches them.

    Left out: ignored words, words that are not in the caption, and ambiguous ones, which are whole words of more than
    one entity ("dog" beside "hot dog").
    """
    placed = []
    for entity in entities:
        word = re.compile(rf"\b{re.escape(entity.text)}\b", re.IGNORECASE)
        match = word.search(caption)
        ambiguous = sum(bool(word.search(other.text)) for other in entities) > 1
        if match and not ambiguous and entity.text.lower() not in ignored:
            placed.append((match.end(), entity, word))
    return [(entity, word) for _, entity, word in sorted(placed, key=lambda item: item[0])]
