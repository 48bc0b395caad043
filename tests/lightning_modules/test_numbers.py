"""Numbers that losses do not show: schedule and AdamW beside the recorded ones, draws of noise, length buckets."""

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_modules.length_buckets import length_buckets
from lightning_modules.optimizer import OptimizerConfig, build_optimizer, learning_rate_factor
from lightning_modules.randomness import DiffusionDraws, draw_diffusion

SHAPE = (1, 2, 2)


def test_schedule_equals_the_recorded_one(recorded: Path) -> None:
    for name, max_steps in [("align", 300_000), ("instruct", 200_000)]:
        rates = json.loads((recorded / "data" / "optim.json").read_text())["schedule"][name]
        assert len(rates) > 5
        for finished, rate in rates:
            assert 1e-3 * learning_rate_factor(finished, 375, max_steps) == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_first_step_has_rate_zero_and_after_the_last_it_is_zero() -> None:
    """A warm-up longer than the run is not finished; without one the first step has the peak rate."""
    for warmup, max_steps, rates in [
        (2, 6, [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        (10, 2, [0, 0.1, 0.2]),
        (0, 2, [1, 0.5, 0]),
    ]:
        assert [learning_rate_factor(n, warmup, max_steps) for n in range(max_steps + 1)] == pytest.approx(rates)


def adam_steps(recorded: Path, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, recorded) after each step; the optimizer is saved and loaded on the way."""
    settings = json.loads((recorded / "data" / "optim.json").read_text())["adam"]
    steps = load_file(recorded / "data" / "adam_steps.safetensors")
    config = OptimizerConfig(
        betas=tuple(settings["betas"]), eps=settings["eps"], weight_decay=settings["weight_decay"], **changes
    )
    weight, results = nn.Parameter(steps["param0"].clone()), []
    optimizer = build_optimizer([weight], config)
    for number, rate in enumerate(settings["lr_per_step"], 1):
        state = optimizer.state_dict()
        optimizer = build_optimizer([weight], config)
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = steps[f"grad{number}"]
        optimizer.step()
        results.append((weight.detach().clone(), steps[f"param{number}"]))
    return results


def test_adam_equals_the_recorded_one_and_pytorchs_does_not(recorded: Path) -> None:
    for ours, theirs in adam_steps(recorded):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=6e-7)  # two units in the last place
    apart = max((ours - theirs).abs().max() for ours, theirs in adam_steps(recorded, eps_before_correction=False))
    assert 1e-6 < apart < 1e-5  # see docs/log.md


def test_a_step_without_any_gradient_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([weight], OptimizerConfig(lr=0.1))
    optimizer.step()
    assert not optimizer.state and torch.equal(weight, torch.ones(3))


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


def test_every_row_once_shortest_first_in_as_many_buckets_as_asked_for() -> None:
    source = Random(0)
    for rows in range(1, 12):
        lengths = [source.choice((3, 9, source.randrange(1, 60))) for _ in range(rows)]
        for count in range(1, 9):
            buckets = length_buckets(lengths, count)
            assert len(buckets) == min(count, rows)  # ranks that compute together count on it
            assert sorted(row for bucket in buckets for row in bucket) == list(range(rows))
            assert max(map(len, buckets)) - min(map(len, buckets)) <= 1
            for shorter, longer in pairwise(buckets):
                assert max(lengths[row] for row in shorter) <= min(lengths[row] for row in longer)
