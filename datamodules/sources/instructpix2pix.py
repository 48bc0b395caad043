"""InstructPix2Pix as published: folders of image pairs with a list of them, or the Parquet files of the Hub.

    seeds.json                    [["shard-00/0000123", ["1234567890", …]], …]; optional
    shard-00/0000123/prompt.json  {"caption": …, "edit": …, "output": …}
    shard-00/0000123/1234567890_0.jpg, …_1.jpg   before and after, up to four pairs per prompt

A prompt becomes one sample with all its pairs, of which training draws one, as in the released code.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import DataError, SampleError
from datamodules.images import SampleImage
from datamodules.sample import MAX_PAIRS, EditSample
from datamodules.sources.converter import Converter, ImageConversionConfig, checked_image
from datamodules.sources.files import Record, find_files, visible_files
from datamodules.sources.image_store import embedded_bytes, read_inside
from datamodules.sources.tables import parse_json, text_of
from kosmosg.files import decode_text

SPLITS = {"all": (0.0, 1.0), "train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}
PROMPT_BYTES = 100_000
Pair = tuple[SampleImage, SampleImage]


@dataclass
class InstructPix2PixConfig(ImageConversionConfig):
    """Settings of InstructPix2Pix."""

    split: Literal["all", "train", "val", "test"] = "all"
    """Part of the list, divided as in the authors' loader: 90 % train, 5 % val, 5 % test. Folders only."""
    pairs: Literal["together", "apart"] = "together"
    """together: one sample per prompt, of whose pairs training draws one; apart: one sample per pair."""


class InstructPix2Pix(Converter[InstructPix2PixConfig]):
    """Converts image pairs with instructions to edit samples."""

    schema = InstructPix2PixConfig
    columns = ("original_prompt", "original_image", "edit_prompt", "edited_image")

    def __init__(self, source: Path, config: InstructPix2PixConfig):
        super().__init__(source, config)
        folders = (source / "seeds.json").is_file() or _prompts(source)
        self.tables = [] if folders else find_files(source, (".parquet",))
        self.folder = source.resolve()

    def files(self) -> list[Path]:
        return self.tables or [self.source / "seeds.json"]

    def records(self, file: Path) -> Iterator[Any]:
        if self.tables:
            return super().records(file)
        entries = self._entries(file)
        first, last = (int(share * len(entries)) for share in SPLITS[self.config.split])
        return iter(entries[first:last])

    def samples(self, record: Record, skipped: Counter[str]) -> Iterable[EditSample]:
        if isinstance(record.content, dict):
            row = record.content
            caption, instruction = row.get("original_prompt") or "", row.get("edit_prompt")
            pairs = [(self._embedded(record, "original_image"), self._embedded(record, "edited_image"))]
        else:
            folder, seeds = self._entry(record)
            prompt = parse_json(record, self._read(record, f"{folder}/prompt.json", PROMPT_BYTES), "prompt.json")
            caption, instruction = prompt.get("caption", prompt.get("input", "")), prompt.get("edit")
            pairs = self._pairs(record, folder, seeds, skipped)
        caption, instruction = text_of(record, caption, "caption"), text_of(record, instruction, "edit")
        if not instruction.strip():
            raise record.error("empty_text", "edit contains no text")
        if self.config.pairs == "apart":
            return [EditSample(caption, instruction, source, target) for source, target in pairs]
        (source, target), *more = pairs
        return [EditSample(caption, instruction, source, target, more=more)]

    def _entries(self, file: Path) -> list:
        if not file.is_file():
            return [[str(path.parent.relative_to(self.source)), _seeds(path.parent)] for path in _prompts(self.source)]
        try:
            entries = json.loads(decode_text(file.read_bytes()))
        except (ValueError, RecursionError) as error:
            raise DataError(f"'{file}' is not JSON ({error}); remove it to search the folders instead.") from error
        if not isinstance(entries, list):
            raise DataError(f"'{file}' is not a list of [folder, [seed, …]]; remove it to search the folders instead.")
        return entries

    def _entry(self, record: Record) -> tuple[str, list[str]]:
        entry = record.content
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list) or not entry[1]:
            raise record.error("invalid_field", f"an entry is {entry!r:.100}, it must be [folder, [seed, …]]")
        folder, *seeds = str(entry[0]), *map(str, entry[1][:MAX_PAIRS])
        return folder, seeds

    def _read(self, record: Record, name: str, limit: int) -> bytes:
        content = read_inside(record, self.folder, name, limit)
        if content is None:
            raise record.error("missing_image" if name.endswith(".jpg") else "missing_member", f"'{name}'")
        return content

    def _pairs(self, record: Record, folder: str, seeds: list[str], skipped: Counter[str]) -> list[Pair]:
        pairs: list[Pair] = []
        errors: list[SampleError] = []
        limit = self.config.limits.max_member_bytes
        for seed in seeds:
            try:
                names = [f"{folder}/{seed}_{i}.jpg" for i in (0, 1)]
                contents = [self._read(record, name, limit) for name in names]
                before, after = map(checked_image, [record] * 2, contents, names, [self.config] * 2)
                pairs.append((before, after))
            except SampleError as error:
                errors.append(error)
        if not pairs:
            raise errors[-1]
        skipped.update(error.reason for error in errors)
        return pairs

    def _embedded(self, record: Record, column: str) -> SampleImage:
        content = embedded_bytes(record.content.get(column))
        if content is None:
            raise record.error("missing_image", f"{column} contains no bytes")
        return checked_image(record, content, column, self.config)


def _prompts(folder: Path) -> list[Path]:
    return visible_files(folder, lambda path: path.name == "prompt.json")


def _seeds(folder: Path) -> list[str]:
    images = visible_files(folder, lambda path: path.name.endswith("_0.jpg"))
    return [path.name.removesuffix("_0.jpg") for path in images]
