"""Counts of whole numbers between fixed edges, so that histograms of parts add up."""

from bisect import bisect_right
from dataclasses import dataclass, field

# 75, 85 and 128 tokens and 384 pixels are limits of the released code (golden README, "Caption rows").
TOKEN_EDGES = (0, 5, 10, 15, 20, 30, 40, 50, 60, 76, 86, 129, 257, 513, 1025, 2049, 8193)
SIDE_EDGES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)


@dataclass
class Histogram:
    """Values counted: bar `i` holds `edges[i] ≤ value < edges[i+1]`, the last all that are larger.

    Args:
        unit: what is counted, for people.
    """

    unit: str
    edges: tuple[int, ...]
    counts: list[int] = field(default_factory=list)
    total: int = 0
    least: int | None = None
    most: int | None = None

    def __post_init__(self):
        self.counts = self.counts or [0] * len(self.edges)

    def add(self, value: int) -> None:
        """Count one value."""
        self.counts[bisect_right(self.edges, value) - 1] += 1
        self.total += value
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)

    def __iadd__(self, other: "Histogram") -> "Histogram":
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total
        found = [value for value in (self.least, self.most, other.least, other.most) if value is not None]
        if found:
            self.least, self.most = min(found), max(found)
        return self

    def __len__(self) -> int:
        return sum(self.counts)

    def record(self) -> dict:
        """Plain values for JSON."""
        return {
            "unit": self.unit,
            "edges": list(self.edges),
            "counts": self.counts,
            "values": len(self),
            "mean": round(self.total / len(self), 2) if len(self) else None,
            "min": self.least,
            "max": self.most,
        }

    def rows(self) -> list[tuple[str, int]]:
        """(range, count) of the bars from the first to the last that holds anything."""
        filled = [number for number, count in enumerate(self.counts) if count]
        bars = []
        for number in range(filled[0], filled[-1] + 1) if filled else ():
            low = self.edges[number]
            high = self.edges[number + 1] - 1 if number + 1 < len(self.edges) else None
            name = f"{low}+" if high is None else str(low) if high == low else f"{low}–{high}"
            bars.append((name, self.counts[number]))
        return bars
