"""95 % intervals by the bootstrap: of means over subjects or captions, of FID over
feature rows.

Shapes: `N` pairs or images, `G` units, `F` features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.protocols.protocol import require_at_least

LEVEL = 0.95
QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
DRAWN_AT_ONCE = 1 << 20
"""Counts of units held at once: 8 MB, however many replicates of 30,000 captions there are."""


@dataclass
class Bootstrap:
    replicates: int = 2000
    """Of means."""
    fid_replicates: int = 200
    """Of FID, each of which takes the eigenvalues of a covariance matrix."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        require_at_least(self, "bootstrap", 2, "replicates", "fid_replicates")


def mean_interval(scores: Tensor, units: list[str], replicates: int, seed: int) -> tuple[float, float]:
    """Percentile interval of the mean of `scores` (N), drawing whole units.

    A subject's images succeed or fail together; drawing single images would make the interval far too narrow.
    """
    _, unit_of = np.unique(units, return_inverse=True)
    counts = np.bincount(unit_of)
    sums = np.bincount(unit_of, weights=scores.double().numpy())
    means = np.concatenate([(drawn @ sums) / (drawn @ counts) for drawn in draws(len(counts), replicates, seed)])
    low, high = np.quantile(means, QUANTILES)
    return float(low), float(high)


def draws(units: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn in each replicate, some replicates at a time."""
    rng, size = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // units)
    for start in range(0, replicates, size):
        yield rng.multinomial(units, np.full(units, 1 / units), size=min(size, replicates - start))


def paired_interval(
    base: list[float],
    base_units: list[str],
    other: list[float],
    other_units: list[str],
    replicates: int,
    seed: int,
    floor: float | None = None,
) -> tuple[float, float]:
    """Percentile interval of mean(other) − mean(base), drawing the same whole units for both.

    Args:
        floor: least value of each mean, as the metric's.

    Raises:
        ValueError: the units of the two are not the same.
    """
    names, of_unit = np.unique([*base_units, *other_units], return_inverse=True)
    counts, sums = [], []
    for scores, units in ((base, of_unit[: len(base)]), (other, of_unit[len(base) :])):
        counts.append(np.bincount(units, minlength=len(names)))
        sums.append(np.bincount(units, weights=scores, minlength=len(names)))
    if not np.all(np.minimum(*counts)):
        alone = names[np.minimum(*counts) == 0].tolist()
        raise ValueError(f"{len(alone)} units have scores on one side only, as {alone[:3]}; a pair needs both.")
    differences = []
    for drawn in draws(len(names), replicates, seed):
        means = [((drawn @ total) / (drawn @ count)).clip(floor) for total, count in zip(sums, counts, strict=True)]
        differences.append(means[1] - means[0])
    low, high = np.quantile(np.concatenate(differences), QUANTILES)
    return float(low), float(high)


def fid_interval(reference: Tensor, features: Tensor, value: float, replicates: int, seed: int) -> tuple[float, float]:
    """Interval of the FID between `reference` (N×F, fixed) and `features` (N'×F, whose rows are drawn), around `value`.

    Drawing with repetition leaves fewer different images, and FID grows as images get fewer; so the replicates lie too
    high as a whole. Their spread is kept and centred on `value`: the interval tells how the number varies at this n,
    not its bias at this n.
    """
    mean, root = reference.double().mean(0), matrix_root(torch.cov(reference.double().T))
    trace = root.square().sum()
    rows = features.double()
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(replicates):
        drawn = rows[torch.from_numpy(rng.integers(len(rows), size=len(rows)))]
        covariance = torch.cov(drawn.T)
        # The trace of sqrt(A B) equals that of sqrt(√A B √A), which is symmetric: five times as fast.
        overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        distances.append((drawn.mean(0) - mean).square().sum() + trace + covariance.trace() - 2 * overlap)
    spread = torch.stack(distances).numpy()
    low, high = np.quantile(spread, QUANTILES) - spread.mean()
    return value + float(low), value + float(high)


def matrix_root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance matrix, F×F."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
