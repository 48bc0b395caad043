"""One published set to shards: read in order, converted in processes, written in order.

PREFIX.conversion.json is the progress: the complete shards, the records read up to each, and what was skipped and why.
A restart skips that many records and continues to the same bytes.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from datamodules.errors import DataError, SampleError
from datamodules.folder_lock import folder_lock
from datamodules.processes import ordered_map
from datamodules.shard_writer import ShardWriter
from datamodules.sources.converter import ConversionConfig, Converted, Converter
from datamodules.sources.files import Record
from kosmosg.files import write_json

TASK_RECORDS, TASK_BYTES = 16, 16_000_000
"""A process is given that many records at once, or fewer that hold this much."""
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
    dropped: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    complete: bool = False

    @property
    def samples(self) -> int:
        """In the complete shards."""
        return sum(shard["samples"] for shard in self.shards)

    def count(self, error: SampleError) -> None:
        """One more unusable or filtered record."""
        counts = self.filtered if error.filtered else self.dropped
        counts[error.reason] = counts.get(error.reason, 0) + 1
        if counts[error.reason] <= EXAMPLES:
            self.examples.setdefault(error.reason, []).append(str(error))

    def check(self, config: ConversionConfig) -> None:
        """Raises DataError: too many records are unusable."""
        bad = sum(self.dropped.values())
        if bad >= config.min_bad_count and bad > config.max_bad_share * self.records:
            allowed = f"max_bad_share is {config.max_bad_share:g}"
            raise DataError(f"{bad} of {self.records} records are unusable, {allowed}. {self}")

    def __str__(self) -> str:
        kinds = {"dropped": self.dropped, "filtered": self.filtered, "skipped parts of samples": self.skipped}
        listed = {name: ", ".join(f"{reason} {n:,}" for reason, n in sorted(c.items())) for name, c in kinds.items()}
        first = next(iter(self.examples.values()), [])[:1]
        return "; ".join([f"{name}: {reasons}" for name, reasons in listed.items() if reasons] + first)


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
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with folder_lock(output):
        state = _open(file, Conversion(_fingerprint(name, converter, files)))
        if state.complete:
            return state
        done = ordered_map(converter.convert, _tasks(converter, files, state), config.processes)
        with (
            ShardWriter(output, config.prefix, config.samples_per_shard, state.shards) as writer,
            Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
        ):
            bar = progress.add_task("", total=len(files))
            for converted in chain.from_iterable(done):
                _write(converted, writer, state, file)
                state.check(config)
                shown = f"{state.records:,} records, {len(writer.shards)} shards"
                progress.update(bar, completed=converted.file, description=shown)
            if not (writer.shards or writer.open):
                raise DataError(f"'{converter.source}' has no usable record. {state}")
        state.shards, state.complete = list(writer.shards), True
        write_json(file, vars(state))
    return state


def _open(file: Path, new: Conversion) -> Conversion:
    """The progress of an interrupted conversion, or `new`, whose file is written before any shard."""
    if file.exists():
        try:
            found = Conversion(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"'{file}' is no progress of a conversion ({error}); remove it and its shards.") from error
        before, now = found.fingerprint, json.loads(json.dumps(new.fingerprint))
        if before == now:
            return found
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        listed = ", ".join(f"{key} was {before.get(key)!r:.60} and is now {now.get(key)!r:.60}" for key in changed[:3])
        raise DataError(f"'{file.parent}' was converted from something else: {listed}. Set another folder or prefix=…")
    if there := sorted(file.parent.glob(f"{file.name.removesuffix('.conversion.json')}-*.tar")):
        raise DataError(f"'{there[0]}' exists, but no {file.name}: it was written otherwise. Set another prefix=…")
    write_json(file, vars(new))
    return new


def _write(converted: Converted, writer: ShardWriter, state: Conversion, file: Path) -> None:
    written = state.part if (converted.file, converted.number) == (state.file, state.record) else 0
    if not written:  # else it was counted before the restart
        state.records += 1
        state.skipped = dict(Counter(state.skipped) + converted.skipped)
        if converted.error:
            state.count(converted.error)
    for part, sample in enumerate(converted.samples[written:], written):
        before = len(writer.shards)
        try:
            writer.write(sample)
        except ValueError as error:
            state.count(SampleError("duplicate_key", "", sample.key, str(error)))
        # Not after each of a million shards, whose list grows: a restart then writes the last ones again.
        if len(writer.shards) > before and len(writer.shards) > 1.01 * len(state.shards):
            state.file, state.record, state.part = converted.file, converted.number, part + 1
            state.shards = list(writer.shards)
            write_json(file, vars(state))


def _tasks(converter: Converter, files: list[Path], state: Conversion) -> Iterator[list[Record]]:
    task, size = list[Record](), 0
    for place in range(state.file, len(files)):
        file = files[place]
        name = file.name if file == converter.source else str(file.relative_to(converter.source))
        first = state.record if place == state.file else 0
        for number, content in enumerate(converter.records(file)):
            if number < first or content is None:
                continue
            task.append(Record(place, number, name, content))
            size += _bytes_of(content)
            if len(task) == TASK_RECORDS or size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _bytes_of(content: object) -> int:
    if isinstance(content, dict | list):
        return sum(map(_bytes_of, content.values() if isinstance(content, dict) else content))
    return len(content) if isinstance(content, bytes | str) else 0


def _fingerprint(name: str, converter: Converter, files: list[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size if file.exists() else 0
        digest.update(f"{file.relative_to(converter.source)} {size}\n".encode("utf-8", "surrogateescape"))
    settings = {key: value for key, value in asdict(converter.config).items() if key not in EXECUTION}
    return {"converter": name, "input": f"{len(files)} files {digest.hexdigest()[:16]}", **settings}
