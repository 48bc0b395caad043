"""InstructPix2Pix as published: folders of image pairs and a list of them, or the Parquet files of the hub.

    seeds.json                    [["shard-00/0000123", ["1234567890", …]], …]; without it the folders are listed
    shard-00/0000123/prompt.json  {"caption": …, "edit": …, "output": …}
    shard-00/0000123/1234567890_0.jpg, …_1.jpg   before and after, up to four pairs for a prompt

A prompt becomes one sample with all its pairs; training draws one of them, as the released code does.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import DataError, SampleError
from datamodules.images import SampleImage
from datamodules.sample import MOST_PAIRS, EditSample
from datamodules.sources.config import ImageConversionConfig
from datamodules.sources.files import find_files
from datamodules.sources.image_store import is_inside
from datamodules.sources.layout import Layout, Numbered, Record
from datamodules.sources.pictures import picture
from datamodules.sources.tables import rows, text_of

SPLITS = {"all": (0.0, 1.0), "train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}
COLUMNS = ("original_prompt", "original_image", "edit_prompt", "edited_image")
PROMPT_BYTES = 100_000
Pair = tuple[SampleImage, SampleImage]


@dataclass
class InstructPix2PixConfig(ImageConversionConfig):
    """Image pairs with instructions."""

    split: Literal["all", "train", "val", "test"] = "all"
    """Part of the list, divided as the authors' loader does: 90 % train, 5 % val, 5 % test. Folders only."""
    pairs: Literal["together", "apart"] = "together"
    """A sample for each prompt, of whose pairs training draws one, or for each pair, as kept moments need it."""


class InstructPix2Pix(Layout[InstructPix2PixConfig]):
    """Edit samples."""

    schema = InstructPix2PixConfig

    def __init__(self, source: Path, config: InstructPix2PixConfig):
        super().__init__(source, config)
        parquet = source.is_file() or (source.is_dir() and any(source.rglob("*.parquet")))
        self.tables = find_files(source, (".parquet",)) if parquet else []
        self.folder = source.resolve()
        if not parquet and not source.is_dir():
            raise DataError(f"there is no folder '{source}'.")

    def files(self) -> list[Path]:
        return self.tables or [self.source / "seeds.json"]

    def name_of(self, file: Path) -> str:
        return super().name_of(file) if self.tables else self.source.name

    def records(self, file: Path, start: int) -> Numbered:
        if self.tables:
            yield from rows(file, start, self.config.max_record_bytes, self.name_of(file), COLUMNS)
            return
        listed = self._listed(file)
        first, last = (int(share * len(listed)) for share in SPLITS[self.config.split])
        yield from ((number, listed[number]) for number in range(max(first, start), last))

    def samples(self, record: Record, left_out: Counter[str]) -> Iterable[EditSample]:
        if isinstance(record.content, dict):
            row = record.content
            caption, instruction = row.get("original_prompt") or "", row.get("edit_prompt")
            images = [_bytes(record, row.get(name), name) for name in ("original_image", "edited_image")]
            before, after = (picture(record, *image, self.config) for image in images)
            pairs = [(before, after)]
        else:
            folder, seeds = self._entry(record)
            prompt = self._prompt(record, folder)
            caption, instruction = prompt.get("caption", prompt.get("input", "")), prompt.get("edit")
            pairs = self._pairs(record, folder, seeds, left_out)
        caption, instruction = text_of(record, caption, "caption"), text_of(record, instruction, "edit")
        if not instruction.strip():
            raise record.error("empty_text", "edit holds no text")
        if self.config.pairs == "apart":
            return [EditSample(caption, instruction, source, target) for source, target in pairs]
        (source, target), *more = pairs
        return [EditSample(caption, instruction, source, target, more=more)]

    def _listed(self, file: Path) -> list:
        try:
            listed = json.loads(file.read_bytes())
        except FileNotFoundError:
            prompts = sorted(self.source.rglob("prompt.json"))
            listed = [
                [
                    str(path.parent.relative_to(self.source)),
                    sorted(image.name.removesuffix("_0.jpg") for image in path.parent.glob("*_0.jpg")),
                ]
                for path in prompts
            ]
        except (ValueError, RecursionError) as error:
            raise DataError(f"'{file}' is not JSON ({error}); remove it and the folders are listed.") from error
        if not isinstance(listed, list) or not listed:
            raise DataError(f"'{self.source}' lists no folders with a prompt.json; see docs/data.md for the layout.")
        return listed

    def _entry(self, record: Record) -> tuple[Path, list[str]]:
        entry = record.content
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], list) or not entry[1]:
            raise record.error("invalid_field", f"an entry is {entry!r:.100}, it must be [folder, [seed, …]]")
        names = [str(entry[0]), *map(str, entry[1][:MOST_PAIRS])]
        if not all(map(is_inside, names)) or any("/" in seed for seed in names[1:]):
            raise record.error("refused_path", f"{names!r:.200} leads out of the folder")
        return self.source / names[0], names[1:]

    def _read(self, record: Record, path: Path, limit: int) -> bytes:
        if not path.resolve().is_relative_to(self.folder):
            raise record.error("refused_path", f"'{path}' leads out of the folder")
        try:
            if path.stat().st_size > limit:
                raise record.error("member_too_large", f"'{path.name}' has more than {limit} bytes")
            return path.read_bytes()
        except FileNotFoundError as error:
            reason = "missing_image" if path.suffix == ".jpg" else "missing_member"
            raise record.error(reason, f"'{path.relative_to(self.source)}'") from error
        except OSError as error:
            raise record.error("unreadable_file", str(error)) from error

    def _prompt(self, record: Record, folder: Path) -> dict:
        try:
            prompt = json.loads(self._read(record, folder / "prompt.json", PROMPT_BYTES))
        except (ValueError, RecursionError) as error:
            raise record.error("invalid_json", f"prompt.json: {error}") from error
        if not isinstance(prompt, dict):
            raise record.error("invalid_json", f"prompt.json holds a {type(prompt).__name__}, it must be an object")
        return prompt

    def _pairs(self, record: Record, folder: Path, seeds: list[str], left_out: Counter[str]) -> list[Pair]:
        pairs: list[Pair] = []
        errors: list[SampleError] = []
        limit = self.config.limits.max_member_bytes
        for seed in seeds:
            try:
                contents = {f"{seed}_{i}.jpg": self._read(record, folder / f"{seed}_{i}.jpg", limit) for i in (0, 1)}
                before, after = (picture(record, content, name, self.config) for name, content in contents.items())
                pairs.append((before, after))
            except SampleError as error:
                errors.append(error)
        if not pairs:
            raise errors[-1]
        left_out.update(error.reason for error in errors)
        return pairs


def _bytes(record: Record, image: Any, name: str) -> tuple[bytes, str]:
    content = image.get("bytes") if isinstance(image, dict) else None
    if not isinstance(content, bytes):
        raise record.error("missing_image", f"{name} holds no bytes")
    return content, name
