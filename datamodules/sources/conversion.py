"""Convert a published data set to shards. Records are read and written in order and converted in worker processes.

PREFIX.conversion.json stores the progress: complete shards, the number of records read, and what was skipped and why. A
restarted conversion skips these records and produces the same bytes.
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
"""Maximum number of records per task, and size at which a task is complete."""
EXAMPLES = 5
"""Errors listed per reason in the progress file."""
EXECUTION = ("processes", "max_bad_share", "min_bad_count")
"""Settings that do not affect the shards."""


@dataclass
class Conversion:
    """Progress of a conversion.

    Attributes:
        fingerprint: converter, input and settings, on which the shards depend.
        file, record, part: the next sample to write: file of the input, record of the file, sample of the record.
        shards: records of the complete shards, as in `ShardWriter.shards`.
        records: number of records read. Unusable ones are counted in `dropped` and those excluded by the settings in
            `filtered`; `skipped` counts skipped parts of samples that were written. All are counted by reason.
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
        """Number of samples in the complete shards."""
        return sum(shard["samples"] for shard in self.shards)

    def count(self, error: SampleError) -> None:
        """Count an unusable or filtered record."""
        counts = self.filtered if error.filtered else self.dropped
        counts[error.reason] = counts.get(error.reason, 0) + 1
        if counts[error.reason] <= EXAMPLES:
            self.examples.setdefault(error.reason, []).append(str(error))

    def check(self, config: ConversionConfig) -> None:
        """Raise DataError if too many records are unusable."""
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
    """Start or continue a conversion. The same input and settings always give the same bytes.

    Args:
        name: name of the converter.
        output: folder of the shards; created if absent.

    Raises:
        DataError: there is no usable record, too many are unusable, or the folder contains another conversion.
    """
    config, files = converter.config, converter.files()
    file = output / f"{config.prefix}.conversion.json"
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with folder_lock(output):
        state = _open(file, Conversion(_fingerprint(name, converter, files)))
        if state.complete:
            return state
        results = ordered_map(converter.convert, _tasks(converter, files, state), config.processes)
        with (
            ShardWriter(output, config.prefix, config.samples_per_shard, state.shards) as writer,
            Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress,
        ):
            bar = progress.add_task("", total=len(files))
            for converted in chain.from_iterable(results):
                _write(converted, writer, state, file)
                state.check(config)
                description = f"{state.records:,} records, {len(writer.shards)} shards"
                progress.update(bar, completed=converted.file, description=description)
            if not (writer.shards or writer.open):
                raise DataError(f"'{converter.source}' has no usable record. {state}")
        state.shards, state.complete = list(writer.shards), True
        write_json(file, vars(state))
    return state


def _open(file: Path, new: Conversion) -> Conversion:
    """Return the progress of an interrupted conversion, or `new`, whose file is written before any shard."""
    if file.exists():
        try:
            stored = Conversion(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DataError(f"'{file}' is not a progress file ({error}); remove it and its shards.") from error
        before, now = stored.fingerprint, json.loads(json.dumps(new.fingerprint))
        if before == now:
            return stored
        changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        listed = ", ".join(f"{key} was {before.get(key)!r:.60} and is now {now.get(key)!r:.60}" for key in changed[:3])
        raise DataError(f"'{file.parent}' was converted from something else: {listed}. Set another folder or prefix=…")
    if existing := sorted(file.parent.glob(f"{file.name.removesuffix('.conversion.json')}-*.tar")):
        raise DataError(f"'{existing[0]}' exists, but no {file.name}: it has another origin. Set another prefix=…")
    write_json(file, vars(new))
    return new


def _write(converted: Converted, writer: ShardWriter, state: Conversion, file: Path) -> None:
    written = state.part if (converted.file, converted.number) == (state.file, state.record) else 0
    if not written:  # a partly written record was counted before the restart
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
        # Not saved after every shard, because the list may grow to a million; a restart writes the last ones again.
        if len(writer.shards) > before and len(writer.shards) > 1.01 * len(state.shards):
            state.file, state.record, state.part = converted.file, converted.number, part + 1
            state.shards = list(writer.shards)
            write_json(file, vars(state))


def _tasks(converter: Converter, files: list[Path], state: Conversion) -> Iterator[list[Record]]:
    task, size = list[Record](), 0
    for index in range(state.file, len(files)):
        file = files[index]
        name = file.name if file == converter.source else str(file.relative_to(converter.source))
        first = state.record if index == state.file else 0
        for number, content in enumerate(converter.records(file)):
            if number < first or content is None:
                continue
            task.append(Record(index, number, name, content))
            size += _size_of(content)
            if len(task) == TASK_RECORDS or size >= TASK_BYTES:
                yield task
                task, size = [], 0
    if task:
        yield task


def _size_of(content: object) -> int:
    if isinstance(content, dict | list):
        return sum(map(_size_of, content.values() if isinstance(content, dict) else content))
    return len(content) if isinstance(content, bytes | str) else 0


def _fingerprint(name: str, converter: Converter, files: list[Path]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size if file.exists() else 0
        digest.update(f"{file.relative_to(converter.source)} {size}\n".encode("utf-8", "surrogateescape"))
    settings = {key: value for key, value in asdict(converter.config).items() if key not in EXECUTION}
    return {"converter": name, "input": f"{len(files)} files {digest.hexdigest()[:16]}", **settings}
