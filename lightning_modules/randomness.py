"""Random draws as pure functions of (seed, what for, which sample): resume is exact, however many processes there are.

Lightning saves no random state. Here none needs saving: each training sample has a number (`sample_numbers`) that
seeds its own draws, and dropout's global generator is seeded anew for every batch.

Shapes: `B` batch, `c×h×h` latents.
"""

import hashlib
import math
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


def sample_numbers(step: int, world_size: int, rank: int, rows: int) -> range:
    """Numbers of a rank's `rows` samples at forward pass `step` (global_step × accumulation + position in it).

    Rank r holds rows r·b … r·b + b − 1 of the pass, so the same global batch has the same numbers however it is split.
    """
    first = (step * world_size + rank) * rows
    return range(first, first + rows)


@dataclass
class DiffusionDraws:
    """All that eq. 8 draws: timesteps B int64; posterior noise and noise B×c×h×h; uniform B in [0, 1)."""

    timesteps: Tensor
    posterior: Tensor
    noise: Tensor
    uniform: Tensor

    def to(self, device: torch.device) -> "DiffusionDraws":
        """The draws on another device."""
        return DiffusionDraws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw_diffusion(
    seed: int,
    purpose: str,
    numbers: range,
    latent_shape: tuple[int, int, int],
    num_timesteps: int,
    even: bool = False,
) -> DiffusionDraws:
    """One set of draws for each sample number.

    Args:
        even: timesteps of consecutive numbers are spread evenly (multiples of the golden ratio, shifted by the seed),
            so that every batch covers them; each alone is uniform still. Other draws stay as they are.
    """
    rows = []
    for number in numbers:
        source = generator(seed, purpose, number)
        rows.append(
            (
                torch.randint(num_timesteps, (), generator=source),
                torch.randn(latent_shape, generator=source),
                torch.randn(latent_shape, generator=source),
                torch.rand((), generator=source),
            )
        )
    draws = DiffusionDraws(*(torch.stack(column) for column in zip(*rows, strict=True)))
    if even:
        draws.timesteps = even_timesteps(seed, purpose, numbers, num_timesteps)
    return draws


def even_timesteps(seed: int, purpose: str, numbers: range, num_timesteps: int) -> Tensor:
    """A low-discrepancy sequence in place of independent draws, as variational diffusion models use (arXiv 2107.00630,
    appendix I.1); B int64."""
    shift = torch.rand((), dtype=torch.float64, generator=generator(seed, purpose, "timesteps"))
    places = torch.arange(numbers.start, numbers.stop, dtype=torch.float64) * GOLDEN_RATIO + shift
    return (places.frac() * num_timesteps).long()
