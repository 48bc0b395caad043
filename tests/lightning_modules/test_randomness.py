"""Draws of timesteps and noise are functions of seed and index of the sample alone."""

import torch

from lightning_modules.randomness import DiffusionDraws, draw_diffusion

SHAPE = (1, 2, 2)


def drawn(first: int, last: int, low_discrepancy: bool = False, seed: int = 1) -> DiffusionDraws:
    return draw_diffusion(seed, "train", range(first, last), SHAPE, low_discrepancy)


def test_draws_depend_on_seed_and_index_alone() -> None:
    for low_discrepancy in (False, True):
        whole, halves = drawn(12, 16, low_discrepancy), (drawn(12, 14, low_discrepancy), drawn(14, 16, low_discrepancy))
        for name in DiffusionDraws.__dataclass_fields__:
            assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
        for other in (drawn(16, 20, low_discrepancy), drawn(12, 16, low_discrepancy, seed=2)):
            assert not torch.equal(whole.noise, other.noise) and not torch.equal(whole.time, other.time)


def test_low_discrepancy_covers_every_batch_and_changes_no_other_draw() -> None:
    size = 16
    for first in (0, 5, 10**9):
        draws = drawn(first, first + size, low_discrepancy=True)
        assert draws.time.sort().values.diff().max() < 2.5 / size  # independent draws have gaps of 0.2 and more
        assert draws.time.min() >= 0 and draws.time.max() < 1
        assert torch.equal(draws.noise, drawn(first, first + size).noise)
    one_draw = torch.cat([drawn(7, 8, low_discrepancy=True, seed=seed).time for seed in range(400)])
    assert torch.histc(one_draw.float(), 4, 0, 1).min() > 70  # uniform over seeds: 100 each, deviation 9
