"""Base class of the metrics, which score images and aggregate the scores into a number with an interval.

To add a metric, write a class and add it to `METRICS` (evaluation/benchmarks.py). Results, tables, breakdowns, report
and comparisons read everything else from the class.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from evaluation.protocols.benchmark import Item
from evaluation.scores.bootstrap import Bootstrap, mean_interval


@dataclass(frozen=True)
class Row:
    """Score of one image.

    Args:
        against: what the image was compared with: a file, a text or labels.
        value: a number, or whatever `Metric.aggregate` needs, such as a feature.
    """

    item: Item
    against: str
    value: Any


@dataclass(frozen=True)
class Estimate:
    """A number with its interval over `n` rows."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Context:
    """Inputs of a benchmark's metrics besides the images.

    Args:
        networks: networks that the protocol names, see `load_networks` in evaluation/scores/encoders.py.
        protocol: the benchmark's protocol, for metrics with settings in it.
        real: returns the features N×F of the benchmark's `references`, for metrics that compare sets of images.
    """

    networks: Mapping[str, Any]
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    protocol: Any = None
    real: Callable[[], Tensor | None] | None = None


class Metric(ABC):
    """One column of a table. All ranks call `score`, only rank 0 calls `aggregate`."""

    name: ClassVar[str]
    title: ClassVar[str]
    decimals: ClassVar[int] = 3
    better: ClassVar[Literal["↑", "↓", ""]] = "↑"
    needs: ClassVar[tuple[str, ...]] = ()
    """Names of the networks it uses; `clip_images` comes from the protocol's field `clip`."""
    optional: ClassVar[bool] = False
    """Whether the column is hidden if it has no scores; a protocol must name the networks of all other metrics."""
    floor: ClassVar[float | None] = 0.0
    """Minimum of the mean and its interval; None if they may be negative."""
    interval: ClassVar[str] = "95 % interval"
    headline: ClassVar[bool] = True
    """Whether it is in the report's summary; parts of other metrics are not."""
    samples: ClassVar[bool] = True
    """Whether the values of rows are numbers and go to samples.csv."""

    def __init__(self, context: Context):
        self.context = context

    @abstractmethod
    def score(self, items: Sequence[Item]) -> list[Row]:
        """Score a system's images; an empty list if the metric does not apply to them."""

    def aggregate(self, rows: Sequence[Row]) -> Estimate:
        """Return the mean over at least one row, with its bootstrap interval over units."""
        values = torch.tensor([float(row.value) for row in rows], dtype=torch.float64)
        bootstrap = self.context.bootstrap
        interval = mean_interval(values, [row.item.unit for row in rows], bootstrap.replicates, bootstrap.seed)
        value, low, high = (clamp(number, self.floor) for number in (float(values.mean()), *interval))
        return Estimate(value, low, high, len(rows))

    @classmethod
    def heading(cls) -> str:
        """Return the column heading, such as `DINO ↑`."""
        return f"{cls.title} {cls.better}".strip()

    @classmethod
    def number(cls, value: float) -> str:
        """Format a value with the metric's decimals and a typographic minus sign."""
        return f"{round(value, cls.decimals) + 0.0:.{cls.decimals}f}".replace("-", "−")  # no −0.00

    @classmethod
    def text(cls, value: float, low: float, high: float) -> str:
        """Format a value with its interval: `0.694 (0.671–0.716)`, `−0.01 (−0.03 … 0.02)`."""
        dash = "–" if low >= 0 else " … "
        return f"{cls.number(value)} ({cls.number(low)}{dash}{cls.number(high)})"


def clamp(value: float, floor: float | None) -> float:
    return value if floor is None else max(floor, value)
