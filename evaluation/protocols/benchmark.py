"""A benchmark: what is asked of every system, and what its images are compared with.

A new one is a class in a file and a line in `BENCHMARKS` (evaluation/benchmarks.py); its columns, a line in `METRICS`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from evaluation.protocols.protocol import Protocol
from evaluation.protocols.requests import Item, Request

REAL_IMAGES = "Real images"
COPY_OF_INPUT = "Copy of the input"


class Benchmark(ABC):
    """A data set under a protocol, checked when it is made.

    Args:
        folder: holds the data set.

    Raises:
        DataSetError: what is missing there, by name.
    """

    tables: ClassVar[dict[str, str]]
    """The titles of its tables by name; the first one has the benchmark's own name."""
    protocol_type: ClassVar[type[Protocol]]
    subjects: Mapping[str, Any] = {}
    """Where requests are of single subjects (`Request.unit`): each with a `class_noun` and a `kind`."""

    def __init__(self, protocol: Any, folder: Path):
        self.protocol, self.folder = protocol, folder

    @abstractmethod
    def requests(self) -> list[Request]:
        """One image each, in a fixed order."""

    @abstractmethod
    def item(self, request: Request, file: Path) -> Item:
        """The image that was made for a request, with all that metrics compare it with."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that a number depends on."""

    def baselines(self) -> dict[str, list[Item]]:
        """Rows that nobody draws, by name."""
        return {}

    def references(self) -> list[Path]:
        """The real side of metrics that compare sets of images."""
        return []

    def kept_image(self, subject: str) -> Path:
        """The one image of a subject that a model is given."""
        raise NotImplementedError(f"{type(self).__name__} has no subjects.")

    def check_networks(self, networks: Mapping[str, Any]) -> None:
        """Refuse networks that do not know what they will be asked.

        Raises:
            EvaluationError: says what they do not know.
        """
        return

    def parts(self, unit: str, group: str) -> dict[str, tuple[str, str]]:
        """What an image of `unit` and `group` (of its `Item`) counts for in breakdowns: by what → (part, the unit that
        the bootstrap draws there)."""
        return {}

    def notes(self, bootstrap: Any, scores: Sequence[Any]) -> list[str]:
        """What a reader of its tables must know.

        Args:
            bootstrap: evaluation.scores.bootstrap.Bootstrap.
            scores: of its tables.
        """
        return []
