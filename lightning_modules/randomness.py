"""Random draws as pure functions of (seed, purpose, sample index), so that resume is exact on any number of ranks.

No random state needs to be saved: each row's draws are seeded by its index in the run's global order, and the global
generator, which dropout uses, is seeded for every micro-batch.

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
    """Return a 63-bit seed from `parts`; different tuples give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a generator seeded by `derive_seed`, on the CPU, so that draws are the same on every device."""
    return torch.Generator().manual_seed(derive_seed(*parts))


@dataclass
class DiffusionDraws:
    """The random draws of eq. 8: `posterior` and `noise` B×c×h×w, normal; `time` and `dropout` B, in [0, 1)."""

    time: Tensor
    posterior: Tensor
    noise: Tensor
    dropout: Tensor

    def to(self, device: torch.device) -> "DiffusionDraws":
        """Move the draws to another device."""
        return DiffusionDraws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw_diffusion(
    seed: int,
    purpose: str,
    indices: Sequence[int],
    latent_shape: tuple[int, int, int],
    low_discrepancy: bool = False,
) -> DiffusionDraws:
    """Draw once for each index.

    Args:
        low_discrepancy: times of consecutive indices are multiples of the golden ratio (mod 1), shifted by the seed.
            Every batch then covers [0, 1) evenly, while each time is uniform. The other draws do not change.
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
    if low_discrepancy:  # see Variational Diffusion Models, arXiv 2107.00630, appendix I.1
        shift = torch.rand((), dtype=torch.float64, generator=generator(seed, purpose, "timesteps"))
        draws.time = (torch.tensor(indices, dtype=torch.float64) * GOLDEN_RATIO + shift).frac()
    return draws
