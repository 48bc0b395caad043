"""One layout to shards: read in order, worked on in processes, written in order, resumed at the last complete shard."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from datamodules.errors import DataError, SampleError
from datamodules.folder_lock import held
from datamodules.processes import ordered_map
from datamodules.report import SampleCounter
from datamodules.shards import ShardWriter
from datamodules.sources.journal import SUFFIX, Journal, add_examples, count_left_out, open_journal
from datamodules.sources.layout import Converted, Layout, Record
from kosmosg.batches import ReadReport

CHUNK = 16
"""Records of one task of a process."""
CHUNK_BYTES = 16_000_000
"""A task is given earlier when its records hold this much."""


def convert(name: str, layout: Layout, output: Path, console: Console) -> Journal:
    """Convert what is not yet converted. The same input and settings give the same bytes, interrupted or not.

    Args:
        name: of the layout.
        output: folder of the shards; made if absent.

    Raises:
        DataError: nothing could be written, too much is unusable, or the folder holds something else.
    """
    config, files = layout.config, layout.files()
    with held(output):
        file = output / (config.prefix + SUFFIX)
        journal = open_journal(file, name, layout, files)
        if journal.complete:
            return journal
        journal.save(file)
        counter = SampleCounter(config.max_bad_share, config.min_bad_count)
        counter.load_state_dict(journal.counts)
        records = _records(layout, files, journal)
        done = chain.from_iterable(ordered_map(layout.convert, _chunks(records), config.processes))
        with (
            ShardWriter(output, config.prefix, config.samples_per_shard, complete=journal.shards) as writer,
            _progress(console) as progress,
        ):
            bar = progress.add_task(name, total=len(files), told="")
            for converted in done:
                _write(converted, writer, journal, counter, file)
                told = f"{counter.reads:,} records, {journal.samples:,} samples in {len(writer.shards)} shards"
                progress.update(bar, completed=converted.record.unit, told=told)
            if not (writer.shards or writer.open):
                raise DataError(
                    f"nothing of '{layout.source}' could be used, no sample was written. {counter.summary()}; left out "
                    f"of samples: {journal.left_out or 'none'}."
                )
        _note(journal, writer, counter)
        journal.complete = True
        journal.save(file)
    return journal


def _write(converted: Converted, writer: ShardWriter, journal: Journal, counter: SampleCounter, file: Path) -> None:
    record = converted.record
    resumed = (record.unit, record.number) == (journal.unit, journal.record)
    skipped = journal.part if resumed else 0
    if not skipped:  # else its counts stand in the journal already
        counter.add(ReadReport(reads=1, errors=converted.errors))
        add_examples(journal, converted.errors)
        count_left_out(journal, converted.left_out)
    for part, sample in enumerate(converted.samples):
        if part < skipped:
            continue
        if writer.holds(sample.key):
            error = SampleError("duplicate_key", record.name, sample.key, "a second time in one shard")
            counter.add(ReadReport(errors=[error]))
            add_examples(journal, [error])
            continue
        before = len(writer.shards)
        writer.write(sample)  # type: ignore[arg-type]  # encoded where it was made
        if len(writer.shards) > before:
            journal.unit, journal.record, journal.part = record.unit, record.number, part + 1
            _note(journal, writer, counter)
            journal.save(file)


def _note(journal: Journal, writer: ShardWriter, counter: SampleCounter) -> None:
    journal.shards, journal.counts = list(writer.shards), counter.state_dict()


def _records(layout: Layout, files: list[Path], journal: Journal) -> Iterator[Record]:
    for unit in range(journal.unit, len(files)):
        start = journal.record if unit == journal.unit else 0
        for number, content in layout.records(files[unit], start):
            yield Record(unit, number, layout.name_of(files[unit]), content)


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
    if isinstance(content, dict | tuple | list):
        return sum(map(_bytes_of, content.values() if isinstance(content, dict) else content))
    return len(content) if isinstance(content, bytes | str) else 0


def _progress(console: Console) -> Progress:
    """Parts of the input done; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
