"""95 % confidence intervals by the bootstrap: of means over subjects or captions, of FID over images.

Shapes: `N` pairs or images, `F` features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evaluation.protocols.protocol import require_at_least

LEVEL = 0.95
QUANTILES = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
MAX_COUNTS = 1 << 20
"""Unit counts in memory at a time (8 MB), which bounds memory for many replicates of 30,000 captions."""


@dataclass
class Bootstrap:
    replicates: int = 2000
    """Replicates of means."""
    fid_replicates: int = 200
    """Replicates of FID; each computes the eigenvalues of a covariance matrix."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        require_at_least(self, "bootstrap", 2, "replicates", "fid_replicates")


def mean_interval(scores: Tensor, units: list[str], replicates: int, seed: int) -> tuple[float, float]:
    """Return the percentile interval of the mean of `scores` (N), resampling whole units.

    Scores of one subject are correlated; resampling single images would make the interval far too narrow.
    """
    names, unit_of = np.unique(units, return_inverse=True)
    low, high = np.quantile(resampled_means(scores.double().numpy(), unit_of, len(names), replicates, seed), QUANTILES)
    return float(low), float(high)


def resampled_means(
    scores: Sequence[float] | np.ndarray, unit_of: np.ndarray, units: int, replicates: int, seed: int
) -> np.ndarray:
    """Return the mean of each replicate, resampling whole units.

    Args:
        scores, unit_of: N scores, and the number of each one's unit.
    """
    counts = np.bincount(unit_of, minlength=units)
    sums = np.bincount(unit_of, weights=scores, minlength=units)
    rng, block = np.random.default_rng(seed), max(1, MAX_COUNTS // units)
    means = []
    for start in range(0, replicates, block):
        drawn = rng.multinomial(units, np.full(units, 1 / units), size=min(block, replicates - start))
        means.append((drawn @ sums) / (drawn @ counts))
    return np.concatenate(means)


def paired_interval(
    base: list[float],
    base_units: list[str],
    other: list[float],
    other_units: list[str],
    replicates: int,
    seed: int,
    floor: float | None = None,
) -> tuple[float, float]:
    """Return the percentile interval of mean(other) − mean(base), resampling the same whole units for both.

    Args:
        floor: minimum of each mean, `Metric.floor`.

    Raises:
        ValueError: the two sides have different units.
    """
    if alone := sorted(set(base_units) ^ set(other_units)):
        raise ValueError(f"{len(alone)} units have scores on one side only, for example {alone[:3]}.")
    names, unit_of = np.unique([*base_units, *other_units], return_inverse=True)
    sides = ((base, unit_of[: len(base)]), (other, unit_of[len(base) :]))
    least = -np.inf if floor is None else floor
    means = [resampled_means(scores, units, len(names), replicates, seed).clip(least) for scores, units in sides]
    low, high = np.quantile(means[1] - means[0], QUANTILES)
    return float(low), float(high)


def fid_interval(reference: Tensor, features: Tensor, value: float, replicates: int, seed: int) -> tuple[float, float]:
    """Return the interval of the FID `value` of `features` (N'×F, resampled) against `reference` (N×F, fixed).

    A resample has fewer distinct images, and FID grows as images get fewer, so all replicates are too high. The
    interval is their spread centred on `value`: it shows the variance at this n, not the bias.
    """
    mean, root = reference.double().mean(0), matrix_root(torch.cov(reference.double().T))
    trace = root.square().sum()
    rows = features.double()
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(replicates):
        drawn = rows[torch.from_numpy(rng.integers(len(rows), size=len(rows)))]
        covariance = torch.cov(drawn.T)
        # sqrt(A B) and sqrt(√A B √A) have the same trace; the latter is symmetric and five times as fast.
        overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
        distances.append((drawn.mean(0) - mean).square().sum() + trace + covariance.trace() - 2 * overlap)
    spread = torch.stack(distances).numpy()
    low, high = np.quantile(spread, QUANTILES) - spread.mean()
    return value + float(low), value + float(high)


def matrix_root(matrix: Tensor) -> Tensor:
    """Return the symmetric square root of a covariance matrix, F×F."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
