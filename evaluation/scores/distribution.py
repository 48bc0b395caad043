"""FID and KID by torchmetrics, from precomputed features in double precision.

Shapes: `N` images, `F` features.
"""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from evaluation.images.provenance import hash_json
from evaluation.processes import Processes
from evaluation.protocols.benchmark import Item
from evaluation.protocols.protocol import KID
from evaluation.scores.bootstrap import fid_interval
from evaluation.scores.metric import Estimate, Metric, Row
from kosmosg.files import write_bytes

FEATURES = "features"
NORMAL = 1.96


class Fid(Metric):
    """Fréchet distance of a system's images to the benchmark's real images; the values of rows are features."""

    name, title, decimals, better, needs = "fid", "FID", 2, "↓", ("fid_real", "fid_generated")
    samples = False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return the feature of each image; real photos are resized like the reference images."""
        encode = self.context.networks["fid_real" if all(item.real for item in items) else "fid_generated"]
        features = encode([item.file for item in items])
        return [Row(item, "", feature) for item, feature in zip(items, features, strict=True)]

    def aggregate(self, rows: Sequence[Row]) -> Estimate:
        """Return FID with its bootstrap interval over images."""
        real, made, bootstrap = self.real(), torch.stack([row.value for row in rows]), self.context.bootstrap
        value = fid(real, made)
        return Estimate(value, *fid_interval(real, made, value, bootstrap.fid_replicates, bootstrap.seed), len(made))

    def real(self) -> Tensor:
        """Return the features of the real images, N×F."""
        features = self.context.real() if self.context.real is not None else None
        assert features is not None, "benchmarks with FID have references"
        return features


class Kid(Fid):
    name, title, decimals = "kid", "KID", 5
    optional = True
    interval = "±1.96 standard deviations over subsets"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """Return the features, or nothing if the protocol has no KID."""
        return super().score(items) if self.context.protocol.kid else []

    def aggregate(self, rows: Sequence[Row]) -> Estimate:
        """Return the mean over subsets, with ±1.96 standard deviations over them."""
        made = torch.stack([row.value for row in rows])
        value, deviation = kid(self.real(), made, self.context.protocol.kid)
        # No bootstrap: KID is defined over pairs of distinct images, and a row drawn twice would be paired with itself.
        return Estimate(value, value - NORMAL * deviation, value + NORMAL * deviation, len(made))


def fid(real: Tensor, made: Tensor) -> float:
    """Return torchmetrics' FID of features N×F and N'×F."""
    # Not synchronized: only rank 0 computes it, from all features.
    metric = FrechetInceptionDistance(feature=PrecomputedFeatures(real.shape[1]), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return float(metric.compute())


def kid(real: Tensor, made: Tensor, protocol: KID) -> tuple[float, float]:
    """Return torchmetrics' KID of features N×F and N'×F: mean and standard deviation over the protocol's subsets.

    Raises:
        ValueError: there are fewer images than in a subset.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(
            PrecomputedFeatures(real.shape[1]),
            subsets=protocol.subsets,
            subset_size=protocol.subset_size,
            sync_on_compute=False,
        )
        metric.update(real.double(), real=True)
        metric.update(made.double(), real=False)
        torch.manual_seed(protocol.seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class PrecomputedFeatures(nn.Module):
    """Identity module passed to torchmetrics in place of the feature network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def cached_features(
    folder: Path, key: Mapping[str, str], compute: Callable[[], Tensor], processes: Processes
) -> Tensor | None:
    """Return the features of a benchmark's real images, N×F: on rank 0 from `folder`, else computed by all ranks and
    stored there, so that later evaluations need not encode 40,000 photos again.

    All rows are stored, not only mean and covariance, because KID needs them.

    Args:
        key: protocol identity and hashes of data and weights, which select the file.

    Returns:
        The features; None on other ranks if they were read from the file.
    """
    protocol = re.sub(r"[^\w-]+", "-", key["protocol"])
    file = folder / f"{protocol}-{hash_json(key)[:8]}.safetensors"

    def read() -> Tensor | None:
        try:
            return load_file(file)[FEATURES] if file.is_file() else None
        except (SafetensorError, KeyError):  # damaged; recompute and overwrite it
            return None

    features = read() if processes.first else None
    if processes.broadcast(lambda: features is not None):
        return features
    features = compute()
    if processes.first:
        write_bytes(file, save({FEATURES: features.contiguous()}))
    return features
