"""Text corpora for stage 1: tables with a column of texts, and plain text files."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from datamodules.sample import TextSample
from datamodules.sources.converter import ConversionConfig, Converter, at_least
from datamodules.sources.files import Record, Unreadable, lines, plain_suffix, read_streams
from datamodules.sources.tables import TABLE_SUFFIXES, decoded, parse, rows, text_of, value_of

CUTS = [re.compile(pattern) for pattern in (r"\n\s*\n", r"\n", r"(?<=[.!?])\s+", r"\s+")]
"""Where a text that is too long is divided, best first: between paragraphs, lines, sentences, words."""


@dataclass
class TextConfig(ConversionConfig):
    """A text corpus."""

    column: str = "text"
    """Where a row of a table holds its text."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """What one document of a plain text file is; blank lines separate paragraphs."""
    min_characters: int = 1
    """Shorter documents are filtered."""
    max_characters: int = 50_000
    """Longer documents are divided, between paragraphs or sentences, into samples of at most this length."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_characters", self.min_characters, 1)
        at_least("max_characters", self.max_characters, 100)


class Text(Converter[TextConfig]):
    """Documents become text samples, without the white space at their ends."""

    schema = TextConfig
    suffixes = (*TABLE_SUFFIXES, ".txt")

    def records(self, file: Path) -> Iterator[Any]:
        if plain_suffix(file) in TABLE_SUFFIXES:
            return rows(file, self.config.max_record_bytes, [self.config.column])
        return read_streams(file, self._documents)

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[TextSample]:
        column, least = self.config.column, self.config.min_characters
        if plain_suffix(Path(record.name)) in TABLE_SUFFIXES:
            text = text_of(record, value_of(record, parse(record), column), column).strip()
        else:
            text = decoded(record, record.content).strip()
        if not text:
            raise record.error("empty_text", "the document holds white space alone")
        if len(text) < least:
            raise record.filtered("text_too_short", f"{len(text)} characters, at least {least}")
        return map(TextSample, divided(text, self.config.max_characters))

    def _documents(self, stream: IO[bytes]) -> Iterator[bytes | Unreadable | None]:
        """A file that is one document comes in blocks of whole lines."""
        block, size = list[bytes](), 0
        for line in lines(stream, self.config.max_record_bytes):
            if isinstance(line, Unreadable):
                yield line
                continue
            for piece in line.splitlines():  # old Macs end lines by "\r"
                block.append(piece)
                size += len(piece) + 1
                ends = {"file": False, "line": True, "paragraph": not piece.strip()}[self.config.documents]
                if ends or size > self.config.max_characters:
                    yield b"\n".join(block).strip() or None
                    block, size = [], 0
        yield b"\n".join(block).strip() or None


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
