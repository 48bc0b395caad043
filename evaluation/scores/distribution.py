"""FID and KID by torchmetrics, of features that were computed already, in double precision.

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
from evaluation.scores.metric import Measured, Metric, Row
from kosmosg.files import write_bytes

FEATURES = "features"
NORMAL = 1.96


class Fid(Metric):
    """Distance of a system's images from the benchmark's real ones; rows hold features."""

    name, title, decimals, better, needs = "fid", "FID", 2, "↓", ("fid_real", "fid_generated")
    samples = False

    def score(self, items: Sequence[Item]) -> list[Row]:
        """The feature of every image; real photos are resized as the real side is."""
        encode = self.context.networks["fid_real" if all(item.real for item in items) else "fid_generated"]
        features = encode([item.file for item in items])
        return [Row(item, "", feature) for item, feature in zip(items, features, strict=True)]

    def aggregate(self, rows: Sequence[Row]) -> Measured:
        """Its interval by drawing images."""
        real, made, bootstrap = self.real(), torch.stack([row.value for row in rows]), self.context.bootstrap
        value = fid(real, made)
        return Measured(value, *fid_interval(real, made, value, bootstrap.fid_replicates, bootstrap.seed), len(made))

    def real(self) -> Tensor:
        """Features of the real side."""
        found = self.context.real() if self.context.real is not None else None
        assert found is not None, "benchmarks with FID have references"
        return found


class Kid(Fid):
    name, title, decimals = "kid", "KID", 5
    optional = True
    interval = "±1.96 standard deviations over subsets"

    def score(self, items: Sequence[Item]) -> list[Row]:
        """The same features; none where the protocol has no KID."""
        return super().score(items) if self.context.benchmark and self.context.benchmark.protocol.kid else []

    def aggregate(self, rows: Sequence[Row]) -> Measured:
        """The mean over subsets, and how it varies over them: at the size of a subset, not at n."""
        assert self.context.benchmark is not None
        made = torch.stack([row.value for row in rows])
        value, deviation = kid(self.real(), made, self.context.benchmark.protocol.kid)
        # No bootstrap of rows: KID is over pairs of different images; a row drawn twice would be paired with itself.
        return Measured(value, value - NORMAL * deviation, value + NORMAL * deviation, len(made))


def fid(real: Tensor, made: Tensor) -> float:
    """torchmetrics' FID of features N×F and N'×F."""
    # Not synchronized: the first process has all features, and it alone is here.
    metric = FrechetInceptionDistance(feature=ReadyFeatures(real.shape[1]), sync_on_compute=False)
    metric.update(real.double(), real=True)
    metric.update(made.double(), real=False)
    return float(metric.compute())


def kid(real: Tensor, made: Tensor, drawn: KID) -> tuple[float, float]:
    """torchmetrics' KID of features N×F and N'×F: mean and standard deviation over the protocol's own subsets.

    Raises:
        ValueError: fewer images than a subset has.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        metric = KernelInceptionDistance(
            ReadyFeatures(real.shape[1]),
            subsets=drawn.subsets,
            subset_size=drawn.subset_size,
            sync_on_compute=False,
        )
        metric.update(real.double(), real=True)
        metric.update(made.double(), real=False)
        torch.manual_seed(drawn.seed)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class ReadyFeatures(nn.Module):
    """Stands where torchmetrics expects the network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def kept_features(
    folder: Path, key: Mapping[str, str], compute: Callable[[], Tensor], processes: Processes
) -> Tensor | None:
    """Features of a benchmark's real side, N×F, in the first process: read if `folder` keeps them, so that later
    evaluations need not look at forty thousand photos again; else computed by all and kept.

    Rows, not mean and covariance alone: KID and the miniature's small sets need them.

    Args:
        key: all that they depend on: the protocol's identity, hashes of data and weights. Another key has another file.
    """
    named = re.sub(r"[^\w-]+", "-", key["protocol"])
    file = folder / f"{named}-{hash_json(key)[:8]}.safetensors"

    def read() -> Tensor | None:
        try:
            return load_file(file)[FEATURES] if file.is_file() else None
        except (SafetensorError, KeyError):  # damaged from outside; it is written anew
            return None

    features = read() if processes.first else None
    if processes.share(lambda: features is not None):
        return features
    features = compute()
    if processes.first:
        write_bytes(file, save({FEATURES: features.contiguous()}))
    return features
