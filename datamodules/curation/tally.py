"""The sum of all records: counts, bounds, the manifest."""

import statistics
from collections import Counter
from typing import Any

from datamodules.curation.chunks import Plan
from datamodules.curation.output import Record
from datamodules.errors import DataError
from datamodules.sample import SCHEMA_VERSION


class Tally:
    """Adds records up; refuses to go on when too many images fail.

    Args:
        max_bad_share: largest share of images that may fail, 0 … 1.
        min_bad_count: fewer failures never stop the job.
    """

    def __init__(self, max_bad_share: float, min_bad_count: int):
        self.max_bad_share, self.min_bad_count = max_bad_share, min_bad_count
        self.read = self.written = self.entities = 0
        self.failed: Counter[str] = Counter()
        self.filtered: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.timing: dict[str, tuple[int, float]] = {}
        self.shards: dict[int, dict[str, Any]] = {}
        self.iou: dict[int, list[float]] = {}

    def add(self, record: Record) -> None:
        """Count a chunk. Raises DataError: more failed than may."""
        self.read += record["read"]
        self.written += record["written"]
        self.entities += record["entities"]["written"]
        self.failed.update(record["failed"])
        self.filtered.update(record["filtered"])
        self.left_out.update(record["entities"]["left_out"])
        self.iou[record["chunk"]] = record["iou"]
        if record["shard"]:
            self.shards[record["chunk"]] = record["shard"]
        for step, (rows, seconds) in record["timing"].items():
            before = self.timing.get(step, (0, 0.0))
            self.timing[step] = (before[0] + rows, before[1] + seconds)
        failed = self.failed.total()
        if failed >= self.min_bad_count and failed > self.max_bad_share * self.read:
            raise DataError(
                f"{failed} of {self.read} images failed ({listed(self.failed)}); max_bad_share is "
                f"{self.max_bad_share:g}. Each is named in curation/records; what is done is kept. Mend the input, or "
                "raise max_bad_share and start again."
            )

    def manifest(self, plan: Plan) -> dict[str, Any]:
        """The whole set, in the order of chunks; the same whoever worked on it and when.

        Raises:
            DataError: nothing is left of the input.
        """
        if self.read != self.written + self.failed.total() + self.filtered.total():
            raise DataError(f"{self.read} images were read, but {self.written} written and dropped ones do not add up.")
        if not self.shards:
            raise DataError(f"nothing is left of {self.read} images ({self.losses()}); an empty set is an error.")
        return {
            "schema": SCHEMA_VERSION,
            "shards": [self.shards[number] for number in sorted(self.shards)],
            "curation": {
                "images": self.read,
                "written": self.written,
                "failed": dict(sorted(self.failed.items())),
                "filtered": dict(sorted(self.filtered.items())),
                "entities": {"written": self.entities, "left_out": dict(sorted(self.left_out.items()))},
                "unreadable_shards": plan.unreadable_shards,
                "input": plan.identity,
                **({"mask_iou": iou} if (iou := self.mask_iou()) else {}),
            },
        }

    def mask_iou(self) -> dict[str, Any] | None:
        """IoU of recovered against true masks, where the truth is known."""
        scores = sorted(score for number in self.iou for score in self.iou[number])
        if not scores:
            return None
        return {
            "n": len(scores),
            "mean": round(statistics.fmean(scores), 4),
            "median": round(statistics.median(scores), 4),
            "tenth_percentile": scores[len(scores) // 10],
            "least": scores[0],
        }

    def losses(self) -> str:
        """One line."""
        return f"failed: {listed(self.failed)}; filtered: {listed(self.filtered)}"


def listed(counts: Counter[str]) -> str:
    """`reason count, reason count`, or none."""
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items())) or "none"
