"""A metric: how images become values, and values one number with its interval.

A new one is a class in a file and a word in a line of `METRICS` (evaluation/benchmarks.py); configuration, results,
tables, breakdowns, report and comparisons read the rest from the class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evaluation.protocols.benchmark import Benchmark, Item
from evaluation.scores.bootstrap import Bootstrap, mean_interval


@dataclass(frozen=True)
class Row:
    """What one image is worth: a number, or what an aggregate over all images needs of it.

    Args:
        against: what the image was compared with: a file, a text, labels.
    """

    item: Item
    against: str
    value: Any


@dataclass(frozen=True)
class Measured:
    """A number with its interval, over `n` rows."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Context:
    """What the metrics of a benchmark may use.

    Args:
        networks: by name, those that the protocol names (evaluation/scores/encoders.py).
        real: features N×F of the benchmark's `references`, for metrics that compare sets of images.
    """

    networks: Mapping[str, Any]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    benchmark: Benchmark | None = None  # of metrics that read its protocol
    real: Callable[[], Tensor | None] | None = None


class Metric(ABC):
    """One column. All processes of a launch call `score`, the first one alone `aggregate`."""

    name: ClassVar[str]
    title: ClassVar[str]
    decimals: ClassVar[int] = 3
    better: ClassVar[Literal["↑", "↓", ""]] = "↑"
    needs: ClassVar[tuple[str, ...]] = ()
    """Networks by name; a protocol's field is called as the first word of what it gives."""
    optional: ClassVar[bool] = False
    """Whether the column is left out where it has no scores; a protocol must name the networks of all others."""
    floor: ClassVar[float | None] = 0.0
    """Least value of the mean and its interval; None where it may be negative."""
    interval: ClassVar[str] = "95 % interval"
    headline: ClassVar[bool] = True
    """Whether it stands in the report's first lines; parts of other metrics do not."""
    samples: ClassVar[bool] = True
    """Whether the values of rows are numbers, which samples.csv keeps."""

    def __init__(self, context: Context):
        self.context = context

    @abstractmethod
    def score(self, items: Sequence[Item]) -> list[Row]:
        """The rows of a system's images; none where they have nothing that this compares."""

    def aggregate(self, rows: Sequence[Row]) -> Measured:
        """The mean over rows; its interval by drawing whole units. At least one row."""
        values = torch.tensor([float(row.value) for row in rows], dtype=torch.float64)
        bootstrap = self.context.bootstrap
        interval = mean_interval(values, [row.item.unit for row in rows], bootstrap.replicates, bootstrap.seed)
        value, low, high = (floored(number, self.floor) for number in (float(values.mean()), *interval))
        return Measured(value, low, high, len(rows))

    @classmethod
    def heading(cls) -> str:
        """`DINO ↑`"""
        return f"{cls.title} {cls.better}".strip()

    @classmethod
    def number(cls, value: float) -> str:
        """With its decimals and a true minus sign."""
        return f"{round(value, cls.decimals) + 0.0:.{cls.decimals}f}".replace("-", "−")  # no −0.00

    @classmethod
    def text(cls, value: float, low: float, high: float) -> str:
        """`0.694 (0.671–0.716)`; `−0.01 (−0.03 … 0.02)`"""
        dash = "–" if low >= 0 else " … "
        return f"{cls.number(value)} ({cls.number(low)}{dash}{cls.number(high)})"


def floored(value: float, floor: float | None) -> float:
    return value if floor is None else max(floor, value)
