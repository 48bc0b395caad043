"""Count the unusable samples of a run."""

import logging
from collections import Counter

from datamodules.errors import DataError, SampleError
from kosmosg.batches import ReadReport

logger = logging.getLogger(__name__)

LOGGED_PER_REASON = 20
MAX_REMEMBERED = 100_000


class SampleCounter:
    """Adds up the reports of a run, logs the first errors of each reason, and stops the run if too many reads fail.

    `dropped` counts distinct samples, so that a bad sample counts once however often it is read; `failed` counts reads.

    Args:
        max_bad_share: largest share of reads that may fail, 0 … 1. Filtered samples are not failures.
        min_bad_count: fewer failures than this never stop a run.
    """

    def __init__(self, max_bad_share: float, min_bad_count: int):
        self.max_bad_share, self.min_bad_count = max_bad_share, min_bad_count
        self.reads = self.failed = 0
        self.dropped: Counter[str] = Counter()
        self.filtered: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()
        self._seen: set[tuple[str, str, str]] = set()

    def add(self, report: ReadReport) -> None:
        """Count one batch's report.

        Raises:
            DataError: more than `min_bad_count` reads failed and their share exceeds `max_bad_share`.
        """
        self.reads += report.reads
        for error in report.errors:
            self.failed += not error.filtered
            identity = (error.reason, error.shard, error.key)
            if identity in self._seen:
                continue
            if len(self._seen) < MAX_REMEMBERED:  # beyond this, repeated samples count again
                self._seen.add(identity)
            (self.filtered if error.filtered else self.dropped)[error.reason] += 1
            self._log(error)
        if self.failed >= self.min_bad_count and self.failed > self.max_bad_share * self.reads:
            raise DataError(
                f"{self.failed} of {self.reads} samples read are unusable ({_listed(self.dropped)}); max_bad_share "
                f"is {self.max_bad_share:g}. Repair the shards named in the log, or increase data.max_bad_share."
            )

    def summary(self) -> str:
        """Return the counts as one line for the log."""
        return f"{self.reads} samples read; dropped: {_listed(self.dropped)}; filtered: {_listed(self.filtered)}"

    def state_dict(self) -> dict:
        """Return the counts."""
        return {
            "reads": self.reads,
            "failed": self.failed,
            "dropped": dict(self.dropped),
            "filtered": dict(self.filtered),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore the counts. Samples counted before may count once more, because their names are not saved."""
        self.reads, self.failed = state["reads"], state["failed"]
        self.dropped, self.filtered = Counter(state["dropped"]), Counter(state["filtered"])

    def _log(self, error: SampleError) -> None:
        self._logged[error.reason] += 1
        level = logging.INFO if error.filtered else logging.WARNING
        if self._logged[error.reason] <= LOGGED_PER_REASON:
            logger.log(level, "%s: %s", "filtered" if error.filtered else "dropped", error)
        if self._logged[error.reason] == LOGGED_PER_REASON:
            logger.log(level, "further samples with the reason %s are counted but not logged", error.reason)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common()) or "none"
