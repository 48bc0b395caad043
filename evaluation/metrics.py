"""The metrics, as torchmetrics on features; encoders stay outside, so that no state or checkpoint holds them.

Shapes: `N` pairs or images, `F` features.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance


class CosineMean(Metric):
    """Mean cosine of pairs, clamped at 0 after averaging: DINO, CLIP-I and CLIP-T (golden README, "Evaluation").

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
        numbers, scores = (
            torch.cat(state) if isinstance(state, list) else state for state in (self.numbers, self.scores)
        )
        order = torch.argsort(numbers, stable=True)
        numbers = numbers[order]
        first = torch.ones_like(numbers, dtype=torch.bool)
        first[1:] = numbers[1:] != numbers[:-1]
        return scores[order][first]

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


class ReadyFeatures(nn.Module):
    """Stands where torchmetrics expects the network: the features were computed already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
