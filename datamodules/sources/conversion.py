"""One published set to shards: read in order, converted in processes, written in order.

PREFIX.conversion.json is the progress: the complete shards, the records read up to each, and what was skipped and why.
It is written after every shard; a restart skips that many records and continues to the same bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from datamodules.errors import DataError, SampleError
from datamodules.folder_lock import held
from datamodules.processes import ordered_map
from datamodules.sources.converter import Converted, Converter, Record
from datamodules.storage.shards import ShardWriter
from kosmosg.files import write_json

CHUNK = 16
"""Records of one task of a process."""
CHUNK_BYTES = 16_000_000
"""A task is given earlier when its records hold this much."""
EXAMPLES = 5
"""Errors of each reason that the progress file names."""
EXECUTION = ("processes", "max_bad_share", "min_bad_count")
"""Settings on which the shards do not depend."""


@dataclass
class Conversion:
    """How far a conversion is.

    Attributes:
        fingerprint: what the shards depend on: converter, input and settings.
        file, record, part: the next to write: file of the input, record in it, sample of the record.
        shards: of the complete shards, as ShardWriter records them.
        records: read so far. `dropped` of them were unusable and `filtered` out by the settings; `skipped` counts parts
            of samples that were kept. All by reason.
    """

    fingerprint: dict[str, Any]
    file: int = 0
    record: int = 0
    part: int = 0
    shards: list[dict] = field(default_factory=list)
    records: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    complete: bool = False

    @property
    def samples(self) -> int:
        """In the complete shards."""
        return sum(shard["samples"] for shard in self.shards)

    def count(self, error: SampleError) -> None:
        """One more unusable or filtered record."""
        (self.filtered if error.filtered else self.dropped)[error.reason] += 1
        examples = self.examples.setdefault(error.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(str(error))

    def reasons(self) -> str:
        """All counts in one line."""
        kinds = {"dropped": self.dropped, "filtered": self.filtered, "skipped parts of samples": self.skipped}
        listed = {name: ", ".join(f"{reason} {n:,}" for reason, n in sorted(c.items())) for name, c in kinds.items()}
        return "; ".join(f"{name}: {reasons}" for name, reasons in listed.items() if reasons)


def convert(name: str, converter: Converter, output: Path, console: Console) -> Conversion:
    """Convert what is not yet converted. The same input and settings give the same bytes, interrupted or not.

    Args:
        name: of the converter.
        output: folder of the shards; made if absent.

    Raises:
        DataError: nothing could be written, too much is unusable, or the folder holds something else.
    """
    config, files = converter.config, converter.files()
    file = output / f"{config.prefix}.conversion.json"
    with held(output):
        state = _open(file, Conversion(_fingerprint(name, converter, files)))
        if state.complete:
            return state
        done = chain.from_iterable(
            ordered_map(converter.convert, _chunks(_records(converter, files, state)), config.processes)
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]}"),
            TimeElapsedColumn(),
        )
        with (
            ShardWriter(output, config.prefix, config.samples_per_shard, state.shards) as writer,
            Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
        ):
            bar = progress.add_task(name, total=len(files), done="")
            for converted in done:
                _write(converted, writer, state, file)
                if state.dropped.total() >= max(config.min_bad_count, config.max_bad_share * state.records + 1):
                    raise DataError(
                        f"{state.dropped.total()} of {state.records} records are unusable ({state.reasons()}), "
                        f"max_bad_share is {config.max_bad_share:g}. {_first_example(state)}"
                    )
                shown = f"{state.records:,} records, {len(writer.shards)} shards"
                progress.update(bar, completed=converted.file, done=shown)
            if not (writer.shards or writer.open):
                raise DataError(
                    f"no record of '{converter.source}' is usable. {state.reasons()}. {_first_example(state)}"
                )
        state.shards, state.complete = list(writer.shards), True
        write_json(file, vars(state))
    return state


def _open(file: Path, new: Conversion) -> Conversion:
    """The progress of an interrupted conversion, or `new`, whose file is written before any shard."""
    if file.exists():
        try:
            found = Conversion(**json.loads(file.read_text(encoding="utf-8")))
            for name in ("dropped", "filtered", "skipped"):
                setattr(found, name, Counter(getattr(found, name)))
        except (ValueError, TypeError) as error:
            raise DataError(
                f"'{file}' is not the progress of a conversion ({error}); remove it and its shards."
            ) from error
        before, now = _flat(found.fingerprint), _flat(new.fingerprint)
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        if not changed:
            return found
        listed = ", ".join(f"{key} was {before.get(key)!r:.60} and is now {now.get(key)!r:.60}" for key in changed[:3])
        raise DataError(
            f"'{file.parent}' was converted from something else: {listed}. Remove it, or set another folder or prefix=…"
        )
    prefix = file.name.removesuffix(".conversion.json")
    if there := sorted(path.name for path in file.parent.glob(f"{prefix}-*.tar")):
        raise DataError(
            f"'{file.parent}' holds {there[0]} but no {file.name}: it is not this command's. Set another folder or "
            "another prefix=…"
        )
    write_json(file, vars(new))
    return new


def _write(converted: Converted, writer: ShardWriter, state: Conversion, file: Path) -> None:
    written = state.part if (converted.file, converted.number) == (state.file, state.record) else 0
    if not written:  # else it was counted before the restart
        state.records += 1
        state.skipped += converted.skipped
        if converted.error:
            state.count(converted.error)
    for part, sample in enumerate(converted.samples):
        if part < written:
            continue
        before = len(writer.shards)
        try:
            writer.write(sample)
        except ValueError as error:
            state.count(SampleError("duplicate_key", str(converted.file), sample.key, str(error)))
        if len(writer.shards) > before:
            state.file, state.record, state.part = converted.file, converted.number, part + 1
            state.shards = list(writer.shards)
            write_json(file, vars(state))


def _records(converter: Converter, files: list[Path], state: Conversion) -> Iterator[Record]:
    for unit in range(state.file, len(files)):
        name = files[unit].name if files[unit] == converter.source else str(files[unit].relative_to(converter.source))
        first = state.record if unit == state.file else 0
        for number, content in enumerate(converter.records(files[unit])):
            if number >= first and content is not None:
                yield Record(unit, number, name, content)


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += _bytes_of(record.content)
        if len(chunk) >= CHUNK or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _bytes_of(content: object) -> int:
    if isinstance(content, dict | list):
        return sum(map(_bytes_of, content.values() if isinstance(content, dict) else content))
    return len(content) if isinstance(content, bytes | str) else 0


def _first_example(state: Conversion) -> str:
    return f"The first: {next(iter(state.examples.values()))[0]}" if state.examples else ""


def _fingerprint(name: str, converter: Converter, files: list[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size if file.exists() else 0
        digest.update(f"{file.relative_to(converter.source)} {size}\n".encode("utf-8", "surrogateescape"))
    settings = {key: value for key, value in asdict(converter.config).items() if key not in EXECUTION}
    return {"converter": name, "input": f"{len(files)} files {digest.hexdigest()[:16]}", "settings": settings}


def _flat(values: dict[str, Any], place: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{place}{key}.") if isinstance(value, dict) else {place + key: value}
    return flat
