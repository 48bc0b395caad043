"""What a layout must tell: its input's parts, the records of a part, and the samples of a record."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from datamodules.errors import SampleError
from datamodules.sample import Sample
from datamodules.sources.config import ConversionConfig

Config = TypeVar("Config", bound=ConversionConfig)
Numbered = Iterator[tuple[int, Any]]


@dataclass(frozen=True)
class Record:
    """One piece of the input that stands for itself: a line, a row, a folder.

    Attributes:
        unit, number: the input's part and the record's place in it.
        name: of the part, for messages.
        content: what the layout read; a SampleError where it could not be read.
    """

    unit: int
    number: int
    name: str
    content: Any

    def error(self, reason: str, detail: str = "") -> SampleError:
        """An error that names this record."""
        return SampleError(reason, self.name, str(self.number), detail)


@dataclass
class Converted:
    """What one record gave, ready to be written.

    Attributes:
        left_out: parts of samples that were left out while the sample was kept, by reason.
    """

    record: Record
    samples: list["EncodedSample"] = field(default_factory=list)
    errors: list[SampleError] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass
class EncodedSample:
    """What ShardWriter needs of a sample."""

    members: dict[str, bytes]
    key: str

    def encode(self) -> dict[str, bytes]:
        """As they are."""
        return self.members


class Layout(ABC, Generic[Config]):
    """Reads one published layout. Sent to worker processes, so it holds plain values.

    Args:
        source: file or folder.

    Raises:
        DataError: the source is not of this layout.
    """

    schema: ClassVar[type[ConversionConfig]]

    def __init__(self, source: Path, config: Config):
        self.source, self.config = source, config

    @abstractmethod
    def files(self) -> list[Path]:
        """The input's parts, in the order of reading."""

    @abstractmethod
    def records(self, file: Path, start: int) -> Numbered:
        """(number, content) of the records of a part from number `start` on; as little work as possible."""

    @abstractmethod
    def samples(self, record: Record, left_out: Counter[str]) -> Iterable[Sample]:
        """The samples of one record; runs in a worker process.

        Raises:
            SampleError: the record is unusable; samples given before are kept.
        """

    def convert(self, records: list[Record]) -> list[Converted]:
        """Records → encoded samples and errors."""
        return [self._converted(record) for record in records]

    def name_of(self, file: Path) -> str:
        """How a part is called in messages and in the report."""
        return file.name if file == self.source else str(file.relative_to(self.source))

    def _converted(self, record: Record) -> Converted:
        done = Converted(record)
        try:
            if isinstance(record.content, SampleError):
                raise record.content
            for part, sample in enumerate(self.samples(record, done.left_out)):
                place = f"{record.unit:05d}-{record.number:09d}"
                done.samples.append(EncodedSample(sample.encode(), sample.key or f"{place}-{part:03d}"))
        except SampleError as error:
            done.errors.append(error)
        return done
