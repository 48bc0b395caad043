"""AdamW with linear warm-up and linear decay to zero (paper section 3.2), the same in all stages.

First update: update number n (from 1) uses the schedule's value at n − 1, so the first update has rate 0, as in the
released code (golden README, "Optimiser"). Its Adam adds eps to sqrt(v) before the bias correction, PyTorch's after:
that is PyTorch's with eps / sqrt(1 − β₂ᵗ), which is set before each update.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class OptimizerConfig:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Decay rates of AdamW's moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    eps_before_correction: bool = True
    """Add eps before the bias correction, as the released code; false is PyTorch's own AdamW."""
    weight_decay: float = 0.01
    """Decoupled decay of every trained parameter, biases and norms too (as the released code)."""
    warm_up_steps: int = 375
    """Updates over which the rate rises linearly to `lr`; then it falls linearly to 0 at trainer.max_steps."""
    clip: float = 2.0
    """Largest norm of the whole gradient; longer ones are scaled down to it."""

    def __post_init__(self) -> None:
        for name, value, right, allowed in (
            ("lr", self.lr, self.lr > 0, "above 0"),
            ("betas", self.betas, all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            ("eps", self.eps, self.eps > 0, "above 0"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("warm_up_steps", self.warm_up_steps, self.warm_up_steps >= 0, "0 or more"),
            ("clip", self.clip, self.clip > 0, "above 0"),
        ):
            if not right:
                raise ValueError(f"optimizer.{name} is {value}; allowed: {allowed}")


def learning_rate_factor(updates: int, warm_up_steps: int, max_steps: int) -> float:
    """Share of the peak rate after `updates` finished updates: linear up, then linear to 0 at `max_steps`."""
    if updates < warm_up_steps:
        return updates / warm_up_steps
    return max(0.0, (max_steps - updates) / max(1, max_steps - warm_up_steps))


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, max_steps: int
) -> tuple[AdamW, LambdaLR]:
    """The optimiser over what trains, and its schedule, to be stepped after every update."""
    optimizer = AdamW(
        parameters, lr=config.lr, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay
    )
    if config.eps_before_correction:
        optimizer.register_step_pre_hook(partial(correct_eps, eps=config.eps))
    schedule = LambdaLR(optimizer, lambda updates: learning_rate_factor(updates, config.warm_up_steps, max_steps))
    return optimizer, schedule


def correct_eps(optimizer: AdamW, *_: Any, eps: float) -> None:
    """Set each group's eps so that the coming update equals one that adds `eps` before the bias correction."""
    for group in optimizer.param_groups:
        group["updates"] = group.get("updates", 0) + 1  # kept in checkpoints, as all of a group
        group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** group["updates"])
