"""The metrics, as torchmetrics on features; encoders stay outside, so that no state or checkpoint holds them.

Shapes: `N` pairs or images, `F` features.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from evaluation.protocols.protocol import KID


class CosineMean(Metric):
    """Mean cosine of pairs, clamped at 0 after averaging: DINO, CLIP-I and CLIP-T (released-code.md, "Evaluation").

    The score of every pair is kept with its number, so that ranks that were given a pair twice count it once.
    """

    full_state_update = False
    higher_is_better = True
    numbers: list[Tensor]
    scores: list[Tensor]

    def __init__(self, **options):
        super().__init__(**options)
        self.add_state("numbers", default=[], dist_reduce_fx="cat")
        self.add_state("scores", default=[], dist_reduce_fx="cat")

    def update(self, left: Tensor, right: Tensor, numbers: Tensor) -> None:
        """Add pairs of features N×F, with their numbers in the data set (N, int64).

        Raises:
            ValueError: other shapes.
        """
        if left.shape != right.shape or left.dim() != 2 or numbers.shape != left.shape[:1]:
            raise ValueError(
                f"pairs of features are N×F twice with N numbers, got {tuple(left.shape)}, {tuple(right.shape)} and "
                f"{tuple(numbers.shape)}."
            )
        self.numbers.append(numbers)
        self.scores.append(cosine_similarity(left.double(), right.double(), dim=-1))

    def samples(self) -> Tensor:
        """The cosine of each pair, ordered by number, N float64."""
        return by_number(self.numbers, self.scores)

    def compute(self) -> Tensor:
        """The mean, float64."""
        return self.samples().mean().clamp(min=0)


class FeatureFID(FrechetInceptionDistance):
    """torchmetrics' FID of ready features, in double precision.

    Args:
        num_features: `F`.
    """

    def __init__(self, num_features: int, **options):
        super().__init__(feature=ReadyFeatures(num_features), **options)

    def update(self, imgs: Tensor, real: bool) -> None:
        """Add features N×F of real or generated images."""
        super().update(imgs.double(), real)


class FeatureKID(Metric):
    """torchmetrics' KID of ready features, in double precision, its subsets drawn with the protocol's seed.

    Rows are kept with their numbers, so that subsets are the same however the rows came in and over how many ranks.
    """

    full_state_update = False
    higher_is_better = False
    real: list[Tensor]
    made: list[Tensor]
    real_numbers: list[Tensor]
    made_numbers: list[Tensor]

    def __init__(self, kid: KID, **options):
        super().__init__(**options)
        self.kid = kid
        for name in ("real", "made", "real_numbers", "made_numbers"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, features: Tensor, numbers: Tensor, real: bool) -> None:
        """Add features N×F of real or generated images, with their numbers in the data set (N, int64)."""
        (self.real if real else self.made).append(features)
        (self.real_numbers if real else self.made_numbers).append(numbers)

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation over the subsets, float64.

        Raises:
            ValueError: fewer images than a subset has.
        """
        real, made = by_number(self.real_numbers, self.real), by_number(self.made_numbers, self.made)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
            # The rows of all ranks are here already.
            metric = KernelInceptionDistance(
                ReadyFeatures(real.shape[1]),
                subsets=self.kid.subsets,
                subset_size=self.kid.subset_size,
                sync_on_compute=False,
            )
            metric.update(real.double(), real=True)
            metric.update(made.double(), real=False)
            torch.manual_seed(self.kid.seed)
            return metric.compute()


def by_number(numbers: list[Tensor] | Tensor, rows: list[Tensor] | Tensor) -> Tensor:
    """The rows of a state, gathered or not, in the order of their numbers, each number once."""
    numbers, rows = (torch.cat(state) if isinstance(state, list) else state for state in (numbers, rows))
    order = torch.argsort(numbers, stable=True)
    numbers = numbers[order]
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1]
    return rows[order][first]


class ReadyFeatures(nn.Module):
    """Stands where torchmetrics expects the network: the features were computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
