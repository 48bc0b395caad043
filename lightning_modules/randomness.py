"""Random draws as pure functions of (seed, what for, which sample): resume is exact, however many processes there are.

Lightning saves no random state. Here none needs saving: each training sample has a number (`sample_numbers`) that
seeds its own draws, and dropout's global generator is seeded anew for every batch.

Shapes: `B` batch, `c×h×h` latents.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


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
    seed: int, purpose: str, numbers: range, latent_shape: tuple[int, int, int], num_timesteps: int
) -> DiffusionDraws:
    """One set of draws for each sample number."""
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
    return DiffusionDraws(*(torch.stack(column) for column in zip(*rows, strict=True)))
