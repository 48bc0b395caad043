"""Schedule and AdamW are the released code's, to the recorded numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_modules.optimizer import OptimizerConfig, build_optimizer, learning_rate_factor


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
