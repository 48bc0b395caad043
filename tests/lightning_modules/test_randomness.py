"""Draws of timesteps and noise: functions of seed and sample number alone."""

import torch

from lightning_modules.randomness import DiffusionDraws, draw_diffusion, sample_numbers


def test_draws_depend_on_the_sample_number_alone() -> None:
    shape = (4, 2, 2)
    whole = draw_diffusion(1, "train", sample_numbers(3, 1, 0, rows=4), shape, 1000)
    halves = [draw_diffusion(1, "train", sample_numbers(3, 2, rank, rows=2), shape, 1000) for rank in (0, 1)]
    for name in ("timesteps", "posterior", "noise", "uniform"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(half, name) for half in halves]))
    other = draw_diffusion(1, "train", sample_numbers(4, 1, 0, rows=4), shape, 1000)
    assert not torch.equal(whole.noise, other.noise)
    assert not torch.equal(whole.noise, draw_diffusion(2, "train", range(12, 16), shape, 1000).noise)


def test_even_timesteps_cover_every_batch_and_change_no_other_draw() -> None:
    shape, size = (1, 2, 2), 16

    def drawn(first: int, last: int, even: bool, seed: int = 1) -> DiffusionDraws:
        return draw_diffusion(seed, "train", range(first, last), shape, 1000, even)

    for first in (0, 5, 10**9):
        draws = drawn(first, first + size, even=True)
        gaps = draws.timesteps.sort().values.diff()
        assert gaps.max() < 2.5 * 1000 / size  # independent draws have gaps of 200 and more
        assert draws.timesteps.min() >= 0 and draws.timesteps.max() < 1000
        assert torch.equal(draws.noise, drawn(first, first + size, even=False).noise)
    halves = torch.cat([drawn(0, 8, even=True).timesteps, drawn(8, 16, even=True).timesteps])
    assert torch.equal(halves, drawn(0, 16, even=True).timesteps)
    one_draw = torch.cat([drawn(7, 8, even=True, seed=seed).timesteps for seed in range(400)])
    assert torch.histc(one_draw.float(), 4, 0, 1000).min() > 70  # uniform over seeds: 100 each, deviation 9
