"""Images of a system → scores with intervals, and the score of every sample."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.benchmarks import tables_of
from evaluation.protocols.requests import Item
from evaluation.scores.metric import Context
from evaluation.scores.results import Score
from kosmosg.files import write_text


@dataclass(frozen=True)
class Sample:
    """The score of one pair: an image against a reference image, its input image, a text or labels."""

    table: str
    system: str
    metric: str
    unit: str
    file: str
    against: str
    score: float
    template: str = ""


@dataclass(frozen=True)
class Scorer:
    """Every metric of a benchmark that its protocol and the images allow.

    Args:
        protocol: the identity that scores carry.
        first: whether this process aggregates; the others only help to look at the images.
    """

    benchmark: str
    protocol: str
    context: Context
    first: bool = True

    def __call__(self, system: str, items: Sequence[Item]) -> tuple[list[Score], list[Sample]]:
        """Scores, and samples of metrics that are means over images."""
        scores: list[Score] = []
        samples: list[Sample] = []
        for table, metrics in tables_of(self.benchmark):
            for kind in metrics:
                if any(name not in self.context.networks for name in kind.needs):
                    continue
                metric = kind(self.context)
                rows = metric.score(items)
                if not rows or not self.first:
                    continue
                found = metric.aggregate(rows)
                scores.append(
                    Score(table, system, kind.name, found.value, found.low, found.high, found.n, self.protocol)
                )
                if kind.samples:
                    samples += [
                        Sample(
                            table,
                            system,
                            kind.name,
                            row.item.unit,
                            str(row.item.file),
                            row.against,
                            float(row.value),
                            row.item.group,
                        )
                        for row in rows
                    ]
        return scores, samples


def write_samples(samples: Sequence[Sample], file: Path, folder: Path) -> None:
    """CSV of every pair's score; paths under `folder` are written relative to it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["table", "system", "metric", "unit", "template", "file", "against", "score"])
    for sample in samples:
        paths = [_relative(path, folder) for path in (sample.file, sample.against)]
        told = [sample.table, sample.system, sample.metric, sample.unit, sample.template]
        writer.writerow([*told, *paths, f"{sample.score:.6f}"])
    write_text(file, text.getvalue())


def _relative(path: str, folder: Path) -> str:
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path
