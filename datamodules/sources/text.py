"""Text corpora for stage 1: tables with a text column, and plain text files."""

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
"""Where a long text may be split, best first: between paragraphs, lines, sentences, words."""


@dataclass
class TextConfig(ConversionConfig):
    """Settings of text corpora."""

    column: str = "text"
    """Text column of a table."""
    documents: Literal["file", "paragraph", "line"] = "file"
    """Unit that makes one document of a plain text file; blank lines separate paragraphs."""
    min_characters: int = 1
    """Filter shorter documents."""
    max_characters: int = 50_000
    """Split longer documents between paragraphs or sentences into samples of at most this length."""

    def __post_init__(self):
        super().__post_init__()
        at_least("min_characters", self.min_characters, 1)
        at_least("max_characters", self.max_characters, 100)


class Text(Converter[TextConfig]):
    """Converts documents to text samples, without leading and trailing whitespace."""

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
            raise record.error("empty_text", "the document contains only whitespace")
        if len(text) < least:
            raise record.filtered("text_too_short", f"{len(text)} characters, at least {least}")
        return map(TextSample, split_text(text, self.config.max_characters))

    def _documents(self, stream: IO[bytes]) -> Iterator[bytes | Unreadable | None]:
        """Yield the documents of a plain text file; documents that are too long are yielded in blocks of lines."""
        block, size = list[bytes](), 0
        for line in lines(stream, self.config.max_record_bytes):
            if isinstance(line, Unreadable):
                yield line
                continue
            for piece in line.splitlines():  # also at "\r", as in files of old Macs
                block.append(piece)
                size += len(piece) + 1
                ends = {"file": False, "line": True, "paragraph": not piece.strip()}[self.config.documents]
                if ends or size > self.config.max_characters:
                    yield b"\n".join(block).strip() or None
                    block, size = [], 0
        yield b"\n".join(block).strip() or None


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Split a text into parts of at most `max_characters`, at the best places of `CUTS`."""
    while len(text) > max_characters:
        # Only in the second half, to avoid short samples.
        places = ([match.start() for match in cut.finditer(text, max_characters // 2, max_characters)] for cut in CUTS)
        end = next((ends[-1] for ends in places if ends), max_characters)
        yield text[:end].strip()
        text = text[end:].strip()
    if text:
        yield text
