"""Text corpora for stage 1: JSON lines, JSON and Parquet with a column of texts, and plain text files."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datamodules.errors import FilteredSample, SampleError
from datamodules.sample import TextSample
from datamodules.sources.config import ConversionConfig, at_least
from datamodules.sources.files import find_files, lines, plain_suffix
from datamodules.sources.layout import Layout, Numbered, Record
from datamodules.sources.tables import TABLE_SUFFIXES, decoded, parse, rows, text_of

CUTS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+", r"\s+")]
"""Where a text that is too long is divided, best first: between paragraphs, lines, sentences, words."""


@dataclass
class TextConfig(ConversionConfig):
    """A text corpus."""

    column: str = "text"
    """Where a row of JSON or Parquet holds its text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one document of a plain text file is; paragraphs are parted by blank lines."""
    min_characters: int = 1
    """Shorter documents are left out."""
    max_characters: int = 50_000
    """Longer documents are divided, between paragraphs or sentences, into samples of at most this length."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_characters", self.min_characters, 1)
        at_least("max_characters", self.max_characters, 100)


class Text(Layout[TextConfig]):
    """Documents become text samples, nothing but blanks at their ends is changed."""

    schema = TextConfig

    def files(self) -> list[Path]:
        return find_files(self.source, (*TABLE_SUFFIXES, ".txt"))

    def records(self, file: Path, start: int) -> Numbered:
        if plain_suffix(file) in TABLE_SUFFIXES:
            return rows(file, start, self.config.max_record_bytes, self.name_of(file), [self.config.column])
        return self._blocks(file, start)

    def samples(self, record: Record, left_out: Counter[str]) -> Iterable[TextSample]:
        if plain_suffix(Path(record.name)) not in TABLE_SUFFIXES:
            text = decoded(record, record.content)
        else:
            row = parse(record)
            if self.config.column not in row:
                raise record.error("missing_column", f"no '{self.config.column}' among {', '.join(row)[:200]}")
            text = text_of(record, row[self.config.column], self.config.column)
        text = text.strip()
        if not text:
            raise record.error("empty_text", "the document holds blanks only")
        if len(text) < self.config.min_characters:
            detail = f"{len(text)} characters, at least {self.config.min_characters}"
            raise FilteredSample("text_too_short", record.name, str(record.number), detail)
        return map(TextSample, divided(text, self.config.max_characters))

    def _blocks(self, file: Path, start: int) -> Numbered:
        """Documents of a plain text file; a file that is one document comes in blocks of whole lines."""
        number, block, size = 0, [], 0

        def ready() -> Numbered:
            if number >= start and any(line.strip() for line in block):
                yield number, b"\n".join(block)

        for _, line in _with_blank_lines(file, self.config.max_record_bytes, self.name_of(file)):
            if isinstance(line, SampleError):
                if number >= start:
                    yield number, line
                number += 1
                continue
            ends = self.config.documents == "line" or (self.config.documents == "paragraph" and not line.strip())
            block.append(line)
            size += len(line) + 1
            if ends or size > self.config.max_characters:
                yield from ready()
                number, block, size = number + 1, [], 0
        yield from ready()


def divided(text: str, longest: int) -> Iterator[str]:
    """Parts of at most `longest` characters, cut where it hurts least."""
    while len(text) > longest:
        # A cut in the first half would make needlessly short samples.
        places = ([match.start() for match in cut.finditer(text, longest // 2, longest)] for cut in CUTS)
        end = next((found[-1] for found in places if found), longest)
        yield text[:end].strip()
        text = text[end:].strip()
    if text:
        yield text


def _with_blank_lines(file: Path, limit: int, name: str) -> Numbered:
    """`lines` with the blank ones, which part paragraphs."""
    expected = 0
    for number, line in lines(file, 0, limit, name):
        yield from ((blank, b"") for blank in range(expected, number))
        yield number, line
        expected = number + 1
