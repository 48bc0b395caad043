"""Random draws as pure functions of (seed, purpose, index of the sample): resume is exact on any number of ranks.

Lightning saves no random state, and none needs saving: each row's place in the run's order seeds its own draws, and
dropout's global generator is seeded for every micro-batch.

Shapes: `B` batch, `c×h×w` latents.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from `parts`; any two different tuples give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`; drawing on the CPU makes the draws the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass
class DiffusionDraws:
    """All that eq. 8 draws: posterior noise and noise B×c×h×w; time and dropout B in [0, 1)."""

    time: Tensor
    posterior: Tensor
    noise: Tensor
    dropout: Tensor

    def to(self, device: torch.device) -> "DiffusionDraws":
        """The draws on another device."""
        return DiffusionDraws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw_diffusion(
    seed: int,
    purpose: str,
    indices: Sequence[int],
    latent_shape: tuple[int, int, int],
    low_discrepancy: bool = False,
) -> DiffusionDraws:
    """One set of draws for each index.

    Args:
        low_discrepancy: times of consecutive indices are multiples of the golden ratio, shifted by the seed, so that
            every batch covers them evenly; each alone is still uniform. Other draws stay as they are.
    """
    rows = []
    for index in indices:
        source = generator(seed, purpose, index)
        rows.append(
            (
                torch.rand((), generator=source),
                torch.randn(latent_shape, generator=source),
                torch.randn(latent_shape, generator=source),
                torch.rand((), generator=source),
            )
        )
    draws = DiffusionDraws(*(torch.stack(column) for column in zip(*rows, strict=True)))
    if low_discrepancy:  # as variational diffusion models use it (arXiv 2107.00630, appendix I.1)
        shift = torch.rand((), dtype=torch.float64, generator=generator(seed, purpose, "timesteps"))
        draws.time = (torch.tensor(indices, dtype=torch.float64) * GOLDEN_RATIO + shift).frac()
    return draws
