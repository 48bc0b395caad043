"""Filter captions, and parse a language model's answers into entities.

Answers are parsed leniently and then checked against the caption. The remaining entities can be located in training,
which follows the same rules (datamodules/entities.py): they are whole words of the caption, not ignored words, and not
part of another entity.
"""

import json
import re
from collections import Counter

from datamodules.curation.config import Entities, TextFilter
from datamodules.curation.rows import Batch, Row, drop

WORD = re.compile(r"\w+")
NOTHING = frozenset(("none", "nothing", "no things", "no objects", "n/a"))
PREAMBLE = re.compile(r"^[^:\n,]{0,60}:\s*")  # "Things:", "Sure, here are the nouns:"
BULLET = re.compile(r"^\s*(?:[-*•–]|\d+[.)])\s*")
SEPARATOR = re.compile(r"[,;]|\band\b|&")
ARTICLE = re.compile(r"^(?:an?|the|some|two|three|four|five)\s+", re.IGNORECASE)
STRIPPED = " \t\"'`“”‘’.!?()[]*_"


class CaptionFilter:
    """Drops captions that contain blocked words, are too short or too long, or repeat themselves."""

    def __init__(self, config: TextFilter):
        self.config = config
        blocked = "|".join(re.escape(word) for word in config.blocked)
        self.blocked = re.compile(rf"\b(?:{blocked})\b", re.IGNORECASE) if blocked else None

    def __call__(self, batch: Batch) -> Batch:
        """Filter the batch's captions."""
        return [self._filter(row) for row in batch]

    def _filter(self, row: Row) -> Row:
        caption = row["caption"]
        if self.blocked and (match := self.blocked.search(caption)):
            return drop(row, "blocked_text", f"'{match.group()}' in {caption!r}")
        words = [word.lower() for word in WORD.findall(caption)]
        if not self.config.min_words <= len(words) <= self.config.max_words:
            return drop(row, "caption_length", f"{len(words)} words: {caption!r}")
        trigrams = Counter(zip(words, words[1:], words[2:], strict=False))
        trigram, times = trigrams.most_common(1)[0] if trigrams else ((), 0)
        if times > self.config.max_repeats:
            return drop(row, "repeated_words", f"'{' '.join(trigram)}' {times} times in {caption!r}")
        return row


class CheckEntities:
    """`answer` → `entities`. Rows without entities are dropped.

    `unparsable_answer` (an empty answer, or prose) counts as a failure of the model. `no_entities` does not: the model
    lists none, or no candidate is usable. Rejected candidates are counted in `skipped_entities`.
    """

    def __init__(self, config: Entities):
        self.config = config
        self.ignored = {word.lower() for word in config.ignored_words}

    def __call__(self, batch: Batch) -> Batch:
        """Check the batch's answers."""
        return [self._check(row) for row in batch]

    def _check(self, row: Row) -> Row:
        candidates = parse_answer(row["answer"], self.config.max_words)
        if candidates is None:
            return drop(row, "unparsable_answer", f"{row['answer']!r} to {row['caption']!r}", filtered=False)
        kept, skipped = choose_entities(candidates, row["caption"], self.ignored, self.config.max_entities)
        row = {name: value for name, value in row.items() if name != "answer"}
        row |= {"entities": [{"text": text} for text in kept], "skipped_entities": row["skipped_entities"] + skipped}
        if not kept:
            detail = f"none of {', '.join(candidates)} is usable" if candidates else "the model lists none"
            return drop(row, "no_entities", f"{detail}: {row['caption']!r}")
        return row


def parse_answer(answer: str, max_words: int) -> list[str] | None:
    """Parse an answer that lists entities as JSON, lines, bullets or with commas. Returns [] for "none", None for prose
    or an empty answer."""
    text = answer.strip()
    pieces = _json_list(text)
    if pieces == []:
        return []
    if pieces is None:
        # The prompt asks for one line. Text after an empty line is prose, or a question that the model makes up.
        lines = [line for line in text.split("\n\n", 1)[0].splitlines() if line.strip()]
        if not lines:
            return None
        if not (len(lines) > 1 and BULLET.match(lines[1])) and not BULLET.match(lines[0]):
            lines = lines[:2] if lines[0].rstrip().endswith(":") else lines[:1]
        lines = [BULLET.sub("", line) for line in lines]
        lines[0] = PREAMBLE.sub("", lines[0])
        pieces = [piece for line in lines for piece in SEPARATOR.split(line)]
    cleaned = [ARTICLE.sub("", piece.strip(STRIPPED)).strip(STRIPPED) for piece in pieces]
    cleaned = [" ".join(piece.split()) for piece in cleaned if piece]
    if cleaned and all(piece.lower() in NOTHING for piece in cleaned):
        return []
    return [piece for piece in cleaned if len(piece.split()) <= max_words] or None


def _json_list(text: str) -> list[str] | None:
    begin, end = text.find("["), text.rfind("]")
    if begin < 0 or end < begin:
        return None
    try:
        listed = json.loads(text[begin : end + 1])
    except (json.JSONDecodeError, RecursionError):
        return None
    return listed if isinstance(listed, list) and all(isinstance(item, str) for item in listed) else None


def choose_entities(
    candidates: list[str], caption: str, ignored: set[str], max_entities: int
) -> tuple[list[str], Counter[str]]:
    """Return the usable candidates, in the spelling and order of the caption, and why the others are skipped."""
    skipped: Counter[str] = Counter()
    found: dict[str, tuple[int, str]] = {}  # lower case → end of its first match, its spelling in the caption
    for candidate in candidates:
        match = re.search(rf"\b{re.escape(candidate)}\b", caption, re.IGNORECASE)
        if match is None:
            skipped["not_in_caption"] += 1
        elif candidate.lower() in ignored:
            skipped["ignored_word"] += 1
        elif candidate.lower() in found:
            skipped["duplicate"] += 1
        elif len(found) == max_entities:
            skipped["too_many"] += 1
        else:
            found[candidate.lower()] = match.end(), match.group()
    kept = []
    for word, place in found.items():
        pattern = re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE)
        if sum(bool(pattern.search(other)) for other in found) > 1:
            skipped["ambiguous"] += 1
        else:
            kept.append(place)
    return [text for _, text in sorted(kept)], skipped
