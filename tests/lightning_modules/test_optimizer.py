"""The schedule is the released code's, to the recorded numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lightning_modules.optimizer import OptimizerConfig, build_optimizer, learning_rate_factor


@pytest.mark.parametrize(("name", "max_steps"), [("align", 300_000), ("instruct", 200_000)])
def test_schedule_equals_the_recorded_one(golden: Path, name: str, max_steps: int) -> None:
    recorded = json.loads((golden / "data" / "optim.json").read_text())["schedule"][name]
    assert len(recorded) > 5
    for updates, rate in recorded:
        assert 1e-3 * learning_rate_factor(updates, 375, max_steps) == pytest.approx(rate, rel=1e-9, abs=1e-18)


def adam_steps(golden: Path, **changes: object) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, recorded) after each update; the optimiser is saved and loaded on the way."""
    settings = json.loads((golden / "data" / "optim.json").read_text())["adam"]
    recorded = load_file(golden / "data" / "adam_steps.safetensors")
    config = OptimizerConfig(
        betas=tuple(settings["betas"]), eps=settings["eps"], weight_decay=settings["weight_decay"], **changes
    )
    weight, results = nn.Parameter(recorded["param0"].clone()), []
    optimizer, _ = build_optimizer([weight], config, max_steps=1)
    for number, rate in enumerate(settings["lr_per_step"], 1):
        state = optimizer.state_dict()
        optimizer, _ = build_optimizer([weight], config, max_steps=1)
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = rate
        weight.grad = recorded[f"grad{number}"]
        optimizer.step()
        results.append((weight.detach().clone(), recorded[f"param{number}"]))
    return results


def test_adam_equals_the_recorded_one(golden: Path) -> None:
    for ours, recorded in adam_steps(golden):
        torch.testing.assert_close(ours, recorded, rtol=0, atol=6e-7)  # two units in the last place


def test_pytorchs_adam_is_another(golden: Path) -> None:
    """By how much it differs is in docs/log.md."""
    apart = max((ours - recorded).abs().max() for ours, recorded in adam_steps(golden, eps_before_correction=False))
    assert 1e-6 < apart < 1e-5


def test_first_update_has_rate_zero_and_the_last_is_above_it() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer, schedule = build_optimizer([weight], OptimizerConfig(lr=0.1, warm_up_steps=2), max_steps=6)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])
    assert optimizer.param_groups[0]["lr"] == 0.0


def test_warm_up_longer_than_the_run() -> None:
    assert [learning_rate_factor(n, 10, 2) for n in range(3)] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize(
    ("key", "value"), [("lr", 0.0), ("betas", (0.9, 1.0)), ("weight_decay", -1.0), ("clip", 0.0), ("warm_up_steps", -1)]
)
def test_values_that_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"optimizer\.{key} is .*allowed"):
        OptimizerConfig(**{key: value})
